"""Half of the million returns is deleted, through the engine's own `purge`, beside a writer that inserts and commits
20 returns every 10 ms, as an engine under load does, and notes the longest time that one of its statements took.

Each part begins when the server has written out what was left to write. First in tables with a partition for each day,
where whole days are dropped. Then the same rows without partitions: the writer's longest wait, beside the one that it
has alone; and that of another client, which asks for a lock on the very row that is to go next, all the time. A COMMIT
waits for the disk, and so does who waits for its locks: the longest sync of a small file beside is the disk's part.
"""

from __future__ import annotations

import abc
import asyncio
import datetime
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pymysql

from benchmarks.lab import Bench, login
from benchmarks.report import Figure, percentile
from salt_mysql_engine import partitions, purge
from salt_mysql_engine.database import Database
from salt_mysql_engine.settings import Connection
from salt_mysql_engine.steady import Steady
from tests.support.mariadb import wait_until

_ROWS, _PAUSE = 20, 0.01
_FEW_PAGES = 100
_S = TypeVar("_S", bound="_Statements")


def run(bench: Bench) -> list[Figure]:
    """Deletes half of the loaded rows, twice."""
    loaded = bench.million
    plain = login(bench.db, "million")
    parted = _parted(bench, loaded.oldest)
    _settle(bench)
    by_day = _Writer(parted)
    with by_day:
        dropped = asyncio.run(_purge(parted, loaded.middle, whole_days=True))
    bench.say(f"{dropped['salt_returns']:,} returns in {dropped['seconds']:.2f} s, by partitions")
    _settle(bench)
    alone, quiet_disk = _Writer(plain), _Disk(bench.folder)
    with alone, quiet_disk:
        time.sleep(bench.size(20, 5))
    keys = bench.db.sql(
        "SELECT jid, id FROM salt_returns WHERE jid < %s ORDER BY jid, id", (_jid(loaded.middle),), "million"
    )
    beside, front, disk = _Writer(plain), _Front(plain, keys[::20]), _Disk(bench.folder)
    with beside, front, disk:
        chunked = asyncio.run(_purge(plain, loaded.middle))
    bench.say(f"{chunked['salt_returns']:,} returns in {chunked['seconds']:.1f} s, in chunks")
    return [
        Figure(name="partitions: returns deleted", rounds=(float(dropped["salt_returns"]),)),
        Figure(name="partitions: dropped", rounds=(float(len(dropped["partitions_dropped"])),)),
        Figure(name="partitions: took", rounds=(dropped["seconds"],), unit="s", goal=1),
        *_waits("partitions", by_day, goal=100),
        Figure(name="without partitions: returns deleted", rounds=(float(chunked["salt_returns"]),)),
        Figure(name="without partitions: took", rounds=(chunked["seconds"],), unit="s"),
        *_waits("without partitions", beside, goal=100),
        Figure(
            name="without partitions: longest wait for a row that is being deleted",
            rounds=(max(front.ms),),
            unit="ms",
            goal=100,
        ),
        Figure(name="without partitions: rows waited for that way", rounds=(float(front.gone),)),
        Figure(name="without partitions: longest sync of a small file", rounds=(max(disk.ms),), unit="ms"),
        *_waits("the writer alone", alone),
        Figure(name="the writer alone: longest sync of a small file", rounds=(max(quiet_disk.ms),), unit="ms"),
    ]


def _waits(name: str, writer: _Writer, *, goal: float | None = None) -> list[Figure]:
    return [
        Figure(name=f"{name}: longest statement of the writer", rounds=(max(writer.ms),), unit="ms", goal=goal),
        Figure(name=f"{name}: p99 of the writer's statements", rounds=(percentile(writer.ms, 0.99),), unit="ms"),
        Figure(name=f"{name}: rows the writer wrote a second", rounds=(writer.rows / writer.seconds,)),
    ]


def _jid(moment: float) -> str:
    return f"{datetime.datetime.fromtimestamp(moment, datetime.timezone.utc):%Y%m%d%H%M%S%f}"


def _parted(bench: Bench, oldest: datetime.date) -> dict[str, Any]:
    """The loaded rows in tables with a partition for each day."""
    bench.say("the same rows in partitions")
    mysql = bench.database("parted")
    layout = partitions.clause(partitions.layout("day", oldest, datetime.datetime.now(datetime.timezone.utc).date()))
    for table in ("jids", "salt_returns"):
        bench.db.sql(f"ALTER TABLE {table} {layout}", db="parted")
        bench.db.sql(f"INSERT INTO parted.{table} SELECT * FROM million.{table}")
    return mysql


