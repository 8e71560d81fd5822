"""The journal: a durable queue of events between the bus and MySQL, in one SQLite file.

Promise
    An event that :meth:`Journal.append` returned for survives the death of this process at any
    instant, and stays until :meth:`Journal.settle` says what became of it. Nothing else removes it.

Format
    ``<cachedir>/mysql_jobcache/journal.sqlite`` in WAL mode, directory 0700, files 0600. ``events``
    holds each event's bytes as they came from the bus, under a ``seq`` that only grows and is never
    used again, with jid and minion id from the tag beside them. ``counters`` holds the books;
    ``dead_letters`` what the database refused.

Invariants
    Appending counts as captured, in the same transaction; settling deletes rows and counts their
    fate, in the same transaction. So after any crash
    ``captured = rows in events + rows in dead_letters + the sum of the settled counters``.

Recovery
    SQLite replays its own WAL at opening. ``synchronous=NORMAL``: a commit survives ``kill -9`` of
    the process at once, and a power cut once SQLite has next synced its WAL. A power cut can take the
    newest commits, never the file's consistency.

One engine at a time: an exclusive lock on ``lock`` beside the file, freed by the kernel at death.
All calls block; the engine makes them in one thread of its own.
"""

from __future__ import annotations

import collections
import fcntl
import functools
import os
import sqlite3
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import JournalError

FORMAT = 1
_APPLICATION_ID = 0x53414C54  # "SALT"

