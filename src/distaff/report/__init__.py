"""Runs as their files describe them: a summary, and a report in one HTML file."""
