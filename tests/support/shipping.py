"""Journal, capture, writer and database wired as the engine wires them, without the bus and without Salt.

A test hands in the bodies that the bus would deliver and looks at the tables. The books are checked after every drain
and at the end of every test, also of one that is about something else.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import msgpack

from salt_mysql_engine import settings
from salt_mysql_engine.batcher import Limits
from salt_mysql_engine.capture import Capture
from salt_mysql_engine.database import Database, Session
from salt_mysql_engine.journal import Journal, NewEvent
from salt_mysql_engine.records import Selection
from salt_mysql_engine.settings import Connection
from salt_mysql_engine.writer import Writer

MASTER: Final = "lab_master"
STAMP: Final = "2026-03-29T01:30:00.123456"
PATIENCE: Final = 60.0
"""Seconds until a condition that has not come true never will."""


class DeadLetter(NamedTuple):
    """What the journal keeps of an event that the database refused."""

    jid: str
    minion: str
    error: str


class Shipping:
    """An engine's inside in `directory`, shipping to `mysql` (`mysql.*` options); `options` are the engine's own.

    With `paused=True` events stay in the journal, as they would if the engine were killed before it shipped them.
    """

    def __init__(
        self, directory: Path, mysql: Mapping[str, Any], *, paused: bool = False, master: str = MASTER, **options: Any
    ) -> None:
        values, problems = settings.parse(options)
        assert not problems, problems
        chosen = settings.combine(values, {})
        selection = Selection(chosen, master_id=master)
        self.mysql = dict(mysql)
        self.journal = Journal(directory)
        self.database = Database(
            self._login, connect_timeout=chosen.connect_timeout, statement_timeout=chosen.statement_timeout
        )
        limits = Limits(chosen.batch_size, chosen.batch_bytes, chosen.flush_interval)
        self.writer = Writer(self.journal, self._in_journal, self.database, selection, limits)
        self.writer.create_tables = chosen.schema == "create"
        self.writer.store_events = bool(chosen.events)
        self.capture = Capture(self.journal, self._in_journal, selection, on_append=self.writer.announce)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._paused = paused
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Shipping:
        await self._in_journal(self.journal.open)
        if not self._paused:
            self._task = asyncio.create_task(self.writer.run(), name="writer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._task is not None:
                self._task.cancel()
                (ended,) = await asyncio.gather(self._task, return_exceptions=True)
                if error is None and not isinstance(ended, asyncio.CancelledError):
                    raise AssertionError("the writer died") from ended
            if error is None:
                await self.books()
        finally:
            await self._in_journal(self.journal.close)
            self._thread.shutdown()

    def _login(self) -> Connection:
        return Connection.from_opts(self.mysql)

    async def _in_journal(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def open_session(self) -> Session:
        """A session of its own, as the writer would open it; the caller closes it."""
        return await self.database.open()

    async def take(self, *bodies: bytes) -> None:
        """What the bus reader does with events; they are in the journal on return, in one group."""
        for body in bodies:
            self.capture.on_event(body)
        await self.capture.drain()

    async def take_at(self, captured_at: float, *bodies: bytes) -> None:
        """Into the journal as if captured at another time; jid and minion are for people only."""
        await self._in_journal(self.journal.append, [NewEvent(captured_at, "", "", body) for body in bodies])
        self.writer.wake()

    async def ship(self, *bodies: bytes) -> dict[str, Any]:
        """Take events and wait until all have met their fate; gives the books."""
        await self.take(*bodies)
        return await self.drain()

    async def drain(self, *, timeout: float = PATIENCE) -> dict[str, Any]:
        """Ask for a flush, which ends a back-off, and wait for it; gives the books."""
        assert self._task is not None
        flush = asyncio.create_task(self.writer.flush())
        done, _ = await asyncio.wait({flush, self._task}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if flush not in done:
            flush.cancel()
            if self._task in done:
                self._task.result()
            raise TimeoutError(f"not drained within {timeout:g} s: {await self.books()}, last fault {self.fault!r}")
        return await self.books()

    async def until(self, condition: Callable[[], bool], *, timeout: float = PATIENCE) -> None:
        """Poll until `condition` holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline or self._task is None or self._task.done():
                raise TimeoutError(f"{await self.books()}, last fault {self.fault!r}")
            await asyncio.sleep(0.01)

    async def fail(self, times: int) -> None:
        """Wait until so many attempts failed; flushes that nobody waits for long cut the back-off short."""

        async def nudge() -> None:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.writer.flush(), 0.1)

        nudging = asyncio.create_task(nudge())
        try:
            await self.until(lambda: self.writer.retries >= times)
        finally:
            nudging.cancel()
            await asyncio.wait({nudging})

    @property
    def fault(self) -> str:
        """The last error, or nothing."""
        return self.writer.fault.message if self.writer.fault else ""

    def retune(self, **changes: Any) -> None:
        """New limits for the running writer, as from the pillar."""
        self.writer.batcher.limits = self.writer.batcher.limits._replace(**changes)
        self.writer.wake()

    async def books(self) -> dict[str, Any]:
        """The books, balanced: every captured event is in one place, and `pending` is what the file holds."""
        books, in_file = await self._in_journal(lambda: (self.journal.books(), self._count("events")))
        fates = [books[name] for name in ("written", "duplicates", "pending", "dead_letters")]
        assert books["captured"] == sum([*fates, *books["ignored"].values(), *books["dropped"].values()]), books
        assert books["pending"] == in_file, books
        return dict(books)

    def _count(self, table: str) -> int:
        ((count,),) = self._read(f"SELECT COUNT(*) FROM {table}")
        return int(count)

    async def dead_letters(self) -> list[DeadLetter]:
        """What the journal keeps of events that were refused, oldest first."""
        rows = await self._in_journal(self._read, "SELECT jid, minion, error FROM dead_letters ORDER BY seq")
        return [DeadLetter._make(row) for row in rows]

    def _read(self, statement: str) -> list[tuple[Any, ...]]:
        """From the file itself, with a connection of our own."""
        connection = sqlite3.connect(f"file:{self.journal.path}?mode=ro", uri=True)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()


