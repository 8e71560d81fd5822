"""Statements as bytes, built row by row.

Values are quoted here and nowhere else, with the two doublings that MySQL needs: the backslash and
the quote ("Strictly, MySQL requires only that backslash and the quote character used to quote the
string in the query be escaped", manual of ``mysql_real_escape_string_quote``). Two ``str.replace``
calls are some 25 times faster than PyMySQL's ``escape_string`` on a highstate.

The doubled quote is right under any ``sql_mode``. The doubled backslash is right unless
``NO_BACKSLASH_ESCAPES`` is on, which ``database.py`` switches off for its own session and checks
before every transaction. Identifiers stand in backticks, so ``ANSI_QUOTES`` changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from .records import NO_FAULT, Event, Return

INSERT_LOADS = b"INSERT INTO `jids` (`jid`, `load`) VALUES "
INSERT_LOADS_WITH_COLUMNS = b"INSERT INTO `jids` (`jid`, `load`, `fun`, `user`, `tgt`) VALUES "
KEEP_LOADS = b" ON DUPLICATE KEY UPDATE `jid` = `jids`.`jid`"
"""What stands, stands; a better load is put in its place by :func:`update_load`."""

INSERT_RETURNS = (
    b"INSERT INTO `salt_returns` (`fun`, `jid`, `return`, `id`, `success`, `full_ret`, `alter_time`, `failed`) VALUES "
)
KEEP_RETURNS = b" ON DUPLICATE KEY UPDATE `jid` = `salt_returns`.`jid`"
"""The first return of a (jid, minion) stands."""

INSERT_EVENTS = b"INSERT INTO `salt_events` (`tag`, `data`, `alter_time`, `master_id`, `event_key`) VALUES "
INSERT_EVENTS_WITHOUT_KEY = INSERT_EVENTS.replace(b", `event_key`", b"")
KEEP_EVENTS = b" ON DUPLICATE KEY UPDATE `id` = `salt_events`.`id`"

MAX_KEYS = 1000
"""Rows that one SELECT looks for."""
MAX_BRANCHES = 100
"""Alternatives of one WHERE: MariaDB's optimizer takes a time that grows with their square, 0.4 s for 1,000."""

MAX_STATEMENT_BYTES = 1024 * 1024
"""Larger statements are no quicker where the server is near, and the kernel clears their memory again and again. A
server that is far away takes a round trip for each."""

STATEMENT_ROOM = 1024
"""Bytes that a statement needs beside its rows; more than any head and tail above."""


