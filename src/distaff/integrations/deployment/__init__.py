"""Integrations that take a model, or its training, elsewhere."""
