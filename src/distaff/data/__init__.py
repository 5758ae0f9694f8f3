"""Loaders: they yield the batches of an epoch, and save and restore their position."""

from __future__ import annotations

from distaff.data.adapters.huggingface import from_datasets
from distaff.data.arrays import ArrayLoader
from distaff.data.datasets.cifar import read_cifar10, read_cifar100
from distaff.data.datasets.digits import digits
from distaff.data.datasets.idx import read_idx
from distaff.data.datasets.pictures import cifar10, cifar10_names, cifar100, cifar100_names, mnist
from distaff.data.entry import INPUT_NAMES, entry
from distaff.data.examples.examples import BlockExamples, Examples, MappedExamples, from_examples
from distaff.data.formats.array_record import ArrayRecordExamples
from distaff.data.formats.parquet import ParquetExamples
from distaff.data.formats.tar_examples import TarExamples
from distaff.data.formats.text import TextLines
from distaff.data.inputs import InputOptions, loader_of, training_loader_of
from distaff.data.loader import (
    Loader,
    as_loader,
    closing_made,
    counts_itself,
    epoch_of,
    first_batch,
    num_batches,
    num_examples,
    num_shapes,
    sources,
)
from distaff.data.on_policy import OnPolicy, first_to_train, is_on_policy
from distaff.data.positioned import Positioned, Restartable
from distaff.data.python_source import python_source
from distaff.data.sequences.bucketed import bucketed
from distaff.data.sequences.packed import packed
from distaff.data.sequences.windows import held_out_windows, shuffled_windows
from distaff.data.stream import Stream
from distaff.data.tables.coding import FrameCoding
from distaff.data.tables.frames import FrameTable, from_frame
from distaff.data.tables.split import k_fold, split
from distaff.data.tables.standardize import Standardize
from distaff.data.tables.transform import Transform
from distaff.data.whole import is_array
from distaff.data.wrappers.limited import Limited, first_batches, limited, unlimited
from distaff.data.wrappers.mapped import MappedLoader
from distaff.data.wrappers.mixture import Mixture

__all__ = [
    "INPUT_NAMES",
    "ArrayLoader",
    "ArrayRecordExamples",
    "BlockExamples",
    "Examples",
    "FrameCoding",
    "FrameTable",
    "InputOptions",
    "Limited",
    "Loader",
    "MappedExamples",
    "MappedLoader",
    "Mixture",
    "OnPolicy",
    "ParquetExamples",
    "Positioned",
    "Restartable",
    "Standardize",
    "Stream",
    "TarExamples",
    "TextLines",
    "Transform",
    "as_loader",
    "bucketed",
    "cifar10",
    "cifar10_names",
    "cifar100",
    "cifar100_names",
    "closing_made",
    "counts_itself",
    "digits",
    "entry",
    "epoch_of",
    "first_batch",
    "first_batches",
    "first_to_train",
    "from_datasets",
    "from_examples",
    "from_frame",
    "held_out_windows",
    "is_array",
    "is_on_policy",
    "k_fold",
    "limited",
    "loader_of",
    "mnist",
    "num_batches",
    "num_examples",
    "num_shapes",
    "packed",
    "python_source",
    "read_cifar10",
    "read_cifar100",
    "read_idx",
    "shuffled_windows",
    "sources",
    "split",
    "training_loader_of",
    "unlimited",
]
