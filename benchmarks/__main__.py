"""``python -m benchmarks``: three publishers, the engine, a bare subscriber, in one run.

Fires 50,000 job returns a round through a real master's bus at a private MariaDB, and prints one table.
Lag is the row's ``inserted_at`` (a column with a default that the benchmark adds: the time on the
database's clock at which the batch's statement began) minus ``alter_time`` (the master's stamp).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.mariadb import MariaDB
from tests.support.salt import SaltMaster

HERE = Path(__file__).parent
PUBLISHERS = 3
FLUSH_INTERVAL = 1.0
WRITE_QUEUE = 100_000


class PeakRss:
    """The most memory that a process had while this was open, in bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.bytes = 0
        self._process = process
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakRss:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.bytes = max(self.bytes, self._process.memory_info().rss)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def one_round(number: int, events: int, db: MariaDB, master: SaltMaster) -> dict[str, Any]:
    """Fires ``events`` returns and waits until the engine has settled them all."""
    (engine,) = master.engine_processes("mysql_jobcache")
    (publisher,) = master.find_processes("EventPublisher")
    subscriber = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.subscribe", str(master.config_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert subscriber.stdin and subscriber.stdout
    assert subscriber.stdout.readline() == "ready\n"
    share = events // PUBLISHERS
    first = number * events
    captured_before = master.run("mysql_jobcache.status")["books"]["captured"]
    with PeakRss(engine) as engine_rss, PeakRss(publisher) as publisher_rss:
        before, began = cpu_seconds(engine), time.perf_counter()
        publishers = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.publish", str(master.config_dir), str(first + n * share), str(share)]
            )
            for n in range(PUBLISHERS)
        ]
        assert all(process.wait() == 0 for process in publishers)
        fired = time.perf_counter() - began
        fired_events = share * PUBLISHERS
        low = f"20260101{first // 500:012d}"
        high = f"20260101{(first + fired_events) // 500:012d}"
        rows = _settled(db, low, high, fired_events)
        took = time.perf_counter() - began
        cpu = cpu_seconds(engine) - before
    subscriber.stdin.close()
    bare = json.loads(subscriber.stdout.readline())
    subscriber.wait()
    lags = sorted(
        float(lag)
        for (lag,) in db.sql(
            "SELECT TIMESTAMPDIFF(MICROSECOND, alter_time, inserted_at) / 1e6 FROM salt_returns "
            "WHERE jid BETWEEN %s AND %s",
            (low, high),
            db="salt",
        )
    )
    status = master.run("mysql_jobcache.status")
    return {
        "fired": fired_events,
        "captured": status["books"]["captured"] - captured_before,
        "bus": status["bus"],
        "database": status["database"],
        "written": rows,
        "lost": fired_events - rows,
        "fired_per_second": fired_events / fired,
        "seconds": took,
        "lag_p50": lags[len(lags) // 2],
        "lag_p99": lags[int(len(lags) * 0.99)],
        "engine_cpu_us": cpu / fired_events * 1e6,
        "subscriber_events": bare["events"],
        "subscriber_cpu_us": bare["cpu"] / max(1, bare["events"]) * 1e6,
        "cpu_ratio": cpu / fired_events / (bare["cpu"] / max(1, bare["events"])),
        "engine_rss_mb": engine_rss.bytes / 1e6,
        "publisher_rss_mb": publisher_rss.bytes / 1e6,
    }


def _settled(db: MariaDB, low: str, high: str, expected: int) -> int:
    """The rows of the round, once all are there or none came for five seconds."""
    rows, changed = -1, time.monotonic()
    while rows < expected and time.monotonic() < changed + 5.0:
        time.sleep(0.2)
        ((count,),) = db.sql("SELECT COUNT(*) FROM salt_returns WHERE jid BETWEEN %s AND %s", (low, high), db="salt")
        if count != rows:
            rows, changed = count, time.monotonic()
    return rows


COLUMNS = {
    "fired": ("events fired", "{:,.0f}"),
    "captured": ("captured by the engine", "{:,.0f}"),
    "written": ("rows written", "{:,.0f}"),
    "lost": ("lost", "{:,.0f}"),
    "fired_per_second": ("fired per second", "{:,.0f}"),
    "lag_p50": ("lag p50, s", "{:.3f}"),
    "lag_p99": ("lag p99, s", "{:.3f}"),
    "engine_cpu_us": ("engine CPU per event, µs", "{:.1f}"),
    "subscriber_cpu_us": ("bare subscriber CPU per event, µs", "{:.1f}"),
    "cpu_ratio": ("engine / bare subscriber", "{:.2f}"),
    "engine_rss_mb": ("peak RSS engine, MB", "{:.0f}"),
    "publisher_rss_mb": ("peak RSS EventPublisher, MB", "{:.0f}"),
}


def table(rounds: list[dict[str, Any]]) -> str:
    """Median, least and most of each figure, as Markdown."""
    lines = ["| figure | median | least | most |", "| --- | ---: | ---: | ---: |"]
    for key, (title, form) in COLUMNS.items():
        values = [one[key] for one in rounds]
        figures = (statistics.median(values), min(values), max(values))
        lines.append(f"| {title} | {' | '.join(form.format(figure) for figure in figures)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"» {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--events", type=int, default=50_000, help="returns a round (default 50000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/RESULTS.md and results.json")
    args = parser.parse_args()
    import salt.version

    series = str(salt.version.__saltstack_version__)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mjc-bench-")))
        say("a private MariaDB")
        db = stack.enter_context(MariaDB(folder / "db"))
        db.create_database("salt", "salt", "salt")
        config = {
            "engines": [{"mysql_jobcache": {"flush_interval": FLUSH_INTERVAL}}],
            "mysql.host": db.host,
            "mysql.port": db.port,
            # At full speed the publisher of 3008 does not get round to counting what was sent: with its default
            # of 10,000 it throws off all its readers, its own among them, about once a round.
            "pub_server_write_queue_size": WRITE_QUEUE,
        }
        say(f"a salt-master {series} with the engine")
        master = stack.enter_context(SaltMaster(folder / "m", config))
        say("warming up")
        _prepare(db, master)
        rounds = []
        for number in range(1, args.rounds + 1):
            say(f"round {number} of {args.rounds}: {args.events:,} returns from {PUBLISHERS} publishers")
            rounds.append(one_round(number, args.events, db, master))
        books = master.run("mysql_jobcache.status")["books"]
    command = f"python -m benchmarks --events {args.events} --rounds {args.rounds} --save"
    result = {
        "command": command,
        "salt": series,
        "python": platform.python_version(),
        "cpus": psutil.cpu_count(),
        "flush_interval": FLUSH_INTERVAL,
        "rounds": rounds,
        "books": books,
    }
    text = (
        f"Salt {series}, Python {result['python']}, {result['cpus']} cores, flush_interval {FLUSH_INTERVAL:g} s, "
        f"pub_server_write_queue_size {WRITE_QUEUE:,}; "
        f"`{command}`\n\n{table(rounds)}\n"
    )
    print(text)
    if args.save:
        (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (HERE / "RESULTS.md").write_text(f"# Results\n\n{__doc__.split(chr(10), 2)[2].strip()}\n\n{text}")


def _prepare(db: MariaDB, master: SaltMaster) -> None:
    """One event makes the engine create its tables; then the lag's column is added."""
    subprocess.run([sys.executable, "-m", "benchmarks.publish", str(master.config_dir), "0", "1"], check=True)
    deadline = time.monotonic() + 30
    while not db.sql("SHOW TABLES LIKE 'salt_returns'", db="salt"):
        if time.monotonic() > deadline:
            raise TimeoutError("the engine did not create its tables")
        time.sleep(0.1)
    master.run("mysql_jobcache.flush")
    db.sql("ALTER TABLE salt_returns ADD inserted_at TIMESTAMP(6) DEFAULT CURRENT_TIMESTAMP(6)", db="salt")


if __name__ == "__main__":
    main()
