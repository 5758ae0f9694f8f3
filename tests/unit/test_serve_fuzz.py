"""Bad bodies of any kind: each has an answer that is no failure of the server, and it continues.

`DISTAFF_FUZZ_EXAMPLES=10000` makes the long form.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi import session
from distaff.serve import Application, Form, ServeOptions
from distaff.serve.wire import JSON, NPZ

EXAMPLES = int(os.environ.get("DISTAFF_FUZZ_EXAMPLES", "1000"))
fuzz = settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

GOOD_JSON = json.dumps({"inputs": {"x": [[1.5, 2], [3, 4]], "n": [3, -4]}}).encode()


def npz(x: np.ndarray, n: np.ndarray, compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, array in (("x", x), ("n", n)):
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", content.getvalue())
    return file.getvalue()


GOOD_NPZ = [
    npz(np.ones((2, 2), np.float32), np.ones(2, np.int32), compression)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
]

numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 2**64, 1e308])
names = st.sampled_from(["x", "n", "inputs", "", "\0"]) | st.text(max_size=4)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
inputs = st.fixed_dictionaries({"inputs": st.dictionaries(names, values, max_size=3)})
scraps = st.binary(max_size=8) | st.sampled_from(
    [b"NaN", b"1e999", b"9" * 5000, b"[" * 50_000, b'{"inputs":' * 20_000, b"PK\x05\x06", b"<f8"]
)


@st.composite
def damaged(draw: st.DrawFn, *sources: bytes) -> bytes:
    """Returns a good body with a part cut out, replaced or repeated."""
    body = draw(st.sampled_from(sources))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        end = start + draw(st.integers(0, 12) | st.just(len(body)))
        body = body[:start] + draw(scraps) + body[end:]
    return body


bodies = (
    st.tuples(st.just(JSON), values.map(json.dumps).map(str.encode))
    | st.tuples(st.just(JSON), inputs.map(json.dumps).map(str.encode))
    | st.tuples(st.just(JSON), damaged(GOOD_JSON))
    | st.tuples(st.just(NPZ), damaged(*GOOD_NPZ))
    | st.tuples(st.sampled_from([JSON, NPZ]), st.binary(max_size=200))
    | st.tuples(st.text("abc/+;= ", max_size=12), st.just(GOOD_JSON))
)


class Sum:
    """A model that has an input of floats and one of whole numbers."""

    def __init__(self) -> None:
        self.inputs = {"x": Form((2,), np.dtype("float32")), "n": Form((), np.dtype("int32"))}
        self.outputs, self.sizes = {"sum": Form((), np.dtype("float32"))}, (1, 2, 4)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert inputs["x"].dtype == np.float32
        assert inputs["x"].shape == (len(inputs["n"]), 2)
        with np.errstate(all="ignore"):
            return {"sum": inputs["x"].sum(axis=1) + inputs["n"]}


@pytest.mark.slow
def test_fuzz_bad_bodies_are_never_a_failure_of_the_server():
    options = ServeOptions(max_body_bytes=100_000, max_rows=64)
    statuses = []
    with asyncio.Runner() as runner:
        talking = session(Application(Sum(), options))
        client = runner.run(talking.__aenter__())

        @fuzz
        @given(bodies)
        def test(case: tuple[str, bytes]) -> None:
            answer = runner.run(client.predict(case[1], case[0]))
            statuses.append(answer.status)
            assert answer.status in (200, 400, 413, 415, 422)
            assert answer.status == 200 or answer.json["error"]

        test()
        last = runner.run(client.predict(GOOD_JSON))
        runner.run(talking.__aexit__(None, None, None))
    assert last.json == {"outputs": {"sum": [6.5, 3.0]}}
    assert len(statuses) >= EXAMPLES
    assert {400, 413, 415, 422} <= set(statuses)
