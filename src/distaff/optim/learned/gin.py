"""Reads the settings of HyperV2 from the `config.gin` published with its meta-parameters.

Gin is a configuration language whose bindings `selector.argument = value` may name any function.
This reader looks up no name, and accepts only Python literals as values.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from distaff.errors import CheckpointError, ConfigError, nearest
from distaff.optim.learned.settings import VeloSettings

_NETWORK = "HyperV2"
_LONGEST_VALUE = 200
_BINDING = re.compile(
    r"(?P<scope>(?:[\w.]+/)*)(?:(?P<selector>[\w.]+)\.)?(?P<argument>\w+)\s*=\s*(?P<value>.+)",
    re.DOTALL,
)
_TRAINED = re.compile(r"@(?:[\w./]+[./])?HyperV2(?:\(\))?")

_WITHOUT_EFFECT = {"reparam_decay", "summarize_all_control", "summarize_each_layer"}
_ONLY = {
    "ff_hidden_size": 4,
    "ff_hidden_layers": 2,
    "initial_momentum_decays": (0.9, 0.99, 0.999),
    "initial_rms_decays": (0.999,),
    "initial_adafactor_decays": (0.9, 0.99, 0.999),
    "mix_layers": True,
    "exp_mult": 0.001,
    "step_mult": 0.001,
    "validation_mode": False,
    "with_validation_feature_dim": False,
    "with_g": True,
    "with_m": True,
    "with_m_feat": True,
    "with_rms": True,
    "with_rms_feat": True,
    "with_rms_norm_g": True,
    "with_rsqrt_rms": True,
    "with_p": True,
    "with_fac_norm_g": True,
    "with_fac_rms": True,
    "with_fac_rsqrt": True,
    "with_grad_clip_feat": True,
    "with_fac_mom_mult": True,
    "with_rms_only_norm_g": True,
    "adafactor_accumulator": True,
    "param_scale_mult": True,
    "precondition_output": False,
    "rnn_state_decay": 0.0,
    "constant_loss": False,
    "clip_param_scale_amount": None,
}


def read_settings(text: str) -> VeloSettings:
    """Returns the settings in the text of a `config.gin`, with defaults for missing ones.

    Bindings of other names, which belong to meta-training, are ignored, as in the original.

    Raises:
        CheckpointError: another network than HyperV2 was trained; or a line about it is not a
            binding, or binds an unknown argument or an unsupported value.
    """
    known = {each.name for each in dataclasses.fields(VeloSettings)}
    bound: dict[str, Any] = {}
    for line, statement in _statements(text):
        binding = _BINDING.fullmatch(statement)
        if binding is None:
            if _NETWORK not in statement:
                continue
            raise _error(line, f"must be `name.argument = value`; got {_quoted(statement)}")
        selector, argument, value = binding["selector"] or "", binding["argument"], binding["value"]
        configurable = selector.split(".")[-1]
        if (configurable, argument) == ("run_train", "lopt") and not _TRAINED.fullmatch(
            value.strip()
        ):
            raise _error(line, f"must train @{_NETWORK}(), and trains {_quoted(value)}")
        if configurable != _NETWORK or binding["scope"]:
            continue
        if argument in bound:
            raise _error(line, f"must not bind {_NETWORK}.{argument} a second time")
        bound[argument] = None if argument in _WITHOUT_EFFECT else _literal(line, argument, value)
        if argument not in known | _WITHOUT_EFFECT | _ONLY.keys():
            raise _error(
                line,
                f"must bind an argument of {_NETWORK}, and binds {_quoted(argument)}. "
                f"{nearest(argument, known)}",
            )
        if argument in _ONLY and not _is_same(bound[argument], _ONLY[argument]):
            raise _error(
                line,
                f"must leave {argument} at {_ONLY[argument]!r}, the only value that is "
                f"implemented, and sets {_quoted(value)}",
            )
    try:
        return VeloSettings(**{name: value for name, value in bound.items() if name in known})
    except ConfigError as error:
        raise CheckpointError(f"config.gin has invalid settings: {error}") from error


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yields each statement with its first line number; an indented line continues a statement."""
    first, gathered = 0, ""
    for number, line in enumerate([*text.splitlines(), "end"], 1):
        bare = line.rstrip().removesuffix("\\").rstrip()
        if not bare or bare.lstrip().startswith("#"):
            continue
        if gathered and line[0].isspace():
            gathered += " " + bare.lstrip()
            continue
        if gathered:
            yield first, gathered
        first, gathered = number, bare


def _literal(line: int, argument: str, value: str) -> Any:
    try:
        return ast.literal_eval(value.strip() if len(value) <= _LONGEST_VALUE else "")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise _error(
            line,
            f"must bind {argument} to a number, True, False, None or a tuple of "
            f"these, and binds it to {_quoted(value)}",
        ) from error


def _is_same(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return isinstance(value, tuple | list) and tuple(value) == expected
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _error(line: int, rule: str) -> CheckpointError:
    return CheckpointError(f"Line {line} of config.gin {rule}.")
