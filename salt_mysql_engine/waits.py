"""Waiting for an event, or for work, for some time.

Not with ``asyncio.wait_for()``: before Python 3.12 that swallows a cancellation which comes together with what it waits
for, and a task that was told to end goes on (https://github.com/python/cpython/issues/86296).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")

_END_SECONDS = 1.0
"""What is cancelled may swallow that, too, and is left alone then."""


class Breath:
    """Lets everybody else have a turn after each so many ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    async def taken(self) -> None:
        """Between two pieces of work."""
        if time.monotonic() >= self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + self._seconds


async def is_set_within(event: asyncio.Event, seconds: float | None) -> bool:
    """Whether ``event`` is set before so many seconds are over; ``None``: it is waited for."""
    if event.is_set():
        return True
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiter}, timeout=seconds)
    finally:
        waiter.cancel()
    return event.is_set()


async def within(work: Awaitable[Result], seconds: float) -> Result:
    """What ``work`` gives; it is cancelled after so many seconds, or with its caller, and has ended on return.

    Raises:
        TimeoutError: it was (``asyncio``'s, before Python 3.11).
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there to look at it
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=_END_SECONDS)
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():  # our caller is cancelled: what it closes next must be nobody's any more
            task.cancel()
            await asyncio.wait({task}, timeout=_END_SECONDS)
