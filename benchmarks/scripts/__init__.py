"""Whole programs, as a user would write them: each trains the same model on the digits."""
