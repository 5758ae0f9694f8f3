"""Trains several members of a population in one process, with programs compiled once."""
