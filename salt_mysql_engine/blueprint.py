"""What the tables should look like, read from ``schema/001_tables.sql``, and the way there from any other table.

Columns and keys of somebody else stay as they are. Ours keep their place in the row, and what is added comes last: the
archive tables of saltext.mysql are filled by ``INSERT ... SELECT *``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from . import schema
from .schema import Column, Key, Table

ARCHIVE = "_archive"
_WIDEST_IN_A_KEY = 384
"""Characters: two such columns of four bytes each are the 3,072 bytes that a key of InnoDB may have."""
_FORMER_KEYS = {("success", ("success", "jid"))}
"""That our tables once had."""
_COLUMN = re.compile(r"^    `(\w+)` (.+?),?$", re.MULTILINE)
_KEY = re.compile(r"^    (PRIMARY|UNIQUE|) ?KEY (?:`(\w+)` )?\(([^)]*)\)", re.MULTILINE)

_COLLATION = re.compile(r"COLLATE (\w+)")


class Wanted(NamedTuple):
    """A table as it should be: columns with their definitions, keys by name."""

    columns: dict[str, str]
    keys: dict[str, Key]


@functools.cache
def wanted(name: str) -> Wanted:
    """One of the three tables."""
    ddl = schema.statements()[name]
    keys = {
        key or "PRIMARY": Key(bool(kind), tuple(re.findall(r"\w+", columns)), True)
        for kind, key, columns in _KEY.findall(ddl)
    }
    columns = {
        # In an ALTER a text's charset would be the one that the table had.
        column: re.sub(r"^(LONGTEXT|VARCHAR\(\d+\)) (?!CHARACTER)", r"\1 CHARACTER SET utf8mb4 ", definition)
        for column, definition in _COLUMN.findall(ddl)
    }
    return Wanted(columns, keys)


def differences(name: str, table: Table) -> list[str]:
    """What a table lacks to be the one that ``name`` calls, a sentence for each."""
    want = wanted(name)
    found = [] if table.engine in ("InnoDB", "") else [f"the engine is {table.engine}"]
    for column, definition in want.columns.items():
        present = table.columns.get(column)
        if present is None:
            found.append(f"no column {column}")
        elif not _satisfies(present, definition):
            charset = f" of {present.collation}" if present.collation else ""
            found.append(f"{column} is {present.type}{charset}{' NULL' * bool(present.nullable)}")
    return found + [
        f"no {'unique ' * key.unique}key on ({', '.join(key.columns)})"
        for key in want.keys.values()
        if not _has_key(table, key)
    ]


def changes(name: str, table: Table) -> list[str]:
    """The clauses of the ALTER TABLE that makes a table ours; run on an empty one."""
    want = wanted(name)
    clauses = ["ENGINE = InnoDB", "ROW_FORMAT = DYNAMIC", "DEFAULT CHARACTER SET = utf8mb4"]
    gone = {key for key, present in table.keys.items() if _is_superseded(name, key, present)}
    for column, definition in want.columns.items():
        present = table.columns.get(column)
        if present is None:
            clauses.append(f"ADD COLUMN `{column}` {definition}")
        else:
            clauses.append(f"MODIFY COLUMN `{column}` {_kept_width(present, definition)}")
    clauses += ["DROP PRIMARY KEY" if key == "PRIMARY" else f"DROP KEY `{key}`" for key in sorted(gone)]
    left = {key: present for key, present in table.keys.items() if key not in gone}
    for key, want_key in want.keys.items():
        if any(_serves(present, want_key) for present in left.values()):
            continue
        columns = ", ".join(f"`{column}`" for column in want_key.columns)
        if key == "PRIMARY" and "PRIMARY" not in left:
            clauses.append(f"ADD PRIMARY KEY ({columns})")
            continue
        # Where somebody else's primary key stays, ours is a unique one beside it.
        free = next(
            each for each in _names("_".join(want_key.columns) if key == "PRIMARY" else key) if each not in left
        )
        clauses.append(f"ADD {'UNIQUE ' * want_key.unique}KEY `{free}` ({columns})")
    return clauses


def obstacles(name: str, table: Table, *, partitioned: bool) -> list[str]:
    """What of somebody else's keeps a table from becoming ours, a sentence for each with what to do."""
    ours = wanted(name).columns
    found = [
        f"{name}.{column.name} is NOT NULL without a default, so that no row without it can be written; run: "
        f"ALTER TABLE `{name}` ALTER COLUMN `{column.name}` SET DEFAULT ..."
        for column in table.columns.values()
        if column.name not in ours
        and not column.nullable
        and column.default is None
        and "auto_increment" not in column.extra.lower()
        and "generated" not in column.extra.lower()
    ]
    # A column that counts itself must lead a key, and our own salt_events.id does.
    if name == "salt_events" and not table.has_unique(("id",)):
        found.append("salt_events has no unique key on (id), so that its rows cannot be told apart; add one")
    if partitioned:
        found += [
            f"{name} has the unique key {key} without jid, and MySQL cuts such a table into no partitions; drop it, "
            "or use partitions: none"
            for key, present in table.keys.items()
            if present.unique and "jid" not in present.columns and not _is_superseded(name, key, present)
        ]
    return found


