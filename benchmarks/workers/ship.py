"""The engine without the bus and without Salt: ships what a journal holds.

``python -m benchmarks.workers.ship``
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.worker import cpu, peak_mb, serve
from salt_mysql_engine.engine import spare_collector
from tests.support.shipping import Shipping

_beside: list[tuple[threading.Thread, asyncio.AbstractEventLoop, asyncio.Event]] = []


def drain(journal: str, mysql: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Ships all: wall and CPU seconds from the start of the writer to the last COMMIT, and the books."""
    return asyncio.run(_drain(Path(journal), mysql, options))


async def _drain(journal: Path, mysql: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    used, began = cpu(), time.perf_counter()
    async with Shipping(journal, mysql, **options) as shipping:
        books = await shipping.drain(timeout=3600)
        took = {"seconds": time.perf_counter() - began, "cpu": cpu() - used}
    return {**took, "books": books, "peak_mb": peak_mb()}


def begin(journal: str, mysql: dict[str, Any], options: dict[str, Any]) -> None:
    """Ships what other processes hand over, until :func:`end`."""
    started = threading.Event()

    async def work() -> None:
        over = asyncio.Event()
        _beside.append((threading.current_thread(), asyncio.get_running_loop(), over))
        async with Shipping(Path(journal), mysql, handed_off=True, **options):
            started.set()
            await over.wait()

    threading.Thread(target=lambda: asyncio.run(work()), daemon=True).start()
    assert started.wait(30)


def end() -> None:
    """No more shipping."""
    thread, loop, over = _beside.pop()
    loop.call_soon_threadsafe(over.set)
    thread.join(30)


if __name__ == "__main__":
    spare_collector()  # as the engine begins
    serve({"drain": drain, "begin": begin, "end": end})
