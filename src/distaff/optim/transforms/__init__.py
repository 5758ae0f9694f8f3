"""Optax transformations, and the extra arguments that a step passes to them."""
