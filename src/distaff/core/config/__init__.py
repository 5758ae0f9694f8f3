"""Options, and how they are checked, encoded and compared."""
