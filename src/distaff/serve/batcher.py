"""Computes requests in batches: those that arrive together share a program."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from distaff.serve.figures import Figures
from distaff.serve.model import ServedModel
from distaff.serve.options import ServeOptions

_log = logging.getLogger("distaff")

Arrays = dict[str, np.ndarray]


class QueueFullError(Exception):
    """The server has as many requests as it may have, or ends."""


class BatchFailedError(Exception):
    """The model raised an error, which is logged."""


class _Request(NamedTuple):
    inputs: Arrays
    rows: int
    outputs: asyncio.Future[Arrays]


class Batcher:
    """A queue of requests, and a thread that computes one batch after the other.

    The requests that arrive while a batch is computed form the next one. The loop of the server is
    never blocked.

    Args:
        model: computes a batch.
        options: sizes and limits.
        figures: counts batches and examples.
    """

    def __init__(self, model: ServedModel, options: ServeOptions, figures: Figures) -> None:
        self._model, self._options, self._figures = model, options, figures
        self._waiting: deque[_Request] = deque()
        self._rows = 0
        self._arrived, self._filled = asyncio.Event(), asyncio.Event()
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distaff-serve")

    @property
    def is_closed(self) -> bool:
        """Whether new requests are turned away."""
        return self._is_closed

    def start(self) -> None:
        """Starts to compute batches; to be called in the loop of the server."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Computes the requests that were accepted, then ends the thread."""
        self._is_closed = True
        self._arrived.set()
        self._filled.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def submit(self, inputs: Arrays, rows: int) -> Arrays:
        """Returns the outputs for inputs by name, each `[rows, ...]`.

        A request that is cancelled before its batch begins is not computed.

        Raises:
            QueueFullError: the server ends.
            BatchFailedError: the model raised an error.
        """
        if self._is_closed:
            raise QueueFullError
        outputs: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(inputs, rows, outputs))
        self._rows += rows
        self._arrived.set()
        if self._rows >= self._model.sizes[-1]:
            self._filled.set()
        return await outputs

    async def _run(self) -> None:
        while await self._has_work():
            if batch := self._next_batch():
                await self._answer(batch)

    async def _answer(self, batch: list[_Request]) -> None:
        loop = asyncio.get_running_loop()
        try:
            outputs = await loop.run_in_executor(self._thread, self._compute, batch)
        except Exception:
            _log.exception("A batch of %d requests failed.", len(batch))
            outputs = None
        for n, request in enumerate(batch):
            if request.outputs.done():  # it was given up meanwhile
                continue
            if outputs is None:
                request.outputs.set_exception(BatchFailedError())
            else:
                request.outputs.set_result(outputs[n])

    async def _has_work(self) -> bool:
        """Waits for requests; returns False after the last one of a server that ends."""
        while not self._waiting:
            if self._is_closed:
                return False
            self._arrived.clear()
            await self._arrived.wait()
        if self._options.max_wait:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.max_wait):
                    await self._filled.wait()
        return True

    def _next_batch(self) -> list[_Request]:
        """Takes requests from the queue up to the largest batch; a larger request is alone."""
        batch: list[_Request] = []
        rows, most = 0, self._model.sizes[-1]
        while self._waiting and (not batch or rows + self._waiting[0].rows <= most):
            request = self._waiting.popleft()
            self._rows -= request.rows
            if not request.outputs.done():  # not cancelled
                batch.append(request)
                rows += request.rows
        if self._rows < most and not self._is_closed:
            self._filled.clear()
        return batch

    def _compute(self, batch: list[_Request]) -> list[Arrays]:
        joined = {
            name: np.concatenate([request.inputs[name] for request in batch])
            for name in self._model.inputs
        }
        outputs = self._model(joined)
        self._figures.batch(sum(request.rows for request in batch), len(batch))
        ends = np.cumsum([request.rows for request in batch])
        return [
            {name: x[end - request.rows : end] for name, x in outputs.items()}
            for request, end in zip(batch, ends, strict=True)
        ]
