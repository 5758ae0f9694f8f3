"""Limits of a served model: bad requests name their field, and a busy server stays reachable."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import zipfile
from typing import Any

import numpy as np
import pytest

from asgi import session, talk
from distaff.serve import Application, Form, ServeOptions
from distaff.serve.wire import NPZ

FORM = "float32 [rows, 2]"
GOOD = b'{"inputs": {"x": [[1, 2]], "n": [3]}}'


class Stub:
    """A model that computes when it may, and notes what it was given."""

    def __init__(self) -> None:
        self.inputs = {"x": Form((2,), np.dtype("float32")), "n": Form((), np.dtype("int32"))}
        self.outputs, self.sizes = {"sum": Form((), np.dtype("float32"))}, (1, 2, 4)
        self.may_compute, self.has_begun = threading.Event(), threading.Event()
        self.may_compute.set()
        self.seen: list[int] = []
        self.batches: list[int] = []
        self.fails = False

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.has_begun.set()
        self.may_compute.wait()
        self.batches.append(len(inputs["n"]))
        self.seen.extend(inputs["n"].tolist())
        if self.fails:
            raise RuntimeError("the device is lost")
        return {"sum": inputs["x"].sum(axis=1) + inputs["n"]}


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def members(**contents: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


X, N = np.ones((1, 2), np.float32), np.ones(1, np.int32)

BAD_JSON = [
    (b"", 400, None, "not JSON"),
    (b'{"inputs": ', 400, None, "not JSON"),
    (b'{"inputs": {"x": [[NaN, 1]], "n": [1]}}', 400, None, "NaN"),
    (b"[" * 100_000, 400, None, "not JSON"),
    (b"\xff\xfe\xfd", 400, None, "not JSON"),
    (b'{"x": [[1, 2]]}', 422, None, '{"inputs": {name: rows}}'),
    (b'{"inputs": [[1, 2]]}', 422, None, '{"inputs": {name: rows}}'),
    (b'{"inputs": {"x": [[1, 2]], "n": [1], "m": 1}}', 422, "m", "Known: 'n', 'x'"),
    (b'{"inputs": {"x": [[1, 2]]}}', 422, "n", "lacks it"),
    (b'{"inputs": {"x": [[1, 2, 3]], "n": [1]}}', 422, "x", "the shape [1, 3]"),
    (b'{"inputs": {"x": [[1, 2], [3]], "n": [1]}}', 422, "x", "differ in shape"),
    (b'{"inputs": {"x": [["1", 2]], "n": [1]}}', 422, "x", "texts"),
    (b'{"inputs": {"x": [[null, 2]], "n": [1]}}', 422, "x", "nulls"),
    (b'{"inputs": {"x": {"a": 1}, "n": [1]}}', 422, "x", "objects"),
    (b'{"inputs": {"x": 3, "n": [1]}}', 422, "x", "the shape []"),
    (b'{"inputs": {"x": [[true, false]], "n": [1]}}', 422, "x", "got bool"),
    (b'{"inputs": {"x": [[1e300, 2]], "n": [1]}}', 422, "x", "too large"),
    (b'{"inputs": {"x": [[1, 2]], "n": [1.5]}}', 422, "n", "got float64"),
    (b'{"inputs": {"x": [[1, 2]], "n": [3000000000]}}', 422, "n", "go from 3000000000"),
    (b'{"inputs": {"x": [[1, 2]], "n": [1' + b"0" * 400 + b"]}}", 422, "n", "too large"),
    (b'{"inputs": {"x": [[1, 2]], "n": [1, 2]}}', 422, "n", "as many rows"),
    (b'{"inputs": {"x": [], "n": []}}', 422, "x", "at least one row"),
    (b'{"inputs": {"x": ' + b"[" * 70 + b"1" + b"]" * 70 + b', "n": [1]}}', 422, "x", FORM),
    (json.dumps({"inputs": {"x": [[1, 2]] * 9, "n": [1] * 9}}).encode(), 413, "x", "8 rows"),
]

BAD_NPZ = [
    (b"", 400, None, "numpy.savez"),
    (npz(x=X, n=N)[:-30], 400, None, "numpy.savez"),
    (npz(x=X), 422, "n", "lacks it"),
    (npz(x=X, n=np.array(["a"])), 422, "n", "not an array of numbers"),
    (npz(x=X, n=N.astype(np.float32)), 422, "n", "got float32"),
    (npz(x=np.zeros((4096, 4096)), n=N), 413, None, "4096 bytes"),
    (members(x=b"text", n=npy(N)), 422, "x", "not an array"),
    (members(x=npy(X)[:-1], n=npy(N)), 422, "x", "not an array"),
    (members(x=npy(X).replace(b"(1, 2)", b"(9, 9)"), n=npy(N)), 422, "x", "not an array"),
    (members(x=npy(X).replace(b"<f4", b"|O8"), n=npy(N)), 422, "x", "not an array"),
]


@pytest.fixture(scope="module")
def stub() -> Stub:
    return Stub()


def answers(model: Any, *bodies: tuple[bytes, str], **options: Any) -> list[Any]:
    async def conversation(client):
        return [await client.predict(body, kind) for body, kind in bodies]

    return talk(Application(model, ServeOptions(**options)), conversation)


@pytest.mark.parametrize(
    ("kind", "cases"), [("application/json; charset=utf-8", BAD_JSON), (NPZ, BAD_NPZ)]
)
def test_bad_bodies_name_the_field_and_what_was_expected(stub, kind, cases):
    bodies = [(body, kind) for body, *_ in cases]
    limits = {"max_body_bytes": 200_000 if kind != NPZ else 4096, "max_rows": 8}
    for case, answer in zip(cases, answers(stub, *bodies, **limits), strict=True):
        body, status, field, part = case
        assert answer.status == status, (body[:80], answer)
        found = answer.json
        assert part in found["error"], (body[:80], found)
        assert found.get("field") == field
        if field in stub.inputs and status == 422 and "not an array" not in part:
            assert found["expected"] == str(stub.inputs[field])


def test_other_requests_have_their_status(stub):
    async def conversation(client):
        return [
            await client.predict(GOOD, "text/plain"),
            await client.request("GET", "/predict"),
            await client.request("POST", "/nowhere"),
            await client.request("POST", "/predict", [GOOD], {"content-type": NPZ}),
            await client.predict(GOOD, **{"content-length": "5000"}),
            await client.request(
                "POST", "/predict", [b" " * 60] * 2, {"content-type": "application/json"}
            ),
            await client.request("HEAD", "/health"),
            await client.request("GET", "/model"),
        ]

    found = talk(Application(stub, ServeOptions(max_body_bytes=100)), conversation)
    assert [each.status for each in found] == [415, 405, 404, 400, 413, 413, 200, 200]
    assert found[1].headers["allow"] == "POST"
    assert all(each.headers["connection"] == "close" for each in found[:3])
    assert found[6].body == b""
    assert found[7].json["inputs"] == {"x": FORM, "n": "int32 [rows]"}


def test_body_that_does_not_arrive_is_given_up(stub):
    async def conversation(client):
        kind = {"content-type": "application/json"}
        return await client.request("POST", "/predict", [b"{"], kind, ends=False)

    assert talk(Application(stub, ServeOptions(timeout=0.05)), conversation).status == 408


def test_full_queue_is_503_and_health_answers_meanwhile():
    model = Stub()
    model.may_compute.clear()

    async def conversation(client):
        first = asyncio.create_task(client.predict(GOOD))
        await asyncio.to_thread(model.has_begun.wait)
        second = await client.predict(GOOD)
        health = await client.request("GET", "/health")
        figures = await client.request("GET", "/metrics")
        model.may_compute.set()
        return await first, second, health, figures

    found = talk(Application(model, ServeOptions(max_queue=1)), conversation)
    assert [each.status for each in found] == [200, 503, 200, 200]
    assert found[0].json == {"outputs": {"sum": [6.0]}}
    assert found[1].headers["retry-after"] == "1"
    assert b"distaff_requests_waiting 1\n" in found[3].body


def test_late_request_is_504_and_is_not_computed():
    model = Stub()
    model.may_compute.clear()
    model.sizes = (1,)

    async def conversation(client):
        late = await asyncio.gather(*(client.predict(GOOD) for _ in range(3)))
        model.may_compute.set()
        return late

    found = talk(Application(model, ServeOptions(timeout=2.0)), conversation)
    assert [each.status for each in found] == [504] * 3
    assert model.seen == [3]  # the batch that had begun


def test_failed_batch_is_500_and_the_server_continues(caplog):
    model = Stub()

    async def conversation(client):
        model.fails = True
        failed = await client.predict(GOOD)
        model.fails = False
        return failed, await client.predict(GOOD)

    found = talk(Application(model), conversation)
    assert [each.status for each in found] == [500, 200]
    assert "the device is lost" in caplog.text
    assert b"the device is lost" not in found[0].body


def test_end_answers_what_was_accepted_and_turns_away_the_rest():
    model = Stub()
    model.may_compute.clear()
    app = Application(model)

    async def main():
        async with session(app) as client:
            tasks = [asyncio.create_task(client.predict(GOOD)) for _ in range(6)]
            await asyncio.to_thread(model.has_begun.wait)
            asyncio.get_running_loop().call_later(0.05, model.may_compute.set)
        late = await client.predict(GOOD), await client.request("GET", "/health")
        return await asyncio.gather(*tasks), late

    found, late = asyncio.run(main())
    assert [each.status for each in found] == [200] * 6
    assert [each.status for each in late] == [503, 503]


@pytest.mark.parametrize(("max_wait", "sizes"), [(60.0, [4]), (0.0, [1, 3])])
def test_requests_wait_for_others_until_the_batch_is_full(max_wait, sizes):
    model = Stub()
    model.may_compute.clear()

    async def conversation(client):
        first = asyncio.create_task(client.predict(GOOD))
        for _ in range(20):  # turns of the loop
            await asyncio.sleep(0)
        others = [asyncio.create_task(client.predict(GOOD)) for _ in range(3)]
        for _ in range(20):
            await asyncio.sleep(0)
        model.may_compute.set()
        await asyncio.gather(first, *others)

    talk(Application(model, ServeOptions(max_wait=max_wait)), conversation)
    assert model.batches == sizes
