"""Bringing a database to our tables, whatever it is, and to the newest of the numbered files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import schema, survey
from .backfill import backfill
from .blueprint import ARCHIVE
from .database import Session
from .errors import DatabaseError, EngineError
from .schema import FOLDER, VERSIONS
from .shadow import NEW, OLD, STATE, Shadow
from .sql import quote
from .steady import Steady, number_of
from .survey import Survey

_BACKFILL_ROWS = 1000
_ROWS_A_SECOND, _BYTES_A_SECOND = 8_000, 10_000_000
"""What a small server copied and looked at again, from one table into another."""
_ROOM = 2.2
"""The size of a table with four-byte text and our keys over what it was; its old self stays meanwhile."""
_DONE_ALREADY = frozenset({1050, 1060, 1061, 1091})
"""A table, column or key is there already, or gone: a file that was interrupted begins anew."""

Progress = Callable[[str, int, int], None]
"""Told what is done with, of how many rows, about: ``("salt_returns", 1200, 5000)``."""


def plan(seen: Survey) -> dict[str, Any]:
    """What a migration would do, for people and programs."""
    steps = seen.to_migrate
    sizes = [step.table.size for step in steps]
    seconds = sum(max(step.table.rows / _ROWS_A_SECOND, step.table.size / _BYTES_A_SECOND) for step in steps)
    return {
        "creates": seen.absent,
        "migrates": {
            step.name: {"rows_about": step.table.rows, "bytes": step.table.size, "because": step.lacks}
            for step in steps
        },
        "goes_on_with": seen.interrupted,
        "in_the_way": seen.obstacles,
        "disk_bytes_needed_about": int(max(sizes, default=0) * _ROOM),
        "seconds_about": round(seconds + len(steps)),
    }


async def migrate(steady: Steady, partitions: str, progress: Progress, *, folder: Path = FOLDER) -> dict[str, Any]:
    """Does it; goes on where an earlier try was interrupted.

    Raises:
        EngineError: what is in the way, and what to do about it.
    """
    began = time.monotonic()
    seen = await steady.transaction(lambda session: survey.survey(session, partitions))
    if seen.kind == "foreign":
        raise EngineError("the tables are not Salt's: " + "; ".join(_foreign(seen)))
    if seen.obstacles:
        raise EngineError("nothing was changed: " + "; ".join(seen.obstacles))
    version = seen.version
    busy = {name.removeprefix(NEW).removeprefix(OLD) for name in seen.interrupted}
    created = [name for name in seen.absent if name not in busy]
    for name in created:

        async def create(session: Session, name: str = name) -> None:
            await schema.create_table(session, name, partitions, folder=folder)

        await steady.transaction(create)
    if seen.kind == "none" and not busy:
        await steady.transaction(lambda session: schema.record(session, *schema.sections(folder)))
        version = schema.newest(folder)
    done: dict[str, int] = {}
    folded: dict[str, int] = {}
    names = [*schema.TABLES, *(name + ARCHIVE for name in schema.TABLES)]
    rows = {finding.name: finding.table.rows for finding in seen.found}
    steps = {finding.name for finding in seen.to_migrate} | busy
    # The live tables first: an archive takes the shape of its own.
    for name in names:
        if name not in steps:
            continue

        def copied(table: str, count: int) -> None:
            done[table] = done.get(table, 0) + count
            progress(table, done[table], 2 * rows.get(table, 0))  # each row is copied, and looked at again

        done[name] = 0
        shadow = Shadow(steady, name, name.removesuffix(ARCHIVE), partitions, copied)
        await shadow.migrate()
        folded[name] = shadow.folded
    if STATE in await steady.transaction(lambda session: schema.look(session, STATE)):
        await steady.change(f"DROP TABLE `{STATE}`")
    filled = await _fill_in(steady, progress)
    if version is None:
        version = 1
        await steady.transaction(lambda session: schema.record(session, 1))
    applied = await apply(steady, version, folder)
    return {
        "created": created,
        "migrated": sorted(steps),
        "rows_folded": folded,
        "rows_filled_in": filled,
        "files_applied": applied,
        "version": max([version, *applied]),
        "seconds": round(time.monotonic() - began, 1),
    }


async def apply(steady: Steady, version: int, folder: Path = FOLDER) -> list[int]:
    """Applies the numbered files after ``version``, in order; gives their numbers."""
    applied = []
    for number, parts in sorted(schema.sections(folder).items()):
        if number <= version:
            continue
        for table, statements in parts:
            ((there,),) = await steady.rows(
                "SELECT COUNT(*) FROM information_schema.TABLES WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = "
                + quote(table)
            )
            if not there:
                continue  # when it is made, it is made by all of the files
            for statement in statements:
                try:
                    await steady.change(statement)
                except DatabaseError as exc:
                    if number_of(exc) not in _DONE_ALREADY:
                        raise
        await steady.run(
            f"INSERT INTO `{VERSIONS}` (`version`) VALUES ({number}) ON DUPLICATE KEY UPDATE "
            f"`version` = `{VERSIONS}`.`version`"
        )
        applied.append(number)
    return applied


async def _fill_in(steady: Steady, progress: Progress) -> int:
    filled = 0
    shape = schema.shape_of(await steady.transaction(schema.look))
    while more := await steady.transaction(lambda session: backfill(session, shape, limit=_BACKFILL_ROWS)):
        filled += more
        progress("columns of rows that others wrote", filled, 0)
    return filled


def _foreign(seen: Survey) -> list[str]:
    return [
        f"{finding.name} has no column {', '.join(missing)}"
        for finding in seen.found
        if finding.name == finding.of and (missing := schema.lacking(finding.of, finding.table))
    ]
