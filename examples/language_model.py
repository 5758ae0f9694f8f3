"""A small GPT that predicts Python source byte by byte, beside gzip and xz.

    .venv/bin/python examples/language_model.py

The text is the standard library of the Python that runs this, split by file. A run is
`runs/language-model/<version>`: samples in `texts`, bits per byte by step in `learning_curve.png`.
gzip and xz see the held-out bytes alone, and look back 32 KB, or at all of them. The model has seen
other files, and looks back at most `length` bytes; in the test, at least half of that.
"""

from __future__ import annotations

import dataclasses
import gzip
import lzma

import tyro
from matplotlib.figure import Figure

from distaff import History, data, tasks, zoo
from distaff.optim import OptimizerConfig, ParamGroup

LINEAR = {"schedule": "linear", "end_fraction": 0.0, "warmup_steps": 50}
MUON = ParamGroup("Block_*/kernel", optimizer=OptimizerConfig("muon", learning_rate=2e-2, **LINEAR))
OPTIMIZER = OptimizerConfig("adamw", learning_rate=5e-3, groups=(MUON,), **LINEAR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_epochs: int = 4
    steps_per_epoch: int = 800
    batch_size: int = 8
    length: int = 256
    num_layers: int = 4
    features: int = 128
    sample_every: int = 800
    source: str | None = None  # of another Python
    root: str = "runs"


def draw(history: History, coded: dict[str, float]) -> Figure:
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for name, style in (("step/bits_per_byte", "-"), ("val/bits_per_byte", "o-")):
        axes.plot(history.steps[name], history[name], style, markersize=4, label=name)
    for (name, bits), style in zip(coded.items(), ("--", ":", "-"), strict=True):
        axes.axhline(bits, color="black", linestyle=style, label=f"{name}, test files")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 4))
    axes.legend()
    return axes.figure


def main(options: Options) -> dict[str, float]:
    *texts, text = data.python_source(options.source)
    length, batch_size = options.length, options.batch_size
    train = data.shuffled_windows(texts[0], length, batch_size)
    val = data.held_out_windows(texts[1], length, batch_size)
    test = data.held_out_windows(text, length, batch_size, stride=length // 2)
    model = zoo.GPT(256, options.num_layers, 2, options.features, length)
    samples = {"sample_every_n_steps": options.sample_every, "sample_prompt": "def "}
    run = {"name": "language-model", "root": options.root}
    trainer = tasks.LanguageModel(model, optimizer=OPTIMIZER, **samples, **run)
    epochs = {"num_epochs": options.num_epochs, "steps_per_epoch": options.steps_per_epoch}
    # An epoch may be longer than the text.
    result = trainer.train_model(train, val, test, repeat=True, **epochs)
    if result.status == "interrupted":
        raise SystemExit(130)  # as Ctrl-C ends a program; run it again to resume
    xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    codes = {"gzip -9": gzip.compress(text, 9), "xz -9e": xz}
    bits = {name: 8 * len(code) / len(text) for name, code in codes.items()}
    bits["language model"] = result.metrics["test/bits_per_byte"]
    draw(result.history, bits).savefig(result.path / "learning_curve.png", dpi=100)
    print(trainer.sample(b"def ", 600, temperature=0.8).decode(errors="replace"))
    print(f"bits per byte of {len(text):,} held-out bytes:", bits)
    return bits


if __name__ == "__main__":
    main(tyro.cli(Options))
