"""Salt's process that reads: the returners through Salt's own loader, the reader, and the driver itself.

``python -m benchmarks.workers.asking OPTS``: the master's options as JSON, over Salt's defaults.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pymysql
import salt.config
import salt.loader

from benchmarks.worker import serve

OPTS = {**salt.config.DEFAULT_MASTER_OPTS, "grains": {}, **json.loads(sys.argv[1])}
RETURNERS = salt.loader.returners(OPTS, salt.loader.minion_mods(OPTS))


def bare() -> pymysql.connections.Connection[Any]:
    """A connection of the driver that the engine and saltext.mysql use here."""
    return pymysql.connect(
        host=OPTS["mysql.host"],
        port=OPTS["mysql.port"],
        user=OPTS["mysql.user"],
        password=OPTS["mysql.pass"],
        database=OPTS["mysql.db"],
        charset="utf8mb4",
        autocommit=True,
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what came of it."""
    began = time.perf_counter()
    value = work()
    return (time.perf_counter() - began) * 1000, value


def lookup(jid: str, repetitions: int) -> dict[str, list[float]]:
    """``get_jid`` and a bare SELECT of the same rows, whole ones and of the two columns that are needed, by turns."""
    took: dict[str, list[float]] = {"rows": [], "columns": [], "ours": []}
    with bare() as connection, connection.cursor() as cursor:

        def select(what: str) -> Any:
            cursor.execute(f"SELECT {what} FROM `salt_returns` WHERE `jid` = %s", (jid,))
            return cursor.fetchall()

        for _ in range(repetitions):
            milliseconds, rows = timed(lambda: select("*"))
            took["rows"].append(milliseconds)
            milliseconds, rows = timed(lambda: select("`id`, `full_ret`"))
            took["columns"].append(milliseconds)
            milliseconds, answer = timed(lambda: RETURNERS["mysql_jobcache.get_jid"](jid))
            took["ours"].append(milliseconds)
            assert len(rows) == len(answer) > 0, (len(rows), len(answer))
    return took


def call(returner: str, function: str, args: list[Any], repetitions: int = 1) -> dict[str, Any]:
    """A returner's function: milliseconds of each call, and how much it gave."""
    took, answer = [], None
    for _ in range(repetitions):
        milliseconds, answer = timed(lambda: RETURNERS[f"{returner}.{function}"](*args))
        took.append(milliseconds)
    assert answer is not None, "nothing was asked"
    return {"ms": took, "answers": len(answer)}


def people(function: str, args: list[Any], filters: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """What the runner's functions for people do, without the terminal: milliseconds of each call, how much it gave."""
    from salt_mysql_engine import history

    took, answer = [], None
    for _ in range(repetitions):
        milliseconds, answer = timed(lambda: getattr(history, function)(OPTS, *args, **filters))
        took.append(milliseconds)
    assert answer is not None, "nothing was asked"
    return {"ms": took, "answers": len(answer)}


if __name__ == "__main__":
    serve({"lookup": lookup, "call": call, "people": people})
