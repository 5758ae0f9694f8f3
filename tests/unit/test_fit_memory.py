"""`fit_memory` and `micro_batch="auto"`: a step is made to fit into the memory of its device."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import TrainerModule, data
from distaff.core.config.sizes import bytes_of
from distaff.errors import ConfigError
from distaff.execution.device_memory import bytes_for_a_step
from distaff.loggers import MemoryLogger
from distaff.trainer.memory.ladder import Tried, worth_keeping
from distaff.trainer.memory.measured import MeasuredStep
from distaff.trainer.memory.rungs import Rung, block_patterns, micro_batches, remat_rungs

X = np.random.default_rng(0).normal(size=(1024, 2)).astype(np.float32)


def init(key, x):
    return {"w": jax.random.normal(key, (2, 64)), "v": jnp.ones(64)}


def apply(params, x):
    """Returns values from activations that are much larger than the parameters."""
    return jnp.tanh(jnp.sin(x @ params["w"])) @ params["v"]


class Wide(TrainerModule):
    def __init__(self, model=(init, apply), **options):
        fixed = {
            "optimizer": optax.adam(0.01),
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
        }
        super().__init__(model, **{**fixed, "root": None, **options})

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])


def loader():
    return data.ArrayLoader({"x": X, "y": X.sum(1)}, batch_size=512, shuffle=False)


def peak(trainer, **changes):
    return MeasuredStep(trainer, TrainerModule, loader().peek(), Rung(**changes)).peak_bytes()


def lost(trainer, num_epochs=1, batches=None):
    """Returns the losses of each step."""
    log = MemoryLogger()
    trainer.loggers = [log]
    trainer.train_model(batches or loader(), num_epochs=num_epochs)
    return trainer, [x.metrics["step/loss"] for x in log.records if "step/loss" in x.metrics]


def test_the_first_rung_that_fits_is_taken_and_equals_the_option_set_by_hand():
    limit = peak(Wide(), micro_batch=128)
    assert limit < peak(Wide(), micro_batch=256) < peak(Wide())
    fitted, losses = lost(Wide(fit_memory=limit))
    assert (fitted.config.remat, fitted.config.micro_batch) == (None, 128)
    tried = fitted._workspace.fit["tried"]
    assert [each.get("micro_batch") for each in tried][-2:] == [256, 128]
    assert {each.get("remat") for each in tried} == {None, "dots_saveable", "nothing_saveable"}
    _, by_hand = lost(Wide(micro_batch=128))
    assert losses == by_hand
    assert len(losses) == 2


def test_what_fits_as_written_is_not_changed():
    trainer, _ = lost(Wide(fit_memory="1 GiB"))
    assert (trainer.config.remat, trainer.config.micro_batch) == (None, None)
    assert len(trainer._workspace.fit["tried"]) == 1


@pytest.mark.slow
def test_a_resumed_run_keeps_its_rung_without_measuring(tmp_path, monkeypatch):
    limit = peak(Wide(), micro_batch=128)

    class Broken(Wide):
        def on_training_epoch_end(self, epoch, metrics):
            if epoch == 2 and not fixed:
                raise OSError("no power")

    fixed, options = False, {"root": str(tmp_path), "fit_memory": limit}
    with pytest.raises(OSError, match="no power"):
        Broken(**options).train_model(loader(), num_epochs=3)
    monkeypatch.setattr(MeasuredStep, "peak_bytes", lambda self: pytest.fail("measured again"))
    fixed = True
    resumed = Broken(**options)
    result = resumed.train_model(loader(), num_epochs=3)
    assert result.path.name == "0001"
    assert resumed.config.micro_batch == 128
    record = json.loads((result.path / "config.json").read_text())
    assert record["fit"]["rung"] == {"micro_batch": 128}
    assert record["options"]["micro_batch"] == 128
    assert "micro_batch=128: a step needs" in (result.path / "log.txt").read_text()
    with pytest.raises(pytest.fail.Exception):  # another amount of memory is another question
        Broken(root=str(tmp_path), fit_memory=limit + 1).train_model(loader(), num_epochs=1)


def test_auto_micro_batches_compute_nothing_again_and_what_is_set_stays():
    limit = peak(Wide(), micro_batch=256)
    trainer, _ = lost(Wide(micro_batch="auto", fit_memory=limit, example_batch=loader().peek()))
    assert trainer.config.micro_batch == 256
    assert [each.get("remat") for each in trainer._workspace.fit["tried"]] == [None, None]
    with pytest.raises(ConfigError) as error:
        Wide(fit_memory=limit, micro_batch=512).train_model(loader(), num_epochs=1)
    assert str(error.value).count("\n") == 4  # as written, and two kinds of remat


@pytest.mark.slow
def test_nothing_that_fits_is_an_error_with_all_peaks():
    with pytest.raises(ConfigError, match="may need 1000 B on each device") as error:
        Wide(fit_memory=1000).train_model(loader(), num_epochs=1)
    text = str(error.value)
    assert text.count("KiB: ") >= 11
    assert "as written" in text
    assert "micro_batch=1\n" in text
    assert "mesh='fsdp'" in text
    with pytest.raises(ConfigError, match="debug=True"):
        Wide(fit_memory=True, debug=True).train_model(loader(), num_epochs=1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(2)(jnp.sin(jnp.tanh(nn.Dense(32)(x)))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=4)
        return blocks(name="blocks")(x, None)[0].sum(-1)


@pytest.mark.slow
def test_scanned_blocks_are_computed_again_and_equal_the_option_set_by_hand():
    plain = Wide(model=Scanned())
    limit = peak(plain, remat="blocks")
    trainer, losses = lost(plain.variant(fit_memory=limit))
    assert (trainer.config.remat, trainer.config.micro_batch) == ("blocks", None)
    _, by_hand = lost(plain.variant(remat="blocks"))
    assert losses == by_hand
    needed = [each["bytes"] for each in trainer._workspace.fit["tried"]]
    assert needed[-1] < 0.5 * needed[0]


def test_what_is_computed_again_saves_a_tenth_or_is_left_out():
    rungs = [Rung(), Rung("dots_saveable"), Rung("Block_*")]

    def kept(*needed):
        return worth_keeping([Tried(*each) for each in zip(rungs, needed, strict=True)])

    assert kept(100, 95, 91) == Rung()
    assert kept(100, 89, 85) == Rung("dots_saveable")
    assert kept(100, 120, 50) == kept(100, None, 50) == kept(None, None, 50) == rungs[2]


def test_blocks_are_named_from_the_parameters():
    kernel = {"kernel": np.ones((4, 4, 4))}
    block = {"up": kernel, "down": kernel}
    assert block_patterns({"Dense_0": kernel, "Dense_1": kernel}) == []
    assert block_patterns({"encoder": {"blocks": {"0": block, "1": block}}}) == ["encoder/blocks/*"]
    both = {"A_0": block, "A_1": block, "B_0": block, "B_1": block, "C_0": block}
    assert block_patterns(both) == ["A_*", "B_*"]
    assert block_patterns({"blocks": block, "head": kernel}) == ["blocks"]
    assert [*remat_rungs(both)] == [Rung("dots_saveable"), Rung(["A_*", "B_*"])]


def test_micro_batches_divide_a_batch_over_its_devices():
    assert [*micro_batches(48, 4)] == [24, 12, 4]
    assert [*micro_batches(7, 1)] == [1]
    assert [*micro_batches(1, 1)] == []


def test_amounts_of_memory():
    assert bytes_of("12 GiB") == 12 * 2**30
    assert bytes_for_a_step("2kib") == 2048
    assert 0 < bytes_for_a_step(True) < bytes_for_a_step(True, held=2**40)
    for wrong in ("12 apples", "", 0, -1, None, float("inf")):
        with pytest.raises(ConfigError, match="fit_memory must be a size"):
            bytes_of(wrong, "fit_memory")
