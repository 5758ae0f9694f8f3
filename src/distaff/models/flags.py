"""Mode flags: passes `train` to a forward function under the name that it uses."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

_TRAIN = frozenset(
    (
        *("train", "istrain", "trainmode", "intrain", "traintime", "trainphase", "phasetrain"),
        *("training", "istraining", "trainingmode", "intraining"),
    )
)
_EVALUATE = frozenset(
    (
        *("deterministic", "isdeterministic", "userunningaverage"),
        *("eval", "iseval", "evalmode", "evaluate", "evaluating", "isevaluating"),
        *("evaluation", "isevaluation", "evaluationmode"),
        *("inference", "isinference", "ininference", "inferencemode", "infer", "inferring"),
        *("test", "istest", "testmode", "testtime", "testing", "istesting"),
    )
)
_TRAIN_IN_CALLS = frozenset(
    ("enabledropout", "applydropout", "dropoutenabled", "updatestats", "updatebatchstats")
)
"""Mode flags as arguments of a call; as fields, they are hyperparameters."""

_MODES = frozenset(("mode", "phase", "runmode"))
_TRAIN_WORDS = ("train", "training", "fit")
_EVALUATION_WORDS = (
    *("eval", "evaluation", "evaluate", "test", "testing", "inference", "infer", "predict"),
    *("prediction", "val", "valid", "validation"),
)
_NO_FLAG = object()

NAMES_IN_WORDS = "train, is_training, deterministic, inference or eval"
"""Examples of names, for errors and warnings."""


def parameters(function: Callable[..., Any]) -> list[str]:
    """Returns the names of a function's parameters; empty if Python cannot inspect it."""
    return list(_signature(function))


def num_positional(function: Callable[..., Any]) -> int:
    """Returns the number of positional arguments without a default value, at least 1.

    A large number stands for any number. A default of None does not count as a value.
    """
    known = _signature(function).values()
    if not known or any(each.kind is each.VAR_POSITIONAL for each in known):
        return sys.maxsize
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [x for x in known if x.kind in kinds and (x.default is None or x.default is x.empty)]
    return max(len(required), 1)


def mode_flag(function: Callable[..., Any], train: bool, num_inputs: int = 0) -> dict[str, Any]:
    """Returns the keyword arguments that set the mode of a function; empty if it has none.

    Args:
        function: its parameters with a name such as `train` or `is_training` get `train`, those
            with a name such as `deterministic`, `inference` or `eval` the opposite, and one called
            `mode` a word, if its default, its `Literal` or its `Enum` lists the words.
        train: whether to train.
        num_inputs: number of parameters passed by position, which are inputs whatever their name.
    """
    flags = {}
    for parameter in list(_signature(function).values())[num_inputs:]:
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        value = _flag(parameter, train) if is_named else _NO_FLAG
        if value is not _NO_FLAG:
            flags[parameter.name] = value
    return flags


def names_mode(names: Iterable[str]) -> bool:
    """Returns whether one of these names is a mode flag, so that the caller has chosen the mode."""
    known = _TRAIN | _EVALUATE | _TRAIN_IN_CALLS | _MODES
    return any(_plain(name) in known for name in names)


def switched(name: str, value: Any, train: bool) -> Any:
    """Returns the value of a module's attribute in training or in evaluation.

    Only a bool of a name such as `train`, and a word such as `"train"` of the name `mode`, changes.
    """
    plain = _plain(name)
    if isinstance(value, bool) and plain in _TRAIN:
        return train
    if isinstance(value, bool) and plain in _EVALUATE:
        return not train
    if plain in _MODES and _is_word(value):
        word = _word(_known_words(value), train, value)
        return value if word is _NO_FLAG else word
    return value


def method_of(module: Any, method: Callable[..., Any] | str | None) -> Callable[..., Any]:
    """Returns the callable of a module: the module itself, or one of its methods.

    As in `ctx.apply(params, x, method="encode")`, a method is a name, or a function whose first
    argument is the module.
    """
    if method is None:
        return module
    if isinstance(method, str):
        return getattr(module, method)
    return functools.partial(getattr(method, "__func__", method), module)


def _signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _flag(parameter: inspect.Parameter, train: bool) -> Any:
    """Returns the value for a parameter, or `_NO_FLAG` if it is not a mode flag."""
    plain, default = _plain(parameter.name), parameter.default
    if plain in _MODES:
        words = _annotated_words(parameter.annotation) or _known_words(default)
        if default is parameter.empty and not words:
            words = ("train", "eval")
        return _word(words, train, default) if words else _NO_FLAG
    # Few-shot models have inputs called `train` and `test`, whose default is not a truth value.
    if not (default is None or default is parameter.empty or isinstance(default, int)):
        return _NO_FLAG
    if plain in _TRAIN | _TRAIN_IN_CALLS:
        return train
    return not train if plain in _EVALUATE else _NO_FLAG


def _word(words: tuple[Any, ...], train: bool, default: Any) -> Any:
    """Returns the word for a mode: the default if it fits, else the first that does."""
    words_of_mode = _TRAIN_WORDS if train else _EVALUATION_WORDS
    fitting = [each for each in words if _text(each) in words_of_mode]
    if not fitting:
        return _NO_FLAG
    return default if default in fitting else fitting[0]


def _known_words(default: Any) -> tuple[Any, ...]:
    """Returns the possible words of a parameter or attribute, judged by its value."""
    if isinstance(default, enum.Enum):
        return tuple(type(default))
    return (default, "train", "eval") if _is_word(default) else ()


def _annotated_words(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, str):
        return tuple(re.findall(r"['\"](\w+)['\"]", annotation))
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    is_enum = isinstance(annotation, type) and issubclass(annotation, enum.Enum)
    return tuple(annotation) if is_enum else ()


def _is_word(value: Any) -> bool:
    return _text(value) in (*_TRAIN_WORDS, *_EVALUATION_WORDS)


def _text(value: Any) -> str:
    text = value.name if isinstance(value, enum.Enum) else value
    return text.lower() if isinstance(text, str) else ""
