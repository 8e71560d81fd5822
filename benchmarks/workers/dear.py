"""One hostile event, or dead letters that are listed, exported and tried again, in an engine without bus and Salt while
small returns come all the time: how late these are, and how much memory it takes.

``python -m benchmarks.workers.dear FOLDER MYSQL WHAT COUNT``: prints JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.hostile import event, letter
from salt_mysql_engine import saltevent
from salt_mysql_engine.engine import by_portions, spare_collector
from salt_mysql_engine.journal import NewEvent, Settlement
from tests.support.shipping import Shipping, jid, returned

_EVERY_SECONDS = 0.02
_PIECE_BYTES = 512 * 1024


class _Others:
    """Small returns, and the most memory meanwhile."""

    def __init__(self, ship: Shipping) -> None:
        self.engine = self.together = 0
        self._ship = ship
        self._number = 1000

    async def come(self) -> None:
        """Until cancelled."""
        process = psutil.Process()
        while True:
            self._number += 1
            self._ship.capture.on_events([returned(jid(self._number), "small")])
            await self._ship.capture.drain()
            engine = process.memory_info().rss
            decoder = 0
            with contextlib.suppress(psutil.Error, TypeError):
                decoder = psutil.Process(self._ship.decoder.pid).memory_info().rss if self._ship.decoder.pid else 0
            self.engine, self.together = max(self.engine, engine), max(self.together, engine + decoder)
            await asyncio.sleep(_EVERY_SECONDS)


async def _settled(ship: Shipping, last: int) -> None:
    while True:
        oldest = await ship._in_journal(ship.journal.oldest_seq)
        if oldest is None or oldest > last:
            return
        await asyncio.sleep(_EVERY_SECONDS)


async def _letters(ship: Shipping, count: int) -> None:
    """What the engine's verbs do for the runner."""
    journal = ship.journal
    for listed in await ship._in_journal(lambda: journal.dead_letters(limit=count, whole=False)):
        saltevent.told(*await ship._in_journal(journal.ends_of_dead_letter, listed.seq))
        offset = 0
        while piece := await ship._in_journal(journal.piece_of_dead_letter, listed.seq, offset, _PIECE_BYTES):
            offset += len(piece)
    retry = functools.partial(journal.retry_dead_letters, trusted=False)
    await by_portions(ship._in_journal, journal, retry, None, done=lambda again: ship.writer.announce(again, 0))
    await _settled(ship, await ship._in_journal(journal.newest_seq))


def _bury(ship: Shipping, count: int) -> None:
    for number in range(count):
        ship.journal.append([NewEvent(time.time(), jid(number + 1), "web1", letter(jid(number + 1)))])
        seq = ship.journal.newest_seq()
        ship.journal.settle(Settlement([seq], {}, {seq: ("refused", "for the benchmark")}))


async def main(folder: str, mysql: dict[str, Any], what: str, count: int) -> dict[str, Any]:
    """Seconds and megabytes."""
    async with Shipping(Path(folder), mysql, flush_interval=0.05) as ship:
        ship.journal.caps = ship.journal.caps._replace(max_bytes=1 << 40)
        await ship.ship(returned(jid(999), "web1"))
        if what == "letters":
            await ship._in_journal(_bury, ship, count)
        bodies = [] if what == "letters" else [event(what, jid(1))]
        others = _Others(ship)
        coming = asyncio.create_task(others.come())
        await asyncio.sleep(1.0)
        quiet = max(ship.writer.lags)
        ship.writer.lags.clear()
        began = time.perf_counter()
        if what == "letters":
            await _letters(ship, count)
        else:
            ship.capture.on_events(bodies)
            bodies.clear()
            await ship.capture.drain()
            await _settled(ship, await ship._in_journal(ship.journal.newest_seq))
        took = time.perf_counter() - began
        await asyncio.sleep(0.3)
        late = max(ship.writer.lags)
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await ship.settled()
    return {
        "late": late,
        "quiet": quiet,
        "took": took,
        "engine": others.engine / 1e6,
        "together": others.together / 1e6,
    }


if __name__ == "__main__":
    spare_collector()
    print(json.dumps(asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])))))
