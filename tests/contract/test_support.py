"""What each kind of loader and of model supports, beside the tables of docs/support.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import support
from distaff import Callback, Lora, TrainerModule, data
from distaff.checkpoint.weights.names import named
from distaff.checkpoint.weights.source import open_source
from distaff.errors import ChangedBatchesError, CheckpointError
from distaff.execution.feed.chunk import Gathered
from distaff.execution.feed.feed import Feed
from distaff.models import as_model
from distaff.testing.loaders import LoaderContract
from loader_kinds import BATCH, LOADERS, Rows
from model_kinds import KINDS, NAMES, Kind


def yes(found: bool) -> str:
    return "yes" if found else "no"


def resumes_exactly(make: Callable[[Rows], Any]) -> str:
    """The contract's own test, unless the loader is refused as one that does not shuffle alike."""

    class Made(LoaderContract):
        def make_loader(self) -> data.Loader:
            return data.as_loader(make(Rows()))

    try:
        gone_on(make, Rows())
    except ChangedBatchesError:
        return "no, is refused"
    Made().test_state_resumes_exactly_at_every_position()
    return "yes"


def goes_there_at_once(make: Callable[[Rows], Any]) -> str:
    """Whether of the twelve rows before the position no more than a batch is asked for again."""
    rows = Rows()
    with suppress(ChangedBatchesError):
        next(iter(gone_on(make, rows)))
        assert {12, 13, 14, 15} <= set(rows.asked)
    return yes(len(set(rows.asked) & set(range(12))) <= BATCH)


def gone_on(make: Callable[[Rows], Any], rows: Rows) -> data.Loader:
    """Returns a new loader of rows after three batches of the second epoch."""
    loader = data.as_loader(make(Rows()))
    list(loader), list(islice(loader, 3))
    again = data.as_loader(make(rows))
    data.first_batch(again)  # a run looks at it in any case
    rows.asked.clear()
    again.set_state(loader.get_state())
    return again


def lies_on_the_device(make: Callable[[Rows], Any]) -> str:
    feed = Feed(data.as_loader(make(Rows())), name="train", resident=True)
    return yes(all(isinstance(chunk.source, Gathered) for chunk in feed.epoch()))


def has_a_length(make: Callable[[Rows], Any]) -> str:
    length = data.num_batches(data.as_loader(make(Rows())))
    assert length in (None, 6)
    return yes(length is not None)


LOADER_COLUMNS = {
    "resumes exactly": resumes_exactly,
    "goes there without reading": goes_there_at_once,
    "arrays stay on the device": lies_on_the_device,
    "knows its length": has_a_length,
}


