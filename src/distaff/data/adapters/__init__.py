"""Loaders and data sets of other libraries."""
