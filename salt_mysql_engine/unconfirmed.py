"""The returns that the job cache did not confirm yet. All functions work inside their caller's transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from . import salvage


class Waiting(NamedTuple):
    """A return that the job cache did not confirm yet; ``since`` in seconds since the epoch."""

    seq: int
    jid: str
    minion: str
    since: float


def put_aside(db: sqlite3.Connection, first: int, last: int, since: float) -> list[Waiting]:
    """Moves the events between two numbers here; gives them."""
    db.execute(
        "INSERT INTO waiting SELECT seq, captured_at, jid, minion, body, ? FROM events WHERE seq BETWEEN ? AND ?",
        (since, first, last),
    )
    db.execute("DELETE FROM events WHERE seq BETWEEN ? AND ?", (first, last))
    rows = db.execute("SELECT seq, jid, minion, since FROM waiting WHERE seq BETWEEN ? AND ?", (first, last))
    return [Waiting._make(row) for row in rows]


def read(db: sqlite3.Connection) -> list[Waiting]:
    """Everything that waits, oldest first."""
    waiting = [Waiting._make(row) for row in db.execute("SELECT seq, jid, minion, since FROM waiting ORDER BY seq")]
    for seq, jid, minion, since in waiting:
        salvage.require(type(jid) is str and type(minion) is str and type(since) is float, f"waiting {seq}")
    return waiting


def bodies(db: sqlite3.Connection, seqs: Sequence[int]) -> dict[int, tuple[float, bytes]]:
    """When some of them were captured, and their bytes, by ``seq``."""
    found = (db.execute("SELECT captured_at, body FROM waiting WHERE seq = ?", (seq,)).fetchone() for seq in seqs)
    bodies = {seq: row for seq, row in zip(seqs, found, strict=True) if row is not None}
    for seq, (captured_at, body) in bodies.items():
        salvage.require(type(body) is bytes and type(captured_at) is float, f"waiting {seq}")
    return bodies


def confirm(db: sqlite3.Connection, seq: int, body: bytes) -> int:
    """Makes one an event again, last in line, with these bytes; 0 when it is not there (any more)."""
    again = db.execute(
        "INSERT INTO events (captured_at, jid, minion, body, trusted) "
        "SELECT captured_at, jid, minion, ?, 1 FROM waiting WHERE seq = ?",
        (body, seq),
    ).rowcount
    delete(db, seq)
    return again


def delete(db: sqlite3.Connection, seq: int) -> int:
    """Drops one; 0 when it is not there (any more)."""
    return db.execute("DELETE FROM waiting WHERE seq = ?", (seq,)).rowcount
