"""Options on the command line: every option of a trainer is one argument, also of union type."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tyro

from distaff import EMA, OptimizerConfig, PrecisionConfig, RematConfig, TrainerConfig, data
from distaff.core.config.encoding import from_json
from distaff.optim import Plateau

SCALE = data.Standardize.fit({"x": np.float32([[1, 2], [3, 5]])})


def of(*words: str) -> TrainerConfig:
    return tyro.cli(TrainerConfig, args=words)


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        ("--precision bf16", "precision", "bf16"),
        ("--precision bf16-params", "precision", "bf16-params"),
        (
            '--precision {"name":"bf16","float32":["head/*"]}',
            "precision",
            PrecisionConfig("bf16", float32=("head/*",)),
        ),
        ("--ema 0.999", "ema", EMA(0.999)),
        ('--ema {"decay":0.9,"warmup":false}', "ema", EMA(0.9, warmup=False)),
        ("--ema None", "ema", None),
        ("--remat blocks/*", "remat", "blocks/*"),
        ("--remat None", "remat", None),
        (
            '--remat {"patterns":["blocks/*"],"policy":null}',
            "remat",
            RematConfig("blocks/*"),
        ),
        ("--deterministic True", "deterministic", True),
        ("--deterministic warn", "deterministic", "warn"),
        ("--swa-from-epoch 3", "swa_from_epoch", 3),
        ("--standardize None", "standardize", None),
        ("--coding None", "coding", None),
        ("--resume must", "resume", "must"),
        ("--resume 300", "resume", 300),
        ("--val-every 500_steps", "val_every", "500 steps"),
        ("--val-every None", "val_every", None),
        ("--limit-batches 100", "limit_batches", 100),
        ("--limit-batches 0.5", "limit_batches", 0.5),
        ("--limit-batches train 100 val 0.5", "limit_batches", {"train": 100, "val": 0.5}),
        ("--limit-batches None", "limit_batches", None),
        ("--overfit-batches 2", "overfit_batches", 2),
        ("--root None", "root", None),
        ("--keep-every 1000", "keep_every", 1000),
        ("--keep-every 1000_steps", "keep_every", "1000 steps"),
        ("--log-every-n-steps 10", "log_every_n_steps", 10),
        ("--log-every-n-steps 10_steps", "log_every_n_steps", "10 steps"),
        ("--steps-per-call measure", "steps_per_call", "measure"),
        ("--steps-per-call 8", "steps_per_call", 8),
        ("--log-norms True", "log_norms", True),
        ("--log-norms encoder/* head/*", "log_norms", ("encoder/*", "head/*")),
        ("--nan-ok y", "nan_ok", ("y",)),
        ("--save-every 10m", "save_every", "10m"),
        ("--save-every 500_steps", "save_every", "500 steps"),
        ("--save-every None", "save_every", None),
        ("--max-time 3h30m", "max_time", "3h30m"),
        ("--stuck-after None", "stuck_after", None),
        ("--table-depth 2", "table_depth", 2),
        ("--table-depth None", "table_depth", None),
        ("--no-tune-process", "tune_process", False),
    ],
)
def test_each_option_is_an_argument(words, option, value):
    config = of(*(word.replace("_", " ") for word in words.split()))
    assert getattr(config, option) == value
    assert type(getattr(config, option)) is type(value)
    assert config == TrainerConfig(**{option: value})


@pytest.mark.parametrize("option", ["save_every", "max_time", "stuck_after"])
def test_seconds_are_the_same_as_in_python(option):
    flag = f"--{option.replace('_', '-')}"
    assert float(getattr(of(flag, "90"), option)) == getattr(TrainerConfig(**{option: 90}), option)


def test_defaults_of_a_trainer_are_those_of_its_options():
    assert of() == TrainerConfig()
    own = TrainerConfig(precision="fp16", ema=0.9, standardize=SCALE)
    assert tyro.cli(TrainerConfig, default=own, args=["--seed", "7"]) == dataclasses.replace(
        own, seed=7
    )


def test_a_plateau_is_an_argument_of_its_optimizer():
    words = ["--plateau", '{"patience": 2}', "--learning-rate", "0.1"]
    config = tyro.cli(OptimizerConfig, args=words)
    assert config == OptimizerConfig(plateau=Plateau(patience=2), learning_rate=0.1)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("--precision", "bfloat16"), "Write precision='bf16'"),
        (("--ema", "often"), "The decay of an EMA must be at least 0 and less than 1; got 'often'"),
        (("--ema", "1.5"), "got 1.5"),
        (("--ema", '{"decai": 0.9}'), "Did you mean 'decay'?"),
        (("--coding", "yes"), "coding must be the coding of a table"),
    ],
)
def test_a_wrong_value_is_an_error_with_the_message_of_the_option(words, shown, capsys):
    with pytest.raises(SystemExit):
        of(*words)
    assert shown in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_shows_the_forms_and_no_subcommand(capsys):
    with pytest.raises(SystemExit):
        of("--help")
    printed = capsys.readouterr().out
    assert "--precision {float32,bf16,bf16-params,fp16}|JSON" in printed
    assert "--ema JSON|FLOAT|{None}" in printed
    assert "subcommand" not in printed


def test_the_type_of_an_option_reads_json_as_before():
    config = TrainerConfig(precision=PrecisionConfig("fp16"), ema=EMA(0.5))
    read = from_json(TrainerConfig, {"precision": {"name": "fp16"}, "ema": {"decay": 0.5}})
    assert read == config
