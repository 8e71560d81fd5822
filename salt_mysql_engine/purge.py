"""Deleting what is too old, in steps that hold no lock for long.

A job's age is in its jid. Where whole partitions are too old, they are dropped; all else goes in chunks along the
index of ``jid`` (``salt_events``: of its time), whose size follows the clock. Rows whose jid is no jid are never
touched.

With ``archive`` a chunk is copied to ``<table>_archive`` and deleted in one transaction; a partition is copied, counted
once more, and dropped. A row that the archive has already is not copied again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import blueprint, moments, partitions, schema
from .blueprint import ARCHIVE
from .database import Session
from .errors import EngineError, RowsRejected
from .schema import Table
from .sql import quote
from .steady import Steady

log = logging.getLogger(__name__)

LOCK = "mysql_jobcache upkeep"
"""Who purges or migrates holds it: one at a time on a database."""
_CHUNK_SECONDS = 0.01
"""That a chunk's transaction should take, COMMIT included; a tenth of the time that it may, since on a busy server the
slowest of thousands takes five times as long. Larger chunks would do the whole hardly sooner."""
_CHUNK_FIRST, _CHUNK_LEAST, _CHUNK_MOST = 50, 10, 300  # rows
_COPY_ROWS = 1000
_DROP_PARTITIONS = 5
"""At once: everybody else waits while the server deletes their files, some 10 ms each."""
_COUNT_ROWS = 1_000_000
"""That one statement may count: well below its timeout, also from a cold disk."""
_CLOCKS_SECONDS = 600.0

_TRUE_JID = (
    "(CHAR_LENGTH(`jid`) = 20 AND `jid` NOT REGEXP '[^0-9]' OR "
    "`jid` REGEXP '^[0-9]{20}_[0-9]{1,10}$' AND `jid` NOT LIKE '%\\n')"
)
"""As :func:`moments.is_jid` has it."""


class Done(NamedTuple):
    """Rows gone from a table so far."""

    table: str
    rows: int


Report = Callable[[Done], None]


async def purge(steady: Steady, before: float, *, archive: bool, report: Report, duty: float = 0.8) -> dict[str, Any]:
    """Deletes the jobs that began, and the events that came, before a moment (seconds since the epoch).

    ``report`` is told of each step; ``duty`` is the share of the time that the server may be kept at work.

    Raises:
        EngineError: what keeps it from being done.
    """
    tables = await steady.transaction(lambda session: schema.look(session))
    done: dict[str, Any] = {"partitions_dropped": []}
    # Returns first: a job without returns is one that nobody answered, but a return without a job is nothing at all.
    for name in ("salt_returns", "jids", "salt_events"):
        if name not in tables:
            continue
        work = _Work(steady, name, tables[name], before, report, duty)
        try:
            if archive:
                await work.prepare_archive()
            if name in schema.PARTITIONED:
                done["partitions_dropped"] += await work.drop_partitions()
            await work.delete()
        except RowsRejected as exc:
            raise EngineError(
                f"{exc}. The table {name}{ARCHIVE} cannot hold what {name} holds; salt-run mysql_jobcache.migrate "
                "brings the archive tables to the same shape"
            ) from exc
        done[name] = work.rows
    return done


async def earlier_clock(session: Session) -> float:
    """The time by the server's clock or ours: one that is ahead must not make everything old."""
    ((there,),) = await session.query("SELECT UNIX_TIMESTAMP()")
    here = time.time()
    if abs(here - float(there)) > _CLOCKS_SECONDS:
        log.warning(
            "The clocks of the master and of the database server are %d s apart: what is too old is judged by the "
            "earlier one. Set them right.",
            abs(here - float(there)),
        )
    return min(here, float(there))


async def count(session: Session, before: float) -> dict[str, Any]:
    """What :func:`purge` would delete."""
    tables = await schema.look(session)
    found: dict[str, Any] = {"partitions_dropped": []}
    for name in ("salt_returns", "jids", "salt_events"):
        if name not in tables:
            continue
        old = (
            f"`alter_time` < '{_moment(before)}'"
            if name == "salt_events"
            else f"`jid` < '{moments.jid_at(before)}' AND {_TRUE_JID}"
        )
        ((found[name],),) = await session.query(f"SELECT COUNT(*) FROM `{name}` WHERE {old}")
        if name in schema.PARTITIONED:
            found["partitions_dropped"] += [
                f"{name}.{part.name}" for part in await partitions.look(session, name) if _is_before(part, before)
            ]
    await session.commit()
    return found


