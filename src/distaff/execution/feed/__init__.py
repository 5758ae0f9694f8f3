"""Batches, grouped into chunks and read ahead."""
