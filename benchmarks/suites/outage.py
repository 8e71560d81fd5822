"""The database is killed, three publishers fire pings at a real master's bus meanwhile, and it is started again. The
catch-up rate counts from the first row after the outage to the last.
"""

from __future__ import annotations

import time

from benchmarks import payloads
from benchmarks.lab import Bench, PeakRss, set_pillar
from benchmarks.report import Figure
from benchmarks.suites.bus import publish


def run(bench: Bench) -> list[Figure]:
    """Some outages."""
    events = bench.size(15_000, 3_000)
    rounds = []
    for number in range(bench.rounds):
        bench.say(f"outage {number + 1} of {bench.rounds}: {events:,} returns")
        rounds.append(_outage(bench, events))
    units = {
        "lost": "",
        "pending in the journal at its end": "",
        "size of the journal": "MB",
        "catch-up, rows a second": "",
        "peak RSS engine": "MB",
        "growth of the EventPublisher's RSS": "MB",
    }
    return [
        Figure(
            name=name,
            rounds=tuple(one[name] for one in rounds),
            unit=unit,
            goal=0 if name == "lost" else None,
            each=name == "lost",
        )
        for name, unit in units.items()
    ]


def _outage(bench: Bench, events: int) -> dict[str, float]:
    """Kills the database, fires ``events`` returns, starts it again and waits until all are rows."""
    master, db = bench.site, bench.db
    set_pillar(master, verify_returns=False)
    (engine,) = master.engine_processes("mysql_jobcache")
    (publisher,) = master.find_processes("EventPublisher")
    first = bench.fresh()
    where = payloads.between(first, events)
    grown = publisher.memory_info().rss
    with PeakRss(engine) as engine_rss:
        db.kill()
        publish(bench, first, events)
        status = master.run("mysql_jobcache.status")
        db.start()
        rows, skipped, began, arrived = 0, 0, 0.0, 0.0
        deadline = time.perf_counter() + 120
        while rows < events and time.perf_counter() < (arrived + 40.0 if arrived else deadline):
            time.sleep(0.05)
            ((count,),) = db.sql(f"SELECT COUNT(*) FROM salt_returns WHERE {where}", db="site")
            if count != rows:
                arrived = time.perf_counter()
                if not began:
                    began, skipped = arrived, count
                rows = count
    return {
        "lost": float(events - rows),
        "pending in the journal at its end": float(status["books"]["pending"]),
        "size of the journal": status["journal"]["bytes"] / 1e6,
        "catch-up, rows a second": (rows - skipped) / max(0.05, arrived - began),
        "peak RSS engine": engine_rss.mb,
        "growth of the EventPublisher's RSS": (publisher.memory_info().rss - grown) / 1e6,
    }
