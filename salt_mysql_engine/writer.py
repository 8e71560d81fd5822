"""The writer: takes batches out of the journal and puts them into MySQL, each in one transaction.

Promise
    A batch leaves the journal only after its COMMIT was confirmed. Everything it writes may be
    written again and changes nothing then: a COMMIT whose answer was lost, a ``kill -9`` between
    COMMIT and the journal's delete, and a replay are all the same case.

While the server works on one batch, what became of the one before goes into the journal, and the next is read and
made. Nothing of that comes before a batch that is ready, so that the server never waits for us.

What an error does is its verdict. RETRY: the same batch again, after full-jitter back-off from 0.5 s
doubling to 30 s. OPERATOR: the same, from 5 s on, with the remedy in the log. SPLIT: the batch is
halved until the refused row stands alone and becomes a dead letter; that happens only on the server's
own word about a row, never because it is away. An error that nobody knows is about a row where the server
takes another one, which is rolled back; else it is as OPERATOR. An exception that nobody expects while rows
are put together is taken for a fault of one of them in the same way; where that goes on from event to event
it is none of theirs, and they wait between. Nothing ends the writer but its cancellation.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from . import moments, records, saltevent, schema
from .batcher import Batcher, Limits
from .capture import InJournal
from .database import Database, Session
from .errors import (
    AnswerTimeout,
    ConnectionLost,
    DatabaseError,
    JournalError,
    OperatorNeeded,
    RowsRejected,
    RowTooLarge,
    ServerUnavailable,
    TooMuch,
    TransactionAborted,
    UnknownRefusal,
    Verdict,
)
from .items import Fit, Item, Large, Maker, Plain, harmless
from .journal import Entry, Journal, Settlement
from .journalfile import CONFIRMED
from .large import LargeEvents
from .rows import Rows
from .verify import Checked
from .waits import Breath, is_set_within

log = logging.getLogger(__name__)

_BACKOFF_FIRST = {Verdict.RETRY: 0.5, Verdict.OPERATOR: 5.0, Verdict.TOO_MUCH: 5.0}
_BACKOFF_MAX = 30.0  # seconds
_SAY_AGAIN_SECONDS = 60.0
_PING_AFTER_SECONDS = 1.0
"""After so long a server or a proxy may have closed the connection: it is asked first, and opened again."""
_PROBE_KEEPS_SECONDS = 30.0
_AT_A_TIME_SECONDS = 0.0002
"""After so long of making rows everybody else has a turn: the bus is read, and the server does not wait for us while
its answer to the batch before takes several turns."""
_JOURNAL_RETRY_SECONDS = 1.0
_LAST_SETTLE_SECONDS = 1.0
_FAULTS_AT_ONCE = 3
"""So many events in a row may be at fault without a pause."""
_FAULT_SECONDS = 1.0
_HARMLESS = True, 0, ""
"""Values of which a column or an index that somebody added takes one."""
_REFUSALS = 3
"""So often the server refuses a row, and takes another, before the row is at fault."""
_MOST_KNOWN_JOBS = 10_000
_KNOWN_SECONDS = 3600.0
"""A job that began longer ago may be purged between two of its returns, by any master: it is asked for each time."""
_REST_SECONDS = 10.0
_LOOK_AGAIN_SECONDS = 0.01
LOOK_AT_TABLES_SECONDS = 60.0
"""How often the tables' shape is looked at: someone may migrate them meanwhile."""
HOME_PROBE_SECONDS = 30.0
"""How often the first of several hosts is tried while another one has our session."""


class Fault(NamedTuple):
    """The last error: when (seconds since the epoch) and what."""

    at: float
    message: str


class _RowsFault(Exception):
    """Rows could not be put together, for a reason that nobody expects."""


class Source(Protocol):
    """Where a writer gets its events from; see :meth:`Verifier.read`."""

    async def read(
        self, *, after: int, rows: int, max_bytes: int
    ) -> tuple[Sequence[Entry | Checked | Item], int, bool]: ...


