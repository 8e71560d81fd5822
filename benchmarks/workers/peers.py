"""What else could put the same rows into the same table: drivers, and the server's own bulk load.

``python -m benchmarks.workers.peers``. The rows are made before the clock runs, which is in the peers' favour: the
engine makes its rows of events while its clock runs. Batches are of 500 rows with a COMMIT each, as the engine's.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgpack

from benchmarks import payloads
from benchmarks.worker import cpu, peak_mb, serve
from salt_mysql_engine import records, settings
from salt_mysql_engine.records import Record, Selection
from salt_mysql_engine.saltevent import Opened, open_event

BATCH = 500
INSERT = (
    "INSERT INTO `salt_returns` (`fun`, `jid`, `return`, `id`, `success`, `full_ret`, `alter_time`) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s)"
)
Row = tuple[str, ...]


@functools.lru_cache(1)
def rows(count: int, kind: str) -> list[Row]:
    """The rows that the engine makes of these events."""
    selection = Selection(settings.combine({}, {}), master_id="master")
    made = []
    for _, _, body in payloads.bodies(0, count, kind):
        event = open_event(body)
        assert isinstance(event, Opened)
        record = records.interpret(event, 0.0, selection)
        assert isinstance(record, Record) and record.ret
        ret = record.ret
        made.append((ret.fun, ret.jid, ret.return_json, ret.id, f"{ret.success:d}", ret.full_ret_json, ret.altered))
    return made


def row_of(body: bytes) -> Row:
    """A row as saltext.mysql's returner makes it of an event: two texts by the standard library."""
    data = msgpack.unpackb(body.partition(b"\n\n")[2], raw=False, strict_map_key=False)
    return (
        data["fun"],
        data["jid"],
        json.dumps(data["return"]),
        data["id"],
        str(int(data["success"])),
        json.dumps(data),
        data["_stamp"].replace("T", " "),
    )


def batches(all_rows: list[Any]) -> Iterable[list[Any]]:
    """In the engine's size."""
    for start in range(0, len(all_rows), BATCH):
        yield all_rows[start : start + BATCH]


def mysqlclient(to: dict[str, Any], made: list[Row]) -> None:
    """``executemany`` of the C driver."""
    import MySQLdb

    connection = MySQLdb.connect(**_login(to, "passwd", "db"), charset="utf8mb4")
    cursor = connection.cursor()
    for batch in batches(made):
        cursor.executemany(INSERT, batch)
        connection.commit()
    connection.close()


def aiomysql(to: dict[str, Any], made: list[Row]) -> None:
    """``executemany`` of the driver below the engine."""
    import aiomysql as driver

    asyncio.run(_asyncio(driver, to, made))


def asyncmy(to: dict[str, Any], made: list[Row]) -> None:
    """``executemany`` of the asyncio driver in Cython."""
    import asyncmy as driver

    asyncio.run(_asyncio(driver, to, made))


async def _asyncio(driver: Any, to: dict[str, Any], made: list[Row]) -> None:
    connection = await driver.connect(**_login(to, "password", "db"), charset="utf8mb4")
    async with connection.cursor() as cursor:
        for batch in batches(made):
            await cursor.executemany(INSERT, batch)
            await connection.commit()
    closed = connection.close()
    if closed is not None:
        await closed


def from_events(to: dict[str, Any], bodies: list[bytes]) -> None:
    """The engine's whole work in the plainest way: unpack, ``json.dumps`` twice, ``aiomysql.executemany``."""
    import aiomysql as driver

    async def work() -> None:
        connection = await driver.connect(**_login(to, "password", "db"), charset="utf8mb4")
        async with connection.cursor() as cursor:
            for batch in batches(bodies):
                await cursor.executemany(INSERT, [row_of(body) for body in batch])
                await connection.commit()
        connection.close()

    asyncio.run(work())


def load_data(to: dict[str, Any], path: str) -> None:
    """One ``LOAD DATA LOCAL INFILE``: the server's own limit."""
    import MySQLdb

    connection = MySQLdb.connect(**_login(to, "passwd", "db"), charset="utf8mb4", local_infile=1)
    connection.cursor().execute(
        f"LOAD DATA LOCAL INFILE '{path}' INTO TABLE salt_returns CHARACTER SET utf8mb4 "
        "(`fun`, `jid`, `return`, `id`, `success`, `full_ret`, `alter_time`)"
    )
    connection.commit()
    connection.close()


def _login(to: dict[str, Any], password: str, database: str) -> dict[str, Any]:
    return {
        "host": to["mysql.host"],
        "port": to["mysql.port"],
        "user": to["mysql.user"],
        password: to["mysql.pass"],
        database: to["mysql.db"],
    }


PEERS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "mysqlclient": mysqlclient,
    "aiomysql": aiomysql,
    "asyncmy": asyncmy,
    "events by aiomysql": from_events,
    "LOAD DATA": load_data,
}


def insert(peer: str, mysql: dict[str, Any], count: int, kind: str, folder: str) -> dict[str, Any]:
    """Wall and CPU seconds of one peer's work."""
    work: Any
    if peer == "events by aiomysql":
        work = [body for _, _, body in payloads.bodies(0, count, kind)]
    else:
        work = rows(count, kind)
    if peer == "LOAD DATA":
        path = Path(folder) / "rows.txt"
        with path.open("w", encoding="utf-8") as out:
            for row in work:
                out.write(
                    "\t".join(value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n") for value in row)
                    + "\n"
                )
        work = str(path)
    PEERS[peer](mysql, work if peer == "LOAD DATA" else work[:0])  # imports, and a first connection
    if peer == "LOAD DATA":
        _truncate(mysql)
    used, began = cpu(), time.perf_counter()
    PEERS[peer](mysql, work)
    return {"seconds": time.perf_counter() - began, "cpu": cpu() - used, "peak_mb": peak_mb()}


def _truncate(mysql: dict[str, Any]) -> None:
    import MySQLdb

    connection = MySQLdb.connect(**_login(mysql, "passwd", "db"))
    connection.cursor().execute("TRUNCATE TABLE salt_returns")
    connection.close()


if __name__ == "__main__":
    serve({"insert": insert})
