"""Verified returns: what the bus brought goes on to the tables once the master's own job cache holds it.

Any accepted minion can put another one's return on the bus, in a form that nothing marks. It cannot put
it into the job cache, which the master writes from its own request channel, a few milliseconds after
the event. So the writer takes events from here, not from the journal:

* what the cache holds goes on, and what goes on is what the cache holds;
* what it does not hold (yet) is put aside in the journal, holding nothing else up, and looked for again;
  after ``verify_wait_seconds`` it becomes a dead letter;
* while events wait for the database they are looked up ahead of the writer, because the cache forgets a job after
  ``keep_jobs_seconds`` and an outage may last longer. How far that came stands in the journal.

With verification off events go on as they are. Then, too, a value that Salt trimmed is looked for in
the cache, where it may be whole.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from . import jsontext, records
from .jobcache import JobCache, NoCache
from .journal import Entry, Journal
from .records import Ignored, Kind, Opened, Selection
from .unconfirmed import Waiting
from .waits import is_set_within

log = logging.getLogger(__name__)

_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.02, 0.1
_LOOK_EVENTS = 1000
_MAX_WAITING = 100_000
_AHEAD_SECONDS = 2.0
_AHEAD_AGE_SECONDS = 5.0
_AHEAD_ROWS, _AHEAD_BYTES = 500, 8 * 1024 * 1024
_LOG_LINES, _LOG_SECONDS = 20, 60.0
_KINDS_WITH_VALUES = (Kind.JOB_RETURN, Kind.RUNNER_RETURN, Kind.WHEEL_RETURN)

InThread = Callable[..., Awaitable[Any]]


class Checked(NamedTuple):
    """An event on its way to the tables; ``error``: why it could not be taken apart."""

    entry: Entry
    event: Opened | Ignored
    error: str = ""


class Verifier:
    """Between the journal and the writer.

    ``in_cache`` runs a function in a thread that may wait for the job cache's disk.
    """

    def __init__(
        self,
        journal: Journal,
        in_journal: InThread,
        cache: JobCache | None,
        in_cache: InThread,
        selection: Selection,
        *,
        on_confirmed: Callable[[int, int], None],
    ) -> None:
        self.selection = selection
        self.enabled = cache is not None
        self.wait_seconds = 10.0
        self.corrected = 0
        """Returns that said something else than the job cache, since the start."""
        self._journal = journal
        self._in_journal = in_journal
        self._cache = cache
        self._in_cache = in_cache
        self._on_confirmed = on_confirmed
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._some_wait = asyncio.Event()
        self._reading = asyncio.Lock()
        self._told: collections.deque[tuple[float, str]] = collections.deque(maxlen=_LOG_LINES)
        self._untold = 0

    @property
    def waiting(self) -> int:
        """Returns that wait for the job cache."""
        return len(self._waiting)

    async def read(self, *, after: int, rows: int, max_bytes: int) -> tuple[list[Entry | Checked], int, bool]:
        """The next events that may become rows, the ``seq`` up to which was read, and whether that was all there is.

        Raises:
            sqlite3.Error: the journal cannot be used now; the same call may be made again.
        """
        async with self._reading:
            entries = await self._in_journal(lambda: self._journal.read(after=after, rows=rows, max_bytes=max_bytes))
            checked, aside, _ = await self._check(entries)
            await self._put_aside(aside)
        last = entries[-1].seq if entries else after
        all_read = len(entries) < rows and sum(len(entry.body) for entry in entries) < max_bytes
        return checked, last, all_read

    async def run(self) -> None:
        """Looks again for what waits, and ahead of the writer while it is behind; until cancelled."""
        loop = asyncio.get_running_loop()
        ahead_at = loop.time() + _AHEAD_SECONDS
        remembered = False
        while True:
            try:
                if not remembered:
                    await self._remember()
                    remembered = True
                if self._waiting:
                    await self._look_again()
                if loop.time() >= ahead_at:
                    more = self.enabled and self._journal.pending > 0 and await self._look_ahead()
                    ahead_at = loop.time() + (_LOOK_SECONDS if more else _AHEAD_SECONDS)
            except sqlite3.Error as exc:
                log.debug("The journal cannot be used now: %s", exc)  # capture and writer say it
                await asyncio.sleep(_AHEAD_SECONDS)
            if self._waiting:
                await asyncio.sleep(_LOOK_SECONDS)
            else:
                self._some_wait.clear()
                if await is_set_within(self._some_wait, max(_LOOK_SECONDS, ahead_at - loop.time())):
                    await asyncio.sleep(_FIRST_LOOK_SECONDS)

    async def _remember(self) -> None:
        """What waited before a restart."""
        async with self._reading:
            here = {waiting.seq for waiting in self._waiting}
            stored: list[Waiting] = await self._in_journal(self._journal.waiting)
            self._waiting.extend(waiting for waiting in stored if waiting.seq not in here)

    async def _check(self, entries: list[Entry]) -> tuple[list[Entry | Checked], list[int], dict[int, bytes]]:
        """Entries that go on, the ``seq`` of those that do not yet, and new bytes of those that said something else.

        An entry goes on as it is where nobody had to look into it.
        """
        opened = [_open(entry) if self._may_need_look(entry) else entry for entry in entries]
        looked = [checked for checked in opened if isinstance(checked, Checked) and self._needs_look(checked)]
        if not looked:
            return opened, [], {}
        assert self._cache is not None
        # Half the time that a return has: what lacks a file that never comes must not become a dead letter for that.
        patience = self.wait_seconds / 2
        payloads = await self._in_cache(self._cache.confirm, [checked.event for checked in looked], patience)
        found: dict[int, dict[str, Any] | NoCache | None] = {
            checked.entry.seq: payload for checked, payload in zip(looked, payloads, strict=True)
        }
        going_on: list[Entry | Checked] = []
        aside: list[int] = []
        replaced: dict[int, bytes] = {}
        for checked in opened:
            if not isinstance(checked, Checked) or checked.entry.seq not in found:
                going_on.append(checked)
                continue
            seq, event = checked.entry.seq, checked.event
            assert isinstance(event, Opened)
            payload = found[seq]
            if isinstance(payload, NoCache):
                going_on.append(checked._replace(event=Ignored.NOCACHE) if self.enabled else checked)
            elif payload is None:
                aside.append(seq)
            elif _same(payload, event.data):
                going_on.append(checked)
            elif (body := records.try_pack(event.tag, payload)) is None:
                aside.append(seq)
            elif body == records.try_pack(event.tag, event.data):  # not a number is not equal to itself
                going_on.append(checked)
            else:
                self._note_difference(event)
                said = records.with_payload(event, payload)
                going_on.append(Checked(checked.entry._replace(body=body), said))
                replaced[seq] = body
        return going_on, aside, replaced

    def _may_need_look(self, entry: Entry) -> bool:
        return self._cache is not None and not entry.trusted and (self.enabled or records.may_be_trimmed(entry.body))

    def _needs_look(self, checked: Checked) -> bool:
        event = checked.event
        if not isinstance(event, Opened):
            return False
        if not self.enabled and not event.trimmed:
            return False
        # What becomes no row anyway is counted for its own reason.
        if self.selection.is_of_peer(event.data):
            return False
        # But for what lacks a key: the cache may have it, and a stranger's is kept as a dead letter.
        return records.refusal(event.job, event.data, self.selection) in (None, Ignored.MISSING_KEY)

    def _note_difference(self, event: Opened) -> None:
        assert event.job is not None
        if event.job.kind in _KINDS_WITH_VALUES and not event.trimmed:
            self.corrected += 1
            self._tell(event.job.jid, f"An event for jid {event.job.jid}, minion {event.job.minion!r} says something "
                       "else than the master's job cache, which is stored instead")  # fmt: skip

    async def _put_aside(self, seqs: list[int]) -> None:
        if not seqs:
            return
        now = time.time()
        self._waiting.extend(await self._in_journal(lambda: self._journal.wait(seqs, since=now)))
        self._some_wait.set()

    async def _look_again(self) -> None:
        """Looks for the next of those that wait; each comes round several times before its time is over."""
        some = [self._waiting.popleft() for _ in range(min(_LOOK_EVENTS, len(self._waiting)))]
        ended: set[int] = set()
        try:
            ended = await self._end_some(some)
        finally:
            self._waiting.extend(waiting for waiting in some if waiting.seq not in ended)

    async def _end_some(self, some: list[Waiting]) -> set[int]:
        """Ends the wait of those that the cache holds now, and of those whose time is over; gives their ``seq``."""
        now = time.time()
        too_many = len(self._waiting) > _MAX_WAITING
        over = {each.seq for each in some if too_many or abs(now - each.since) >= self.wait_seconds}
        there = await self._present(some)
        seqs = [each.seq for each in some if each.seq in there or each.seq in over]
        if not seqs:
            return set()
        bodies: dict[int, tuple[float, bytes]] = await self._in_journal(self._journal.bodies_of_waiting, seqs)
        checked, aside, _ = await self._check([Entry(seq, *bodies[seq]) for seq in bodies])
        entries = [each if isinstance(each, Entry) else each.entry for each in checked]
        confirmed = {entry.seq: entry.body for entry in entries}
        ignored = {
            each.entry.seq: each.event.value
            for each in checked
            if isinstance(each, Checked) and isinstance(each.event, Ignored) and not each.error
        }
        for seq in ignored:
            del confirmed[seq]
        hopeless = over.intersection(aside)
        dead: dict[int, str] = {}
        if self.enabled:
            dead = {each.seq: self._reason(each) for each in some if each.seq in hopeless}
        else:  # what Salt has trimmed is stored as it is
            confirmed.update({seq: bodies[seq][1] for seq in hopeless})
        again = await self._in_journal(
            lambda: self._journal.end_waiting(confirmed=confirmed, dead=dead, ignored=ignored)
        )
        if again:
            self._on_confirmed(again, sum(map(len, confirmed.values())))
        return {*confirmed, *dead, *ignored, *(seq for seq in seqs if seq not in bodies)}

    async def _present(self, some: list[Waiting]) -> set[int]:
        if self._cache is None:
            return {each.seq for each in some}
        present = await self._in_cache(self._cache.present, [(each.jid, each.minion) for each in some])
        return {each.seq for each, is_there in zip(some, present, strict=True) if is_there}

    def _reason(self, waiting: Waiting) -> str:
        what = f"the return of {waiting.minion!r}" if waiting.minion else "the job"
        self._tell(waiting.jid, f"The master's job cache does not hold {what} for jid {waiting.jid}: forged, or of "
                   "another master; it goes to the dead letters")  # fmt: skip
        return f"not in the master's job cache within {self.wait_seconds:g} s"

    async def _look_ahead(self) -> bool:
        """Confirms a step of what the writer will come to later; whether there is more."""
        async with self._reading:
            through = self._journal.verified_through
            entries: list[Entry] = await self._in_journal(
                lambda: self._journal.read(after=through, rows=_AHEAD_ROWS, max_bytes=_AHEAD_BYTES, take=False)
            )
            old = time.time() - _AHEAD_AGE_SECONDS
            entries = list(itertools.takewhile(lambda entry: entry.captured_at < old, entries))
            if not entries:
                return False
            _, aside, replaced = await self._check(entries)
            taken = self._journal.taken_through
            # A batch that the writer holds was confirmed already.
            await self._put_aside([seq for seq in aside if seq > taken])
            await self._in_journal(lambda: self._journal.verified(entries[-1].seq, replaced))
            return True

    def _tell(self, jid: str, message: str) -> None:
        """One line a jid, and not more than 20 a minute: the jids come from strangers."""
        now = time.monotonic()
        if any(jid == told for _, told in self._told):
            return
        if len(self._told) == _LOG_LINES and now < self._told[0][0] + _LOG_SECONDS:
            self._untold += 1
            return
        if self._untold:
            log.warning("%d more jobs had returns like those before", self._untold)
            self._untold = 0
        self._told.append((now, jid))
        log.warning(message)


def _open(entry: Entry) -> Checked:
    try:
        return Checked(entry, records.open_event(entry.body))
    except Exception as exc:
        log.exception("An event cannot be taken apart, and goes to the dead letters")
        return Checked(entry, Ignored.UNDECODABLE, f"{type(exc).__name__}: {exc}")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    try:
        return one == other
    except RecursionError:
        return jsontext.dumps(one) == jsontext.dumps(other)
