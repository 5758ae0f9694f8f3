"""Diagnosis: where, in a step that has gone wrong, a number became NaN or infinite."""

from distaff.diagnosis.diagnose import Finding, Replayed, diagnose, replay

__all__ = ["Finding", "Replayed", "diagnose", "replay"]
