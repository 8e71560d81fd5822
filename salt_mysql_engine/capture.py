"""Capture: keeps the events that the settings ask for, by their tag alone, and journals them in groups.

The callback runs inside the bus reader, so it parses nothing but the tag and waits for nothing. A
group goes to the journal's thread 45 ms after its first event came or at 256 events, whichever is
first; while one is being written the next collects. With the append's own few milliseconds no event
is in memory alone for more than 50 ms, the time in the kernel's buffer included. If the disk stalls,
memory holds up to 64 MiB; what comes after that is dropped and counted. An append that fails is tried
again: its events stay at the head of the line.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from typing import Any

from . import records, saltevent
from .journal import Journal
from .journalfile import STUB, NewEvent

log = logging.getLogger(__name__)

_GROUP_SECONDS = 0.045
_GROUP_EVENTS = 256
_WORTH_SECONDS = 0.01
"""Within less time nothing more will come of the bus."""
MEMORY_BYTES = 64 * 1024 * 1024
_EVENT_BYTES = 400
"""What an event takes in memory beside its body."""
_RETRY_SECONDS = 1.0
_APPEND_EVENTS, _APPEND_BYTES = 2000, 4 * 1024 * 1024

InJournal = Callable[..., Awaitable[Any]]
"""Runs a function in the journal's thread."""


class Capture:
    """Between the bus and the journal. ``on_append`` is told the size of each group that is on disk, and ``on_loss``
    that something was dropped, once there is room again."""

    def __init__(
        self,
        journal: Journal,
        in_journal: InJournal,
        selection: records.Selection,
        *,
        on_append: Callable[[int, int], None],
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self.selection = selection
        self.handed_off = False
        """Whether jobs come whole and unforgeable from the master's own processes, and not from here."""
        self.max_event_bytes = 16 * 1024 * 1024
        """What is larger is cut, and becomes a dead letter."""
        self.dropped = 0
        """Events lost because memory was full, not yet in the books."""
        self.last_error = ""
        self._journal = journal
        self._in_journal = in_journal
        self._on_append = on_append
        self._on_loss = on_loss
        self._lost = False
        self._held: list[NewEvent] = []
        self._group: list[NewEvent] = []
        """What is being journalled."""
        self._bytes = 0
        self._waited = 0.0
        """Seconds for which the first event that is held may have been in the kernel's buffer."""
        self._some = asyncio.Event()
        self._due = asyncio.Event()
        self._writing = asyncio.Lock()

    @property
    def held(self) -> int:
        """Events in memory only."""
        return len(self._group) + len(self._held)

    def on_events(self, bodies: list[bytes], waited: float = 0.0) -> None:
        """Takes what the settings ask for of a read of the bus.

        Args:
            bodies: the events, in their order.
            waited: for how many seconds they may have been in the kernel's buffer.
        """
        now = time.time()
        if not self._held:
            self._waited = waited
        for body in bodies:
            plain = saltevent.PLAIN_RETURN.match(body)
            if plain is not None and not self.handed_off:  # nearly all are
                event = NewEvent(now, plain[1].decode(), plain[2].decode(), body)
            else:
                chosen = self._chosen(body, now)
                if chosen is None:
                    continue
                event = chosen
            if len(body) > self.max_event_bytes:
                # Unopened, and of nobody: whose it is, only its tag says.
                event = NewEvent(now, "", "", saltevent.cut(event.body, now), STUB)
            if self._bytes >= MEMORY_BYTES:
                if not self.dropped:
                    log.error("Memory for events is full and the journal is not taking any; dropping and counting")
                self.dropped += 1
                continue
            self._held.append(event)
            self._bytes += len(event.body) + _EVENT_BYTES
        if self._held:
            self._some.set()
        if len(self._held) >= _GROUP_EVENTS:
            self._due.set()

    def _chosen(self, body: bytes, now: float) -> NewEvent | None:
        """What to journal of an event that is not plainly a minion's return."""
        end = body.find(saltevent.SEPARATOR, 0, saltevent.MAX_TAG_BYTES)
        try:
            tag = body[:end].decode() if end > 0 else ""
        except UnicodeDecodeError:
            return None
        job = saltevent.parse_tag(tag)
        if job is not None and self.selection.wants_job(job) and not self.handed_off:
            return NewEvent(now, job.jid, job.minion or self._master_of(job), body)
        if not self.selection.wants_event(tag) or tag.startswith(saltevent.PRIVATE):
            return None
        if job is None:
            return NewEvent(now, "", "", body)
        if self.handed_off:
            return NewEvent(now, "", "", saltevent.chosen_event(body))
        return NewEvent(now, job.jid, job.minion or self._master_of(job), body)

    def _master_of(self, job: saltevent.Tag) -> str:
        """Whose return a runner's or wheel's is, as the job cache has it."""
        return self.selection.master_id if job.kind in saltevent.MASTER_RETURNS else ""

    async def run(self) -> None:
        """Journals groups until cancelled. To lose nothing, :meth:`drain` once before cancelling."""
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            left = _GROUP_SECONDS - self._waited
            if left > _WORTH_SECONDS:
                timer = loop.call_later(left, self._due.set)
                await self._due.wait()
                timer.cancel()
            try:
                await self.drain()
            except sqlite3.Error as exc:
                self._say(f"The journal {self._journal.path} cannot be written: {exc}; holding events in memory")
                await asyncio.sleep(_RETRY_SECONDS)

    async def drain(self) -> None:
        """Journals all that is held now.

        Raises:
            sqlite3.Error: the journal could not be written; the events are held as before.
        """
        async with self._writing:
            self._some.clear()
            self._due.clear()
            left = len(self._held)
            while left > 0 or self.dropped:
                left -= await self._journal_some(left)
        self.last_error = ""

    async def _journal_some(self, most: int) -> int:
        """Journals a group and gives its size. Groups are small, so that a disk that was full takes them one by one."""
        size = count = 0
        for event in itertools.islice(self._held, min(most, _APPEND_EVENTS)):
            if count and size >= _APPEND_BYTES:
                break
            count += 1
            size += len(event.body) + _EVENT_BYTES
        self._group, self._held = self._held[:count], self._held[count:]
        dropped = self.dropped
        try:
            taken = await self._in_journal(lambda: self._journal.append(self._group, dropped=dropped))
        except Exception:  # whatever it is, none of the group is in the journal (after a cancellation it may be)
            self._group, self._held = [], self._group + self._held
            self._some.set()
            raise
        self._group = []
        self.dropped -= dropped
        self._bytes -= size
        if taken:
            self._on_append(taken, size)
        if dropped or self._journal.full:
            self._lost = True
        elif self._lost:
            self._lost = False
            self._on_loss()
        return count

    def _say(self, message: str) -> None:
        if message != self.last_error:
            log.error(message)
        self.last_error = message
