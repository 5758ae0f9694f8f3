"""Readers of files of examples."""
