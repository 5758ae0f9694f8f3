"""Runs in several processes of `jax.distributed`."""
