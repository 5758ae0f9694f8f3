"""A population on disk: it resumes, its result is loaded again, and each member is a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from distaff import EarlyStopping, OptimizerConfig, TrainerModule, data, tune
from distaff.checkpoint import arrays as stored
from distaff.cli import report as cli_report
from distaff.errors import CheckpointError, ConfigError
from distaff.report.facts import gather
from distaff.report.summary import find_runs, newest_run
from distaff.tune.population import training

RATE = "optimizer.learning_rate"
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(56, 4)).astype(np.float32)


class Noisy(TrainerModule):
    """The loss is NaN from the second epoch on if the first weight says so."""

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        noise = 0.1 * jax.random.normal(ctx.rng, batch["x"].shape)
        loss = (ctx.apply(params, batch["x"] + noise) - batch["x"].sum(axis=1)) ** 2
        is_bad = (ctx.state.step >= 4) & (params["unlucky"] > 0)
        return jax.numpy.where(is_bad, jax.numpy.nan, loss)


def loaders() -> tuple[Any, Any]:
    """Returns new loaders: three batches of training, so that accumulation has a rest."""
    train = data.ArrayLoader({"x": X[:48]}, 16, shuffle=True, seed=5)
    return train, data.ArrayLoader({"x": X[48:]}, 16)


def noisy(root: Path | None, **options: Any) -> Noisy:
    def init(key: Any, x: Any) -> Any:
        # Of the seeds 1 to 3, only the first one has more.
        return {"w": jax.random.normal(key, (4,)), "unlucky": jax.random.normal(key) - 0.4}

    stop = EarlyStopping(patience=2, min_delta=0.35)
    optimizer = OptimizerConfig("adamw", learning_rate=0.02, warmup_steps=1, accumulate=2)
    options = {"optimizer": optimizer, "callbacks": [stop], "ema": 0.5, **options}
    model = init, lambda params, x: x @ params["w"]
    own = None if root is None else str(root)
    return Noisy(
        model, root=own, name="noisy", enable_progress_bar=False, log_every_n_steps=2, **options
    )


def train(trainer: Noisy, form: str) -> tuple[Any, Any]:
    """Trains three seeds with two rates each; returns the population and where its loader is."""
    train, val = loaders()
    found = tune.train_population(
        trainer, train, val, val, vary={RATE: [0.02, 0.1]}, seeds=[1, 2, 3], num_epochs=4, form=form
    )
    return found, train.get_state()


def rows(path: Path) -> list[Any]:
    """Returns the metrics in the log of a run, without the times."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{n: x for n, x in json.loads(line).items() if n != "time"} for line in lines]


