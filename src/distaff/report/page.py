"""Writes the page of a report: one HTML file with its data, its style and its program."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="{policy}">
<title>Distaff report</title>
<style>{style}</style>
</head>
<body>
<main id="report"><noscript>This report needs JavaScript.</noscript></main>
<script type="application/json" id="facts">{facts}</script>
<script>{program}</script>
</body>
</html>
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(facts: dict[str, Any]) -> str:
    """Returns the HTML of a report. All texts of runs are data, never markup.

    A page whose facts have a `version` asks its server for a newer one.
    """
    # In a script element, only "<" can begin markup.
    data = json.dumps(facts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    style, program = (
        _asset("uplot.css") + _asset("report.css"),
        _asset("uplot.js") + _asset("report.js"),
    )
    policy = f"{_POLICY}; connect-src 'self'" if "version" in facts else _POLICY
    return _PAGE.format(style=style, facts=data, program=program, policy=policy)


def _asset(name: str) -> str:
    return resources.files("distaff.report").joinpath(name).read_text("utf-8")
