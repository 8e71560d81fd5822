"""How soon a return is a row: 500 pings a second, steadily, through a real master's bus, with `flush_interval` 1 s and
50 ms by turns. Lag is measured as in the suite bus.
"""

from __future__ import annotations

from benchmarks import payloads
from benchmarks.lab import Bench, python, set_pillar, settled
from benchmarks.report import Figure, percentile

_RATE = 500
_GOALS = {1.0: (0.6, 1.1), 0.05: (None, 0.2)}


def run(bench: Bench) -> list[Figure]:
    """Windows of each setting, by turns."""
    took: dict[float, list[tuple[float, float]]] = {interval: [] for interval in _GOALS}
    events = _RATE * bench.size(7, 4)
    for _ in range(bench.rounds):
        for interval, rounds in took.items():
            rounds.append(_window(bench, events, interval))
    set_pillar(bench.site, flush_interval=1.0)
    figures = []
    for interval, rounds in took.items():
        p50, p99 = _GOALS[interval]
        name = f"flush_interval {interval:g} s"
        figures += [
            Figure(name=f"{name}: lag p50", rounds=tuple(one for one, _ in rounds), unit="s", goal=p50),
            Figure(name=f"{name}: lag p99", rounds=tuple(one for _, one in rounds), unit="s", goal=p99),
        ]
    return figures


def _window(bench: Bench, events: int, interval: float) -> tuple[float, float]:
    set_pillar(bench.site, flush_interval=interval, verify_returns=False)
    first = bench.fresh()
    publisher = python(
        "benchmarks.workers.publish",
        *map(str, (bench.site.config_dir, first, events, "ping", _RATE)),
    )
    assert publisher.wait() == 0
    where = payloads.between(first, events)
    rows = settled(bench.db, where, events, database="site")
    assert rows == events, (rows, events)
    lags = [
        float(lag)
        for (lag,) in bench.db.sql(
            f"SELECT TIMESTAMPDIFF(MICROSECOND, alter_time, inserted_at) / 1e6 FROM salt_returns WHERE {where}",
            db="site",
        )
    ]
    return percentile(lags, 0.50), percentile(lags, 0.99)