def copy_journal(source: Path, target: Path) -> Path:
    """A closed journal as it is now: opening the copy later is what a crash before the journal's delete looks like."""
    shutil.copytree(source, target)
    return target


def jid(number: int) -> str:
    """A jid; larger numbers are later jobs."""
    return f"20260329{number:012d}"


def body(tag: str, data: Mapping[str, Any]) -> bytes:
    """An event as the bus delivers it."""
    return tag.encode() + b"\n\n" + bytes(msgpack.packb(data, use_bin_type=True))


def published(job: str, minions: Iterable[str], **changes: Any) -> bytes:
    """`salt/job/<jid>/new`."""
    data = {
        "jid": job,
        "tgt_type": "glob",
        "tgt": "*",
        "user": "root",
        "fun": "test.ping",
        "arg": [],
        "minions": list(minions),
        "missing": [],
        "_stamp": STAMP,
    }
    return body(f"salt/job/{job}/new", data | changes)


def return_data(job: str, minion: str, value: Any = True, **changes: Any) -> dict[str, Any]:
    """The payload of a minion's return, keys in the order of a 3008 master."""
    data = {
        "cmd": "_return",
        "id": minion,
        "success": True,
        "return": value,
        "retcode": 0,
        "jid": job,
        "fun": "test.ping",
        "fun_args": [],
        "user": "root",
        "_stamp": STAMP,
    }
    return data | changes


def returned(job: str, minion: str, value: Any = True, **changes: Any) -> bytes:
    """`salt/job/<jid>/ret/<minion>`."""
    return body(f"salt/job/{job}/ret/{minion}", return_data(job, minion, value, **changes))


def returns(count: int, *, first: int = 1, value: Any = True) -> list[bytes]:
    """Returns of as many jobs."""
    return [returned(jid(number), f"minion-{number}", value) for number in range(first, first + count)]


def call_data(job: str, minion: str, value: Any = True, **changes: Any) -> dict[str, Any]:
    """The payload of a `salt-call`: neither `success` nor `user`, and never a `/new` before it."""
    data = {
        "cmd": "_return",
        "id": minion,
        "jid": job,
        "return": value,
        "retcode": 0,
        "fun": "test.ping",
        "fun_args": [],
        "arg": [],
        "tgt": minion,
        "tgt_type": "glob",
        "_stamp": STAMP,
    }
    return data | changes


def master_data(job: str, fun: str, value: Any = True, **changes: Any) -> dict[str, Any]:
    """The payload of a runner's or wheel's return."""
    data = {
        "fun": fun,
        "jid": job,
        "user": "root",
        "fun_args": ["web*", {"timeout": 5}],
        "_stamp": STAMP,
        "return": value,
        "success": True,
    }
    return data | changes
