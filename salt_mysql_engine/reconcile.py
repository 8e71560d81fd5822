"""Reconcile: what the master's job cache holds and the tables do not is journalled, and takes the normal way.

It closes the one hole that any reader of the bus has: events published while nobody listened. A pass
follows every start and every gap on the bus, and comes round on a timer; it looks at the jobs whose
folder changed since the last complete pass began, newest first. A pass that an operator asks for looks
at everything, or at everything since a moment.

What is journalled says which job and minion, and when it was stored; the payload is made from the cache by whoever
verifies events (``verify.py``), as for an event of the bus. What is in the journal already is left alone, and so is
what the settings do not want. A pass needs the database; while that is away it waits, unless the job cache is about to
forget what nobody compared: then everything in it that the journal does not hold is journalled, and what turns out to
be there already is counted as duplicates.

Steps are small in jobs and in bytes, in a thread of their own, and wait while the journal has more to ship than a few
batches. Memory holds one round of folder names and one job's load at a time, however large the cache is.

The moment of the last pass is the wall clock's, as the times of files are. One that lies in the future stands for no
pass at all, and a clock that was set back since widens the next pass by as much.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

from . import jobload, jsontext, moments, saltevent, sql
from .errors import DatabaseError
from .jobcache import Folder, Job, JobCache, is_made_up
from .journal import Journal
from .journalfile import STUB, NewEvent
from .records import Selection
from .waits import is_set_within

log = logging.getLogger(__name__)

SETTLE_SECONDS = 3.0
"""After a start or a gap: by then the events that are on their way are journalled, and their copies written."""
_SECOND_LOOK_SECONDS = 45.0
_OVERLAP_SECONDS = 120.0
_ROUND_FOLDERS = 20_000
_STEP_JOBS, _STEP_RETURNS = 50, 1000
_STEP_BYTES = 8 * 1024 * 1024
_APPEND_EVENTS = 500
_ROOM_SECONDS = 0.2
_MAX_PENDING = 5_000
_RETRY_FIRST, _RETRY_MAX = 5.0, 60.0  # seconds
_MARK = "reconciled_at"
_DAY = 86_400.0

InThread = Callable[..., Awaitable[Any]]
Ask = Callable[[bytes], Awaitable[list[tuple[Any, ...]]]]
"""Gives the rows of a query."""


class Pass(NamedTuple):
    """A pass as far as it came. Times in seconds since the epoch."""

    reason: str
    since: float
    started_at: float
    seconds: float = 0.0
    jobs: int = 0
    returns: int = 0
    """Looked at."""
    loads_added: int = 0
    returns_added: int = 0
    unreadable: int = 0
    total_jobs: int = 0
    """In this round; a cache of more than 20,000 changed jobs takes several."""
    error: str = ""
    """Why it has to begin again."""

    def report(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            **self._asdict(),
            "since": moments.text(self.since) if self.since else None,
            "started_at": moments.text(self.started_at),
            "seconds": round(self.seconds, 3),
        }


class _Found(NamedTuple):
    """What a folder may have to offer; of a job that comes in parts, the first one offers its publish."""

    job: Job
    minions: list[str]
    publish: bool = True


class Reconciler:
    """Runs passes, one at a time.

    ``ask_database`` asks on the writer's session, between two batches: a user that may have no second one is served
    too, and nobody waits for a session that a pass holds. ``on_append`` is told of what is journalled, as capture's is.
    """

    def __init__(
        self,
        journal: Journal,
        in_journal: InThread,
        cache: JobCache,
        in_cache: InThread,
        ask_database: Ask,
        selection: Selection,
        *,
        keep_seconds: float,
        on_append: Callable[[int, int], None],
    ) -> None:
        self.selection = selection
        self.interval = 600.0
        """Seconds between passes of the timer; 0 for none."""
        self.verifies = True
        """Whether an event of the bus is a row only once the job cache holds it."""
        self.retention_days = 0.0
        """Older jobs (0: none) were deleted from the tables, and stay away."""
        self.passes = 0
        self.now: Pass | None = None
        self.last: Pass | None = None
        self._journal = journal
        self._in_journal = in_journal
        self._cache = cache
        self._in_cache = in_cache
        self._ask_database = ask_database
        self._blind_after = keep_seconds / 2
        self._clocks = time.time(), time.monotonic()
        """Of the last complete pass, or of the start."""
        self._on_append = on_append
        self._oldest = ""
        """Jobs of before it were deleted: by the clock of the pass's mark, which tells later whether that was ahead."""
        self._asked: dict[str, float | None] = {"start": None}
        self._news = asyncio.Event()
        self._news.set()
        self._some_being_written = False

    def ask(self, reason: str, since: float | None = None) -> None:
        """A pass as soon as may be: ``since`` a moment (seconds since the epoch), or since the last one (``None``)."""
        self._asked[reason] = since
        self._news.set()

    def ask_after_gap(self) -> None:
        """A pass now, and one later: a bus that begins anew may still swallow what the master's workers send first."""
        self.ask("a gap on the bus")
        self._ask_later("a gap a while ago")

    def _ask_later(self, reason: str) -> None:
        asyncio.get_running_loop().call_later(_SECOND_LOOK_SECONDS, self.ask, reason)

    async def run(self) -> None:
        """Passes, when asked for and on the timer; until cancelled."""
        while True:
            if not await is_set_within(self._news, self.interval or None):
                self._asked.setdefault("timer", None)
            self._news.clear()
            if not self._asked:
                continue
            await asyncio.sleep(SETTLE_SECONDS)
            asked, self._asked = self._asked, {}
            await self._pass(asked)

    def retime(self, interval: float) -> None:
        """A new interval counts from now."""
        if interval != self.interval:
            self.interval = interval
            self._news.set()

    async def _pass(self, asked: dict[str, float | None]) -> None:
        reason = ", ".join(asked)
        delay = _RETRY_FIRST
        while True:
            began, began_monotonic = time.time(), time.monotonic()
            self.now = Pass(reason, 0.0, began, error="" if self.now is None else self.now.error)
            try:
                mark = await self._in_journal(self._journal.mark, _MARK)
                usual = 0.0 if mark is None or mark > began else max(0.0, mark - _OVERLAP_SECONDS - self._set_back())
                since = min(usual if given is None else given for given in asked.values())
                self.now = self.now._replace(since=since)
                self._oldest = moments.jid_at(began - self.retention_days * _DAY) if self.retention_days else ""
                # By the mark too, since the engine may have been restarted in between.
                last = max(time.monotonic() - self._clocks[1], began - mark if mark is not None else 0.0)
                await self._compare_all(since, blind=last > self._blind_after)
                if since <= usual:
                    await self._in_journal(self._journal.set_mark, _MARK, began)
                    self._clocks = began, began_monotonic
                break
            except Exception as exc:  # whatever it is, what was asked for is still to be done
                if isinstance(exc, (DatabaseError, sqlite3.Error)):
                    log.debug("Reconciling is put off: %s", exc)
                elif self.now.error != str(exc):  # a fault of ours: what was asked for is tried again all the same
                    log.exception("Reconciling met what nobody expects; it begins again")
                self.now = self.now._replace(error=str(exc))
                await asyncio.sleep(delay)
                delay = min(2 * delay, _RETRY_MAX)
                # What was asked for meanwhile belongs to the same pass.
                more, self._asked = self._asked, {}
                asked = {**asked, **more}
                reason = ", ".join(asked)
        self.last, self.now = self.now._replace(error="", seconds=time.time() - began), None
        self.passes += 1
        if self._some_being_written:
            self._some_being_written = False
            self._ask_later("files that were being written")
        added = self.last.loads_added + self.last.returns_added
        if added:
            log.warning(
                "The job cache had %d jobs and %d returns that the database did not; they are journalled now (%s)",
                self.last.loads_added, self.last.returns_added, reason,
            )  # fmt: skip

    def _set_back(self) -> float:
        """By how many seconds the wall clock was set back since the last complete pass."""
        wall, monotonic = self._clocks
        return max(0.0, (time.monotonic() - monotonic) - (time.time() - wall))

    async def _compare_all(self, since: float, *, blind: bool) -> None:
        ask: Ask | None = self._ask_database
        try:
            await self._ask_database(b"SELECT 1")
        except DatabaseError:
            if not blind:
                raise
            ask = None
        before: Folder | None = None
        while True:
            folders: list[Folder] = await self._in_cache(
                lambda before=before: self._cache.folders(since=since, before=before, most=_ROUND_FOLDERS)
            )
            if not folders:
                return
            self._note(total_jobs=len(folders))
            for start in range(0, len(folders), _STEP_JOBS):
                began = time.monotonic()
                found, returns = await self._in_cache(self._look, folders[start : start + _STEP_JOBS])
                for some in _portions(found):
                    await self._compare(ask, some)
                self._note(jobs=len(found), returns=returns)
                # Half of the time is everybody else's.
                await asyncio.sleep(min(0.1, time.monotonic() - began))
            before = folders[-1]

    def _look(self, folders: list[Folder]) -> tuple[list[_Found], int]:
        """The jobs in some folders that the settings want."""
        found = []
        for folder in folders:
            try:
                job = self._cache.job(folder)
                if job is not None and self._wants(job):
                    found.append(_Found(job, sorted(job.returned)))
                elif job is not None and job.fun is None and job.returned:
                    self._note(unreadable=1)
            except Exception:  # whatever strangers made the master store, the next job must be looked at
                log.exception("The job cache's folder %s cannot be used", folder.name)
                self._note(unreadable=1)
        return found, sum(len(each.minions) for each in found)

    def _wants(self, job: Job) -> bool:
        if job.jid < self._oldest:
            return False
        return self._wants_function(job) or self._may_be_own(job)

    def _wants_function(self, job: Job) -> bool:
        return saltevent.is_function(job.fun) and not self.selection.skips(job.fun)

    def _may_be_own(self, job: Job) -> bool:
        """Whether the master may have run it itself, and the load is a minion's, who returned to it before its end."""
        is_known = job.is_publish or saltevent.master_kind(job.fun) is not None
        return not is_known and self.selection.master_id in job.returned

    def _wants_return(self, job: Job, minion: str) -> bool:
        is_masters = minion == self.selection.master_id
        kind = saltevent.master_kind(job.fun) if is_masters else None
        if kind is None:
            return is_masters or self._wants_function(job)
        return self.selection.wants_job(saltevent.Tag(kind, job.jid, ""))

    async def _compare(self, ask: Ask | None, some: list[_Found]) -> None:
        jids = [found.job.jid for found in some]
        known: set[tuple[str, str]] = await self._in_journal(
            functools.partial(self._journal.known, jids, unchecked=not self.verifies)
        )
        publishes = [found.job for found in some if found.publish and found.job.is_publish]
        publishes = [job for job in publishes if (job.jid, "") not in known]
        stored_sizes: dict[str, int] = {}
        if ask is not None:
            keys = [(found.job.jid, minion) for found in some for minion in found.minions]
            for statement in sql.select_returned(keys):
                known.update(await ask(statement))
            if publishes:
                stored_sizes = dict(await ask(sql.select_load_sizes(job.jid for job in publishes)))
        for portion in _by_size(publishes, stored_sizes):
            loads: dict[str, str] = {}
            if ask is not None and any(job.jid in stored_sizes for job in portion):
                loads = dict(await ask(sql.select_stored_loads(job.jid for job in portion)))
            await self._journal_all(ask, await self._in_cache(self._missing_publishes, portion, loads))
        await self._journal_all(ask, await self._in_cache(self._missing_returns, some, known))

    async def _journal_all(self, ask: Ask | None, events: list[NewEvent]) -> None:
        for start in range(0, len(events), _APPEND_EVENTS):
            some = events[start : start + _APPEND_EVENTS]
            await self._make_room(may_wait=ask is not None)
            append = functools.partial(self._journal.append, some, may_wait=True)
            while not await self._in_journal(append):  # noqa: ASYNC110 (a thread's)
                await asyncio.sleep(_ROOM_SECONDS)  # the journal is full, and nothing of ours is urgent
            self._on_append(len(some), sum(len(event.body) for event in some))
            returns = sum(bool(event.minion) for event in some)
            self._note(returns_added=returns, loads_added=len(some) - returns)

    async def _make_room(self, *, may_wait: bool) -> None:
        """Waits while the writer has enough to do."""
        while may_wait and self._journal.pending > _MAX_PENDING:  # noqa: ASYNC110 (a thread's)
            await asyncio.sleep(_ROOM_SECONDS)

    def _missing_publishes(self, jobs: list[Job], loads: dict[str, str]) -> list[NewEvent]:
        """The publishes that say more than the stored loads."""
        events: list[NewEvent] = []
        for job in jobs:
            try:
                if not self._is_being_written(job, "") and _says_more(self._cache.publish(job.jid), loads.get(job.jid)):
                    now = time.time()
                    events.append(NewEvent(now, job.jid, "", saltevent.stub(job.jid, "", now), STUB))
            except Exception:  # whatever strangers made the master store, the next job must be looked at
                log.exception("The publish of jid %s in the job cache cannot be used", job.jid)
                self._note(unreadable=1)
        return events

    def _missing_returns(self, some: list[_Found], known: set[tuple[str, str]]) -> list[NewEvent]:
        """The returns that nobody has."""
        events: list[NewEvent] = []
        for job, minions, _ in some:
            for minion in minions:
                if (job.jid, minion) in known or not self._wants_return(job, minion):
                    continue
                try:
                    if self._is_being_written(job, minion):
                        continue
                    stored_at = self._cache.stored_at(job.jid, minion)
                except OSError as exc:
                    log.error("The return of %r for jid %s cannot be looked for: %s", minion, job.jid, exc)
                    stored_at = None
                if stored_at is None:
                    self._note(unreadable=1)
                elif job.is_publish or not is_made_up(job.jid, stored_at):
                    body = saltevent.stub(job.jid, minion, stored_at)
                    events.append(NewEvent(time.time(), job.jid, minion, body, STUB))
        return events

    def _is_being_written(self, job: Job, minion: str) -> bool:
        """Whether it is too early to look: the bus has likely brought it when the next pass comes round."""
        is_it = self._cache.is_being_written(job, minion, patience=SETTLE_SECONDS)
        self._some_being_written |= is_it
        return is_it

    def _note(self, *, total_jobs: int | None = None, **more: int) -> None:
        assert self.now is not None
        changes = {name: getattr(self.now, name) + count for name, count in more.items()}
        if total_jobs is not None:
            changes["total_jobs"] = self.now.jobs + total_jobs
        self.now = self.now._replace(seconds=time.time() - self.now.started_at, **changes)