class Writer:
    """The only one who talks to the server about rows. There are two: a row of megabytes takes the server a second, in
    which no other must wait, and so the rows of large events have a writer with a session of its own (``beside``),
    which ends when it has nothing to do. It says nothing of a server that is away, and where it gets no session it has
    the other one write its rows.
    """

    def __init__(
        self,
        journal: Journal,
        in_journal: InJournal,
        source: Source,
        database: Database,
        selection: records.Selection,
        limits: Limits,
        large: LargeEvents,
        *,
        beside: Writer | None = None,
    ) -> None:
        self.selection = selection
        self.batcher: Batcher[Item] = Batcher(limits)
        self.create_tables = True
        self.store_events = False
        self.partitions = "none"
        self.tables_known = False
        """Whether the tables were looked at, on this connection and with these settings."""
        self.fault: Fault | None = None
        self.failing = False
        self.away = False
        """Whether it is failing because no server answers."""
        self.committed_at = 0.0
        """When the last batch was confirmed, by the monotonic clock."""
        self.batches: collections.Counter[str] = collections.Counter()
        self.retries = 0
        self.conflicts = 0
        self.faults = 0
        """Exceptions that nobody expects."""
        self.lags: collections.deque[float] = collections.deque(maxlen=10_000)
        """Seconds from capture to COMMIT of the newest rows."""
        self.server_version = ""
        self.server_host = ""
        self._journal = journal
        self._in_journal = in_journal
        self._source = source
        self._beside = beside
        self._refused = False
        """Whether we got no session the last time."""
        self._large = large
        self._database = database
        self._session: Session | None = None
        self._session_in_use = asyncio.Lock()
        self._homeward: asyncio.Task[Session] | None = None
        self._home_at = 0.0
        self._at_home = True
        self._shape: schema.Shape | None = None
        self._look_at = 0.0
        self._said_old = False
        self._known_jobs: set[str] = set()
        """Jobs that have their row in ``jids``: most returns are of one that an earlier batch wrote."""
        self._uncertain_through = 0
        """Events up to this ``seq`` may be in the tables already."""
        self._cursor = 0
        self._unread = 0
        self._unread_bytes = 0
        self._news = asyncio.Event()
        self._hurry = asyncio.Event()
        """Set to end a back-off."""
        self._asked_through = 0
        """A flush waits for the events up to this ``seq``."""
        self._delivering = False
        self._settling: asyncio.Task[None] | None = None
        """What became of the last batch, on its way into the journal."""
        self._server_works = asyncio.Event()
        """Set while there is time for everything but sending: the server works, or is away, or no batch is ready."""
        self._server_works.set()
        self._maker = Maker(selection, journal.event_key)
        self._faults_in_a_row = 0
        """Events at fault since the last one that was written."""
        self._said = ""
        self._say_again_at = 0.0
        self._settled: asyncio.Event = asyncio.Event()

    def wake(self) -> None:
        """Look again: there are new limits."""
        self._news.set()

    def adopt(self, batch: list[Item]) -> bool:
        """Takes what another writer cannot write; whether there is a session for it."""
        if self._session is None or not self._session.usable:
            return False
        for item in batch:
            self.batcher.add(item, size=item.size, since=asyncio.get_running_loop().time())
        self._news.set()
        return True

    def announce(self, events: int, size: int) -> None:
        """``events`` more are in the journal. They are fetched when they fill the batch, or when it is due."""
        self._unread += events
        self._unread_bytes += size
        room = self.batcher.room
        # A value stands in a row twice: in its own column and in the whole return.
        if not len(self.batcher) or self._unread >= room.batch_size or 2 * self._unread_bytes >= room.batch_bytes:
            self._news.set()

    async def flush(self) -> None:
        """Returns when everything that the journal holds now has been settled. Cancel it to give up."""
        last = await self._in_journal(self._journal.newest_seq)
        self._asked_through = max(self._asked_through, last)
        self._hurry.set()
        while True:
            self._news.set()
            self._settled.clear()
            oldest = await self._in_journal(self._journal.oldest_seq)
            if oldest is None or oldest > last:
                return
            await self._settled.wait()
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)  # it may wait for the job cache, or for the decoder

    async def query(self, statement: bytes | str) -> list[tuple[Any, ...]]:
        """Asks something on the writer's own session, between two batches: for who gets no session of its own.

        Raises:
            DatabaseError: the database does not answer.
        """
        async with self._session_in_use:
            session = await self._ready()
            rows = await session.query(statement)
            await session.rollback()
            return rows

    def close(self) -> None:
        """Ends the session."""
        if self._session is not None:
            self._session.close()

    async def run(self) -> None:
        """Ships batches until cancelled."""
        self._uncertain_through = await self._journalled(lambda: self._in_journal(self._journal.newest_seq))
        upcoming = self._prepare()
        try:
            while True:
                batch = await upcoming
                self._delivering = True
                self._server_works.clear()
                upcoming = self._prepare()
                await self._deliver(batch)
                self._delivering = False
        finally:
            upcoming.cancel()
            self._server_works.set()
            await asyncio.wait({upcoming, *filter(None, [self._settling])}, timeout=_LAST_SETTLE_SECONDS)
            if self._settling is not None:  # with the journal's disk full, say: it is all written once more, and known
                self._settling.cancel()
            await self._drop_probe()
            self.close()

    def _prepare(self) -> asyncio.Task[list[Item]]:
        return asyncio.create_task(self._next_batch(), name="mysql_jobcache next batch")

    async def _next_batch(self) -> list[Item]:
        """Fills the batcher from the journal until a batch is due."""
        await self._server_works.wait()
        loop = asyncio.get_running_loop()
        while True:
            self._news.clear()
            self._unread = self._unread_bytes = 0
            try:
                caught_up = await self._read_some(loop)
            except Exception:  # whatever it is, nothing was taken out of the journal
                self.faults += 1
                log.exception("Events cannot be read from the journal; trying on")
                await asyncio.sleep(_FAULT_SECONDS)
                continue
            oldest = self.batcher.oldest
            reason = self.batcher.due(loop.time(), asked=oldest is not None and oldest.seq <= self._asked_through)
            if reason is not None:
                self.batches[reason.value] += 1
                return self.batcher.take()
            if caught_up:
                if not len(self.batcher) and not self._delivering and self._is_settled:
                    self._settled.set()  # what a flush waits for may wait for the job cache
                await self._wait(self.batcher.deadline)

    async def _read_some(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Fills the batcher as far as it has room; whether that is all there is."""
        room = self.batcher.room
        if room.batch_size <= 0 or room.batch_bytes <= 0:
            return False
        caught_up: bool
        events, cursor, caught_up = await self._journalled(
            functools.partial(self._source.read, after=self._cursor, rows=room.batch_size, max_bytes=room.batch_bytes)
        )
        items = await self._made(events)
        now, wall = loop.time(), time.time()
        for item in items:  # all of them or, where something went wrong until here, none
            # The journal keeps wall-clock time, which can be set back or on; age is at least 0.
            self.batcher.add(item, size=item.size, since=now - max(0.0, wall - item.captured_at))
        self._cursor = cursor
        return caught_up

    async def _wait(self, deadline: float | None) -> None:
        """Until there is news or the deadline comes: one wake-up and one timer, no polling."""
        if deadline is None:
            if self._beside is not None and not await is_set_within(self._news, _REST_SECONDS) and not self._delivering:
                await self._drop_probe()
                if self._session is not None:
                    self._session.close()
                    self._session = None
            await self._news.wait()
            return
        handle = asyncio.get_running_loop().call_at(deadline, self._news.set)
        try:
            await self._news.wait()
        finally:
            handle.cancel()

    async def _made(self, events: Sequence[Entry | Checked | Item]) -> list[Item]:
        if self._maker.selection is not self.selection:
            self._maker = Maker(self.selection, self._journal.event_key)
        items: list[Item] = []
        breath = Breath(_AT_A_TIME_SECONDS)
        for each in events:
            items.append(each if isinstance(each, Item) else self._item(each))
            await breath.taken()
        return items

    def _item(self, each: Entry | Checked) -> Item:
        entry, event, error, reason = (each, None, "", "") if isinstance(each, Entry) else each
        item = self._maker.make(entry.seq, entry.captured_at, entry.body, event, error)
        if reason and error:
            return item._replace(reason=reason)
        return item._replace(confirmed=entry.body) if entry.state == CONFIRMED else item

    async def _deliver(self, batch: list[Item]) -> None:
        """Writes a batch and settles it, however long that takes."""
        attempt = refusals = 0
        was_too_large = False
        while True:
            try:
                async with self._session_in_use:
                    fates = await self._write(batch)
            except RowsRejected as exc:
                if len(batch) > 1:
                    await self._deliver_halves(batch)
                    return
                if isinstance(exc, RowTooLarge) and not was_too_large and await self._takes_more_now():
                    was_too_large = True
                    continue
                await self._refuse(batch[0], exc)
                return
            except DatabaseError as exc:
                if isinstance(exc, TooMuch) and len(batch) > 1:
                    log.debug("A batch of %d events is written in halves: %s", len(batch), exc)
                    await self._deliver_halves(batch)
                    return
                if isinstance(exc, UnknownRefusal) and await self._takes_another_row():
                    refusals += 1
                    if len(batch) > 1:
                        await self._deliver_halves(batch)
                        return
                    if refusals == _REFUSALS:
                        with contextlib.suppress(DatabaseError):
                            async with self._session_in_use:
                                await self._write_job_of(batch[0])
                        await self._refuse(batch[0], exc)
                        return
                    continue
                session = self._session
                if session is not None and not session.usable:
                    if isinstance(exc, ConnectionLost) and session.worked:
                        # Somebody closed it; whether the host is well, a new one tells.
                        log.debug("The connection is opened again: %s", exc)
                        self.retries += 1
                        continue
                    if not isinstance(exc, (TransactionAborted, TooMuch)):
                        self._database.failed(session.host)
                if self._refused and self._beside is not None and self._beside.adopt(batch):
                    self._server_works.set()
                    return
                await self._back_off(exc, attempt)
                attempt += 1
                if isinstance(exc, AnswerTimeout) and attempt > 1 and len(batch) > 1:
                    # The link may be too slow for so much at once.
                    await self._deliver_halves(batch)
                    return
                continue
            except _RowsFault as exc:
                if len(batch) > 1:
                    await self._deliver_halves(batch)
                    return
                await self._bury(batch[0], exc)
                return
            except Exception as exc:  # before or after the rows: nobody's fault
                self.faults += 1
                if self._session is not None:
                    self._session.close()
                log.exception("A batch cannot be written; trying again")
                await self._back_off(ServerUnavailable(f"a fault of ours: {type(exc).__name__}: {exc}"), attempt)
                attempt += 1
                continue
            self._faults_in_a_row = 0
            if self.failing and self._beside is None:
                log.warning("The database at %s takes rows again", self.server_host)
            self.failing = False
            self.away, self.committed_at = False, time.monotonic()
            dead = {item.seq: (item.reason, item.error) for item in batch if item.error}
            await self._settle(_settlement(batch, fates, dead))
            now = time.time()
            self.lags.extend(max(0.0, now - item.captured_at) for item in batch)
            return

    async def _deliver_halves(self, batch: list[Item]) -> None:
        middle = len(batch) // 2
        await self._deliver(batch[:middle])
        await self._deliver(batch[middle:])

    async def _refuse(self, item: Item, exc: DatabaseError) -> None:
        log.error("The database refuses an event, which goes to the dead letters: %s", exc)
        await self._settle(_settlement([item], {}, {item.seq: ("refused", str(exc))}))

    async def _takes_more_now(self) -> bool:
        """Whether somebody raised ``max_allowed_packet`` since our connection was opened; it is opened again then."""
        with contextlib.suppress(DatabaseError):
            async with self._session_in_use:
                session = await self._ready()
                takes_more = await session.takes_more()
                await session.rollback()
                if takes_more:
                    session.close()
                return takes_more
        return False

    async def _takes_another_row(self) -> bool:
        """Whether the server takes a return that nobody sent, which is rolled back. Tables where that cannot be done
        (MyISAM) are not asked."""
        for value in _HARMLESS:
            try:
                async with self._session_in_use:
                    session = await self._ready()
                    if self._shape is None or not self._shape.transactional:
                        return False
                    into = self._rows(session)
                    await into.begin()
                    with contextlib.suppress(RowsRejected):
                        await into.write([harmless(value, self.selection.master_id, with_event=self.store_events)])
                    await session.rollback()
                    await into.end()
            except DatabaseError as exc:
                log.debug("Another row is refused, too: %s", exc)
            else:
                return True
        return False

    async def _bury(self, item: Item, exc: _RowsFault) -> None:
        """An event that cannot be made a row, whatever it is, becomes a dead letter."""
        why = exc.__cause__ or exc
        self.faults += 1
        log.error("An event cannot be written, and goes to the dead letters", exc_info=why)
        if self._faults_in_a_row >= _FAULTS_AT_ONCE:
            fault = ServerUnavailable(f"a fault of ours, event after event: {type(why).__name__}: {why}")
            await self._back_off(fault, self._faults_in_a_row - _FAULTS_AT_ONCE)
        self._faults_in_a_row += 1
        await self._settle(_settlement([item], {}, {item.seq: ("fault", f"{type(why).__name__}: {why}")}))

    async def _settle(self, settlement: Settlement) -> None:
        self._server_works.set()
        if self._settling is not None:
            await asyncio.wait({self._settling})  # unlike `await`, does not cancel it with us
            self._settling.result()
        self._settling = asyncio.create_task(self._settle_soon(settlement), name="mysql_jobcache settle")
        self._settling.add_done_callback(lambda _: self._settled.set())

    async def _settle_soon(self, settlement: Settlement) -> None:
        await self._server_works.wait()  # a batch that is ready has cleared this by now
        try:
            await self._journalled(lambda: self._in_journal(self._journal.settle, settlement))
        except Exception:  # what it was about stays in the journal until the next start, and is written once more then
            self.faults += 1
            log.exception("What became of a batch cannot be put into the journal")
        self._large.settled(settlement.seqs)

    @property
    def _is_settled(self) -> bool:
        return self._settling is None or self._settling.done()

    async def _journalled(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Does ``work`` in the journal, as often as it takes: a full disk or a lock must not end the engine."""
        while True:
            try:
                return await work()
            except (sqlite3.Error, OSError, JournalError) as exc:
                self.fault = Fault(time.time(), f"the journal {self._journal.path}: {exc}")
                if self._said != self.fault.message:
                    log.error("The journal %s cannot be used: %s; trying on", self._journal.path, exc)
                    self._said, self._say_again_at = self.fault.message, 0.0
                await asyncio.sleep(_JOURNAL_RETRY_SECONDS)

    async def _back_off(self, exc: DatabaseError, attempt: int) -> None:
        self._server_works.set()
        self._note(exc)
        self.retries += 1
        self.failing = True
        self.away = isinstance(exc, ServerUnavailable)
        ceiling = min(_BACKOFF_FIRST[exc.verdict] * 2 ** min(attempt, 10), _BACKOFF_MAX)
        # A flush that is asked for ends the wait.
        await is_set_within(self._hurry, random.uniform(0, ceiling))  # noqa: S311 (no secret)
        self._hurry.clear()

    def _note(self, exc: DatabaseError) -> None:
        self.fault = Fault(time.time(), str(exc))
        if str(exc) == self._said and time.monotonic() < self._say_again_at:
            return
        self._said, self._say_again_at = str(exc), time.monotonic() + _SAY_AGAIN_SECONDS
        if self._beside is not None:  # which says the same
            return
        waiting = "events wait in the journal, nothing is lost"
        if isinstance(exc, OperatorNeeded):
            log.error("The database needs a person: %s (%s)", exc, waiting)
        else:
            log.warning("The database is not to be had: %s (%s)", exc, waiting)

    async def _write(self, batch: list[Item]) -> dict[str, int]:
        """One transaction. Gives the number of events by fate."""
        rows = [item for item in batch if isinstance(item.outcome, (Plain, Large, records.Record))]
        ignored: collections.Counter[str] = collections.Counter()
        if len(rows) < len(batch):
            ignored.update(
                f"ignored.{item.outcome.value}" for item in batch if isinstance(item.outcome, saltevent.Ignored)
            )
        if not rows:
            return dict(ignored)
        if not self.store_events and any(item.event_row for item in rows):  # from before the settings changed
            self.store_events, self.tables_known = True, False
        session = await self._ready()
        rows = [await self._large.fitted(item) for item in rows]
        into = self._rows(session)
        await into.begin()
        try:
            done = await into.write(rows)
            session.check_escapes()
            self._uncertain_through = max(self._uncertain_through, *(item.seq for item in rows))
            await session.commit()
        except RowsRejected:
            if session.usable:
                await session.rollback()
                await into.end()
            if len(rows) == 1:
                await self._write_job_of(rows[0])
            raise
        except DatabaseError:
            raise
        except Exception as exc:  # some row's fault, and not the server's: the batch is halved
            if session.usable:
                await session.rollback()
                await into.end()
            raise _RowsFault from exc
        await into.end()
        self.conflicts += done.conflicts
        if len(self._known_jobs) + len(into.jobs) > _MOST_KNOWN_JOBS:
            self._known_jobs.clear()
        recent = moments.jid_at(time.time() - _KNOWN_SECONDS)
        self._known_jobs.update(jid for jid in into.jobs if jid > recent)
        return {
            **ignored,
            "written": done.written,
            "duplicates": len(rows) - done.written,
            "trimmed": done.trimmed,
        }

    def _rows(self, session: Session) -> Rows:
        assert self._shape is not None
        return Rows(
            session,
            self._shape,
            master_id=self.selection.master_id,
            known_jobs=self._known_jobs,
            uncertain_through=self._uncertain_through,
            on_sending=self._server_works.set,
        )

    async def _write_job_of(self, item: Item) -> None:
        """A return that the database refuses takes its job not along: that has its row of ``jids`` all the same."""
        session = await self._ready()
        into = self._rows(session)
        await into.begin()
        try:
            await into.write_job_of(item)
            await session.commit()
        except RowsRejected as exc:
            log.debug("Its job is refused, too: %s", exc)
            if not session.usable:
                return
            await session.rollback()
        await into.end()

    async def _ready(self) -> Session:
        """The session, opened if need be, its tables looked at."""
        session = self._session
        if session is not None and session.idle_seconds > _PING_AFTER_SECONDS:
            try:
                await session.ping()
            except ConnectionLost as exc:
                log.debug("The idle connection was closed by the server: %s", exc)
        if session is not None and session.usable:
            session = await self._come_home(session)
        else:
            self._refused = True
            session = await self._use(await self._database.open())
            self._refused = False
        if not self.tables_known or asyncio.get_running_loop().time() >= self._look_at:
            self.tables_known = True  # somebody may say meanwhile that they changed
            try:
                created, self._shape = await schema.ensure(
                    session, create=self.create_tables, events=self.store_events, partitions=self.partitions
                )
            except BaseException:
                self.tables_known = False
                raise
            await session.rollback()  # MySQL would keep who changes a table waiting, if what comes next failed
            characters = min(self._shape.fun_characters, saltevent.MAX_FUN_CHARACTERS)
            self._large.fit = Fit(
                self._shape.alter_time,
                self._shape.failed,
                self._shape.utf8mb4,
                characters,
                self._shape.event_key,
                session.max_packet,
            )
            self._look_at = asyncio.get_running_loop().time() + LOOK_AT_TABLES_SECONDS
            self._say_if_old(session, self._shape)
            if created:
                log.warning("Created the tables %s in the database at %s", ", ".join(created), session.host)
            self._known_jobs.clear()  # somebody may have deleted them, too
        session.check_escapes()
        return session

    def _say_if_old(self, session: Session, shape: schema.Shape) -> None:
        wanted = {"jids", "salt_returns", "salt_events"} if self.store_events else {"jids", "salt_returns"}
        old = not (shape.unique >= wanted and shape.job_columns and shape.failed and shape.utf8mb4 and shape.bytewise)
        if old and not self._said_old:
            log.warning(
                "The tables at %s are of an older shape. They are written to as they are, slower than need be; "
                "`salt-run mysql_jobcache.schema` says what is missing, `mysql_jobcache.migrate` brings it",
                session.host,
            )
        self._said_old = old

    async def _use(self, session: Session) -> Session:
        await self._drop_probe()
        self._session = session
        self._at_home = self._database.is_first(session.host)
        self._home_at = asyncio.get_running_loop().time() + HOME_PROBE_SECONDS
        self.server_version, self.server_host = session.server_version, session.host
        self.tables_known = False
        return session

    async def _come_home(self, session: Session) -> Session:
        """The session on the first host of ``mysql.host`` once that takes rows again; it is tried beside our work."""
        now = asyncio.get_running_loop().time()
        if self._homeward is None:
            if not self._at_home and now >= self._home_at:
                self._home_at = now + HOME_PROBE_SECONDS
                self._homeward = asyncio.create_task(self._open_home(), name="mysql_jobcache first host")
            return session
        if not self._homeward.done():
            return session
        probe, self._homeward = self._homeward, None
        try:
            home = probe.result()
        except DatabaseError as exc:
            log.debug("The first database host cannot be gone back to: %s", exc)
            return session
        if home.idle_seconds > _PROBE_KEEPS_SECONDS:  # it waited long for this batch, and may be gone
            home.close()
            return session
        log.warning("The first database host %s takes rows again; going back to it from %s", home.host, session.host)
        session.close()
        return await self._use(home)

    async def _open_home(self) -> Session:
        session = await self._database.open_first()
        try:
            await schema.ensure(
                session, create=self.create_tables, events=self.store_events, partitions=self.partitions
            )
        except BaseException:
            session.close()
            raise
        return session

    async def _drop_probe(self) -> None:
        probe, self._homeward = self._homeward, None
        if probe is None:
            return
        probe.cancel()
        await asyncio.wait({probe}, timeout=1.0)  # before Python 3.12 wait_for() may swallow a cancellation
        if probe.done() and not probe.cancelled() and not probe.exception():
            probe.result().close()


def _settlement(batch: list[Item], fates: Mapping[str, int], dead: Mapping[int, tuple[str, str]]) -> Settlement:
    confirmed = {item.seq: item.confirmed for item in batch if item.seq in dead and item.confirmed is not None}
    return Settlement([item.seq for item in batch], fates, dead, confirmed)
