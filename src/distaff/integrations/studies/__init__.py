"""Optuna around a study: samplers and pruners by name, spaces as functions, figures."""
