"""Whether a row costs more as the backlog or the tables grow: the engine's inside ships pings from journals of
different sizes into empty tables, and from one size of journal into empty tables and into those with a million
returns. The time of the smallest journal holds the login and the first look at the tables. (A million pending, ten
million rows: the suite scale.)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.lab import Bench, empty, forget, login
from benchmarks.report import Figure, ratio
from benchmarks.suites.drain import fill
from benchmarks.worker import Worker

FLAT = 1.2
"""The most that a row may cost more."""


def run(bench: Bench) -> list[Figure]:
    """Sizes by turns."""
    mysql = bench.database("growth")
    loaded = bench.million
    sizes = [1_000, 10_000, bench.size(100_000, 20_000)]
    journals = {size: bench.folder / f"growth-{size}" for size in sizes}
    for size, journal in journals.items():
        fill(journal, size, "ping")
    full = bench.folder / "growth-full"
    backlog: dict[int, list[float]] = {size: [] for size in sizes}
    tables: dict[str, list[float]] = {"empty": [], "full": []}
    with Worker("ship") as worker:
        for number in range(bench.rounds):
            for size, rounds in backlog.items():
                empty(bench.db, "growth")
                rounds.append(ship_all(bench, worker, journals[size], mysql, size))
            # Jobs that are neither there nor older than all: rows of every round go between those that are there.
            fill(full, 10_000, "ping", first=10_000_000 + number * 20_000)
            empty(bench.db, "growth")
            tables["empty"].append(ship_all(bench, worker, full, mysql, 10_000))
            tables["full"].append(ship_all(bench, worker, full, login(bench.db, "million"), 10_000))
            forget(full)
    figures = [Figure(name=f"{size:,} pending: a row", rounds=tuple(us), unit="µs") for size, us in backlog.items()]
    figures += [
        ratio(f"{sizes[2]:,} pending / {sizes[1]:,} pending", backlog[sizes[2]], backlog[sizes[1]], goal=FLAT),
    ]
    figures += [
        Figure(name="into empty tables: a row", rounds=tuple(tables["empty"]), unit="µs"),
        Figure(name=f"into tables of {loaded.returns:,}: a row", rounds=tuple(tables["full"]), unit="µs"),
        ratio("full tables / empty tables", tables["full"], tables["empty"], goal=FLAT),
    ]
    return figures


def ship_all(bench: Bench, worker: Worker, journal: Path, mysql: dict[str, Any], count: int) -> float:
    """What a copy of a journal takes, in microseconds a row."""
    copy = bench.folder / "journal"
    shutil.copytree(journal, copy)
    done = worker.ask("drain", journal=str(copy), mysql=mysql, options={})
    forget(copy)
    assert done["books"]["written"] == count, done["books"]
    return float(done["seconds"] / count * 1e6)
