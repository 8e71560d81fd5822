"""Finds the newest jobs that some filters leave, by their jids, in SQL.

Each filter has an index that begins with it and goes on by jid, so the newest jobs of one value are the end of a range,
however many there are. A glob becomes the values that it matches, where these are few, and each of them such a range;
else the jobs are gone through from the newest on. Filters on jobs and on returns meet in a subquery that stops at the
first return: written as EXISTS, servers like to turn it round and read all returns.

Rows that another returner wrote have NULL in ``fun``, ``user`` and ``tgt`` of the job and in ``failed`` of the return
until the engine fills them in, and tables that nobody migrated do not have these columns: then the load itself is
asked, or the whole return.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import sql
from .reader import Reader

_MANY_VALUES = 64
"""More ranges than that take longer than going through the jobs."""
LAST_JID = "99999999999999999999"
"""Younger than every jid; what is no jid, and was stored by others, comes after it."""
_ESCAPE = "|"
_JOB_COLUMNS = ("fun", "user", "tgt")


class Wanted(NamedTuple):
    """What jobs are looked for. Texts are names or globs of ``*`` and ``?``; ``None`` is no filter.

    ``since`` and ``before`` are jids, or the beginning of one: the first that may be found, and the one that all must
    be older than.
    """

    limit: int
    fun: str | None = None
    user: str | None = None
    tgt: str | None = None
    minion: str | None = None
    failed: bool = False
    since: str = ""
    before: str = LAST_JID


class _Condition(NamedTuple):
    """A part of a WHERE, and the values of its ``%s``."""

    sql: str
    values: list[Any]


def newest(reader: Reader, wanted: Wanted) -> list[str]:
    """The jids of the newest jobs that are wanted, newest first."""
    ranges = list(_ranges(reader, wanted))
    if not ranges:
        return []
    tail, end = " ORDER BY `jid` DESC LIMIT %s", [wanted.limit]
    statement = " UNION ".join(f"({each.sql}{tail})" for each in ranges)
    values = [value for each in ranges for value in [*each.values, *end]]
    if len(ranges) > 1:
        statement, values = statement + tail, values + end
    return [jid for (jid,) in reader.query(statement, *values)]


def _ranges(reader: Reader, wanted: Wanted) -> Iterator[_Condition]:
    """SELECTs of jids, each of which can end at the limit."""
    has_failed = "failed" in reader.columns("salt_returns")
    returned = _returned(wanted, has_failed)
    filters = [(name, glob) for name in _JOB_COLUMNS if (glob := getattr(wanted, name)) is not None]
    if not filters and wanted.minion is not None:
        minions = _values(reader, "salt_returns", "id", wanted.minion)
        if minions is not None:
            for minion in minions:
                failed = [f"{failed_column('', has_failed)} = 1"] if wanted.failed else []
                yield _of_returns(wanted, _Condition(" AND ".join(["`id` = %s", *failed]), [minion]))
            return
    if not filters and wanted.minion is None and wanted.failed:
        for condition in failed_ranges(has_failed):
            yield _of_returns(wanted, _Condition(condition, []))
        return
    if not filters:
        yield _of_jobs(wanted, *returned)
        return
    if not reader.columns("jids") >= {*_JOB_COLUMNS}:
        yield _of_jobs(wanted, *(_matches(_in_load(name), glob) for name, glob in filters), *returned)
        return
    (name, glob), *others = filters
    rest = [*(_matches(f"j.`{other}`", its) for other, its in others), *returned]
    values = _values(reader, "jids", name, glob)
    if values is None:
        yield _of_jobs(wanted, _matches(f"j.`{name}`", glob), *rest)
    for value in values or []:
        yield _of_jobs(wanted, _Condition(f"j.`{name}` = %s", [value]), *rest)
    unfilled = _Condition("j.`fun` IS NULL", [])
    yield _of_jobs(wanted, unfilled, *(_matches(_in_load(name), glob) for name, glob in filters), *returned)


def _of_jobs(wanted: Wanted, *conditions: _Condition) -> _Condition:
    where = _joined(_window(wanted, "j.`jid`"), *conditions)
    return _Condition(f"SELECT j.`jid` FROM `jids` j WHERE {where.sql}", where.values)


def _of_returns(wanted: Wanted, which: _Condition) -> _Condition:
    where = _joined(_window(wanted, "`jid`"), which)
    return _Condition(f"SELECT DISTINCT `jid` FROM `salt_returns` WHERE {where.sql}", where.values)


def failed_column(table: str, exists: bool) -> str:
    """Whether a row failed, 1 or 0; ``exists``: the table has the column. ``table`` is its alias and a dot."""
    return f"COALESCE({table}`failed`, {sql.failed(table)})" if exists else sql.failed(table)


def failed_ranges(exists: bool) -> list[str]:
    """Conditions that together are those of the rows that failed, each with an index of its own where there is one."""
    return ["`failed` = 1", f"`failed` IS NULL AND {sql.failed()}"] if exists else [sql.failed()]


def _returned(wanted: Wanted, has_failed: bool) -> list[_Condition]:
    """The job has a return as it is wanted."""
    conditions = [_matches("r.`id`", wanted.minion)] if wanted.minion is not None else []
    if wanted.failed:
        conditions.append(_Condition(f"{failed_column('r.', has_failed)} = 1", []))
    if not conditions:
        return []
    where = _joined(_Condition("r.`jid` = j.`jid`", []), *conditions)
    return [_Condition(f"(SELECT 1 FROM `salt_returns` r WHERE {where.sql} LIMIT 1) = 1", where.values)]


def _window(wanted: Wanted, column: str) -> _Condition:
    if wanted.since:
        return _Condition(f"{column} < %s AND {column} >= %s", [wanted.before, wanted.since])
    return _Condition(f"{column} < %s", [wanted.before])


def _joined(*conditions: _Condition) -> _Condition:
    return _Condition(
        " AND ".join(each.sql for each in conditions), [value for each in conditions for value in each.values]
    )


def _values(reader: Reader, table: str, column: str, glob: str) -> list[str] | None:
    """The values of a column that a glob matches; ``None``: too many."""
    if not _is_glob(glob):
        return [glob]
    like = _matches(f"`{column}`", glob)
    rows = reader.query(
        f"SELECT DISTINCT `{column}` FROM `{table}` WHERE {like.sql} LIMIT %s", *like.values, _MANY_VALUES + 1
    )
    return None if len(rows) > _MANY_VALUES else [value for (value,) in rows]


def _is_glob(text: str) -> bool:
    return "*" in text or "?" in text


def _matches(expression: str, glob: str) -> _Condition:
    if not _is_glob(glob):
        return _Condition(f"{expression} = %s", [glob])
    pattern = "".join(
        {"*": "%", "?": "_"}.get(character) or (_ESCAPE + character if character in "%_|" else character)
        for character in glob
    )
    return _Condition(f"{expression} LIKE %s ESCAPE '{_ESCAPE}'", [pattern])


def _in_load(name: str) -> str:
    """What a column would hold, from the load; of lists the items, joined as the column has them."""
    load = "IF(JSON_VALID(j.`load`), j.`load`, '{}')"
    text = f"JSON_UNQUOTE(JSON_EXTRACT({load}, '$.{name}'))"
    return f"""REPLACE(REPLACE(REPLACE({text}, '", "', ','), '["', ''), '"]', '')"""


def counts(reader: Reader, jids: list[str]) -> dict[str, tuple[int, int]]:
    """How many minions answered each of some jobs, and how many of these failed."""
    if _is_indexed(reader):
        # In the order of the index, and from it alone: the rows themselves may be megabytes.
        indexed = "FROM `salt_returns` FORCE INDEX (`failed`) WHERE"
        rows = reader.query(
            f"SELECT `failed`, `jid`, COUNT(*) {indexed} `failed` IN (0, 1) AND `jid` IN %s GROUP BY `failed`, `jid` "
            f"UNION ALL SELECT {sql.failed()} AS `bad`, `jid`, COUNT(*) {indexed} `failed` IS NULL AND `jid` IN %s "
            "GROUP BY `bad`, `jid`",
            jids,
            jids,
        )
    else:
        failed = failed_column("", "failed" in reader.columns("salt_returns"))
        rows = reader.query(
            f"SELECT {failed} AS `bad`, `jid`, COUNT(DISTINCT CAST(`id` AS BINARY)) "
            "FROM `salt_returns` WHERE `jid` IN %s GROUP BY `bad`, `jid`",
            jids,
        )
    found: dict[str, tuple[int, int]] = {}
    for failed, jid, count in rows:
        answered, bad = found.get(jid, (0, 0))
        found[jid] = answered + count, bad + (count if failed else 0)
    return found


def _is_indexed(reader: Reader) -> bool:
    """Whether an index leads from ``failed`` to the jids, and a minion has one row of a job."""
    found = reader.query(
        "SELECT INDEX_NAME FROM information_schema.STATISTICS WHERE TABLE_SCHEMA = DATABASE() AND "
        "TABLE_NAME = 'salt_returns' AND (INDEX_NAME, SEQ_IN_INDEX, COLUMN_NAME) IN "
        "(('failed', 1, 'failed'), ('failed', 2, 'jid'), ('PRIMARY', 1, 'jid'), ('PRIMARY', 2, 'id'))"
    )
    return len(found) == 4
