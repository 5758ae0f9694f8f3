"""Models as people write them, each with the same pass in plain Flax, Equinox or JAX.

A kind has a source, which a trainer takes, and a pass by hand: `(params, rest, x, train)` returns
the outputs and the other collections after the pass. No model draws random numbers here, so that
both can be compared; what is random is tested elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distaff import Lora

WIDTH = 4
Pass = Callable[[Any, Mapping[str, Any], Any, bool], tuple[Any, Mapping[str, Any]]]


class Kind(NamedTuple):
    """A model, and the same by hand.

    Attributes:
        source: makes what a trainer takes.
        by_hand: the pass; see above.
        call: what the loss passes to `ctx.apply` by keyword, by `(x, train)`.
        outputs: turns what the pass returns into predictions `[batch, 1]`.
    """

    source: Callable[[], Any]
    by_hand: Pass
    call: Callable[[Any, bool], dict[str, Any]] = lambda x, train: {}
    outputs: Callable[[Any], Any] = lambda outputs: outputs


KINDS: dict[str, Kind] = {}


def without_keys(tree: Any) -> Any:
    """Returns a tree with the numbers of its random keys, which can be compared."""

    def plain(leaf: Any) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(plain, tree)


def linen(
    name: str,
    module: Callable[[], Any],
    mode: Callable[[bool], dict[str, Any]] = lambda train: {},
    source: Callable[[], Any] | None = None,
    switched: Callable[[bool], Any] | None = None,
    **options: Any,
) -> None:
    """Adds a Linen module, called by hand as Flax's guide does it."""

    def by_hand(params, rest, x, train):
        changing = [name for name in rest if train or name != "batch_stats"]
        made = module() if switched is None else switched(train)
        given = {**mode(train), **options.get("call", lambda x, train: {})(x, train)}
        given = {key: value for key, value in given.items() if key != "mutable"}
        inputs = x if isinstance(x, tuple) else (x,)
        made = (lambda *a, m=made, **k: m(*a, **k)) if not isinstance(made, nn.Module) else made
        if not changing:
            return made.apply({"params": params, **rest}, *inputs, **given), rest
        outputs, changed = made.apply(
            {"params": params, **rest}, *inputs, mutable=changing, **given
        )
        return outputs, {**rest, **changed} if train else rest

    KINDS[name] = Kind(source or module, by_hand, **options)


def norm_and_head(x, train, use_dropout=True):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
    x = nn.Dropout(0.0, deterministic=not train, name="drop")(x)
    return nn.Dense(1, name="head")(x)


class IsTrain(nn.Module):
    @nn.compact
    def __call__(self, x, is_train=False):
        return norm_and_head(x, is_train)


class Eval(nn.Module):
    @nn.compact
    def __call__(self, x, *, eval):
        return norm_and_head(x, not eval)


class Inference(nn.Module):
    @nn.compact
    def __call__(self, x, inference: bool = True):
        return norm_and_head(x, not inference)


class Mode(nn.Module):
    @nn.compact
    def __call__(self, x, mode: Literal["train", "test"] = "test"):
        return norm_and_head(x, mode == "train")


