"""What the job cache holds and the tables do not is journalled and written, whatever the bus brought; no more."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from salt_mysql_engine import reconcile
from salt_mysql_engine.jobcache import Folder
from salt_mysql_engine.journal import Caps
from salt_mysql_engine.journalfile import CONFIRMED
from tests.support.oldtables import make_2014
from tests.support.scratch import Scratch
from tests.support.shipping import (
    MASTER,
    Cache,
    Shipping,
    body,
    call_data,
    copy_journal,
    jid,
    master_data,
    published,
    returned,
    returns,
)

pytestmark = pytest.mark.faults

Make = Callable[..., Shipping]
NOWHERE = 1
"""A port at which no server listens: the database is down."""


@pytest.fixture
def reconciling(shipping: Make, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a `Shipping` that reconciles with the test's job cache, a moment after it was asked to."""
    monkeypatch.setattr(reconcile, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(reconcile, "_RETRY_FIRST", 0.1)

    def make(journal: str = "journal", **options: Any) -> Shipping:
        made = shipping(journal, cachedir=cache.cachedir, reconcile=True, **{"flush_interval": 0.05, **options})
        assert made.reconciler is not None
        made.reconciler.interval = 0.0
        return made

    return make


def everything() -> list[bytes]:
    """A job with two returns, a salt-call, a runner, a wheel function: the events of a whole night."""
    return [
        published(jid(1), ["web1", "web2"], tgt="web*", fun="test.arg", arg=[1]),
        returned(jid(1), "web1", {"a": [1, "ü😀", None]}, fun="test.arg", fun_args=[1]),
        returned(jid(1), "web2", "x", retcode=2, success=False, out="highstate", fun="test.arg", fun_args=[1]),
        body(f"salt/job/{jid(2)}/ret/call", call_data(jid(2), "call", 1.5)),
        body(f"salt/run/{jid(3)}/ret", master_data(jid(3), "runner.jobs.active", {"b": 2})),
        body(f"salt/wheel/{jid(4)}/ret", master_data(jid(4), "wheel.key.list_all", ["c"])),
    ]


def tables(database: Scratch) -> dict[str, Any]:
    """All rows, but for when they were seen."""
    loads = {row["jid"]: json.loads(row["load"]) for row in database.rows("jids")}
    returns_ = {}
    for row in database.rows("salt_returns"):
        value, full = json.loads(row["return"]), json.loads(row["full_ret"])
        if row["id"] == MASTER:
            assert value.pop("_stamp")
        said = {key: full.get(key) for key in ("fun", "fun_args", "jid", "id", "success", "retcode", "out")}
        returns_[row["jid"], row["id"]] = row["fun"], row["success"], value, said
    for load in loads.values():
        load.pop("_stamp", None)
    return {"jids": loads, "salt_returns": returns_}


async def first(ship: Shipping) -> Any:
    """The pass that follows every start."""
    assert ship.reconciler is not None
    reconciler = ship.reconciler
    await ship.until(lambda: reconciler.passes >= 1)
    await ship.settled()
    return reconciler.last


def added(done: Any) -> tuple[int, int]:
    return done.loads_added, done.returns_added


async def test_what_nobody_heard_is_written_as_if_it_had_been_heard(
    database: Scratch, cache: Cache, reconciling: Make, caplog: pytest.LogCaptureFixture
) -> None:
    cache.accept(*everything())
    async with reconciling() as ship:
        assert added(await first(ship)) == (1, 5)
        books = await ship.books()
        assert (books["written"], books["duplicates"], books["dead_letters"]) == (6, 0, 0)
    found = tables(database)
    assert "The job cache had 1 jobs and 5 returns that the database did not" in caplog.text
    for table in ("jids", "salt_returns"):
        database.sql(f"DELETE FROM {table}")
    async with reconciling("heard") as ship:
        assert ship.reconciler is not None
        ship.reconciler._asked.clear()
        await ship.ship(*everything())
    heard = tables(database)
    assert found["salt_returns"] == heard["salt_returns"]
    assert found["jids"].keys() == heard["jids"].keys()
    assert found["jids"][jid(1)] == heard["jids"][jid(1)], "with its kwargs"
    assert found["jids"][jid(1)]["kwargs"] == {"delimiter": ":", "metadata": {"of": jid(1)}}


async def test_a_user_that_may_have_one_connection_alone_is_reconciled_too(
    database: Scratch, cache: Cache, reconciling: Make, caplog: pytest.LogCaptureFixture
) -> None:
    database.sql(f"ALTER USER `{database.name}` WITH MAX_USER_CONNECTIONS 1")
    cache.accept(*everything())
    async with reconciling(batch_size=1, flush_interval=60.0) as ship:
        assert added(await first(ship)) == (1, 5)
        cache.accept(returned(jid(9), "web9", 9))
        await ship.ship(returned(jid(9), "web9", 9))
        assert (ship.writer.retries, ship.fault) == (0, "")
        assert ship.reconciler is not None
        assert added(await ship.reconcile(0.0)) == (0, 0)
    assert database.count("salt_returns") == 6


async def test_a_load_that_is_null_is_filled_in_and_ends_no_pass(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    make_2014(database)
    database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, NULL)", jid(1))
    cache.accept(*everything())
    async with reconciling() as ship:
        assert added(await first(ship)) == (1, 5)
    assert all(json.loads(row["load"])["jid"] == row["jid"] for row in database.rows("jids"))


async def test_a_second_pass_adds_nothing(database: Scratch, cache: Cache, reconciling: Make) -> None:
    cache.accept(*everything())
    async with reconciling() as ship:
        await first(ship)
        before = {table: database.rows(table) for table in ("jids", "salt_returns")}
        for _ in range(2):
            done = await ship.reconcile(since=0.0)
            assert (added(done), done.jobs, done.returns, done.unreadable) == ((0, 0), 4, 5, 0)
        assert (await ship.books())["captured"] == 6
    assert {table: database.rows(table) for table in before} == before


async def test_just_what_is_missing_is_added(database: Scratch, cache: Cache, reconciling: Make) -> None:
    bodies = returns(100)
    cache.accept(*bodies)
    async with reconciling() as ship:
        await first(ship)
        before = database.rows("salt_returns")
        gone = [jid(n) for n in (1, 7, 50, 100)]
        for job in gone:
            database.sql("DELETE FROM salt_returns WHERE jid = %s", job)
        done = await ship.reconcile(since=0.0)
        assert added(done) == (0, 4)
        books = await ship.settled()
        assert (books["written"], books["duplicates"]) == (104, 0)
    assert [{**row, "alter_time": 0, "full_ret": 0} for row in database.rows("salt_returns")] == [
        {**row, "alter_time": 0, "full_ret": 0} for row in before
    ]


@pytest.mark.parametrize("verify", [True, False])
async def test_what_is_pending_is_added_again_only_where_it_may_be_a_strangers(
    database: Scratch, cache: Cache, reconciling: Make, verify: bool
) -> None:
    bodies = [*everything(), *returns(20, first=10)]
    cache.accept(*bodies)
    async with reconciling(paused=True, verify_returns=verify) as ship:
        assert ship.reconciler is not None
        ship.reconciler._asked.clear()
        await ship.take(*bodies)
        done = await ship.reconcile(since=0.0)
        assert added(done) == ((1, 25) if verify else (0, 0))
    async with reconciling(verify_returns=verify) as ship:
        assert ship.reconciler is not None
        ship.reconciler._asked.clear()
        books = await ship.settled()
        assert (books["written"], books["duplicates"]) == (26, 26 if verify else 0)


async def test_a_return_that_the_database_refuses_is_not_tried_at_every_pass(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    async with reconciling() as ship:
        await first(ship)
        cache.accept(*returns(1, first=50))
        await ship.ship(*returns(1, first=50))
        database.sql("ALTER TABLE salt_returns ADD CONSTRAINT refused CHECK (id <> 'minion-1')")
        cache.accept(*returns(3))
        await ship.reconcile(since=0.0)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (3, 1)
        done = await ship.reconcile(since=0.0)
        assert added(done) == (0, 0)
        assert (await ship.books())["dead_letters"] == 1


async def test_a_copy_that_came_too_late_is_brought_back_from_the_dead_letters_by_the_cache(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    async with reconciling(verify_wait_seconds=0.2) as ship:
        await first(ship)
        await ship.ship(*returns(1))
        assert (await ship.settled())["dead_letters"] == 1
        cache.accept(*returns(1))
        assert added(await ship.reconcile(since=0.0)) == (0, 1)
        assert (await ship.settled())["written"] == 1
    assert database.count("salt_returns") == 1


async def test_what_the_settings_skip_is_not_added(database: Scratch, cache: Cache, reconciling: Make) -> None:
    cache.accept(*everything())
    cache.accept(
        published(jid(8), ["web1"], fun="saltutil.find_job"), returned(jid(8), "web1", fun="saltutil.find_job")
    )
    cache.accept(returned(jid(9), "web1", fun="saltutil.find_job"))
    cache.job(jid(7), {"tgt": "*", "fun": "test.ping"}, ["web1"], nocache=True)
    cache.returned(jid(7), "web1", True)
    async with reconciling(runner_jobs=False, wheel_jobs=False) as ship:
        assert added(await first(ship)) == (1, 3)
        assert added(await ship.reconcile(since=0.0)) == (0, 0)
        books = await ship.books()
        assert (books["written"], books["ignored"]) == (4, {})
    assert {row["jid"] for row in database.rows("salt_returns")} == {jid(1), jid(2)}


async def test_a_load_that_was_stored_without_kwargs_gets_them(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    job = published(jid(1), ["web1"])
    async with reconciling(verify_returns=False) as ship:
        await first(ship)
        await ship.ship(job, returned(jid(1), "web1"), returned(jid(2), "web1"))
        assert "kwargs" not in tables(database)["jids"][jid(1)]
        cache.accept(job, returned(jid(1), "web1"), published(jid(2), ["web1"]), returned(jid(2), "web1"))
        assert added(await ship.reconcile(since=0.0)) == (2, 0)
        await ship.settled()
        found = tables(database)["jids"]
        assert found[jid(1)]["kwargs"] == {"delimiter": ":", "metadata": {"of": jid(1)}}
        assert (found[jid(2)]["Minions"], found[jid(2)]["tgt"]) == (["web1"], "*"), (
            "the publish of what was synthesised"
        )
        assert added(await ship.reconcile(since=0.0)) == (0, 0)


async def test_files_of_strangers_and_half_written_ones_are_passed_over(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    cache.accept(*everything())
    folder = cache.folder(jid(1))
    (folder / "web3").mkdir()
    (folder / "web4").mkdir()
    (folder / "web4" / "return.p").write_bytes(b"\x81\xa6return")
    (folder / "notes.txt").write_text("of a person")
    os.mkdir(os.fsencode(folder) + b"/we\xffb")  # noqa: PTH102 (a name in bytes)
    (Path(os.fsdecode(os.fsencode(folder) + b"/we\xffb")) / "return.p").write_bytes(b"\x81\xa6return\x01")
    cache.job(jid(5), {"tgt": 5, "fun": [1], "arg": {}, "kwargs": 7}, ["web1"])
    cache.job(jid(6), {"tgt": "*", "fun": [{}], "jid": jid(6)}, [[1]])
    cache.returned(jid(6), "web1", True)
    (cache.cachedir / "jobs" / "zz").mkdir()
    (cache.cachedir / "jobs" / "zz" / "file").touch()
    async with reconciling() as ship:
        done = await first(ship)
        assert done.unreadable == 2, "of web3 and web4; a file is no minion's"
        books = await ship.books()
        assert books["written"] >= 6
        assert added(await ship.reconcile(since=0.0)) == (0, 0), "nor again and again"
    assert tables(database)["salt_returns"].keys() >= {(jid(1), "web1"), (jid(1), "web2"), (jid(2), "call")}


async def test_what_the_master_is_still_writing_is_looked_at_a_while_later(
    database: Scratch, cache: Cache, reconciling: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "_SECOND_LOOK_SECONDS", 3.0)
    cache.accept(*everything())
    job = cache.folder(jid(1))
    minions, out = (job / ".minions.p").read_bytes(), (job / "web2" / "out.p").read_bytes()
    (job / ".minions.p").unlink()
    (job / "web2" / "out.p").unlink()
    soon = time.time() + 1.0
    for folder in (job, job / "web2"):  # changed a moment before it is looked at
        os.utime(folder, (soon, soon))
    async with reconciling() as ship:
        assert added(await first(ship)) == (0, 4)
        (job / "web2" / "out.p").write_bytes(out)
        (job / ".minions.p").write_bytes(minions)
        await ship.until(lambda: database.count("salt_returns") == 5)
        await ship.settled()
    done = tables(database)
    assert done["jids"][jid(1)]["Minions"] == ["web1", "web2"]
    assert done["salt_returns"][jid(1), "web2"][-1]["out"] == "highstate"


# Which, and in what order


async def test_the_newest_jobs_come_first(database: Scratch, cache: Cache, reconciling: Make) -> None:
    for n in range(1, 201):
        cache.accept(returned(jid(n), "web1", n))
        cache.job(jid(n), at=1e9 + (n * 7919) % 201)
    async with reconciling(paused=True) as ship:
        assert ship.reconciler is not None
        reconciler = ship.reconciler
        await ship.until(lambda: reconciler.passes == 1)
        entries = await ship._in_journal(lambda: ship.journal.read(after=0, rows=1000, max_bytes=10**9))
    jids = [entry.body.split(b"/")[2].decode() for entry in entries]
    order = sorted(range(1, 201), key=lambda n: -((n * 7919) % 201))
    assert jids == [jid(n) for n in order]


async def test_a_pass_looks_at_what_changed_since_the_last_one_also_after_a_restart(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    long_ago = time.time() - 10_000
    for n in range(1, 41):
        cache.accept(returned(jid(n), "web1"))
        cache.job(jid(n), at=long_ago)
    async with reconciling() as ship:
        assert (await first(ship)).jobs == 40
        cache.accept(returned(jid(50), "web1"))
        done = await ship.reconcile(reason="gap")
        assert (done.jobs, added(done)) == (1, (0, 1))
        cache.accept(published(jid(3), ["web1", "web2"]))
        cache.returned(jid(3), "web2", True, retcode=0, success=True)
        done = await ship.reconcile(reason="gap")
        assert (done.jobs, added(done)) == (2, (1, 1)), "a folder changes when a minion's is put into it"
        await ship.settled()
    async with reconciling() as ship:
        assert (await first(ship)).jobs == 2
        done = await ship.reconcile(since=long_ago + 5000)
        assert done.jobs == 2
        done = await ship.reconcile(since=0.0)
        assert (done.jobs, added(done)) == (41, (0, 0))


async def test_a_clock_that_was_ahead_once_hides_nothing_from_a_pass(
    database: Scratch, cache: Cache, reconciling: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    async with reconciling() as ship:
        monkeypatch.setattr(time, "time", lambda: real() + 86_400 * 400)
        await ship.reconcile(reason="while the clock is ahead")
        monkeypatch.setattr(time, "time", real)
    cache.accept(*returns(10))
    for n in range(1, 11):
        cache.job(jid(n), at=real() - 10_000)
    async with reconciling() as ship:
        assert added(await first(ship)) == (0, 10)


async def test_a_return_whose_jid_a_minion_made_up_of_the_future_is_left_alone_by_every_pass(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    made_up, published_then = "20990102030405000006", "20990102030405000007"
    data = call_data(made_up, "mallory")
    cache.accept(
        body(f"salt/job/{made_up}/ret/mallory", data),
        published(published_then, ["web1"]),  # before the clock was set right
        returned(published_then, "web1"),
    )
    async with reconciling() as ship:
        assert added(await first(ship)) == (1, 1)
        books = await ship.ship(body(f"salt/job/{made_up}/ret/mallory", data))
        assert (books["written"], books["ignored"]) == (2, {"bad_jid": 1})
    assert [row["jid"] for row in database.rows("salt_returns")] == [published_then]


@pytest.mark.parametrize("fun", ["saltutil.find_job", {"a": 1}, None, "test.ping"])
async def test_what_a_minion_returns_to_a_runner_before_its_end_does_not_hide_it_from_a_pass(
    database: Scratch, cache: Cache, reconciling: Make, fun: Any
) -> None:
    cache.job(jid(1), call_data(jid(1), "mallory", fun=fun))
    cache.returned(jid(1), "mallory", True, retcode=0)
    cache.returned(jid(1), MASTER, master_data(jid(1), "runner.state.orchestrate"))
    async with reconciling(skip_functions=["saltutil.find_job"]) as ship:
        assert added(await first(ship)) == (0, 2 if fun == "test.ping" else 1)
        assert (await ship.books())["dead_letters"] == 0
    stored = {row["id"]: row["fun"] for row in database.rows("salt_returns")}
    assert stored[MASTER] == "runner.state.orchestrate"
    assert ("mallory" in stored) is (fun == "test.ping")


async def test_a_clock_that_is_ahead_for_a_part_of_a_pass_hides_nothing(
    database: Scratch, cache: Cache, reconciling: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    cache.accept(*returns(10))
    async with reconciling() as ship:
        reconciler = ship.reconciler
        assert reconciler is not None
        reconciler.retention_days = 5000.0
        look = reconciler._look

        def ahead(folders: list[Folder]) -> Any:
            monkeypatch.setattr(time, "time", lambda: real() + 86_400 * 10_000)
            try:
                return look(folders)
            finally:
                monkeypatch.setattr(time, "time", real)

        monkeypatch.setattr(reconciler, "_look", ahead)
        assert added(await first(ship)) == (0, 10)


async def test_a_clock_that_was_set_back_hides_nothing_from_a_pass(
    database: Scratch, cache: Cache, reconciling: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    async with reconciling() as ship:
        await first(ship)
        monkeypatch.setattr(time, "time", lambda: real() - 3000)
        cache.accept(*returns(10))
        for n in range(1, 11):
            cache.job(jid(n), at=real() - 3050)
        assert added(await ship.reconcile(reason="gap")) == (0, 10)


async def test_jobs_with_megabytes_of_arguments_take_the_memory_of_one(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    count, size = 60, 2_000_000
    for n in range(1, count + 1):
        cache.job(jid(n), {"tgt": "*", "fun": "test.arg", "arg": [f"{n:09d}" * (size // 9)]}, ["web1"])
        cache.returned(jid(n), "web1", True, retcode=0, success=True)
    async with reconciling() as ship:
        reconciler = ship.reconciler
        assert reconciler is not None
        tracemalloc.start()
        await ship.until(lambda: reconciler.passes == 1)
        _, peak = tracemalloc.get_traced_memory()
        assert added(reconciler.last) == (count, count)
        await ship.settled()
        tracemalloc.reset_peak()
        assert added(await ship.reconcile(since=0.0)) == (0, 0)
        _, again = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # What the writer holds of a batch, with its SQL, is in it.
        assert peak < 55 * size
        assert again < 45 * size


async def test_what_a_stranger_has_in_the_journal_hides_no_return_from_a_pass(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    """It calls itself a function that is skipped, and so is never looked for in the cache."""
    for n in range(1, 4):
        cache.accept(published(jid(n), ["victim"]), returned(jid(n), "victim"))
    forged = [returned(jid(n), "victim", "forged", fun="saltutil.find_job") for n in range(1, 4)]
    async with reconciling(paused=True, skip_functions=["saltutil.find_job"]) as ship:
        await ship.take(*forged)
        assert added(await ship.reconcile(since=0.0)) == (3, 3)
    async with reconciling(skip_functions=["saltutil.find_job"]) as ship:
        books = await ship.settled()
        assert books["ignored"] == {"skipped_function": 3}
    assert database.count("salt_returns") == 3


async def test_a_pass_waits_for_room_in_the_journal_and_loses_nothing_by_it(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    cache.accept(*returns(300))
    async with reconciling(paused=True) as ship:
        reconciler = ship.reconciler
        assert reconciler is not None
        used = await ship._in_journal(ship.journal.measured)
        ship.journal.caps = ship.journal.caps._replace(max_bytes=used + 60_000)
        await ship.until(lambda: reconciler.now is not None and reconciler.now.jobs == 0)
        await asyncio.sleep(1.0)  # the time itself is what is tested
        assert reconciler.passes == 0
        ship.journal.caps = ship.journal.caps._replace(max_bytes=2**30)
        await ship.until(lambda: reconciler.passes == 1)
        assert added(reconciler.last) == (0, 300)
        assert (await ship.books())["dropped"] == {}
    async with reconciling() as ship:
        await ship.settled()
    assert database.count("salt_returns") == 300


async def test_a_blind_pass_survives_the_cache_without_verification_too(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    cache.accept(*returns(5))
    async with reconciling("first", keep_seconds=0.5, verify_returns=False) as ship:
        reconciler = ship.reconciler
        assert reconciler is not None
        ship.mysql["mysql.port"] = NOWHERE
        await ship.until(lambda: ship.journal.pending == 5)
        unchecked = f"SELECT 1 FROM events WHERE state <> {CONFIRMED}"
        while await ship._in_journal(ship._read, unchecked):  # noqa: ASYNC110 (a file)
            await asyncio.sleep(0.05)
    cache.forget()
    async with reconciling("first", verify_returns=False) as ship:
        await ship.settled()
    assert database.count("salt_returns") == 5


async def test_a_pass_over_a_part_does_not_stand_for_one_over_all(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    cache.accept(returned(jid(1), "web1"))
    cache.job(jid(1), at=time.time() - 10_000)
    async with reconciling() as ship:
        assert ship.reconciler is not None
        ship.reconciler._asked.clear()
        assert (await ship.reconcile(since=time.time() - 100)).jobs == 0
        done = await ship.reconcile(reason="start")
        assert (done.jobs, added(done)) == (1, (0, 1))


async def test_a_large_cache_is_gone_through_in_small_steps_and_bounded_memory(
    database: Scratch, cache: Cache, reconciling: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 jobs, and one with 3,000 minions, in rounds of 170 folders."""
    value = "x" * 2000
    for n in range(1, 3001):
        cache.returned(jid(n), "web1", value, retcode=0, success=True)
        cache.job(jid(n), {"tgt": "*", "fun": "test.ping", "arg": []}, ["web1"], at=1e9 + n // 50)
    for n in range(3000):
        cache.returned(jid(9000), f"web{n}", value, retcode=0, success=True)
    cache.job(jid(9000), {"tgt": "*", "fun": "test.ping", "arg": []}, [])
    monkeypatch.setattr(reconcile, "_ROUND_FOLDERS", 170)
    monkeypatch.setattr(reconcile, "_STEP_BYTES", 200_000)
    monkeypatch.setattr(reconcile, "_MAX_PENDING", 500)
    appended: list[int] = []
    async with reconciling() as ship:
        assert ship.reconciler is not None
        reconciler = ship.reconciler
        real = reconciler._on_append
        most = 0

        def on_append(events: int, size: int) -> None:
            nonlocal most
            appended.append(size)
            most = max(most, ship.journal.pending)
            real(events, size)

        reconciler._on_append = on_append
        tracemalloc.start()
        await ship.until(lambda: reconciler.passes == 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        books = await ship.settled()
        assert reconciler.last is not None
        assert (reconciler.last.jobs, reconciler.last.total_jobs, added(reconciler.last)) == (3001, 3001, (3001, 6000))
        assert (books["written"], books["duplicates"]) == (9001, 0)
        assert max(appended) < 300_000
        assert most < 1200, "it waits while the writer has enough to do"
        assert peak < 40_000_000
    assert database.count("salt_returns") == 6000


@pytest.mark.long
async def test_a_cache_of_a_hundred_thousand_jobs_is_gone_through_in_bounded_memory(
    database: Scratch, cache: Cache, reconciling: Make, memory_disk: Path
) -> None:
    """As an engine finds it that was away for long: nothing of it is in the tables. Every tenth job has a return."""
    jobs, returned = 100_000, 10_000
    cache.cachedir = memory_disk
    for n in range(1, jobs + 1):
        cache.job(jid(n), {"tgt": "*", "fun": "test.ping", "arg": []}, ["web1"])
        if n % 10 == 0:
            cache.returned(jid(n), "web1", "x" * 300, retcode=0, success=True)
    process = psutil.Process()
    before = process.memory_info().rss
    most_pending = most_memory = 0
    async with reconciling() as ship:
        reconciler = ship.reconciler
        assert reconciler is not None
        while not reconciler.passes:
            await asyncio.sleep(0.05)
            most_pending = max(most_pending, ship.journal.pending)
            most_memory = max(most_memory, process.memory_info().rss - before)
        assert reconciler.last is not None
        print(f"\n{jobs:,} jobs in {reconciler.last.seconds:.0f} s, {most_memory / 1e6:.0f} MB more")
        assert reconciler.last.jobs == jobs
        assert added(reconciler.last) == (jobs, returned)
        books = await ship.settled(timeout=60)
        assert (books["written"], books["duplicates"], books["dropped"]) == (jobs + returned, 0, {})
    assert most_pending < 10_000, "it waits while the writer has enough to do"
    assert most_memory < 60_000_000
    assert (database.count("jids"), database.count("salt_returns")) == (jobs, returned)


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder for hundreds of thousands of files, which would hold up whoever shares the disk."""
    memory = Path("/dev/shm")
    is_there = memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30
    with tempfile.TemporaryDirectory(dir=memory if is_there else tmp_path) as folder:
        yield Path(folder)


# While the database is away, or the journal full


async def test_while_the_database_is_down_a_pass_waits_and_says_why(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    cache.accept(*everything())
    async with reconciling() as ship:
        assert ship.reconciler is not None
        reconciler = ship.reconciler
        ship.mysql["mysql.port"] = NOWHERE
        await ship.until(lambda: reconciler.now is not None and "Can't connect" in reconciler.now.error)
        ship.reconciler.ask("request", 0.0)
        assert (await ship.books())["captured"] == 0
        ship.mysql["mysql.port"] = database.mysql["mysql.port"]
        done = await first(ship)
        assert (added(done), done.error, "start" in done.reason) == ((1, 5), "", True)
    assert len(tables(database)["salt_returns"]) == 5


async def test_before_the_cache_forgets_what_nobody_compared_all_of_it_is_journalled(
    database: Scratch, cache: Cache, reconciling: Make, tmp_path: Path
) -> None:
    cache.accept(*everything())
    async with reconciling() as ship:
        await first(ship)
        cache.accept(*returns(20, first=10))
        ship.mysql["mysql.port"] = NOWHERE
        await ship.take(*returns(5, first=10))
        copy_journal(tmp_path / "journal", tmp_path / "later")
    async with reconciling("later", keep_seconds=0.5) as ship:
        ship.mysql["mysql.port"] = NOWHERE
        assert ship.reconciler is not None
        reconciler = ship.reconciler
        await ship.until(lambda: reconciler.passes == 1)
        done = reconciler.last
        assert done is not None
        assert added(done) == (1, 5 + 20)
        unchecked = f"SELECT 1 FROM events WHERE state <> {CONFIRMED}"
        while await ship._in_journal(ship._read, unchecked):  # noqa: ASYNC110 (a file)
            await asyncio.sleep(0.05)
        cache.forget()
        ship.mysql["mysql.port"] = database.mysql["mysql.port"]
        books = await ship.settled()
        assert books["dead_letters"] == 0
        assert ship.writer.conflicts == 0
    assert database.count("salt_returns") == 5 + 20


async def test_while_the_journal_is_full_nothing_is_added_and_afterwards_everything(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    for n in range(1, 101):
        cache.accept(returned(jid(n), "web1", "x" * 1000))
    async with reconciling(verify_returns=False) as ship:
        ship.journal.caps = Caps(max_bytes=1024 * 1024)
        ship.mysql["mysql.port"] = NOWHERE
        await ship.take(*(returned(jid(n), "web1", "x" * 20_000) for n in range(1000, 1100)))
        assert ship.journal.full
        lost = (await ship.books())["dropped"]["journal_full"]
        ship.mysql["mysql.port"] = database.mysql["mysql.port"]
        await ship.settled()
        await ship._in_journal(ship.journal.tend, time.time())
        done = await ship.reconcile(since=0.0)
        assert done.returns >= 100
        books = await ship.settled()
        assert books["dropped"] == {"journal_full": lost}, "none of ours"
    assert {row["jid"] for row in database.rows("salt_returns")} >= {jid(n) for n in range(1, 101)}


async def test_tables_that_are_missing_are_created_by_the_first_who_needs_them(
    database: Scratch, cache: Cache, reconciling: Make
) -> None:
    cache.accept(*everything())
    async with reconciling() as ship:
        assert added(await first(ship)) == (1, 5)
    async with reconciling("checking", schema="check") as ship:
        for table in ("jids", "salt_returns"):
            database.sql(f"DROP TABLE {table}")
        assert ship.reconciler is not None
        reconciler = ship.reconciler
        reconciler.ask("request", 0.0)
        await ship.until(lambda: reconciler.now is not None and "there is no table" in reconciler.now.error)


async def test_tables_that_a_pass_makes_have_the_partitions_that_were_asked_for(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    async with shipping(cachedir=tmp_path / "cache", reconcile=True, paused=True, partitions="month") as ship:
        await ship.reconcile()
    parts = database.sql(
        "SELECT COUNT(*) FROM information_schema.PARTITIONS WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'jids'"
        " AND PARTITION_NAME IS NOT NULL"
    )
    assert parts[0][0] >= 3


async def test_a_fault_in_a_pass_costs_nothing_of_what_was_asked_for(
    shipping: Callable[..., Shipping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "_RETRY_FIRST", 0.05)
    async with shipping(cachedir=tmp_path / "cache", reconcile=True) as ship:
        reconciler = ship.reconciler
        assert reconciler is not None
        genuine, failed = reconciler._compare_all, []

        async def once(*args: object, **more: object) -> None:
            if not failed:
                failed.append(args)
                raise ZeroDivisionError("a fault of ours")
            await genuine(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(reconciler, "_compare_all", once)
        reconciler.ask("request", 0.0)
        await ship.until(lambda: reconciler.last is not None and "request" in reconciler.last.reason)
        assert failed
