"""A million returns of 20,000 jobs in the tables, and questions, each through Salt's loader in a warm process.

`lookup_jid` is the returner's `get_jid` for a job of 1,000 minions, beside a `SELECT *` of the same rows by the same
driver, and beside one of `id` and `full_ret` alone, which is what it asks for; `get_fun` (of a function that ran five
times: for others saltext.mysql takes minutes) and `get_jids_filter` stand beside those of saltext.mysql 1.1.0, which
gets the same rows once in its own tables, as it documents them, and once in ours; for `get_jids_filter` once more in a
`jids` without a key, as databases of 2014 have it. The `jobs` runner gets one filter at a time, `limit=50`.
"""

from __future__ import annotations

import datetime
import json
import statistics
from typing import Any

from benchmarks.lab import ENGINE, Bench, login
from benchmarks.loader import RARE, Loaded
from benchmarks.report import Figure, percentile, ratio
from benchmarks.worker import Worker
from tests.support.saltext_returner import documented_schema

_INDEXED = "saltext.mysql on our tables"
_KEYLESS = "saltext.mysql on tables without a key"
_SLOW_MS = 5_000


def run(bench: Bench) -> list[Figure]:
    """Loads, then asks in rounds."""
    loaded = bench.million
    opts = {**login(bench.db, "million"), "id": "master", "cachedir": str(bench.folder / "reading")}
    figures = [
        Figure(name="loading the tables", rounds=(loaded.seconds,), unit="s", goal=180),
        Figure(name="returns in the tables", rounds=(float(loaded.returns),)),
    ]
    copy_to_documented(bench)
    bench.db.create_database("keyless", "salt", "salt")
    bench.db.sql("CREATE TABLE keyless.jids SELECT `jid`, `load` FROM documented.jids")
    documented, keyless = ({**opts, "mysql.db": name} for name in ("documented", "keyless"))
    with (
        Worker("asking", json.dumps(opts)) as asker,
        Worker("asking", json.dumps(documented)) as theirs,
        Worker("asking", json.dumps(keyless)) as without_key,
    ):
        figures += _lookup(bench, asker, loaded)
        figures += _beside_saltext(bench, asker, theirs, without_key)
        figures += _filters(bench, asker, loaded)
    for name in ("documented", "keyless"):  # they would keep the others' rows out of the server's memory
        bench.db.sql(f"DROP DATABASE {name}")
    return figures


def copy_to_documented(bench: Bench) -> None:
    """The same rows in saltext.mysql's own tables, in the database ``documented``."""
    db = bench.db
    db.sql("DROP DATABASE IF EXISTS documented")
    db.create_database("documented", "salt", "salt")
    for statement in documented_schema():
        db.sql(statement, db="documented")
    for table, columns in (
        ("jids", "`jid`, `load`"),
        ("salt_returns", "`fun`, `jid`, `return`, `id`, `success`, `full_ret`, `alter_time`"),
    ):
        db.sql(f"INSERT INTO documented.{table} ({columns}) SELECT {columns} FROM million.{table}")
        db.sql(f"ANALYZE TABLE documented.{table}")


def _lookup(bench: Bench, asker: Worker, loaded: Loaded) -> list[Figure]:
    figures = []
    for minions, jid in (("1,000", loaded.big), ("10,000", loaded.huge)):
        if minions != "1,000" and jid == loaded.big:
            continue
        repetitions = 20 if minions == "1,000" else 4
        asker.ask("lookup", jid=jid, repetitions=5)
        rounds = [asker.ask("lookup", jid=jid, repetitions=repetitions) for _ in range(bench.rounds)]
        ours, whole, columns = (
            [statistics.median(took[who]) for took in rounds] for who in ("ours", "rows", "columns")
        )
        is_goal = minions == "1,000"
        figures += [
            Figure(name=f"lookup_jid of {minions} minions", rounds=tuple(ours), unit="ms"),
            Figure(name=f"SELECT * of {minions} rows", rounds=tuple(whole), unit="ms"),
            Figure(name=f"SELECT id, full_ret of {minions} rows", rounds=tuple(columns), unit="ms"),
            ratio(
                f"lookup_jid / SELECT id, full_ret, {minions} minions",
                ours,
                columns,
                goal=1.3 if is_goal else None,
                guarded=is_goal,
            ),
            ratio(f"lookup_jid / SELECT *, {minions} minions", ours, whole),
        ]
    return figures


