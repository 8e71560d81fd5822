"""Three publishers fire job returns as fast as Salt's bus goes; the engine of a real master ships them. Beside it a
bare subscriber on Salt's own handler API discards the same events: its CPU per event is the measure for the engine's,
which is that of the whole way from the bus to the COMMIT.

Rounds of pings, of pings that are verified against the master's job cache (`verify_returns`; the cache holds them
before they are fired), of highstates that differ in minion, jid and all times, as those of a fleet do that changed
nothing, and of highstates that also differ in what they say, take turns. Lag is the row's `inserted_at` (a column with
a default that the benchmark adds: the time on the database's clock at which the batch's statement began) minus
`alter_time` (the master's stamp).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import cached, payloads
from benchmarks.lab import Bench, PeakRss, cpu_seconds, python, set_pillar, settled
from benchmarks.report import Figure, percentile, ratio

PUBLISHERS = 3
_KINDS = {
    "ping": ("ping", False),
    "ping, verified": ("ping", True),
    "highstate": ("highstate", False),
    "highstate, no two alike": ("unlike", False),
}


def run(bench: Bench) -> list[Figure]:
    """Rounds of each kind, by turns."""
    took: dict[str, list[dict[str, float]]] = {name: [] for name in _KINDS}
    one_round(bench, 1_500, "ping")  # warms up
    for number in range(bench.rounds):
        for name, (kind, verify) in _KINDS.items():
            events = bench.size(12_000, 3_000) if kind == "ping" else bench.size(4_500, 1_500)
            bench.say(f"bus, round {number + 1} of {bench.rounds}: {events:,} of {name}")
            took[name].append(one_round(bench, events, kind, verify=verify))
    figures = []
    for name, rounds in took.items():
        figures += _figures(name, rounds)
    cost = tuple(
        with_it["engine_cpu"] - without["engine_cpu"]
        for with_it, without in zip(took["ping, verified"], took["ping"], strict=True)
    )
    figures.append(Figure(name="verification, CPU a return", rounds=cost, unit="µs"))
    return figures


def one_round(bench: Bench, events: int, kind: str, *, verify: bool = False) -> dict[str, float]:
    """Fires ``events`` returns and waits until the engine has settled them all."""
    master = bench.site
    set_pillar(master, verify_returns=verify)
    (engine,) = master.engine_processes("mysql_jobcache")
    (publisher,) = master.find_processes("EventPublisher")
    subscriber = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.workers.subscribe", str(master.config_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert subscriber.stdin and subscriber.stdout
    assert subscriber.stdout.readline() == "ready\n"
    first = bench.fresh()
    if verify:
        cached.fill(Path(master.config["cachedir"]), first, events)
    where = payloads.between(first, events)
    with PeakRss(engine) as engine_rss, PeakRss(publisher) as publisher_rss:
        used, began = cpu_seconds(engine), time.perf_counter()
        publish(bench, first, events, kind)
        fired = time.perf_counter() - began
        rows = settled(bench.db, where, events, database="site")
        used = cpu_seconds(engine) - used
    subscriber.stdin.close()
    bare = json.loads(subscriber.stdout.readline())
    subscriber.wait()
    lags = [
        float(lag)
        for (lag,) in bench.db.sql(
            f"SELECT TIMESTAMPDIFF(MICROSECOND, alter_time, inserted_at) / 1e6 FROM salt_returns WHERE {where}",
            db="site",
        )
    ]
    return {
        "lost": float(events - rows),
        "fired": events / fired,
        "lag_p50": percentile(lags, 0.50),
        "lag_p99": percentile(lags, 0.99),
        "engine_cpu": used / events * 1e6,
        "bare_cpu": bare["cpu"] / max(1, bare["events"]) * 1e6,
        "engine_mb": engine_rss.mb,
        "publisher_mb": publisher_rss.mb,
    }


def publish(bench: Bench, first: int, events: int, kind: str = "ping") -> None:
    """Fires returns from three processes."""
    share = events // PUBLISHERS
    assert share * PUBLISHERS == events
    publishers = [
        python(
            "benchmarks.workers.publish",
            *map(str, (bench.site.config_dir, first + number * share, share, kind)),
        )
        for number in range(PUBLISHERS)
    ]
    assert all(process.wait() == 0 for process in publishers)


def _figures(name: str, rounds: list[dict[str, float]]) -> list[Figure]:
    def of(key: str) -> tuple[float, ...]:
        return tuple(one[key] for one in rounds)

    return [
        Figure(name=f"{name}: lost", rounds=of("lost"), goal=0, each=True),
        Figure(name=f"{name}: fired a second", rounds=of("fired")),
        Figure(name=f"{name}: engine, CPU an event", rounds=of("engine_cpu"), unit="µs"),
        Figure(name=f"{name}: bare subscriber, CPU an event", rounds=of("bare_cpu"), unit="µs"),
        ratio(
            f"{name}: CPU, engine / bare subscriber",
            of("engine_cpu"),
            of("bare_cpu"),
            goal={"ping": 0.6, "highstate": 1.0}.get(name),
            guarded=True,
        ),
        Figure(name=f"{name}: lag p50", rounds=of("lag_p50"), unit="s"),
        Figure(name=f"{name}: lag p99", rounds=of("lag_p99"), unit="s"),
        Figure(name=f"{name}: peak RSS engine", rounds=of("engine_mb"), unit="MB", goal=120, each=True),
        Figure(name=f"{name}: peak RSS EventPublisher", rounds=of("publisher_mb"), unit="MB"),
    ]
