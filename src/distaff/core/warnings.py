"""Issues warnings, even if standard error is closed."""

from __future__ import annotations

import warnings


def warn(text: str, category: type[Warning] = UserWarning, *, stacklevel: int = 1) -> None:
    """Issues a warning; does nothing if it cannot be shown.

    Args:
        text: whole sentences.
        category: class of the warning.
        stacklevel: as for `warnings.warn`, counted from the caller.

    Raises:
        Warning: the program turns warnings into errors.
    """
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except Warning:
        raise
    except Exception:  # a closed standard error raises ValueError
        return
