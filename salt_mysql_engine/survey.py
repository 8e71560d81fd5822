"""What a database is, and what it lacks to be ours."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import blueprint, partitions, schema
from .blueprint import ARCHIVE
from .database import Session
from .schema import Table
from .shadow import NEW, OLD


class Finding(NamedTuple):
    """One table: which of ours it is (an archive's too), what it lacks, its partitions' number."""

    name: str
    of: str
    table: Table
    lacks: list[str]
    partitions: int


class Survey(NamedTuple):
    """A database, before anything is done to it.

    ``kind``: ``none`` (no table of ours), ``ours``, ``saltext`` (as saltext.mysql documents), ``2014`` (anything
    older or without its keys), ``foreign`` (tables of our names that are not for this).
    """

    kind: str
    version: int | None
    found: list[Finding]
    absent: list[str]
    interrupted: list[str]
    """Tables that a migration left in the middle."""
    obstacles: list[str]

    @property
    def to_migrate(self) -> list[Finding]:
        """The tables that are not as they should be."""
        busy = {name.removeprefix(NEW).removeprefix(OLD) for name in self.interrupted}
        return [finding for finding in self.found if finding.lacks or finding.name in busy]


async def survey(session: Session, kind: str = "none") -> Survey:
    """Looks at the tables; ``kind``: the partitions that ``jids`` and ``salt_returns`` should have."""
    names = [*schema.TABLES, *(name + ARCHIVE for name in schema.TABLES)]
    tables = await schema.look(session, *names, *(prefix + name for prefix in (NEW, OLD) for name in names))
    found = []
    for name in names:
        if name not in tables:
            continue
        of = name.removesuffix(ARCHIVE)
        parts = await partitions.look(session, name)
        lacks = blueprint.differences(of, tables[name])
        if kind != "none" and name in schema.PARTITIONED and not parts:
            lacks.append(f"no partitions by {kind}")
        if name != of and of in tables and not blueprint.differences(of, tables[of]) and not lacks:
            ours = list(tables[of].columns)
            if list(tables[name].columns)[: len(ours)] != ours:
                lacks.append(f"its columns do not come in the order of {of}")
        found.append(Finding(name, of, tables[name], lacks, len(parts)))
    version = await _version(session)
    live = [finding for finding in found if finding.name == finding.of]
    return Survey(
        kind=_kind(live, version),
        version=version,
        found=found,
        absent=[name for name in schema.TABLES if name not in tables],
        interrupted=sorted(name for name in tables if name.startswith((NEW, OLD))),
        obstacles=await _obstacles(session, [finding for finding in found if finding.lacks], kind),
    )


def report(seen: Survey, host: str) -> dict[str, Any]:
    """For people and programs."""
    newest = schema.newest()
    missing = [f"{finding.name}: {lack}" for finding in seen.found for lack in finding.lacks]
    missing += [f"there is no table {name}" for name in seen.absent if seen.found]
    if seen.kind == "ours" and seen.version != newest:
        missing.append(f"version {newest} of the schema" if seen.version else "a record of the schema's version")
    advice = {
        "none": "with schema: create the engine makes the tables; so does salt-run mysql_jobcache.migrate",
        "foreign": "these tables are not Salt's; set mysql.db to another database",
    }.get(seen.kind, "salt-run mysql_jobcache.migrate" if missing or seen.interrupted else "nothing to do")
    return {
        "host": host,
        "is": _words(seen),
        "kind": seen.kind,
        "version": seen.version,
        "newest_version": newest,
        "missing": missing,
        "in_the_way": seen.obstacles,
        "migration_to_go_on_with": seen.interrupted,
        "what_to_do": advice,
        "tables": {
            finding.name: {
                "rows_about": finding.table.rows,
                "bytes": finding.table.size,
                "engine": finding.table.engine,
                "partitions": finding.partitions,
            }
            for finding in seen.found
        },
    }


def _words(seen: Survey) -> str:
    return {
        "none": "a database without tables of Salt's",
        "ours": f"ours at version {seen.version}" if seen.version else "ours, from before its schema had versions",
        "saltext": "tables as saltext.mysql documents them",
        "2014": "tables of Salt's in the style of 2014, without the keys they need",
        "foreign": "tables with our names that are somebody else's",
    }[seen.kind]


def _kind(live: list[Finding], version: int | None) -> str:
    if not live:
        return "none"
    tables = {finding.name: finding.table for finding in live}
    if any(schema.lacking(name, table) for name, table in tables.items()):
        return "foreign"
    jids, returns = tables.get("jids"), tables.get("salt_returns")
    if version is not None or all(table.has_unique(schema.UNIQUE[name]) for name, table in tables.items()):
        return "ours"
    leading = {key.columns[0] for key in returns.keys.values()} if returns else set()
    if jids and returns and jids.has_unique(("jid",)) and "jid" in leading and "alter_time" in returns.columns:
        return "saltext"
    return "2014"


async def _version(session: Session) -> int | None:
    if schema.VERSIONS not in await schema.look(session, schema.VERSIONS):
        return None
    ((version,),) = await session.query(f"SELECT MAX(`version`) FROM `{schema.VERSIONS}`")
    return None if version is None else int(version)


async def _obstacles(session: Session, lacking: list[Finding], kind: str) -> list[str]:
    found: list[str] = []
    for name, of, table, *_ in lacking:
        found += blueprint.obstacles(of, table, partitioned=kind != "none" and name in schema.PARTITIONED)
        if table.versioned:
            found.append(f"{name} keeps its history (SYSTEM VERSIONING), which a copy would lose; drop that first")
        for (trigger,) in await session.query(
            "SELECT TRIGGER_NAME FROM information_schema.TRIGGERS WHERE EVENT_OBJECT_SCHEMA = DATABASE() AND "
            f"EVENT_OBJECT_TABLE = '{name}'"
        ):
            found.append(
                f"{name} has the trigger {trigger}, which would not come along; drop it, and make it again after"
            )
        for (constraint,) in await session.query(
            "SELECT DISTINCT CONSTRAINT_NAME FROM information_schema.KEY_COLUMN_USAGE WHERE "
            "TABLE_SCHEMA = DATABASE() AND REFERENCED_TABLE_NAME IS NOT NULL AND "
            f"'{name}' IN (TABLE_NAME, REFERENCED_TABLE_NAME)"
        ):
            found.append(f"the foreign key {constraint} ties {name} to another table; drop it, and make it again after")
    if lacking:
        grants = " ".join(str(grant) for (grant,) in await session.query("SHOW GRANTS"))
        if "TRIGGER" not in grants.upper() and "ALL PRIVILEGES" not in grants.upper():
            found.append(
                "whether the tables have triggers cannot be seen without the privilege: GRANT TRIGGER on the database "
                "to the user itself"
            )
    return found
