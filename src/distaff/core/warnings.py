"""Issues warnings, even if standard error is closed."""

from __future__ import annotations

import warnings


def warn(text: str, category: type[Warning] = UserWarning, *, stacklevel: int = 1) -> None:
    """Issues a warning; does nothing if it cannot be shown.

    `stacklevel` is that of `warnings.warn`, counted from the caller. Raises the warning if the
    program turns warnings into errors.
    """
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except Warning:
        raise
    except Exception:  # a closed standard error raises ValueError
        return
