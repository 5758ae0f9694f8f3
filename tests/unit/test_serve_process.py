"""`distaff serve` as a process: it answers over HTTP, and ends after what it accepted."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distaff import tasks, zoo

IMAGES = np.random.default_rng(0).normal(size=(64, 8, 8, 1)).astype(np.float32)
TIMEOUT = 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[tasks.Classifier, Path]:
    root = tmp_path_factory.mktemp("served")
    options = {"batch_size": 8, "enable_progress_bar": False, "root": root, "name": "mlp"}
    trainer = tasks.Classifier(zoo.MLP((8, 10)), **options)
    batch = {"image": IMAGES, "label": np.arange(64, dtype=np.int32) % 10}
    return trainer, trainer.train_model(batch, num_epochs=1).path


def request(port: int, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        kind = {"Content-Type": "application/json"}
        path = ("GET", "/health") if body is None else ("POST", "/predict")
        connection.request(*path, body, kind)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_process_answers_what_it_accepted_before_it_ends(trained, number, status):
    trainer, path = trained
    words = ["serve", str(path), "--port", "0", "--max-wait", "8", "--max-batch-size", "4"]
    code = "import sys; from distaff.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
        assert request(port) == (200, {"status": "ok"})
        body = json.dumps({"inputs": {"image": IMAGES[:3].tolist()}}).encode()
        answers: list[Any] = []
        client = threading.Thread(target=lambda: answers.append(request(port, body)))
        client.start()
        while client.is_alive() and b"distaff_requests_waiting 1" not in metrics(port):
            assert process.poll() is None
        process.send_signal(number)  # during --max-wait
        client.join(TIMEOUT)
        assert process.wait(TIMEOUT) == status
    finally:
        process.kill()
        process.communicate()
    ((code, found),) = answers
    assert code == 200
    np.testing.assert_allclose(
        found["outputs"]["outputs"], trainer.predict(IMAGES[:3]), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ConnectionRefusedError):
        request(port)


def metrics(port: int) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()
    finally:
        connection.close()
