"""Metrics as mergeable accumulators: exact over uneven batches, windows, hosts and restarts."""

from distaff.metrics.accumulators import (
    Last,
    Mean,
    Metric,
    Metrics,
    PerExample,
    Sum,
    compute,
    floating,
    merge,
    merge_rows,
    results,
    to_host,
)
from distaff.metrics.as_json import as_json, as_numbers
from distaff.metrics.classification import AUROC, F1, ConfusionMatrix, IoU, Precision, Recall
from distaff.metrics.declare import declare
from distaff.metrics.extremes import Max, Min
from distaff.metrics.filled import filled
from distaff.metrics.language import Perplexity

__all__ = [
    "AUROC",
    "F1",
    "ConfusionMatrix",
    "IoU",
    "Last",
    "Max",
    "Mean",
    "Metric",
    "Metrics",
    "Min",
    "PerExample",
    "Perplexity",
    "Precision",
    "Recall",
    "Sum",
    "as_json",
    "as_numbers",
    "compute",
    "declare",
    "filled",
    "floating",
    "merge",
    "merge_rows",
    "results",
    "to_host",
]
