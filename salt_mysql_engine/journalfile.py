"""The journal's file: its tables, opening and upgrading it, and adding rows to it.

``<cachedir>/mysql_jobcache/journal.sqlite`` in WAL mode, directory 0700, files 0600, of the owner of ``cachedir``. The
engine's process alone opens it (``journal.py``), and only through SQLite: to close any descriptor of the file would
drop all locks that SQLite has on it in this process.

The write-ahead log is brought back into the file by :func:`checkpoint` alone, never by a commit: so no commit waits for
a disk.
"""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import folders
from .errors import JournalError

log = logging.getLogger(__name__)

FORMAT = 3
_APPLICATION_ID = 0x53414C54  # "SALT"

UNCHECKED, CONFIRMED, STUB = 0, 1, 2
"""The states of an event: as it came from the bus; needs no look into the job cache (any more); names what the job
cache holds, from which its payload is still to be made."""

_TABLES = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    state INTEGER NOT NULL DEFAULT 0,
    body BLOB NOT NULL
);
CREATE INDEX events_by_job ON events (jid, minion);
CREATE TABLE dead_letters (
    seq INTEGER PRIMARY KEY,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    error TEXT NOT NULL,
    failed_at REAL NOT NULL,
    reason TEXT NOT NULL DEFAULT 'refused',
    state INTEGER NOT NULL DEFAULT 0,
    body BLOB NOT NULL
);
CREATE INDEX dead_letters_by_job ON dead_letters (jid, minion);
CREATE INDEX dead_letters_by_reason ON dead_letters (reason, failed_at, seq);
CREATE TABLE bodies (id INTEGER PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE identity (uuid BLOB NOT NULL)
"""

_UPGRADES = {
    1: """
ALTER TABLE events ADD COLUMN trusted INTEGER NOT NULL DEFAULT 0;
CREATE INDEX events_by_job ON events (jid, minion);
CREATE TABLE waiting (
    seq INTEGER PRIMARY KEY,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL,
    since REAL NOT NULL
);
CREATE INDEX waiting_by_job ON waiting (jid, minion);
ALTER TABLE dead_letters ADD COLUMN reason TEXT NOT NULL DEFAULT 'refused';
CREATE INDEX dead_letters_by_job ON dead_letters (jid, minion);
CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID
""",
    # The mark `verified_through` covers events that nobody looked at: all of them are looked at again.
    2: """
ALTER TABLE events RENAME COLUMN trusted TO state;
INSERT INTO events (seq, captured_at, jid, minion, body, state)
    SELECT seq, captured_at, jid, minion, body, 0 FROM waiting;
DROP TABLE waiting;
ALTER TABLE dead_letters ADD COLUMN state INTEGER NOT NULL DEFAULT 0;
CREATE INDEX dead_letters_by_reason ON dead_letters (reason, failed_at, seq);
DELETE FROM marks WHERE name = 'verified_through';
CREATE TABLE bodies (id INTEGER PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID
""",
}
"""From each older format to the next. Written out: an upgrade must not change when the tables above do."""

WHOLE_BYTES = 256 * 1024
"""An event's body is large above this. It stands in ``bodies`` then, and its number in its place: so an event becomes a
dead letter, and an event again, without its bytes being written again. In a file that began with an older format, or
was salvaged, large ones stand in the rows, too."""
BODY = "CASE typeof(body) WHEN 'integer' THEN (SELECT content FROM bodies WHERE id = body) ELSE body END"
BODY_BYTES = (
    "CASE typeof(body) WHEN 'integer' THEN (SELECT LENGTH(content) FROM bodies WHERE id = body) ELSE LENGTH(body) END"
)
"""A body's length stands before it: SQLite does not read one that is not wanted."""
PAGE_BYTES = 4096
ROW_BYTES = 150
"""What an event takes in the file beside its body, in the table and its index."""
NEVER_USED = 1_000_000
"""So far ahead numbering goes on where numbers may be lost that were used: more than there are in a moment."""
BOOT = "boot"
"""The note of the system's run in which numbers were given last."""
RESERVE_BYTES = 16 * 1024 * 1024
WAL_BYTES = 4 * 1024 * 1024
"""From this size on the engine empties the write-ahead log."""
_MAX_APPEND_ROWS = 190  # times five values: SQLite before 3.32 takes 999 in a statement
_APPEND_BYTES = 64 * 1024


class NewEvent(NamedTuple):
    """An event on its way in: when it was captured (seconds since the epoch), whose, its bytes, and its state."""

    captured_at: float
    jid: str
    minion: str
    body: bytes
    state: int = UNCHECKED


def new_path(path: Path) -> Path:
    """A file that is being made, to take a corrupt one's place."""
    return path.with_name("journal.new.sqlite")


def ready_path(path: Path) -> Path:
    """The same, complete; it waits to take that place."""
    return path.with_name("journal.ready.sqlite")


def connect(path: Path, *, timeout: float) -> sqlite3.Connection:
    """Opens the file; creates it where there is none, and brings an older one to this format.

    ``timeout``: seconds that a statement may wait for another process. The connection may go from thread to thread.

    Raises:
        JournalError: the file is not ours, or of a newer format.
        sqlite3.Error, OSError: it cannot be used.
    """
    _make(path)
    # WAL and shared-memory files take the main file's mode and owner.
    db = sqlite3.connect(path, isolation_level=None, timeout=timeout, check_same_thread=False)
    try:
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _make(path: Path) -> None:
    """An empty file where there is none, which SQLite takes for a new one. One that is there is not opened."""
    folder = folders.open_folder(path.parent)
    try:
        try:
            mode = os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            os.close(folders.create(folder, path.name))
            return
    finally:
        os.close(folder)
    if not stat.S_ISREG(mode):
        raise JournalError(f"{path} is a link, or no file; move it away and restart the master")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if tables and application != _APPLICATION_ID:
        raise JournalError(f"{path} is not a journal of mysql_jobcache; move it away and restart the master")
    if version > FORMAT:
        raise JournalError(
            f"{path} was written by a newer mysql_jobcache (format {version}, this one knows {FORMAT}); "
            "install that version again, or move the file away to begin a new journal"
        )
    if not tables:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only takes effect before the first table
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA wal_autocheckpoint = 0")
    if version == FORMAT:
        return
    with db:
        db.execute("BEGIN IMMEDIATE")
        if not tables:
            _run(db, _TABLES)
            db.execute("INSERT INTO identity VALUES (?)", (os.urandom(8),))
            db.execute("INSERT INTO notes VALUES (?, ?)", (BOOT, boot()))
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        else:
            for older in range(version, FORMAT):
                _run(db, _UPGRADES[older])
                log.warning("The journal %s was upgraded from format %d to %d", path, older, older + 1)
        db.execute(f"PRAGMA user_version = {FORMAT}")


def checkpoint(db: sqlite3.Connection, *, timeout: float) -> None:
    """Brings the write-ahead log back into the file and empties it, as far as nobody reads it.

    ``timeout`` is what the connection waits for others otherwise, in seconds.
    """
    # A reader, while nobody answers it, or somebody with the sqlite3 program: it is emptied when they are gone.
    db.execute("PRAGMA busy_timeout = 0")
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        db.execute(f"PRAGMA busy_timeout = {round(timeout * 1000)}")


def wal_bytes(path: Path) -> int:
    """The size of the write-ahead log."""
    try:
        return os.stat(f"{path}-wal").st_size  # noqa: PTH116 (after every commit: a Path costs more than the call)
    except OSError:
        return 0


def identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, and of which disk; nothing when there is none."""
    try:
        its = os.stat(path)  # noqa: PTH116 (before every group: a Path costs more than the call)
    except OSError:
        return None
    return its.st_dev, its.st_ino


def boot() -> str:
    """What tells this run of the system from any other; nothing where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def number_on(db: sqlite3.Connection) -> None:
    """Leaves out numbers, inside the caller's transaction: a power cut may have taken the newest commits, and MySQL
    has what was numbered in them."""
    if not db.execute("UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'events'", (NEVER_USED,)).rowcount:
        db.execute("INSERT INTO sqlite_sequence VALUES ('events', ?)", (NEVER_USED,))


def leave_room_to_settle(db: sqlite3.Connection, path: Path) -> None:
    """On a disk that is full to the last page nothing could be deleted either: deleting writes to the WAL.

    Raises:
        sqlite3.OperationalError: there is no room for more events, or the disk does not say.
    """
    try:
        disk = os.statvfs(path.parent)
    except OSError as exc:
        raise sqlite3.OperationalError(f"the disk cannot be asked how much room is left: {exc}") from exc
    if disk.f_bavail * disk.f_frsize >= RESERVE_BYTES:
        return
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    if disk.f_bavail * disk.f_frsize + free * PAGE_BYTES < RESERVE_BYTES:
        raise sqlite3.OperationalError(f"database or disk is full: less than {RESERVE_BYTES // 2**20} MiB are left")


def used_bytes(db: sqlite3.Connection) -> int:
    """Of the file's pages, those that hold something."""
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    return int((pages - free) * PAGE_BYTES)


def size_of(events: Sequence[NewEvent]) -> int:
    """What events take in the file."""
    return sum(len(event.body) for event in events) + ROW_BYTES * len(events)


def insert(db: sqlite3.Connection, events: Sequence[NewEvent]) -> None:
    """Adds events, inside the caller's transaction."""
    start = 0
    while start < len(events):
        # One statement for many rows: executemany() takes twice the time, most of it handing
        # the interpreter's lock to and fro around every row.
        chunk = _chunk(events, start)
        values: list[Any] = [value for event in chunk for value in event]
        if len(chunk[0].body) > WHOLE_BYTES:  # it is alone
            values[3] = _put_away(db, chunk[0].body)
        db.execute(_insert(len(chunk)), values)
        start += len(chunk)


def confirm(db: sqlite3.Connection, seq: int, body: bytes) -> None:
    """Puts an event's bytes as the job cache has them in the place of those that came."""
    if len(body) <= WHOLE_BYTES:
        changed = db.execute(
            "UPDATE events SET body = ?, state = ? WHERE seq = ? AND typeof(body) <> 'integer'", (body, CONFIRMED, seq)
        ).rowcount
        if changed:
            return
    if db.execute("SELECT 1 FROM events WHERE seq = ?", (seq,)).fetchone() is None:
        return
    _forget_bodies(db, "events", "seq = ?", (seq,))
    content = body if len(body) <= WHOLE_BYTES else _put_away(db, body)
    db.execute("UPDATE events SET body = ?, state = ? WHERE seq = ?", (content, CONFIRMED, seq))


def delete(db: sqlite3.Connection, table: str, where: str, values: Sequence[int]) -> int:
    """Deletes rows of ``events`` or ``dead_letters`` for good, inside the caller's transaction; gives how many."""
    _forget_bodies(db, table, where, values)
    return db.execute(f"DELETE FROM {table} WHERE {where}", values).rowcount


def _put_away(db: sqlite3.Connection, body: bytes) -> int | None:
    return db.execute("INSERT INTO bodies (content) VALUES (?)", (body,)).lastrowid


def _forget_bodies(db: sqlite3.Connection, table: str, where: str, values: Sequence[int]) -> None:
    large = f"SELECT body FROM {table} WHERE typeof(body) = 'integer' AND {where}"
    db.execute(f"DELETE FROM bodies WHERE id IN ({large})", values)


def _chunk(events: Sequence[NewEvent], start: int) -> Sequence[NewEvent]:
    """The next events for one statement: many only of small ones.

    A connection keeps its statements, one for each number of rows, and a statement keeps its last values. With any
    number of rows of any size that would be a hundred megabytes.
    """
    end, room = start, _APPEND_BYTES
    for event in events[start : start + _MAX_APPEND_ROWS]:
        room -= len(event.body)
        if room < 0 and end > start:
            break
        end += 1
    return events[start:end]


def count(db: sqlite3.Connection, counts: Mapping[str, int]) -> None:
    """Adds to the books, inside the caller's transaction."""
    for name, number in counts.items():
        if number:
            db.execute(
                "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                (name, number),
            )


@functools.cache
def _insert(rows: int) -> str:
    return "INSERT INTO events (captured_at, jid, minion, body, state) VALUES " + ", ".join(["(?, ?, ?, ?, ?)"] * rows)


def _run(db: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";"):
        db.execute(statement)
