"""The systems that are compared, by name: which file trains, and in which environment."""

from __future__ import annotations

from typing import Any, NamedTuple


class System(NamedTuple):
    """One way to train a workload.

    Attributes:
        module: the file in this folder; it is imported by its worker only.
        function: `(workload, rounds, folder, **options)` in it.
        options: passed to the function.
        tuned: whether the allocator is tuned before JAX starts, as Distaff does by itself.
        environment: `"core"` is Distaff's own; `"peers"` holds what only other frameworks need.
        workloads: the only workloads it is run on; all if empty.
        rolled: whether steps run in a rolled `lax.scan`.
        by_hand: whether it is one of the forms a person would write with JAX alone.
    """

    module: str
    function: str = "run"
    options: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it
    tuned: bool = False
    environment: str = "core"
    workloads: tuple[str, ...] = ()
    rolled: bool = False
    by_hand: bool = False


REFERENCE = "hand loop"
"""What every ratio is to, beside the best hand-written form."""


def _by_hand(function: str, **facts: Any) -> dict[bool, System]:
    return {
        tuned: System("by_hand", function, tuned=tuned, by_hand=True, **facts)
        for tuned in (False, True)
    }


_LOOP = _by_hand("loop")
_SCAN = _by_hand("scan", options={"unroll": False}, rolled=True)
_UNROLLED = _by_hand("scan", options={"unroll": True})

SYSTEMS = {
    "distaff": System("distaff_system"),
    "distaff K=1": System("distaff_system", options={"steps_per_call": 1}),
    "hand loop": _LOOP[False],
    "hand loop, tuned": _LOOP[True],
    "hand loop float": System("by_hand", "loop_float", workloads=("W1",)),
    "hand scan": _SCAN[False],
    "hand scan, tuned": _SCAN[True],
    "hand unrolled": _UNROLLED[False],
    "hand unrolled, tuned": _UNROLLED[True],
    "nnx.jit": System("nnx_system"),
    "Keras": System("keras_system", environment="peers"),
    "Keras x32": System(
        "keras_system", options={"steps_per_execution": 32}, environment="peers"
    ),
    "PyTorch": System("torch_system", environment="peers"),
    "Lightning": System("lightning_system", environment="peers"),
}

QUICK = (
    "distaff",
    "distaff K=1",
    "hand loop",
    "hand loop, tuned",
    "hand scan",
    "hand scan, tuned",
)
"""The systems of `make bench-quick`."""
