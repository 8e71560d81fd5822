"""An event is waited for, and whoever waits can be told to end at any moment."""

from __future__ import annotations

import asyncio

import pytest

from salt_mysql_engine.waits import is_set_within, within


async def test_it_says_whether_the_event_came_in_time() -> None:
    event = asyncio.Event()
    assert not await is_set_within(event, 0.01)
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await is_set_within(event, 60)
    assert await is_set_within(event, 0)
    assert await is_set_within(event, None)


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancellation_that_comes_with_the_event_is_not_lost(turns: int) -> None:
    """However many turns of the loop lie between the two."""
    event = asyncio.Event()
    task = asyncio.create_task(wait_for_ever(event))
    await asyncio.sleep(0.01)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()


async def wait_for_ever(event: asyncio.Event) -> None:
    """As an actor does."""
    while True:
        await is_set_within(event, 60)
        event.clear()


async def test_work_that_ends_as_we_are_cancelled_does_not_swallow_that() -> None:
    for end in (lambda done: done.set_result(1), lambda done: done.set_exception(ValueError("no"))):
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(within(done, 60))
        await asyncio.sleep(0)
        end(done)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError)


async def test_work_that_takes_too_long_is_cancelled() -> None:
    work = asyncio.create_task(asyncio.sleep(60))
    with pytest.raises(asyncio.TimeoutError):
        await within(work, 0.01)
    assert work.cancelled()
    assert await within(asyncio.sleep(0, "done"), 60) == "done"
