"""Contract tests that every backend of a kind must pass, for your own backends too."""
