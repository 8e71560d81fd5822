"""Verified returns: what the bus brought goes on to the tables once the master's own job cache holds it.

Any accepted minion can put another one's return on the bus, in a form that nothing marks. It cannot put
it into the job cache, which the master writes from its own request channel, a few milliseconds after
the event. So the writer takes events from here, not from the journal:

* what the cache holds goes on, and its payload is what the cache holds, whatever the event said; every rule (which
  functions are skipped, what is a row) is asked of that payload;
* what it does not hold (yet) stays in the journal, is passed over, and is looked for again; after
  ``verify_wait_seconds`` it becomes a dead letter;
* while events wait for the database they are looked up ahead of the writer, because the cache forgets a job after
  ``keep_jobs_seconds`` and an outage may last longer. Each confirmed event is marked so in the journal, with its
  payload; one that will be no row leaves the journal at once, counted.

What is deferred is known in memory alone: after a restart everything unchecked is looked for anew, and its time
begins again. Waits are measured by a clock that nobody sets.

With verification off events go on as they are. Then, too, a value that Salt trimmed is looked for in
the cache, where it may be whole.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import hashlib
import itertools
import logging
import math
import sqlite3
import time
from collections.abc import Awaitable, Callable, Container, Iterable
from typing import Any, NamedTuple

from . import decoder, records, saltevent
from .items import Item
from .jobcache import Answer, JobCache, NotAsked, TooLarge, Unreadable
from .journal import Entry, Journal, Settlement
from .journalfile import CONFIRMED, STUB
from .large import LargeEvents, is_large, too_large
from .records import Selection
from .saltevent import Ignored, Kind, Opened
from .waits import Breath, is_set_within

log = logging.getLogger(__name__)

_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.02, 0.1
_LOOK_GROWTH = 1.6
"""So much longer is each pause between two looks: what comes late is found late by as much as half of that again."""
_MOST_GROWTH = 50
_LOOK_EVENTS = 1000
_LOOK_BYTES = 8 * 1024 * 1024
_AT_A_TIME_SECONDS = 0.01
_MAX_DEFERRED = 100_000
_MOST_KEPT = 10_000
_STAMP_KEY = b"\xa6_stamp"
"""Behind this is what of a publish comes from its event."""
_CROWDED_SECONDS = 1.0
"""For so long one waits when so many wait that nothing more is read."""
_AHEAD_SECONDS = 2.0
_AHEAD_AGE_SECONDS = 5.0
_AHEAD_ROWS, _AHEAD_BYTES = 500, 8 * 1024 * 1024
_LOG_LINES, _LOG_SECONDS = 20, 60.0
_STARTS = (Kind.RUNNER_NEW, Kind.WHEEL_NEW)
"""Their returns say all that they say. 3006 and 3007 store nothing of such a job before its end, so nobody waits."""
_KINDS_WITH_VALUES = (Kind.JOB_RETURN, Kind.RUNNER_RETURN, Kind.WHEEL_RETURN)
_VALUES = ("retcode", "success", "out", "fun", "fun_args", "user")
_SUB_EVENT = ("state.highstate", "state.sls")
_ADDED = frozenset({"retcode", "jid", "id", "success", "return", "fun", "user", "_stamp"})
"""What the master writes into the states of these functions."""

InThread = Callable[..., Awaitable[Any]]


class Checked(NamedTuple):
    """An event on its way to the tables; ``error``: why it could not be taken apart."""

    entry: Entry
    event: Opened | Ignored
    error: str = ""
    reason: str = "fault"
    """Of the dead letter."""


class Deferred(NamedTuple):
    """An event that the job cache does not hold yet; ``since`` and ``due`` on the monotonic clock."""

    seq: int
    jid: str
    minion: str
    since: float
    looks: int = 0
    """How often it was looked for since then."""
    due: float = 0.0
    """When it is looked for next."""


class _Look(NamedTuple):
    """What a look into the job cache found out about some entries.

    ``going_on`` keeps their order. ``absent`` are those that it does not hold (yet), ``unknown`` those of which it
    cannot be asked now, ``left_over`` those of which it was not asked, having read enough; ``large`` those for which it
    holds a file too large to be read here, and its size.
    """

    going_on: list[Entry | Checked]
    absent: list[Checked]
    unknown: list[Checked]
    left_over: list[Checked]
    large: list[tuple[Entry, int]]


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
        large: LargeEvents,
    ) -> None:
        self.selection = selection
        self.enabled = cache is not None
        self.wait_seconds = 10.0
        self.corrected = 0
        """Returns that said something else than the job cache, since the start."""
        self.trouble = ""
        """Why the job cache cannot be read now."""
        self._journal = journal
        self._in_journal = in_journal
        self._cache = cache
        self._in_cache = in_cache
        self._on_confirmed = on_confirmed
        self._large = large
        large.on_looked = self._end_large
        self._looked_for: dict[int, Deferred] = {}
        """Of what was deferred, that which the decoder looks for now."""
        self._deferred: dict[int, Deferred] = {}
        self._by_looks: dict[int, collections.deque[Deferred]] = {}
        """The same, by how often they were looked for, each in the order in which they are due; some were moved on."""
        self._again: collections.deque[int] = collections.deque()
        """Events that the writer has passed and can have now: confirmed ones, and those that were left over."""
        self._ahead = 0
        """Every event up to this ``seq`` was looked up ahead of the writer."""
        self._kept: dict[bytes, int] = {}
        """Of rows, by their tags, the event in the journal that was confirmed last."""
        self._some_wait = asyncio.Event()
        self._reading = asyncio.Lock()
        self._told: collections.deque[tuple[float, str]] = collections.deque(maxlen=_LOG_LINES)
        self._untold = 0

    @property
    def waiting(self) -> int:
        """Events that wait for the job cache."""
        return len(self._deferred) + len(self._looked_for)

    @property
    def deferred(self) -> Container[int]:
        """The same by their ``seq``: the writer is not behind with these."""
        return {*self._deferred, *self._looked_for}

    async def read(self, *, after: int, rows: int, max_bytes: int) -> tuple[list[Entry | Checked | Item], int, bool]:
        """The next events that may become rows, the ``seq`` up to which was read, and whether that was all there is.

        Raises:
            sqlite3.Error: the journal cannot be used now; the same call may be made again.
        """
        async with self._reading:
            if self._again:
                return await self._read_again(rows, max_bytes), after, False
            if len(self._deferred) >= _MAX_DEFERRED:
                return [], after, True
            entries: list[Entry] = await self._in_journal(
                lambda: self._journal.read(after=after, rows=rows, max_bytes=max_bytes)
            )
            look = await self.look_at(await self._small(entries))
            self._defer(look)
            self._again.extend(each.entry.seq for each in look.left_over)
        last = entries[-1].seq if entries else after
        all_read = len(entries) < rows and sum(len(entry.body) for entry in entries) < max_bytes and not self._again
        return [*look.going_on], last, all_read

    async def _small(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those to be looked at here, and now; the others get into line."""
        small: list[Entry] = []
        for entry in entries:
            if entry.seq in self._deferred or entry.seq in self._large:
                continue
            if not is_large(entry):
                small.append(entry)
            elif entry.state == CONFIRMED or (self._cache is None and entry.state != STUB):
                self._large.make(entry.seq)
            else:
                self._look_for_large(await self._with_tag(entry))
        return small

    async def _with_tag(self, entry: Entry) -> Entry:
        if not entry.size:
            return entry
        return entry._replace(body=await self._in_journal(self._journal.part_of, entry.seq, 0, saltevent.MAX_TAG_BYTES))

    def _look_for_large(self, entry: Entry) -> None:
        """The decoder opens a large event when the job cache holds something of it. To open one takes its time, and
        strangers may send any number: theirs are opened when their time is over, and nothing else is in line."""
        tag = saltevent.parse_tag(_tag_of(entry.body).decode(errors="replace"))
        if not self.enabled or entry.state == STUB or tag is None:
            self._look_for(entry, self.wait_seconds / 2)
        elif tag.kind in _STARTS:
            self._look_for(entry, self.wait_seconds / 2, is_last=True)
        else:
            self._put_off(self._deferred_of(entry.seq, tag, time.monotonic()))
            self._some_wait.set()

    def _look_for(self, entry: Entry, patience: float, *, is_over: bool = False, is_last: bool = False) -> None:
        alone = self._row_of(entry.body) is None
        self._large.look_for(entry, patience, is_over=is_over, alone=alone, is_last=is_last)

    def _row_of(self, body: bytes) -> bytes | None:
        """The tag of an event, where all events of this tag make one row: all are made of the job cache's files.

        Not where each has a row of events, too, nor where what is made of it is the event's own word.
        """
        tag = _tag_of(body)
        text = tag.decode(errors="replace")
        is_row = self.enabled and saltevent.parse_tag(text) is not None and not self.selection.wants_event(text)
        return tag if is_row else None

    async def _end_large(self, entry: Entry, answer: decoder.Answer, is_over: bool, others: list[int]) -> None:
        """What the job cache has of a large event; of that ``entry`` has the tag. The same is true of ``others``."""
        async with self._reading:
            seq, (said, *more) = entry.seq, answer.said
            deferred = self._looked_for.pop(seq, None)
            for other in others:
                self._looked_for.pop(other, None)
            if said in ("absent", "unknown"):
                await self._end_large_wait(entry, deferred, is_unknown=said == "unknown", is_over=is_over)
            elif said == "confirmed":
                self.corrected += more[0]
                again = await self._settle({seq: answer.body}, {}, {}, again=others)
                if seq not in again and seq <= self._journal.taken_through:
                    self._large.make(seq)
            elif said == "ignored":
                await self._settle({}, dict.fromkeys([seq, *others], more[0]), {})
            else:
                await self._settle({}, {}, dict.fromkeys([seq, *others], (more[0], more[1])))
        self._on_confirmed(0, 0)

    async def _end_large_wait(
        self, entry: Entry, deferred: Deferred | None, *, is_unknown: bool, is_over: bool
    ) -> None:
        now = time.monotonic()
        event = saltevent.opened(entry.body.partition(saltevent.SEPARATOR)[0].decode(errors="replace"), {})
        if deferred is None:
            assert event.job is not None
            deferred = self._deferred_of(entry.seq, event.job, now)
        if is_unknown:
            deferred = deferred._replace(since=now, looks=0)
        elif is_over and not self.enabled and entry.state != STUB:  # what Salt has trimmed is stored as it is
            self._large.make(entry.seq)
            return
        self._put_off(deferred)
        self._some_wait.set()
        if is_over and not is_unknown:
            await self._end_some(_Look([], [Checked(entry, event)], [], [], []), {entry.seq})

    async def _read_again(self, rows: int, max_bytes: int) -> list[Entry | Checked | Item]:
        seqs = list(itertools.islice(self._again, rows))
        entries, looked = await self._in_journal(self._journal.read_these, seqs, max_bytes)
        look = await self.look_at(await self._small(entries))
        for _ in range(looked):
            self._again.popleft()
        self._defer(look)
        self._again.extendleft(each.entry.seq for each in reversed(look.left_over))
        return [*look.going_on]

    async def run(self) -> None:
        """Looks again for what waits, and ahead of the writer while it is behind; until cancelled."""
        loop = asyncio.get_running_loop()
        ahead_at = loop.time() + _AHEAD_SECONDS
        while True:
            more = False
            try:
                if self._deferred:
                    more = await self._look_again()
                if loop.time() >= ahead_at:
                    is_behind = self._cache is not None and self._journal.pending > 0 and await self._look_ahead()
                    ahead_at = loop.time() + (_LOOK_SECONDS if is_behind else _AHEAD_SECONDS)
            except sqlite3.Error as exc:
                log.debug("The journal cannot be used now: %s", exc)  # capture and writer say it
                await asyncio.sleep(_AHEAD_SECONDS)
            if self._deferred:
                await asyncio.sleep(_FIRST_LOOK_SECONDS if more else self._pause())
            else:
                self._some_wait.clear()
                if await is_set_within(self._some_wait, max(_LOOK_SECONDS, ahead_at - loop.time())):
                    await asyncio.sleep(_FIRST_LOOK_SECONDS)

    def _pause(self) -> float:
        """Until the next of those that wait is due."""
        due = min((line[0].due for line in self._by_looks.values() if line), default=0.0)
        return min(max(due - time.monotonic(), _FIRST_LOOK_SECONDS), _LOOK_SECONDS)

    async def look_at(self, entries: Iterable[Entry], patience: float | None = None) -> _Look:
        """Which entries go on, and as what. An entry goes on as it is where nobody had to look into it.

        ``patience``: for how many seconds a file that does not come is taken for one that is being written.
        """
        opened: list[Entry | Checked] = []
        breath = Breath(_AT_A_TIME_SECONDS)
        for entry in entries:
            opened.append(self._opened(entry) if self._may_need_look(entry) else entry)
            await breath.taken()
        looked = [each for each in opened if isinstance(each, Checked) and self._needs_look(each)]
        if not looked:
            return _Look(opened, [], [], [], [])
        # Half the time that an event has: what lacks a file that never comes must not become a dead letter for that.
        patience = self.wait_seconds / 2 if patience is None else patience
        answers = await self._ask([each.event for each in looked if isinstance(each.event, Opened)], patience)
        found = {each.entry.seq: answer for each, answer in zip(looked, answers, strict=True)}
        look = _Look([], [], [], [], [])
        for each in opened:
            await breath.taken()
            if not isinstance(each, Checked) or each.entry.seq not in found:
                look.going_on.append(each)
                continue
            answer = found[each.entry.seq]
            confirmed = self._confirmed(each, answer) if isinstance(answer, Opened) else None
            if confirmed is not None:
                look.going_on.append(confirmed)
            elif isinstance(answer, Ignored):
                may_go_on = not self.enabled and each.entry.state != STUB
                look.going_on.append(each if may_go_on else each._replace(event=answer))
            elif isinstance(answer, TooLarge):
                look.large.append((each.entry, answer.size))
            elif isinstance(answer, Unreadable):
                look.unknown.append(each)
            elif isinstance(answer, NotAsked):
                look.left_over.append(each)
            elif isinstance(each.event, Opened) and each.event.job is not None and each.event.job.kind in _STARTS:
                look.going_on.append(self._no_job(each, Ignored.UNCONFIRMED_START))
            else:
                look.absent.append(each)
        return look

    async def _ask(self, events: list[Opened], patience: float) -> list[Answer]:
        if self._cache is None:
            return [None] * len(events)
        confirm = functools.partial(
            self._cache.confirm, max_bytes=self._large.file_bytes, leaves_out=self.selection.leaves_out
        )
        answers: list[Answer] = await self._in_cache(confirm, events, patience)
        trouble = next((answer.error for answer in answers if isinstance(answer, Unreadable)), "")
        if trouble and not self.trouble:
            log.error("%s. Events wait in the journal until it can be read.", trouble)
        elif self.trouble and not trouble:
            log.warning("The job cache can be read again")
        self.trouble = trouble
        return answers

    def _confirmed(self, checked: Checked, event: Opened) -> Checked | None:
        """An entry with the payload that the job cache has; ``None`` where that cannot be packed."""
        try:
            return self._with_payload(checked, event)
        except Exception as exc:  # whatever strangers made the master store, the next event must be looked at
            log.exception("An event cannot be compared with the job cache, and goes to the dead letters")
            return checked._replace(event=Ignored.UNDECODABLE, error=f"{type(exc).__name__}: {exc}")

    def _with_payload(self, checked: Checked, event: Opened) -> Checked | None:
        body = saltevent.try_pack(event.tag, event.data)
        if body is None:
            return None
        if body == checked.entry.body:
            return checked._replace(entry=checked.entry._replace(state=CONFIRMED))
        self._note_difference(checked, event)
        if saltevent.may_be_trimmed(body):
            event = event._replace(trimmed=saltevent.is_trimmed(event.data.get("return")))
        refused = records.refusal(event.job, event.data, self.selection)
        return Checked(checked.entry._replace(body=body, state=CONFIRMED), refused or event)

    def _may_need_look(self, entry: Entry) -> bool:
        if entry.state == CONFIRMED:
            return False
        if entry.state == STUB:
            return True
        return self._cache is not None and (self.enabled or saltevent.may_be_trimmed(entry.body))

    def _opened(self, entry: Entry) -> Checked:
        """An entry taken apart. Whatever is in it, it makes one dead letter at most."""
        try:
            return self._sure(Checked(entry, saltevent.open_event(entry.body)))
        except saltevent.TooManyObjects:
            raise
        except Exception as exc:  # whatever strangers sent, the next event must be looked at
            log.exception("An event cannot be taken apart, and goes to the dead letters")
            return Checked(entry, Ignored.UNDECODABLE, f"{type(exc).__name__}: {exc}")

    def _sure(self, checked: Checked) -> Checked:
        """What is no row of a job by its own words stays none, whatever the settings are by the time it is written."""
        event = checked.event
        if isinstance(event, Opened) and checked.entry.state == STUB:
            size, most = event.data.get(saltevent.TOO_LARGE, 0), self._large.max_bytes
            if size and (size > most or event.job is None):
                return Checked(checked.entry, Ignored.TOO_LONG, too_large(size, most), "too_large")
        if not isinstance(event, Opened) or checked.entry.state == STUB or not self.enabled:
            return checked
        if self.selection.is_of_peer(event.data):
            return checked._replace(event=Ignored.PEER)
        refused = records.refusal(event.job, event.data, self.selection)
        # What lacks a key is looked for: the cache may have it, and a stranger's is kept as a dead letter.
        if refused in (None, Ignored.MISSING_KEY):
            return checked
        return self._no_job(checked, refused)

    def _no_job(self, checked: Checked, why: Ignored) -> Checked:
        """An entry that is no row of a job; it may be one of events."""
        event = checked.event
        if isinstance(event, Opened) and (event.chosen or self.selection.wants_event(event.tag)):
            return checked._replace(event=event._replace(job=None, chosen=True))
        return checked._replace(event=why)

    def _needs_look(self, checked: Checked) -> bool:
        event = checked.event
        if not isinstance(event, Opened) or event.job is None:
            return False
        return self.enabled or event.trimmed or checked.entry.state == STUB

    def _note_difference(self, checked: Checked, event: Opened) -> None:
        said = checked.event
        if checked.entry.state == STUB or not isinstance(said, Opened) or said.trimmed:
            return
        if event.job is None or event.job.kind not in _KINDS_WITH_VALUES:
            return
        if _is_same(said.data, event.data):
            return
        self.corrected += 1
        self._tell(event.job.jid, f"An event for jid {event.job.jid}, minion {event.job.minion!r} says something "
                   "else than the master's job cache, which is stored instead")  # fmt: skip

    def _defer(self, look: _Look) -> None:
        now = time.monotonic()
        for each in (*look.absent, *look.unknown):
            job = each.event.job if isinstance(each.event, Opened) else None
            assert job is not None
            self._put_off(self._deferred_of(each.entry.seq, job, now))
        for entry, _ in look.large:
            self._look_for(entry, self.wait_seconds / 2)
        if look.absent or look.unknown:
            self._some_wait.set()

    def _deferred_of(self, seq: int, job: saltevent.Tag, since: float) -> Deferred:
        minion = self.selection.master_id if job.kind in saltevent.MASTER_RETURNS else job.minion
        return Deferred(seq, job.jid, minion, since)

    def _put_off(self, deferred: Deferred) -> None:
        """Looked for after a pause that grows from look to look, and once more when its time is over."""
        now = time.monotonic()
        pause = (
            _LOOK_SECONDS * _LOOK_GROWTH ** min(deferred.looks - 1, _MOST_GROWTH)
            if deferred.looks
            else _FIRST_LOOK_SECONDS
        )
        over = deferred.since + self.wait_seconds
        due = min(now + pause, over) if over > now else now + _LOOK_SECONDS
        put_off = deferred._replace(looks=deferred.looks + 1, due=due)
        self._deferred[deferred.seq] = put_off
        self._by_looks.setdefault(put_off.looks, collections.deque()).append(put_off)

    def _next_due(self, now: float) -> list[Deferred]:
        """Some of those that are to be looked for now, half of them from the oldest on, and half from the youngest: a
        flood of what never comes holds up nothing that comes a moment late."""
        some: list[Deferred] = []
        ages = sorted(self._by_looks)
        for order, most in ((reversed(ages), _LOOK_EVENTS // 2), (iter(ages), _LOOK_EVENTS)):
            for looks in order:
                line = self._by_looks[looks]
                while line and len(some) < most and (line[0].due <= now or self._deferred.get(line[0].seq) != line[0]):
                    each = line.popleft()
                    if self._deferred.get(each.seq) == each:
                        some.append(each)
        for looks in [looks for looks, line in self._by_looks.items() if not line]:
            del self._by_looks[looks]
        return some

    async def _look_again(self) -> bool:
        """Looks for those that are due, each several times before its time is over; whether there may be more."""
        async with self._reading:
            now = time.monotonic()
            is_crowded = len(self._deferred) >= _MAX_DEFERRED
            some = self._next_due(math.inf if is_crowded else now)
            wait = min(self.wait_seconds, _CROWDED_SECONDS) if is_crowded else self.wait_seconds
            over = {each.seq for each in some if now - each.since >= wait}
            there = await self._present(some)
            for each in some:
                self._put_off(each)
            due = [each.seq for each in some if each.seq in there or each.seq in over]
            while due:
                entries, looked = await self._in_journal(self._journal.read_these, due, _LOOK_BYTES)
                for seq in set(due[:looked]).difference(entry.seq for entry in entries):
                    del self._deferred[seq]
                del due[:looked]
                young: list[Entry] = []
                old: list[Entry] = []
                for entry in entries:
                    is_young = now - self._deferred[entry.seq].since < self.wait_seconds / 2
                    if is_large(entry):
                        entry = await self._with_tag(entry)
                        is_over, is_last = entry.seq in over, entry.seq not in there
                        self._to_decoder(entry, is_young=is_young, is_over=is_over, is_last=is_last)
                    else:
                        (young if is_young else old).append(entry)
                await self._end_some(await self.look_at(young), over)
                await self._end_some(await self.look_at(old, 0.0), over)
            return len(some) >= _LOOK_EVENTS // 2

    def _to_decoder(self, entry: Entry, *, is_young: bool, is_over: bool, is_last: bool = False) -> None:
        self._looked_for[entry.seq] = self._deferred.pop(entry.seq)
        self._look_for(entry, self.wait_seconds / 2 if is_young else 0.0, is_over=is_over, is_last=is_last)

    async def _end_some(self, look: _Look, over: set[int]) -> None:
        """Ends the wait of those that the cache holds, and of those whose time is ``over``."""
        confirmed, ignored, dead = sorted_out(look.going_on)
        for each in look.absent:
            seq = each.entry.seq
            if seq not in over:
                continue
            if each.entry.state == STUB:
                ignored[seq] = Ignored.FORGOTTEN.value
            elif self.enabled:
                dead[seq] = "unconfirmed", self._reason(self._deferred[seq])
            else:  # what Salt has trimmed is stored as it is
                confirmed[seq] = each.entry.body
        now = time.monotonic()
        for entry, _ in look.large:
            is_young = now - self._deferred[entry.seq].since < self.wait_seconds / 2
            self._to_decoder(entry, is_young=is_young, is_over=entry.seq in over)
        for each in look.unknown:  # their time begins when the cache can be read
            self._put_off(self._deferred[each.entry.seq]._replace(since=now, looks=0))
        again = await self._settle(confirmed, ignored, dead)
        for seq in (*confirmed, *ignored, *dead):
            self._deferred.pop(seq, None)
        taken = self._journal.taken_through
        self._again.extend(seq for seq in confirmed if seq <= taken and seq not in again)
        if confirmed or ignored or dead:
            self._on_confirmed(len(confirmed), sum(map(len, confirmed.values())))

    async def _settle(
        self,
        confirmed: dict[int, bytes],
        ignored: dict[int, str],
        dead: dict[int, tuple[str, str]],
        *,
        again: Iterable[int] = (),
        taken: int = 0,
    ) -> set[int]:
        """Puts down what was found out, and gives those that say ``again`` what the journal holds confirmed already.

        Otherwise a stranger could fill it, with some hundred bytes for each copy of the largest of its returns. Up to
        ``taken`` events are the writer's, and are only confirmed.
        """
        duplicates = {*again, *await self._in_journal(self._said_again, confirmed, taken)}
        fates = collections.Counter(f"ignored.{reason}" for reason in ignored.values())
        if duplicates:
            fates["duplicates"] = len(duplicates)
        kept = {seq: body for seq, body in confirmed.items() if seq not in duplicates}
        if kept:
            await self._in_journal(self._journal.confirm, kept)
        if ignored or dead or duplicates:
            await self._in_journal(self._journal.settle, Settlement([*ignored, *dead, *duplicates], fates, dead))
        return duplicates

    def _said_again(self, confirmed: dict[int, bytes], taken: int) -> list[int]:
        again: list[int] = []
        for seq, body in confirmed.items():
            key = self._row_of(body)
            if key is None:
                continue
            if key.endswith(b"/new"):  # the parts of a batch have one tag
                key += hashlib.sha256(body.rpartition(_STAMP_KEY)[0]).digest()
            other = self._kept.pop(key, seq)
            if other != seq and seq > taken and self._journal.is_confirmed(other):
                again.append(seq)
            else:
                other = seq
            self._kept[key] = other
            if len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return again

    async def _present(self, some: list[Deferred]) -> set[int]:
        if self._cache is None:
            return {each.seq for each in some}
        present = await self._in_cache(self._cache.present, [(each.jid, each.minion) for each in some])
        return {each.seq for each, is_there in zip(some, present, strict=True) if is_there}

    def _reason(self, deferred: Deferred) -> str:
        what = f"the return of {deferred.minion!r}" if deferred.minion else "the job"
        self._tell(deferred.jid, f"The master's job cache does not hold {what} for jid {deferred.jid}: forged, or of "
                   "another master; it goes to the dead letters")  # fmt: skip
        waited = min(self.wait_seconds, time.monotonic() - deferred.since)  # less in a crowd
        return f"not in the master's job cache within {waited:.3g} s"

    async def _look_ahead(self) -> bool:
        """Confirms a step of what the writer will come to later; whether there is more.

        What the writer holds was confirmed in memory alone. It is confirmed in the journal too, and nothing else is
        done to it.
        """
        async with self._reading:
            entries: list[Entry] = await self._in_journal(
                lambda: self._journal.read(after=self._ahead, rows=_AHEAD_ROWS, max_bytes=_AHEAD_BYTES, take=False)
            )
            now = time.time()
            entries = list(itertools.takewhile(lambda entry: _may_be_forgotten(entry, now), entries))
            if not entries or len(self._deferred) >= _MAX_DEFERRED:
                return False
            # Without verification the others go on as they are.
            to_look_at = (entry for entry in entries if self.enabled or entry.state == STUB)
            look = await self.look_at(await self._small(to_look_at))
            taken = self._journal.taken_through
            confirmed, ignored, dead = sorted_out(look.going_on)
            await self._settle(
                confirmed,
                {seq: why for seq, why in ignored.items() if seq > taken},
                {seq: why for seq, why in dead.items() if seq > taken},
                taken=taken,
            )
            for each in (look.absent, look.unknown):
                each[:] = [checked for checked in each if checked.entry.seq > taken]
            self._defer(look)
            self._ahead = min([entries[-1].seq, *(each.entry.seq - 1 for each in look.left_over)])
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


def _may_be_forgotten(entry: Entry, now: float) -> bool:
    """Whether the writer lags so that it pays to look ahead of it. Events of the bus are likely confirmed in time."""
    return entry.state == STUB or not 0.0 <= now - entry.captured_at < _AHEAD_AGE_SECONDS


def sorted_out(
    going_on: Iterable[Entry | Checked],
) -> tuple[dict[int, bytes], dict[int, str], dict[int, tuple[str, str]]]:
    """By ``seq``: the bytes of what is confirmed, why others are ignored, and (reason, error) of dead letters."""
    confirmed: dict[int, bytes] = {}
    ignored: dict[int, str] = {}
    dead: dict[int, tuple[str, str]] = {}
    for each in going_on:
        entry = each if isinstance(each, Entry) else each.entry
        if isinstance(each, Entry):
            confirmed[entry.seq] = entry.body
        elif each.error:
            dead[entry.seq] = each.reason, each.error
        elif isinstance(each.event, Ignored):
            ignored[entry.seq] = each.event.value
        elif each.event.job is None and entry.state != CONFIRMED:  # a row of events, and of nothing else
            confirmed[entry.seq] = saltevent.chosen_event(entry.body)
        else:
            confirmed[entry.seq] = entry.body
    return confirmed, ignored, dead


def _is_same(said: dict[str, Any], held: dict[str, Any]) -> bool:
    """Whether an event says what the job cache holds."""
    if not held.keys() & {"success", "retcode"}:
        return _is_of_ssh(said, held.get("return"))
    same = all(_packed(said.get(key)) == _packed(held.get(key)) for key in _VALUES)
    return same and _packed(_as_sent(said)) == _packed(_as_sent(held))


def _is_of_ssh(said: dict[str, Any], value: Any) -> bool:
    """Whether an event says the value, or what salt-ssh takes of it for its event (``run``, salt/client/ssh/__init__.py
    3006-3008)."""
    values = [value]
    if isinstance(value, dict):
        values += [value[key] for key in (("return",) if "return" in value else ("stdout", "stderr")) if key in value]
    return _packed(said.get("return")) in map(_packed, values)


def _as_sent(data: dict[str, Any]) -> Any:
    """The value of a return, without what the master itself writes into the states of one that failed, before it stores
    it (``fire_ret_load``, salt/utils/event.py 3006-3008)."""
    fun, value = data.get("fun"), data.get("return")
    if not data.get("retcode"):
        return value
    if isinstance(fun, list) and isinstance(value, dict):
        return {name: _states_as_sent(states) if name in _SUB_EVENT else states for name, states in value.items()}
    if isinstance(fun, list) and isinstance(value, list):
        return [
            _states_as_sent(states) if name in _SUB_EVENT else states
            for name, states in itertools.zip_longest(fun, value)
        ]
    return _states_as_sent(value) if fun in _SUB_EVENT else value


def _states_as_sent(states: Any) -> Any:
    if not isinstance(states, dict):
        return states
    return {
        name: {key: its for key, its in state.items() if key not in _ADDED} if isinstance(state, dict) else state
        for name, state in states.items()
    }


def _tag_of(body: bytes) -> bytes:
    return body[: saltevent.MAX_TAG_BYTES].partition(saltevent.SEPARATOR)[0]


def _packed(value: Any) -> bytes | None:
    return saltevent.try_pack("", {"": value})