class TrainField(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        return norm_and_head(x, self.train)


@flax.struct.dataclass
class Config:
    width: int = WIDTH
    deterministic: bool = False


class Configured(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.config.width)(x)
        return norm_and_head(x, not self.config.deterministic)


class Holder(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


linen("linen is_train", IsTrain, lambda train: {"is_train": train})
linen("linen eval", Eval, lambda train: {"eval": not train})
linen("linen inference", Inference, lambda train: {"inference": not train})
linen("linen mode word", Mode, lambda train: {"mode": "train" if train else "test"})
linen("linen field", TrainField, switched=lambda train: TrainField(train))
linen(
    "linen inner field",
    lambda: Holder(TrainField(True)),
    switched=lambda train: Holder(TrainField(train)),
)
linen(
    "linen configuration",
    lambda: Configured(Config()),
    switched=lambda train: Configured(Config(deterministic=not train)),
)
linen(
    "linen remat",
    lambda: nn.remat(IsTrain, static_argnums=(2,))(),
    lambda train: {},
    switched=lambda train: _ByPosition(nn.remat(IsTrain, static_argnums=(2,))(), train),
)
linen(
    "linen jit",
    lambda: nn.jit(IsTrain, static_argnums=(2,))(),
    switched=lambda train: _ByPosition(nn.jit(IsTrain, static_argnums=(2,))(), train),
)


class _ByPosition(nn.Module):
    """Stands for a module whose mode is passed by position."""

    inner: Any
    train: bool

    def apply(self, variables, *inputs, **kwargs):
        return self.inner.apply(variables, *inputs, self.train, **kwargs)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH)(nn.relu(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(1)(layers()(x, None)[0])


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        several = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return several(1)(x).mean(0)


class Tied(nn.Module):
    def setup(self):
        self.shared = nn.Dense(WIDTH)
        self.head = nn.Dense(1)

    def encode(self, x):
        return nn.relu(self.shared(x))

    def __call__(self, x):
        return self.head(self.shared(self.encode(x)))


class Scoped(nn.Module):
    def setup(self):
        self.base = nn.Dense(1)
        nn.share_scope(self, self.base)

    def __call__(self, x):
        return self.base(x)


class NameScope(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.head(nn.Dense(WIDTH)(x))

    @nn.compact_name_scope
    def head(self, x):
        return nn.Dense(1)(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.RNN(nn.LSTMCell(3))(x[..., None])[:, -1])


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, *, deterministic=True):
        x = nn.MultiHeadDotProductAttention(2, qkv_features=2)(
            x[..., None], mask=mask, deterministic=deterministic
        )
        return nn.Dense(1)(x.reshape(len(x), -1))


class Weighted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(1))(x)


class Auxiliary(nn.Module):
    """Returns its logits, and what else it has to say."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(WIDTH)(x)
        return nn.Dense(1)(hidden), {"hidden": hidden}


class Several(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(1)(jnp.concatenate([inputs["left"], inputs["right"]], 1))


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, *, scale=1.0):
        return nn.Dense(1)(x) * scale


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x):
        calls = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        calls.value += 1
        return nn.Dense(1)(x)


class Keyed(nn.Module):
    """Holds a random key, from which it draws the same number each time."""

    @nn.compact
    def __call__(self, x):
        key = self.variable("noise", "key", lambda: jax.random.key(0))
        return nn.Dense(1)(x) + jax.random.normal(key.value, ())


class Carry(nn.Module):
    @nn.compact
    def __call__(self, x):
        carry = self.variable("carry", "h", lambda: jnp.zeros((len(x), WIDTH)))
        hidden = jnp.tanh(nn.Dense(WIDTH)(x + carry.value))
        if self.is_mutable_collection("carry"):
            carry.value = jax.lax.stop_gradient(hidden)
        return nn.Dense(1)(hidden)


class Balanced(nn.Module):
    """Sows a loss that Linen adds up within one pass."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            self.sow(
                "losses",
                "balance",
                jnp.float32(1),
                reduce_fn=lambda a, b: a + b,
                init_fn=lambda: jnp.float32(0),
            )
        return nn.Dense(1)(x)


class Perturbed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(self.perturb("hidden", nn.Dense(WIDTH)(x)))


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        ones = nn.with_partitioning(nn.initializers.ones, ("embed",))
        return nn.Dense(1)(nn.LayerNorm(scale_init=ones)(x))


linen("linen dense", lambda: nn.Dense(1))
linen("linen sequential", lambda: nn.Sequential([nn.Dense(WIDTH), nn.relu, nn.Dense(1)]))
linen("linen scan", Scanned)
linen("linen vmap", Ensemble)
linen("linen shared layer", Tied)
linen("linen shared scope", Scoped)
linen("linen name scope", NameScope)
linen("linen rnn", Recurrent)
linen("linen attention", Attention)
linen("linen weight norm", Weighted)
linen("linen auxiliary outputs", Auxiliary, outputs=lambda outputs: outputs[0])
linen("linen keyword", Scaled, call=lambda x, train: {"scale": 2.0})
linen("linen counter", Counter)
linen("linen key", Keyed)
linen("linen carry", Carry)
linen("linen perturb", Perturbed)
linen("linen boxes", Boxed)
linen(
    "linen sown loss",
    Balanced,
    call=lambda x, train: {"mutable": ["losses"]},
    outputs=lambda outputs: outputs[0] if isinstance(outputs, tuple) else outputs,
)
linen(
    "linen bound",
    lambda: nn.Dense(1),
    source=lambda: nn.Dense(1).bind(nn.Dense(1).init(jax.random.key(7), jnp.ones((1, WIDTH)))),
)


def _pair():
    module = nn.Dense(1)
    return module.init, module.apply


linen("linen pair", lambda: nn.Dense(1), source=_pair)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)
        self.table = np.arange(3.0)
        self.is_training = False

    def __call__(self, x):
        x = self.norm(self.linear(x), use_running_average=not self.is_training)
        return self.head(x)


