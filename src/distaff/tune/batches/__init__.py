"""Trains the trials of a study in batches: those with the same programs as one population."""
