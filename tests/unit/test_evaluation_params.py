"""Parameters to evaluate with that are not those in training: found, used, saved, left alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import distaff
from distaff import OptimizerConfig, data, zoo
from distaff.checkpoint import CheckpointStore
from distaff.errors import CheckpointError, ConfigError
from distaff.optim import ParamGroup, build_optimizer, evaluation_params, has_evaluation_params

PARAMS = {
    "body": {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.array([[0.5], [-1.0]])},
}
AVERAGING = optax.contrib.schedule_free_sgd(0.1)
NORMALIZED_SGD = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


def sam(outer: Any = None, **options: Any) -> Any:
    return optax.contrib.sam(outer or optax.sgd(0.1), NORMALIZED_SGD, **options)


def stepped(tx: Any, steps: int = 3, params: Any = PARAMS) -> tuple[Any, Any]:
    """Returns state and parameters after some steps."""
    tx, opt_state = optax.with_extra_args_support(tx), tx.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step), params)  # noqa: B023 - at once
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return opt_state, params


def same_bits(left: Any, right: Any) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def average_of(tx: Any, steps: int = 3, params: Any = PARAMS) -> Any:
    return optax.contrib.schedule_free_eval_params(*stepped(tx, steps, params))


# The function


@pytest.mark.slow_but("adamw")
@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1),
        optax.lbfgs(linesearch=None),
        optax.contrib.prodigy(),
        optax.contrib.mechanize(optax.sgd(1.0)),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        optax.masked(optax.adam(0.1), {"body": True, "head": False}),
    ],
    ids=["adamw", "lbfgs", "prodigy", "mechanize", "accumulation", "masked"],
)
def test_most_optimizers_evaluate_with_the_parameters_themselves(tx):
    opt_state, params = stepped(tx)
    assert not has_evaluation_params(opt_state)
    assert evaluation_params(opt_state, params) is params


def test_without_an_optimizer_the_parameters_are_the_parameters():
    assert evaluation_params(None, PARAMS) is PARAMS
    assert not has_evaluation_params(None)


WRAPPED = {
    "alone": AVERAGING,
    "chain": optax.chain(optax.clip(1e6), AVERAGING, optax.identity()),
    "named chain": optax.named_chain(("clip", optax.clip(1e6)), ("average", AVERAGING)),
    "accumulation": optax.MultiSteps(AVERAGING, 1).gradient_transformation(),
    "hyperparameters": optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(0.1),
    "unless not finite": optax.apply_if_finite(AVERAGING, 3),
    "masked, all shown": optax.masked(AVERAGING, True),
    "partition": optax.partition({"all": AVERAGING}, "all"),
    "config": build_optimizer(
        OptimizerConfig("schedule_free_sgd", learning_rate=0.1, schedule="constant"), 3
    ).tx,
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.slow
def test_average_of_schedule_free_is_found_in_whatever_is_around_it(tx):
    opt_state, params = stepped(tx)
    assert has_evaluation_params(opt_state)
    evaluated = evaluation_params(opt_state, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        evaluated,
        average_of(AVERAGING),
    )
    assert not np.allclose(evaluated["head"]["kernel"], params["head"]["kernel"], atol=1e-4)


def test_average_is_the_mean_of_the_points_of_plain_descent():
    # Primal averaging with b1 = 1: gradients at the mean of all points, here of a constant slope.
    tx, params = optax.contrib.schedule_free_sgd(0.5, b1=1.0), jnp.array([2.0])
    opt_state, points = tx.init(params), []
    for _ in range(4):
        updates, opt_state = tx.update(jnp.ones(1), opt_state, params)
        params = optax.apply_updates(params, updates)
        points.append(opt_state.z)
    np.testing.assert_allclose(np.array(points)[:, 0], [1.5, 1.0, 0.5, 0.0])
    np.testing.assert_allclose(evaluation_params(opt_state, params), np.mean(points), rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optax.partition({0: AVERAGING, 1: optax.sgd(0.1)}, {"body": 0, "head": 1}),
        build_optimizer(
            OptimizerConfig("sgd", groups=(ParamGroup("body/*", optimizer=AVERAGING),)), 3
        ).tx,
        optax.masked(AVERAGING, {"body": True, "head": False}),
    ],
    ids=["partition", "group", "masked"],
)
def test_parameters_that_a_mask_hides_from_schedule_free_are_evaluated_as_they_are(tx):
    opt_state, params = stepped(tx)
    evaluated = evaluation_params(opt_state, params)
    assert evaluated["head"]["kernel"] is params["head"]["kernel"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        evaluated["body"],
        average_of(AVERAGING, params=PARAMS["body"]),
    )


def test_two_averages_cover_their_own_parameters_each():
    other = optax.contrib.schedule_free_sgd(0.02, b1=0.5)
    tx = optax.partition({0: AVERAGING, 1: other}, {"body": 0, "head": 1})
    evaluated = evaluation_params(*stepped(tx))
    for part, own in (("body", AVERAGING), ("head", other)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            evaluated[part],
            average_of(own, params=PARAMS[part]),
        )


@pytest.mark.parametrize(
    ("kept", "trained"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]
)
def test_average_has_the_dtype_of_the_parameters_whatever_the_state_is_kept_in(kept, trained):
    tx = optax.contrib.schedule_free_sgd(0.1, state_dtype=kept)
    params = optax.tree.cast(PARAMS, trained)
    assert {leaf.dtype for leaf in jax.tree.leaves(tx.init(params).z)} == {jnp.dtype(kept)}
    evaluated = evaluation_params(tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(evaluated)} == {jnp.dtype(trained)}


def test_sam_in_the_open_is_evaluated_where_it_was_before_it_went_uphill():
    tx = sam()
    for steps, expected in ((2, 2), (3, 2), (4, 4)):
        opt_state, params = stepped(tx, steps)
        assert has_evaluation_params(opt_state)
        evaluated, (_, unperturbed) = evaluation_params(opt_state, params), stepped(tx, expected)
        assert same_bits(evaluated, unperturbed)
        assert same_bits(evaluated, params) == (steps == expected)


def test_sam_without_side_effects_is_evaluated_as_its_optimizer_is():
    opt_state = sam(opaque_mode=True).init(PARAMS)
    assert not has_evaluation_params(opt_state)
    assert evaluation_params(opt_state, PARAMS) is PARAMS
    for opaque in (True, False):
        opt_state = sam(AVERAGING, opaque_mode=opaque).init(PARAMS)
        opt_state = opt_state._replace(opt_state=stepped(AVERAGING)[0])
        _, params = stepped(AVERAGING)
        assert same_bits(evaluation_params(opt_state, params), average_of(AVERAGING))


@pytest.mark.parametrize("tx", [AVERAGING, sam()], ids=["schedule-free", "sam"])
def test_structure_that_cannot_be_evaluated_is_an_error(tx):
    flat = optax.flatten(tx)
    with pytest.raises(ConfigError, match=r"must see them in the model's structure.*flatten"):
        evaluation_params(flat.init(PARAMS), PARAMS)


# The trainer


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def loader(seed: int = 0) -> data.ArrayLoader:
    x = np.random.default_rng(seed).normal(size=(24, 3)).astype(np.float32)
    return data.ArrayLoader({"x": x, "y": (x @ [1.0, -2.0, 0.5]).astype(np.float32)}, 8)


def make(tx: Any = AVERAGING, cls: type[Any] = Regression, **options: Any) -> Any:
    defaults = {"optimizer": tx, "root": None, "name": "run", "enable_progress_bar": False}
    return cls(zoo.MLP((4, 1)), **{**defaults, **options})


def loss_at(params: Any, batches: data.ArrayLoader) -> float:
    outputs = zoo.MLP((4, 1)).apply({"params": params}, batches.arrays["x"])
    return float(jnp.square(outputs[:, 0] - batches.arrays["y"]).mean())


@pytest.mark.parametrize("tx", [AVERAGING, sam()], ids=["schedule-free", "sam"])
@pytest.mark.slow
def test_validation_prediction_binding_and_checkpoints_have_the_parameters_to_evaluate(
    tx, tmp_path
):
    trainer = make(tx, root=str(tmp_path))
    result = trainer.train_model(loader(), loader(1), loader(2), num_epochs=3)
    evaluated = evaluation_params(trainer.state.opt_state, trainer.state.params)
    assert result.best.step == 9
    at_average, at_params = loss_at(evaluated, loader(1)), loss_at(trainer.state.params, loader(1))
    assert result.metrics["val/loss"] == pytest.approx(at_average, rel=1e-5)
    assert result.metrics["val/loss"] != pytest.approx(at_params, rel=1e-3)
    assert result.metrics["test/loss"] == pytest.approx(loss_at(evaluated, loader(2)), rel=1e-5)
    outputs = trainer.predict(loader(2))
    x = loader(2).arrays["x"]
    np.testing.assert_allclose(
        outputs, zoo.MLP((4, 1)).apply({"params": evaluated}, x), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(trainer.bind_model()(x), outputs, rtol=1e-5, atol=1e-6)
    loaded = Regression.load_from_checkpoint(result.path)
    np.testing.assert_array_equal(loaded.predict(loader(2)), outputs)
    assert loaded.eval_model(loader(1), "val/")["val/loss"] == result.metrics["val/loss"]


class Watching(Regression):
    """Keeps what the bound model predicts after each validation."""

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        error = self.bind_model()(val_loader.arrays["x"])[:, 0] - val_loader.arrays["y"]
        metrics["val/bound"] = float(jnp.square(error).mean())


@pytest.mark.slow
def test_validation_hook_binds_the_model_that_was_validated():
    metrics = make(cls=Watching).train_model(loader(), loader(1), num_epochs=2).metrics
    assert metrics["val/bound"] == pytest.approx(metrics["val/loss"], rel=1e-5)


def test_training_goes_on_bit_for_bit_whether_it_is_validated_or_not():
    validated, alone = make(), make(check_val_every_n_epoch=4)
    validated.train_model(loader(), loader(1), num_epochs=4)
    alone.train_model(loader(), num_epochs=4)
    assert validated.best.step == 12
    for member in ("params", "opt_state"):
        assert same_bits(getattr(validated.state, member), getattr(alone.state, member))


def test_load_model_restores_what_is_trained_and_not_the_average():
    trainer = make(cls=BestInTheMiddle)
    trainer.train_model(loader(), loader(1), num_epochs=3)
    shorter = make()
    shorter.train_model(loader(), num_epochs=2)
    assert trainer.best.epoch == 2
    for member in ("params", "opt_state"):
        assert same_bits(getattr(trainer.state, member), getattr(shorter.state, member))


class BestInTheMiddle(Regression):
    monitor = distaff.Monitor("val/score")

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        metrics["val/score"] = abs(epoch - 2.0)


@pytest.mark.slow
def test_second_run_starts_from_the_average_as_a_loaded_model_does(tmp_path):
    trainer = make(root=str(tmp_path), keep_optimizer=False)
    result = trainer.train_model(loader(), num_epochs=2)
    evaluated = evaluation_params(trainer.state.opt_state, trainer.state.params)
    loaded = Regression.load_from_checkpoint(result.path, root=None)
    loaded.optimizer = trainer.optimizer
    for again in (trainer, loaded):
        again.init_optimizer(6)
        assert same_bits(again.state.params, jax.tree.map(np.asarray, loaded.state.params))
    np.testing.assert_allclose(
        trainer.state.params["Dense_0"]["kernel"], evaluated["Dense_0"]["kernel"], rtol=1e-5
    )


@pytest.fixture
def traces(monkeypatch):
    """Where each trace of the program for the parameters to evaluate with leaves a mark."""
    found = []

    def counted(opt_state: Any, params: Any) -> Any:
        found.append(1)
        return evaluation_params(opt_state, params)

    monkeypatch.setattr("distaff.run.workspace.evaluation_params", counted)
    return found


def saved(trainer: Any, path: Any) -> Any:
    store = CheckpointStore(path / "checkpoints")
    wanted = {"evaluation-params": trainer.state.params}
    return store.load(trainer.step, wanted)["evaluation-params"]


@pytest.mark.slow
def test_other_optimizers_pay_nothing(traces, tmp_path):
    trainer = make(optax.adam(0.1), root=str(tmp_path))
    result = trainer.train_model(loader(), loader(1), num_epochs=2)
    assert trainer.evaluation_state() is trainer.state
    assert traces == []
    with pytest.raises(CheckpointError):
        saved(trainer, result.path)


def test_evaluation_parameters_are_one_program_and_one_more_member_of_a_checkpoint(
    traces, tmp_path
):
    trainer = make(root=str(tmp_path))
    result = trainer.train_model(loader(), loader(1), num_epochs=3)
    trainer.predict(loader(1))
    assert traces == [1]
    assert same_bits(saved(trainer, result.path), trainer.evaluation_state().params)


@pytest.mark.slow
def test_debugging_evaluates_the_same_average():
    losses = [
        make(debug=debug).train_model(loader(), loader(1), num_epochs=1).metrics["val/loss"]
        for debug in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_structure_that_cannot_be_evaluated_is_refused_before_anything_is_written(tmp_path):
    trainer = make(optax.flatten(AVERAGING), root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"optax\.flatten"):
        trainer.train_model(loader(), num_epochs=1)
    assert list(tmp_path.iterdir()) == []
