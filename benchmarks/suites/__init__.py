"""The suites, in the order in which they run. Each is a module: what it does is its docstring, ``run`` does it."""

from __future__ import annotations

import importlib
import types
from typing import Final

NAMES: Final = (
    "reading",
    "growth",
    "purging",
    "handoff",
    "drain",
    "sizes",
    "memory",
    "dear",
    "bus",
    "lag",
    "outage",
    "idle",
    "master",
)
"""``reading``, ``growth`` and ``purging`` share the loaded tables; the last one deletes half of them."""

ASKED_FOR: Final = ("scale",)
"""Too long for a run of everything: what runs only when it is named."""

GUARDED: Final = ("reading", "handoff", "drain", "bus")
"""Those with ratios to compare: what ``--quick`` runs, unless others are named."""


def suite(name: str) -> types.ModuleType:
    """The suite's module, which may need what only the benchmarks need."""
    return importlib.import_module(f"benchmarks.suites.{name}")
