"""Returns become rows once the master's job cache holds them, as it holds them; the others wait, and hold nobody up."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from salt_mysql_engine import settings
from salt_mysql_engine.journalfile import CONFIRMED
from salt_mysql_engine.records import Selection
from salt_mysql_engine.saltevent import LEFT_OUT, TRIMMED, Opened, open_event
from tests.support.scratch import Scratch
from tests.support.shipping import (
    MASTER,
    STAMP,
    Cache,
    Shipping,
    body,
    call_data,
    copy_journal,
    jid,
    master_data,
    published,
    return_data,
    returned,
    returns,
)

pytestmark = pytest.mark.faults

Make = Callable[..., Shipping]
SOON = {"flush_interval": 0.05}
NOWHERE = 1
"""A port at which no server listens: the database is down."""


def stored(database: Scratch) -> dict[tuple[str, str], Any]:
    """The return of each (jid, minion)."""
    return {(row["jid"], row["id"]): json.loads(row["return"]) for row in database.rows("salt_returns")}


def full_ret(database: Scratch) -> dict[str, Any]:
    return dict(json.loads(database.row("salt_returns")["full_ret"]))


async def letters(ship: Shipping) -> list[Any]:
    return list(await ship._in_journal(ship.journal.dead_letters))


async def waiting(ship: Shipping, count: int) -> None:
    """Until so many wait for the job cache."""
    await ship.until(lambda: ship.verifier.waiting == count)


# What the cache holds is written


async def test_what_the_cache_holds_is_written_as_it_came(database: Scratch, cache: Cache, verifying: Make) -> None:
    job = published(jid(1), ["web1", "web2"])
    bodies = [
        job,
        returned(jid(1), "web1", {"a": 1}),
        returned(jid(1), "web2", [1.5, None, "ü😀"], retcode=2, success=False, out="highstate"),
        body(f"salt/job/{jid(2)}/ret/call", call_data(jid(2), "call", True)),
        body(f"salt/run/{jid(3)}/ret", master_data(jid(3), "runner.jobs.active")),
        body(f"salt/wheel/{jid(4)}/ret", master_data(jid(4), "wheel.key.list_all")),
    ]
    cache.accept(*bodies)
    async with verifying() as ship:
        books = await ship.ship(*bodies)
        assert (books["written"], books["waiting"], ship.verifier.corrected) == (len(bodies), 0, 0)
    verified = {table: database.rows(table) for table in ("jids", "salt_returns")}
    assert len(verified["salt_returns"]) == 5
    (load,) = [json.loads(row["load"]) for row in verified["jids"] if row["jid"] == jid(1)]
    assert load["kwargs"] == {"delimiter": ":", "metadata": {"of": jid(1)}}
    assert load["Minions"] == ["web1", "web2"]
    database.sql("DELETE FROM salt_returns")
    async with verifying("other", verify_returns=False) as ship:
        await ship.ship(*bodies)
    heard = database.rows("salt_returns")
    for rows in (verified["salt_returns"], heard):
        for row in rows:
            row["full_ret"] = json.loads(row["full_ret"])
    for row in heard:
        if row["jid"] == jid(1):  # a minion that got a publish with metadata says it again
            row["full_ret"]["metadata"] = {"of": jid(1)}
    assert heard == verified["salt_returns"], "they are what they would be without the cache"


async def test_a_return_waits_for_its_copy_and_holds_no_other_up(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    late, early = returns(20), returns(200, first=21)
    cache.accept(*early)
    async with verifying(batch_size=50) as ship:
        began = time.monotonic()
        await ship.take(*late[:10], *early, *late[10:])
        await ship.until(lambda: ship.journal.pending == 20)
        books = await ship.books()
        assert (books["written"], books["waiting"], books["pending"]) == (200, 20, 20)
        assert time.monotonic() - began < 5
        cache.accept(*late)
        began = time.monotonic()
        books = await ship.settled()
        assert time.monotonic() - began < 3
        assert (books["written"], books["waiting"], books["dead_letters"]) == (220, 0, 0)
    assert database.count("salt_returns") == 220


async def test_returns_whose_copies_come_a_moment_after_them_are_all_written(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    bodies = returns(400)

    async def master(ship: Shipping) -> None:
        for start in range(0, len(bodies), 20):
            await ship.take(*bodies[start : start + 20])
            await asyncio.sleep(0.005)
            cache.accept(*bodies[start : start + 20])

    async with verifying(batch_size=37, flush_interval=0.01) as ship:
        await master(ship)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"], ship.verifier.corrected) == (400, 0, 0)
        assert max(ship.writer.lags) < 5
    assert stored(database) == {(jid(n), f"minion-{n}"): True for n in range(1, 401)}


async def test_a_job_that_asked_not_to_be_kept_is_not(database: Scratch, cache: Cache, verifying: Make) -> None:
    cache.job(jid(1), nocache=True)
    async with verifying() as ship:
        books = await ship.ship(returned(jid(1), "web1"))
        assert (books["ignored"], books["pending"]) == ({"nocache": 1}, 0)
    assert "salt_returns" not in [name for (name,) in database.sql("SHOW TABLES")]


async def test_what_would_be_no_row_anyway_does_not_wait(cache: Cache, verifying: Make) -> None:
    async with verifying(skip_functions=["test.ping"]) as ship:
        books = await ship.ship(
            returned(jid(1), "web1"),
            returned(jid(2), "web1", cmd="_minion_event", fun="x"),
            returned(jid(3), "web1", id="web2", fun="x"),
            returned("nocache", "web1", fun="x"),
            body("salt/auth", {}),
        )
        assert books["ignored"] == {"minion_event": 1, "nocache": 1, "skipped_function": 1, "tag_mismatch": 1}
        assert (books["waiting"], books["pending"]) == (0, 0)


def failed_states(job: str, *, stored: bool) -> dict[str, Any]:
    """What a state run that failed gives. The master writes into it before it stores it (``fire_ret_load``)."""
    states: dict[str, dict[str, Any]] = {
        "test_|-good_|-good_|-nop": {"result": True, "comment": "a"},
        "test_|-bad_|-bad_|-fail": {"result": False, "comment": "b"},
    }
    if stored:
        for state in states.values():
            state["retcode"] = 2
        states["test_|-bad_|-bad_|-fail"] |= {"jid": job, "id": "web1", "success": False, "return": "Error: test.fail",
                                              "fun": "state.sls", "user": "root", "_stamp": STAMP}  # fmt: skip
    return states


@pytest.mark.parametrize("several", [None, list, dict])
async def test_what_the_master_adds_to_a_failed_state_run_is_no_difference_that_is_told(
    database: Scratch, cache: Cache, verifying: Make, several: type | None, caplog: pytest.LogCaptureFixture
) -> None:
    def event(*, stored: bool, **changes: Any) -> bytes:
        states = failed_states(jid(1), stored=stored)
        for state in states.values():
            state.update(changes)
        fun: Any = ["test.ping", "state.sls"]
        value: Any = {"test.ping": True, "state.sls": states} if several is dict else [True, states]
        retcode: Any = {"test.ping": 0, "state.sls": 2} if several is dict else [0, 2]
        if several is None:
            fun, value, retcode = "state.sls", states, 2
        return returned(jid(1), "web1", value, fun=fun, fun_args=[], retcode=retcode, success=False)

    fun = "state.sls" if several is None else ["test.ping", "state.sls"]
    cache.accept(published(jid(1), ["web1"], fun=fun), event(stored=True))
    async with verifying() as ship:
        books = await ship.ship(event(stored=False))
        assert (books["written"], ship.verifier.corrected) == (1, 0)
        assert "says something else" not in caplog.text
        await ship.ship(event(stored=False, comment="forged"))
        assert ship.verifier.corrected == 1
    row = database.row("salt_returns")
    assert "Error: test.fail" in row["return"], "a row is what the job cache holds, as ever"
    assert "forged" not in row["return"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"return": True, "retcode": 0, "id": "web1", "jid": "x", "fun": "test.ping"}, {}),
        ({"stdout": "hi", "stderr": "", "retcode": 0}, {"return": "hi"}),
        ({"stdout": "", "stderr": "ssh: refused", "retcode": 255}, {"return": "ssh: refused", "retcode": 255}),
        ("text", {"return": "text"}),
    ],
)
async def test_what_salt_ssh_says_in_its_event_alone_is_no_difference_that_is_told(
    database: Scratch, cache: Cache, verifying: Make, value: Any, said: dict[str, Any]
) -> None:
    cache.job(jid(1), {"jid": jid(1), "tgt_type": "glob", "tgt": "web1", "user": "root", "fun": "test.ping", "arg": []})
    cache.returned(jid(1), "web1", value)
    event = {"id": "web1", "fun": "test.ping", "fun_args": [], "retcode": 0, "success": True}
    event |= {"return": True} | (value if isinstance(value, dict) else {}) | said | {"jid": jid(1), "_stamp": STAMP}
    async with verifying() as ship:
        books = await ship.ship(body(f"salt/job/{jid(1)}/ret/web1", event))
        assert (books["written"], ship.verifier.corrected) == (1, 0)
        await ship.ship(body(f"salt/job/{jid(1)}/ret/web1", {**event, "return": "forged"}))
        assert ship.verifier.corrected == 1
    row = database.row("salt_returns")
    assert json.loads(row["return"]) == value, "a row is what the job cache holds, as ever"
    assert row["success"] == ("0" if "ssh: refused" in row["return"] else "1")


# Forged returns


@pytest.mark.parametrize("when", ["before", "after", "in the same batch"])
async def test_of_a_forged_and_a_genuine_return_only_the_genuine_is_ever_stored(
    database: Scratch, cache: Cache, verifying: Make, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    genuine = returned(jid(1), "web1", "genuine")
    forged = returned(jid(1), "web1", "forged", retcode=1, success=False, fun="cmd.run", fun_args=["x"])
    job = published(jid(1), ["web1"])
    async with verifying() as ship:
        if when == "before":
            await ship.take(forged)
            await waiting(ship, 1)
        cache.accept(job, genuine)
        if when == "after":
            await ship.ship(genuine)
            await ship.ship(forged)
        elif when == "before":
            await ship.settled()
            await ship.ship(genuine)
        else:
            await ship.ship(forged, genuine, forged)
        books = await ship.settled()
        assert books["written"] == 1
        assert books["duplicates"] == books["captured"] - 1
        assert ship.writer.conflicts == 0, "what goes on is what the cache holds"
        assert ship.verifier.corrected == books["captured"] - 1
    row = database.row("salt_returns")
    assert (row["return"], row["success"], row["fun"]) == ('"genuine"', "1", "test.ping")
    assert "forged" not in row["full_ret"]
    assert caplog.text.count("says something else than the master's job cache, which is stored instead") == 1


async def test_a_forged_return_alone_is_a_dead_letter_and_no_row(
    database: Scratch, cache: Cache, verifying: Make, caplog: pytest.LogCaptureFixture
) -> None:
    genuine = returns(5)
    cache.accept(*genuine)
    forged = [returned(jid(9), f"victim-{n}", "forged") for n in range(30)]
    async with verifying(verify_wait_seconds=0.5) as ship:
        await ship.take(*forged[:15], *genuine, *forged[15:])
        await waiting(ship, 30)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (5, 30)
        dead = await letters(ship)
        assert [(letter.reason, letter.jid, letter.minion) for letter in dead] == [
            ("unconfirmed", jid(9), f"victim-{n}") for n in range(30)
        ]
        assert {letter.error for letter in dead} == {"not in the master's job cache within 0.5 s"}
        assert [letter.body for letter in dead] == forged
    assert database.count("salt_returns") == 5
    assert caplog.text.count(jid(9)) == 1, "one line a jid"


async def test_many_forged_jobs_write_few_lines_into_the_log(
    database: Scratch, cache: Cache, verifying: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(*returns(500))
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (0, 500)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING and "job cache" in record.message]
    assert 1 <= len(told) <= 20


async def test_a_forged_publish_is_no_job_and_cannot_change_one(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    genuine = published(jid(1), ["web1"], user="root")
    cache.accept(genuine)
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(
            published(jid(1), ["evil"], user="evil", tgt=["evil"], fun="evil", arg=["evil"], missing=["evil"]),
            published(jid(2), ["web1"], user="evil"),
            genuine,
        )
        books = await ship.settled()
        assert (books["written"], books["duplicates"], books["dead_letters"]) == (1, 1, 1)
    assert "evil" not in database.row("jids")["load"]
    assert json.loads(database.row("jids")["load"])["Minions"] == ["web1"]


async def test_whatever_a_stranger_sends_the_next_return_is_written(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    """Any of these, unmarked, is in any accepted minion's power, and stands in the journal over a restart."""
    job = published(jid(1), ["web1"])
    cache.accept(job, returned(jid(1), "web1"))
    cache.job(jid(2), {"tgt": 5, "fun": [1], "arg": None, "kwargs": 7}, ["web1"])
    deep: Any = True
    for _ in range(480):
        deep = [deep]
    no_minions: list[Any] = [[["web1"]], [{}], "web1", 5, None]
    hostile = [
        *(returned(jid(1), minion) for minion in ("é" * 200, "😀" * 200, "..", ".", ".minions.p", "a\0b", "x" * 255)),
        *(new_with(jid(1), minions=odd) for odd in no_minions),
        *(published(jid(1), ["x"], **{key: [[]]}) for key in ("tgt", "missing", "fun", "arg", "user")),
        *(published(jid(2), ["web1"], missing=odd) for odd in (["web1"], [[1]], 5)),
        returned(jid(2), "web1", fun=[{}]),
        returned(jid(1), "web1", deep),
        f"salt/job/{jid(3)}/ret/web1".encode() + b"\n\n" + deeply_nested(jid(3), 1010),
    ]
    (cache.folder(jid(3)) / "web1").mkdir(parents=True)
    (cache.folder(jid(3)) / "web1" / "return.p").write_bytes(b"\x81\xa6return" + b"\x91" * 1010 + b"\x01")
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(*hostile)
        await ship.settled()
        genuine = returns(1, first=50)
        cache.accept(*genuine)
        books = await ship.ship(*genuine)
        assert books["captured"] == len(hostile) + 1
    assert (jid(50), "minion-50") in stored(database)
    assert not [key for key in stored(database) if key[1] not in ("web1", "minion-50")]