def _beside_saltext(bench: Bench, asker: Worker, theirs: Worker, without_key: Worker) -> list[Figure]:
    figures = []
    for function, args in (("get_fun", [RARE]), ("get_jids_filter", [50])):
        peers = {
            "ours": (asker, ENGINE),
            "saltext.mysql": (theirs, "mysql"),
            _INDEXED: (asker, "mysql"),
        }
        if function == "get_jids_filter":
            peers[_KEYLESS] = (without_key, "mysql")
        said = f"{function}({', '.join(map(str, args))})"
        took: dict[str, list[float]] = {peer: [] for peer in peers}
        for number in range(bench.rounds + 1):
            for peer, (worker, returner) in peers.items():
                if peer == _INDEXED and max(took[peer], default=0.0) > _SLOW_MS:
                    continue  # once will do: no goal is about it
                repetitions = 10 if peer == "ours" or function != "get_fun" else 1
                answer = worker.ask("call", returner=returner, function=function, args=args, repetitions=repetitions)
                milliseconds = statistics.median(answer["ms"])
                if number or (peer == _INDEXED and milliseconds > _SLOW_MS):  # the first one warms up
                    took[peer].append(milliseconds)
        figures += [Figure(name=f"{said}, {peer}", rounds=tuple(times), unit="ms") for peer, times in took.items()]
        ours = took["ours"]
        figures.append(
            ratio(f"{function}: times faster than saltext.mysql", took["saltext.mysql"], ours, goal=50, more=True)
        )
        figures += [
            Figure(
                name=f"{function}: times faster than {peer}",
                rounds=tuple(theirs / statistics.median(ours) for theirs in took[peer]),
                unit="x",
            )
            for peer in (_INDEXED, _KEYLESS)
            if peer in took
        ]
    answer = asker.ask("call", returner=ENGINE, function="get_fun", args=["test.ping"], repetitions=bench.rounds)
    figures.append(Figure(name="get_fun(test.ping), ours", rounds=tuple(answer["ms"]), unit="ms"))
    return figures


def _filters(bench: Bench, asker: Worker, loaded: Loaded) -> list[Figure]:
    hour = datetime.timedelta(hours=1)
    middle = datetime.datetime.fromtimestamp(loaded.middle, datetime.timezone.utc)
    filters: dict[str, dict[str, Any]] = {
        "no filter": {},
        "since": {"since": f"{middle:%Y-%m-%dT%H:%M:%S}"},
        "until": {"until": f"{middle + hour:%Y-%m-%dT%H:%M:%S}"},
        "fun": {"fun": "state.apply"},
        "fun, a rare one": {"fun": RARE},
        "fun, a glob": {"fun": "state.*"},
        "fun, one that never ran": {"fun": "no.such"},
        "user": {"user": "deploy"},
        "target": {"target": "db-*"},
        "minion": {"minion": "web-00001.example.com"},
        "minion, a glob": {"minion": "web-0000*"},
        "minion, one that is not there": {"minion": "nobody.example.com"},
        "failed": {"failed": True},
        "after": {"after": loaded.big},
    }
    asks: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
        f"jobs, {name}": ("jobs", [], {**values, "limit": 50}) for name, values in filters.items()
    }
    asks["minion, its last 50 jobs"] = ("minion", ["web-00001.example.com"], {"limit": 50})
    asks["failures of a week, 50 jobs"] = ("failures", [], {"since": "7d", "limit": 50})
    asks["job of 1,000 minions"] = ("job", [loaded.big], {})
    took: dict[str, list[list[float]]] = {name: [] for name in asks}
    for number in range(bench.rounds + 1):
        for name, (function, args, values) in asks.items():
            answer = asker.ask("people", function=function, args=args, filters=values, repetitions=20)
            if number:  # the first one warms up
                took[name].append(answer["ms"])
    return [
        Figure(
            name=f"{name}, p95",
            rounds=tuple(percentile(ms, 0.95) for ms in rounds),
            unit="ms",
            goal=50 if asks[name][0] == "jobs" else None,
        )
        for name, rounds in took.items()
    ]
