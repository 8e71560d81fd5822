"""The journal: a durable queue of events between their sources and MySQL, in one SQLite file.

Promise
    An event that :meth:`Journal.append` returned for survives the death of this process at any
    instant, and stays until :meth:`Journal.settle` says what became of it, or until a cap that the
    operator has set takes it, counted.

Tables
    (``journalfile.py`` has the file) ``events`` holds each event's bytes as they came, under a ``seq`` that only grows
    and is never used again, with jid and minion id from the tag beside them; ``waiting`` the returns that the
    master's job cache did not confirm yet; ``dead_letters`` what did not become a row, and why; ``counters`` the
    books; ``marks`` what must be known after a restart.

Invariants
    Appending counts as captured, in the same transaction; settling deletes rows and counts their
    fate, in the same transaction. So after any crash
    ``captured = rows in the three tables + the sum of the settled counters``.

Recovery
    SQLite replays its own WAL at opening. ``synchronous=NORMAL``: a commit survives ``kill -9`` of
    the process at once, and a power cut once SQLite has next synced its WAL. A power cut can take the
    newest commits, never the file's consistency. A file that SQLite finds corrupt, at opening or later,
    is set aside, and what can be read of it goes on in a new one (``salvage.py``). One that somebody
    deletes while it is in use, with Salt's whole cache perhaps, is still open, and goes on in a new one too.

One engine at a time: an exclusive lock on ``lock`` beside the file, freed by the kernel at death. Other processes
may append (``handoff.py``). All calls block; the engine makes them in one thread of its own.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import fcntl
import functools
import logging
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from . import journalfile, salvage
from .errors import JournalError
from .journalfile import PAGE_BYTES, ROW_BYTES, NewEvent

log = logging.getLogger(__name__)

_KEEP_FREE_PAGES, _GIVE_BACK_PAGES = 4096, 4096  # 16 MiB each
_TIMEOUT = 5.0  # seconds that a statement may wait for another process
_CHECKPOINT_AGAIN_SECONDS = 0.1
_WARN_SHARE, _CALM_SHARE = 0.8, 0.6
_DROP_ROWS = 256
_VERIFIED_THROUGH = "verified_through"


class Entry(NamedTuple):
    """An event on its way out; ``trusted`` when it needs no confirmation (any more)."""

    seq: int
    captured_at: float
    body: bytes
    trusted: bool = False


class Waiting(NamedTuple):
    """A return that the job cache did not confirm yet; ``since`` in seconds since the epoch."""

    seq: int
    jid: str
    minion: str
    since: float


class DeadLetter(NamedTuple):
    """An event that became no row; times in seconds since the epoch. ``reason`` is one of :data:`REASONS`."""

    seq: int
    captured_at: float
    failed_at: float
    jid: str
    minion: str
    reason: str
    error: str
    body: bytes


REASONS = {
    "refused": "the database refused its row",
    "unconfirmed": "the master's job cache does not hold it",
    "fault": "it could not be made a row",
}
"""Why an event is a dead letter."""


class Settlement(NamedTuple):
    """What became of some events: their ``seq``, counts by fate, and (reason, error) of dead letters by ``seq``.

    The fate ``trimmed`` counts beside the others.
    """

    seqs: Sequence[int]
    fates: Mapping[str, int]
    dead: Mapping[int, tuple[str, str]]


class Caps(NamedTuple):
    """What the journal may hold: bytes of the file, seconds of age (0: any), and dead letters."""

    max_bytes: int = 2 * 1024**3
    max_age_seconds: float = 0.0
    drop_oldest: bool = False
    dead_letters: int = 10_000


Method = TypeVar("Method", bound=Callable[..., Any])


def _mended(method: Method) -> Method:
    """Sets a corrupt file aside and does the same in the new one, once."""

    @functools.wraps(method)
    def wrapper(self: Journal, *args: Any, **kwargs: Any) -> Any:
        try:
            if not self._broken:
                return method(self, *args, **kwargs)
        except salvage.BROKEN as exc:
            if not salvage.is_corruption(exc):
                raise
            log.critical("The journal %s is corrupt: %s", self.path, exc)
        self._begin_anew()
        return method(self, *args, **kwargs)

    return cast("Method", wrapper)


class Journal:
    """The queue. Open it, append, read, settle, close: all from one thread.

    Every method raises :class:`sqlite3.Error` when the disk is full or fails; nothing is half done
    then, and the same call may be made again.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "journal.sqlite"
        self.caps = Caps()
        self.pending = 0
        """Rows in ``events`` and ``waiting``: counted at opening, then by what statements really did."""
        self.used_bytes = 0
        """Of the file's pages, those that hold something."""
        self.full = False
        self.salvaged = ""
        """The path of the last corrupt file, set aside since this object was opened."""
        self._taken_through = 0
        self._verified_through = 0
        self._seen_through = 0
        self._data_version = 0
        self._checkpoint_at = 0.0
        self._warned = False
        self._broken = False
        """Whether the file is corrupt and not replaced yet."""
        self._lock_fd = -1
        self._inode = 0
        self._db: sqlite3.Connection
        self._uuid = b""

    def open(self) -> None:
        """Creates, upgrades or opens the file; a corrupt one is set aside and salvaged.

        Raises:
            JournalError: it is in use, not ours, of a newer format, or the folder cannot be used.
        """
        try:
            journalfile.make_folder(self.path.parent)
            self._lock()
        except OSError as exc:
            raise JournalError(f"the journal's folder {self.path.parent} cannot be used: {exc}") from exc
        try:
            try:
                if journalfile.ready_path(self.path).exists():  # killed while a corrupt file was being replaced
                    self._replace()
                self._db = self._connect()
                self._load()
            except salvage.BROKEN as exc:
                if not salvage.is_corruption(exc):
                    raise
                log.critical("The journal %s is corrupt: %s", self.path, exc)
                self._begin_anew()
        except (OSError, sqlite3.Error) as exc:
            os.close(self._lock_fd)
            raise JournalError(f"the journal {self.path} cannot be opened: {exc}") from exc
        except JournalError:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Closes the file and frees the lock."""
        self._db.close()
        os.close(self._lock_fd)

    @property
    def size_on_disk(self) -> int:
        """Bytes of the file and its write-ahead log."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(path.stat().st_size for path in files if path.exists())

    @_mended
    def append(self, events: Sequence[NewEvent], *, dropped: int = 0) -> int:
        """Adds events, all or none of those that the cap leaves room for; gives how many.

        ``dropped`` more were captured and had no place in memory. Trusted events are for the caller to
        hold back while the journal is ``full``.
        """
        total = len(events)
        self._be_there()
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

    def _fit(self, events: Sequence[NewEvent]) -> tuple[int, Sequence[NewEvent]]:
        """How many old events made room, and which of the new ones fit."""
        self._measure()
        room = self.caps.max_bytes - self.used_bytes
        size = journalfile.size_of(events)
        freed = 0
        if size > room and self.caps.drop_oldest:
            freed, room = self._free(size, room)
        if size <= room:
            return freed, events
        fitting = []
        for event in events:
            room -= len(event.body) + ROW_BYTES
            if room < 0:
                break
            fitting.append(event)
        return freed, fitting

    def _free(self, size: int, room: int) -> tuple[int, int]:
        """Deletes the oldest events until ``size`` bytes have room; gives how many, and the room then."""
        freed = 0
        while size > room and (victims := self._oldest_victims()):
            enough = 0
            while enough < len(victims) and size > room:
                room += victims[enough][1] + ROW_BYTES
                enough += 1
            freed += self._delete_events(seq for seq, _ in victims[:enough])
        return freed, room

    def _oldest_victims(self) -> list[tuple[int, int]]:
        """The ``seq`` and size of the oldest events that no batch holds."""
        return self._db.execute(
            "SELECT seq, LENGTH(body) FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (self._taken_through, _DROP_ROWS)
        ).fetchall()

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

    @_mended
    def read(self, *, after: int, rows: int, max_bytes: int, take: bool = True) -> list[Entry]:
        """The oldest entries with a ``seq`` above ``after``: ``rows`` at most, and about ``max_bytes``.

        What was taken (``take``) is not dropped to make room until it is settled.
        """
        entries: list[Entry] = []
        for seq, captured_at, body, trusted in self._db.execute(
            "SELECT seq, captured_at, body, trusted FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, rows)
        ):
            if type(body) is not bytes or type(captured_at) is not float:
                salvage.require(False, f"event {seq}")  # in here, for the text takes as long as the check
            entries.append(Entry(seq, captured_at, body, bool(trusted) or seq <= self._verified_through))
            max_bytes -= len(body)
            if max_bytes <= 0:
                break
        if take and entries:
            self._taken_through = max(self._taken_through, entries[-1].seq)
        return entries

    @_mended
    def settle(self, settlement: Settlement) -> None:
        """Removes events whose fate is known, and counts it; dead letters move to their own table."""
        with self._transaction():
            buried = sum(self._bury("events", seq, *why) for seq, why in settlement.dead.items())
            deleted = self._delete_events(settlement.seqs)
            # What a salvage could not read was counted as lost; a batch that was in memory is not.
            found_again = len(settlement.seqs) - deleted - len(settlement.dead)
            fates = collections.Counter(settlement.fates)
            if found_again > 0:
                fates["dropped.journal_corrupt"] -= found_again
            journalfile.count(self._db, {**fates, **self._trim_dead_letters(settlement.dead)})
        self.pending -= deleted + buried

    def _bury(self, table: str, seq: int, reason: str, error: str) -> int:
        buried = self._db.execute(
            "INSERT INTO dead_letters (seq, captured_at, jid, minion, body, error, failed_at, reason) "
            f"SELECT seq, captured_at, jid, minion, body, ?, ?, ? FROM {table} WHERE seq = ?",
            (error, time.time(), reason, seq),
        ).rowcount
        self._db.execute(f"DELETE FROM {table} WHERE seq = ?", (seq,))
        return buried

    def _delete_events(self, seqs: Iterable[int]) -> int:
        return sum(
            self._db.execute("DELETE FROM events WHERE seq BETWEEN ? AND ?", between).rowcount
            for between in _ranges(seqs)
        )

    def _trim_dead_letters(self, added: Mapping[int, Any]) -> dict[str, int]:
        """Drops the oldest dead letters above their caps; gives the count."""
        if not added:
            return {}
        dropped = 0
        while True:
            count, size = self._db.execute("SELECT COUNT(*), SUM(LENGTH(body)) FROM dead_letters").fetchone()
            over = max(count - self.caps.dead_letters, 1 if size and size > self.caps.max_bytes // 4 else 0)
            if over <= 0:
                break
            dropped += self._db.execute(
                "DELETE FROM dead_letters WHERE seq IN (SELECT seq FROM dead_letters ORDER BY failed_at, seq LIMIT ?)",
                (over,),
            ).rowcount
        return {"dropped.dead_letters_full": dropped}

    @_mended
    def wait(self, seqs: Sequence[int], *, since: float) -> list[Waiting]:
        """Puts events aside that the job cache did not confirm; gives what is waiting now of them."""
        waiting = []
        with self._transaction():
            for first, last in _ranges(seqs):
                self._db.execute(
                    "INSERT INTO waiting SELECT seq, captured_at, jid, minion, body, ? FROM events "
                    "WHERE seq BETWEEN ? AND ?",
                    (since, first, last),
                )
                self._db.execute("DELETE FROM events WHERE seq BETWEEN ? AND ?", (first, last))
                waiting += self._db.execute(
                    "SELECT seq, jid, minion, since FROM waiting WHERE seq BETWEEN ? AND ?", (first, last)
                ).fetchall()
        return [Waiting._make(row) for row in waiting]

    @_mended
    def waiting(self) -> list[Waiting]:
        """Everything that waits for the job cache, oldest first."""
        waiting = [
            Waiting._make(row) for row in self._db.execute("SELECT seq, jid, minion, since FROM waiting ORDER BY seq")
        ]
        for seq, jid, minion, since in waiting:
            salvage.require(type(jid) is str and type(minion) is str and type(since) is float, f"waiting {seq}")
        return waiting

    @_mended
    def bodies_of_waiting(self, seqs: Sequence[int]) -> dict[int, tuple[float, bytes]]:
        """When some of the waiting were captured, and their bytes, by ``seq``."""
        found = (
            self._db.execute("SELECT captured_at, body FROM waiting WHERE seq = ?", (seq,)).fetchone() for seq in seqs
        )
        bodies = {seq: row for seq, row in zip(seqs, found, strict=True) if row is not None}
        for seq, (captured_at, body) in bodies.items():
            salvage.require(type(body) is bytes and type(captured_at) is float, f"waiting {seq}")
        return bodies

    @_mended
    def end_waiting(
        self,
        *,
        confirmed: Mapping[int, bytes] | None = None,
        dead: Mapping[int, str] | None = None,
        ignored: Mapping[int, str] | None = None,
    ) -> int:
        """Of those that wait: ``confirmed`` ones are pending again, last in line, with these bytes; ``dead`` ones
        become dead letters for this error; ``ignored`` ones count as ignored for this reason. Gives the number of
        the confirmed."""
        again = buried = 0
        with self._transaction():
            for seq, body in (confirmed or {}).items():
                again += self._db.execute(
                    "INSERT INTO events (captured_at, jid, minion, body, trusted) "
                    "SELECT captured_at, jid, minion, ?, 1 FROM waiting WHERE seq = ?",
                    (body, seq),
                ).rowcount
                self._delete_waiting(seq)
            for seq, error in (dead or {}).items():
                buried += self._bury("waiting", seq, "unconfirmed", error)
            left = [reason for seq, reason in (ignored or {}).items() if self._delete_waiting(seq)]
            journalfile.count(self._db, collections.Counter(f"ignored.{reason}" for reason in left))
            journalfile.count(self._db, self._trim_dead_letters(dead or {}))
        self.pending -= buried + len(left)
        return again

    def _delete_waiting(self, seq: int) -> int:
        return self._db.execute("DELETE FROM waiting WHERE seq = ?", (seq,)).rowcount

    @property
    def taken_through(self) -> int:
        """Every event up to this ``seq`` was taken for a batch, or is gone."""
        return self._taken_through

    @property
    def verified_through(self) -> int:
        """Every event up to this ``seq`` needs no confirmation any more."""
        return self._verified_through

    @_mended
    def verified(self, through: int, replaced: Mapping[int, bytes]) -> None:
        """Remembers that the job cache confirmed all events up to ``through``, some of them in other words."""
        with self._transaction():
            for seq, body in replaced.items():
                self._db.execute("UPDATE events SET body = ? WHERE seq = ?", (body, seq))
            self._set_mark(_VERIFIED_THROUGH, through)
        self._verified_through = through

    @_mended
    def mark(self, name: str) -> float | None:
        """What :meth:`set_mark` put down."""
        row = self._db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return None if row is None else float(row[0])

    @_mended
    def set_mark(self, name: str, value: float) -> None:
        """Puts down a number that must be known after a restart."""
        with self._transaction():
            self._set_mark(name, value)

    def _set_mark(self, name: str, value: float) -> None:
        self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))

    @_mended
    def known(self, jids: Sequence[str]) -> set[tuple[str, str]]:
        """The (jid, minion) of these jobs that are here already: pending, waiting, or refused by the database.

        A job's load has the minion ``""``.
        """
        known: set[tuple[str, str]] = set()
        for start in range(0, len(jids), 250):
            chunk = jids[start : start + 250]
            marks = ", ".join("?" * len(chunk))
            known.update(
                self._db.execute(
                    f"SELECT jid, minion FROM events WHERE jid IN ({marks}) UNION "
                    f"SELECT jid, minion FROM waiting WHERE jid IN ({marks}) UNION "
                    f"SELECT jid, minion FROM dead_letters WHERE reason <> 'unconfirmed' AND jid IN ({marks})",
                    [*chunk, *chunk, *chunk],
                )
            )
        return known

    @_mended
    def dead_letters(
        self, *, after: int = 0, seq: int | None = None, limit: int = 100, newest: bool = False
    ) -> list[DeadLetter]:
        """Dead letters by ``seq``: the first above ``after``, the ``newest``, or the one of ``seq``."""
        where, value = ("seq > ?", after) if seq is None else ("seq = ?", seq)
        rows = self._db.execute(
            "SELECT seq, captured_at, failed_at, jid, minion, reason, error, body FROM dead_letters "
            f"WHERE {where} ORDER BY seq {'DESC' if newest else 'ASC'} LIMIT ?",
            (value, limit),
        ).fetchall()
        letters = [DeadLetter._make(row) for row in (reversed(rows) if newest else rows)]
        for letter in letters:
            times = (letter.captured_at, letter.failed_at)
            texts = (letter.jid, letter.minion, letter.reason, letter.error)
            sound = type(letter.body) is bytes and {*map(type, times)} == {float} and {*map(type, texts)} == {str}
            salvage.require(sound, f"dead letter {letter.seq}")
        return letters

    @_mended
    def delete_dead_letters(self, seq: int | None) -> int:
        """Drops one dead letter, or all; gives how many."""
        with self._transaction():
            where, values = ("", ()) if seq is None else (" WHERE seq = ?", (seq,))
            deleted = self._db.execute(f"DELETE FROM dead_letters{where}", values).rowcount
            journalfile.count(self._db, {"dropped.dead_letter_deleted": deleted})
        return deleted

    @_mended
    def retry_dead_letters(self, seq: int | None, *, trusted: bool) -> int:
        """Makes one dead letter, or all, pending again; ``trusted``: without the job cache's confirmation."""
        with self._transaction():
            where, values = ("", ()) if seq is None else (" WHERE seq = ?", (seq,))
            again = self._db.execute(
                "INSERT INTO events (captured_at, jid, minion, body, trusted) "
                f"SELECT captured_at, jid, minion, body, ? FROM dead_letters{where} ORDER BY seq",
                (trusted, *values),
            ).rowcount
            self._db.execute(f"DELETE FROM dead_letters{where}", values)
        self.pending += again
        return again

    @_mended
    def tend(self, now: float) -> bool:
        """Drops what is too old, and lets the file shrink, a step at a time; whether there is more to give back."""
        self._be_there()
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

    def _measure(self) -> None:
        self.used_bytes = journalfile.used_bytes(self._db)

    @_mended
    def look(self) -> tuple[int, int]:
        """What other processes have appended since the last look: events, and their bytes."""
        self._be_there()
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        if version == self._data_version:
            return 0, 0
        self._data_version = version
        freed = 0
        with self._transaction():
            last, events, size = self._db.execute(
                "SELECT MAX(seq), COUNT(*), SUM(LENGTH(body)) FROM events WHERE seq > ?", (self._seen_through,)
            ).fetchone()
            self._measure()
            if self.caps.drop_oldest:  # the others may go over the cap by a little, since they must not choose victims
                freed, _ = self._free(0, self.caps.max_bytes - self.used_bytes)
                journalfile.count(self._db, {"dropped.journal_full": freed})
            self.pending = self._pending()
        self._seen_through = last or self._seen_through
        self._say_how_full(lost=freed)
        return events, size or 0

    @_mended
    def books(self) -> dict[str, Any]:
        """``captured = written + duplicates + pending + dead_letters + ignored{reason} + dropped{reason}``.

        Beside that, ``waiting`` are those of the pending that wait for the job cache, ``trimmed`` those of
        the written that hold a value which Salt had trimmed.
        """
        with self._snapshot():  # others append meanwhile
            counters, dead_letters, waiting = self._counters(), self._rows("dead_letters"), self._rows("waiting")
            self.pending = self._pending()
        return {
            "captured": counters["captured"],
            "written": counters["written"],
            "duplicates": counters["duplicates"],
            "pending": self.pending,
            "dead_letters": dead_letters,
            "ignored": _by_reason(counters, "ignored."),
            "dropped": _by_reason(counters, "dropped."),
            "waiting": waiting,
            "trimmed": counters["trimmed"],
        }

    def _rows(self, table: str) -> int:
        (count,) = self._db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
        return int(count)

    @_mended
    def oldest(self) -> float | None:
        """When the oldest pending event was captured, in seconds since the epoch."""
        row = self._db.execute("SELECT captured_at FROM events ORDER BY seq LIMIT 1").fetchone()
        return None if row is None else float(row[0])

    @_mended
    def newest_seq(self) -> int:
        """The ``seq`` of the newest pending event; 0 when there is none."""
        (seq,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
        return int(seq)

    @_mended
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
            yield
        if time.monotonic() >= self._checkpoint_at:
            self._empty_log()

    def _empty_log(self) -> None:
        if journalfile.wal_bytes(self.path) < journalfile.WAL_BYTES:
            return
        self._checkpoint_at = time.monotonic() + _CHECKPOINT_AGAIN_SECONDS
        try:
            journalfile.checkpoint(self._db, timeout=_TIMEOUT)
        except sqlite3.Error as exc:  # a full disk, say: what was committed is in the log
            log.debug("The journal's log cannot be brought back now: %s", exc)

    @contextlib.contextmanager
    def _snapshot(self) -> Any:
        with self._db:
            self._db.execute("BEGIN")
            yield

    def _lock(self) -> None:
        self._lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise JournalError(f"another mysql_jobcache engine is using the journal {self.path}") from None

    def _load(self) -> None:
        uuids = self._db.execute("SELECT uuid FROM identity").fetchall()
        salvage.require(len(uuids) == 1 and type(uuids[0][0]) is bytes and len(uuids[0][0]) == 8, "identity")
        ((self._uuid,),) = uuids
        row = self._db.execute("SELECT value FROM marks WHERE name = ?", (_VERIFIED_THROUGH,)).fetchone()
        salvage.require(row is None or type(row[0]) is float, "marks")
        self._verified_through = 0 if row is None else int(row[0])
        with self._snapshot():
            self.pending = self._pending()
        salvage.require(self.pending >= 0, "counters")
        self._measure()
        (newest,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
        self._seen_through = int(newest)
        (self._data_version,) = self._db.execute("PRAGMA data_version").fetchone()

    def _pending(self) -> int:
        """By the books, since counting the rows of a long outage would read all of them."""
        counters = self._counters()
        settled = sum(value for name, value in counters.items() if name not in ("captured", "trimmed"))
        return counters["captured"] - settled - self._rows("dead_letters")

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name("lock")

    def _connect(self) -> sqlite3.Connection:
        db = journalfile.connect(self.path, timeout=_TIMEOUT)
        self._inode = self.path.stat().st_ino
        return db

    def _counters(self) -> collections.Counter[str]:
        counters = dict(self._db.execute("SELECT name, value FROM counters"))
        salvage.require(all(type(n) is str and type(v) is int for n, v in counters.items()), "counters")
        return collections.Counter(counters)

    def _begin_anew(self) -> None:
        """Goes on in a new file with what can be read of the corrupt one, which is set aside.

        It stays in place until the new one is complete, so that a crash or a full disk in between loses nothing.
        """
        self._broken = True
        if hasattr(self, "_db"):
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        with self._new_file() as new:
            new.execute("BEGIN IMMEDIATE")
            report = salvage.copy(self.path, new)
            new.execute("COMMIT")
        lost = "an unknown number" if report.lost is None else report.lost
        log.critical(
            "The corrupt journal was set aside as %s. Saved from it: %d events, %d dead letters; lost: %s",
            self.salvaged, report.events, report.dead_letters, lost,
        )  # fmt: skip

    def _be_there(self) -> None:
        """Somebody may have deleted the file under us: then all that it holds goes into a new one."""
        if journalfile.inode(self.path) == self._inode:
            return
        old, seen_through, salvaged = self._db, self._seen_through, self.salvaged
        try:
            journalfile.make_folder(self.path.parent)
            if journalfile.inode(self._lock_path) != os.fstat(self._lock_fd).st_ino:
                os.close(self._lock_fd)
                self._lock()
        except OSError as exc:
            raise sqlite3.OperationalError(f"the journal's folder cannot be made again: {exc}") from exc
        with self._new_file() as new:
            old.backup(new)
            if self.path.exists():  # another process of the master appends to one of its own already
                journalfile.add(new, self.path)
        old.close()
        salvage.remove(Path(self.salvaged))  # the other process's, if any: it is in the new one
        self.salvaged = salvaged
        self._seen_through, self._data_version = seen_through, -1  # what was added is news
        log.error("Somebody deleted the journal %s while it was in use; it was made again, nothing is lost", self.path)

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[sqlite3.Connection]:
        """A journal to be filled, that then takes the place of what is there.

        Raises:
            sqlite3.OperationalError: the disk is full or read-only, say; everything is as before.
        """
        path = self.path.with_name("journal.new.sqlite")
        try:
            salvage.remove(path)
            with contextlib.closing(journalfile.connect(path, timeout=_TIMEOUT)) as new:
                yield new
            path.rename(journalfile.ready_path(self.path))
            self._broken = True  # until that is open
            self._replace()
            self._db = self._connect()
        except OSError as exc:
            raise sqlite3.OperationalError(f"a new journal cannot be made: {exc}") from exc
        self._load()
        self._broken = False

    def _replace(self) -> None:
        """Puts the new file in the corrupt one's place. May be interrupted, and is then done again at the next start:
        the last step alone makes the new file the journal, when nothing of the old one is left beside it."""
        now = datetime.datetime.now(datetime.timezone.utc)
        self.salvaged = str(salvage.set_aside(self.path, f"{now:%Y%m%dT%H%M%S%f}"))
        journalfile.ready_path(self.path).rename(self.path)


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
