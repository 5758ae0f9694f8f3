"""A small GPT on many short documents, in packed and in padded batches: how fast each learns.

    .venv/bin/python examples/packing.py

The documents are the functions in the source of Python's standard library, at most `length` bytes
of each, split by file. All runs see about as many bytes of text, in a step and in all; what differs
is how much padding is computed with them. The held-out loss is over the same functions for all.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import tyro

from distaff import data, tasks, zoo
from distaff.optim import OptimizerConfig

FUNCTION = re.compile(rb"^(?P<indent> *)def .*\n(?:(?P=indent) .*\n|\n)+", re.MULTILINE)
QUIET = {"root": None, "enable_progress_bar": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_tokens: int = 200_000  # of text, to train on
    batch_size: int = 8
    length: int = 512
    num_layers: int = 2
    features: int = 64
    learning_rate: float = 3e-3
    num_held_out: int = 100  # functions
    source: str | None = None  # of another Python


def functions(text: bytes, length: int) -> list[np.ndarray]:
    found = (np.frombuffer(each.group(), np.uint8) for each in FUNCTION.finditer(text))
    return [tokens[:length] for tokens in found]


def main(options: Options) -> dict[str, dict[str, float]]:
    length, batch_size = options.length, options.batch_size
    text, held_out, _ = data.python_source(options.source)
    train, val = functions(text, length), functions(held_out, length)[: options.num_held_out]
    order = {"shuffle": True, "seed": 0}
    mean = sum(map(len, train)) / len(train)
    num_rows = max(1, round(batch_size * mean / length))  # hold as much text as a padded batch
    loaders = {
        "packed": data.packed(train, length, num_rows, open_rows=32, **order),
        "bucketed": data.bucketed(train, [length // 4, length // 2, length], batch_size, **order),
        "padded": data.bucketed(train, [length], batch_size, **order),
    }
    found = {}
    for name, loader in loaders.items():
        tokens_per_batch = batch_size * mean
        if name == "packed":
            tokens_per_batch = float(np.mean([np.sum(b["segment_ids"] > 0) for b in loader]))
        num_steps = max(1, round(options.num_tokens / tokens_per_batch))
        optimizer = OptimizerConfig("adamw", learning_rate=options.learning_rate)
        model = zoo.GPT(256, options.num_layers, 2, options.features, length)
        trainer = tasks.LanguageModel(model, optimizer=optimizer, **QUIET)
        trainer.train_model(loader, num_epochs=1, steps_per_epoch=num_steps, repeat=True)
        assert trainer.last_run.report is not None
        seconds = num_steps * sum(trainer.last_run.report.facts()["seconds_per_step"].values())
        held = trainer.eval_model(data.bucketed(val, [length], 16))
        found[name] = {
            "steps": num_steps,
            "tokens_per_second": num_steps * tokens_per_batch / seconds,
            "bits_per_byte": held["bits_per_byte"],
        }
    for name, numbers in found.items():
        print(name, {key: round(value, 3) for key, value in numbers.items()})
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
