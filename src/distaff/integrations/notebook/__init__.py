"""Libraries that a notebook brings."""
