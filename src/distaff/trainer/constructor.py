"""Records the constructor call of a trainer's subclass, and repeats it from the record.

See `docs/decisions/0031-the-call-that-made-a-trainer.md`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from distaff.core.config.encoding import from_json, to_json
from distaff.core.names import name_of
from distaff.errors import CheckpointError, ConfigError
from distaff.mesh import MeshOptions
from distaff.models import is_linen_class, rebuild
from distaff.optim import OptimizerConfig
from distaff.optim.factory import is_loaded
from distaff.trainer.config import TrainerConfig
from distaff.trainer.plain import LostError, recorded, restored

T = TypeVar("T")

_MODEL = {"$model": True}
_ABSENT: Mapping[str, Any] = {
    "loggers": (),
    "callbacks": (),
    "example_batch": None,
    "init_from": None,
}
"""Arguments other than options, with their values in a loaded trainer."""

_GIVEN = {"optimizer", *_ABSENT}


class Call(NamedTuple):
    """The arguments of a custom constructor, as strict JSON.

    Attributes:
        owner: name of the class.
        named: arguments by parameter name.
        positional: values of `*args`.
        loose: values of `**kwargs`.
        places: container and key of each argument, by the `id` of the object. Valid only in the
            constructor, while the objects exist.
    """

    owner: str
    named: dict[str, Any]
    positional: list[Any]
    loose: dict[str, Any]
    places: dict[int, tuple[Any, Any]]

    def with_model(self, model: Any) -> Call:
        """Replaces the model in the arguments by a marker, since it is recorded separately."""
        if id(model) in self.places:
            container, key = self.places[id(model)]
            container[key] = _MODEL
        return self._replace(places={})

    def record(self, options: Any) -> dict[str, Any]:
        """Returns the record of the call.

        Args:
            options: the trainer's `TrainerConfig`. Arguments with equal values are recorded there.
        """
        own = {each.name for each in dataclasses.fields(options)}
        values = to_json(options)
        given = [name for name in self.loose if name in own | _GIVEN]
        given += [name for name, x in self.named.items() if name in own and x == values[name]]
        given += [name for name in self.named if name in _ABSENT]
        return {
            "class": self.owner,
            "named": {name: x for name, x in self.named.items() if name not in given},
            "positional": self.positional,
            "loose": {name: x for name, x in self.loose.items() if name not in given},
            "given": sorted(given),
        }


def call_of(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Records a call of a constructor, before it can change its arguments.

    Returns:
        The call; None for Distaff's constructors, and for invalid arguments.

    Raises:
        ConfigError: one of Distaff's constructors gets no model, or further positional arguments.
    """
    if not has_own_constructor(cls):
        if len(args) > 1:
            is_count = any(isinstance(each, int) for each in args[1:])
            outputs = " The number of outputs is that of the model's last layer." * is_count
            raise ConfigError(
                f"{cls.__name__} takes only the model by position, and all else by keyword; got "
                f"{len(args)} arguments. Write {cls.__name__}(model, example_batch=batch, ...)."
                f"{outputs}"
            )
        if not args and kwargs and "model" not in kwargs:  # a copy is made without arguments
            raise ConfigError(
                f"{cls.__name__} needs a model. Write {cls.__name__}(model, ...), with a Flax or "
                "Equinox module, or a pair (init, apply)."
            )
        return None
    signature = inspect.signature(cls.__init__)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    call = Call(name_of(cls), {}, [], {}, {})
    for name, parameter in list(signature.parameters.items())[1:]:
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            call.positional.extend(recorded(each) for each in value)
            call.places.update({id(x): (call.positional, n) for n, x in enumerate(value)})
        elif parameter.kind is parameter.VAR_KEYWORD:
            call.loose.update({key: recorded(each) for key, each in value.items()})
            call.places.update({id(x): (call.loose, key) for key, x in value.items()})
        else:
            call.named[name] = recorded(value)
            call.places[id(value)] = (call.named, name)
    return call


def constructed(call: Call | None, options: Any) -> dict[str, Any]:
    """Returns the entry of a run's record for a call; empty for Distaff's constructors."""
    return {} if call is None else {"constructor": call.record(options)}


def has_own_constructor(cls: type) -> bool:
    """Whether a class has or inherits a custom constructor."""
    return not cls.__init__.__module__.startswith("distaff.")


