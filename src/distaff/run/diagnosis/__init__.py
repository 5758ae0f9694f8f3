"""Finds where a number of a bad step became NaN or infinite."""

from distaff.run.diagnosis.diagnose import Finding, Replayed, diagnose, replay
from distaff.run.diagnosis.origin import OUT_OF_RANGE

__all__ = ["OUT_OF_RANGE", "Finding", "Replayed", "diagnose", "replay"]
