"""Partitions of a table by range of ``jid``: a jid begins with its date, so a period is a range of texts.

Partition ``p20261116`` holds what began on that day and before the next partition's; the first one also
holds everything older, and ``pmax`` what lies beyond the last: nothing, but for jids that are no times or
are forged ones of a far future. New periods are cut off from ``pmax`` while it is empty, which takes
milliseconds.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import NamedTuple

from .database import Session
from .sql import quote
from .steady import Steady

AHEAD = 2
"""Periods to come that always have their partition."""
MOST = 400
"""Partitions that a table is made with: the server keeps files and memory for each, so the oldest periods share one."""
LAST = "pmax"


class Partition(NamedTuple):
    """``below``: the text that every jid in it is less than; ``None``: anything."""

    name: str
    below: str | None


def begin(kind: str, on: datetime.date) -> datetime.date:
    """The first day of the period (``day``, ``week`` from Monday on, ``month``) that ``on`` is in."""
    if kind == "week":
        return on - datetime.timedelta(days=on.weekday())
    return on.replace(day=1) if kind == "month" else on


def following(kind: str, on: datetime.date) -> datetime.date:
    """The first day of the next period."""
    length = {"day": 1, "week": 7, "month": 31}[kind]
    return begin(kind, begin(kind, on) + datetime.timedelta(days=length))


def day(text: str) -> datetime.date:
    """The day that a jid or a bound begins with.

    Raises:
        ValueError: it begins with none.
    """
    # A jid that somebody made up may be of the 31st of February.
    first = datetime.datetime.strptime(text[:6], "%Y%m").replace(tzinfo=datetime.timezone.utc).date()
    return first + datetime.timedelta(days=int(text[6:8]) - 1)


def layout(kind: str, first: datetime.date, today: datetime.date) -> list[Partition]:
    """The partitions of a table whose oldest rows are of ``first``, and the coming ones."""
    periods = list(_periods(kind, begin(kind, min(first, today)), today))
    return [*periods[-MOST:], Partition(LAST, None)]


def clause(partitions: list[Partition]) -> str:
    """What stands at the end of a CREATE or ALTER statement."""
    return f"PARTITION BY RANGE COLUMNS (`jid`) ({_definitions(partitions)})"


async def look(session: Session, table: str) -> list[Partition]:
    """The table's partitions by range of ``jid``, the oldest first; none for a table that has none, or others."""
    rows = await session.query(
        "SELECT PARTITION_NAME, PARTITION_DESCRIPTION FROM information_schema.PARTITIONS WHERE TABLE_SCHEMA = "
        f"DATABASE() AND TABLE_NAME = {quote(table)} AND PARTITION_METHOD = 'RANGE COLUMNS' AND "
        "PARTITION_EXPRESSION = '`jid`' ORDER BY PARTITION_ORDINAL_POSITION"
    )
    return [Partition(name, None if bound == "MAXVALUE" else bound.strip("'")) for name, bound in rows]


async def estimates(session: Session, table: str) -> dict[str, int]:
    """About how many rows each partition of a table has, as the server thinks."""
    rows = await session.query(
        "SELECT PARTITION_NAME, TABLE_ROWS FROM information_schema.PARTITIONS WHERE TABLE_SCHEMA = DATABASE() "
        f"AND TABLE_NAME = {quote(table)} AND PARTITION_NAME IS NOT NULL"
    )
    return {name: int(about or 0) for name, about in rows}


async def extend(steady: Steady, table: str, kind: str, today: datetime.date) -> list[str]:
    """Makes the coming partitions of a table that has some; gives the names of the new ones."""
    present = await steady.transaction(lambda session: look(session, table))
    bounds = [partition.below for partition in present if partition.below is not None]
    if not bounds:
        return []
    try:
        edge = day(bounds[-1])
    except ValueError:  # someone else's partitions
        return []
    taken = {partition.name for partition in present}
    new = [partition for partition in _periods(kind, edge, today) if partition.name not in taken][-MOST:]
    if new:
        if present[-1].below is None:
            cut = f"REORGANIZE PARTITION `{present[-1].name}` INTO ({_definitions([*new, present[-1]])})"
        else:
            cut = f"ADD PARTITION ({_definitions(new)})"
        await steady.change(f"ALTER TABLE `{table}` {cut}")
    return [partition.name for partition in new]


def _periods(kind: str, first: datetime.date, today: datetime.date) -> Iterator[Partition]:
    """From ``first`` on, which need not begin a period, to the last of those to come."""
    last = today
    for _ in range(AHEAD):
        last = following(kind, last)
    while first <= last:
        after = following(kind, first)
        yield Partition(f"p{first:%Y%m%d}", f"{after:%Y%m%d}")
        first = after


def _definitions(partitions: list[Partition]) -> str:
    return ", ".join(
        f"PARTITION `{partition.name}` VALUES LESS THAN "
        + ("(MAXVALUE)" if partition.below is None else f"({quote(partition.below)})")
        for partition in partitions
    )
