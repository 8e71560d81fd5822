"""A minute without events, on a real master: the engine's CPU, what it writes to the disk (its own calls, as the
kernel counts them), and what it asks the database. (Salt's own events are a few a minute.)
"""

from __future__ import annotations

import time

from benchmarks.lab import Bench, cpu_seconds
from benchmarks.report import Figure

_MINUTE = 12.0
"""Seconds of a round: five make the minute."""


def run(bench: Bench) -> list[Figure]:
    """Five times twelve seconds."""
    master = bench.site
    (engine,) = master.engine_processes("mysql_jobcache")
    master.run("mysql_jobcache.flush")
    time.sleep(5.0)  # the runner's own job is shipped, too
    cpu, disk, asked, written = [], [], [], []
    looks = [_server(bench)[0] for _ in range(2)]
    own = looks[1] - looks[0]
    for _ in range(bench.rounds):
        before = (cpu_seconds(engine), engine.io_counters().write_bytes, *_server(bench))
        time.sleep(_MINUTE)
        after = (cpu_seconds(engine), engine.io_counters().write_bytes, *_server(bench))
        cpu.append((after[0] - before[0]) / _MINUTE * 100)
        disk.append(float(after[1] - before[1]))
        asked.append(float(after[2] - before[2] - own))
        written.append(float(after[3] - before[3]))
    return [
        Figure(name="engine, share of a core", rounds=tuple(cpu), unit="%", goal=0.2),
        Figure(name="engine, bytes to the disk in 12 s", rounds=tuple(disk), unit="bytes", goal=0),
        Figure(name="statements to the database in 12 s", rounds=tuple(asked), goal=1),
        Figure(name="statements that write in 12 s", rounds=tuple(written), goal=0),
    ]


def _server(bench: Bench) -> tuple[int, int]:
    """Statements so far, and those that write."""
    wanted = ("Questions", "Com_insert", "Com_update", "Com_delete")
    rows = dict(bench.db.sql(f"SHOW GLOBAL STATUS WHERE Variable_name IN {wanted}"))
    return int(rows["Questions"]), sum(int(rows[name]) for name in wanted[1:])