def recorded_options(cls: type[TrainerConfig], record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recorded arguments of Distaff's constructor, without the devices of the run.

    Raises:
        ConfigError: an option is unknown, or has another type in this version.
    """
    options = dict(vars(from_json(cls, record["options"])))
    with suppress(ConfigError):  # A transformation or a function is only recorded by its name.
        optimizer = from_json(OptimizerConfig, record.get("optimizer"))
        # A name in a file must not lead to the import of a module.
        if is_loaded(optimizer):
            options["optimizer"] = optimizer
    # Another process may have fewer devices than the run had.
    left_out = cls.names("ignored") | {field.name for field in dataclasses.fields(MeshOptions)}
    return {name: x for name, x in options.items() if name not in left_out}


def rebuild_trainer(
    cls: type[T],
    record: Mapping[str, Any],
    model: Any,
    options: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> T:
    """Creates the trainer of a run again.

    Args:
        cls: class of the trainer.
        record: the record of the run; its entry `constructor` was returned by `Call.record`.
        model: the model passed for loading; None or a Linen class is rebuilt from the record.
        options: recorded arguments of Distaff's constructor.
        changes: arguments that replace the recorded ones.

    Raises:
        CheckpointError: an argument must be passed, because it was not recorded.
        ConfigError: the constructor does not accept one of the changes.
    """

    def the_model() -> Any:
        if model is None or is_linen_class(model):
            return rebuild(record["model"], model)
        return model

    if not has_own_constructor(cls):
        make: Any = cls
        return make(the_model(), **{**options, **changes})
    found = _Arguments(cls, record.get("constructor"), options, the_model)
    left = dict(changes)
    if model is not None and "model" in found.signature.parameters:
        left["model"] = the_model()
    return _call(found, left)


def _call(found: _Arguments, left: dict[str, Any]) -> Any:
    """Repeats the call of a custom constructor, with the changes `left`."""
    signature = found.signature
    bound = signature.bind_partial(None)
    bound.arguments.update(found.named(left))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            bound.arguments[name] = found.positional()
        elif parameter.kind is parameter.VAR_KEYWORD:
            bound.arguments[name], left = {**found.loose(), **left}, {}
    name = found.cls.__name__
    if left:
        known = ", ".join(map(repr, list(signature.parameters)[1:])) or "nothing"
        raise ConfigError(
            f"The constructor of {name} takes {known}, but not {sorted(left)}. Omit these, or let "
            "it take **options and pass them to super().__init__."
        )
    found.check()
    try:
        return found.cls(*bound.args[1:], **bound.kwargs)
    except TypeError as error:
        raise CheckpointError(
            f"{name} cannot be created as recorded: {error}. Pass the arguments of its "
            f"constructor to {name}.load_from_checkpoint(path, ...)."
        ) from error


class _Arguments:
    """Restores the arguments of a call, and collects those that are missing."""

    def __init__(
        self,
        cls: type,
        call: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        model: Callable[[], Any],
    ) -> None:
        self.cls, self.signature, self._model = cls, inspect.signature(cls.__init__), model
        self.missing: dict[str, str] = {}
        self._call: Mapping[str, Any] = call or {}
        given = self._call.get("given", list(options))
        self._optimizer = options.get("optimizer", OptimizerConfig())
        self._options = {name: options[name] for name in given if name in options}

    def named(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments by parameter name. Removes them from the changes."""
        found: dict[str, Any] = {}
        recorded_here = self._call.get("named", {})
        for name, parameter in list(self.signature.parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if name in changes:
                found[name] = changes.pop(name)
            elif name == "model" and not recorded_here:
                found[name] = self._model()
            elif name in recorded_here:
                self._restore(found, name, recorded_here[name])
            elif name in self._options:
                found[name] = self._options[name]
            elif name in _ABSENT:
                found[name] = _ABSENT[name]
            elif parameter.default is parameter.empty:
                self.missing[name] = "it was not recorded"
        return found

    def positional(self) -> tuple[Any, ...]:
        """Returns the values of `*args`."""
        found: dict[str, Any] = {}
        for number, each in enumerate(self._call.get("positional", ())):
            self._restore(found, f"argument {number}", each)
        return tuple(found.values())

    def loose(self) -> dict[str, Any]:
        """Returns the values of `**kwargs`, including Distaff's options."""
        named = self.signature.parameters
        found = {name: x for name, x in self._options.items() if name not in named}
        for name, each in self._call.get("loose", {}).items():
            self._restore(found, name, each)
        return found

    def check(self) -> None:
        """Checks that no argument is missing.

        Raises:
            CheckpointError: some are; the message lists them.
        """
        if self.missing:
            name = self.cls.__name__
            reasons = "; ".join(f"{each!r}: {why}" for each, why in self.missing.items())
            shown = ", ".join(f"{each}=..." for each in self.missing)
            raise CheckpointError(
                f"{name} needs arguments of its constructor that cannot be restored ({reasons}). "
                f"Pass them: {name}.load_from_checkpoint(path, {shown})."
            )

    def _restore(self, found: dict[str, Any], name: str, data: Any) -> None:
        if data == _MODEL:
            found[name] = self._model()
            return
        try:
            found[name] = restored(data)
        except LostError as error:
            if name == "optimizer":  # not needed by a loaded model
                found[name] = self._optimizer
            else:
                self.missing[name] = str(error)
        except Exception as error:
            self.missing[name] = f"it cannot be restored: {error}"
