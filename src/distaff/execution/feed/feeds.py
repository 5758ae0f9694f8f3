"""Manages the loaders of a trainer: their feeds, and the views to evaluate on."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data.loader import Loader, epoch_of, in_order, num_batches, sources
from distaff.data.stream import Stream
from distaff.errors import BatchError
from distaff.execution.feed.feed import Feed
from distaff.execution.placement import ONE_DEVICE, Placement

_MIN_FEEDS = 4


class Feeds:
    """Keeps the feeds of recently used loaders, so that their arrays are placed only once.

    Args:
        placement: places batches.
    """

    def __init__(self, placement: Placement = ONE_DEVICE) -> None:
        self._placement = placement
        self._feeds: list[Feed] = []
        self._views: list[tuple[Loader, Loader]] = []
        self._in_place: list[Loader] = []
        self._room = _MIN_FEEDS
        self._left: tuple[Loader | None, Mapping[str, Any]] = (None, {})
        self.lock = threading.RLock()  # reentrant, as a loader may itself call predict

    def make_room(self, count: int) -> None:
        """Sets the number of loaders to keep; at least 4."""
        self._room = max(_MIN_FEEDS, count)

    def of(self, loader: Loader, *, name: str, resident: bool | None = None) -> Feed:
        """Returns the feed of a loader; see `Feed`. By default the placement sets `resident`."""
        if resident is None:
            resident = self._placement.gathers
        feed = self._known(loader) or Feed(
            loader, name=name, resident=resident, lock=self.lock, placement=self._placement
        )
        others = [each for each in self._feeds if each is not feed]
        older = [each for each in others[self._room - 1 :] if each.running]
        self._feeds = [feed, *others[: self._room - 1], *older]
        return feed

    def validate_on(self, loaders: Iterable[Loader], train_loader: Loader) -> None:
        """Registers the validation loaders of a run.

        A custom iterable that only validations read is evaluated directly rather than through a
        view, so that its position is saved and its batches are verified on resume.
        """
        trained = list(sources(train_loader))
        self._in_place = [
            loader
            for loader in loaders
            if any(isinstance(each, Stream) and each.is_read_again for each in sources(loader))
            and not any(_is_same(each, other) for each in sources(loader) for other in trained)
        ]

    def view(self, loader: Loader) -> Loader | None:
        """Returns the loader to evaluate on in place of another one, the same at each call.

        Returns:
            The view; None if the loader has no `in_order` (see `Loader`).
        """
        if any(loader is each for each in self._in_place):
            return loader
        known = next((view for viewed, view in self._views if viewed is loader), None)
        view = in_order(loader) if known is None else known
        others = [each for each in self._views if each[0] is not loader]
        self._views = others[-self._room + 1 :]
        if view is not None and view is not loader:
            self._views.append((loader, view))
        return view

    def has_view(self, loader: Any) -> bool:
        """Whether `view` recently returned another loader for this one."""
        return any(each[0] is loader for each in self._views)

    @contextmanager
    def one_pass(self, loader: Loader, name: str) -> Generator[Loader]:
        """Yields the loader to evaluate on, and restores the position of `loader` afterwards.

        Raises:
            BatchError: the loader has no `in_order`, and is being trained on.
        """
        view = self.view(loader)
        if view is not None:
            yield view
            return
        feed = self._known(loader)
        if feed is not None and feed.running:
            raise BatchError(
                f"The {name} loader, a {type(loader).__name__}, is being trained on, and an "
                "evaluation would change its position. Evaluate with a separate loader, or give "
                "this one a method in_order() that returns another loader over the same data."
            )
        state = loader.get_state()
        try:
            yield loader
        finally:
            try:
                loader.set_state(state)
            except BatchError as error:
                loader.set_state(loader.get_state())
                warn(
                    f"An evaluation changed the position of the {name} loader, which continues "
                    f"from there: {error}"
                )

    def batches(self, loader: Loader, name: str) -> Iterator[Batch]:
        """Yields the batches of the next epoch; holds `lock` while it reads each of them.

        Raises:
            BatchError: the loader is empty.
        """
        batches = iter(loader)
        with self.lock:
            batch = next(batches, None)
        if batch is None:  # a loader may be at the end of an epoch
            batches = epoch_of(loader, name=name)
            with self.lock:
                batch = next(batches, None)
        while batch is not None:
            yield batch
            with self.lock:
                batch = next(batches, None)

    def position(self, loader: Loader) -> Mapping[str, Any]:
        """Returns the position of a loader after the last chunk that its feed yielded."""
        feed = self._known(loader)
        handed_out = None if feed is None else feed.handed_out
        return loader.get_state() if handed_out is None else handed_out

    def leave(self, loader: Loader) -> None:
        """Records where a run that ended leaves its train loader."""
        self._left = loader, dict(loader.get_state())

    def is_left_within_epoch(self, loader: Loader) -> bool:
        """Whether the last run ended within an epoch of a loader that has not moved since."""
        left, position = self._left
        if left is not loader or loader.get_state() != position:
            return False
        batch, length = position.get("batch"), num_batches(loader)
        return length is not None and isinstance(batch, int) and 0 < batch < length

    def settle(self, loader: Loader) -> None:
        """Waits until no thread reads a loader; its position may then be set."""
        feed = self._known(loader)
        if feed is not None:
            feed.settle()

    def _known(self, loader: Loader) -> Feed | None:
        return next((feed for feed in self._feeds if feed.loader is loader), None)


def _is_same(loader: Loader, other: Loader) -> bool:
    shared = isinstance(loader, Stream) and loader.shares_source(other)
    return loader is other or shared
