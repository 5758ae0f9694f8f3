"""Loaders that wrap other loaders."""
