"""Contract tests for loaders and loggers, including your own."""
