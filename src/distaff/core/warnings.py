"""Warnings that end no run: standard error may be closed, or its other end gone."""

from __future__ import annotations

import warnings


def warn(text: str, category: type[Warning] = UserWarning, *, stacklevel: int = 1) -> None:
    """Issues a warning; where it cannot be shown, nothing happens.

    Args:
        text: whole sentences.
        category: its class.
        stacklevel: as for `warnings.warn`, counted from the caller.

    Raises:
        Warning: the program has turned warnings into errors.
    """
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except Warning:
        raise
    except Exception:  # a standard error that is closed is a ValueError
        return
