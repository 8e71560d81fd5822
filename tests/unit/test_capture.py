"""What is taken off the bus, by its tag alone, and what becomes of it until it is in a real journal."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import capture, settings
from salt_mysql_engine.capture import Capture
from salt_mysql_engine.journal import Caps, Entry, Journal
from salt_mysql_engine.records import Selection
from tests.support.shipping import MASTER, body, jid, published, returned

JID = jid(1)


class Bus:
    """A capture, the journal behind it, and what it told."""

    def __init__(self, directory: Path) -> None:
        self.journal = Journal(directory)
        self.told: list[tuple[int, int]] = []
        self.losses = 0
        self.failing: Exception | None = None
        self.capture = Capture(
            self.journal,
            self._in_journal,
            selection(),
            on_append=lambda events, size: self.told.append((events, size)),
            on_loss=self._on_loss,
        )

    def _on_loss(self) -> None:
        self.losses += 1

    async def _in_journal(self, function: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0)
        if self.failing is not None:
            raise self.failing
        return function(*args)

    async def journalled(self, *bodies: bytes) -> list[bytes]:
        """What is in the journal of some events."""
        self.capture.on_events([*bodies])
        await self.capture.drain()
        return [entry.body for entry in self.entries()]

    def entries(self) -> list[Entry]:
        return self.journal.read(after=0, rows=10_000, max_bytes=10**9)

    def keys(self) -> list[tuple[str, str]]:
        """The jid and minion of each event, as the journal has them."""
        with sqlite3.connect(self.journal.path) as connection:
            return connection.execute("SELECT jid, minion FROM events ORDER BY seq").fetchall()


def selection(**options: Any) -> Selection:
    return Selection(settings.combine(options, {}), master_id=MASTER)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    made = Bus(tmp_path)
    made.journal.open()
    yield made
    made.journal.close()


OF_JOBS = [
    returned(JID, "web1"),
    returned(JID, "ünlike 1"),
    published(JID, ["web1"]),
    body(f"salt/run/{JID}/new", {}),
    body(f"salt/run/{JID}/ret", {}),
    body(f"salt/wheel/{JID}/new", {}),
    body(f"salt/wheel/{JID}/ret", {}),
]
OF_NOBODY = [
    body("salt/auth", {}),
    body(f"salt/job/{JID}/prog/web1/1", {}),
    body("minion_start", {}),
    b"",
    b"no separator",
    b"\n\n\x80",
    b"salt/job/\xff/ret/web1\n\n\x80",
    b"x" * 2000 + b"\n\n\x80",
]
OURS = [body(f"mysql_jobcache/minions/{JID}", {}), body("mysql_jobcache/event/salt/auth", {})]


async def test_jobs_are_captured_with_whose_they_are_and_nothing_else(bus: Bus) -> None:
    assert await bus.journalled(*OF_NOBODY, *OF_JOBS, *OURS) == OF_JOBS
    of_master = [(JID, ""), (JID, MASTER)] * 2
    assert bus.keys() == [(JID, "web1"), (JID, "ünlike 1"), (JID, ""), *of_master]
    assert bus.journal.books()["captured"] == len(OF_JOBS)


async def test_events_that_are_asked_for_are_captured_too_but_none_in_a_tag_of_ours(bus: Bus) -> None:
    bus.capture.selection = selection(events=["*"])
    tagged = OF_NOBODY[:3]
    assert await bus.journalled(*tagged, *OF_JOBS[:1], *OURS) == [*tagged, *OF_JOBS[:1]]
    assert bus.keys()[:3] == [("", "")] * 3


async def test_with_the_hand_off_no_job_is_captured_and_of_an_event_that_is_asked_for_just_that(bus: Bus) -> None:
    bus.capture.handed_off = True
    assert await bus.journalled(*OF_JOBS) == []
    bus.capture.selection = selection(events=["salt/job/*", "salt/auth"])
    bodies = await bus.journalled(*OF_JOBS, OF_NOBODY[0])
    assert bodies == [b"mysql_jobcache/event/" + each for each in OF_JOBS[:3]] + [OF_NOBODY[0]]
    assert bus.keys() == [("", "")] * 4, "it is of no job"


async def test_an_event_over_max_event_bytes_is_cut_and_one_as_large_is_not(bus: Bus) -> None:
    whole = returned(JID, "web1", "x" * 1000)
    bus.capture.max_event_bytes = len(whole)
    (stored,) = await bus.journalled(whole)
    assert stored == whole
    bus.capture.max_event_bytes = len(whole) - 1
    _, cut = await bus.journalled(whole)
    assert len(cut) < len(whole) / 2


async def test_the_size_of_a_group_is_told_with_its_events(bus: Bus) -> None:
    await bus.journalled(*OF_JOBS)
    ((events, size),) = bus.told
    assert events == len(OF_JOBS)
    assert size == sum(map(len, OF_JOBS)) + 400 * len(OF_JOBS)
    assert bus.capture.held == 0


async def test_a_group_is_not_larger_than_a_disk_that_was_full_takes(bus: Bus) -> None:
    await bus.journalled(*[returned(JID, f"m{number}", "x" * 1_500_000) for number in range(7)])
    assert [events for events, _ in bus.told] == [3, 3, 1]
    bus.told.clear()
    await bus.journalled(*[returned(JID, f"n{number}") for number in range(4001)])
    assert [events for events, _ in bus.told] == [2000, 2000, 1]


@pytest.mark.parametrize("failure", [sqlite3.OperationalError("disk I/O error"), ZeroDivisionError()])
async def test_what_the_journal_does_not_take_is_held_in_its_order_and_taken_later(
    bus: Bus, failure: Exception
) -> None:
    first, second = [returned(JID, "web1"), returned(JID, "web2")], returned(JID, "web3")
    bus.failing = failure
    with pytest.raises(type(failure)):
        await bus.journalled(*first)
    assert bus.capture.held == 2
    bus.failing = None
    assert await bus.journalled(second) == [*first, second]
    assert (bus.capture.held, bus.losses) == (0, 0)


async def test_when_memory_is_full_what_comes_is_dropped_counted_and_asked_for_once_there_is_room(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events = [returned(JID, f"web{number}") for number in range(5)]
    monkeypatch.setattr(capture, "MEMORY_BYTES", 2 * (len(events[0]) + 400))
    assert await bus.journalled(*events) == events[:2]
    assert caplog.text.count("Memory for events is full") == 1
    books = bus.journal.books()
    assert (books["captured"], books["dropped"]) == (5, {"memory_full": 3})
    assert (bus.capture.dropped, bus.losses) == (0, 0), "until there is room it would be lost again"
    assert await bus.journalled(events[4]) == [*events[:2], events[4]]
    assert bus.losses == 1
    await bus.journalled(events[4])
    assert bus.losses == 1


async def test_what_a_full_journal_gave_up_is_asked_for_once_it_has_room(bus: Bus) -> None:
    bus.journal.caps = Caps(max_bytes=400_000)
    bodies = [returned(JID, f"m{number}", "x" * 5000) for number in range(100)]
    kept = await bus.journalled(*bodies)
    assert 0 < len(kept) < 100
    assert bus.losses == 0
    bus.journal.caps = Caps()
    await bus.journalled(returned(JID, "web1"))
    await bus.journalled(returned(JID, "web2"))
    assert bus.losses == 1


async def test_while_it_runs_groups_are_journalled_soon_and_a_full_one_at_once(bus: Bus) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(bus.capture.run())
    try:
        began = loop.time()
        bus.capture.on_events([returned(JID, "web1")])
        while not bus.told:
            assert loop.time() < began + 10
            await asyncio.sleep(0.001)
        assert loop.time() - began > 0.03, "others may come"
        bus.capture.on_events([returned(JID, f"m{number}") for number in range(256)])
        rounds = 0
        while len(bus.told) < 2:
            rounds += 1
            await asyncio.sleep(0)
        assert rounds < 20
        bus.capture.on_events([returned(JID, "web3")], waited=0.05)
        rounds = 0
        while len(bus.told) < 3:
            rounds += 1
            await asyncio.sleep(0)
        assert rounds < 20, "it waited in the kernel"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_journal_that_cannot_be_written_is_said_once_and_tried_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capture, "_RETRY_SECONDS", 0.01)
    bus.failing = sqlite3.OperationalError("database or disk is full")
    task = asyncio.create_task(bus.capture.run())
    loop = asyncio.get_running_loop()
    try:
        bus.capture.on_events([returned(JID, "web1")])
        until = loop.time() + 10
        while not bus.capture.last_error:
            assert loop.time() < until
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert caplog.text.count("cannot be written: database or disk is full; holding events in memory") == 1
        bus.failing = None
        while not bus.told:
            assert loop.time() < until
            await asyncio.sleep(0.01)
        assert bus.capture.last_error == ""
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
