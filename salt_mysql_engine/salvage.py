"""What can be read of a corrupt journal: row by row, around the pages that SQLite cannot read.

A B-tree gives access to every row whose path from the root is whole. So rows are read forwards until
an error, then in small ranges of ``seq`` beyond it, each of which fails or succeeds by itself; what
lies under a broken page is lost, and nothing else.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .journalfile import BODY, NEVER_USED, count

BROKEN = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What a damaged file raises: also where SQLite's message quotes a damaged name, which Python then cannot decode."""

_CORRUPTION = (
    "malformed", "not a database", "disk image", "database corruption", "Could not decode to UTF-8",
    "no such column", "no such table", "has no column named",  # our statements name what every sound file has
)  # fmt: skip
_UPGRADED = {
    "events": ("seq", "captured_at", "jid", "minion", "body", "state"),
    "dead_letters": ("seq", "captured_at", "jid", "minion", "body", "error", "failed_at", "reason", "state"),
}
"""The order of the columns in a file that began with an older format."""
_RANGES = (4096, 64, 1)
_KEEP_FILES = 3
_MAX_SEQ = 2**53
"""Larger numbers are damage."""
_MAX_SPAN = 5_000_000
"""So many numbers are looked up, at the end, where reading forwards ended early."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    "seq": int, "captured_at": float, "jid": str, "minion": str, "body": bytes, "state": int,
    "error": str, "failed_at": float, "reason": str, "name": str, "value": (int, float), "uuid": bytes,
}  # fmt: skip


class Report(NamedTuple):
    """How much was saved; ``lost`` is ``None`` where the old books could not be read."""

    events: int
    dead_letters: int
    lost: int | None


def is_corruption(exc: Exception) -> bool:
    """Whether SQLite says that the file is damaged (SQLITE_CORRUPT, SQLITE_NOTADB)."""
    if isinstance(exc, UnicodeDecodeError):
        return True
    # Python 3.10 gives no error codes; these texts are SQLite's own (sqlite3ErrStr, main.c).
    return any(text in str(exc) for text in _CORRUPTION)


def require(sound: object, what: str) -> None:
    """Raises what SQLite raises for a damage that it notices, for one that it does not: a value of another type."""
    if not sound:
        raise sqlite3.DatabaseError(f"database disk image is malformed: {what}")


def set_aside(path: Path, name: str) -> Path:
    """Moves what there is of a file and its WAL out of the way, under a new name; keeps the last few of them."""
    aside = path.with_name(f"{path.stem}.corrupt-{name}.sqlite")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    for old in sorted(path.parent.glob(f"{path.stem}.corrupt-*.sqlite"))[:-_KEEP_FILES]:
        remove(old)
    return aside


def remove(path: Path) -> None:
    """Removes a database file and what belongs to it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def copy(source: Path, into: sqlite3.Connection) -> Report:
    """Copies what is readable into an empty journal, inside the caller's transaction; the books balance after it."""
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as old:
        old.text_factory = lambda text: text.decode(errors="replace")
        old.execute("PRAGMA writable_schema = ON")  # else a file that was cut off is refused as a whole
        saved = {table: _copy_rows(old, into, table, table) for table in ("events", "dead_letters")}
        is_format_2 = False
        with contextlib.suppress(*BROKEN):
            is_format_2 = bool(old.execute("PRAGMA table_info(waiting)").fetchall())
        if is_format_2:  # it has some of its events there
            saved["events"] += _copy_rows(old, into, "waiting", "events")
        _copy_table(old, into, "counters", "name", "value")
        last = _last_number(old)
        if last is not None:  # else numbers will be used again, which nothing of the old file may know
            _copy_table(old, into, "identity", "uuid")
            _copy_table(old, into, "marks", "name", "value")
            _copy_table(old, into, "notes", "name", "value", text=True)
    highest = [into.execute(f"SELECT COALESCE(MAX(seq), 0) FROM {table}").fetchone()[0] for table in saved]
    into.execute("DELETE FROM sqlite_sequence")
    into.execute("INSERT INTO sqlite_sequence VALUES ('events', ?)", (max(last or 0, *highest) + NEVER_USED,))
    return Report(saved["events"], saved["dead_letters"], _balance(into, sum(saved.values())))


def merge(other: sqlite3.Connection, into: sqlite3.Connection) -> int:
    """Adds what waits in another sound journal, and its books, under new numbers; gives how many events and dead
    letters. An earlier state of the same journal holds nothing else."""
    identity = "SELECT uuid FROM identity"
    if other.execute(identity).fetchall() == into.execute(identity).fetchall():
        return 0
    highest = "SELECT MAX((SELECT COALESCE(MAX(seq), 0) FROM {}), COALESCE((SELECT seq FROM sqlite_sequence), 0))"
    added = 0
    with into:
        into.execute("BEGIN IMMEDIATE")
        for table in ("events", "dead_letters"):
            (seq,) = into.execute(highest.format(table)).fetchone()
            columns = [row[1] for row in into.execute(f"PRAGMA table_info({table})") if row[1] != "seq"]
            named, marks = ", ".join(columns), ", ".join("?" * len(columns))
            values = ", ".join(BODY if name == "body" else name for name in columns)
            for row in other.execute(f"SELECT {values} FROM {table} ORDER BY seq"):
                require(_is_sound(columns, row), table)
                seq += 1
                into.execute(f"INSERT INTO {table} (seq, {named}) VALUES (?, {marks})", (seq, *row))
                added += 1
            into.execute("DELETE FROM sqlite_sequence")
            into.execute("INSERT INTO sqlite_sequence VALUES ('events', ?)", (seq,))
        count(into, dict(other.execute("SELECT name, value FROM counters")))
        into.executemany(
            "INSERT OR IGNORE INTO marks VALUES (?, ?)",
            other.execute("SELECT name, value FROM marks WHERE name LIKE 'spool %'"),
        )
    return added


