"""Gradient accumulation within a step."""
