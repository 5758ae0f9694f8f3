"""Feeds: the loaders that a trainer reads, and what it evaluates on in place of them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data.loader import Loader, epoch_of, in_order, sources
from distaff.data.stream import Stream
from distaff.errors import BatchError
from distaff.execution.feed.feed import Feed
from distaff.execution.placement import ONE_DEVICE, Placement

_MIN_FEEDS = 4


class Feeds:
    """The feeds of the loaders that were seen last, so that their arrays are placed once.

    Args:
        placement: where batches go.
    """

    def __init__(self, placement: Placement = ONE_DEVICE) -> None:
        self._placement = placement
        self._feeds: list[Feed] = []
        self._views: list[tuple[Loader, Loader]] = []
        self._in_place: list[Loader] = []
        self._room = _MIN_FEEDS
        self.lock = threading.RLock()  # a loader may itself predict

    def make_room(self, count: int) -> None:
        """Has room for so many loaders that take turns."""
        self._room = max(_MIN_FEEDS, count)

    def of(self, loader: Loader, *, name: str, resident: bool | None = None) -> Feed:
        """Returns the feed of a loader; see `Feed`. By default the placement decides."""
        if resident is None:
            resident = self._placement.gathers
        found = self._known(loader)
        feed = found or Feed(
            loader,
            name=name,
            resident=resident,
            lock=self.lock,
            placement=self._placement,
        )
        others = [each for each in self._feeds if each is not feed]
        older = [each for each in others[self._room - 1 :] if each.running]
        self._feeds = [feed, *others[: self._room - 1], *older]
        return feed

    def validate_on(self, loaders: Iterable[Loader], train_loader: Loader) -> None:
        """Notes the loaders of a run's validations.

        An iterable of the user's own that only validations read is read where it stands, so that
        its position is saved, and its batches are verified at a resume.
        """
        trained = list(sources(train_loader))
        self._in_place = [
            loader
            for loader in loaders
            if any(isinstance(each, Stream) and each.is_read_again for each in sources(loader))
            and not any(each is other for each in sources(loader) for other in trained)
        ]

    def view(self, loader: Loader) -> Loader | None:
        """Returns what to evaluate on in place of a loader, always the same; see `Loader`.

        Returns:
            None where the loader has no `in_order`.
        """
        if any(loader is each for each in self._in_place):
            return loader
        known = next((view for given, view in self._views if given is loader), None)
        view = in_order(loader) if known is None else known
        others = [each for each in self._views if each[0] is not loader]
        self._views = others[-self._room + 1 :]
        if view is not None and view is not loader:
            self._views.append((loader, view))
        return view

    def has_view(self, loader: Any) -> bool:
        """Whether `view` has returned one for a loader lately."""
        return any(each[0] is loader for each in self._views)

    @contextmanager
    def one_pass(self, loader: Loader, name: str) -> Generator[Loader]:
        """Gives what to evaluate on in place of a loader, which stays where it is.

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
                "evaluation would move it. Evaluate with a loader of its own, or give the loader a "
                "method in_order() that returns another one over the same data."
            )
        state = loader.get_state()
        try:
            yield loader
        finally:
            self._back(loader, state, name)

    def _back(self, loader: Loader, state: Mapping[str, Any], name: str) -> None:
        """Puts a loader back, if it can go there."""
        try:
            loader.set_state(state)
        except BatchError as error:
            loader.set_state(loader.get_state())
            warn(
                f"An evaluation has moved the {name} loader, which continues from where it is now: "
                f"{error}"
            )

    def batches(self, loader: Loader, name: str) -> Iterator[Batch]:
        """Yields the batches of the next epoch, while no other one is read.

        Raises:
            BatchError: there is none.
        """
        found = iter(loader)
        with self.lock:
            batch = next(found, None)
        if batch is None:  # a loader may stand at the end of an epoch
            found = epoch_of(loader, name=name)
            with self.lock:
                batch = next(found, None)
        while batch is not None:
            yield batch
            with self.lock:
                batch = next(found, None)

    def position(self, loader: Loader) -> Mapping[str, Any]:
        """Returns where a loader stood after the last chunk that was handed out of it."""
        feed = self._known(loader)
        handed_out = None if feed is None else feed.handed_out
        return loader.get_state() if handed_out is None else handed_out

    def settle(self, loader: Loader) -> None:
        """Returns when no thread reads a loader any more, which may then be put elsewhere."""
        feed = self._known(loader)
        if feed is not None:
            feed.settle()

    def _known(self, loader: Loader) -> Feed | None:
        return next((feed for feed in self._feeds if feed.loader is loader), None)
