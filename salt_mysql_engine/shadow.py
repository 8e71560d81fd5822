"""Bringing one table to another shape, while others write to it.

A shadow of the table is made in the new shape, and filled in chunks along an index. One RENAME then puts it into the
table's place; what was written meanwhile behind the cursor is brought over from the old table, which nobody changes
any more, and that is dropped. Writers always find a table under the name, and nothing that they wrote is missing at
the end.

Which tables there are says how far it came, and a cursor that moves in the transaction of each chunk how far within:
``mysql_jobcache_new_<table>`` is being filled, ``mysql_jobcache_old_<table>`` is being brought over. So it goes on
where a ``kill -9`` of anybody stopped it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from . import blueprint, folding, jobload, jsontext, partitions, schema
from .blueprint import ARCHIVE
from .database import Session
from .errors import EngineError, RowsRejected
from .schema import Table
from .sql import MAX_BRANCHES, quote
from .steady import Steady

NEW, OLD = "mysql_jobcache_new_", "mysql_jobcache_old_"
STATE = "mysql_jobcache_migration"
_INDEX = "mysql_jobcache_jid"
_STATE_DDL = (
    f"CREATE TABLE `{STATE}` (`source` VARCHAR(64) CHARACTER SET ascii NOT NULL PRIMARY KEY, "
    "`cursor` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NULL, `folded` BIGINT NOT NULL DEFAULT 0) "
    "ENGINE = InnoDB"
)
_CHUNK_SECONDS = 0.15
_CHUNK_FIRST, _CHUNK_LEAST, _CHUNK_MOST = 500, 20, 50_000  # rows
_NUMBERS_LEFT_FREE = 100_000
"""Of a column that counts itself: what is written to the old table until the RENAME must find its numbers free."""

Report = Callable[[str, int], None]
"""Told of rows of a table that are done."""


class Shadow:
    """One table's way. ``of``: which of ours it is to be, or to be the archive of."""

    def __init__(self, steady: Steady, name: str, of: str, kind: str, report: Report) -> None:
        self._steady = steady
        self._name = name
        self._of = of
        self._kind = kind if of in schema.PARTITIONED and not name.endswith(ARCHIVE) else "none"
        self._new, self._old = NEW + name, OLD + name
        self._keys = folding.keys_of(of)
        self._key = self._keys[0]
        self._report = report
        self.folded = 0
        """Rows that are not in the new table, since another one with their key is."""

    async def migrate(self) -> None:
        """All of the way, from wherever an earlier try stopped.

        Raises:
            EngineError: the table holds what its new shape cannot.
        """
        try:
            await self._finish()
            tables = await self._tables()
            if self._is_right(tables[self._name], await self._parts(), tables):
                if self._new in tables:  # somebody else was faster, in another way
                    await self._drop(self._new)
                return
            await self._fill(tables)
            await self._swap()
            await self._finish()
        except RowsRejected as exc:
            raise EngineError(f"{exc}. That is in the table {self._name}; mend it there, and run this again") from exc

    def _is_right(self, table: Table, parts: bool, tables: dict[str, Table]) -> bool:
        if blueprint.differences(self._of, table) or (self._kind != "none" and not parts):
            return False
        return not self._name.endswith(ARCHIVE) or list(table.columns)[: len(tables[self._of].columns)] == list(
            tables[self._of].columns
        )

    async def _tables(self) -> dict[str, Table]:
        return await self._steady.transaction(
            lambda session: schema.look(session, self._name, self._new, self._old, self._of)
        )

    async def _parts(self) -> bool:
        return bool(await self._steady.transaction(lambda session: partitions.look(session, self._name)))

    # Filling the shadow

    async def _fill(self, tables: dict[str, Table]) -> None:
        await self._make_state()
        cursor = await self._cursor(self._new)
        if self._new in tables and (
            cursor is None
            or not set(tables[self._name].columns) <= set(tables[self._new].columns)
            or blueprint.differences(self._of, tables[self._new])
        ):
            await self._drop(self._new)  # half made, by another version, or of a table that was changed since
            del tables[self._new]
        if self._new not in tables:
            await self._make(tables)
            await self._steady.run(
                f"INSERT INTO `{STATE}` (`source`, `cursor`) VALUES ({quote(self._new)}, NULL) "
                "ON DUPLICATE KEY UPDATE `cursor` = NULL"
            )
        tables = await self._tables()
        await self._walk(self._new, self._name, tables[self._name], tables[self._new], self._copy)

    async def _make(self, tables: dict[str, Table]) -> None:
        """The shadow, empty and in its shape; the table gets an index to walk along."""
        table = tables[self._name]
        if not any(key.columns[0] == self._key for key in table.keys.values()):
            online = ", ALGORITHM = INPLACE, LOCK = NONE" if table.engine == "InnoDB" else ""
            await self._steady.change(f"ALTER TABLE `{self._name}` ADD KEY `{_INDEX}` (`{self._key}`){online}")
        if self._name.endswith(ARCHIVE):
            # What saltext.mysql copies with SELECT * must meet the columns in the same order.
            await self._steady.change(f"CREATE TABLE `{self._new}` LIKE `{self._of}`")
            if await self._steady.transaction(lambda session: partitions.look(session, self._new)):
                await self._steady.change(f"ALTER TABLE `{self._new}` REMOVE PARTITIONING")
            await self._add_own_columns(table, tables[self._of])
            return
        await self._steady.change(f"CREATE TABLE `{self._new}` LIKE `{self._name}`")
        made = (await self._tables())[self._new]
        await self._steady.change(f"ALTER TABLE `{self._new}` {', '.join(blueprint.changes(self._of, made))}")
        parts = await self._steady.transaction(lambda session: partitions.look(session, self._new))
        if self._kind != "none" and not parts:
            ((first, today),) = await self._steady.rows(
                f"SELECT (SELECT `jid` FROM `{self._name}` WHERE `jid` >= '2' AND `jid` REGEXP {folding.TRUE_MOMENT} "
                "ORDER BY `jid` LIMIT 1), DATE_FORMAT(UTC_TIMESTAMP(), '%Y%m%d')"
            )
            days = partitions.layout(self._kind, partitions.day(first or today), partitions.day(today))
            await self._steady.change(f"ALTER TABLE `{self._new}` {partitions.clause(days)}")

    async def _add_own_columns(self, archive: Table, live: Table) -> None:
        """Columns that the archive alone has."""
        ((_, ddl),) = await self._steady.rows(f"SHOW CREATE TABLE `{self._name}`")
        for column in archive.columns.keys() - live.columns.keys():
            (definition,) = re.findall(rf"^  (`{re.escape(column)}` .*?),?$", ddl, flags=re.MULTILINE)
            await self._steady.change(f"ALTER TABLE `{self._new}` ADD COLUMN {definition}")

    async def _copy(self, session: Session, source: str, tables: tuple[Table, Table], where: str) -> int:
        """Rows of ``source`` into the shadow, or into the table itself."""
        target = self._new if source == self._name else self._name
        return await session.execute(folding.insert(self._of, source, target, *tables, where))

    async def _walk(self, mark: str, source: str, have: Table, want: Table, chunk: Callable[..., Any]) -> None:
        """``chunk`` for one range of the key after another, each in a transaction that also notes how far it came."""
        size = _CHUNK_FIRST
        cursor = await self._cursor(mark)
        past = None if cursor is None or cursor[0] is None else cursor[0]
        index = folding.index_of(self._of, have)
        key = f"`src`.`{self._key}`"
        while True:
            began = time.monotonic()

            async def step(session: Session, past: Any = past, size: int = size) -> tuple[Any, bool]:
                beyond = "TRUE" if past is None else f"{key} > {self._literal(past)}"
                rest = f"FROM `{source}` AS `src` {index}WHERE {beyond} AND {key} IS NOT NULL"
                found = await session.query(f"SELECT {key} {rest} ORDER BY {key} LIMIT {size - 1}, 1")
                is_last = not found
                if is_last:
                    found = await session.query(f"SELECT MAX({key}) {rest}")
                ((upper,),) = found
                ranges = [f"{beyond} AND {key} <= {self._literal(upper)}"] if upper is not None else []
                if past is None:
                    ranges.append(f"{key} IS NULL")
                if ranges:
                    await chunk(session, source, (have, want), " OR ".join(f"({each})" for each in ranges))
                    await session.execute(
                        f"UPDATE `{STATE}` SET `cursor` = {quote(str(upper or past or ''))} "
                        f"WHERE `source` = {quote(mark)}"
                    )
                return upper, is_last

            past, is_last = await self._steady.transaction(step)
            if is_last:  # what comes now is brought over later
                return
            took = max(0.001, time.monotonic() - began)
            self._report(self._name, size)
            size = int(min(max(size * min(max(_CHUNK_SECONDS / took, 0.25), 2.0), _CHUNK_LEAST), _CHUNK_MOST))

    def _literal(self, value: Any) -> str:
        if self._key == "id":
            return str(int(value or 0))
        return quote(str(value))

    # The new table takes the old one's place

    async def _swap(self) -> None:
        tables = await self._tables()
        counting = [
            name for name, column in tables[self._new].columns.items() if "auto_increment" in column.extra.lower()
        ]
        for column in counting:
            ((last,),) = await self._steady.rows(f"SELECT COALESCE(MAX(`{column}`), 0) FROM `{self._name}`")
            await self._steady.change(f"ALTER TABLE `{self._new}` AUTO_INCREMENT = {int(last) + _NUMBERS_LEFT_FREE}")
        await self._steady.change(f"RENAME TABLE `{self._name}` TO `{self._old}`, `{self._new}` TO `{self._name}`")

    async def _finish(self) -> None:
        """From the RENAME on, wherever that stopped: servers before MySQL 8 and MariaDB 10.6 may do half of it."""
        tables = await self._tables()
        if self._old not in tables:
            return
        if self._name not in tables:
            await self._steady.change(
                f"RENAME TABLE `{self._new if self._new in tables else self._old}` TO `{self._name}`"
            )
            return await self._finish()
        for left in (self._new, self._old):  # the new one: only where somebody made a third in the middle
            if left in tables:
                await self._bring_over(left, tables[left], tables[self._name])
        return None

    async def _bring_over(self, source: str, have: Table, want: Table) -> None:
        mark = f"{source} over"
        await self._make_state()
        if await self._cursor(mark) is None:
            await self._steady.run(f"INSERT INTO `{STATE}` (`source`, `cursor`) VALUES ({quote(mark)}, NULL)")
        await self._walk(mark, source, have, want, self._bring_chunk)
        ((folded,),) = await self._steady.rows(f"SELECT `folded` FROM `{STATE}` WHERE `source` = {quote(mark)}")
        self.folded += int(folded)
        await self._drop(source)

    async def _bring_chunk(self, session: Session, source: str, tables: tuple[Table, Table], where: str) -> None:
        """What of a range is missing in the table, or stands there otherwise."""
        have, want = tables
        if self._key != "id":
            await session.execute(
                f"UPDATE `{STATE}` SET `folded` = `folded` + ({folding.count_folded(self._of, have, source, where)}) "
                f"WHERE `source` = {quote(f'{source} over')}"
            )
        keys = ", ".join(f"`src`.`{key}`" for key in self._keys)
        same = " AND ".join(
            f"`now`.`{key}` = "
            + (
                f"`src`.`{key}`"
                if self._key == "id"
                else f"CONVERT(COALESCE(`src`.`{key}`, '') USING utf8mb4) COLLATE {want.columns[key].collation}"
            )
            for key in self._keys
        )
        text = {"jids": "load", "salt_returns": "full_ret"}.get(self._of)
        differs = f" OR {folding.binary(f'`now`.`{text}`')} <> {folding.binary(f'`src`.`{text}`')}" if text else ""
        index = folding.index_of(self._of, have)
        found = await session.query(
            f"SELECT {keys}, `now`.`{self._key}` IS NULL FROM `{source}` AS `src` {index}"
            f"LEFT JOIN `{self._name}` AS `now` ON {same} WHERE ({where}) AND (`now`.`{self._key}` IS NULL{differs})"
        )
        if not found:
            return
        keyed = [row[:-1] for row in found]
        for start in range(0, len(keyed), MAX_BRANCHES):
            among = self._among(keyed[start : start + MAX_BRANCHES])
            await session.execute(folding.insert(self._of, source, self._name, *tables, among))
        if self._of == "jids":
            await self._merge(session, source, [jid for jid, missing in found if not missing])

    def _among(self, keys: list[tuple[Any, ...]]) -> str:
        return " OR ".join(
            "("
            + " AND ".join(
                f"`src`.`{column}` IS NULL" if value is None else f"`src`.`{column}` = {self._literal(value)}"
                for column, value in zip(self._keys, key, strict=True)
            )
            + ")"
            for key in dict.fromkeys(keys)
        )

    async def _merge(self, session: Session, source: str, jids: list[str]) -> None:
        """Published loads that were changed in the old table while they were copied."""
        for jid in dict.fromkeys(jids):
            for (now,) in await session.query(
                f"SELECT `load` FROM `{self._name}` WHERE `jid` = {quote(jid)} FOR UPDATE"
            ):
                best = now
                for (before,) in await session.query(f"SELECT `load` FROM `{source}` WHERE `jid` = {quote(jid)}"):
                    load = jobload.parsed(before)
                    if isinstance(load, dict) and jobload.is_published(load):
                        best = jsontext.dumps(jobload.merged_load(jobload.parsed(best), load))
                if best != now:
                    await session.execute(
                        f"UPDATE `{self._name}` SET `load` = {quote(best)} WHERE `jid` = {quote(jid)}"
                    )

    # The state

    async def _make_state(self) -> None:
        found = await self._steady.transaction(lambda session: schema.look(session, STATE))
        if STATE not in found:
            await self._steady.change(_STATE_DDL)
        elif "folded" not in found[STATE].columns:  # an earlier version was interrupted
            await self._steady.change(f"ALTER TABLE `{STATE}` ADD COLUMN `folded` BIGINT NOT NULL DEFAULT 0")

    async def _cursor(self, mark: str) -> tuple[Any, ...] | None:
        found = await self._steady.rows(f"SELECT `cursor` FROM `{STATE}` WHERE `source` = {quote(mark)}")
        return found[0] if found else None

    async def _drop(self, table: str) -> None:
        await self._steady.change(f"DROP TABLE `{table}`")
        await self._steady.run(f"DELETE FROM `{STATE}` WHERE `source` IN ({quote(table)}, {quote(f'{table} over')})")
