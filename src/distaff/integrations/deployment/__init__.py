"""Integrations that take a model elsewhere."""
