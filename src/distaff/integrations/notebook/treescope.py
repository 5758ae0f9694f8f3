"""treescope: interactive views of pytrees in notebooks."""

from __future__ import annotations

from typing import Any

import treescope


def as_html(tree: Any) -> str:
    """Returns a pytree as an interactive view."""
    return treescope.render_to_html(tree, compressed=True)
