"""Webhook: one JSON object at the end of a run, and never in its way."""

from __future__ import annotations

import http.server
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import StepInfo, TrainerModule
from distaff.callbacks import Webhook
from distaff.data import ArrayLoader
from distaff.errors import ConfigError, NonFiniteError


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, code: int = 204) -> None:
        self.code, self.posts = code, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/secret"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, self.headers["Content-Type"], json.loads(content)))
        self.send_response(self.server.code)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Writes nothing."""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/secret"


def ended(status: str = "finished", **metrics: Any) -> StepInfo:
    return StepInfo(8, 2, None, metrics, status=status, reason="why")


class Line(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def train(tmp_path, url: str, **values: Any):
    x = np.ones((16, 2), np.float32)
    y = np.full(16, values.pop("y", 1.0), np.float32)
    quiet: dict[str, Any] = {"root": tmp_path, "enable_progress_bar": False}
    line = Line(nn.Dense(1), callbacks=[Webhook(url, **values)], **quiet)
    return line.train_model(ArrayLoader({"x": x, "y": y}, 4), num_epochs=2)


def test_posts_the_outcome_of_a_run(tmp_path, server):
    result = train(tmp_path, server.url)
    [(path, kind, content)] = server.posts
    assert (path, kind) == ("/secret", "application/json")
    facts = {"name": f"line/{result.path.name}", "status": "finished", "reason": ""}
    metrics = {"train/loss": result.metrics["train/loss"]}
    assert content == {**facts, "step": 8, "epoch": 2, "metrics": metrics}


def test_posts_the_reason_of_a_failure(tmp_path, server):
    with pytest.raises(NonFiniteError):
        train(tmp_path, server.url, y=1e30, on="failure", name="mine")
    [(*_, content)] = server.posts
    assert (content["name"], content["status"]) == ("mine", "failed")
    assert "infinite" in content["reason"]


@pytest.mark.parametrize(
    ("on", "posted"),
    [
        (("end", "failure"), ["finished", "interrupted", "failed"]),
        ("end", ["finished", "interrupted"]),
        (["failure"], ["failed"]),
    ],
)
def test_on_chooses_the_ends_that_are_posted(on, posted, server):
    hook = Webhook(server.url, on=on)
    for status in ("finished", "interrupted", "failed"):
        hook.on_training_end(ended(status))
    assert [content["status"] for *_, content in server.posts] == posted


def test_body_replaces_the_object_and_numbers_stay_strict_json(server):
    Webhook(server.url).on_training_end(ended(loss=np.float32("nan"), rates=np.ones(2)))
    Webhook(server.url, body=lambda run: {"text": run["status"]}).on_training_end(ended())
    first, second = (content for *_, content in server.posts)
    assert first["metrics"] == {"loss": "nan", "rates": [1.0, 1.0]}
    assert second == {"text": "finished"}


def test_server_that_hangs_costs_no_more_than_the_timeout(tmp_path, silent, caplog):
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING, "distaff"):
        Webhook(silent, timeout=0.3).on_training_end(ended())
    assert 0.25 < time.perf_counter() - start < 20
    [record] = caplog.records
    assert "http://127.0.0.1 failed" in record.message
    assert "secret" not in record.message


def test_server_that_answers_byte_by_byte_costs_no_more_than_the_timeout(caplog):
    def answer() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the client hangs up when its time is over
            while not ended_test.wait(0.1):
                connection.sendall(b"H")

    ended_test = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer, daemon=True)
        server.start()
        start = time.perf_counter()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with caplog.at_level(logging.WARNING, "distaff"):
            Webhook(url, timeout=0.5).on_training_end(ended())
        assert time.perf_counter() - start < 20
        ended_test.set()
        server.join(30)
    assert not server.is_alive()
    assert ["no answer in 0.5 s" in record.message for record in caplog.records] == [True]


def test_server_that_refuses_leaves_the_run_finished(tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    result = train(tmp_path, url)
    assert result.status == "finished"
    lines = (result.path / "log.txt").read_text().splitlines()
    [line] = [each for each in lines if "Webhook" in each]
    assert "refused" in line


def test_answer_with_an_error_is_one_warning(server, caplog):
    server.code = 500
    hook = Webhook(server.url)
    with caplog.at_level(logging.WARNING, "distaff"):
        hook.on_training_end(ended())
    assert ["500" in record.message for record in caplog.records] == [True]


def test_body_that_raises_is_one_warning(server, caplog):
    with caplog.at_level(logging.WARNING, "distaff"):
        Webhook(server.url, body=lambda run: run["text"]).on_training_end(ended())
    assert ["KeyError" in record.message for record in caplog.records] == [True]
    assert server.posts == []


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("example.org/hook", {}, "begins with http"),
        ("file:///etc/passwd", {}, "begins with http"),
        ("http://", {}, "has a host"),
        ("http://a b/", {}, "no spaces"),
        ("http://a:port/", {}, "has a host"),
        (None, {}, "begins with http"),
        ("http://a/", {"on": "fail"}, "'fail'"),
        ("http://a/", {"timeout": 0}, "positive number of seconds"),
    ],
)
def test_wrong_arguments_are_errors(url, options, text):
    with pytest.raises(ConfigError, match=text):
        Webhook(url, **options)
