"""Whole arrays and data frames: splits, folds, codings and statistics."""
