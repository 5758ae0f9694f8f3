"""Stops and saves runs on signals and time limits, and detects stalls."""
