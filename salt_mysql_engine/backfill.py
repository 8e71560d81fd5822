"""Columns ``fun``, ``user`` and ``tgt`` of rows that other writers put into ``jids``: what their load says."""

from __future__ import annotations

import json
from typing import Any

from . import records
from .database import Session
from .sql import quote

_COLUMNS = ("fun", "user", "tgt")
_BYTES = 4 * 1024 * 1024
"""Of loads in one batch, about: a publish to a large fleet holds the name of every minion."""


async def backfill(session: Session, *, limit: int) -> int:
    """Fills in at most ``limit`` rows that have no ``fun`` yet, in one transaction; gives how many.

    A load that cannot be read gets empty texts, so that it is not met again.
    """
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
            for row in ((jid, *records.job_columns(_parsed(load))) for jid, load in sorted(rows))
        )
        changes = ", ".join(f"`jids`.`{column}` = `says`.`{column}`" for column in _COLUMNS)
        await session.execute(
            f"UPDATE `jids` JOIN ({values}) AS `says` ON `jids`.`jid` = `says`.`jid` SET {changes} "
            "WHERE `jids`.`fun` IS NULL"
        )
    await session.commit()
    return len(rows)


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
