"""Words and values that everything else uses."""