class NnxShared(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second = self.first
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.head(self.second(nnx.relu(self.first(x))))


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.layers = layers(rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer, x):
            return nnx.relu(layer(x))

        return self.head(through(self.layers, x))


class NnxSowing(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        y = self.head(x)
        self.sow(nnx.Intermediate, "y", y)
        return y


class NnxLora(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.LoRALinear(WIDTH, 1, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.head(x)


@contextmanager
def without_advice():
    """Ignores what Flax advises about `sow`, which a test calls as older programs do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using 'Module.sow")
        yield


def nnx_kind(name, cls, *, called=False, ready=False):
    """Adds an NNX module, put together by hand from its parameters and its other variables."""

    def make(rngs):
        return cls(rngs=rngs)

    def source():
        if not (called or ready):
            return make
        module = make(nnx.Rngs(3))
        if called:
            with without_advice():
                module(jnp.ones((2, WIDTH)))
        return module

    def by_hand(params, rest, x, train):
        module = make(nnx.Rngs(3))
        flat = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}
        for tree in (params, *rest.values()):
            for path, value in jax.tree.leaves_with_path(tree):
                leaf = flat[tuple(key.key for key in path)]
                if isinstance(leaf, nnx.Variable):
                    leaf.set_value(value)
        nnx.update(module, nnx.from_flat_state([(_path(p), x) for p, x in flat.items()]))
        for _, each in nnx.iter_modules(module):
            if hasattr(each, "is_training"):
                each.is_training = train
        with without_advice():
            outputs = module(x)
        after = {tuple(map(str, p)): leaf for p, leaf in nnx.to_flat_state(nnx.state(module))}

        def changed(path, value):
            leaf = after[tuple(key.key for key in path[1:])]
            return leaf.get_value() if isinstance(leaf, nnx.Variable) else value

        return outputs, jax.tree.map_with_path(changed, rest) if train else rest

    KINDS[name] = Kind(source, by_hand)


def _path(names):
    return tuple(int(name) if name.isdigit() else name for name in names)


nnx_kind("nnx flag, statistics, float64", NnxNet, ready=True)
nnx_kind("nnx shared, counter", NnxShared)
nnx_kind("nnx stack", NnxStack)
nnx_kind("nnx called before", NnxSowing, called=True)
nnx_kind("nnx lora", NnxLora)


class EqxNet(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear
    training: bool = eqx.field(static=True)
    table: np.ndarray

    def __init__(self, key):
        keys = jax.random.split(key)
        self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=keys[0])
        self.norm = eqx.nn.BatchNorm(WIDTH, "examples", momentum=0.5, mode="ema")
        self.head = eqx.nn.Linear(WIDTH, 1, key=keys[1])
        self.training, self.table = True, np.arange(3.0)

    def __call__(self, x, state):
        x, state = self.norm(self.linear(x), state, inference=not self.training)
        return self.head(x), state


class EqxInference(eqx.Module):
    linear: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, key):
        self.linear, self.drop = eqx.nn.Linear(WIDTH, 1, key=key), eqx.nn.Dropout(0.0)

    def __call__(self, x, *, rng=None, inference=False):
        return self.linear(self.drop(x, key=rng, inference=inference)) * (2 - inference)


def equinox_kind(name, make, by_hand):
    KINDS[name] = Kind(lambda: make, by_hand)


def _eqx(tree, module):
    """Returns a module with parameters that lie in nested dictionaries."""

    def value(path, leaf):
        node = tree
        for key in path:
            node = node.get(jax.tree_util.keystr((key,), simple=True)) if node else None
        return leaf if node is None or isinstance(node, dict) else node

    return jax.tree.map_with_path(value, module)


def _eqx_inference(params, rest, x, train):
    module = _eqx(params, EqxInference(jax.random.key(0)))
    return jax.vmap(lambda x: module(x, inference=not train))(x), rest


def _eqx_net(params, rest, x, train):
    module, state = eqx.nn.make_with_state(EqxNet)(jax.random.key(0))
    module = _eqx(params, module)
    object.__setattr__(module, "training", train)
    leaves = [rest["state"][str(n)] for n in range(len(rest["state"]))]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    mapped = jax.vmap(module, in_axes=(0, None), out_axes=(0, None), axis_name="examples")
    outputs, state = mapped(x, state)
    after = {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(state))}
    return outputs, {**rest, "state": after} if train else rest


equinox_kind("equinox inference, rng", lambda key: EqxInference(key), _eqx_inference)
equinox_kind(
    "equinox field, statistics",
    lambda key: eqx.nn.make_with_state(EqxNet)(key),
    _eqx_net,
)


def _key_alone(key):
    return {"w": jax.random.normal(key, (WIDTH, 1)), "b": jnp.zeros(1)}


def _with_option(key, x, width=3):
    return {"a": jax.random.normal(key, (x.shape[1], width)), "b": jnp.ones((width, 1))}


def _on_host(key):
    return {"w": jnp.asarray(np.linalg.qr(np.asarray(jax.random.normal(key, (WIDTH, 1))))[0])}


def functions(name, init, forward, apply=None):
    KINDS[name] = Kind(
        lambda: (init, apply or forward), lambda params, rest, x, train: (forward(params, x), rest)
    )


functions("functions init(key)", _key_alone, lambda params, x: x @ params["w"] + params["b"][None])
functions(
    "functions option", _with_option, lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
)
functions("functions on the host", _on_host, lambda params, x: x @ params["w"])
functions(
    "functions through linen",
    lambda key, x: nn.Dense(1).init(key, x),
    lambda params, x: nn.Dense(1).apply(params, x),
)


def _moving(params, state, x, is_training):
    mean = x.mean(0) if is_training else state["mean"]
    moved = {"mean": (state["mean"] + x.mean(0)) / 2} if is_training else state
    return (x - mean[None]) @ params["w"], moved


def _moving_by_hand(params, rest, x, train):
    outputs, state = _moving(params, rest["state"], x, train)
    return outputs, {"state": state}


KINDS["functions with a state"] = Kind(
    lambda: (lambda key: ({"w": jnp.full((WIDTH, 1), 2.0)}, {"mean": jnp.zeros(WIDTH)}), _moving),
    _moving_by_hand,
)


def _lora_by_hand(params, rest, x, train):
    base = rest["lora_base"]["params"] if "params" in rest["lora_base"] else rest["lora_base"]
    update = params["kernel"]["lora_a"] @ params["kernel"]["lora_b"] * 8
    return x @ (base["kernel"] + update) + base["bias"][None], rest


KINDS["lora"] = Kind(lambda: Lora(nn.Dense(1), rank=2, alpha=16.0), _lora_by_hand)