class _Work:
    """One table's purge."""

    def __init__(self, steady: Steady, name: str, table: Table, before: float, report: Report, duty: float) -> None:
        self.rows = 0
        self._steady = steady
        self._name = name
        self._before = before
        self._report = report
        self._duty = duty
        self._keys = ("jid", "id") if name == "salt_returns" else ("id",) if name == "salt_events" else ("jid",)
        self._indexed = {key.columns[0] for key in table.keys.values()}
        self._table = table
        self._archive = ""
        self._copy = ""

    async def prepare_archive(self) -> None:
        """The archive table is there, and the statement that copies rows into it is known."""
        name, archive = self._name, f"{self._name}{ARCHIVE}"
        found = await self._steady.transaction(lambda session: schema.look(session, archive))
        if archive not in found:
            await self._steady.run(f"CREATE TABLE IF NOT EXISTS `{archive}` LIKE `{name}`")
            if await self._steady.transaction(lambda session: partitions.look(session, archive)):
                await self._steady.run(f"ALTER TABLE `{archive}` REMOVE PARTITIONING")
            found = await self._steady.transaction(lambda session: schema.look(session, archive))
        columns = ", ".join(f"`{column}`" for column in blueprint.copied(self._table, found[archive]))
        key = self._keys[-1]
        if found[archive].has_unique(self._keys):
            known, tail = "", f" ON DUPLICATE KEY UPDATE `{key}` = `{archive}`.`{key}`"
        else:
            same = " AND ".join(f"`there`.`{column}` = `{name}`.`{column}`" for column in self._keys)
            known, tail = f" AND NOT EXISTS (SELECT 1 FROM `{archive}` AS `there` WHERE {same})", ""
        self._archive = archive
        self._copy = f"INSERT INTO `{archive}` ({columns}) SELECT {columns} FROM `{name}` WHERE {{}}{known}{tail}"

    async def drop_partitions(self) -> list[str]:
        """Drops those that hold nothing younger, and nothing whose jid is no jid."""
        name = self._name
        found = await self._steady.transaction(lambda session: partitions.look(session, name))
        counted: dict[str, tuple[int, int]] = {}
        about = await self._steady.transaction(lambda session: partitions.estimates(session, name))
        old = {part.name: about.get(part.name, 0) for part in found if _is_before(part, self._before)}
        for parts in _batches(old):
            counted |= await self._counted(parts)
        going = {part: rows for part, (rows, jids) in counted.items() if rows == jids}
        if self._archive:
            for part, rows in going.items():
                await self._archive_partition(part, rows)
        elif going:
            await self._drop(going)
        return [f"{name}.{part}" for part in going]

    async def _archive_partition(self, part: str, rows: int) -> None:
        before = None
        while rows != before:  # copied once more with what came meanwhile
            await self._copy_partition(part)
            before, ((rows, _),) = rows, (await self._counted([part])).values()
        await self._drop({part: rows})

    async def _drop(self, parts: dict[str, int]) -> None:
        names = list(parts)
        for start in range(0, len(names), _DROP_PARTITIONS):
            some = names[start : start + _DROP_PARTITIONS]
            await self._steady.change(
                f"ALTER TABLE `{self._name}` DROP PARTITION {', '.join(f'`{part}`' for part in some)}"
            )
            self._count(sum(parts[part] for part in some))

    async def _counted(self, parts: list[str]) -> dict[str, tuple[int, int]]:
        """The rows of partitions, and those with a true jid: from the shortest index, not one byte of a return."""
        rows = await self._steady.rows(
            " UNION ALL ".join(
                f"SELECT {quote(part)}, COUNT(*), COALESCE(SUM({_TRUE_JID}), 0) "
                f"FROM `{self._name}` PARTITION (`{part}`)"
                for part in parts
            )
        )
        return {part: (int(count), int(jids)) for part, count, jids in rows}

    async def _copy_partition(self, part: str) -> None:
        last: tuple[str, ...] | None = None
        listed = ", ".join(f"`{key}`" for key in self._keys)
        while True:
            after = f" WHERE ({listed}) > ({', '.join(map(quote, last))})" if last and len(last) == 1 else ""
            if last and len(last) > 1:
                after = f" WHERE `jid` > {quote(last[0])} OR (`jid` = {quote(last[0])} AND `id` > {quote(last[1])})"

            async def step(session: Session, after: str = after) -> list[tuple[Any, ...]]:
                keys = await session.query(
                    f"SELECT {listed} FROM `{self._name}` PARTITION (`{part}`){after} "
                    f"ORDER BY {listed} LIMIT {_COPY_ROWS}"
                )
                if keys:
                    await session.execute(self._copy.format(self._where(keys)))
                return keys

            keys = await self._steady.transaction(step)
            if not keys:
                return
            last = tuple(keys[-1])

    async def delete(self) -> None:
        """Deletes what is left, in chunks."""
        if self._name == "salt_events":
            await self._delete_events()
        elif "jid" in self._indexed:
            await self._delete_jobs()
        elif self._archive:
            raise EngineError(
                f"{self._name} has no index that begins with jid, so that archiving would read all of it for every "
                "row; run salt-run mysql_jobcache.migrate first"
            )
        else:
            await self._delete_unindexed()

    async def _delete_jobs(self) -> None:
        listed = ", ".join(f"`{key}`" for key in self._keys)
        cursor, relation, size = "", ">=", _CHUNK_FIRST

        def select() -> str:
            return (
                f"SELECT {listed} FROM `{self._name}` WHERE `jid` {relation} {quote(cursor)} "
                f"AND `jid` < '{moments.jid_at(self._before)}' ORDER BY `jid` LIMIT {size}"
            )

        while True:
            gone = self.rows
            keys, size = await self._chunk(select(), size)
            if not keys:
                return
            cursor = keys[-1][0]
            # What is left of a true jid comes next; what is no jid is passed over.
            relation = ">=" if moments.is_jid(cursor) and self.rows > gone else ">"

    async def _delete_events(self) -> None:
        by_time = "alter_time" in self._indexed
        cursor: Any = None
        size = _CHUNK_FIRST
        while True:
            after = "" if cursor is None else f" AND `id` > {cursor}"
            if by_time:
                after = "" if cursor is None else f" AND `alter_time` >= '{cursor}'"
            order = "alter_time" if by_time else "id"
            keys, size = await self._chunk(
                f"SELECT `id`, CAST(`alter_time` AS CHAR) FROM `salt_events` WHERE `alter_time` < "
                f"'{_moment(self._before)}'{after} ORDER BY `{order}` LIMIT {size}",
                size,
            )
            if not keys:
                return
            cursor = keys[-1][1] if by_time else keys[-1][0]

    async def _delete_unindexed(self) -> None:
        size = _CHUNK_FIRST
        old = f"`jid` < '{moments.jid_at(self._before)}' AND {_TRUE_JID}"
        # Looked for without a lock: the last DELETE would otherwise lock its way through all of the table.
        while await self._steady.rows(f"SELECT 1 FROM `{self._name}` WHERE {old} LIMIT 1"):
            began = time.monotonic()
            self._count(await self._steady.run(f"DELETE FROM `{self._name}` WHERE {old} LIMIT {size}"))
            size = await self._rest(began, size)

    async def _chunk(self, select: str, size: int) -> tuple[list[tuple[Any, ...]], int]:
        """Deletes a selection, and moves it to the archive; gives the selection and the next size."""
        began = 0.0

        async def step(session: Session) -> tuple[list[tuple[Any, ...]], int]:
            nonlocal began
            keys = await session.query(select)
            going = [key for key in keys if self._name == "salt_events" or moments.is_jid(key[0])]
            began = time.monotonic()
            if not going:
                return keys, 0
            where = self._where(going)
            if self._archive:
                # Locked first: a row may change between the copy and the delete.
                await session.query(f"SELECT 1 FROM `{self._name}` WHERE {where} FOR UPDATE")
                await session.execute(self._copy.format(where))
            return keys, await session.execute(f"DELETE FROM `{self._name}` WHERE {where}")

        keys, gone = await self._steady.transaction(step)
        self._count(gone)
        return keys, await self._rest(began, size) if keys else size

    async def _rest(self, began: float, size: int) -> int:
        """Leaves the server to others for a while; gives the size of the next chunk."""
        took = max(0.001, time.monotonic() - began)
        await asyncio.sleep(took * (1 - self._duty) / self._duty)
        return int(min(max(size * min(max(_CHUNK_SECONDS / took, 0.25), 1.25), _CHUNK_LEAST), _CHUNK_MOST))

    def _count(self, rows: int) -> None:
        self.rows += rows
        self._report(Done(self._name, rows))

    def _where(self, keys: list[tuple[Any, ...]]) -> str:
        if self._name == "salt_events":
            return f"`id` IN ({', '.join(str(int(key[0])) for key in keys)})"
        if self._name == "jids":
            return f"`jid` IN ({', '.join(quote(key[0]) for key in keys)})"
        by_jid: dict[str, list[str]] = {}
        for jid, id_ in keys:
            by_jid.setdefault(jid, []).append(quote(id_))
        return (
            "("
            + " OR ".join(f"(`jid` = {quote(jid)} AND `id` IN ({', '.join(ids)}))" for jid, ids in by_jid.items())
            + ")"
        )


def _is_before(part: partitions.Partition, before: float) -> bool:
    return part.below is not None and part.below <= moments.jid_at(before)


def _batches(parts: Mapping[str, int]) -> list[list[str]]:
    """The names of partitions, by their rows as many together as one statement may count: asking for each, small as
    days are, takes as long again as counting."""
    batches: list[list[str]] = []
    rows = 0
    for name, about in parts.items():
        if not batches or rows + about > _COUNT_ROWS:
            batches.append([])
            rows = 0
        batches[-1].append(name)
        rows += about
    return batches


def _moment(moment: float) -> str:
    return moments.utc(moment).strftime("%Y-%m-%d %H:%M:%S.%f")
