"""The pure step: `TrainState`, `TrainStep`, and what is wrapped around them."""
