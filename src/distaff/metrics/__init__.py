"""Metrics as mergeable accumulators: exact over uneven batches, windows, hosts and restarts."""

from distaff.metrics.accumulators import (
    Last,
    Mean,
    Metric,
    Metrics,
    PerExample,
    Sum,
    compute,
    merge,
    merge_rows,
    results,
    to_host,
)
from distaff.metrics.arguments import floating
from distaff.metrics.as_json import as_json, as_numbers
from distaff.metrics.classification import (
    F1,
    BalancedAccuracy,
    ConfusionMatrix,
    IoU,
    Precision,
    Recall,
)
from distaff.metrics.declare import declare
from distaff.metrics.extremes import Max, Min
from distaff.metrics.filled import filled
from distaff.metrics.language import Perplexity
from distaff.metrics.regression import MAE, R2, RMSE
from distaff.metrics.scores import AUROC, AveragePrecision, CalibrationError, TopK

__all__ = [
    "AUROC",
    "F1",
    "MAE",
    "R2",
    "RMSE",
    "AveragePrecision",
    "BalancedAccuracy",
    "CalibrationError",
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
    "TopK",
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