def copied(source: Table, target: Table) -> list[str]:
    """The columns whose values go from one table to another."""
    return [
        name
        for name, column in source.columns.items()
        if name in target.columns and not _is_generated(column) and not _is_generated(target.columns[name])
    ]


def _is_generated(column: Column) -> bool:
    extra = column.extra.lower()
    return "generated" in extra and "default_generated" not in extra


def _names(name: str) -> Iterator[str]:
    yield name
    number = 1
    while True:
        yield f"mysql_jobcache_{name}{number if number > 1 else ''}"
        number += 1


def _has_key(table: Table, want: Key) -> bool:
    return any(_serves(present, want) for present in table.keys.values())


def _serves(present: Key, want: Key) -> bool:
    if not present.whole:
        return False
    if want.unique:
        return present.unique and present.columns == want.columns
    return present.columns[: len(want.columns)] == want.columns


def _is_superseded(name: str, key: str, present: Key) -> bool:
    """Whether ours make a key needless: it is one of the old tables' own, or the same under another name."""
    want = wanted(name)
    if not set(present.columns) <= want.columns.keys() or want.keys.get(key) == present:
        return False
    if (key, present.columns) in _FORMER_KEYS:
        return True
    if present.unique:
        return any(mine.unique and set(mine.columns) == set(present.columns) for mine in want.keys.values())
    return key in want.keys or any(
        mine.columns[: len(present.columns)] == present.columns for mine in want.keys.values()
    )


def _satisfies(present: Column, definition: str) -> bool:
    kind = definition.split(" ")[0].lower()
    if kind.startswith("varchar"):
        width = int(re.findall(r"\d+", kind)[0])
        fits = present.type.startswith("varchar") and (present.characters or 0) >= width
    else:
        fits = re.sub(r"^(bigint|int|tinyint)\(\d+\)", r"\1", present.type) == kind
    if present.charset is not None and present.charset != "utf8mb4":
        return False
    wanted_collations = _COLLATION.findall(definition)  # of which each server reads its own
    if wanted_collations and present.collation not in wanted_collations:
        return False
    return fits and ("NOT NULL" not in definition or not present.nullable)


def _kept_width(present: Column, definition: str) -> str:
    """Our definition, as wide as the column already is."""
    width = re.match(r"VARCHAR\((\d+)\)", definition)
    if width is None or not present.type.startswith("varchar"):
        return definition
    characters = min(present.characters or 0, _WIDEST_IN_A_KEY)
    return definition.replace(width[0], f"VARCHAR({max(characters, int(width[1]))})", 1)
