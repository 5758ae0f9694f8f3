"""Checkpoints: the complete state of a run, written atomically in the background."""

from distaff.checkpoint.memory import MemoryStore
from distaff.checkpoint.protocol import NullStore, Store
from distaff.checkpoint.retention import best_steps, expired
from distaff.checkpoint.search import Located, find, forget_after, located, recorded, tidy
from distaff.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "Located",
    "MemoryStore",
    "NullStore",
    "Store",
    "best_steps",
    "expired",
    "find",
    "forget_after",
    "located",
    "recorded",
    "tidy",
]
