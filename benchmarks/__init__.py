"""Distaff beside hand-written loops and other frameworks; `docs/speed.md` says how to run it."""
