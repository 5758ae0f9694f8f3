"""Callbacks: your own code at six events of a run."""

from __future__ import annotations

from distaff.callbacks.callback import Callback, StepInfo, StopTraining
from distaff.callbacks.callbacks import Callbacks
from distaff.callbacks.chunk_scope import ChunkScope, WatchesChunks, around_epoch
from distaff.callbacks.early_stopping import EarlyStopping
from distaff.callbacks.profiler import Profiler
from distaff.callbacks.timer import Timer
from distaff.callbacks.validation_media import Samples, WeightHistograms
from distaff.callbacks.verify import Verify
from distaff.callbacks.webhook import Webhook

__all__ = [
    "Callback",
    "Callbacks",
    "ChunkScope",
    "EarlyStopping",
    "Profiler",
    "Samples",
    "StepInfo",
    "StopTraining",
    "Timer",
    "Verify",
    "WatchesChunks",
    "Webhook",
    "WeightHistograms",
    "around_epoch",
]