def _portions(found: list[_Found]) -> Iterator[list[_Found]]:
    """Jobs with at most 1,000 returns together; a larger job comes in several parts."""
    portion: list[_Found] = []
    room = _STEP_RETURNS
    for job, minions, _ in found:
        for start in range(0, max(1, len(minions)), _STEP_RETURNS):
            part = minions[start : start + _STEP_RETURNS]
            if portion and len(part) > room:
                yield portion
                portion, room = [], _STEP_RETURNS
            portion.append(_Found(job, part, publish=start == 0))
            room -= len(part)
    if portion:
        yield portion


def _by_size(jobs: list[Job], sizes: dict[str, int]) -> Iterator[list[Job]]:
    """Jobs whose stored loads are 8 MiB together, or one that is larger."""
    portion: list[Job] = []
    size = 0
    for job in jobs:
        if portion and size + sizes.get(job.jid, 0) > _STEP_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(job)
        size += sizes.get(job.jid, 0)
    if portion:
        yield portion


def _says_more(publish: dict[str, Any] | None, stored: str | None) -> bool:
    """Whether a job's publish is a row, and holds what the stored load does not."""
    published = None if publish is None else jobload.published_load(publish)
    if published is None or stored is None:
        return published is not None
    try:
        load = json.loads(stored)
    except (ValueError, RecursionError):  # someone else's row
        return False
    return jsontext.dumps(jobload.merged_load(load, published)) != stored
