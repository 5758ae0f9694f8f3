"""Loaders and datasets of other libraries."""
