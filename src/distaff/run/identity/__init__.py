"""Decides which run a start resumes."""
