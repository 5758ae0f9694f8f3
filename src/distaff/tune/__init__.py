"""Searches: many runs, and what they tell of an option's best value."""

from distaff.tune.search import Trial
from distaff.tune.space import Choice, Float, Int
from distaff.tune.study import StudyResult, study

__all__ = ["Choice", "Float", "Int", "StudyResult", "Trial", "study"]
