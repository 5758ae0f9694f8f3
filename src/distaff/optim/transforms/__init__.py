"""Optax transformations, and what a step offers to them."""
