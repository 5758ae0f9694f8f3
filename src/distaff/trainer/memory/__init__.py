"""Makes the training step of a run fit into memory."""