def _copy_table(
    old: sqlite3.Connection, into: sqlite3.Connection, table: str, *columns: str, text: bool = False
) -> None:
    def is_sound(row: Sequence[Any]) -> bool:
        return all(isinstance(value, str) for value in row) if text else _is_sound(columns, row)

    rows: list[Any] = []
    with contextlib.suppress(*BROKEN):
        rows = [row for row in old.execute(f"SELECT {', '.join(columns)} FROM {table}") if is_sound(row)]
    if rows:
        into.execute(f"DELETE FROM {table}")
        marks = ", ".join("?" * len(columns))
        into.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)


def _is_sound(columns: Sequence[str], row: Sequence[Any]) -> bool:
    values = dict(zip(columns, row, strict=True))
    if not all(isinstance(value, _TYPES[name]) for name, value in values.items()):
        return False
    return 0 < values.get("seq", 1) < _MAX_SEQ and len(values.get("uuid", bytes(8))) == 8


def _last_number(old: sqlite3.Connection) -> int | None:
    """The last ``seq`` that was ever given; ``None`` when that cannot be read."""
    try:
        numbers = [row[0] for row in old.execute("SELECT seq FROM sqlite_sequence")]
    except BROKEN:
        return None
    return max((n for n in numbers if isinstance(n, int) and 0 < n < _MAX_SEQ), default=None)


def _balance(db: sqlite3.Connection, saved: int) -> int | None:
    db.execute(
        "DELETE FROM counters WHERE typeof(value) <> 'integer' OR NOT (name IN ('captured', 'written', 'duplicates', "
        "'trimmed') OR name LIKE 'ignored.%' OR name LIKE 'dropped.%')"
    )
    counters: dict[str, int] = dict(db.execute("SELECT name, value FROM counters"))
    settled = sum(value for name, value in counters.items() if name not in ("captured", "trimmed"))
    lost = int(counters.get("captured", 0) - settled - saved)
    if counters.get("captured") is None or lost < 0:  # the old books are gone: new ones begin with what is here
        db.execute("DELETE FROM counters")
        db.execute("INSERT INTO counters VALUES ('captured', ?)", (saved,))
        return None
    if lost:
        db.execute(
            "INSERT INTO counters VALUES ('dropped.journal_corrupt', ?) "
            "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (lost,),
        )
    return lost


def _copy_rows(old: sqlite3.Connection, into: sqlite3.Connection, source: str, table: str) -> int:
    columns = [row[1] for row in into.execute(f"PRAGMA table_info({table})")]
    named, orders = ", ".join(columns), [columns]
    with contextlib.suppress(*BROKEN):  # one of an older format has fewer, and calls the state otherwise
        have = [row[1] for row in old.execute(f"PRAGMA table_info({source})")]
        older = {"state": "trusted"} if "trusted" in have else {}
        known = [name for name in columns if older.get(name, name) in have]
        if source == table and len(have) == len(columns) > len(
            known
        ):  # a name is damaged, and the values say which they are
            named, orders = "*", [columns, list(_UPGRADED[table])]
        elif known:
            read_as = {**older, "body": BODY} if _has_bodies(old) else older
            named, orders = ", ".join(read_as.get(name, name) for name in known), [known]
    saved = 0
    for row in _readable(old, source, named):
        for order in orders:
            if _is_sound(order, row):
                names, marks = ", ".join(order), ", ".join("?" * len(order))
                saved += into.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})", row).rowcount
                break
    return saved


def _has_bodies(old: sqlite3.Connection) -> bool:
    with contextlib.suppress(*BROKEN):
        return bool(old.execute("PRAGMA table_info(bodies)").fetchall())
    return False


def _readable(old: sqlite3.Connection, table: str, names: str) -> Iterator[tuple[Any, ...]]:
    """Every row that can be read, each once or more."""
    last = 0
    try:
        for row in old.execute(f"SELECT {names} FROM {table} ORDER BY rowid"):
            if isinstance(row[0], int):
                last = row[0]
            yield row
    except BROKEN:
        pass
    else:
        return
    end = _last_seq(old, table)
    if end is not None:
        yield from _in_ranges(old, table, names, max(last + 1, end - _MAX_SPAN), end, _RANGES)


def _last_seq(old: sqlite3.Connection, table: str) -> int | None:
    for statement in (f"SELECT MAX(rowid) FROM {table}", "SELECT MAX(seq) FROM sqlite_sequence"):
        with contextlib.suppress(*BROKEN):
            (seq,) = old.execute(statement).fetchone()
            if isinstance(seq, int) and seq < _MAX_SEQ:
                return seq
    return None


def _in_ranges(
    old: sqlite3.Connection, table: str, names: str, first: int, end: int, sizes: tuple[int, ...]
) -> Iterator[tuple[Any, ...]]:
    """A range that cannot be read as a whole is read in smaller ones."""
    for start in range(first, end + 1, sizes[0]):
        stop = min(start + sizes[0] - 1, end)
        # A row that is looked up by its number is read without a step onto the page behind it.
        where, values = ("rowid = ?", (start,)) if start == stop else ("rowid BETWEEN ? AND ?", (start, stop))
        try:  # row by row, for they may be large
            yield from old.execute(f"SELECT {names} FROM {table} WHERE {where}", values)
        except BROKEN:
            if len(sizes) > 1:
                yield from _in_ranges(old, table, names, start, stop, sizes[1:])
