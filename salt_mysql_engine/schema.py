"""The tables: what a database is, which tables are missing and creating them, and what they can take as they are.

``schema/NNN_*.sql`` are numbered files: 001 makes the tables, each later one is a migration. A file is cut into
sections, ``-- name: <table>``, each with the statements for one table, so that a table that is made later than the
others gets its part of every file. Table ``mysql_jobcache_schema`` says which files were applied.
"""

from __future__ import annotations

import collections
import datetime
import re
from pathlib import Path
from typing import Any, NamedTuple

from . import partitions as periods
from .database import Session
from .errors import OperatorNeeded

FOLDER = Path(__file__).parent / "schema"
TABLES = ("jids", "salt_returns", "salt_events")
PARTITIONED = ("jids", "salt_returns")
VERSIONS = "mysql_jobcache_schema"

_NEEDS: dict[str, tuple[str, ...]] = {
    "jids": ("jid", "load"),
    "salt_returns": ("fun", "jid", "return", "id", "success", "full_ret"),
    "salt_events": ("tag", "data", "alter_time", "master_id"),
}
"""The columns that nothing can be written without."""
UNIQUE: dict[str, tuple[str, ...]] = {
    "jids": ("jid",),
    "salt_returns": ("jid", "id"),
    "salt_events": ("event_key",),
}
"""The unique key that makes a row that is written again a duplicate."""
_FOUR_BYTES = frozenset({"utf8mb4", "utf16", "utf16le", "utf32", "gb18030"})
BYTEWISE = frozenset({"utf8mb4_nopad_bin", "utf8mb4_0900_bin", "binary", None})
"""Collations that tell any two texts apart: MariaDB's, MySQL's, and those of columns without a charset."""
_TRANSACTIONAL = frozenset({"innodb", "rocksdb", "tokudb", "ndbcluster"})
_JOB_COLUMNS = ("fun", "user", "tgt")


class Shape(NamedTuple):
    """What writing to the tables as they are needs to know."""

    unique: frozenset[str]
    """Of jids, salt_returns, salt_events: those with our unique key."""
    job_columns: bool
    """``jids`` has ``fun``, ``user`` and ``tgt``."""
    event_key: bool
    """``salt_events`` has ``event_key``."""
    utf8mb4: bool
    """Every text column of ours takes four-byte characters."""
    fun_characters: int
    """Width of ``salt_returns.fun``."""
    alter_time: bool
    """``salt_returns`` has ``alter_time``."""
    bytewise: bool
    """The columns of the unique keys compare byte by byte, trailing spaces too."""
    failed: bool
    """``salt_returns`` has ``failed``."""
    transactional: bool
    """What is written can be taken back."""


class Column(NamedTuple):
    """A column as the server tells it."""

    name: str
    type: str
    """With its width: ``varchar(255)``."""
    charset: str | None
    collation: str | None
    nullable: bool
    default: Any
    extra: str
    characters: int | None


class Key(NamedTuple):
    """An index: its columns in order, ``whole`` without prefixes."""

    unique: bool
    columns: tuple[str, ...]
    whole: bool


class Table(NamedTuple):
    """A table of a database. ``rows`` is the server's estimate, ``size`` bytes with indexes."""

    engine: str
    versioned: bool
    """It keeps what its rows were (MariaDB's system versioning)."""
    rows: int
    size: int
    columns: dict[str, Column]
    keys: dict[str, Key]

    def has_unique(self, columns: tuple[str, ...]) -> bool:
        """Whether a unique key over just these columns, in any order, is there."""
        return any(key.unique and key.whole and set(key.columns) == set(columns) for key in self.keys.values())


def sections(folder: Path = FOLDER) -> dict[int, list[tuple[str, list[str]]]]:
    """The numbered files: by number the tables, in order, each with its statements."""
    found: dict[int, list[tuple[str, list[str]]]] = {}
    for path in sorted(folder.glob("[0-9][0-9][0-9]_*.sql")):
        parts = re.split(r"^-- name: (\w+)\n", path.read_text(), flags=re.MULTILINE)
        found[int(path.name[:3])] = [
            (name, [text.strip() for text in re.split(r";\s*$", body, flags=re.MULTILINE) if text.strip()])
            for name, body in zip(parts[1::2], parts[2::2], strict=True)
        ]
    return found


def newest(folder: Path = FOLDER) -> int:
    """The number of the last file."""
    return max(sections(folder))


def statements(folder: Path = FOLDER) -> dict[str, str]:
    """The CREATE statements by table."""
    return {name: body[0] for name, body in sections(folder)[1]}


async def ensure(session: Session, *, create: bool, events: bool, partitions: str = "none") -> tuple[list[str], Shape]:
    """Makes sure that the tables can be written to; gives the names of those that were created, and the shape of all.

    ``create`` creates missing tables, with ``partitions`` (``day``, ``week``, ``month``) in parts, else they are an
    error. A missing ``salt_events`` matters only when ``events`` are stored.

    Raises:
        OperatorNeeded: what is missing that nothing can be written without.
    """
    wanted = [name for name in TABLES if events or name != "salt_events"]
    tables = await look(session)
    created: list[str] = []
    if create and any(name not in tables for name in wanted):
        # All of them, since what reads the tables (Alcali) wants to find salt_events, if only empty.
        created = [name for name in TABLES if name not in tables]
        for name in created:
            await create_table(session, name, partitions)
        if len(created) == len(TABLES):  # nobody was here before
            await record(session, *sections())
        tables = await look(session)
    problems = [_problem(name, tables.get(name)) for name in wanted]
    found = [problem for problem in problems if problem]
    if found:
        raise OperatorNeeded(f"{session.host}: " + "; ".join(found))
    return created, shape_of({name: tables[name] for name in wanted})


