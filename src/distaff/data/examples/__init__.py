"""Datasets that are read by index."""