PEERS = {"torch", "torchdata", "datasets", "tensorflow"}
LOADER_NAMES = [
    pytest.param(name, marks=pytest.mark.peer(package) if package in PEERS else ())
    for name, (_, package) in LOADERS.items()
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", LOADER_NAMES)
def test_loader_supports_what_the_table_says(name: str) -> None:
    make, _ = LOADERS[name]
    support.check("loader", name, {column: f(make) for column, f in LOADER_COLUMNS.items()})


class Regression(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class Stops(Callback):
    """Fails after the second of three epochs, as a machine does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, info: Any) -> None:
        if info.epoch == self.epoch:
            raise RuntimeError("gone")


class Case(NamedTuple):
    """A kind of model, a model of it with dropout and running statistics, and a run of that."""

    kind: Kind
    source: Any
    run: Regression


def loader() -> data.ArrayLoader:
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    return data.ArrayLoader({"x": x, "y": x.sum(axis=1) + 1}, 16, shuffle=True, seed=1)


X, KEY = jnp.asarray(loader().arrays["x"][:16]), jax.random.key(0)


def trained(source: Any, *, ends: int = 0, **options: Any) -> Regression:
    quiet = {"root": None, "enable_progress_bar": False, "steps_per_call": 2}
    val = loader() if "root" in options else None
    trainer = Regression(
        source, optimizer=optax.adam(1e-2), callbacks=[Stops(ends)], **{**quiet, **options}
    )
    trainer.train_model(loader(), val, num_epochs=3)
    return trainer


def numbers(trainer: Regression) -> dict[str, Any]:
    return {name: tree for name, tree in trainer.state.arrays().items() if name != "rng"}


def same(tree: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), tree, other))


def learns(case: Case) -> str:
    lines = (case.run.last_run.path / "metrics.jsonl").read_text().splitlines()
    losses = [row["val/loss"] for row in map(json.loads, lines) if "val/loss" in row]
    return yes(len(losses) == 3 and losses[2] < losses[0])


def drops_out(case: Case) -> str:
    """Masks differ between keys and examples in training, and there are none in evaluation."""
    model, x = as_model(case.kind.mlp(0.5)), jnp.ones((4, 3))
    variables = model.init(KEY, x)

    def outputs(seed: int, *, train: bool) -> Any:
        return model.apply(variables, x, train=train, key=jax.random.key(seed))[0]

    drawn = outputs(1, train=True)
    differ = not same(drawn, outputs(2, train=True)) and len(np.unique(drawn)) > 1
    return yes(differ and same(outputs(1, train=False), outputs(2, train=False)))


def keeps_statistics(case: Case) -> str:
    """Running statistics move in training alone, and evaluation uses them."""
    model = as_model(case.kind.mlp(0.0, True))
    before = model.init(KEY, X)
    _, after = model.apply(before, 2 * X + 3, train=True, key=KEY)
    outputs, still = model.apply(after, X, train=False, key=KEY)
    moved = not same(before[1:], after[1:]) and same(before.params, after.params)
    used = not same(outputs, model.apply(before, X, train=False, key=KEY)[0])
    return yes(moved and used and same(still, after))


def resumes(case: Case) -> str:
    with pytest.raises(RuntimeError, match="gone"):
        trained(case.source, ends=2, root="stopped")
    return yes(same(numbers(trained(case.source, root="stopped")), numbers(case.run)))


def fuses(case: Case) -> str:
    single = trained(case.source, steps_per_call=1)
    return yes(same(numbers(single), numbers(case.run)))


def is_read_without_code(case: Case) -> str:
    """A checkpoint has every array under a name, and nothing but arrays is needed to read it."""
    source, held = open_source(case.run.last_run.path), named(case.run.state)
    return yes(same(source.read(list(source.forms)), held))


def is_rebuilt(case: Case) -> str:
    try:
        Regression.load_from_checkpoint(case.run.last_run.path)
    except CheckpointError:
        loaded = Regression.load_from_checkpoint(case.run.last_run.path, case.source)
        assert same(numbers(loaded)["params"], numbers(case.run)["params"])
        return "no, it is passed"
    return "yes"


def adapts(case: Case) -> str:
    """A `Lora` begins as its base, and trains two matrices beside each kernel `[3, 8]`, `[8, 1]`.

    The input's one is drawn, the output's one zero.
    """
    lora = Lora(case.source, case.kind.kernels, rank=2)
    model, before = as_model(lora), as_model(lora).init(KEY, X)
    assert same(model.merged(before).params, as_model(case.source).init(KEY, X).params)
    drawn = sorted(leaf.size for leaf in jax.tree.leaves(before.params) if leaf.any())
    after = trained(lora).state
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(after.params))
    assert all(leaf.any() for leaf in jax.tree.leaves(after.params))
    return yes(drawn == [2 * 3, 2 * 8] and sizes == [2 * 1, 2 * 3, 2 * 8, 2 * 8])


def is_exported(case: Case) -> str:
    """What a file of safetensors holds is enough for a new model to predict the same bits."""
    path = case.run.export_weights("weights.safetensors")
    again = Regression(case.source, init_from=path, root=None, enable_progress_bar=False)
    again._set_up({"x": X, "y": X[:, 0]})
    return yes(same(again.predict([{"x": X}]), case.run.predict([{"x": X}])))


def counts_flops(case: Case) -> str:
    rows = case.run.model.layers(KEY, X)
    assert (rows[0].flops or 0) > 0
    inner = [row.flops for row in rows[1:] if row.variables]
    return yes(None not in inner) if inner else "of the whole"


MODEL_COLUMNS = {
    "learns": learns,
    "dropout": drops_out,
    "running statistics": keeps_statistics,
    "resumes exactly": resumes,
    "fused steps are equal": fuses,
    "checkpoint is read without code": is_read_without_code,
    "model is rebuilt from it": is_rebuilt,
    "LoRA": adapts,
    "safetensors": is_exported,
    "FLOPs per module": counts_flops,
}
MODELS = {
    "linen": "Flax Linen",
    "nnx": "Flax NNX",
    "equinox": "Equinox",
    "functions": "functions `(init, apply)`",
    "haiku": "Haiku's transformed functions",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_model_supports_what_the_table_says(name: str) -> None:
    kind = KINDS[name]
    source = kind.mlp(0.2, True)
    case = Case(kind, source, trained(source, root="whole"))
    support.check("model", MODELS[name], {column: f(case) for column, f in MODEL_COLUMNS.items()})


def test_tables_have_these_rows_and_no_others() -> None:
    found = support.tables(support.PAGE.read_text())
    assert {name: list(table) for name, table in found.items()} == {
        "loader": list(LOADERS),
        "model": list(MODELS.values()),
    }
