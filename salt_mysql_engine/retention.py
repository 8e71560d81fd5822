"""What the tables need while the engine runs: old jobs taken out, coming partitions made, foreign rows filled in.

A connection of its own, opened for each round: what goes wrong here never holds up the writer, is said once, and is
tried again at the next round.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from typing import Any

from . import partitions, schema
from .backfill import backfill
from .clock import Clock
from .database import Database
from .errors import DatabaseError, EngineError
from .purge import LOCK, earlier_clock, purge
from .steady import Busy, Steady
from .waits import is_set_within

log = logging.getLogger(__name__)

FIRST_SECONDS = 60.0
_ROUND_SECONDS = 60.0
_PURGE_SECONDS = 3600.0
_BACKFILL_ROWS = 500
_PATIENCE_SECONDS = 30.0
_DUTY = 0.5
"""The share of the time that the database may be kept at work with this."""
_DAY = 86_400.0


class Retention:
    """Rounds of upkeep. ``days`` (0: none go), ``archive`` and ``partitions`` are the settings of these names."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.days = 0.0
        self.archive = False
        self.partitions = "none"
        self.confirmed = False
        """Whether the master's own pillar has confirmed these: before that nothing is deleted, and no table changed."""
        self.last: dict[str, Any] | None = None
        """What the last purge took out, and when (seconds since the epoch)."""
        self.error = ""
        self.filled = 0
        """Rows of other writers whose columns were filled in."""
        self._database = database
        self._clock = clock
        self._purged_at = float("-inf")
        self._news = asyncio.Event()

    def retime(self) -> None:
        """There are new settings: a round now, with a purge."""
        self._purged_at = float("-inf")
        self._news.set()

    async def run(self) -> None:
        """Rounds, the first after a minute; until cancelled."""
        wait = FIRST_SECONDS
        self._news.clear()
        while True:
            await is_set_within(self._news, wait)
            self._news.clear()
            wait = _ROUND_SECONDS
            try:
                await self.round()
                if self.error:
                    log.warning("The tables can be looked after again")
                self.error = ""
            except Busy:
                log.debug("Another master, a purge or a migration is at work on the tables; next time then")
            except (DatabaseError, EngineError) as exc:
                if str(exc) != self.error:
                    log.error("The tables cannot be looked after: %s. Jobs are stored all the same.", exc)
                self.error = str(exc)
            except Exception as exc:  # whatever it is, the next round comes
                log.exception("The tables cannot be looked after. Jobs are stored all the same")
                self.error = f"{type(exc).__name__}: {exc}; the master's log has more"

    async def round(self) -> None:
        """One round.

        Raises:
            Busy: somebody else does this now.
            EngineError: what keeps it from being done.
        """
        async with Steady(self._database, LOCK, patience=_PATIENCE_SECONDS) as steady:
            tables = await steady.transaction(schema.look)
            if not tables.keys() >= {"jids", "salt_returns"}:  # the writer says so, if it is not to create them
                return
            shape = schema.shape_of(tables)
            while filled := await steady.transaction(lambda session: backfill(session, shape, limit=_BACKFILL_ROWS)):
                self.filled += filled
                await asyncio.sleep(0.1)
            if not self.confirmed or time.monotonic() < self._purged_at + _PURGE_SECONDS:
                return
            now = min(self._clock.now(), await steady.transaction(earlier_clock))
            if self.partitions != "none":
                await self._make_partitions(steady, now)
            if self.days:
                began = time.monotonic()
                done = await purge(
                    steady, now - self.days * _DAY, archive=self.archive, report=lambda _: None, duty=_DUTY
                )
                self.last = {"at": now, "seconds": round(time.monotonic() - began, 3), **done}
                gone = {name: done[name] for name in schema.TABLES if done.get(name)}
                if gone:
                    log.info(
                        "Older than %g days and %s: %s", self.days, "archived" if self.archive else "deleted",
                        ", ".join(f"{rows} rows of {name}" for name, rows in gone.items()),
                    )  # fmt: skip
            self._purged_at = time.monotonic()

    async def _make_partitions(self, steady: Steady, now: float) -> None:
        today = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).date()
        for table in schema.PARTITIONED:
            made = await partitions.extend(steady, table, self.partitions, today)
            if made:
                log.info("Made the partitions %s of %s", ", ".join(made), table)
