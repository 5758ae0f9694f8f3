"""The command `distaff plan`: shows what a run needs before it is started."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from distaff.core.config.sizes import bytes_of
from distaff.errors import ConfigError, DistaffError

_USAGE = """usage: distaff plan RECIPE --target TARGET [OPTIONS] [OPTIONS OF THE RECIPE]

Shows the memory, the traffic and the time of a recipe's training step on devices that this machine
may not have. The step is traced from shapes and compiled for these devices; nothing runs. RECIPE is
as for `distaff fit`; further options belong to the recipe.

  --target TARGET    the devices: cpu:8 (simulated), h100:32x8, h200:8, a100:4x8 (hosts x GPUs), or
                     v5e:16x16, v5p:4x4x8, v6e:8x8 (a grid of TPU chips)
  --mesh MESH        dp, fsdp, tp, fsdp+tp, or sizes such as fsdp=32,tensor=8; default: the recipe's
  --global-batch N   examples in a batch of all devices; default: the recipe's
  --memory SIZE      memory of each device, such as 24GiB; default: the target's
  --double           also plan each mesh axis with twice its size, to show which to grow first
  --out FILE         where to write the plan as JSON; default: plan.json
  -h, --help         print this help

GPU targets need pip install "distaff[plan-gpu]", TPU targets pip install "distaff[plan-tpu]".
"""

_OPTIONS = ("--target", "--mesh", "--global-batch", "--memory", "--out")


def main(words: Sequence[str]) -> int:
    """Runs `distaff plan` with these arguments; returns the exit status.

    Raises:
        DistaffError: an option is wrong, the recipe failed, or a compiler is missing.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    options, rest = _parsed(words[1:])
    if "--target" not in options:
        raise ConfigError("`distaff plan` needs --target, such as --target cpu:8 or h100:32x8.")
    from distaff.plan import plan_recipe  # needs JAX, which the help does not load

    size = options.get("--global-batch")
    plan = plan_recipe(
        words[0],
        rest,
        target=options["--target"],
        mesh=options.get("--mesh"),
        memory=bytes_of(options["--memory"], "--memory") if "--memory" in options else None,
        batch_size=None if size is None else _number(size),
        double="--double" in options,
    )
    print(plan)
    path = options.get("--out", "plan.json")
    plan.save(path)
    print(f"\nwritten: {path}")
    return 0


def _parsed(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the options of this command, and the further words."""
    options: dict[str, str] = {}
    rest, left = [], list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name == "--double" and not equals:
            options[name] = ""
            continue
        if name not in _OPTIONS:
            rest.append(name + equals + value)
            continue
        if not equals and not left:
            raise ConfigError(f"{name} needs a value. See `distaff plan --help`.")
        options[name] = value if equals else left.pop(0)
    return options, rest


def _number(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ConfigError(f"--global-batch must be an integer, at least 1; got {text!r}.")
    return int(text)


class _Met(BaseException):
    """Ends a recipe at its first training, with its trainer and its plan of epochs."""


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Runs a recipe up to its first training, and returns the plan of that as JSON.

    Raises:
        DistaffError: the recipe does not train, or an option does not fit.
    """
    import jax

    from distaff.execution.allocator import ignore_compilers

    ignore_compilers()
    jax.devices()  # starts JAX with the devices of the environment, before the recipe does
    import distaff
    from distaff.cli.fit import run_recipe
    from distaff.cli.recipes import find
    from distaff.data import first_to_train
    from distaff.mesh.planned import Planned, planning
    from distaff.plan import plan_training
    from distaff.plan.process import mesh_from

    _ = distaff.TrainerModule

    def meet(trainer: Any, plan: Any) -> NoReturn:
        raise _Met(trainer, plan)

    try:
        with planning(Planned(meet=meet)):
            recipe = find(request["recipe"])
            run_recipe(recipe, request["arguments"], prog=f"distaff plan {request['recipe']}")
    except _Met as met:
        trainer, events = met.args
    else:
        raise ConfigError(
            f"The recipe {request['recipe']!r} ended without calling train_model, so there is "
            "nothing to plan. Name a recipe that trains."
        )
    batch = first_to_train(events.train_loader)
    plan = plan_training(
        trainer,
        [batch],
        target=request["target"],
        mesh=mesh_from(request["mesh"]),
        memory=request["memory"],
        batch_size=request["batch_size"],
        steps=(events.steps_like(batch), events.epoch_length),
        double=request["double"],
    )
    return dataclasses.replace(plan, name=request["recipe"]).to_json()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return child(request)
    except DistaffError as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        answer = _answer(asked)
    except Exception as error:
        traceback.print_exc()
        answer = {
            "error": "DistaffError",
            "message": f"The recipe {asked['recipe']!r} raised {type(error).__name__}: {error}",
        }
    with open(asked["answer"], "w") as file:
        json.dump(answer, file)
