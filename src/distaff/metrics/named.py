"""Values of metrics by name; one that is not there names the nearest."""

from __future__ import annotations

from typing import Any, Never

from distaff.errors import UnknownMetricError, nearest


class Named(dict[str, Any]):
    """A dict of values by the name of their metric."""

    def __missing__(self, name: object) -> Never:
        raise UnknownMetricError(f"There is no metric {name!r}. {nearest(str(name), self)}")
