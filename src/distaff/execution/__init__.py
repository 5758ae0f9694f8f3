"""Programs on devices."""
