"""What a journal holds becomes rows: pings (300 bytes), highstates (a real one of 20 states, 6.7 KB of JSON, with
times of each minion's own), those of which no two say the same, and the 500 KB output of a command. The engine's own
inside (journal, writer, database) in a process of its own, beside others that put the same rows into the same table in
batches of 500 with a COMMIT each: `executemany` of mysqlclient, of aiomysql and of asyncmy, and one `LOAD DATA LOCAL
INFILE`.

The peers' rows are ready when their clock starts; the engine unpacks events, makes both JSON texts, and deletes from
its journal while its clock runs. "events by aiomysql" does the engine's work in the plainest way: unpack, two
`json.dumps`, `executemany`.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab import Bench, empty, forget
from benchmarks.payloads import bodies
from benchmarks.report import Figure, ratio
from benchmarks.worker import Worker
from salt_mysql_engine.journal import Journal, NewEvent

OURS = "engine"
_PEERS = ("mysqlclient", "aiomysql", "asyncmy", "events by aiomysql", "LOAD DATA")
_GROUP = 1000
_GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("ping", "mysqlclient"): {"rows": 1.0},
    ("highstate", "mysqlclient"): {"rows": 1.0},
    ("ping", "aiomysql"): {"cpu": 0.5},
    ("highstate", "aiomysql"): {"cpu": 0.2},
    ("ping", "LOAD DATA"): {"rows": 0.6},
    ("highstate", "LOAD DATA"): {"rows": 0.6},
}


def run(bench: Bench) -> list[Figure]:
    """Each kind of event, peers by turns."""
    mysql = bench.database("drain")
    figures = []
    for kind, count in (
        ("ping", bench.size(40_000, 10_000)),
        ("highstate", bench.size(5_000, 1_000)),
        ("unlike", bench.size(2_000, 500)),
        ("output", bench.size(40, 10)),
    ):
        figures += compare(bench, mysql, kind, count, _PEERS)
    return figures


def compare(bench: Bench, mysql: dict[str, Any], kind: str, count: int, peers: Sequence[str]) -> list[Figure]:
    """So many returns of a kind, by the engine and its peers in turns."""
    bench.say(f"drain: {count:,} of {kind}, {bench.rounds} rounds")
    full = bench.folder / f"journal-{kind}"
    fill(full, count, kind)
    took: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, *peers)}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker("ship" if name == OURS else "peers")) for name in took}
        one = bench.folder / "journal-one"
        fill(one, 1, kind)
        empty(bench.db, mysql["mysql.db"])
        workers[OURS].ask("drain", journal=str(one), mysql=mysql, options={})  # imports, and a first connection
        forget(one)
        for _ in range(bench.rounds):
            for name, rounds in took.items():
                empty(bench.db, mysql["mysql.db"])
                rounds.append(_once(bench, name, workers[name], mysql, full, count, kind))
    forget(full)
    return _figures(kind, took)


def fill(folder: Path, count: int, kind: str, first: int = 0) -> None:
    """A closed journal that holds so many returns, as after an outage."""
    journal = Journal(folder)
    journal.open()
    journal.caps = journal.caps._replace(max_bytes=1 << 40)
    group: list[NewEvent] = []
    for jid, minion, body in bodies(first, count, kind):
        group.append(NewEvent(time.time(), jid, minion, body))
        if len(group) == _GROUP:
            journal.append(group)
            group = []
    journal.append(group)
    assert journal.pending == count, (journal.pending, count)
    journal.close()


def _once(
    bench: Bench, name: str, worker: Worker, mysql: dict[str, Any], full: Path, count: int, kind: str
) -> dict[str, float]:
    """Microseconds of CPU a row, and rows a second."""
    if name == OURS:
        copy = bench.folder / "journal"
        shutil.copytree(full, copy)
        done = worker.ask("drain", journal=str(copy), mysql=mysql, options={})
        forget(copy)
        assert done["books"]["written"] == count, done["books"]
    else:
        done = worker.ask("insert", peer=name, mysql=mysql, count=count, kind=kind, folder=str(bench.folder))
    ((stored,),) = bench.db.sql("SELECT COUNT(*) FROM salt_returns", db=mysql["mysql.db"])
    assert stored == count, (name, stored, count)
    return {"rows": count / done["seconds"], "cpu": done["cpu"] / count * 1e6, "mb": done["peak_mb"]}


def _figures(kind: str, took: dict[str, list[dict[str, float]]]) -> list[Figure]:
    figures = []
    for name, rounds in took.items():
        figures.append(Figure(name=f"{kind}: {name}, rows a second", rounds=tuple(one["rows"] for one in rounds)))
    for name, rounds in took.items():
        figures.append(
            Figure(name=f"{kind}: {name}, client CPU a row", rounds=tuple(one["cpu"] for one in rounds), unit="µs")
        )
    for name in list(took)[1:]:
        goals = _GOALS.get((kind, name), {})
        for what, more in (("rows", True), ("cpu", False)):
            title = "rows a second" if what == "rows" else "client CPU a row"
            figures.append(
                ratio(
                    f"{kind}: {title}, engine / {name}",
                    (one[what] for one in took[OURS]),
                    (one[what] for one in took[name]),
                    goal=goals.get(what),
                    more=more,
                    guarded=what in goals,
                )
            )
    return figures
