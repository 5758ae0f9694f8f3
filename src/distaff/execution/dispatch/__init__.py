"""Steps, grouped into programs."""
