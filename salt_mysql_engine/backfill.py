"""What our tables have columns for and other writers leave out: ``fun``, ``user`` and ``tgt`` of ``jids``, as the load
says, and ``failed`` of ``salt_returns``."""

from __future__ import annotations

from . import jobload, sql
from .database import Session
from .schema import Shape
from .sql import quote

_COLUMNS = ("fun", "user", "tgt")
_BYTES = 4 * 1024 * 1024
"""Of loads or returns in one batch, about: a publish to a large fleet holds the name of every minion."""


async def backfill(session: Session, shape: Shape, *, limit: int) -> int:
    """Fills in at most ``limit`` rows of each table, in a transaction each; gives how many."""
    filled = await _fill_jobs(session, limit) if shape.job_columns else 0
    return filled + (await _fill_returns(session, limit) if shape.failed else 0)


async def _fill_returns(session: Session, limit: int) -> int:
    waiting = await session.query(
        "SELECT `jid`, `id`, LENGTH(`full_ret`) FROM `salt_returns` WHERE `failed` IS NULL "
        f"ORDER BY `jid` DESC LIMIT {limit:d}"
    )
    keys: list[tuple[str, str]] = []
    size = 0
    for jid, minion, length in waiting:
        if keys and size + length > _BYTES:
            break
        keys.append((jid, minion))
        size += length
    for where in sql.among(keys):
        await session.execute(
            f"UPDATE `salt_returns` SET `failed` = {sql.failed()} WHERE `failed` IS NULL AND ({where})"
        )
    await session.commit()
    return len(keys)


async def _fill_jobs(session: Session, limit: int) -> int:
    """A load that cannot be read gets empty texts, so that it is not met again."""
    waiting = await session.query(
        f"SELECT `jid`, CHAR_LENGTH(`load`) FROM `jids` WHERE `fun` IS NULL ORDER BY `jid` DESC LIMIT {limit:d}"
    )
    jids: list[str] = []
    size = 0
    for jid, characters in waiting:
        if jids and size + (characters or 0) > _BYTES:
            break
        jids.append(jid)
        size += characters or 0  # NULL, in tables of another's
    if not jids:
        await session.commit()
        return 0
    listed = ", ".join(map(quote, jids))
    rows = await session.query(f"SELECT `jid`, `load` FROM `jids` WHERE `fun` IS NULL AND `jid` IN ({listed})")
    if rows:
        values = " UNION ALL ".join(
            "SELECT "
            + ", ".join(f"{quote(text)} AS `{name}`" for name, text in zip(("jid", *_COLUMNS), row, strict=True))
            for row in ((jid, *jobload.job_columns(jobload.parsed(load))) for jid, load in sorted(rows))
        )
        changes = ", ".join(f"`jids`.`{column}` = `says`.`{column}`" for column in _COLUMNS)
        await session.execute(
            f"UPDATE `jids` JOIN ({values}) AS `says` ON `jids`.`jid` = `says`.`jid` SET {changes} "
            "WHERE `jids`.`fun` IS NULL"
        )
    await session.commit()
    return len(rows)
