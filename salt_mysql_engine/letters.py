"""Dead letters: the events that became no row, and why. All functions work inside their caller's transaction."""

from __future__ import annotations

import sqlite3
import time
from typing import NamedTuple

from . import journalfile, salvage
from .journalfile import BODY, BODY_BYTES, CONFIRMED, STUB

_NOTHING = f"x'', {BODY_BYTES}"
"""In a body's place, and its size."""
_END_BYTES = 4096
_PORTION_LETTERS, _PORTION_BYTES = 500, 4 * 1024 * 1024
"""What is tried again or deleted in one transaction, so that the journal is free in between."""


class DeadLetter(NamedTuple):
    """An event that became no row; times in seconds since the epoch.

    ``reason``: ``refused`` by the database, ``unconfirmed`` by the master's job cache, ``too_large``, the end of the
    ``decoder``, or a ``fault`` of ours. ``state``: the one that it had, and has again when it is retried.
    """

    seq: int
    captured_at: float
    failed_at: float
    jid: str
    minion: str
    reason: str
    error: str
    state: int
    body: bytes
    size: int = 0
    """Of the body, which a list leaves out."""


def bury(db: sqlite3.Connection, seq: int, reason: str, error: str) -> int:
    """Moves an event here; 0 when it is not there (any more)."""
    buried = db.execute(
        "INSERT INTO dead_letters (seq, captured_at, jid, minion, body, state, error, failed_at, reason) "
        "SELECT seq, captured_at, jid, minion, body, state, ?, ?, ? FROM events WHERE seq = ?",
        (error, time.time(), reason, seq),
    ).rowcount
    db.execute("DELETE FROM events WHERE seq = ?", (seq,))
    return buried


def trim(db: sqlite3.Connection, *, most: int, max_bytes: int) -> int:
    """Drops those that died first, above ``most`` of each reason, or of the reason that takes most room above
    ``max_bytes`` of events; gives how many. So a flood of one kind pushes out none of another by number, and by bytes
    those alone that take more room than the flood."""
    # By its index, and from the rows' headers: a look at all of them would read every body.
    sizes: dict[str, int] = {}
    dropped = 0
    for reason, count, size in db.execute(
        f"SELECT reason, COUNT(*), SUM({BODY_BYTES}) FROM dead_letters GROUP BY reason"
    ).fetchall():
        sizes[reason] = size
        if count > most:
            gone, freed = _drop_oldest(db, reason, count - most, size)
            sizes[reason] -= freed
            dropped += gone
    while (over := sum(sizes.values()) - max_bytes) > 0:
        largest = max(sizes, key=lambda reason: sizes[reason])
        next_largest = max((size for reason, size in sizes.items() if reason != largest), default=0)
        gone, freed = _drop_oldest(db, largest, -1, min(over, max(1, sizes[largest] - next_largest)))
        sizes[largest] -= freed
        dropped += gone
    return dropped


def _drop_oldest(db: sqlite3.Connection, reason: str, most: int, enough: int) -> tuple[int, int]:
    """Drops ``most`` of a reason that died first, or (-1) as many as free ``enough`` bytes; gives how many, and their
    bytes."""
    victims: list[int] = []
    freed = 0
    for seq, size in db.execute(
        f"SELECT seq, {BODY_BYTES} FROM dead_letters WHERE reason = ? ORDER BY failed_at, seq LIMIT ?", (reason, most)
    ):
        victims.append(seq)
        freed += size
        if freed >= enough and most < 0:
            break
    for seq in victims:
        journalfile.delete(db, "dead_letters", "seq = ?", (seq,))
    return len(victims), freed


def read(
    db: sqlite3.Connection,
    *,
    after: int,
    before: int | None,
    seq: int | None,
    limit: int,
    newest: bool,
    whole: bool,
) -> list[DeadLetter]:
    """By ``seq``: the first above ``after``, the ``newest`` below ``before``, or the one of ``seq``; ``whole``: with
    their bodies."""
    where, values = ("seq > ?", [after]) if seq is None else ("seq = ?", [seq])
    if before is not None:
        where, values = f"{where} AND seq < ?", [*values, before]
    order = "DESC" if newest else "ASC"
    rows = db.execute(
        "SELECT seq, captured_at, failed_at, jid, minion, reason, error, state, "
        f"{f'{BODY}, 0' if whole else _NOTHING} FROM dead_letters WHERE {where} ORDER BY seq {order} LIMIT ?",
        (*values, limit),
    ).fetchall()
    letters = [DeadLetter._make(row) for row in (reversed(rows) if newest else rows)]
    for letter in letters:
        times = (letter.captured_at, letter.failed_at)
        texts = (letter.jid, letter.minion, letter.reason, letter.error)
        sound = type(letter.body) is bytes and {*map(type, times)} == {float} and {*map(type, texts)} == {str}
        salvage.require(sound and type(letter.state) is int, f"dead letter {letter.seq}")
    return letters


def ends(db: sqlite3.Connection, seq: int) -> tuple[bytes, bytes]:
    """How one's body begins, and how it ends."""
    row = db.execute(
        f"SELECT substr({BODY}, 1, {_END_BYTES}), substr({BODY}, -{_END_BYTES}) FROM dead_letters WHERE seq = ?", (seq,)
    ).fetchone()
    return row or (b"", b"")


def piece(db: sqlite3.Connection, seq: int, offset: int, length: int) -> bytes:
    """Some bytes of one's body."""
    row = db.execute(
        f"SELECT substr({BODY}, ?, ?) FROM dead_letters WHERE seq = ?", (offset + 1, length, seq)
    ).fetchone()
    return row[0] if row else b""


def delete(db: sqlite3.Connection, seq: int | None, through: int | None) -> int:
    """Drops one, or all; of all up to ``through`` a portion. Gives how many."""
    where, values = _which(db, seq, through, BODY_BYTES)
    return journalfile.delete(db, "dead_letters", where, values)


def revive(db: sqlite3.Connection, seq: int | None, through: int | None, *, trusted: bool) -> int:
    """Makes one, or all, events again, each in the state that it had; ``trusted``: that need no confirmation, but for
    stubs, which hold nothing to be trusted. Of all up to ``through`` a portion. Gives how many."""
    where, values = _which(db, seq, through, "LENGTH(body)")  # large ones are not written again
    state = f"CASE state WHEN {STUB} THEN {STUB} ELSE {CONFIRMED} END" if trusted else "state"
    again = db.execute(
        "INSERT INTO events (captured_at, jid, minion, body, state) "
        f"SELECT captured_at, jid, minion, body, {state} FROM dead_letters WHERE {where} "
        "ORDER BY seq",
        values,
    ).rowcount
    db.execute(f"DELETE FROM dead_letters WHERE {where}", values)
    return again


def _which(db: sqlite3.Connection, seq: int | None, through: int | None, size: str) -> tuple[str, tuple[int, ...]]:
    if seq is not None:
        return "seq = ?", (seq,)
    if through is None:
        return "seq > ?", (0,)
    last, room = 0, _PORTION_BYTES
    for each, its_bytes in db.execute(
        f"SELECT seq, {size} FROM dead_letters WHERE seq <= ? ORDER BY seq LIMIT ?", (through, _PORTION_LETTERS)
    ):
        room -= its_bytes
        if last and room < 0:
            break
        last = each
    return "seq <= ?", (last,)
