"""Loaders: what yields the batches of an epoch, and can say and restore how far it got."""

from __future__ import annotations

from distaff.data.array_record import ArrayRecordExamples
from distaff.data.arrays import ArrayLoader
from distaff.data.bucketed import bucketed
from distaff.data.builtin import digits
from distaff.data.chunk import (
    SINGLE,
    Chunk,
    Form,
    Gathered,
    One,
    Source,
    Stacked,
    pad,
)
from distaff.data.cifar import read_cifar10, read_cifar100
from distaff.data.entry import entry
from distaff.data.examples import BlockExamples, Examples, MappedExamples, from_examples
from distaff.data.feed import Feed
from distaff.data.feeds import Feeds
from distaff.data.huggingface import from_datasets
from distaff.data.idx import read_idx
from distaff.data.limited import Limited, first_batches, limited, unlimited
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
from distaff.data.mapped import MappedLoader
from distaff.data.mixture import Mixture
from distaff.data.on_policy import OfTraining, OnPolicy, first_to_train, is_on_policy
from distaff.data.packed import packed
from distaff.data.parquet import ParquetExamples
from distaff.data.pictures import cifar10, cifar10_names, cifar100, cifar100_names, mnist
from distaff.data.positioned import Positioned, Restartable
from distaff.data.python_source import python_source
from distaff.data.stream import Stream
from distaff.data.tar_examples import TarExamples
from distaff.data.text import TextLines
from distaff.data.windows import held_out_windows, shuffled_windows

__all__ = [
    "SINGLE",
    "ArrayLoader",
    "ArrayRecordExamples",
    "BlockExamples",
    "Chunk",
    "Examples",
    "Feed",
    "Feeds",
    "Form",
    "Gathered",
    "Limited",
    "Loader",
    "MappedExamples",
    "MappedLoader",
    "Mixture",
    "OfTraining",
    "OnPolicy",
    "One",
    "ParquetExamples",
    "Positioned",
    "Restartable",
    "Source",
    "Stacked",
    "Stream",
    "TarExamples",
    "TextLines",
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
    "held_out_windows",
    "is_on_policy",
    "limited",
    "mnist",
    "num_batches",
    "num_examples",
    "num_shapes",
    "packed",
    "pad",
    "python_source",
    "read_cifar10",
    "read_cifar100",
    "read_idx",
    "shuffled_windows",
    "sources",
    "unlimited",
]
