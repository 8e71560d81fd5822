"""The SQL that copies rows into a table of another shape, and makes one of those that are one by our key.

The one with the earliest time stands, and of these the one that was inserted first; a whole return stands before one
that Salt trimmed, and a published load before one made of a return.
"""

from __future__ import annotations

from . import blueprint, sql
from .schema import Table

_TRIMMED = "'%, \"trimmed\": true}'"
TRUE_MOMENT = "'^20[0-2][0-9](0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])([01][0-9]|2[0-3])[0-5][0-9][0-5][0-9][0-9]{6}'"
"""What a jid begins with that can be reckoned with: a day that the month may not have, but no thirteenth month."""

_JID = "COALESCE(`src`.`jid`, '')"
_JID_MOMENT = (
    # Day by day from the first of the month, which is a date in every month: the 31st of February is no error then.
    f"IF({_JID} REGEXP {TRUE_MOMENT}, TIMESTAMPADD(MICROSECOND, SUBSTR({_JID}, 15, 6), TIMESTAMPADD(DAY, "
    f"SUBSTR({_JID}, 7, 2) - 1, CONCAT(LEFT({_JID}, 4), '-', SUBSTR({_JID}, 5, 2), '-01 ', SUBSTR({_JID}, 9, 2), ':', "
    f"SUBSTR({_JID}, 11, 2), ':', SUBSTR({_JID}, 13, 2)))), '1970-01-01 00:00:01')"
)
"""When a job began, for returns of tables that kept no time."""


def keys_of(of: str) -> tuple[str, ...]:
    """The columns that tell one row of a table from another."""
    return {"jids": ("jid",), "salt_returns": ("jid", "id"), "salt_events": ("id",)}[of]


def insert(of: str, source: str, target: str, have: Table, want: Table, where: str) -> str:
    """Copies the rows of ``source`` (called ``src`` in ``where``) that ``target`` has not, and folds the others."""
    columns = blueprint.copied(have, want)
    values = {column: _value(of, column) for column in columns}
    if of == "salt_returns" and "alter_time" not in values:
        values["alter_time"] = f"CAST({_JID_MOMENT} AS DATETIME(6))"
    if of == "salt_returns" and "failed" in want.columns and "failed" not in values:
        values["failed"] = sql.failed("`src`.")
    theirs = [column for column in values if column not in (*keys_of(of), "full_ret", "alter_time")]
    mine = f"`{target}`"
    if of == "salt_returns":
        late = f"{values['alter_time']} >= {mine}.`alter_time`"
        better = (
            f"IF({mine}.`full_ret` LIKE {_TRIMMED}, `src`.`full_ret` NOT LIKE {_TRIMMED} OR NOT {late}, "
            f"`src`.`full_ret` NOT LIKE {_TRIMMED} AND NOT {late})"
        )
        changes = [
            f"`{column}` = IF({better}, {values[column]}, {mine}.`{column}`)" for column in [*theirs, "full_ret"]
        ]
        # Assigned from left to right: by now full_ret is the one that stands.
        same = f"{binary(f'{mine}.`full_ret`')} = {binary(values['full_ret'])}"
        changes.append(
            f"`alter_time` = IF({same}, LEAST({values['alter_time']}, {mine}.`alter_time`), {mine}.`alter_time`)"
        )
    elif of == "jids":
        better = f"{_published('`src`')} AND NOT {_published(mine)}"
        changes = [f"`load` = IF({better}, {values['load']}, {mine}.`load`)"]
    else:
        changes = [f"`id` = {mine}.`id`"]
    listed = ", ".join(f"`{column}`" for column in values)
    return (
        f"INSERT INTO {mine} ({listed}) SELECT {', '.join(values.values())} FROM `{source}` AS `src` "
        f"{index_of(of, have)}WHERE {where} ON DUPLICATE KEY UPDATE {', '.join(changes)}"
    )


def count_folded(of: str, have: Table, source: str, where: str) -> str:
    """A query for how many rows of ``source`` (called ``src`` in ``where``) have a key that another one has, too."""
    keys = ", ".join(binary(f"COALESCE(`src`.`{key}`, '')") for key in keys_of(of))
    return f"SELECT COUNT(*) - COUNT(DISTINCT {keys}) FROM `{source}` AS `src` {index_of(of, have)}WHERE {where}"


def index_of(of: str, table: Table) -> str:
    """The index to walk along: in its order rows of one jid come as they were inserted."""
    name = min(
        (name for name, key in table.keys.items() if key.columns[0] == keys_of(of)[0]), key=_primary_last, default=""
    )
    return f"FORCE INDEX (`{name}`) " if name else ""


def binary(expression: str) -> str:
    """A text as bytes: no collation takes two for one."""
    return f"CAST(CONVERT({expression} USING utf8mb4) AS BINARY)"


def _value(of: str, column: str) -> str:
    """A column of the old table, as the new one takes it."""
    definition = blueprint.wanted(of).columns.get(column, "")
    if column == "alter_time" and of == "salt_returns":  # a zero date is none
        return f"CAST(IF(UNIX_TIMESTAMP(`src`.`alter_time`) > 0, `src`.`alter_time`, {_JID_MOMENT}) AS DATETIME(6))"
    if column == "alter_time" and of == "salt_events":
        return "IF(UNIX_TIMESTAMP(`src`.`alter_time`) > 0, `src`.`alter_time`, '1970-01-01 00:00:01')"
    if definition.startswith(("LONGTEXT", "VARCHAR")) and "NOT NULL" in definition:
        return f"COALESCE(`src`.`{column}`, '')"
    return f"`src`.`{column}`"


def _published(table: str) -> str:
    """:func:`jobload.is_published`, near enough to choose between two loads of one jid."""
    return f'({table}.`load` LIKE \'%"Minions": %\' OR {table}.`load` LIKE \'%"cmd": "publish"%\')'


def _primary_last(name: str) -> tuple[bool, str]:
    return name == "PRIMARY", name
