"""Adapters of third-party libraries, one per file, loaded by name on first use."""
