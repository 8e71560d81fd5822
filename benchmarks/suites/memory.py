"""A backlog of a million pings in the journal when the engine of a real master starts: the most memory that the engine
and Salt's EventPublisher had until all are rows, and the rate.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.lab import ENGINE, Bench, PeakRss, forget, master_config
from benchmarks.report import Figure
from benchmarks.suites.drain import fill
from tests.support.salt import SaltMaster


def run(bench: Bench) -> list[Figure]:
    """Once: it takes its time."""
    count = bench.size(1_000_000, 20_000)
    mysql = bench.database("memory")
    master = SaltMaster(bench.folder / "backlog", master_config(mysql, journal_max_bytes=8 << 30))
    cachedir = bench.folder / "backlog" / Path(master.config["cachedir"]).name
    cachedir.mkdir(parents=True)
    bench.say(f"memory: {count:,} pings into the journal")
    fill(cachedir / ENGINE, count, "ping")
    with master:
        (engine,) = master.engine_processes(ENGINE)
        (publisher,) = master.find_processes("EventPublisher")
        first = publisher.memory_info().rss
        with PeakRss(engine) as engine_rss, PeakRss(publisher) as publisher_rss:
            began, at_first = time.perf_counter(), _rows(bench)
            deadline = began + 1200
            while _rows(bench) < count and time.perf_counter() < deadline:
                time.sleep(1.0 if count > 100_000 else 0.1)
            took = time.perf_counter() - began
        rows = _rows(bench)
    forget(bench.folder / "backlog")
    return [
        Figure(name="lost", rounds=(float(count - rows),), goal=0),
        Figure(name="peak RSS engine", rounds=(engine_rss.mb,), unit="MB", goal=120),
        Figure(name="growth of the EventPublisher's RSS", rounds=((publisher_rss.bytes - first) / 1e6,), unit="MB"),
        Figure(name="rows a second", rounds=((count - at_first) / took,)),
    ]


def _rows(bench: Bench) -> int:
    ((rows,),) = bench.db.sql("SELECT COUNT(*) FROM jids", db="memory")
    if rows:
        ((rows,),) = bench.db.sql("SELECT COUNT(*) FROM salt_returns", db="memory")
    return int(rows)