def new_with(job: str, **changes: Any) -> bytes:
    """A publish of any types."""
    tag, _, packed = published(job, ["x"]).partition(b"\n\n")
    return body(tag.decode(), {**msgpack.unpackb(packed), **changes})


def deeply_nested(job: str, levels: int) -> bytes:
    """A return as deep as msgpack unpacks; it packs less."""
    data = return_data(job, "web1", b"here")
    _, _, packed = body("x", data).partition(b"\n\n")
    return packed.replace(b"\xc4\x04here", b"\x91" * levels + b"\x01")


# What is stored says nothing that a stranger said


async def test_the_start_of_a_runner_or_wheel_changes_nobody_elses_job(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    genuine = published(jid(1), ["web1"], fun="state.apply", user="sudo_alice")
    called = body(f"salt/job/{jid(2)}/ret/call", call_data(jid(2), "call"))
    cache.accept(genuine, returned(jid(1), "web1", fun="state.apply"), called)
    forged = [
        body(f"salt/{kind}/{jid(n)}/new", master_data(jid(n), f"{fun}.forged", user="forged"))
        for kind, fun in (("run", "runner"), ("wheel", "wheel"))
        for n in (1, 2)
    ]
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(*forged, genuine, called, *forged)
        books = await ship.settled()
        assert (books["written"], books["ignored"]) == (2, {"unconfirmed_start": 8})
    loads = {row["jid"]: row["load"] for row in database.rows("jids")}
    assert loads.keys() == {jid(1), jid(2)}
    assert "forged" not in str(loads)
    assert json.loads(loads[jid(1)])["user"] == "sudo_alice"


async def test_a_forged_publish_gives_a_salt_call_no_other_user_or_target(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    called = body(f"salt/job/{jid(1)}/ret/call", call_data(jid(1), "call"))
    cache.accept(called)
    forged = published(jid(1), ["web1"], user="forged", tgt="forged", fun="cmd.run")
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(forged, called, forged)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (1, 2)
    assert "forged" not in database.row("jids")["load"]


async def test_a_flood_of_bare_returns_strips_nothing_off_the_genuine_one(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    job = published(jid(1), ["web1"], fun="test.arg", arg=["x"])
    genuine = return_data(jid(1), "web1", {"a": True}, fun="test.arg", fun_args=["x"])
    cache.accept(job, body(f"salt/job/{jid(1)}/ret/web1", genuine))
    bare = [
        body(f"salt/job/{jid(1)}/ret/web1", {"jid": jid(1), "id": "web1", "return": value})
        for value in ({"a": 1}, {"a": 1.0}, {"a": True}, None)
    ]
    async with verifying() as ship:
        await ship.ship(*bare)
        books = await ship.ship(job, body(f"salt/job/{jid(1)}/ret/web1", genuine))
        assert (books["dead_letters"], ship.writer.conflicts) == (0, 0)
    row = database.row("salt_returns")
    assert (row["fun"], row["return"]) == ("test.arg", '{"a": true}'), "with the cache's own types"
    said = full_ret(database)
    assert {key: said[key] for key in genuine if key != "_stamp"} == {
        key: value for key, value in genuine.items() if key != "_stamp"
    }


async def test_a_function_that_is_skipped_is_skipped_whatever_an_event_calls_it(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    job = published(jid(1), ["web1"], fun="pillar.items")
    cache.accept(job, returned(jid(1), "web1", "SECRET", fun="pillar.items"))
    called = call_data(jid(2), "call", "SECRET", fun="pillar.items")
    cache.accept(body(f"salt/job/{jid(2)}/ret/call", called))
    lies = [
        returned(jid(1), "web1", "SECRET", fun="test.ping"),
        body(f"salt/job/{jid(2)}/ret/call", {**called, "fun": "test.ping"}),
        body(f"salt/job/{jid(1)}/ret/web1", {"jid": jid(1), "id": "web1", "return": 1}),
        published(jid(1), ["web1"], fun="test.ping"),
    ]
    async with verifying(skip_functions=["pillar.*"]) as ship:
        books = await ship.ship(*lies)
        assert (books["ignored"], books["pending"]) == ({"skipped_function": 4}, 0)
    assert "salt_returns" not in [name for (name,) in database.sql("SHOW TABLES")]


async def test_what_a_minion_with_the_masters_id_returns_to_a_published_job_is_no_runners(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    like_a_runner = master_data(jid(1), "runner.forged", "SECRET")
    cache.accept(published(jid(1), [MASTER], fun="pillar.items"))
    cache.accept(returned(jid(1), MASTER, like_a_runner, fun="pillar.items"))
    cache.accept(published(jid(2), [MASTER]), returned(jid(2), MASTER, like_a_runner | {"jid": jid(2)}))
    forged = [
        body(f"salt/run/{jid(n)}/{what}", like_a_runner | {"jid": jid(n)}) for n in (1, 2) for what in ("ret", "new")
    ]
    async with verifying(skip_functions=["pillar.*"], verify_wait_seconds=0.5) as ship:
        await ship.take(returned(jid(1), MASTER), *forged, returned(jid(2), MASTER))
        books = await ship.settled()
        assert (books["written"], books["ignored"]["skipped_function"], books["dead_letters"]) == (1, 1, 2), books
    assert (database.row("salt_returns")["jid"], database.row("salt_returns")["fun"]) == (jid(2), "test.ping")


async def test_a_return_whose_load_is_not_in_the_cache_is_no_row(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    """Nobody can say whether its function is one that is skipped."""
    cache.accept(published(jid(1), ["web1"]), returned(jid(1), "web1"))
    (cache.folder(jid(1)) / ".load.p").unlink()
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(returned(jid(1), "web1"))
        assert (await ship.settled())["dead_letters"] == 1


async def test_what_the_database_refuses_is_retried_without_the_job_cache_if_that_had_confirmed_it(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    genuine = returned(jid(1), "web1", "genuine")
    cache.accept(genuine)
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(returned(jid(2), "web2"), returned(jid(3), "web3", "forged"))
        await ship.settled()
        cache.accept(returned(jid(2), "web2"))
        await ship.retry()
        await ship.settled()  # there are tables now, and a forged return among the dead letters
        database.sql("ALTER TABLE salt_returns ADD CONSTRAINT no_web1 CHECK (id <> 'web1')")
        await ship.ship(returned(jid(1), "web1", "forged"))
        assert sorted(letter.reason for letter in await letters(ship)) == ["refused", "unconfirmed"]
        cache.forget()
        database.sql("ALTER TABLE salt_returns DROP CONSTRAINT no_web1")
        await ship.retry()
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (2, 1), "what was not confirmed still is not"
    assert stored(database) == {(jid(1), "web1"): "genuine", (jid(2), "web2"): True}


# When the job cache cannot be asked


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
async def test_while_the_job_cache_cannot_be_read_everything_waits_and_nothing_is_called_forged(
    database: Scratch, cache: Cache, verifying: Make, monkeypatch: pytest.MonkeyPatch, number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bodies = returns(20)
    cache.accept(*bodies)
    real = os.open

    def fails(path: Any, *args: Any, **kwargs: Any) -> int:
        if "/jobs/" in str(path):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    async with verifying(verify_wait_seconds=0.3) as ship:
        monkeypatch.setattr(os, "open", fails)
        await ship.take(*bodies)
        await waiting(ship, 20)
        await asyncio.sleep(1.0)  # the time itself is what is tested
        books = await ship.books()
        assert (books["pending"], books["dead_letters"]) == (20, 0)
        assert caplog.text.count("Events wait in the journal until it can be read") == 1
        monkeypatch.setattr(os, "open", real)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (20, 0)
    assert database.count("salt_returns") == 20


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
async def test_a_clock_that_jumps_makes_no_genuine_return_a_dead_letter(
    database: Scratch, cache: Cache, verifying: Make, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    bodies = returns(20)
    real = time.time
    async with verifying(verify_wait_seconds=30.0) as ship:
        await ship.take(*bodies)
        await waiting(ship, 20)
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        await asyncio.sleep(0.5)  # it is looked for several times
        assert (await ship.books())["dead_letters"] == 0
        cache.accept(*bodies)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (20, 0)


# While the database is away


def down(ship: Shipping) -> None:
    ship.mysql["mysql.port"] = NOWHERE


def up(ship: Shipping, database: Scratch) -> None:
    ship.mysql["mysql.port"] = database.mysql["mysql.port"]


async def looked_at(ship: Shipping, count: int) -> None:
    """Until the verifier has confirmed so many events that the writer has not come to."""

    async def confirmed() -> int:
        ((number,),) = await ship._in_journal(ship._read, f"SELECT COUNT(*) FROM events WHERE state = {CONFIRMED}")
        return int(number)

    deadline = time.monotonic() + 60
    while await confirmed() < count:
        assert time.monotonic() < deadline, await ship.books()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_the_cache_confirmed_while_the_database_was_down_is_written_when_the_cache_has_forgotten_it(
    database: Scratch, cache: Cache, verifying: Make, restarted: bool
) -> None:
    genuine = [returned(jid(n), f"minion-{n}", {"n": n}) for n in range(1, 1201)]
    cache.accept(*genuine)
    said_otherwise = [returned(jid(n), f"minion-{n}", "forged") for n in range(1, 1201, 7)]
    forged = [returned(jid(n), "victim", "forged") for n in range(5000, 5010)]
    arrive = {body.partition(b"\n\n")[0]: body for body in (*genuine, *said_otherwise)}
    expected = {(jid(n), f"minion-{n}"): {"n": n} for n in range(1, 1201)}
    async with verifying(batch_size=10, verify_wait_seconds=0.5) as ship:
        down(ship)
        await ship.take_at(time.time() - 60, *arrive.values(), *forged)
        await looked_at(ship, 1190)
        await ship.until(lambda: ship.writer.retries > 0 and ship.verifier.waiting == 0)
        cache.forget()
        if not restarted:
            up(ship, database)
            ship.retune(batch_size=500)
            books = await ship.settled()
    if restarted:
        async with verifying(batch_size=500) as ship:
            books = await ship.settled()
    assert (books["written"], books["duplicates"], books["dead_letters"]) == (1200, 0, 10)
    assert stored(database) == expected


async def test_a_killed_engine_remembers_what_the_cache_had_confirmed(
    database: Scratch, cache: Cache, verifying: Make, tmp_path: Path
) -> None:
    bodies = returns(300)
    cache.accept(*bodies)
    async with verifying("first", batch_size=10) as ship:
        down(ship)
        await ship.take_at(time.time() - 60, *bodies)
        await looked_at(ship, 290)
        copy_journal(tmp_path / "first", tmp_path / "second")
    cache.forget()
    async with verifying("second") as ship:
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (300, 0)
    assert database.count("salt_returns") == 300


async def test_what_came_after_the_look_ahead_is_not_taken_for_confirmed(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    bodies = returns(50)
    cache.accept(*bodies)
    async with verifying(batch_size=10, verify_wait_seconds=0.5) as ship:
        down(ship)
        await ship.take_at(time.time() - 60, *bodies)
        await looked_at(ship, 40)
        await ship.take(*(returned(jid(n), "victim", "forged") for n in range(1, 51)))
    async with verifying(verify_wait_seconds=0.5) as ship:
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (50, 50)
    assert all(minion != "victim" for _, minion in stored(database))


async def test_what_the_look_ahead_passed_over_is_not_taken_for_confirmed(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    """Skipped when it was looked at, and no longer when it is written; or of a job that asked not to be kept."""
    genuine = returns(40)
    cache.accept(*genuine)
    cache.job(jid(900), nocache=True)
    skipped = [returned(jid(500 + n), "victim", "forged", fun="state.apply") for n in range(20)]
    async with verifying(batch_size=5, verify_wait_seconds=0.5, skip_functions=["state.*"]) as ship:
        down(ship)
        await ship.take_at(time.time() - 60, *genuine, *skipped, returned(jid(900), "victim", "forged"))
        await looked_at(ship, 40)
        await ship.until(lambda: ship.journal.pending <= 41)
    async with verifying(verify_wait_seconds=0.5, skip_functions=[]) as ship:
        books = await ship.settled()
        assert books["written"] == 40
        assert books["dead_letters"] + sum(books["ignored"].values()) == 21
    assert stored(database).keys() == {(jid(n), f"minion-{n}") for n in range(1, 41)}


async def test_settings_that_change_between_look_and_row_store_nothing_unconfirmed(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    async with verifying(flush_interval=1.0, verify_wait_seconds=0.5, skip_functions=["state.*"]) as ship:
        await ship.take(*(returned(jid(n), "victim", "forged", fun="state.apply") for n in range(1, 11)))
        await ship.until(lambda: ship.journal.taken_through >= 10)
        chosen = settings.combine({"skip_functions": []}, {})
        ship.writer.selection = ship.verifier.selection = Selection(chosen, master_id=MASTER)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"] + sum(books["ignored"].values())) == (0, 10)


# Restarts


async def test_what_waits_survives_a_restart_and_is_written_once_the_cache_has_it(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    bodies = returns(30)
    async with verifying() as ship:
        await ship.take(*bodies)
        await waiting(ship, 30)
    cache.accept(*bodies[:20])
    async with verifying() as ship:
        await ship.until(lambda: ship.journal.pending == 10)
        assert (await ship.books())["waiting"] == 10
        cache.accept(*bodies[20:])
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (30, 0)
    assert database.count("salt_returns") == 30


# Trimmed values


@pytest.mark.parametrize("mebibytes", [0.1, 6, 40, 70])
async def test_a_value_that_is_left_out_may_be_of_any_size(
    database: Scratch, cache: Cache, verifying: Make, mebibytes: float
) -> None:
    value = {str(number): "x" * 1000 for number in range(int(mebibytes * 1024))}
    for number, fun in ((1, "runner.jobs.list_jobs"), (2, "runner.test.arg")):
        cache.accept(body(f"salt/run/{jid(number)}/ret", master_data(jid(number), fun, value)))
    heard = body(f"salt/run/{jid(1)}/ret", master_data(jid(1), "runner.jobs.list_jobs", TRIMMED))
    other = body(f"salt/run/{jid(2)}/ret", master_data(jid(2), "runner.test.arg", TRIMMED))
    async with verifying(
        skip_values=["runner.jobs.*"], max_event_bytes=4 * 1024 * 1024, verify_wait_seconds=0.5
    ) as ship:
        await ship.take(heard, other)
        books = await ship.settled()
    stored = 2 if mebibytes < 1 else 1
    assert (books["written"], books["dead_letters"]) == (stored, 2 - stored)
    rows = {row["jid"]: row for row in database.rows("salt_returns")}
    said = json.loads(rows[jid(1)]["return"])
    assert (said["return"], said["fun"], said["success"]) == (LEFT_OUT, "runner.jobs.list_jobs", True)
    assert said["fun_args"] == ["web*", {"timeout": 5}]
    assert jid(1) in {row["jid"] for row in database.rows("jids")}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("how", ["in the cache", "late", "nowhere"])
async def test_the_minions_that_salt_trimmed_out_of_a_publish_are_those_of_the_job_cache(
    database: Scratch, cache: Cache, verifying: Make, how: str, verify: bool
) -> None:
    whole = published(jid(1), [f"web{number}" for number in range(1000)], tgt="web*")
    event = open_event(whole)
    assert isinstance(event, Opened)
    trimmed = body(event.tag, {**event.data, "minions": TRIMMED, "missing": TRIMMED})
    if how == "in the cache":
        cache.accept(whole)
    async with verifying(verify_returns=verify, verify_wait_seconds=0.5) as ship:
        await ship.take(trimmed)
        if how == "late":
            await waiting(ship, 1)
            cache.accept(whole)
        books = await ship.settled()
    lost = how == "nowhere"
    assert (books["written"], books["dead_letters"]) == ((0, 1) if lost and verify else (1, 0))
    if books["written"]:
        load = json.loads(database.row("jids")["load"])
        assert (load["tgt"], load["missing"], len(load["Minions"])) == ("web*", [], 0 if lost else 1000)


@pytest.mark.parametrize("verify", [True, False])
async def test_a_trimmed_value_is_taken_whole_from_the_cache(
    database: Scratch, cache: Cache, verifying: Make, verify: bool
) -> None:
    whole = {"a": "x" * 100_000, "b": 1}
    cache.accept(returned(jid(1), "web1", whole))
    async with verifying(verify_returns=verify or False) as ship:
        books = await ship.ship(returned(jid(1), "web1", {"a": TRIMMED, "b": 1}))
        assert (books["written"], books["trimmed"], ship.verifier.corrected) == (1, 0, 0)
    assert stored(database) == {(jid(1), "web1"): whole}
    assert "trimmed" not in full_ret(database)


@pytest.mark.parametrize(
    "how", ["the cache has it trimmed", "the cache has it late", "there is none in the cache", "no cache"]
)
async def test_a_trimmed_value_that_is_nowhere_whole_is_stored_marked_and_counted(
    database: Scratch, cache: Cache, verifying: Make, shipping: Make, how: str
) -> None:
    trimmed = returned(jid(1), "web1", {"a": TRIMMED})
    if how == "the cache has it trimmed":
        cache.accept(trimmed)
    make = shipping if how == "no cache" else verifying
    async with make(
        verify_returns="trimmed" in how, verify_wait_seconds=0.5, **({} if make is verifying else SOON)
    ) as ship:
        await ship.take(trimmed)
        if how == "the cache has it late":
            cache.accept(returned(jid(1), "web1", {"a": "whole"}))
        books = await ship.settled()
        late = how == "the cache has it late"
        assert (books["written"], books["trimmed"], books["dead_letters"]) == (1, 0 if late else 1, 0)
    if late:
        assert stored(database) == {(jid(1), "web1"): {"a": "whole"}}
    else:
        assert database.row("salt_returns")["full_ret"].endswith(', "trimmed": true}')
        assert (full_ret(database)["trimmed"], full_ret(database)["return"]) == (True, {"a": TRIMMED})


async def test_a_whole_return_takes_the_place_of_a_trimmed_row_and_never_the_other_way_round(
    database: Scratch, shipping: Make
) -> None:
    trimmed, whole = returned(jid(1), "web1", {"a": TRIMMED}), returned(jid(1), "web1", {"a": "whole"})
    async with shipping(**SOON) as ship:
        await ship.ship(trimmed, returned(jid(2), "web1", "other"))
        books = await ship.ship(whole)
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (3, 0, 0)
        after = database.rows("salt_returns")
        assert stored(database) == {(jid(1), "web1"): {"a": "whole"}, (jid(2), "web1"): "other"}
        assert not after[0]["full_ret"].endswith(', "trimmed": true}')
        books = await ship.ship(trimmed, whole, returned(jid(1), "web1", "a third"))
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (3, 3, 1)
    assert database.rows("salt_returns") == after


@pytest.mark.parametrize("first", ["trimmed", "whole"])
async def test_a_trimmed_and_a_whole_return_in_one_batch_make_a_whole_row(
    database: Scratch, shipping: Make, first: str
) -> None:
    bodies = [returned(jid(1), "web1", {"a": TRIMMED}), returned(jid(1), "web1", {"a": "whole"})]
    async with shipping(**SOON) as ship:
        await ship.ship(*(bodies if first == "trimmed" else bodies[::-1]))
        assert sum(ship.writer.batches.values()) == 1
    assert stored(database) == {(jid(1), "web1"): {"a": "whole"}}
    assert "trimmed" not in full_ret(database)


async def test_a_replayed_trimmed_return_is_counted_once(database: Scratch, shipping: Make, tmp_path: Path) -> None:
    async with shipping(**SOON) as ship:
        for _ in range(3):
            books = await ship.ship(returned(jid(1), "web1", TRIMMED))
        assert (books["written"], books["duplicates"], books["trimmed"]) == (1, 2, 1)


# Dead letters again


async def test_a_dead_letter_is_retried_with_and_without_trust(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(*returns(3))
        await ship.settled()
        dead = await letters(ship)
        assert len(dead) == 3
        assert await ship.retry(dead[0].seq) == 1
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (0, 3), "without trust the cache is asked again"
        cache.accept(returns(1)[0])
        await ship.retry((await letters(ship))[-1].seq)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (1, 2)
        assert await ship.retry(trust=True) == 2
        books = await ship.settled()
        assert (books["written"], books["dead_letters"], books["pending"]) == (3, 0, 0)
        assert await ship.retry(4711) == 0
    assert database.count("salt_returns") == 3


async def test_the_master_is_the_one_who_returned_a_runner(database: Scratch, cache: Cache, verifying: Make) -> None:
    genuine = body(f"salt/run/{jid(1)}/ret", master_data(jid(1), "runner.jobs.active", "genuine"))
    forged = body(f"salt/run/{jid(1)}/ret", master_data(jid(1), "runner.jobs.active", "forged"))
    cache.accept(genuine)
    async with verifying(verify_wait_seconds=0.3) as ship:
        await ship.ship(forged, body(f"salt/run/{jid(2)}/ret", master_data(jid(2), "runner.x", "forged")))
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (1, 1)
    assert database.row("salt_returns")["id"] == MASTER
    assert stored(database)[jid(1), MASTER]["return"] == "genuine"
