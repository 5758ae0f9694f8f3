"""Reads the bodies of requests, JSON or npz, and writes answers; bad bodies name their field."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from distaff.errors import nearest
from distaff.serve.model import Form

JSON, NPZ = "application/json", "application/x-npz"
_NPZ_TYPES = (NPZ, "application/zip", "application/octet-stream")
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_NUMBERS = {int, float, bool}
_NAMES = {str: "texts", type(None): "nulls", dict: "objects"}
_MOST_HEADER = 4_096
_MOST_SHOWN = 60


class RequestError(Exception):
    """A request that the server does not accept.

    Args:
        status: HTTP status.
        message: what is wrong, and what to do.
        field: name of the wrong input.
        expected: shape and dtype of this input.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, expected: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.field, self.expected = field, expected

    def body(self) -> bytes:
        """Returns the answer in JSON."""
        facts = {"error": self.message, "field": self.field, "expected": self.expected}
        return json.dumps({k: v for k, v in facts.items() if v is not None}).encode()


def kind_of(content_type: str) -> str:
    """Returns the kind of a body, JSON or NPZ.

    Raises:
        RequestError: 415, it is neither.
    """
    name = content_type.partition(";")[0].strip().lower()
    if name == JSON:
        return JSON
    if name in _NPZ_TYPES:
        return NPZ
    raise RequestError(
        415, f"The content type must be {JSON} or {NPZ}; got {_short(content_type)}."
    )


def read(
    body: bytes, kind: str, inputs: Mapping[str, Form], *, max_bytes: int, max_rows: int
) -> tuple[dict[str, np.ndarray], int]:
    """Returns the inputs of a body by name, and their number of rows.

    Args:
        body: the body of a request.
        kind: JSON or NPZ.
        inputs: the inputs of the model.
        max_bytes: most bytes of the arrays together.
        max_rows: most rows.

    Raises:
        RequestError: 400 for a body that is not JSON or npz, 413 for one that is too large, 422 for
            a wrong input.
    """
    given: Mapping[str, Any] = _from_json(body) if kind == JSON else _from_npz(body, max_bytes)
    for name in given:
        if name not in inputs:
            known = nearest(str(name)[:_MOST_SHOWN], inputs)
            raise RequestError(
                422,
                f"The model has no input {_short(name)}. {known}",
                field=str(name)[:_MOST_SHOWN],
            )
    arrays = {name: _fitted(name, given, form) for name, form in inputs.items()}
    rows = {name: len(array) for name, array in arrays.items()}
    count = next(iter(rows.values()))
    for name, number in rows.items():
        if number != count:
            raise _wrong(name, inputs[name], f"all inputs must have as many rows; they have {rows}")
    name = next(iter(rows))
    if not count:
        raise _wrong(name, inputs[name], "a request needs at least one row; got none")
    if count > max_rows:
        raise RequestError(
            413,
            f"A request may have {max_rows} rows; got {count}. Send several requests.",
            field=name,
            expected=str(inputs[name]),
        )
    return arrays, count


def write(outputs: Mapping[str, np.ndarray], kind: str) -> bytes:
    """Returns the body of an answer; JSON has `null` for NaN and infinite numbers."""
    if kind == JSON:
        lists = {name: _as_lists(array) for name, array in outputs.items()}
        return json.dumps({"outputs": lists}, allow_nan=False, separators=(",", ":")).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # np.savez has reserved names
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, _plain(array), allow_pickle=False)
    return file.getvalue()


def _as_lists(array: np.ndarray) -> Any:
    array = _plain(array)
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag], axis=-1)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        lists = array.astype(object)
        lists[~np.isfinite(array)] = None
        return lists.tolist()
    return array.tolist()


