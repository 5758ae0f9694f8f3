"""A GPT as large as those that need many devices, which `benchmarks.plans` plans."""

from __future__ import annotations

import numpy as np

import distaff
from distaff import tasks, zoo

SIZES = {
    "1B": {"num_layers": 16, "num_heads": 16, "features": 2048, "max_length": 2048},
    "7B": {"num_layers": 32, "num_heads": 32, "features": 4096, "max_length": 2048},
    "70B": {"num_layers": 80, "num_heads": 64, "features": 8192, "max_length": 4096},
}
"""0.9, 6.7 and 65 billion parameters."""


def main(size: str = "1B") -> None:
    """Trains a GPT on tokens.

    Args:
        size: a key of `SIZES`.
    """
    model = zoo.GPT(vocab_size=32_768, scan_layers=True, **SIZES[size])
    optimizer = distaff.OptimizerConfig("adamw", learning_rate=1e-4)
    trainer = tasks.LanguageModel(
        model, optimizer=optimizer, precision="bf16", remat="blocks", root=None, mesh="fsdp"
    )
    trainer.train_model(np.zeros((64, model.max_length + 1), np.int32), num_epochs=1)
