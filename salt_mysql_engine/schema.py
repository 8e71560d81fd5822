"""The tables: which are missing, which are not of our shape, and creating the missing ones."""

from __future__ import annotations

import collections
import re
from pathlib import Path

from .database import Session
from .errors import OperatorNeeded

_DDL = Path(__file__).parent / "schema" / "tables.sql"

_NEEDS: dict[str, tuple[str, ...]] = {
    "jids": ("jid", "load"),
    "salt_returns": ("fun", "jid", "return", "id", "success", "full_ret", "alter_time"),
    "salt_events": ("id", "tag", "data", "alter_time", "master_id", "event_key"),
}
_UNIQUE: dict[str, tuple[str, ...]] = {
    "jids": ("jid",),
    "salt_returns": ("jid", "id"),
    "salt_events": ("event_key",),
}
_MEND = {
    "jids": "ALTER TABLE `jids` ADD PRIMARY KEY (`jid`)",
    "salt_returns": "ALTER TABLE `salt_returns` ADD PRIMARY KEY (`jid`, `id`)",
    "salt_events": "ALTER TABLE `salt_events` ADD `event_key` BINARY(16) NULL, ADD UNIQUE KEY (`event_key`)",
}


def statements() -> dict[str, str]:
    """The CREATE statements by table, from ``schema/tables.sql``."""
    parts = re.split(r"^-- name: (\w+)\n", _DDL.read_text(), flags=re.MULTILINE)
    return {name: ddl.strip().removesuffix(";") for name, ddl in zip(parts[1::2], parts[2::2], strict=True)}


async def ensure(session: Session, *, create: bool, events: bool) -> list[str]:
    """Makes sure that the tables can be written to; gives the names of those that were created.

    ``create`` creates missing tables, else they are an error. ``salt_events`` matters only when
    ``events`` are stored.

    Raises:
        OperatorNeeded: what is missing, and the statement that adds it.
    """
    wanted = [name for name in _NEEDS if events or name != "salt_events"]
    columns, keys = await _found(session)
    created = [name for name in wanted if name not in columns]
    if created and create:
        ddl = statements()
        for name in created:
            await session.execute(ddl[name])
        columns, keys = await _found(session)
    problems = [_problem(name, columns.get(name), keys[name]) for name in wanted]
    found = [problem for problem in problems if problem]
    if found:
        raise OperatorNeeded(f"{session.host}: " + "; ".join(found))
    return created


async def _found(session: Session) -> tuple[dict[str, set[str]], dict[str, list[frozenset[str]]]]:
    """The columns and the unique keys of our tables, by table name."""
    columns: dict[str, set[str]] = collections.defaultdict(set)
    for table, column in await session.query(
        "SELECT TABLE_NAME, COLUMN_NAME FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = DATABASE() "
        "AND TABLE_NAME IN ('jids', 'salt_returns', 'salt_events')"
    ):
        columns[table].add(column)
    parts: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for table, key, column in await session.query(
        "SELECT TABLE_NAME, INDEX_NAME, COLUMN_NAME FROM information_schema.STATISTICS WHERE NON_UNIQUE = 0 AND "
        "SUB_PART IS NULL AND TABLE_SCHEMA = DATABASE() AND TABLE_NAME IN ('jids', 'salt_returns', 'salt_events')"
    ):
        parts[table, key].add(column)
    keys: dict[str, list[frozenset[str]]] = collections.defaultdict(list)
    for (table, _), names in parts.items():
        keys[table].append(frozenset(names))
    return columns, keys


def _problem(table: str, columns: set[str] | None, keys: list[frozenset[str]]) -> str:
    if not columns:
        return f"there is no table {table}; use schema: create, or create it from the package's schema folder"
    missing = [name for name in _NEEDS[table] if name not in columns]
    if missing and missing != ["event_key"]:
        return f"the table {table} has no column {', '.join(missing)}; it is not of the documented shape"
    if missing or frozenset(_UNIQUE[table]) not in keys:
        return (
            f"the table {table} has no unique key on ({', '.join(_UNIQUE[table])}), without which a batch that is "
            f"tried again would be stored twice; remove duplicate rows, then run: {_MEND[table]}"
        )
    return ""
