"""Runs as their files describe them: a summary, and a report in one HTML file."""

IMAGE_BYTES = 350_000
"""The most bytes of figures and images by default."""
