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
    "distaff K=1, untuned": System(
        "distaff_system",
        options={"steps_per_call": 1, "tune_process": False},
        workloads=("W1",),
    ),
    "hand loop": _LOOP[False],
    "hand loop, tuned": _LOOP[True],
    "hand loop float": System("by_hand", "loop_float", workloads=("W1",)),
    "hand scan": _SCAN[False],
    "hand scan, tuned": _SCAN[True],
    "hand unrolled": _UNROLLED[False],
    "hand unrolled, tuned": _UNROLLED[True],
    "nnx.jit": System("nnx_system"),
    "Keras": System("keras_system", environment="peers"),
    "Keras x32": System("keras_system", options={"steps_per_execution": 32}, environment="peers"),
    "PyTorch": System("torch_system", environment="peers"),
    "PyTorch, 1 thread": System(
        "torch_system", options={"threads": 1}, environment="peers", workloads=("W1",)
    ),
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


class Section(NamedTuple):
    """A part of a training that is measured by itself.

    Attributes:
        title: what the table calls it.
        workload: its name in `workloads.ALL`.
        systems: by name.
        reference: the system that ratios are to.
        unit: `"images/s"` or `"examples/s"`, or `"ms"` per step or round.
    """

    title: str
    workload: str
    systems: dict[str, System]
    reference: str
    unit: str


def _loader(kind: str, **facts: Any) -> System:
    return System("loaders", "loader", {"kind": kind}, **facts)


SECTIONS = {
    "input": Section(
        "Input path: crop and flip of 32x32x3 bytes, batch 128",
        "input",
        {
            "by hand, on the device": System("input_path", "on_device"),
            "by hand, NumPy batches": System("input_path", "numpy_batches"),
            "distaff, ArrayLoader": System("input_path", "distaff_default"),
            "distaff, host batches": System("input_path", "distaff_host"),
            "torch DataLoader, 2 workers": System(
                "input_peers", "torch_loader", {}, False, "peers"
            ),
            "Grain": System("input_peers", "grain_loader", {}, False, "peers"),
        },
        "by hand, on the device",
        "images/s",
    ),
    "loaders": Section(
        "Loaders: shuffled rows of 64 numbers and a label, batch 64, on the host",
        "loaders",
        {
            "NumPy rows by hand": System("loaders", "by_hand"),
            "distaff, rows of an ArrayLoader": _loader("array_loader"),
            "distaff, Mixture of two of them": _loader("mixture"),
            "distaff, from_examples of rows in memory": _loader("examples"),
            "distaff, TextLines": _loader("text"),
            "distaff, TarExamples": _loader("tar"),
            "distaff, ParquetExamples": _loader("parquet"),
            "distaff, ArrayRecordExamples": _loader("array_record"),
            "distaff, generator function": _loader("stream"),
            "distaff, grain.MapDataset": _loader("grain_map"),
            "distaff, grain.IterDataset": _loader("grain_iter"),
            "distaff, the same, no threads": _loader("grain_no_threads"),
            "distaff, torch DataLoader": _loader("torch", environment="peers"),
            "distaff, datasets.Dataset": _loader("hugging_face"),
        },
        "NumPy rows by hand",
        "examples/s",
    ),
    "evaluation": Section(
        "Evaluation: MLP 64-128-10 over 30,000 digits, batch 64",
        "evaluation",
        {
            "by hand, one scan": System("evaluation", "scan"),
            "by hand, loop": System("evaluation", "loop"),
            "distaff eval_model": System("evaluation", "distaff_eval"),
        },
        "by hand, loop",
        "ms per batch",
    ),
    "checkpoint": Section(
        "Checkpoint of 126 MB: how long training waits",
        "checkpoint",
        {
            "by hand, Orbax in the background": System("checkpoint", "orbax"),
            "by hand, numpy.savez": System("checkpoint", "savez"),
            "distaff save_model": System("checkpoint", "distaff_save"),
        },
        "by hand, Orbax in the background",
        "ms per save",
    ),
    "logging": Section(
        "Logging in Distaff: every step against every 100",
        "W1",
        {
            f"distaff, log every {n}": System("distaff_system", options={"log_every_n_steps": n})
            for n in (100, 1)
        },
        "distaff, log every 100",
        "ms per step",
    ),
}


def find(name: str) -> System:
    """Returns a system by its name, among those that train and those of the sections."""
    groups = (SYSTEMS, *(section.systems for section in SECTIONS.values()))
    return next(group[name] for group in groups if name in group)
