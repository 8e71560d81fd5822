"""The verifier by itself, beside a real journal and a real job cache: no database is asked for anything."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import jobcache, verify
from salt_mysql_engine.items import Item
from salt_mysql_engine.journal import Entry
from salt_mysql_engine.journalfile import CONFIRMED, STUB, NewEvent
from salt_mysql_engine.saltevent import TRIMMED, Opened, open_event, stub
from salt_mysql_engine.verify import Checked
from tests.support.shipping import Cache, Shipping, jid, published, returned

OLD = 3600.0
"""Seconds since an event was captured with which the writer is far behind."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks ahead more often than it would."""
    monkeypatch.setattr(verify, "_AHEAD_SECONDS", 0.05)


def verifying(cache: Cache, tmp_path: Path, **options: Any) -> Shipping:
    """Without a writer: events wait in the journal."""
    return Shipping(tmp_path / "journal", {}, paused=True, cachedir=cache.cachedir, **options)


def confirmed(ship: Shipping) -> int:
    """How many events are confirmed in the journal."""
    ((count,),) = ship._read(f"SELECT COUNT(*) FROM events WHERE state = {CONFIRMED}")
    return int(count)


async def test_while_the_writer_is_behind_it_looks_ahead_step_by_step_without_a_pause(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_AHEAD_ROWS", 10)
    monkeypatch.setattr(verify, "_AHEAD_SECONDS", 0.5)
    monkeypatch.setattr(verify, "_LOOK_SECONDS", 0.01)
    bodies = [published(jid(1), ["web1"]), *(returned(jid(1), f"web{number}") for number in range(199))]
    cache.accept(*bodies)
    async with verifying(cache, tmp_path) as ship:
        await ship.take_at(time.time() - OLD, *bodies)
        await ship.until(lambda: confirmed(ship) > 0)
        began = time.monotonic()
        await ship.until(lambda: confirmed(ship) == 200)
        assert time.monotonic() - began < 4.0, "20 steps"


def seq_of(each: Entry | Checked | Item) -> int:
    """An event's number in the journal."""
    return each.entry.seq if isinstance(each, Checked) else each.seq


async def ahead(ship: Shipping, *bodies: bytes) -> dict[str, Any]:
    """Events that the writer is far behind with, until each is confirmed or gone; gives the books."""
    await ship.take_at(time.time() - OLD, *bodies)
    await ship.until(lambda: confirmed(ship) == ship.journal.pending)
    return await ship.books()


def bodies_of(ship: Shipping) -> list[bytes]:
    """The events in the journal, in their order."""
    return [row[0] for row in ship._read("SELECT body FROM events ORDER BY seq")]


async def test_what_is_confirmed_ahead_stands_in_the_journal_as_the_job_cache_has_it(
    tmp_path: Path, cache: Cache
) -> None:
    genuine = [published(jid(1), ["web1"]), returned(jid(1), "web1", "genuine"), returned(jid(2), "web2")]
    cache.accept(*genuine)
    async with verifying(cache, tmp_path) as ship:
        books = await ahead(ship, genuine[0], returned(jid(1), "web1", "forged"), genuine[2])
        events = [open_event(each) for each in bodies_of(ship)]
        assert ship.verifier.corrected == 1
    assert (books["captured"], books["pending"], books["dead_letters"]) == (3, 3, 0)
    assert [event.data.get("return") for event in events if isinstance(event, Opened)] == [None, "genuine", True]


async def test_what_says_the_same_again_is_a_duplicate_and_takes_no_room(tmp_path: Path, cache: Cache) -> None:
    genuine = returned(jid(1), "web1", "genuine")
    cache.accept(published(jid(1), ["web1"]), genuine)
    others = [returned(jid(1), "web1", number) for number in range(5)]
    async with verifying(cache, tmp_path) as ship:
        books = await ahead(ship, genuine, published(jid(1), ["web1"]))
        assert (books["pending"], books["duplicates"]) == (2, 0)
        books = await ahead(ship, *others, published(jid(1), ["web1"]))
        assert (books["pending"], books["duplicates"]) == (2, 6)
        assert ship.verifier.corrected == 5


async def test_of_rows_of_events_each_stays(tmp_path: Path, cache: Cache) -> None:
    genuine = returned(jid(1), "web1", "genuine")
    cache.accept(published(jid(1), ["web1"]), genuine)
    async with verifying(cache, tmp_path, events=["salt/job/*"]) as ship:
        books = await ahead(ship, genuine, genuine)
        assert (books["pending"], books["duplicates"]) == (2, 0)


@pytest.mark.parametrize("events", [["salt/job/*"], []])
async def test_what_is_no_row_of_a_job_is_one_of_events_where_that_is_asked_for(
    tmp_path: Path, cache: Cache, events: list[str]
) -> None:
    cache.accept(published(jid(1), ["web1"]), returned(jid(1), "web1"))
    async with verifying(cache, tmp_path, events=events) as ship:
        books = await ahead(ship, returned(jid(1), "web1", fun=7))
        opened = [open_event(each) for each in bodies_of(ship)]
    if events:
        assert [(each.job, each.chosen, each.data["fun"]) for each in opened if isinstance(each, Opened)] == [
            (None, True, 7)
        ]
        assert books["pending"] == 1
    else:
        assert books["ignored"]["wrong_type"] == 1


async def test_what_the_job_cache_never_holds_is_a_dead_letter_when_its_time_is_over_and_not_before(
    tmp_path: Path, cache: Cache
) -> None:
    forged, late = returned(jid(1), "web1", "forged"), returned(jid(2), "web2", "late")
    async with verifying(cache, tmp_path, verify_wait_seconds=1.0) as ship:
        began = time.monotonic()
        await ship.take_at(time.time() - OLD, forged, late)
        await ship.until(lambda: ship.verifier.waiting == 2)
        assert set(range(1, 3)) == {seq for seq in range(9) if seq in ship.verifier.deferred}
        cache.accept(late)
        await ship.until(lambda: ship.verifier.waiting == 1)
        assert confirmed(ship) == 1
        await ship.until(lambda: ship.verifier.waiting == 0)
        assert 1.0 <= time.monotonic() - began < 10.0
        (letter,) = await ship._in_journal(ship.journal.dead_letters)
        books = await ship.books()
    assert (letter.reason, letter.body, letter.error) == (
        "unconfirmed",
        forged,
        "not in the master's job cache within 1 s",
    )
    assert (books["pending"], books["dead_letters"]) == (1, 1)


async def test_what_is_no_row_leaves_the_journal_at_once_counted_by_its_reason(tmp_path: Path, cache: Cache) -> None:
    cache.job(jid(1), nocache=True)
    cache.accept(returned(jid(5), "web1", fun="test.skipped"))
    async with verifying(cache, tmp_path, skip_functions=["test.skipped"]) as ship:
        await ship.take_at(
            time.time() - OLD,
            returned(jid(1), "web1"),
            returned(jid(2), "web1", fun="test.skipped"),
            returned(jid(3), "web1", cmd="_minion_event"),
            returned(jid(4), "web1", id="web2"),
            returned(jid(5), "web1"),  # which says that it is another function
        )
        await ship.until(lambda: ship.journal.pending == 0)
        assert ship.verifier.waiting == 0
        books = await ship.books()
    assert books["ignored"] == {"minion_event": 1, "nocache": 1, "skipped_function": 2, "tag_mismatch": 1}
    assert books["dead_letters"] == 0


async def test_a_stub_of_what_the_job_cache_has_forgotten_is_ignored_and_another_is_filled(
    tmp_path: Path, cache: Cache
) -> None:
    genuine = returned(jid(1), "web1", "genuine")
    cache.accept(published(jid(1), ["web1"]), genuine)
    stubs = [stub(jid(1), "web1", 1.0), stub(jid(1), "web2", 1.0), stub(jid(2), "", 1.0)]
    async with verifying(cache, tmp_path, verify_wait_seconds=0.3) as ship:
        new = [NewEvent(time.time(), jid(1), "", each, STUB) for each in stubs]
        await ship._in_journal(ship.journal.append, new)
        await ship.until(lambda: ship.journal.pending == 1 and ship.verifier.waiting == 0)
        (event,) = [open_event(each) for each in bodies_of(ship)]
        books = await ship.books()
        assert ship.verifier.corrected == 0, "a stub says nothing"
    assert isinstance(event, Opened)
    assert event.data["return"] == "genuine"
    assert books["ignored"] == {"forgotten": 2}


async def test_while_the_job_cache_gives_no_answer_time_does_not_run(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    genuine = [returned(jid(number), "web1") for number in range(5)]
    cache.accept(*genuine)
    real = os.open

    def fails(path: Any, *args: Any, **kwargs: Any) -> int:
        if "/jobs/" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    async with verifying(cache, tmp_path, verify_wait_seconds=0.2) as ship:
        monkeypatch.setattr(os, "open", fails)
        await ship.take_at(time.time() - OLD, *genuine)
        await ship.until(lambda: ship.verifier.waiting == 5 and ship.verifier.trouble != "")
        began = time.monotonic()
        await ship.until(lambda: time.monotonic() - began > 0.6)  # the time itself is what is tested
        assert (await ship.books())["pending"] == 5
        monkeypatch.setattr(os, "open", real)
        await ship.until(lambda: confirmed(ship) == 5 and ship.verifier.waiting == 0)
        assert ship.verifier.trouble == ""
        assert (await ship.books())["dead_letters"] == 0
    assert caplog.text.count("Events wait in the journal until it can be read") == 1
    assert caplog.text.count("The job cache can be read again") == 1


async def test_the_writer_gets_what_it_passed_over_once_it_is_confirmed_and_each_once(
    tmp_path: Path, cache: Cache
) -> None:
    bodies = [returned(jid(number), "web1") for number in range(10)]
    cache.accept(*bodies[:4])
    async with verifying(cache, tmp_path) as ship:
        await ship.take(*bodies)
        read = ship.verifier.read
        entries, last, all_read = await read(after=0, rows=3, max_bytes=10**6)
        assert ([seq_of(each) for each in entries], last, all_read) == ([1, 2, 3], 3, False)
        entries, last, all_read = await read(after=last, rows=100, max_bytes=10**6)
        assert ([seq_of(each) for each in entries], last, all_read) == ([4], 10, True)
        assert await read(after=last, rows=100, max_bytes=10**6) == ([], 10, True)
        assert ship.verifier.waiting == 6
        cache.accept(*bodies[4:])
        await ship.until(lambda: ship.verifier.waiting == 0)
        found: list[int] = []
        while len(found) < 6:
            entries, last, all_read = await read(after=last, rows=4, max_bytes=10**6)
            assert (0 < len(entries) <= 4, last, all_read) == (True, 10, False)
            found += [seq_of(each) for each in entries]
        assert sorted(found) == [5, 6, 7, 8, 9, 10]
        assert await read(after=last, rows=4, max_bytes=10**6) == ([], 10, True)


async def test_what_the_writer_holds_is_only_confirmed_by_a_look_ahead(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What becomes of it is the writer's to say; two words on one event would not balance."""
    monkeypatch.setattr(verify, "_AHEAD_ROWS", 2)
    genuine = returned(jid(1), "web1")
    cache.accept(published(jid(1), ["web1"]), genuine)
    skipped, forged = returned(jid(2), "web1", fun="test.skipped"), returned(jid(3), "victim", "forged")
    bodies = [genuine, genuine, skipped, forged, genuine]
    async with verifying(cache, tmp_path, skip_functions=["test.skipped"], verify_wait_seconds=60.0) as ship:
        ship.verifier._ahead = 10**6
        await ship.take_at(time.time() - OLD, *bodies)
        entries, _, _ = await ship.verifier.read(after=0, rows=100, max_bytes=10**6)
        assert [seq_of(each) for each in entries] == [1, 2, 3, 5]
        ship.verifier._ahead = 0
        await ship.until(lambda: confirmed(ship) == 3 and ship.verifier._ahead == 5)
        books = await ship.books()
        assert (books["pending"], books["duplicates"], books["ignored"]) == (5, 0, {})
        assert ship.verifier.waiting == 1


async def test_without_verification_events_go_on_as_they_are_and_a_trimmed_value_is_looked_for(
    tmp_path: Path, cache: Cache
) -> None:
    whole = returned(jid(1), "web1", {"a": "whole"})
    cache.accept(published(jid(1), ["web1"]), whole)
    os.utime(cache.folder(jid(1)) / "web1", (1, 1))  # so that no outputter is waited for
    bodies = [returned(jid(9), "web1", "not in the cache"), returned(jid(1), "web1", {"a": TRIMMED})]
    async with verifying(cache, tmp_path, verify_returns=False, verify_wait_seconds=0.3) as ship:
        await ship.take(*bodies, returned(jid(9), "web2", TRIMMED))
        entries, _, _ = await ship.verifier.read(after=0, rows=100, max_bytes=10**6)
        assert [seq_of(each) for each in entries] == [1, 2]
        checked = entries[1]
        assert isinstance(checked, Checked)
        assert isinstance(checked.event, Opened)
        assert (checked.event.data["return"], checked.event.trimmed) == ({"a": "whole"}, False)
        await ship.until(lambda: ship.verifier.waiting == 0)
        assert (await ship.books())["dead_letters"] == 0
        (entry,), _, _ = await ship.verifier.read(after=3, rows=100, max_bytes=10**6)
        assert seq_of(entry) == 3, "what is nowhere whole is stored as it is"
        assert ship.verifier.corrected == 0


async def test_the_log_names_a_forged_job_once_and_few_of_many(
    tmp_path: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    forged = [returned(jid(number), f"victim{twice}", "forged") for number in range(30) for twice in range(2)]
    async with verifying(cache, tmp_path, verify_wait_seconds=0.2) as ship:
        await ship.take_at(time.time() - OLD, *forged)
        await ship.until(lambda: ship.journal.pending == 0)
        assert (await ship.books())["dead_letters"] == 60
        said = [record.message for record in caplog.records if "forged" in record.message]
        assert len(said) == 20
        assert len({line.partition("for jid ")[2][:20] for line in said}) == 20
        assert all("the return of 'victim" in line for line in said)
        for number, (moment, told) in enumerate(list(ship.verifier._told)):
            ship.verifier._told[number] = (moment - 61, told)
        await ship.take_at(time.time() - OLD, published(jid(77), ["web1"]))
        await ship.until(lambda: ship.journal.pending == 0)
    assert "20 more jobs had returns like those before" in caplog.text
    assert f"does not hold the job for jid {jid(77)}" in caplog.text


async def test_pauses_between_two_looks_grow_and_the_last_look_is_in_time(tmp_path: Path, cache: Cache) -> None:
    verifier = verifying(cache, tmp_path, verify_wait_seconds=10.0).verifier
    now = time.monotonic()
    deferred = verify.Deferred(1, jid(1), "web1", now)
    pauses = []
    for looks in range(12):
        verifier._put_off(deferred._replace(looks=looks))
        pauses.append(verifier._deferred[1].due - now)
        assert verifier._deferred[1].looks == looks + 1
    assert pauses == sorted(pauses)
    assert 0.02 <= pauses[0] < 0.1 <= pauses[1] < 0.16 <= pauses[2]
    assert pauses[-1] == pytest.approx(10.0, abs=0.01)
    verifier._put_off(deferred._replace(looks=9, since=now - 20.0))
    assert 0.0 < verifier._deferred[1].due - now < 1.0, "its time was over, and the journal did not take it"
    assert [each.seq for each in verifier._next_due(now + 3600.0)] == [1], "once, however often it was put off"


async def test_a_flood_of_what_never_comes_holds_up_nothing_that_is_young(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_LOOK_EVENTS", 10)
    verifier = verifying(cache, tmp_path, verify_wait_seconds=3600.0).verifier
    now = time.monotonic()
    for seq in range(100):
        verifier._put_off(verify.Deferred(seq, jid(seq), "web1", now, looks=5))
    for seq in range(100, 120):
        verifier._put_off(verify.Deferred(seq, jid(seq), "web1", now))
    assert verifier._next_due(now) == [], "none is due"
    some = [each.seq for each in verifier._next_due(now + 60.0)]
    assert some == [*range(5), *range(100, 105)]
    some = [each.seq for each in verifier._next_due(now + 1.0)]
    assert some == [*range(5, 10), *range(105, 110)]
    some = [each.seq for each in verifier._next_due(now + 0.3)]
    assert some == [*range(110, 120)], "the old ones are not due yet"


async def test_what_is_confirmed_before_the_writer_comes_to_it_is_the_writers_once(
    tmp_path: Path, cache: Cache
) -> None:
    bodies = [returned(jid(number), "web1") for number in range(5)]
    async with verifying(cache, tmp_path) as ship:
        await ship.take_at(time.time() - OLD, *bodies)
        await ship.until(lambda: ship.verifier.waiting == 5)
        cache.accept(*bodies)
        await ship.until(lambda: confirmed(ship) == 5 and ship.verifier.waiting == 0)
        entries, last, _ = await ship.verifier.read(after=0, rows=100, max_bytes=10**6)
        assert [seq_of(each) for each in entries] == [1, 2, 3, 4, 5]
        assert await ship.verifier.read(after=last, rows=100, max_bytes=10**6) == ([], 5, True)


async def test_while_something_waits_the_job_cache_is_asked_now_and_then(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with verifying(cache, tmp_path, verify_wait_seconds=60.0) as ship:
        looks = []
        present = ship.verifier._present

        async def counted(some: list[verify.Deferred]) -> set[int]:
            looks.append(some)
            return await present(some)

        monkeypatch.setattr(ship.verifier, "_present", counted)
        await ship.take_at(time.time() - OLD, returned(jid(1), "web1", "forged"))
        began = time.monotonic()
        await ship.until(lambda: time.monotonic() - began > 1.0)  # the time itself is what is tested
        assert 3 <= sum(map(bool, looks)) <= len(looks) < 60


@pytest.mark.parametrize("old", [False, True])
async def test_what_was_not_asked_since_enough_was_read_comes_next_and_in_its_order(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    monkeypatch.setattr(jobcache, "_CALL_BYTES", 1)
    bodies = [returned(jid(number), "web1") for number in range(10)]
    cache.accept(*bodies)
    async with verifying(cache, tmp_path) as ship:
        if old:
            await ahead(ship, *bodies)
        else:
            await ship.take(*bodies)
        found: list[int] = []
        last, rounds = 0, 0
        while len(found) < 10 and rounds < 30:
            entries, last, all_read = await ship.verifier.read(after=last, rows=100, max_bytes=10**6)
            found += [seq_of(each) for each in entries]
            rounds += 1
            assert all_read is old
        assert found == [*range(1, 11)]
        assert (ship.verifier.waiting, rounds) == (0, 1 if old else 10)
