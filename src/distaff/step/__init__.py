"""The pure training step: `TrainState`, `TrainStep`, and their wrappers."""