_TABLES = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE TABLE dead_letters (
    seq INTEGER PRIMARY KEY,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL,
    error TEXT NOT NULL,
    failed_at REAL NOT NULL
);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE identity (uuid BLOB NOT NULL);
"""

_KEEP_FREE_PAGES, _GIVE_BACK_PAGES = 4096, 4096  # of 4 KiB
_MAX_APPEND_ROWS = 240  # times four values: SQLite before 3.32 takes 999 in a statement


class NewEvent(NamedTuple):
    """An event on its way in: when it was captured (seconds since the epoch), whose, and its bytes."""

    captured_at: float
    jid: str
    minion: str
    body: bytes


class Entry(NamedTuple):
    """An event on its way out."""

    seq: int
    captured_at: float
    body: bytes


class Settlement(NamedTuple):
    """What became of some events: their ``seq``, counts by fate, and the errors of dead letters by ``seq``."""

    seqs: Sequence[int]
    fates: Mapping[str, int]
    dead: Mapping[int, str]


class Journal:
    """The queue. Open it, append, read, settle, close: all from one thread."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "journal.sqlite"
        self.pending = 0
        """Rows in ``events``: by the books at opening, then by what statements really inserted and deleted."""
        self._lock_fd = -1
        self._db: sqlite3.Connection
        self._uuid = b""

    def open(self) -> None:
        """Creates or opens the file.

        Raises:
            JournalError: it is in use, not ours, of a newer format, or the folder cannot be used.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.parent.chmod(0o700)
            self._lock()
            self._db = self._connect()
            # From the books: counting the rows of a night's outage would keep the bus waiting for seconds.
            (self.pending,) = self._db.execute(
                "SELECT COALESCE(SUM(CASE name WHEN 'captured' THEN value ELSE -value END), 0)"
                " - (SELECT COUNT(*) FROM dead_letters) FROM counters"
            ).fetchone()
            (self._uuid,) = self._db.execute("SELECT uuid FROM identity").fetchone()
        except (OSError, sqlite3.Error) as exc:
            raise JournalError(f"cannot open the journal {self.path}: {exc}") from exc

    def close(self) -> None:
        """Closes the file and frees the lock."""
        self._db.close()
        os.close(self._lock_fd)

    @property
    def size_on_disk(self) -> int:
        """Bytes of the file and its write-ahead log."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(path.stat().st_size for path in files if path.exists())

    def append(self, events: Sequence[NewEvent], *, dropped: int = 0) -> None:
        """Adds events, all or none; ``dropped`` more were captured and had no place in memory."""
        inserted = 0
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for start in range(0, len(events), _MAX_APPEND_ROWS):
                chunk = events[start : start + _MAX_APPEND_ROWS]
                # One statement for many rows: executemany() takes twice the time, most of it handing
                # the interpreter's lock to and fro around every row.
                done = self._db.execute(_insert(len(chunk)), [value for event in chunk for value in event])
                inserted += done.rowcount
            self._count({"captured": inserted + dropped, "dropped.memory_full": dropped})
        self.pending += inserted

    def read(self, *, after: int, rows: int, max_bytes: int) -> list[Entry]:
        """The oldest entries with a ``seq`` above ``after``: ``rows`` at most, and about ``max_bytes``."""
        entries: list[Entry] = []
        for row in self._db.execute(
            "SELECT seq, captured_at, body FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, rows)
        ):
            entry = Entry._make(row)
            entries.append(entry)
            max_bytes -= len(entry.body)
            if max_bytes <= 0:
                break
        return entries

    def settle(self, settlement: Settlement) -> None:
        """Removes events whose fate is known, and counts it; dead letters move to their own table."""
        deleted = 0
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for seq, error in settlement.dead.items():
                self._db.execute(
                    "INSERT INTO dead_letters "
                    "SELECT seq, captured_at, jid, minion, body, ?, ? FROM events WHERE seq = ?",
                    (error, time.time(), seq),
                )
            for first, last in _ranges(settlement.seqs):
                deleted += self._db.execute("DELETE FROM events WHERE seq BETWEEN ? AND ?", (first, last)).rowcount
            self._count(settlement.fates)
        self.pending -= deleted
        if not self.pending:
            self._give_back()

    def _give_back(self) -> None:
        """Lets the file shrink after an outage, a step at a time; what a busy hour needs stays."""
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        if free > _KEEP_FREE_PAGES:
            self._db.execute(f"PRAGMA incremental_vacuum({_GIVE_BACK_PAGES})").fetchall()

    def books(self) -> dict[str, Any]:
        """``captured = written + duplicates + pending + dead_letters + ignored{reason} + dropped{reason}``."""
        counters = collections.Counter(dict(self._db.execute("SELECT name, value FROM counters")))
        (dead_letters,) = self._db.execute("SELECT COUNT(*) FROM dead_letters").fetchone()
        return {
            "captured": counters["captured"],
            "written": counters["written"],
            "duplicates": counters["duplicates"],
            "pending": self.pending,
            "dead_letters": dead_letters,
            "ignored": _by_reason(counters, "ignored."),
            "dropped": _by_reason(counters, "dropped."),
        }

    def oldest(self) -> float | None:
        """When the oldest pending event was captured, in seconds since the epoch."""
        row = self._db.execute("SELECT captured_at FROM events ORDER BY seq LIMIT 1").fetchone()
        return None if row is None else float(row[0])

    def newest_seq(self) -> int:
        """The ``seq`` of the newest pending event; 0 when there is none."""
        (seq,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
        return int(seq)

    def oldest_seq(self) -> int | None:
        """The ``seq`` of the oldest pending event."""
        (seq,) = self._db.execute("SELECT MIN(seq) FROM events").fetchone()
        return None if seq is None else int(seq)

    def event_key(self, seq: int) -> bytes:
        """16 bytes that no other event of any journal has."""
        return self._uuid + struct.pack(">q", seq)

    def _lock(self) -> None:
        self._lock_fd = os.open(self.path.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise JournalError(f"another mysql_jobcache engine is using the journal {self.path}") from None

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # WAL and shared-memory files take the main file's mode.
        db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables and application != _APPLICATION_ID:
            raise JournalError(f"{self.path} is not a journal of mysql_jobcache; move it away and restart the master")
        if version > FORMAT:
            raise JournalError(
                f"{self.path} was written by a newer mysql_jobcache (format {version}, this one knows {FORMAT}); "
                "install that version again, or move the file away to begin a new journal"
            )
        if not tables:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only takes effect before the first table
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if not tables:
            with db:
                db.execute("BEGIN IMMEDIATE")
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO identity VALUES (?)", (os.urandom(8),))
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {FORMAT}")
        return db

    def _count(self, counts: Mapping[str, int]) -> None:
        self._db.executemany(
            "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            [(name, count) for name, count in counts.items() if count],
        )


def _by_reason(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name[len(prefix) :]: count for name, count in sorted(counters.items()) if name.startswith(prefix)}


@functools.cache
def _insert(rows: int) -> str:
    return "INSERT INTO events (captured_at, jid, minion, body) VALUES " + ", ".join(["(?, ?, ?, ?)"] * rows)


def _ranges(seqs: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, last)."""
    ranges: list[tuple[int, int]] = []
    for seq in sorted(seqs):
        if ranges and seq == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], seq)
        else:
            ranges.append((seq, seq))
    return ranges
