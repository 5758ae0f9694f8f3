"""Searches over options, and comparisons of optimizers."""

from distaff.tune.compare import compare
from distaff.tune.comparison import Comparison, OptimizerResult, OptimizerRun
from distaff.tune.search import Trial
from distaff.tune.space import Choice, Float, Int
from distaff.tune.study import StudyResult, study

__all__ = [
    "Choice",
    "Comparison",
    "Float",
    "Int",
    "OptimizerResult",
    "OptimizerRun",
    "StudyResult",
    "Trial",
    "compare",
    "study",
]
