"""Reads what a compiled or traced program does: exchanges, memory traffic and operations."""