def quote(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _quoted(text: str) -> bytes:
    """The same as bytes. Of megabytes beyond Latin-1 it takes a tenth of the time and a quarter of the memory."""
    return b"'" + text.encode().replace(b"\\", b"\\\\").replace(b"'", b"''") + b"'"


def load_row(jid: str, load_json: str, columns: Iterable[str] | None = None) -> bytes:
    """A row of ``jids``, with its ``fun``, ``user`` and ``tgt`` where the table has them."""
    more = "".join(f", {quote(value)}" for value in columns or ())
    return f"({quote(jid)}, {quote(load_json)}{more})".encode()


def update_load(jid: str, load_json: str, columns: Iterable[str] | None = None) -> bytes:
    """Puts a load in the place of the one that stands."""
    names = zip(("fun", "user", "tgt"), columns or (), strict=False)
    more = "".join(f", `{name}` = {quote(value)}" for name, value in names)
    return f"UPDATE `jids` SET `load` = {quote(load_json)}{more} WHERE `jid` = {quote(jid)}".encode()


def insert_returns(*, timed: bool, failed: bool) -> bytes:
    """:data:`INSERT_RETURNS` for tables that lack ``alter_time`` or ``failed``."""
    head = INSERT_RETURNS if timed else INSERT_RETURNS.replace(b", `alter_time`", b"")
    return head if failed else head.replace(b", `failed`", b"")


def return_row(ret: Return, *, timed: bool = True, failed: bool = True) -> bytes:
    """A row of ``salt_returns``; ``success`` is the text ``1`` or ``0``, as saltext.mysql's rows have it."""
    parts = [_quoted(ret.fun), _quoted(ret.jid), _quoted(ret.return_json), _quoted(ret.id)]
    parts += [b"'1'" if ret.success else b"'0'", _quoted(ret.full_ret_json)]
    if timed:
        parts.append(f"'{ret.altered}'".encode())
    if failed:
        parts.append(b"1" if ret.failed else b"0")
    return b"(" + b", ".join(parts) + b")"


def without_failed(row: bytes) -> bytes:
    """A row of :func:`return_row` for a table that lacks ``failed``."""
    return row[: -len(", 0)")] + b")"


def failed(table: str = "") -> str:
    """Whether a row of ``salt_returns`` failed, by its ``success`` and ``retcode``; ``table`` is its alias and a dot.

    1 or 0, as :func:`records.is_bad` has it, of whatever another writer put there.
    """
    retcode = f"JSON_EXTRACT(IF(JSON_VALID({table}`full_ret`), {table}`full_ret`, '{{}}'), '$.retcode')"
    text = f"JSON_UNQUOTE(COALESCE(JSON_EXTRACT({retcode}, '$.*'), {retcode}))"
    for nothing in NO_FAULT:
        text = f"REPLACE({text}, '{nothing}', '')"
    return f"(COALESCE({table}`success`, '') = '0' OR COALESCE({text}, '') <> '')"


def update_return(ret: Return, *, failed: bool = True) -> bytes:
    """Puts a whole return in the place of a trimmed one."""
    more = f", `failed` = {ret.failed:d}" if failed else ""
    return b"".join(
        (
            b"UPDATE `salt_returns` SET `return` = ",
            _quoted(ret.return_json),
            b", `full_ret` = ",
            _quoted(ret.full_ret_json),
            f", `success` = '{ret.success:d}'{more}".encode(),
            f" WHERE `jid` = {quote(ret.jid)} AND `id` = {quote(ret.id)}".encode(),
        )
    )


def update_return_by_row(jid: str, minion: str, row: bytes, *, timed: bool, failed: bool) -> bytes:
    """The same by a row that :func:`return_row` made: no text is quoted anew."""
    # Within a text no quote stands alone, and a value is JSON, which ends with no comma: what is between two texts is
    # nowhere else.
    before, between = b", " + _quoted(jid) + b", ", b", " + _quoted(minion) + b", '"
    start = row.index(before) + len(before)
    end = row.index(between, start)
    success = end + len(between)
    after = len(b", '2026-03-29 00:00:00.000000'") * timed + len(b", 0") * failed + len(b")")
    full = row[success + len(b"1', ") : -after]
    more = b", `success` = '" + row[success : success + 1] + b"'" + (b", `failed` = " + row[-2:-1]) * failed
    where = f" WHERE `jid` = {quote(jid)} AND `id` = {quote(minion)}".encode()
    return b"UPDATE `salt_returns` SET `return` = " + row[start:end] + b", `full_ret` = " + full + more + where


def digest_of(text: str) -> str:
    """What a value is compared by, where nobody wants to keep it."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def event_row(event: Event, master_id: str, event_key: bytes | None) -> bytes:
    """A row of ``salt_events``; ``event_key`` (16 bytes) makes a replayed row a duplicate."""
    key = "" if event_key is None else f", X'{event_key.hex()}'"
    parts = (_quoted(event.tag), _quoted(event.data_json), f"'{event.altered}', {quote(master_id)}{key})".encode())
    return b"(" + b", ".join(parts)


def select_event(event: Event, master_id: str) -> bytes:
    """Whether a table without ``event_key`` holds an event. Its ``alter_time`` may be cut or rounded to a second."""
    # Once more by length: a collation that pads would take a text with a space behind it for the same.
    return (
        f"SELECT 1 FROM `salt_events` WHERE `tag` = {quote(event.tag)} AND `master_id` = {quote(master_id)} "
        f"AND ABS(TIMESTAMPDIFF(SECOND, `alter_time`, '{event.altered}')) <= 1 "
        f"AND CHAR_LENGTH(`data`) = {len(event.data_json)} "
        f"AND CONVERT(`data` USING utf8mb4) COLLATE utf8mb4_bin = {quote(event.data_json)} LIMIT 1"
    ).encode()


def get_lock(name: str, database: str, seconds: int) -> str:
    """Takes a lock of the server's that all engines on this database know; gives 1, or 0 after ``seconds``."""
    return f"SELECT GET_LOCK({_lock_name(name, database)}, {seconds})"


def release_lock(name: str, database: str) -> str:
    """Gives it back."""
    return f"SELECT RELEASE_LOCK({_lock_name(name, database)})"


def _lock_name(name: str, database: str) -> str:
    # A lock's name is the server's, not the database's, and has 64 characters. MySQL 9 has no digest of its own.
    digest = hashlib.md5(database.encode(), usedforsecurity=False).hexdigest()
    return quote(f"mysql_jobcache.{name}.{digest[:16]}")


def statements(head: bytes, rows: Iterable[bytes], tail: bytes, *, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Multi-row statements of at most ``max_bytes``, each with its number of rows.

    A row that is larger by itself stands alone: refusing it is the server's part.
    """
    room = min(max_bytes, MAX_STATEMENT_BYTES) - STATEMENT_ROOM
    held: list[bytes] = []
    size = 0
    for row in rows:
        if held and size + len(row) + 1 > room:
            yield _statement(head, held, tail), len(held)
            held, size = [], 0
        held.append(row)
        size += len(row) + 1
    if held:
        yield _statement(head, held, tail), len(held)


def _statement(head: bytes, rows: list[bytes], tail: bytes) -> bytes:
    if len(rows) == 1:  # which may be megabytes
        return b"".join((head, rows[0], tail))
    rows[0] = head + rows[0]
    rows[-1] += tail
    return b",".join(rows)


def select_loads(jids: Iterable[str]) -> bytes:
    """The stored loads of some jids, locked: what is merged into them must not change meanwhile."""
    return f"SELECT `jid`, `load` FROM `jids` WHERE `jid` IN ({_list(jids)}) FOR UPDATE".encode()


def select_return_lengths(keys: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """Statements that ask how many characters the value has that stands for some (jid, minion), and whether it is a
    trimmed one."""
    for where in among(keys):
        yield (
            f"SELECT `jid`, `id`, CHAR_LENGTH(`return`), `full_ret` LIKE '%, \"trimmed\": true}}' "
            f"FROM `salt_returns` WHERE {where}"
        ).encode()


def select_values(keys: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """Statements that ask for the values that stand for some (jid, minion)."""
    for where in among(keys):
        yield f"SELECT `jid`, `id`, `return` FROM `salt_returns` WHERE {where}".encode()


def select_returned(keys: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """Statements that ask which of some (jid, minion) have a row."""
    for where in among(keys):
        yield f"SELECT `jid`, `id` FROM `salt_returns` WHERE {where}".encode()


def among(keys: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Conditions that together hold for some (jid, minion): each jid with the list of its minions.

    Not two lists: MySQL 8 gives up the index for lists whose product is over some 36,000
    (``range_optimizer_max_mem_size``), and reads the whole table instead.
    """
    by_jid: dict[str, list[str]] = {}
    for jid, minion in keys:
        by_jid.setdefault(jid, []).append(minion)
    branches: list[str] = []
    room = MAX_KEYS
    for jid, minions in by_jid.items():
        for start in range(0, len(minions), MAX_KEYS):
            some = minions[start : start + MAX_KEYS]
            if len(some) > room or len(branches) == MAX_BRANCHES:
                yield " OR ".join(branches)
                branches, room = [], MAX_KEYS
            branches.append(f"(`jid` = {quote(jid)} AND `id` IN ({_list(some)}))")
            room -= len(some)
    if branches:
        yield " OR ".join(branches)


def select_stored_loads(jids: Iterable[str]) -> bytes:
    """The stored loads of some jids, as they are now."""
    return f"SELECT `jid`, `load` FROM `jids` WHERE `jid` IN ({_list(jids)})".encode()


def select_load_sizes(jids: Iterable[str]) -> bytes:
    """The bytes of the stored loads of some jids."""
    return f"SELECT `jid`, COALESCE(LENGTH(`load`), 0) FROM `jids` WHERE `jid` IN ({_list(jids)})".encode()


def _list(texts: Iterable[str]) -> str:
    return ", ".join(quote(text) for text in texts)