async def create_table(session: Session, table: str, partitions: str = "none", *, folder: Path = FOLDER) -> None:
    """Creates a table as the newest file wants it."""
    for number, parts in sections(folder).items():
        for name, body in parts:
            if name != table:
                continue
            for statement in body:
                if number == 1 and partitions != "none" and table in PARTITIONED:
                    today = datetime.datetime.now(datetime.timezone.utc).date()
                    clause = periods.clause(periods.layout(partitions, today, today))
                    await session.execute(f"{statement} {clause}")
                else:
                    await session.execute(statement)


async def record(session: Session, *versions: int) -> None:
    """Notes that files were applied."""
    if VERSIONS not in await look(session, VERSIONS):
        await session.execute(statements()[VERSIONS])
    values = ", ".join(f"({version})" for version in versions)
    kept = f"ON DUPLICATE KEY UPDATE `version` = `{VERSIONS}`.`version`"
    await session.execute(f"INSERT INTO `{VERSIONS}` (`version`) VALUES {values} {kept}")
    await session.commit()


def shape_of(tables: dict[str, Table]) -> Shape:
    """The shape of tables that :func:`ensure` found usable."""
    jids, returns, events = tables["jids"], tables["salt_returns"], tables.get("salt_events")
    texts = [
        column.charset
        for name, table in tables.items()
        for column in table.columns.values()
        if column.name in (*_NEEDS[name], *(_JOB_COLUMNS if name == "jids" else ()))
    ]
    return Shape(
        unique=frozenset(name for name, table in tables.items() if table.has_unique(UNIQUE[name])),
        job_columns=all(name in jids.columns for name in _JOB_COLUMNS),
        event_key=events is not None and "event_key" in events.columns,
        utf8mb4=all(charset is None or charset in _FOUR_BYTES for charset in texts),
        fun_characters=returns.columns["fun"].characters or 255,
        alter_time="alter_time" in returns.columns,
        bytewise=all(
            table.columns[column].collation in BYTEWISE
            for table, columns in ((jids, UNIQUE["jids"]), (returns, UNIQUE["salt_returns"]))
            for column in columns
        ),
        failed="failed" in returns.columns,
        transactional=all(table.engine.lower() in _TRANSACTIONAL for table in tables.values()),
    )


async def look(session: Session, *names: str) -> dict[str, Table]:
    """The tables of these names (our three when none is given) that the database has."""
    listed = ", ".join(f"'{name}'" for name in names or TABLES)
    where = f"WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME IN ({listed})"
    columns: dict[str, dict[str, Column]] = collections.defaultdict(dict)
    for table, *about in await session.query(
        "SELECT TABLE_NAME, COLUMN_NAME, COLUMN_TYPE, CHARACTER_SET_NAME, COLLATION_NAME, IS_NULLABLE = 'YES', "
        "COLUMN_DEFAULT, EXTRA, CHARACTER_MAXIMUM_LENGTH FROM information_schema.COLUMNS "
        f"{where} ORDER BY TABLE_NAME, ORDINAL_POSITION"
    ):
        columns[table][about[0]] = Column(*about)
    parts: dict[str, dict[str, list[tuple[Any, ...]]]] = collections.defaultdict(dict)
    for table, name, *about in await session.query(
        "SELECT TABLE_NAME, INDEX_NAME, NON_UNIQUE, COLUMN_NAME, SUB_PART FROM information_schema.STATISTICS "
        f"{where} ORDER BY TABLE_NAME, INDEX_NAME, SEQ_IN_INDEX"
    ):
        parts[table].setdefault(name, []).append(tuple(about))
    found: dict[str, Table] = {}
    for table, engine, kind, rows, size in await session.query(
        "SELECT TABLE_NAME, ENGINE, TABLE_TYPE, TABLE_ROWS, COALESCE(DATA_LENGTH, 0) + COALESCE(INDEX_LENGTH, 0) "
        f"FROM information_schema.TABLES {where} AND TABLE_TYPE IN ('BASE TABLE', 'SYSTEM VERSIONED')"
    ):
        keys = {
            name: Key(
                not int(of[0][0]), tuple(str(column) for _, column, _ in of), all(part is None for _, _, part in of)
            )
            for name, of in parts[table].items()
        }
        found[table] = Table(engine or "", kind != "BASE TABLE", int(rows or 0), int(size), columns[table], keys)
    return found


def lacking(name: str, table: Table) -> list[str]:
    """The columns that a table has not, and that nothing can be written without."""
    return [column for column in _NEEDS[name] if column not in table.columns]


def _problem(name: str, table: Table | None) -> str:
    if table is None:
        return f"there is no table {name}; use schema: create, or create it from the package's schema folder"
    if missing := lacking(name, table):
        return f"the table {name} has no column {', '.join(missing)}; it is not of the documented shape"
    return ""
