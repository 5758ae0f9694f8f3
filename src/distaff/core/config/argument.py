"""`Argument[...]`: the type of an option that is one word on the command line, or JSON.

`tyro` makes a subcommand of a field whose type is a union with a dataclass. With `Argument`, such
an option takes a plain value, or the JSON of the dataclass as in `config.json`:

    --ema 0.999
    --ema '{"decay": 0.999, "warmup": false}'
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from distaff.core.config import encoding, strict_json

_WORDS = {"None": None, "True": True, "False": False}
_METAVARS = {bool: "{True,False}", int: "INT", float: "FLOAT", str: "STR", type(None): "{None}"}

T = TypeVar("T")

if TYPE_CHECKING:
    Argument: TypeAlias = Annotated[T, "one word on the command line"]
else:

    class Argument:
        """Write `Argument[EMA | float | None]` as the annotation of a field, as a string.

        It is the type itself, and for `tyro`, if that is imported, one with a parser.
        """

        def __class_getitem__(cls, kind: Any) -> Any:
            """Returns the type of the field."""
            tyro = sys.modules.get("tyro")
            return kind if tyro is None else Annotated[kind, _constructor(tyro, kind)]


def _constructor(tyro: Any, kind: Any) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(map(_metavar, typing.get_args(kind))),
        instance_from_str=lambda words: parsed(words[0], kind),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_written(value)],
    )


def parsed(word: str, kind: Any) -> Any:
    """Returns the value of a word: None, a bool, a number, a dataclass, or else the word itself.

    The check of the option judges any value but a dataclass.

    >>> parsed("0.999", float | None), parsed("None", float | None), parsed("bf16", str)
    (0.999, None, 'bf16')

    Raises:
        ConfigError: JSON does not describe a dataclass of this type.
    """
    try:
        data = _WORDS[word] if word in _WORDS else strict_json.loads(word.encode())
    except ValueError:
        data = word
    return encoding.from_json(kind, data) if isinstance(data, dict) else data


def _written(value: Any) -> str:
    words = {id(value): word for word, value in _WORDS.items()}
    data = encoding.to_json(value)
    return words.get(id(data)) or (data if isinstance(data, str) else json.dumps(data))


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    return "JSON" if dataclasses.is_dataclass(kind) else _METAVARS.get(kind, "STR")
