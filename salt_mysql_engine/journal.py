"""The journal: a durable queue of events between their sources and MySQL, in one SQLite file.

Promise
    An event that :meth:`Journal.append` returned for survives the death of this process at any
    instant, and stays until :meth:`Journal.settle` says what became of it, or until a cap that the
    operator has set takes it, counted.

Tables
    (``journalfile.py`` makes them) ``events`` holds each event's bytes, under a ``seq`` that only grows and is never
    used again, with jid and minion id from the tag and the event's state next to them; ``dead_letters`` what did not
    become a row, why, and in which state it was (``letters.py``); ``bodies`` the bytes of large ones of both;
    ``counters`` the books; ``marks`` and ``notes`` what must be known after a restart.

Invariants
    Appending counts as captured, in the same transaction; settling deletes rows and counts their
    fate, in the same transaction. So after any crash
    ``captured = rows in both tables + the sum of the settled counters``.

Recovery
    SQLite replays its own WAL at opening. ``synchronous=NORMAL``: a commit survives ``kill -9`` of
    the process at once, and a power cut once SQLite has next synced its WAL. A power cut can take the
    newest commits, never the file's consistency; numbers that were given in them are not given
    again. A file that SQLite finds corrupt, at opening or later, goes on in a new one with what can be
    read of it; so does one that somebody deletes while it is in use, with Salt's whole cache perhaps
    (``mending.py``).

One engine at a time: an exclusive lock on ``lock`` beside the file, freed by the kernel at death. Its process alone
opens the file; what others hand over comes by spool files (``intake.py``). All calls block; the engine makes them in
one thread of its own.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import sqlite3
import struct
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import journalfile, letters, salvage
from .journalfile import BODY, BODY_BYTES, CONFIRMED, PAGE_BYTES, ROW_BYTES, UNCHECKED, WHOLE_BYTES, NewEvent
from .letters import DeadLetter
from .mending import TIMEOUT, MendedFile, mended

log = logging.getLogger(__name__)

_KEEP_FREE_PAGES, _GIVE_BACK_PAGES = 4096, 4096  # 16 MiB each
_CHECKPOINT_AGAIN_SECONDS = 0.1
_LOG_BYTES = 4 * journalfile.WAL_BYTES
"""A write-ahead log beyond this counts for the cap."""
_WARN_SHARE, _CALM_SHARE = 0.8, 0.6
_DROP_ROWS = 256


def _up_to(max_bytes: int) -> str:
    return (
        f"SELECT seq, captured_at, CASE WHEN {BODY_BYTES} > {max_bytes} THEN x'' ELSE {BODY} END, state, {BODY_BYTES} "
        "FROM events"
    )


_SELECT = _up_to(WHOLE_BYTES)


class Entry(NamedTuple):
    """An event on its way out."""

    seq: int
    captured_at: float
    body: bytes
    state: int = UNCHECKED
    size: int = 0
    """Bytes of a body that was not read, being too large for that; else 0."""


class Settlement(NamedTuple):
    """What became of some events: their ``seq``, counts by fate, and (reason, error) of dead letters by ``seq``.

    The fate ``trimmed`` counts beside the others. ``confirmed``: the bytes of dead letters that were confirmed, and so
    need not be looked for once more.
    """

    seqs: Sequence[int]
    fates: Mapping[str, int]
    dead: Mapping[int, tuple[str, str]]
    confirmed: Mapping[int, bytes] = {}


class Caps(NamedTuple):
    """What the journal may hold: bytes of the file, seconds of age (0: any), and dead letters."""

    max_bytes: int = 2 * 1024**3
    max_age_seconds: float = 0.0
    drop_oldest: bool = False
    dead_letters: int = 10_000


class Journal(MendedFile):
    """The queue. Open it, append, read, settle, close: all from one thread.

    Every method raises :class:`sqlite3.Error` when the disk is full or fails; nothing is half done
    then, and the same call may be made again.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "journal.sqlite")
        self.caps = Caps()
        self.pending = 0
        """Rows in ``events``: counted at opening, then by what statements really did."""
        self.used_bytes = 0
        """Of the file's pages, those that hold something."""
        self.full = False
        self._taken_through = 0
        self._checkpoint_at = 0.0
        self._warned = False
        self._uuid = b""
        self._boot = journalfile.boot()
        self._numbers_are_sure = False

    @mended
    def append(self, events: Sequence[NewEvent], *, dropped: int = 0, may_wait: bool = False) -> int:
        """Adds events, all or none of those that the cap leaves room for; gives how many.

        ``dropped`` more were captured and had no place in memory. Those that ``may_wait`` are added all or none, take
        nobody else's room, and are not captured before there is some.
        """
        total = len(events)
        if may_wait:
            self._measure()
            if self.full or journalfile.size_of(events) > self.caps.max_bytes - self.used_bytes:
                return 0
        self.be_there()
        self._keep_log_small()
        if events:
            journalfile.leave_room_to_settle(self._db, self.path)
        with self._transaction():
            freed, events = self._fit(events)
            journalfile.insert(self._db, events)
            journalfile.count(
                self._db,
                {
                    "captured": total + dropped,
                    "dropped.memory_full": dropped,
                    "dropped.journal_full": freed + total - len(events),
                },
            )
        self.pending += len(events) - freed
        self._say_how_full(lost=freed + total - len(events))
        return len(events)

    @mended
    def take(self, events: Sequence[NewEvent], *, counts: Mapping[str, int], marks: Mapping[str, float]) -> None:
        """Adds events that are on the disk already, whatever the cap is, with ``counts`` for the books and ``marks``.

        Where the oldest are dropped, they make room.
        """
        self.be_there()
        self._keep_log_small()
        if events:
            journalfile.leave_room_to_settle(self._db, self.path)
        freed = 0
        with self._transaction():
            if self.caps.drop_oldest:
                self._measure()
                freed, _ = self._free(events)
            journalfile.insert(self._db, events)
            journalfile.count(self._db, {"captured": len(events), "dropped.journal_full": freed})
            journalfile.count(self._db, counts)
            for name, value in marks.items():
                self._set_mark(name, value)
        self.pending += len(events) - freed
        self._measure()
        self._say_how_full(lost=freed)

    def _fit(self, events: Sequence[NewEvent]) -> tuple[int, Sequence[NewEvent]]:
        """How many old events made room, and which of the new ones fit."""
        self._measure()
        freed, room = self._free(events)
        if journalfile.size_of(events) <= room:
            return freed, events
        fitting = []
        for event in events:
            size = journalfile.size_of([event])
            if size <= room:
                room -= size
                fitting.append(event)
        return freed, fitting

    def _free(self, events: Sequence[NewEvent]) -> tuple[int, int]:
        """Deletes the oldest events until ``events`` have room, where that is asked for; gives how many, and the room.

        What cannot have room, however many went, takes none along.
        """
        log_bytes = self.log_bytes
        room = self.caps.max_bytes - self.used_bytes - log_bytes
        sizes = sorted(journalfile.size_of([event]) for event in events)
        wanted = sum(sizes)
        if wanted <= room or not self.caps.drop_oldest or log_bytes:
            return 0, room
        victims: list[tuple[int, int]] = []
        attainable = room
        while sizes and sizes[-1] > self.caps.max_bytes:
            wanted -= sizes.pop()
        for seq, size in self._db.execute(
            f"SELECT seq, {BODY_BYTES} FROM events WHERE seq > ? ORDER BY seq", (self._taken_through,)
        ):
            if attainable >= wanted:
                break
            victims.append((seq, size + ROW_BYTES))
            attainable += size + ROW_BYTES
        while sizes and wanted > attainable:
            wanted -= sizes.pop()
        enough = 0
        while enough < len(victims) and wanted > room:
            room += victims[enough][1]
            enough += 1
        return self._delete_events(seq for seq, _ in victims[:enough]), room

    def _say_how_full(self, *, lost: int) -> None:
        share = self.used_bytes / self.caps.max_bytes
        if lost and not self.full:
            what = "the oldest events" if self.caps.drop_oldest else "events that come"
            log.error(
                "The journal %s holds journal_max_bytes (%d): %s are dropped, counted. Mend the database or raise it",
                self.path,
                self.caps.max_bytes,
                what,
            )
            self.full = self._warned = True
        elif share >= _WARN_SHARE and not self._warned:
            log.warning(
                "The journal %s is at %d %% of journal_max_bytes (%d)", self.path, 100 * share, self.caps.max_bytes
            )
            self._warned = True
        elif share < _CALM_SHARE and self._warned:
            log.warning("The journal %s has room again", self.path)
            self.full = self._warned = False

    @mended
    def read(self, *, after: int, rows: int, max_bytes: int, take: bool = True) -> list[Entry]:
        """The oldest entries with a ``seq`` above ``after``: ``rows`` at most, and about ``max_bytes``; large ones
        without their body.

        What was taken (``take``) is not dropped to make room until it is settled. Without ``take`` those that are
        confirmed are left out.
        """
        which = "" if take else f"state <> {CONFIRMED} AND "
        entries: list[Entry] = []
        for row in self._db.execute(f"{_SELECT} WHERE {which}seq > ? ORDER BY seq LIMIT ?", (after, rows)):
            entries.append(_entry(row))
            max_bytes -= len(row[2])
            if max_bytes <= 0:
                break
        if take and entries:
            self._taken_through = max(self._taken_through, entries[-1].seq)
        return entries

    @mended
    def read_these(self, seqs: Sequence[int], max_bytes: int) -> tuple[list[Entry], int]:
        """The entries of these numbers that are still there, about ``max_bytes`` of them; and how many numbers were
        looked at for that."""
        entries: list[Entry] = []
        looked = 0
        while looked < len(seqs) and max_bytes > 0:
            row = self._db.execute(f"{_SELECT} WHERE seq = ?", (seqs[looked],)).fetchone()
            looked += 1
            if row is not None:
                entries.append(_entry(row))
                max_bytes -= len(row[2])
        return entries, looked

    @mended
    def read_whole(self, seq: int, max_bytes: int) -> Entry | None:
        """An entry with its body, large or not; above ``max_bytes`` without it."""
        row = self._db.execute(f"{_up_to(max_bytes)} WHERE seq = ?", (seq,)).fetchone()
        return None if row is None else _entry(row)

    @mended
    def is_confirmed(self, seq: int) -> bool:
        """Whether an event is here, with its bytes as the job cache has them."""
        row = self._db.execute("SELECT 1 FROM events WHERE seq = ? AND state = ?", (seq, CONFIRMED)).fetchone()
        return row is not None

    @mended
    def confirm(self, bodies: Mapping[int, bytes]) -> None:
        """Events that need no confirmation any more, with their bytes as the job cache has them."""
        with self._transaction():
            self._confirm(bodies)

    def _confirm(self, bodies: Mapping[int, bytes]) -> None:
        for seq, body in bodies.items():
            journalfile.confirm(self._db, seq, body)

    @mended
    def held(self, *, jid: str | None, at: int, rows: int, max_bytes: int) -> list[Entry]:
        """For those who read: what waits of a job, oldest first, above the ``seq`` ``at``; without a ``jid`` of
        everything, newest first, below ``at`` (0: all). Large ones without their body."""
        if jid is not None:
            which, values = "jid = ? AND seq > ? ORDER BY seq", (jid, at, rows)
        else:
            which, values = "? = '' AND seq < ? ORDER BY seq DESC", ("", at or 2**62, rows)
        found: list[Entry] = []
        for row in self._db.execute(f"{_SELECT} WHERE {which} LIMIT ?", values):
            found.append(_entry(row))
            max_bytes -= len(row[2])
            if max_bytes <= 0:
                break
        return found

    @mended
    def part_of(self, seq: int, start: int, size: int) -> bytes:
        """Some of an event's body; nothing where there is no more, or the event is gone."""
        row = self._db.execute(
            f"SELECT substr({BODY}, ?, ?) FROM events WHERE seq = ?", (start + 1, size, seq)
        ).fetchone()
        return bytes(row[0]) if row is not None else b""

    @mended
    def rows_of(self, jid: str) -> int:
        """How many events of a job wait."""
        (count,) = self._db.execute("SELECT COUNT(*) FROM events WHERE jid = ?", (jid,)).fetchone()
        return int(count)

    @mended
    def settle(self, settlement: Settlement) -> None:
        """Removes events whose fate is known, and counts it; dead letters move to their own table."""
        with self._transaction():
            self._confirm(settlement.confirmed)
            buried = sum(letters.bury(self._db, seq, *why) for seq, why in settlement.dead.items())
            deleted = self._delete_events(settlement.seqs)
            # What a salvage could not read was counted as lost; a batch that was in memory is not.
            found_again = len(settlement.seqs) - deleted - len(settlement.dead)
            fates = collections.Counter(settlement.fates)
            if found_again > 0:
                fates["dropped.journal_corrupt"] -= found_again
            journalfile.count(self._db, fates)
            if settlement.dead:
                self._trim_dead_letters()
        self.pending -= deleted + buried

    def _delete_events(self, seqs: Iterable[int]) -> int:
        return sum(journalfile.delete(self._db, "events", "seq BETWEEN ? AND ?", between) for between in _ranges(seqs))

    def _trim_dead_letters(self) -> None:
        dropped = letters.trim(self._db, most=self.caps.dead_letters, max_bytes=self.caps.max_bytes // 4)
        journalfile.count(self._db, {"dropped.dead_letters_full": dropped})

    @property
    def taken_through(self) -> int:
        """Every event up to this ``seq`` was taken for a batch, or is gone."""
        return self._taken_through

    @mended
    def mark(self, name: str) -> float | None:
        """What :meth:`set_mark` put down."""
        row = self._db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return None if row is None else float(row[0])

    @mended
    def set_mark(self, name: str, value: float) -> None:
        """Puts down a number that must be known after a restart."""
        with self._transaction():
            self._set_mark(name, value)

    @mended
    def note(self, name: str) -> str | None:
        """What :meth:`set_note` wrote."""
        row = self._db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    @mended
    def set_note(self, name: str, value: str) -> None:
        """Writes a text that must be known after a restart."""
        with self._transaction():
            self._set_note(name, value)

    def _set_note(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))

    @mended
    def marks(self, prefix: str) -> dict[str, float]:
        """What :meth:`set_mark` and :meth:`take` put down under names that begin so."""
        found = self._db.execute("SELECT name, value FROM marks WHERE substr(name, 1, ?) = ?", (len(prefix), prefix))
        return {name: float(value) for name, value in found}

    @mended
    def forget_marks(self, names: Iterable[str]) -> None:
        """Takes marks away that need not be known any more."""
        with self._transaction():
            self._db.executemany("DELETE FROM marks WHERE name = ?", [(name,) for name in names])

    def _set_mark(self, name: str, value: float) -> None:
        self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))

    @mended
    def known(self, jids: Sequence[str], *, unchecked: bool = True) -> set[tuple[str, str]]:
        """The (jid, minion) of these jobs that are here already: pending, or refused by the database.

        A job's load has the minion ``""``. What nobody checked may be a stranger's, and counts if ``unchecked``.
        """
        which = "" if unchecked else f"state <> {UNCHECKED} AND "
        known: set[tuple[str, str]] = set()
        for start in range(0, len(jids), 250):
            chunk = jids[start : start + 250]
            marks = ", ".join("?" * len(chunk))
            known.update(
                self._db.execute(
                    f"SELECT jid, minion FROM events WHERE {which}jid IN ({marks}) UNION "
                    f"SELECT jid, minion FROM dead_letters WHERE {which}reason <> 'unconfirmed' AND jid IN ({marks})",
                    [*chunk, *chunk],
                )
            )
        return known

    @mended
    def dead_letters(
        self,
        *,
        after: int = 0,
        before: int | None = None,
        seq: int | None = None,
        limit: int = 100,
        newest: bool = False,
        whole: bool = True,
    ) -> list[DeadLetter]:
        """Dead letters by ``seq``: the first above ``after``, the ``newest`` below ``before``, or the one of ``seq``;
        ``whole``: with their bodies."""
        return letters.read(self._db, after=after, before=before, seq=seq, limit=limit, newest=newest, whole=whole)

    @mended
    def ends_of_dead_letter(self, seq: int) -> tuple[bytes, bytes]:
        """How the body of one begins, and how it ends."""
        return letters.ends(self._db, seq)

    @mended
    def piece_of_dead_letter(self, seq: int, offset: int, length: int) -> bytes:
        """Some bytes of the body of one."""
        return letters.piece(self._db, seq, offset, length)

    @mended
    def newest_dead_letter(self) -> int:
        """The ``seq`` of the newest; 0 when there is none."""
        (seq,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM dead_letters").fetchone()
        return int(seq)

    @mended
    def delete_dead_letters(self, seq: int | None, *, through: int | None = None) -> int:
        """Drops one dead letter, or all, or a portion of those up to ``through``; gives how many."""
        with self._transaction():
            deleted = letters.delete(self._db, seq, through)
            journalfile.count(self._db, {"dropped.dead_letter_deleted": deleted})
        return deleted

    @mended
    def retry_dead_letters(self, seq: int | None, *, trusted: bool, through: int | None = None) -> int:
        """Makes one dead letter, or all, or a portion of those up to ``through``, pending again in the state that each
        had; ``trusted``: as confirmed. Gives how many."""
        with self._transaction():
            again = letters.revive(self._db, seq, through, trusted=trusted)
        self.pending += again
        return again

    @mended
    def tend(self, now: float) -> bool:
        """Drops what is too old, and lets the file shrink, a step at a time; whether there is more to give back."""
        self.be_there()
        if self.caps.max_age_seconds:
            self._drop_older_than(now - self.caps.max_age_seconds)
        self._measure()
        self._say_how_full(lost=0)
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        if free <= max(_KEEP_FREE_PAGES, self.used_bytes // PAGE_BYTES // 4):
            return False
        self._db.execute(f"PRAGMA incremental_vacuum({_GIVE_BACK_PAGES})").fetchall()
        self._empty_log()
        return True

    def _drop_older_than(self, moment: float) -> None:
        while True:
            with self._transaction():
                oldest = self._db.execute(
                    "SELECT seq, captured_at FROM events WHERE seq > ? ORDER BY seq LIMIT ?",
                    (self._taken_through, _DROP_ROWS),
                ).fetchall()
                victims = [seq for seq, captured_at in oldest if captured_at < moment]
                dropped = self._delete_events(victims)
                journalfile.count(self._db, {"dropped.too_old": dropped})
            self.pending -= dropped
            if dropped:
                log.error("%d events waited longer than journal_max_age_hours and are dropped", dropped)
            if len(victims) < _DROP_ROWS:
                return

    @property
    def log_bytes(self) -> int:
        """What of the write-ahead log counts for the cap: what cannot be emptied. No deletion makes it smaller."""
        return max(0, journalfile.wal_bytes(self.path) - _LOG_BYTES)

    @mended
    def measured(self) -> int:
        """:attr:`used_bytes`, of now."""
        self._measure()
        return self.used_bytes

    def _measure(self) -> None:
        self.used_bytes = journalfile.used_bytes(self._db)

    @mended
    def books(self) -> dict[str, Any]:
        """``captured = written + duplicates + pending + dead_letters + ignored{reason} + dropped{reason}``.

        ``trimmed`` are those of the written that hold a value which Salt had trimmed.
        """
        counters, dead_letters = self._counters(), self._rows("dead_letters")
        self.pending = self._pending()
        return {
            "captured": counters["captured"],
            "written": counters["written"],
            "duplicates": counters["duplicates"],
            "pending": self.pending,
            "dead_letters": dead_letters,
            "ignored": _by_reason(counters, "ignored."),
            "dropped": _by_reason(counters, "dropped."),
            "trimmed": counters["trimmed"],
        }

    def _rows(self, table: str) -> int:
        (count,) = self._db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
        return int(count)

    @mended
    def oldest(self, but_for: Container[int] = ()) -> float | None:
        """When the oldest pending event was captured, in seconds since the epoch; ``but_for`` those of some ``seq``."""
        for seq, captured_at in self._db.execute("SELECT seq, captured_at FROM events ORDER BY seq"):
            if seq not in but_for:
                return float(captured_at)
        return None

    @mended
    def newest_seq(self) -> int:
        """The ``seq`` of the newest pending event; 0 when there is none."""
        (seq,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
        return int(seq)

    @mended
    def oldest_seq(self) -> int | None:
        """The ``seq`` of the oldest pending event."""
        (seq,) = self._db.execute("SELECT MIN(seq) FROM events").fetchone()
        return None if seq is None else int(seq)

    def event_key(self, seq: int) -> bytes:
        """16 bytes that no other event of any journal has."""
        return self._uuid + struct.pack(">q", seq)

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if not self._numbers_are_sure:
                journalfile.number_on(self._db)
                self._set_note(journalfile.BOOT, self._boot)
            yield
        self._numbers_are_sure = True
        if time.monotonic() >= self._checkpoint_at:
            self._empty_log()

    def _keep_log_small(self) -> None:
        """Before an append that counts what the log holds."""
        if journalfile.wal_bytes(self.path) > _LOG_BYTES:
            self._empty_log()

    def _empty_log(self) -> None:
        if journalfile.wal_bytes(self.path) < journalfile.WAL_BYTES:
            return
        self._checkpoint_at = time.monotonic() + _CHECKPOINT_AGAIN_SECONDS
        try:
            journalfile.checkpoint(self._db, timeout=TIMEOUT)
        except sqlite3.Error as exc:  # a full disk, say: what was committed is in the log
            log.debug("The journal's log cannot be brought back now: %s", exc)

    def _load(self) -> None:
        uuids = self._db.execute("SELECT uuid FROM identity").fetchall()
        salvage.require(len(uuids) == 1 and type(uuids[0][0]) is bytes and len(uuids[0][0]) == 8, "identity")
        ((self._uuid,),) = uuids
        said = self._db.execute("SELECT value FROM notes WHERE name = ?", (journalfile.BOOT,)).fetchone()
        self._numbers_are_sure = bool(self._boot) and said == (self._boot,)
        self.pending = self._pending()
        salvage.require(self.pending >= 0, "counters")
        self._measure()

    def _pending(self) -> int:
        """By the books, since counting the rows of a long outage would read all of them."""
        counters = self._counters()
        settled = sum(value for name, value in counters.items() if name not in ("captured", "trimmed"))
        return counters["captured"] - settled - self._rows("dead_letters")

    def _counters(self) -> collections.Counter[str]:
        counters = dict(self._db.execute("SELECT name, value FROM counters"))
        salvage.require(all(type(n) is str and type(v) is int for n, v in counters.items()), "counters")
        return collections.Counter(counters)


def _entry(row: tuple[Any, ...]) -> Entry:
    seq, captured_at, body, state, size = row
    if type(body) is not bytes or type(captured_at) is not float or type(state) is not int or type(size) is not int:
        salvage.require(False, f"event {seq}")  # in here, for the text takes as long as the check
    return Entry(seq, captured_at, body, state, 0 if body else size)


def _by_reason(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name[len(prefix) :]: count for name, count in sorted(counters.items()) if name.startswith(prefix) and count}


def _ranges(seqs: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, last)."""
    ranges: list[tuple[int, int]] = []
    for seq in sorted(seqs):
        if ranges and seq == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], seq)
        else:
            ranges.append((seq, seq))
    return ranges
