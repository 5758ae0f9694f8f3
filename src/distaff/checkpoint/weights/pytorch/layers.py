"""Layers whose arrays are fused or summed in PyTorch: attention, LSTM and GRU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from distaff.checkpoint.weights.pytorch.layouts import AS_IS, FLAT, Layout, Shape, kinds_of, linear
from distaff.checkpoint.weights.pytorch.rules import TorchRules
from distaff.errors import ConfigError

_ATTENTION = {"MultiHeadDotProductAttention", "MultiHeadAttention", "MultiheadAttention"}
_FLAX = ("query", "key", "value")
_EQUINOX = ("query_proj", "key_proj", "value_proj")
_LSTM, _GRU = "ifgo", "rzn"
_LAYER = re.compile(r"(?:(.*)\.)?(l\d+(?:_reverse)?)")


class TensorName(NamedTuple):
    """A tensor that an array of the model is a part of.

    Attributes:
        tensor: name of the tensor.
        member: order of the array in it.
        size: number of outputs; None for all of the array's.
    """

    tensor: str
    member: int = 0
    size: int | None = None

    def of_layer(self, number: int) -> TensorName:
        """Returns the name for one of several stacked layers."""
        return self._replace(tensor=self.tensor.replace("{}", str(number)))


class LayerArray(NamedTuple):
    """An array of a layer: its path, its layout, and the tensors that are summed."""

    path: str
    layout: Layout
    pieces: tuple[TensorName, ...]


def members(
    shapes: Mapping[str, Shape], modules: Mapping[str, Any], rules: TorchRules
) -> Iterator[LayerArray]:
    """Yields the arrays of attention and recurrent layers.

    Args:
        shapes: shape of each array, by its path without the collection.
        modules: modules by path.
        rules: names in PyTorch.

    Raises:
        ConfigError: PyTorch has no such layer.
    """
    for path in dict.fromkeys(each.rpartition("/")[0].rpartition("/")[0] for each in shapes):
        start = f"{path}/" if path else ""
        if kinds_of(modules.get(path)) & _ATTENTION:
            yield from _attention(path, start, shapes, rules)
        name = rules.place(path).name
        for gates in (_LSTM, _GRU):
            if all(f"{start}h{gate}/kernel" in shapes for gate in gates):
                yield from _by_gate(start, gates, shapes, name)
        if f"{start}dense_h/kernel" in shapes and f"{start}dense_i/kernel" in shapes:
            yield from _dense(start, shapes, name)
    for path in [each.rpartition("/")[0] for each in shapes if each.endswith("weight_hh")]:
        yield from _equinox(f"{path}/" if path else "", shapes, rules.place(path).name)


def _attention(
    path: str, start: str, shapes: Mapping[str, Shape], rules: TorchRules
) -> Iterator[LayerArray]:
    """Yields query, key and value, which PyTorch fuses if they have the same inputs."""
    is_flax, name = f"{start}query/kernel" in shapes, rules.place(path).name
    projections = _FLAX if is_flax else _EQUINOX
    if any(rules.place(start + each).is_named for each in projections):
        return
    kernels = [f"{start}{each}/{'kernel' if is_flax else 'weight'}" for each in projections]
    sizes = {shapes[each][0] if is_flax else shapes[each][1] for each in kernels}
    layout = linear() if is_flax else AS_IS
    for n, (projection, kernel) in enumerate(zip(projections, kernels, strict=True)):
        fused = TensorName(_joined(name, "in_proj_weight"), n)
        alone = TensorName(_joined(name, f"{projection[0]}_proj_weight"))
        yield LayerArray(kernel, layout, (fused if len(sizes) == 1 else alone,))
        bias = f"{start}{projection}/bias"
        if bias in shapes:
            yield LayerArray(bias, FLAT, (TensorName(_joined(name, "in_proj_bias"), n),))
    out = f"{start}{'out' if is_flax else 'output_proj'}"
    if not rules.place(out).is_named:
        weight = f"{out}/{'kernel' if is_flax else 'weight'}"
        inputs = len(shapes[weight]) - 1
        yield LayerArray(
            weight,
            linear(inputs) if is_flax else AS_IS,
            (TensorName(_joined(name, "out_proj", "weight")),),
        )
        if f"{out}/bias" in shapes:
            yield LayerArray(f"{out}/bias", FLAT, (TensorName(_joined(name, "out_proj", "bias")),))


def _by_gate(
    start: str, gates: str, shapes: Mapping[str, Shape], name: str
) -> Iterator[LayerArray]:
    """Yields the arrays of a cell of Flax with one layer for each gate."""
    for n, gate in enumerate(gates):
        from_input = f"{start}i{gate}"
        if f"{from_input}/kernel" not in shapes:
            from_input += "_"  # `if` is a keyword of Python: `if_` in NNX
        from_hidden = f"{start}h{gate}"
        yield LayerArray(f"{from_input}/kernel", linear(), (_piece(name, "weight_ih", n),))
        yield LayerArray(f"{from_hidden}/kernel", linear(), (_piece(name, "weight_hh", n),))
        input_bias, hidden_bias = _piece(name, "bias_ih", n), _piece(name, "bias_hh", n)
        held = [p for p in (f"{from_input}/bias", f"{from_hidden}/bias") if p in shapes]
        if len(held) == 2:
            yield LayerArray(held[0], FLAT, (input_bias,))
            yield LayerArray(held[1], FLAT, (hidden_bias,))
        elif held:
            yield LayerArray(held[0], FLAT, (input_bias, hidden_bias))


def _dense(start: str, shapes: Mapping[str, Shape], name: str) -> Iterator[LayerArray]:
    """Yields the arrays of a cell of NNX with one layer for all gates."""
    hidden, outputs = shapes[f"{start}dense_h/kernel"]
    if outputs != 4 * hidden:
        raise ConfigError(
            f"The rules for PyTorch support the LSTM cells of NNX; {start + 'dense_h'!r} is "
            "another cell, without the second bias that PyTorch has. Use a cell of Flax Linen or "
            "Equinox, or convert the arrays by hand."
        )
    yield LayerArray(f"{start}dense_i/kernel", linear(), (_piece(name, "weight_ih"),))
    yield LayerArray(f"{start}dense_h/kernel", linear(), (_piece(name, "weight_hh"),))
    if f"{start}dense_h/bias" in shapes:
        biases = _piece(name, "bias_ih"), _piece(name, "bias_hh")
        yield LayerArray(f"{start}dense_h/bias", FLAT, biases)


def _equinox(start: str, shapes: Mapping[str, Shape], name: str) -> Iterator[LayerArray]:
    """Yields the arrays of a cell of Equinox."""
    yield LayerArray(f"{start}weight_ih", AS_IS, (_piece(name, "weight_ih"),))
    yield LayerArray(f"{start}weight_hh", AS_IS, (_piece(name, "weight_hh"),))
    if f"{start}bias" not in shapes:
        return
    bias_hh = _piece(name, "bias_hh")
    if f"{start}bias_n" in shapes:  # a GRU
        size = 2 * shapes[f"{start}bias_n"][0]
        yield LayerArray(f"{start}bias_n", AS_IS, (_piece(name, "bias_hh", 1),))
        bias_hh = bias_hh._replace(size=size)
    yield LayerArray(f"{start}bias", AS_IS, (_piece(name, "bias_ih"), bias_hh))


def _piece(name: str, leaf: str, member: int = 0) -> TensorName:
    """Returns a tensor of a recurrent layer; `lstm.l0` has `lstm.weight_ih_l0`."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return TensorName(_joined(name, leaf), member)
    return TensorName(_joined(layer[1] or "", f"{leaf}_{layer[2]}"), member)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