def _settle(bench: Bench) -> None:
    """Waits until the server has written its changed pages: those of two million rows that came within a minute would
    keep the disk from everybody while the purge runs, as no master's day does."""
    change = "SET GLOBAL innodb_max_dirty_pages_pct = %s, GLOBAL innodb_io_capacity = %s"
    (usual,) = bench.db.sql("SELECT @@GLOBAL.innodb_max_dirty_pages_pct, @@GLOBAL.innodb_io_capacity")
    bench.db.sql(change, (0, 2000))
    wait_until(lambda: _dirty_pages(bench) < _FEW_PAGES, timeout=300, what="the server's writing", interval=0.5)
    bench.db.sql(change, usual)


def _dirty_pages(bench: Bench) -> int:
    ((_, pages),) = bench.db.sql("SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_dirty'")
    return int(pages)


async def _purge(mysql: Mapping[str, Any], before: float, *, whole_days: bool = False) -> dict[str, Any]:
    if whole_days:  # so that nothing is left to be deleted in chunks
        before -= before % 86_400
    database = Database(lambda: Connection.from_opts(mysql), connect_timeout=5, statement_timeout=60)
    async with Steady(database, purge.LOCK, patience=60) as steady:
        began = time.monotonic()
        done = await purge.purge(steady, before, archive=False, report=lambda _: None)
        return {**done, "seconds": time.monotonic() - began}


class _Statements(abc.ABC):
    """A client in a thread that does something again and again while this is open. ``ms``: what its statements took."""

    def __init__(self, mysql: Mapping[str, Any]) -> None:
        self.ms: list[float] = []
        self.seconds = 0.0
        self._mysql = mysql
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None

    def __enter__(self: _S) -> _S:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        began = time.monotonic()
        connection = pymysql.connect(
            host=self._mysql["mysql.host"],
            port=self._mysql["mysql.port"],
            user=self._mysql["mysql.user"],
            password=self._mysql["mysql.pass"],
            database=self._mysql["mysql.db"],
        )
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                cursor.execute("SET time_zone = '+00:00'")
                while not self._end.is_set():
                    self._step(connection, cursor)
        except pymysql.MySQLError as exc:
            self._error = exc
        self.seconds = time.monotonic() - began

    @abc.abstractmethod
    def _step(self, connection: Any, cursor: Any) -> None:
        """One round of what this client does, timed."""

    def _timed(self, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        value = work()
        self.ms.append((time.perf_counter() - began) * 1000)
        return value


class _Disk:
    """Syncs a small file four times a second. ``ms``: what that took."""

    def __init__(self, folder: Path) -> None:
        self.ms: list[float] = []
        self._path = folder / "probe"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with self._path.open("wb", buffering=0) as file:
            while not self._end.wait(0.25):
                file.write(b"x")
                began = time.perf_counter()
                os.fdatasync(file.fileno())
                self.ms.append((time.perf_counter() - began) * 1000)


class _Writer(_Statements):
    """Inserts new returns and commits, as an engine does."""

    def __init__(self, mysql: Mapping[str, Any]) -> None:
        super().__init__(mysql)
        self.rows = 0

    def _step(self, connection: Any, cursor: Any) -> None:
        jid = f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%d%H%M%S%f}"
        rows = ", ".join(
            f"('test.ping', '{jid}', 'true', 'writer-{place}', '1', '{{\"return\": true}}')" for place in range(_ROWS)
        )
        self._timed(
            lambda: cursor.execute(
                f"INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) VALUES {rows}"
            )
        )
        self._timed(connection.commit)
        self.rows += _ROWS
        self._end.wait(_PAUSE)


class _Front(_Statements):
    """Wants a lock on the next row that is to go, all the time: it waits whenever the purge holds that one."""

    def __init__(self, mysql: Mapping[str, Any], keys: Sequence[tuple[str, str]]) -> None:
        super().__init__(mysql)
        self.gone = 0
        self._keys = keys

    def _step(self, connection: Any, cursor: Any) -> None:
        if self.gone == len(self._keys):
            self._end.wait(_PAUSE)
            return
        there = self._timed(
            lambda: cursor.execute(
                "SELECT 1 FROM salt_returns WHERE jid = %s AND id = %s FOR UPDATE", self._keys[self.gone]
            )
        )
        connection.rollback()
        if there:
            self._end.wait(0.001)
        else:
            self.gone += 1
