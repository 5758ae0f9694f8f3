"""Loaders around loaders."""
