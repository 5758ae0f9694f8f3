"""A served model: the outputs of `predict`, whoever shares the batch."""

from __future__ import annotations

import asyncio
import io
import logging
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgi import Answer, talk
from distaff import cli, export_model, tasks, zoo
from distaff.errors import ConfigError, DataFileError
from distaff.serve import Application, Form, ServedModel, ServeOptions
from distaff.serve.wire import NPZ

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(40, 8, 8, 1)).astype(np.float32)
BATCH = {"image": IMAGES, "label": np.arange(40, dtype=np.int32) % 10}
OPTIONS = {"batch_size": 8, "enable_progress_bar": False}


class Case(NamedTuple):
    trainer: tasks.Classifier
    path: Path
    model: ServedModel


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("served")
    trainer = tasks.Classifier(zoo.MLP((8, 10)), root=root, name="mlp", ema=0.5, **OPTIONS)
    path = trainer.train_model(BATCH, num_epochs=1).path
    return Case(trainer, path, ServedModel.of(trainer, BATCH, max_batch_size=6))


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def outputs_of(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    if answer.headers["content-type"] == NPZ:
        return np.load(io.BytesIO(answer.body))["outputs"]
    return np.array(answer.json["outputs"]["outputs"], np.float32)


def test_sizes_are_powers_of_two_and_the_largest(case):
    assert case.model.sizes == (1, 2, 4, 6)
    assert str(case.model.inputs["image"]) == "float32 [rows, 8, 8, 1]"
    assert str(case.model.outputs["outputs"]) == "float32 [rows, 10]"


def test_answers_are_the_outputs_of_predict_of_each_alone(case):
    alone = np.concatenate([case.trainer.predict(IMAGES[n : n + 1]) for n in range(20)])

    async def conversation(client):
        return [
            (rows, await client.inputs(image=IMAGES[:rows]), await client.predict(body, NPZ))
            for rows in (1, 2, 3, 6, 7, 20)
            for body in [npz(image=IMAGES[:rows])]
        ]

    for rows, *answers in talk(Application(case.model), conversation):
        for answer in answers:
            np.testing.assert_allclose(outputs_of(answer), alone[:rows], rtol=1e-5, atol=1e-6)


def test_answer_is_in_the_form_that_the_request_accepts(case):
    async def conversation(client):
        body = npz(image=IMAGES[:2])
        return await client.predict(body, NPZ, accept="application/json"), await client.predict(
            body, NPZ, accept="*/*"
        )

    as_json, as_npz = talk(Application(case.model), conversation)
    assert as_json.headers["content-type"] == "application/json"
    assert as_npz.headers["content-type"] == NPZ
    np.testing.assert_array_equal(outputs_of(as_json), outputs_of(as_npz))


def test_requests_that_arrive_together_share_batches_and_nothing_compiles(case, caplog):
    async def conversation(client):
        answers = await asyncio.gather(
            *(client.inputs(image=IMAGES[n : n + 1 + n % 3]) for n in range(30))
        )
        return answers, (await client.request("GET", "/metrics")).body.decode()

    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        answers, figures = talk(Application(case.model), conversation)
        assert "ompil" not in caplog.text
        jax.jit(lambda x: x * 3 + 1)(1.5)
        assert "ompil" in caplog.text
    for n, answer in enumerate(answers):
        expected = case.trainer.predict(IMAGES[n : n + 1 + n % 3])
        np.testing.assert_allclose(outputs_of(answer), expected, rtol=1e-5, atol=1e-6)
    assert 'distaff_requests_total{status="200"} 30\n' in figures
    assert "distaff_batch_requests_sum 30\n" in figures
    assert int(re.search(r"distaff_batch_rows_count (\d+)", figures)[1]) <= 16


def test_answer_has_the_same_bits_whoever_shares_the_batch(case):
    one, others = IMAGES[:1], (np.full((5, 8, 8, 1), np.nan, np.float32), IMAGES[6:11] * 1e6)
    outputs = [case.model({"image": np.concatenate([one, other])})["outputs"] for other in others]
    padded = case.model({"image": np.concatenate([one, IMAGES[7:11]])})["outputs"]
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    np.testing.assert_array_equal(outputs[0][0], padded[0])
    assert padded.shape == (5, 10)


def test_weights_are_chosen_by_name(case):
    model = ServedModel.of(case.trainer, BATCH, max_batch_size=1, weights="ema")
    expected = case.trainer.predict(IMAGES[:3], weights="ema")
    outputs = model({"image": IMAGES[:3]})["outputs"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert (expected != case.trainer.predict(IMAGES[:3], weights="raw")).any()


class Centred(tasks.Classifier):
    def predict_fn(self, params, batch, ctx):
        logits = ctx.apply(params, batch["image"])
        return logits - logits.mean(axis=0, keepdims=True)


class Total(tasks.Classifier):
    def predict_fn(self, params, batch, ctx):
        return {"total": ctx.apply(params, batch["image"]).sum(axis=0)}


def test_model_that_mixes_examples_takes_them_one_by_one(tmp_path):
    trainer = Centred(zoo.MLP((8, 10)), root=None, **OPTIONS)
    trainer.init_model(BATCH)
    with pytest.raises(ConfigError, match="max_batch_size=1"):
        ServedModel.of(trainer, BATCH)
    model = ServedModel.of(trainer, BATCH, max_batch_size=1)
    assert (model({"image": IMAGES[:3]})["outputs"] == 0).all()
    folder = export_model(trainer, tmp_path / "model", BATCH)
    with pytest.raises(ConfigError, match="max_batch_size=1"):
        ServedModel.read(folder)


def test_output_without_a_batch_axis_is_an_error():
    trainer = Total(zoo.MLP((8, 10)), root=None, **OPTIONS)
    trainer.init_model(BATCH)
    with pytest.raises(ConfigError, match="one entry per example"):
        ServedModel.of(trainer, BATCH, max_batch_size=1)


@pytest.mark.slow_but("None")
@pytest.mark.parametrize("batch_size", [None, 4])
def test_exported_model_is_served(case, tmp_path, batch_size):
    folder = export_model(case.trainer, tmp_path / "model", BATCH, batch_size=batch_size)
    (folder / "load.py").unlink()  # no code of the folder is needed
    model = ServedModel.read(folder, max_batch_size=4)
    assert model.sizes == ((1, 2, 4) if batch_size is None else (4,))
    for rows in (1, 3, 9):
        expected = case.trainer.predict(IMAGES[:rows])
        outputs = model({"image": IMAGES[:rows]})["outputs"]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_folder_that_is_not_an_exported_model_is_an_error(case, tmp_path):
    folder = export_model(case.trainer, tmp_path / "model", BATCH)
    (folder / "model.jax").write_bytes(b"of a JAX to come")
    with pytest.raises(DataFileError, match="distaff export RUN FOLDER"):
        ServedModel.read(folder)


class Doubles:
    """A model of other dtypes, without JAX."""

    def __init__(self, dtype, of=lambda x: x * 2):
        self.inputs, self.outputs = {"x": Form((2,), np.dtype(dtype))}, {"y": None}
        self.sizes, self.of = (8,), of

    def __call__(self, inputs):
        return {"y": self.of(inputs["x"])}


@pytest.mark.parametrize(
    ("dtype", "sent"),
    [
        ("int32", np.array([[1, 2]], np.int64)),
        ("uint8", np.array([[255, 0]], np.uint16)),
        ("bool", np.array([[True, False]])),
        (jnp.bfloat16, np.array([[1.5, 2]], np.float64)),
        ("float32", np.array([[1, 2]], ">f4")),
        ("complex64", np.array([[1j, 2]], np.complex128)),
    ],
)
def test_inputs_arrive_in_the_dtype_of_the_model(dtype, sent):
    seen = []
    model = Doubles(dtype, lambda x: seen.append(x) or x)

    async def conversation(client):
        return await client.predict(npz(x=sent), NPZ, accept="application/json")

    answer = talk(Application(model), conversation)
    assert answer.status == 200
    assert seen[0].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(seen[0], sent.dtype), sent)


def test_numbers_that_are_not_finite_are_null_in_json():
    model = Doubles("float32", lambda x: np.array([[np.nan, 1.5]], np.float32))

    async def conversation(client):
        return await client.inputs(x=np.zeros((1, 2)))

    assert talk(Application(model), conversation).json == {"outputs": {"y": [[None, 1.5]]}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "port must be at most 65535; got 70000"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0"),
        ({"max_wait": -1}, "max_wait must be a number of seconds from 0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServeOptions(**options)


def test_wrong_words_of_the_command_are_errors(case, tmp_path, capsys):
    folder = export_model(case.trainer, tmp_path / "model", BATCH)
    for words, part in (
        ((str(folder), "--weights", "ema"), "omit both options"),
        ((str(tmp_path / "gone"),), "gone"),
        ((str(folder), "--host", "256.0.0.1"), "Pass another --host or --port"),
    ):
        assert cli.main(("serve", *words, "--port", "0")) in (1, 2)
        assert part in capsys.readouterr().err
