"""What ends a run, saves it, or finds it stuck."""
