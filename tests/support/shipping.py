"""Journal, capture, writer and database wired as the engine wires them, without the bus and without Salt.

A test hands in the bodies that the bus would deliver and looks at the tables. The books are checked after every drain
and at the end of every test, also of one that is about something else.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import os
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
from salt_mysql_engine.control import Control, socket_path
from salt_mysql_engine.database import Database, Session
from salt_mysql_engine.decoder import Decoder
from salt_mysql_engine.intake import Intake, Taken
from salt_mysql_engine.jobcache import JobCache
from salt_mysql_engine.journal import Journal, NewEvent
from salt_mysql_engine.large import LargeEvents, setup_of
from salt_mysql_engine.reconcile import Reconciler
from salt_mysql_engine.records import Selection
from salt_mysql_engine.saltevent import Kind, Opened, open_event, parse_tag
from salt_mysql_engine.settings import Connection
from salt_mysql_engine.telling import Teller
from salt_mysql_engine.verify import Verifier
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

    With a `cachedir` the job cache there confirms events, as `verify_returns` says; `reconcile` runs passes over it.
    With `listens_in` it answers those who read, on a socket there.
    With `handed_off` jobs come from other processes (`spool.py`) and not from the bus.
    Every value is stored, unless `skip_values` says otherwise.
    With `paused=True` events stay in the journal, as they would if the engine were killed before it shipped them.
    """

    def __init__(
        self,
        directory: Path,
        mysql: Mapping[str, Any],
        *,
        paused: bool = False,
        master: str = MASTER,
        cachedir: Path | None = None,
        reconcile: bool = False,
        keep_seconds: float = 86_400.0,
        handed_off: bool = False,
        listens_in: Path | None = None,
        **options: Any,
    ) -> None:
        values, problems = settings.parse({"skip_values": [], **options})
        assert not problems, problems
        chosen = settings.combine(values, {})
        selection = Selection(chosen, master_id=master)
        self.mysql = dict(mysql)
        self.journal = Journal(directory)
        self.intake = Intake(self.journal, directory)
        self.database = Database(
            self._login, connect_timeout=chosen.connect_timeout, statement_timeout=chosen.statement_timeout
        )
        limits = Limits(chosen.batch_size, chosen.batch_bytes, chosen.flush_interval)
        cache = None
        if cachedir is not None:
            cache = JobCache({"cachedir": str(cachedir), "id": master, "hash_type": "sha256"})
        opts = {"id": master, "cachedir": str(cachedir), "hash_type": "sha256"}
        setup = setup_of(opts, chosen, peers=None, has_cache=cachedir is not None)
        self.decoder = Decoder(setup)
        self.large = LargeEvents(
            self.journal,
            self._in_journal,
            self.decoder,
            on_made=lambda events, size: self.large_writer.announce(events, size),
            on_settled=lambda: self.writer.wake(),
        )
        self.large.apply(setup)
        self.verifier = Verifier(
            self.journal,
            self._in_journal,
            cache,
            self._in_cache,
            selection,
            on_confirmed=lambda events, size: self.writer.announce(events, size),
            large=self.large,
        )
        self.verifier.enabled = cachedir is not None and chosen.verify_returns is not False
        self.verifier.wait_seconds = chosen.verify_wait_seconds
        self.writer = Writer(
            self.journal, self._in_journal, self.verifier, self.database, selection, limits, self.large
        )
        self.large_writer = Writer(
            self.journal,
            self._in_journal,
            self.large,
            self.database,
            selection,
            limits,
            self.large,
            beside=self.writer,
        )
        for writer in (self.writer, self.large_writer):
            writer.create_tables = chosen.schema == "create"
            writer.store_events = bool(chosen.events)
            writer.partitions = chosen.partitions
        self.capture = Capture(self.journal, self._in_journal, selection, on_append=self.writer.announce)
        self.capture.max_event_bytes = chosen.max_event_bytes
        self._handed_off = handed_off
        self.teller = Teller(
            self.journal, self._in_journal, self.intake, self._take, self.writer, handed_off=handed_off
        )
        self._listens_in = listens_in
        self.capture.handed_off = handed_off
        self.reconciler: Reconciler | None = None
        if reconcile:
            assert cache is not None
            self.reconciler = Reconciler(
                self.journal,
                self._in_journal,
                cache,
                self._in_cache,
                self.writer.query,
                selection,
                keep_seconds=keep_seconds,
                on_append=self.writer.announce,
            )
            self.reconciler.verifies = self.verifier.enabled
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._cache_thread = concurrent.futures.ThreadPoolExecutor(1)
        self._paused = paused
        self._task: asyncio.Task[None] | None = None
        self._beside: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Shipping:
        await self._in_journal(self.journal.open)
        self._beside.append(asyncio.create_task(self.verifier.run(), name="verifier"))
        self._beside.append(asyncio.create_task(self.large.run(), name="large events"))
        if self.reconciler is not None:
            self._beside.append(asyncio.create_task(self.reconciler.run(), name="reconciler"))
        if self._handed_off:
            self._beside.append(asyncio.create_task(self._take_on(), name="intake"))
        if self._listens_in is not None:
            socket = socket_path({"sock_dir": str(self._listens_in)})
            self._beside.append(asyncio.create_task(Control(socket, self.teller.verbs()).run(), name="control"))
            await self.until(socket.exists)
        if not self._paused:
            self._task = asyncio.create_task(self.writer.run(), name="writer")
            self._beside.append(asyncio.create_task(self.large_writer.run(), name="writer of large events"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for task in self._beside:
                task.cancel()
                (ended,) = await asyncio.gather(task, return_exceptions=True)
                if error is None and not isinstance(ended, asyncio.CancelledError):
                    raise AssertionError(f"the {task.get_name()} died") from ended
            if self._task is not None:
                self._task.cancel()
                (ended,) = await asyncio.gather(self._task, return_exceptions=True)
                if error is None and not isinstance(ended, asyncio.CancelledError):
                    raise AssertionError("the writer died") from ended
            if error is None:
                await self.books()
        finally:
            self.writer.close()  # one that never ran may have been asked something
            await self._in_journal(self.intake.close)
            await self._in_journal(self.journal.close)
            self._thread.shutdown()
            self._cache_thread.shutdown()

    async def _take_on(self) -> None:
        while True:
            taken = Taken(0, 0, more=False)
            with contextlib.suppress(sqlite3.Error):  # a full disk, say
                taken = await self._take(self.intake.step)
            await asyncio.sleep(0 if taken.more else 0.02)

    async def _take(self, how: Callable[[], Taken]) -> Taken:
        taken: Taken = await self._in_journal(how)
        if taken.events:
            self.writer.announce(taken.events, taken.size)
        return taken

    def _login(self) -> Connection:
        return Connection.from_opts(self.mysql)

    async def _in_journal(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _in_cache(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._cache_thread, function, *args)

    async def open_session(self) -> Session:
        """A session of its own, as the writer would open it; the caller closes it."""
        return await self.database.open()

    async def take(self, *bodies: bytes) -> None:
        """What the bus reader does with events; they are in the journal on return, in one group."""
        self.capture.on_events([*bodies])
        await self.capture.drain()

    async def take_at(self, captured_at: float, *bodies: bytes) -> None:
        """Into the journal as if captured at another time."""
        tags = [parse_tag(body.partition(b"\n\n")[0].decode()) for body in bodies]
        new = [
            NewEvent(captured_at, tag.jid if tag else "", tag.minion if tag else "", body)
            for tag, body in zip(tags, bodies, strict=True)
        ]
        await self._in_journal(self.journal.append, new)
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

    async def handed_over(self) -> dict[str, Any]:
        """Take what is in the spool and wait until all of it has met its fate; gives the books."""
        await self._take(self.intake.drain)
        return await self.drain()

    async def until(self, condition: Callable[[], bool], *, timeout: float = PATIENCE) -> None:
        """Poll until `condition` holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            died = [task for task in (*self._beside, self._task) if task is not None and task.done()]
            if time.monotonic() > deadline or died:
                for task in died:
                    task.result()
                raise TimeoutError(f"{await self.books()}, last fault {self.fault!r}")
            await asyncio.sleep(0.01)

    async def settled(self, *, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait until nothing is pending, also of what waits for the job cache; gives the books."""
        deadline = time.monotonic() + timeout
        while self.journal.pending:
            await self.drain(timeout=max(0.1, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                raise TimeoutError(f"{await self.books()}, last fault {self.fault!r}")
            await asyncio.sleep(0.01)
        return await self.books()

    async def reconcile(self, since: float | None = None, *, reason: str = "request") -> Any:
        """Ask for a pass and wait for it; gives it."""
        reconciler = self.reconciler
        assert reconciler is not None
        passes = reconciler.passes
        reconciler.ask(reason, since)
        await self.until(lambda: reconciler.passes > passes and reason in str(reconciler.last))
        return reconciler.last

    async def retry(self, seq: int | None = None, *, trust: bool = False) -> int:
        """Make one dead letter, or all, pending again, as the runner's `retry` does."""
        again = await self._in_journal(lambda: self.journal.retry_dead_letters(seq, trusted=trust))
        self.writer.announce(again, 0)
        return int(again)

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
        assert books["pending"] == in_file, (books, in_file)
        return {**books, "waiting": self.verifier.waiting}

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


class Cache:
    """A master's job cache in `cachedir`, written as `local_cache` writes it (salt/returners/local_cache.py 3008.3)."""

    def __init__(self, cachedir: Path, *, master: str = MASTER) -> None:
        self.cachedir = cachedir
        self.master = master

    def folder(self, job: str) -> Path:
        """Where a job's files are."""
        digest = hashlib.sha256(job.encode()).hexdigest()
        return self.cachedir / "jobs" / digest[:2] / digest[2:]

    def job(self, job: str, load: Any = None, minions: Any = None, *, nocache: bool = False, at: float = 0.0) -> Path:
        """A job's folder; `at`: when it changed, in seconds since the epoch."""
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jid").write_text(job)
        if nocache:
            (folder / "nocache").touch()
        if load is not None:
            (folder / ".load.p").write_bytes(_packed(load))
        if minions is not None:
            (folder / ".minions.p").write_bytes(_packed(minions))
        if at:
            os.utime(folder, (at, at))
        return folder

    def returned(self, job: str, minion: str, value: Any, *, out: Any = None, at: float = 0.0, **more: Any) -> Path:
        """A return's file, beside and renamed; the first one stands."""
        folder = self.folder(job) / minion
        file = folder / "return.p"
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "new").write_bytes(_packed({"return": value, **more}))
            (folder / "new").rename(file)
            if out is not None:
                (folder / "out.p").write_bytes(_packed(out))
            if at:
                os.utime(file, (at, at))
                os.utime(folder, (at, at))
        return file

    def accept(self, *bodies: bytes) -> None:
        """What the master stores of genuine events."""
        for body in bodies:
            event = open_event(body)
            assert isinstance(event, Opened)
            assert event.job is not None
            job, data = event.job.jid, event.data
            if event.job.kind is Kind.JOB_NEW:
                load = {key: data[key] for key in ("tgt", "tgt_type", "fun", "arg", "user", "jid")}
                load |= {"cmd": "publish", "ret": "", "kwargs": {"delimiter": ":", "metadata": {"of": job}}}
                self.job(job, load, data["minions"])
                continue
            if event.job.kind is Kind.JOB_RETURN:
                if not self.folder(job).exists():  # a salt-call
                    self.job(job, {**data, "arg": data["fun_args"], "tgt": data["id"], "tgt_type": "glob"})
                kept = {key: data[key] for key in ("retcode", "success") if key in data}
                self.returned(job, event.job.minion, data["return"], out=data.get("out"), **kept)
                continue
            value = dict(data)  # with the `_stamp` of its start (salt/client/mixins.py)
            load = {"id": self.master, "tgt": self.master, "jid": job, "return": value, "fun": data["fun"]}
            self.job(job, {**load, "user": data["user"]})
            self.returned(job, self.master, value)

    def forget(self) -> None:
        """All of it, as `clean_old_jobs` does after `keep_jobs_seconds`."""
        shutil.rmtree(self.cachedir / "jobs", ignore_errors=True)


def _packed(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass"))


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