def assert_same(one: Any, other: Any) -> None:
    """Compares two populations bit by bit."""
    for a, b in zip(one.members, other.members, strict=True):
        assert (a.seed, a.status, a.reason, a.step, a.epoch) == b[:1] + b[2:6]
        assert dict(a.metrics) == dict(b.metrics)
        assert (a.best, a.history) == (b.best, b.history)
        pair = (jax.tree.leaves(each.state.replace(rng=None).arrays()) for each in (a, b))
        for x, y in zip(*pair, strict=True):
            np.testing.assert_array_equal(x, y)
        if a.path is not None and b.path is not None:
            assert rows(a.path) == rows(b.path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def written(root: Path) -> Any:
    return train(noisy(root), "stacked")


def test_each_member_is_a_run(written: Any, root: Path) -> None:
    found, _ = written
    folder = root / "noisy/population/0001"
    assert [each.path for each in found.members] == [folder / f"members/{n:04d}" for n in range(6)]
    assert {each.status for each in found.members} == {"diverged", "stopped", "finished"}
    listed = {run.path: run for run in find_runs(root)}
    assert listed.keys() == {each.path for each in found.members}
    assert newest_run(root) in listed
    for index, each in enumerate(found.members):
        run = listed[each.path]
        assert run.status == ("failed" if each.status == "diverged" else each.status)
        assert (run.reason, run.step, run.epoch) == (each.reason, each.step, each.epoch)
        assert run.best == pytest.approx(each.best.metrics)
        loaded = Noisy.load_from_checkpoint(each.path, noisy(None).model)
        assert (loaded.config.seed, loaded.config.name) == (each.seed, "noisy")
        assert loaded.step == each.best.step
        np.testing.assert_array_equal(loaded.predict(X), found.member(index).predict(X))
        assert (each.path / "figures/learning_curves.svg").is_file()
    with pytest.raises(CheckpointError, match=r"is a population.*members/0000"):
        Noisy.load_from_checkpoint(folder, noisy(None).model)


def test_a_report_groups_members_by_their_settings(written: Any) -> None:
    paths = [each.path for each in written[0].members]
    assert cli_report._paths([paths[0].parents[1]]) == paths
    facts = gather(paths, 0)
    assert [run["group"] for run in facts["runs"]] == [0, 0, 0, 1, 1, 1]
    assert facts["differs"] == [RATE, "seed"]
    assert all("val/loss" in run["curves"] for run in facts["runs"])


def test_the_same_call_loads_a_finished_population(
    written: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.PopulationRun, "_train_epoch", None)
    again, position = train(noisy(root), "stacked")
    assert_same(again, written[0])
    assert position == written[1]
    assert [each.path for each in again.members] == [each.path for each in written[0].members]


@pytest.mark.parametrize("form", ["stacked", pytest.param("in turn", marks=pytest.mark.slow)])
def test_an_interrupted_population_resumes_with_the_same_bits(
    form: str, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written if form == "stacked" else train(noisy(None), form)
    end_epoch = training.PopulationRun._end_epoch

    def interrupted(self: Any, epoch: int, *plan: Any) -> None:
        end_epoch(self, epoch, *plan)
        if epoch == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.PopulationRun, "_end_epoch", interrupted)
        patch.setattr("distaff.tune.population.directory._SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(noisy(tmp_path), form)
    folder = tmp_path / "noisy/population/0001"
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    found, position = train(noisy(tmp_path), form)
    assert_same(found, whole[0])
    assert position == whole[1]
    assert "resuming" in (folder / "log.txt").read_text()
    assert json.loads((folder / "status.json").read_text())["starts"] == 2


@pytest.mark.slow
def test_groups_resume_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_epoch, trained = training.PopulationRun._train_epoch, list[int]()

    def fit(root: Path | None) -> tuple[Any, Any]:
        (train, val), vary = loaders(), {"ema": [None, 0.5]}
        trainer = noisy(root, callbacks=())
        found = tune.train_population(trainer, train, val, val, vary=vary, seeds=[2], num_epochs=2)
        return found, train.get_state()

    def counted(self: Any, epoch: int) -> None:
        trained.append(epoch)
        if len(trained) == 6:  # the last epoch of the second group
            raise KeyboardInterrupt
        train_epoch(self, epoch)

    monkeypatch.setattr("distaff.tune.population.directory._SAVE_SECONDS", 0.0)
    whole, position = fit(None)
    trained.extend([1, 2])
    monkeypatch.setattr(training.PopulationRun, "_train_epoch", counted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    found, own_position = fit(tmp_path)
    assert trained == [1, 2, 1, 2, 1, 2, 2]
    assert_same(found, whole)
    assert position == own_position
    folder = tmp_path / "noisy/population"
    places = [each.path for each in found.members]
    assert places == [folder / "0001/members/0000", folder / "0002/members/0001"]


@pytest.mark.slow
def test_another_length_or_another_seed_is_another_population(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back, check = [], stored.check_readable
    monkeypatch.setattr(stored, "check_readable", lambda *x: read_back.append(x) or check(*x))
    trainer, (train, val) = noisy(tmp_path, callbacks=()), loaders()
    for seeds, num_epochs in (([2, 3], 1), ([2, 3], 2), ([2, 4], 1)):
        tune.multi_seed(trainer, train, val, seeds=seeds, num_epochs=num_epochs)
        train, val = loaders()
    assert len(list((tmp_path / "noisy/population").iterdir())) == 3
    assert len(read_back) == 3 * 2  # a checkpoint of the population, and of one of its members
    found = tune.multi_seed(noisy(None), train, val, seeds=[2, 3], num_epochs=1)
    assert [each.path for each in found.members] == [None, None]
    with pytest.raises(ConfigError, match="the trainer has root=None"):
        found.extract(1)


def test_extract_writes_a_member_as_a_run(written: Any, tmp_path: Path) -> None:
    found, _ = written
    path = found.extract(1, tmp_path)
    assert path == tmp_path / "noisy/0001"
    loaded = Noisy.load_from_checkpoint(path, noisy(None).model)
    np.testing.assert_array_equal(loaded.predict(X), found.member(1).predict(X))
    (run,) = find_runs(tmp_path)
    assert run.metrics == pytest.approx(found.members[1].metrics)
    assert rows(path) == rows(found.members[1].path)
    assert rows(path)[-1].keys() >= {"test/loss", "test_ema/loss"}
    with pytest.raises(ConfigError, match="extract takes an index below 6; got 6"):
        found.extract(6, tmp_path)
