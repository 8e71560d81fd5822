"""Waiting for an event for some time.

Not with ``asyncio.wait_for()``: before Python 3.12 that swallows a cancellation which comes together with what it waits
for, and a task that was told to end goes on (https://github.com/python/cpython/issues/86296).
"""

from __future__ import annotations

import asyncio


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
