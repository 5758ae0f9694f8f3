"""Text classification by characters: which package of Python's library a passage comes from.

    .venv/bin/python examples/text_classification.py

The data are the sources that came with Python: passages of 200 characters of four packages. The
network sees characters only. The Keras form takes 32 lines.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import tyro

from distaff import data, metrics, tasks

PACKAGES = ("asyncio", "email", "unittest", "xml")
LENGTH = 200


class CharacterCNN(nn.Module):
    """Words of up to nine characters, wherever they stand."""

    @nn.compact
    def __call__(self, codes):
        x = nn.Embed(128, 16)(codes)
        x = nn.relu(nn.Conv(128, (9,))(x))
        return nn.Dense(len(PACKAGES))(jnp.max(x, axis=1))


def passages(package: str) -> np.ndarray:
    """Returns the ASCII codes of the passages of a package, `[passages, LENGTH]`."""
    folder = Path(importlib.import_module(package).__path__[0])
    text = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    codes = np.frombuffer(text, np.uint8)
    codes = codes[codes < 128]
    return codes[: len(codes) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int32)


def main(num_epochs: int = 4, root: str = "runs") -> dict[str, float]:
    texts = [passages(package) for package in PACKAGES]
    labels = np.repeat(np.arange(len(texts)), [len(each) for each in texts])
    arrays, parts = (np.concatenate(texts), labels), (0.7, 0.15, 0.15)
    train, val, (codes, wanted) = data.split(arrays, parts, seed=0, stratify=labels)
    trainer = tasks.Classifier(CharacterCNN(), name="text", root=root)
    trainer.train_model(train, val, num_epochs=num_epochs)
    guesses = trainer.predict(codes).argmax(axis=1)
    balanced = metrics.BalancedAccuracy.per_example(wanted, guesses, num_classes=len(PACKAGES))
    scores = {"accuracy": np.mean(guesses == wanted), "balanced": balanced.compute()}
    scores["largest class"] = np.bincount(wanted).max() / len(wanted)
    print("test:", ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    return scores


if __name__ == "__main__":
    tyro.cli(main)