def _plain(array: np.ndarray) -> np.ndarray:
    """Returns an array of a dtype that NumPy's format knows: bfloat16 becomes float32, exactly."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _from_json(body: bytes) -> Mapping[str, Any]:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        given = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {_short(error)}.") from None
    given = given.get("inputs") if isinstance(given, dict) else None
    if not isinstance(given, dict):
        raise RequestError(
            422, 'The body must be {"inputs": {name: rows}}, with the rows of each input by name.'
        )
    return given


def _from_npz(body: bytes, max_bytes: int) -> Mapping[str, np.ndarray]:
    try:
        return dict(_members(body, max_bytes))
    except RequestError:
        raise
    except Exception as error:  # zipfile raises what its decompressors raise
        message = f"The body is not an .npz file: {_short(error)}. Write it with numpy.savez."
        raise RequestError(400, message) from None


def _members(body: bytes, max_bytes: int) -> Iterator[tuple[str, np.ndarray]]:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        members = archive.infolist()
        if any(each.compress_type not in _COMPRESSIONS for each in members):
            raise ValueError("it is not compressed by deflate")
        size = sum(member.file_size for member in members)  # no more than this is decompressed
        if size > max_bytes:
            raise RequestError(413, f"The arrays may have {max_bytes} bytes; they have {size}.")
        for member in members:
            name = member.filename.removesuffix(".npy")
            yield name, _array(name, archive.read(member))


def _array(name: str, content: bytes) -> np.ndarray:
    """Returns the array of an .npy file, without allocating what its header claims."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = header(file, max_header_size=_MOST_HEADER)
        if dtype.hasobject or dtype.kind not in "biufc":
            raise ValueError(f"its dtype is {dtype}")
        flat = np.frombuffer(content, dtype, offset=file.tell())
        return flat.reshape(shape, order="F" if is_fortran else "C")
    except Exception as error:  # ast and NumPy raise many kinds for a damaged header
        raise RequestError(
            422, f"{_short(name)} is not an array of numbers: {_short(error)}.", field=name[:60]
        ) from None


def _fitted(name: str, given: Mapping[str, Any], form: Form) -> np.ndarray:
    """Returns an input in the dtype of the model, if its shape and values fit."""
    if name not in given:
        raise _wrong(name, form, "the request lacks it")
    value = given[name]
    if not isinstance(value, np.ndarray) and (other := _other_than_numbers(value)):
        raise _wrong(name, form, f"it has {other}")
    try:
        array = np.asarray(value)
    except ValueError:
        raise _wrong(name, form, "its rows differ in shape") from None
    if array.size == 0 and array.ndim == 1:  # [] in JSON
        array = np.empty((0, *form.shape), form.dtype)
    if array.ndim == 0 or array.shape[1:] != form.shape:
        raise _wrong(name, form, f"got the shape {list(array.shape)}")
    return _cast(name, array, form)


def _other_than_numbers(value: Any) -> str:
    """Returns the first type in nested lists that is not a number; empty if there are only numbers.

    NumPy would give each text the size of the longest one.
    """
    waiting = [value] if isinstance(value, list) else []
    found = set() if waiting else {type(value)}
    while waiting and found <= _NUMBERS:
        each = waiting.pop()
        found = set(map(type, each))
        if list in found:
            waiting += [inner for inner in each if isinstance(inner, list)]
            found -= {list}
    others = found - _NUMBERS
    return _NAMES.get(min(others, key=str), "other values") if others else ""


def _cast(name: str, array: np.ndarray, form: Form) -> np.ndarray:
    """Returns an array in the dtype of an input; whole numbers may become floats, not back."""
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b", "c": "cfiu"}
    kind = "f" if jnp.issubdtype(form.dtype, jnp.floating) else form.dtype.kind
    if array.dtype.kind not in kinds.get(kind, ""):
        what = "a number is too large" if array.dtype.kind == "O" else f"got {array.dtype}"
        raise _wrong(name, form, what)
    if array.dtype == form.dtype:
        return array
    if kind in "iu" and array.size:
        limits, least, most = np.iinfo(form.dtype), int(array.min()), int(array.max())
        if least < limits.min or most > limits.max:
            raise _wrong(name, form, f"the values go from {least} to {most}")
    with np.errstate(over="ignore"):
        cast = array.astype(form.dtype)
    if kind in "fc" and (np.isinf(cast) & ~np.isinf(array)).any():
        raise _wrong(name, form, "a value is too large for this dtype")
    return cast


def _wrong(name: str, form: Form, what: str) -> RequestError:
    return RequestError(
        422, f"The input {name!r} must be {form}: {what}.", field=name, expected=str(form)
    )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
