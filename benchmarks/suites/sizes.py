"""What `batch_size` is worth: pings from a journal become rows in batches of different sizes, with the database beside
the engine, and 50 ms away.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, Final

from benchmarks.lab import Bench, empty, forget, login
from benchmarks.report import Figure
from benchmarks.suites.drain import fill
from benchmarks.worker import Worker
from tests.support.proxy import Proxy

_SIZES: Final = (50, 100, 500, 1000, 2000, 5000)
_AWAY_SECONDS: Final = 0.05
_AWAY_BATCHES: Final = 5


def run(bench: Bench) -> list[Figure]:
    """Sizes by turns."""
    near = bench.database("sizes")
    count = bench.size(10_000, 5_000)
    took: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(bench.db.host, bench.db.port))
        worker = stack.enter_context(Worker("ship"))
        journals = {rows: bench.folder / f"sizes-{rows}" for rows in {count, *(_away(size) for size in _SIZES)}}
        for rows, journal in journals.items():
            fill(journal, rows, "ping")
        for _ in range(bench.rounds):
            for size in _SIZES:
                name = f"batch_size {size:,}: rows a second"
                took.setdefault(name, []).append(_once(bench, worker, journals[count], near, count, size))
        proxy.delay(_AWAY_SECONDS)
        away = login(proxy, "sizes")
        for _ in range(bench.rounds):
            for size in _SIZES:
                name = f"batch_size {size:,}, 50 ms away: rows a second"
                rows = _away(size)
                took.setdefault(name, []).append(_once(bench, worker, journals[rows], away, rows, size))
        for journal in journals.values():
            forget(journal)
    return [Figure(name=name, rounds=tuple(rounds)) for name, rounds in took.items()]


def _away(size: int) -> int:
    """Rows enough for some batches."""
    return size * _AWAY_BATCHES


def _once(bench: Bench, worker: Worker, journal: Path, mysql: dict[str, Any], rows: int, size: int) -> float:
    empty(bench.db, "sizes")
    copy = bench.folder / "journal"
    shutil.copytree(journal, copy)
    options = {"batch_size": size, "batch_bytes": 64 << 20}
    done = worker.ask("drain", journal=str(copy), mysql=mysql, options=options)
    forget(copy)
    assert done["books"]["written"] == rows, done["books"]
    return float(rows / done["seconds"])
