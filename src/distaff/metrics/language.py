"""Metrics of language models."""

from __future__ import annotations

from typing import Any

import numpy as np

from distaff.metrics.accumulators import Mean, namespace, pytree


@pytree
class Perplexity(Mean):
    """The exponential of the mean loss over all tokens.

    `Perplexity.per_example(losses, weight=tokens)` takes the mean negative log-likelihood of each
    sequence in nats, `[batch]`, and its number of tokens, `[batch]`.
    """

    def compute(self) -> Any:
        with np.errstate(over="ignore"):
            return namespace(self.total).exp(super().compute())
