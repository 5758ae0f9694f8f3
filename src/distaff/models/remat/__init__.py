"""Rematerialization: activations are computed again in the backward pass instead of stored."""
