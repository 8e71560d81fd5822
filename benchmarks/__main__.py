"""``python -m benchmarks``: the engine on a real master's bus with a private MariaDB, in one run.

* **bus**: three publishers fire 50,000 job returns a round; a bare subscriber on Salt's own handler API discards
  the same events beside the engine. Rounds with ``verify_returns: false`` and ``true`` take turns; for the latter
  the master's job cache holds the returns already. Lag is the row's ``inserted_at`` (a column with a default that
  the benchmark adds: the time on the database's clock at which the batch's statement began) minus ``alter_time``
  (the master's stamp).
* **outage**: the database is killed, 100,000 returns are fired and journalled, and it is started again. The
  catch-up rate counts from the first row after the outage to the last.
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

from benchmarks import cached
from tests.support.mariadb import MariaDB
from tests.support.salt import SaltMaster

HERE = Path(__file__).parent
PUBLISHERS = 3
FLUSH_INTERVAL = 1.0
WRITE_QUEUE = 100_000
ENGINE = {
    "flush_interval": FLUSH_INTERVAL,
    "verify_returns": False,
    # A pass would find what the job cache holds before it is fired.
    "reconcile_interval_seconds": 0,
}
FIRST_OF_OUTAGES = 100_000_000


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


def one_round(number: int, events: int, db: MariaDB, master: SaltMaster, *, verify: bool) -> dict[str, Any]:
    """Fires ``events`` returns and waits until the engine has settled them all."""
    _set_pillar(master, verify_returns=verify)
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
    if verify:
        cached.fill(Path(master.config["cachedir"]), first, events)
    captured_before = master.run("mysql_jobcache.status")["books"]["captured"]
    with PeakRss(engine) as engine_rss, PeakRss(publisher) as publisher_rss:
        before, began = cpu_seconds(engine), time.perf_counter()
        _publish(master, first, share)
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


def one_outage(number: int, events: int, db: MariaDB, master: SaltMaster) -> dict[str, Any]:
    """Kills the database, fires ``events`` returns, starts it again and waits until all are rows."""
    _set_pillar(master, verify_returns=False)
    (engine,) = master.engine_processes("mysql_jobcache")
    (publisher,) = master.find_processes("EventPublisher")
    share = events // PUBLISHERS
    first = FIRST_OF_OUTAGES + number * events
    low, high = (f"20260101{bound // 500:012d}" for bound in (first, first + share * PUBLISHERS))
    publisher_before = publisher.memory_info().rss
    with PeakRss(engine) as engine_rss:
        db.kill()
        began = time.perf_counter()
        _publish(master, first, share)
        status = master.run("mysql_jobcache.status")
        outage = time.perf_counter() - began
        db.start()
        rows, skipped, began, arrived = 0, 0, 0.0, 0.0
        while rows < share * PUBLISHERS and (not arrived or time.perf_counter() < arrived + 40.0):
            time.sleep(0.05)
            ((count,),) = db.sql(
                "SELECT COUNT(*) FROM salt_returns WHERE jid BETWEEN %s AND %s", (low, high), db="salt"
            )
            if count != rows:
                arrived = time.perf_counter()
                if not began:
                    began, skipped = arrived, count
                rows = count
    return {
        "fired": share * PUBLISHERS,
        "pending": status["books"]["pending"],
        "journal_mb": status["journal"]["bytes"] / 1e6,
        "outage_seconds": outage,
        "lost": share * PUBLISHERS - rows,
        "catch_up_rows_per_second": (rows - skipped) / (arrived - began),
        "engine_rss_mb": engine_rss.bytes / 1e6,
        "publisher_grown_mb": (publisher.memory_info().rss - publisher_before) / 1e6,
    }


def _publish(master: SaltMaster, first: int, share: int) -> None:
    publishers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.publish", str(master.config_dir), str(first + n * share), str(share)]
        )
        for n in range(PUBLISHERS)
    ]
    assert all(process.wait() == 0 for process in publishers)


def _set_pillar(master: SaltMaster, **options: Any) -> None:
    folder = Path(master.config["pillar_roots"]["base"][0])
    (folder / "top.sls").write_text(json.dumps({"base": {master.config["id"]: ["engine"]}}))
    (folder / "engine.sls").write_text(json.dumps({"mysql_jobcache": options}))
    in_effect = master.run("mysql_jobcache.reload")
    assert all(in_effect[name]["value"] == value for name, value in options.items()), in_effect


def _settled(db: MariaDB, low: str, high: str, expected: int) -> int:
    """The rows of the round, once all are there or none came for five seconds."""
    rows, changed = -1, time.monotonic()
    while rows < expected and time.monotonic() < changed + 5.0:
        time.sleep(0.2)
        ((count,),) = db.sql("SELECT COUNT(*) FROM salt_returns WHERE jid BETWEEN %s AND %s", (low, high), db="salt")
        if count != rows:
            rows, changed = count, time.monotonic()
    return rows


BUS = {
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


OUTAGE = {
    "fired": ("events fired while the database was down", "{:,.0f}"),
    "outage_seconds": ("seconds that took", "{:.0f}"),
    "pending": ("pending in the journal at its end", "{:,.0f}"),
    "journal_mb": ("size of the journal, MB", "{:.1f}"),
    "lost": ("lost", "{:,.0f}"),
    "catch_up_rows_per_second": ("catch-up rate, rows per second", "{:,.0f}"),
    "engine_rss_mb": ("peak RSS engine, MB", "{:.0f}"),
    "publisher_grown_mb": ("growth of the EventPublisher's RSS, MB", "{:.1f}"),
}


def table(columns: dict[str, tuple[str, str]], rounds: list[dict[str, Any]]) -> str:
    """Median, least and most of each figure, as Markdown."""
    lines = ["| figure | median | least | most |", "| --- | ---: | ---: | ---: |"]
    for key, (title, form) in columns.items():
        values = [one[key] for one in rounds]
        figures = (statistics.median(values), min(values), max(values))
        lines.append(f"| {title} | {' | '.join(form.format(figure) for figure in figures)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"» {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--events", type=int, default=50_000, help="returns a round (default 50000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind (default 5)")
    parser.add_argument("--outages", type=int, default=3, help="outages (default 3)")
    parser.add_argument("--outage-events", type=int, default=100_000, help="returns an outage (default 100000)")
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
            "engines": [{"mysql_jobcache": ENGINE}],
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
        bus: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        outages = []
        for number in range(1, 2 * args.rounds + 1):
            verify = number % 2 == 0
            how = "verified" if verify else "not verified"
            say(f"round {number} of {2 * args.rounds}: {args.events:,} returns from {PUBLISHERS} publishers, {how}")
            bus[verify].append(one_round(number, args.events, db, master, verify=verify))
        for number in range(1, args.outages + 1):
            say(f"outage {number} of {args.outages}: {args.outage_events:,} returns")
            outages.append(one_outage(number, args.outage_events, db, master))
        books = master.run("mysql_jobcache.status")["books"]
    command = f"python -m benchmarks --events {args.events} --rounds {args.rounds} --outages {args.outages} --save"
    cost = statistics.median(
        with_it["engine_cpu_us"] - without["engine_cpu_us"]
        for with_it, without in zip(bus[True], bus[False], strict=True)
    )
    result = {
        "command": command,
        "salt": series,
        "python": platform.python_version(),
        "cpus": psutil.cpu_count(),
        "flush_interval": FLUSH_INTERVAL,
        "bus": bus[False],
        "bus_verified": bus[True],
        "verify_cpu_us": cost,
        "outages": outages,
        "books": books,
    }
    text = (
        f"Salt {series}, Python {result['python']}, {result['cpus']} cores, flush_interval {FLUSH_INTERVAL:g} s, "
        f"pub_server_write_queue_size {WRITE_QUEUE:,}; `{command}`\n\n"
        f"## Bus, not verified\n\n{table(BUS, bus[False])}\n\n## Bus, verified\n\n{table(BUS, bus[True])}\n\n"
        f"Verification costs {cost:.1f} µs of CPU a return (median of the differences of neighbouring rounds).\n\n"
        f"## Outage\n\n{table(OUTAGE, outages)}\n"
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
