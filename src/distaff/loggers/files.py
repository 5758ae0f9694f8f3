"""Figures, images and texts as files in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distaff.core.typing import Values
from distaff.errors import ConfigError
from distaff.loggers import png
from distaff.loggers.disk import Location, explained, locator, replace
from distaff.loggers.protocol import JSON


class FilesLogger:
    """Writes media files: `figures/val/errors_1200.png`, `images/...png`, `texts/...txt`.

    Files are written atomically; a file of the same name and step is replaced. A "/" in a name
    creates a directory. Metrics and histograms are ignored. All methods raise ConfigError for an
    invalid name, and RunDirectoryError if the file cannot be written.

    Args:
        directory: the directory, or a function that returns it, called for each file.
    """

    def __init__(self, directory: Location) -> None:
        self._locate = locator(directory)

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Does nothing."""

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing."""

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Writes `figures/<name>_<step>.png`, 150 dots per inch."""
        self._write(file_name("figures", name, step, "png"), png.encode_figure(figure))

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Writes `images/<name>_<step>.png`; raises BatchError for an invalid image."""
        self._write(file_name("images", name, step, "png"), png.encode(image))

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Writes `texts/<name>_<step>.txt` in UTF-8."""
        self._write(file_name("texts", name, step, "txt"), text.encode())

    def close(self, status: str) -> None:
        """Does nothing."""

    def _write(self, name: str, content: bytes) -> None:
        path = Path(self._locate()) / name
        with explained(path):
            replace(path, content)


def file_name(kind: str, name: str, step: int, suffix: str) -> str:
    """Returns `<kind>/<name>_<step>.<suffix>`.

    Raises:
        ConfigError: the name is not a path inside the directory.
    """
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
        raise ConfigError(
            f"The name of a figure, image or text is its file name: simple components joined by "
            f"'/', without '..'; got {name!r}. For example: 'val/reconstructions'."
        )
    return f"{kind}/{name}_{int(step)}.{suffix}"
