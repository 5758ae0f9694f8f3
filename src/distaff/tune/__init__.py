"""Finds learning rates and batch sizes, searches, compares, and trains several seeds at once."""

from distaff.core.config.options import traced
from distaff.tune.batch_size import BatchSizeSearch, TriedBatch, find_batch_size
from distaff.tune.compare import compare
from distaff.tune.comparison import Comparison, OptimizerResult, OptimizerRun
from distaff.tune.dimension import Choice, Float, Int
from distaff.tune.evolution.training import population_based_training
from distaff.tune.learning_rate import find_learning_rate
from distaff.tune.population.member import TrainedMember
from distaff.tune.population.multi_seed import multi_seed, train_population
from distaff.tune.population.result import PairedDifference, Population, Spread
from distaff.tune.range_test import RangeTest
from distaff.tune.search import Trial
from distaff.tune.study import StudyResult, study

__all__ = [
    "BatchSizeSearch",
    "Choice",
    "Comparison",
    "Float",
    "Int",
    "OptimizerResult",
    "OptimizerRun",
    "PairedDifference",
    "Population",
    "RangeTest",
    "Spread",
    "StudyResult",
    "TrainedMember",
    "Trial",
    "TriedBatch",
    "compare",
    "find_batch_size",
    "find_learning_rate",
    "multi_seed",
    "population_based_training",
    "study",
    "traced",
    "train_population",
]
