"""Sequences of different lengths, as batches."""
