"""The sizes of a long outage and of years, which `make bench` has no time for: 200,000 pings and 50,000 highstates
from a journal beside those peers that a goal names; backlogs from a thousand pings to a million; and 10,000 pings into
tables that hold from ten thousand returns to ten million. Otherwise as in the suites drain and growth.

Ten million returns do not fit into the database's memory (a buffer pool of 2 GiB).
"""

from __future__ import annotations

from benchmarks import loader
from benchmarks.lab import Bench, empty, forget, login
from benchmarks.report import Figure, ratio
from benchmarks.suites.drain import compare, fill
from benchmarks.suites.growth import FLAT, ship_all
from benchmarks.worker import Worker

_PEERS = ("mysqlclient", "aiomysql", "LOAD DATA")
_ROWS = 10_000
"""That are shipped into tables of each size."""
_JOB = 50
"""Returns of a job, on average."""


def run(bench: Bench) -> list[Figure]:
    """One after the other, each by turns."""
    mysql = bench.database("scale")
    figures = compare(bench, mysql, "ping", bench.size(200_000, 10_000), _PEERS)
    figures += compare(bench, mysql, "highstate", bench.size(50_000, 1_000), _PEERS)
    with Worker("ship") as worker:
        figures += _backlogs(bench, worker, [1_000, 10_000, bench.size(100_000, 15_000), bench.size(1_000_000, 20_000)])
        figures += _tables(bench, worker, [bench.size(10 ** (4 + n), 4_000 * (1 + n)) for n in range(4)])
    return figures


def _backlogs(bench: Bench, worker: Worker, sizes: list[int]) -> list[Figure]:
    mysql = login(bench.db, "scale")
    journals = {size: bench.folder / f"backlog-{size}" for size in sizes}
    for size, journal in journals.items():
        fill(journal, size, "ping")
    took: dict[int, list[float]] = {size: [] for size in sizes}
    bench.say(f"scale: backlogs of up to {sizes[-1]:,}")
    for _ in range(bench.rounds):
        for size, rounds in took.items():
            empty(bench.db, "scale")
            rounds.append(ship_all(bench, worker, journals[size], mysql, size))
    for journal in journals.values():
        forget(journal)
    return [
        *(Figure(name=f"{size:,} pending: a row", rounds=tuple(us), unit="µs") for size, us in took.items()),
        *(
            ratio(f"{size:,} pending / {sizes[1]:,} pending", took[size], took[sizes[1]], goal=FLAT)
            for size in sizes[2:]
        ),
    ]


def _tables(bench: Bench, worker: Worker, sizes: list[int]) -> list[Figure]:
    for size in sizes:
        bench.say(f"scale: {size:,} returns into a database")
        bench.database(f"rows{size}")
        loader.load(bench.db, f"rows{size}", bench.folder, returns=size, jobs=size // _JOB)
    took: dict[int, list[float]] = {size: [] for size in sizes}
    journal = bench.folder / "scale-rows"
    for number in range(bench.rounds + 1):
        # Jobs that are neither there nor older than all, as in growth.
        fill(journal, _ROWS, "ping", first=10_000_000 + number * 2 * _ROWS)
        for size, rounds in took.items():
            us = ship_all(bench, worker, journal, login(bench.db, f"rows{size}"), _ROWS)
            if number:  # the first one brings the keys' pages into the server's memory
                rounds.append(us)
        forget(journal)
    return [
        *(Figure(name=f"into tables of {size:,}: a row", rounds=tuple(us), unit="µs") for size, us in took.items()),
        *(
            ratio(f"tables of {size:,} / tables of {sizes[0]:,}", took[size], took[sizes[0]], goal=FLAT)
            for size in sizes[1:]
        ),
    ]
