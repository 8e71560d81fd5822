"""One event that costs far more than its bytes, of each kind, in the engine's inside (journal, decoder, writers), while
50 small returns a second come: the latest of these, from capture to COMMIT with `flush_interval` 50 ms, and the most
memory that engine and decoder had together. Then dead letters of 10 MB, which are listed, read and tried again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.hostile import VALUES
from benchmarks.lab import Bench, empty, forget
from benchmarks.report import Figure

_LATE_SECONDS, _MEMORY_MB = 0.25, 300


def run(bench: Bench) -> list[Figure]:
    """Rounds of each kind, by turns; the letters once."""
    mysql = bench.database("dear")
    done: dict[str, list[dict[str, Any]]] = {what: [] for what in VALUES}
    for _ in range(bench.rounds):
        for what, rounds in done.items():
            rounds.append(_once(bench, mysql, what, 1))
    count = bench.size(1000, 20)
    done[f"{count:,} dead letters of 10 MB"] = [_once(bench, mysql, "letters", count)]
    figures = []
    for what, rounds in done.items():
        figures += [
            Figure(name=f"{what}: late", rounds=tuple(r["late"] for r in rounds), unit="s", goal=_LATE_SECONDS),
            Figure(name=f"{what}: RSS", rounds=tuple(r["together"] for r in rounds), unit="MB", goal=_MEMORY_MB),
        ]
    return figures


def _once(bench: Bench, mysql: dict[str, Any], what: str, count: int) -> dict[str, Any]:
    empty(bench.db, "dear")
    folder = bench.folder / "dear"
    command = [sys.executable, "-m", "benchmarks.workers.dear", str(folder), json.dumps(mysql), what, str(count)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    forget(folder)
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    bench.say(f"{what}: {result}")
    return result
