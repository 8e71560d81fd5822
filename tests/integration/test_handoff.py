"""The hand-off: what the master's own processes put into the journal, beside the engine and without it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import folders, intake, moments, pending, reconcile, saltevent, spool
from salt_mysql_engine.control import socket_path
from salt_mysql_engine.errors import JournalError
from salt_mysql_engine.intake import Intake, Taken
from salt_mysql_engine.journal import Caps, Journal, NewEvent, Settlement
from salt_mysql_engine.pending import Pending
from salt_mysql_engine.spool import HandOff
from salt_mysql_engine.telling import Teller
from tests.support.asking import ask, returner, values
from tests.support.disks import fill, mounted
from tests.support.mariadb import wait_until
from tests.support.scratch import Scratch
from tests.support.shipping import (
    MASTER,
    Cache,
    Shipping,
    body,
    call_data,
    jid,
    master_data,
    published,
    return_data,
    returned,
)

Make = Callable[..., Shipping]
MIB = 1024 * 1024


def opts(cachedir: Path, **options: Any) -> dict[str, Any]:
    """A master's options whose journal is in `cachedir`."""
    return {
        "cachedir": str(cachedir),
        "sock_dir": str(cachedir),
        "id": MASTER,
        "master_job_cache": "mysql_jobcache",
        "engines": [{"mysql_jobcache": options}],
    }


def process(script: str, *args: object, **kwargs: Any) -> subprocess.Popen[str]:
    """Another process of the master's: `hand` is its way into the journal, `args` are in `sys.argv`."""
    start = (
        "import json, os, sys, time; from pathlib import Path\n"
        "from salt_mysql_engine import spool\n"
        "from tests.integration.test_handoff import *\n"
        "hand = spool.of(opts(Path(sys.argv[1]), **json.loads(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", start + script, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs)


def folder(cachedir: Path) -> Path:
    """Where the journal is, and the spool."""
    return folders.of_journal(str(cachedir))


def spooled(cachedir: Path) -> list[spool.Record]:
    """What is in the spool files, of each in its order."""
    found: list[spool.Record] = []
    for path in sorted((folder(cachedir) / spool.FOLDER).iterdir()):
        content = path.read_bytes()
        header = spool.header_of(content)
        assert header is not None
        found += spool.parse(content[spool.HEADER.size :], header.key)[0]
    return found


def files(cachedir: Path) -> list[str]:
    """The names of the spool files."""
    return sorted(path.name for path in (folder(cachedir) / spool.FOLDER).iterdir() if path.name not in spool.LAST)


def dropped(cachedir: Path) -> dict[str, int]:
    """What the processes say that they dropped."""
    total = dict.fromkeys(spool.REASONS, 0)
    for name in files(cachedir):
        header = spool.header_of((folder(cachedir) / spool.FOLDER / name).read_bytes())
        assert header is not None
        for reason, count in zip(spool.REASONS, header.dropped, strict=True):
            total[reason] += count
    return {reason: count for reason, count in total.items() if count}


@contextlib.contextmanager
def engine(cachedir: Path, **caps: Any) -> Iterator[tuple[Journal, Intake]]:
    """The journal with what was handed over taken in, and what takes in more."""
    journal = Journal(folder(cachedir))
    journal.open()
    journal.caps = Caps(**caps)
    taking = Intake(journal, folder(cachedir))
    try:
        taking.drain()
        yield journal, taking
    finally:
        taking.close()
        journal.close()


def balanced(journal: Journal) -> dict[str, Any]:
    """The books, which balance."""
    books = journal.books()
    fates = [books[name] for name in ("written", "duplicates", "pending", "dead_letters")]
    assert books["captured"] == sum([*fates, *books["ignored"].values(), *books["dropped"].values()]), books
    return books


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[HandOff]:
    """The way of this process."""
    made = HandOff(opts(tmp_path))
    yield made
    made.close()


async def test_what_several_processes_hand_over_is_stored_once_each(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    script = (
        "for number in range(400):\n"
        "    hand.returned(return_data(jid(number), f'minion-{sys.argv[3]}', {'n': number, 'by': sys.argv[3]}))\n"
    )
    async with shipping("mysql_jobcache", handed_off=True, batch_size=50, flush_interval=0.05) as ship:
        workers = [process(script, tmp_path, "{}", name) for name in "abcd"]
        for worker in workers:
            assert await asyncio.get_running_loop().run_in_executor(None, worker.wait, 60) == 0
            worker.communicate()
        await ship.until(lambda: files(tmp_path) == [])
        books = await ship.drain()
    assert books["captured"] == books["written"] == 1600
    rows = {(row["jid"], row["id"]): json.loads(row["return"]) for row in database.rows("salt_returns")}
    assert rows == {(jid(n), f"minion-{name}"): {"n": n, "by": name} for n in range(400) for name in "abcd"}


async def test_without_an_engine_everything_waits_for_the_next_one(
    database: Scratch, shipping: Make, hand: HandOff
) -> None:
    hand.published(jid(1), {"tgt": "*", "fun": "test.ping", "arg": [], "user": "root", "jid": jid(1)}, ["a", "b"])
    hand.returned(return_data(jid(1), "a"))
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        books = await ship.handed_over()
    assert books["written"] == 2
    assert [row["id"] for row in database.rows("salt_returns")] == ["a"]
    assert json.loads(database.rows("jids")[0]["load"])["Minions"] == ["a", "b"]


async def test_rows_are_those_that_the_bus_would_have_given(database: Scratch, shipping: Make, hand: HandOff) -> None:
    load: dict[str, Any] = {
        "cmd": "publish", "tgt": "*", "tgt_type": "glob", "fun": "state.apply", "arg": ["app"], "ret": "",
        "jid": jid(1), "kwargs": {"metadata": {"ticket": 7}, "token": "secret"}, "user": "root", "token": "secret",
    }  # fmt: skip
    runner = master_data(jid(4), "runner.jobs.list_jobs", {"x": 1})
    returns = [
        return_data(jid(1), "web1", {"a": [1, None]}, fun="state.apply", out="highstate"),
        return_data(jid(2), "web1", {"x": True}, fun=["test.ping", "test.arg"], retcode={"test.ping": 0}),
        call_data(jid(3), "web2", "x" * 1000),
    ]
    hand.published(jid(1), load, ["web1", "web2"])
    for ret in returns:
        hand.published(ret["jid"], {**ret, "tgt": "web1"}, None)  # as store_job does for every return
        hand.returned(ret)
    hand.returned({"id": MASTER, "tgt": MASTER, "jid": jid(4), "return": runner, "fun": runner["fun"], "user": "root"})
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        await ship.handed_over()
    ours = database.rows("salt_returns"), database.rows("jids")
    load["kwargs"], of_load = {"metadata": {"ticket": 7}}, ("kwargs", "ret")
    for table in ("salt_returns", "jids"):
        database.sql(f"TRUNCATE `{table}`")
    async with shipping("of the bus") as ship:
        await ship.ship(
            published(jid(1), ["web1", "web2"], fun="state.apply", arg=["app"], **{key: load[key] for key in of_load}),
            *(body(f"salt/job/{ret['jid']}/ret/{ret['id']}", ret) for ret in returns),
            body(f"salt/run/{jid(4)}/ret", runner),
        )  # fmt: skip
    assert ours == (database.rows("salt_returns"), database.rows("jids"))
    assert "secret" not in json.dumps(ours, default=str)


@pytest.mark.parametrize("way", ["bus", "confirmed", "job cache", "hand-off"])
async def test_a_value_that_is_left_out_is_in_no_table_whichever_way_it_came(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(reconcile, "SETTLE_SECONDS", 0.05)
    secret = {"mysql.pass": "SECRET-1"}
    runner, wheel = (master_data(jid(n), fun, secret) for n, fun in ((1, "runner.my.x"), (2, "wheel.config.values")))
    minion = call_data(jid(3), "web1", secret, fun="my.secret")
    bodies = [
        body(f"salt/run/{jid(1)}/ret", runner),
        body(f"salt/wheel/{jid(2)}/ret", wheel),
        body(f"salt/job/{jid(3)}/ret/web1", minion),
    ]
    cache = Cache(tmp_path / "cache")
    skip = {"skip_values": ["wheel.config.values", "*my.*"], "events": ["salt/*"], "handed_off": way == "hand-off"}
    if way in ("confirmed", "job cache"):
        cache.accept(*bodies)
        skip |= {"cachedir": cache.cachedir, "reconcile": way == "job cache"}
    async with shipping("mysql_jobcache", **skip) as ship:
        if way == "job cache":
            await ship.reconcile()
        elif way == "hand-off":
            for data in (runner, wheel):
                hand.returned({"id": MASTER, "tgt": MASTER, "jid": data["jid"], "return": data, "fun": data["fun"]})
            hand.returned(minion)
            await ship.handed_over()
        else:
            await ship.take(*bodies)
        await ship.settled()
    tables = {table: database.rows(table) for table in ("jids", "salt_returns", "salt_events")}
    assert [len(tables[table]) for table in ("jids", "salt_returns")] == [3, 3]
    assert all(saltevent.LEFT_OUT in row["return"] for row in tables["salt_returns"])
    assert "SECRET-1" not in repr(tables)


async def test_minions_of_a_syndic_are_added_to_the_load_of_a_job_that_is_known(
    database: Scratch, shipping: Make, hand: HandOff, tmp_path: Path
) -> None:
    load = {"tgt": "*", "fun": "test.ping", "arg": [], "user": "root", "jid": jid(1), "tgt_type": "glob"}
    hand.published(jid(1), load, ["near"])
    hand.minions(jid(1), ["far-1", "near"])
    hand.minions(jid(2), ["nobody knows this job"])
    hand.minions(jid(3), ["far-3"])
    hand.returned(call_data(jid(3), "near"))
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        await ship.handed_over()
        hand.minions(jid(1), ["late"])
        hand.minions(jid(2), ["nobody knows this job"])
        await ship.handed_over()
    loads = {row["jid"]: json.loads(row["load"]) for row in database.rows("jids")}
    assert sorted(loads[jid(1)]["Minions"]) == ["far-1", "late", "near"]
    assert loads[jid(3)]["Minions"] == ["far-3"]
    assert loads[jid(3)]["fun"] == "test.ping"
    assert jid(2) not in loads


async def test_the_bus_brings_no_job_then_but_the_chosen_events(database: Scratch, shipping: Make) -> None:
    forged = b"mysql_jobcache/minions/" + jid(3).encode() + b"\n\n" + body("", {"jid": jid(3), "minions": ["x"]})[2:]
    async with shipping("mysql_jobcache", handed_off=True, events=["*"]) as ship:
        books = await ship.ship(returned(jid(1), "forged"), published(jid(2), ["x"]), body("my/tag", {"a": 1}), forged)
    assert (books["captured"], books["written"]) == (3, 3)
    assert not database.rows("salt_returns")
    assert not database.rows("jids")
    assert sorted(row["tag"] for row in database.rows("salt_events")) == sorted(
        [f"salt/job/{jid(1)}/ret/forged", f"salt/job/{jid(2)}/new", "my/tag"]
    )


async def test_a_tag_of_our_own_is_not_taken_from_the_bus(database: Scratch, shipping: Make) -> None:
    async with shipping(events=["*"]) as ship:
        books = await ship.ship(body(f"mysql_jobcache/minions/{jid(1)}", {"jid": jid(1), "minions": ["x"]}))
    assert books["captured"] == 0


async def test_event_return_stores_its_events_and_makes_no_job_of_them(
    database: Scratch, shipping: Make, hand: HandOff
) -> None:
    data = return_data(jid(1), "web1")
    hand.events([{"tag": f"salt/job/{jid(1)}/ret/web1", "data": data}, {"tag": "x" * 300, "data": {}}, {"tag": 7}])
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        books = await ship.handed_over()
    assert (books["written"], books["ignored"]) == (2, {})
    row, long = database.rows("salt_events")
    assert (row["tag"], json.loads(row["data"])) == (f"salt/job/{jid(1)}/ret/web1", data)
    assert long["tag"] == "x" * 255
    assert not database.rows("salt_returns")


@pytest.mark.parametrize("after", ["a power cut", "a deleted folder"])
async def test_an_event_that_is_handed_over_and_taken_twice_is_one_row(
    database: Scratch, shipping: Make, hand: HandOff, tmp_path: Path, after: str
) -> None:
    """The journal has lost how far it came, and the spool file has not, or its process makes it again."""
    hand.events([{"tag": "my/small", "data": {"number": number}} for number in range(3)])
    hand.events([{"tag": "my/large", "data": {"text": "x" * 300_000}}, {"tag": "my/small", "data": {"number": 0}}])
    shutil.copytree(folder(tmp_path), tmp_path / "on disk")
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        assert (await ship.handed_over())["written"] == 5
    shutil.rmtree(folder(tmp_path))
    if after == "a power cut":
        (tmp_path / "on disk").rename(folder(tmp_path))
    else:
        hand.events([{"tag": "my/last", "data": {}}])
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        assert (await ship.handed_over())["duplicates"] == 5
    rows = [(row["tag"], json.loads(row["data"]).get("number")) for row in database.rows("salt_events")]
    assert sorted(row for row in rows if row[0] == "my/small") == [("my/small", number) for number in (0, 0, 1, 2)]
    assert len(rows) == (5 if after == "a power cut" else 6)


async def test_a_job_that_asked_not_to_be_kept_is_not(database: Scratch, shipping: Make, hand: HandOff) -> None:
    hand.keep_out(jid(1))
    hand.returned(return_data(jid(1), "web1"))
    hand.returned(return_data(jid(2), "web1"))
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        await ship.handed_over()
    assert [row["jid"] for row in database.rows("salt_returns")] == [jid(2)]


def test_the_marks_of_such_jobs_do_not_stay_for_ever(tmp_path: Path, hand: HandOff) -> None:
    hand.keep_out(jid(1))
    hand.keep_out(jid(2))
    marks = folder(tmp_path) / "nocache"
    os.utime(marks / jid(1), (1, 1))
    spool.forget_old(opts(tmp_path), time.time())
    assert [mark.name for mark in marks.iterdir()] == [jid(2)]


@pytest.mark.parametrize(
    "load",
    [
        {},
        {"jid": "../../etc", "id": "web1", "return": 1},
        {"jid": jid(1), "id": ["web1"], "return": 1},
        {"jid": 7, "id": "web1", "return": 1},
        {"jid": jid(1), "id": "web1"},
        {"jid": "nocache", "id": "web1", "return": 1},
    ],
)
def test_what_is_no_return_is_left_alone(tmp_path: Path, hand: HandOff, load: dict[str, Any]) -> None:
    hand.returned(load)
    assert not folder(tmp_path).exists()


def test_what_has_no_room_in_memory_is_counted_as_soon_as_it_can_be(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_MEMORY_BYTES", 100_000)
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.05)
    hand.returned(return_data(jid(0), "web1"))
    monkeypatch.setattr(spool, "free_bytes", lambda _: MIB)
    hand._look_at = 0.0
    for number in range(1, 41):
        hand.returned(return_data(jid(number), "web1", "x" * 10_000))
    lost = dropped(tmp_path)["memory_full"]
    assert 25 < lost < 35
    monkeypatch.undo()
    wait_until(lambda: len(spooled(tmp_path)) == 41 - lost, timeout=30, what="what was held")
    with engine(tmp_path) as (journal, _):
        books = balanced(journal)
    assert (books["captured"], books["dropped"]) == (41, {"memory_full": lost})
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in range(41 - lost)]


def test_a_full_journal_gives_up_returns_counts_them_and_takes_every_publish(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hand = HandOff(opts(tmp_path, journal_max_bytes=MIB))
    load = {"tgt": "*", "fun": "test.ping", "arg": ["x" * 2000], "user": "root", "tgt_type": "glob"}
    for number in range(300):
        hand.published(jid(number), load, ["web1"])
        hand.returned(return_data(jid(number), "web1", "x" * 10_000))
    minions = [record.minion for record in spooled(tmp_path)]
    assert minions.count("") == 300
    assert 50 < minions.count("web1") < 110
    lost = {"journal_full": 300 - minions.count("web1")}
    assert dropped(tmp_path) == lost
    assert len([record for record in caplog.records if "journal_max_bytes" in record.getMessage()]) == 1
    with engine(tmp_path, max_bytes=MIB) as (journal, taking):
        books = balanced(journal)
        assert (books["captured"], books["dropped"]) == (600, lost)
        hand.returned(return_data(jid(999), "web1", "x" * MIB))
        taking.drain()
        assert balanced(journal)["dropped"]["journal_full"] == books["dropped"]["journal_full"] + 1
    hand.close()


def test_what_the_engine_took_of_a_file_does_not_count_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(intake, "_SAY_SECONDS", 0.0)
    monkeypatch.setattr("salt_mysql_engine.journal._CHECKPOINT_AGAIN_SECONDS", 0.0)  # the log counts from 4 MiB on
    hand = HandOff(opts(tmp_path, journal_max_bytes=8 * MIB))
    with engine(tmp_path) as (journal, taking):
        for number in range(200):
            hand.returned(return_data(jid(number), "web1", "x" * 45_000))
            taking.drain()
            with journal._transaction():  # as if it were in MySQL
                journal._db.execute("DELETE FROM events")
            taking.step()
        assert "dropped.journal_full" not in journal._counters()
    hand.close()


def test_the_oldest_make_room_for_what_is_handed_over_where_that_is_asked_for(tmp_path: Path) -> None:
    hand = HandOff(opts(tmp_path, journal_max_bytes=MIB, journal_full="drop_oldest"))
    for number in range(300):
        hand.returned(return_data(jid(number), "web1", "x" * 10_000))
    assert len(spooled(tmp_path)) == 300
    with engine(tmp_path, max_bytes=MIB, drop_oldest=True) as (journal, _):
        books = balanced(journal)
        entries = journal.held(jid=None, at=0, rows=1000, max_bytes=10**9)
    assert books["captured"] == 300
    assert books["dropped"] == {"journal_full": 300 - books["pending"]}
    assert 50 < len(entries) < 110
    assert jid(299).encode() in entries[0].body
    hand.close()


async def test_what_is_handed_over_while_a_corrupt_file_is_replaced_is_stored_once(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff
) -> None:
    for number in range(50):
        hand.returned(return_data(jid(number), "web1"))
    async with shipping("mysql_jobcache", handed_off=True, paused=True) as ship:
        await ship.until(lambda: ship.journal.pending == 50)
        await ship._in_journal(ship.journal._begin_anew)
        for number in range(50, 100):
            hand.returned(return_data(jid(number), "web1"))
        await ship.until(lambda: ship.journal.pending == 100)
    assert ship.journal.salvaged
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        books = await ship.handed_over()
    assert (books["captured"], books["written"]) == (100, 100)
    assert {row["jid"] for row in database.rows("salt_returns")} == {jid(number) for number in range(100)}


@pytest.mark.faults
async def test_a_cache_that_is_deleted_under_the_master_takes_nothing_along(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff
) -> None:
    """`rm -rf` of all that Salt caches: the engine and the other processes find together again."""
    async with shipping("mysql_jobcache", handed_off=True, flush_interval=0.05) as ship:
        ship.mysql["mysql.port"] = 1  # nobody listens there
        for number in range(50):
            hand.returned(return_data(jid(number), "web1"))
        await ship.until(lambda: ship.writer.retries > 0)
        for start in (50, 100):
            shutil.rmtree(tmp_path / "mysql_jobcache")
            for number in range(start, start + 50):
                hand.returned(return_data(jid(number), "web1"))
            await ship.until(lambda: ship.journal.pending == start + 50)  # noqa: B023 (it is waited for here)
        ship.mysql["mysql.port"] = database.mysql["mysql.port"]
        books = await ship.settled()
    assert (books["captured"], books["written"]) == (150, 150)
    assert {row["jid"] for row in database.rows("salt_returns")} == {jid(number) for number in range(150)}


def test_without_an_engine_what_was_in_a_deleted_folder_is_written_again(tmp_path: Path) -> None:
    hand = HandOff(opts(tmp_path))
    for number in range(100):
        hand.returned(return_data(jid(number), "web1"))
    shutil.rmtree(folder(tmp_path))
    hand.returned(return_data(jid(100), "web1"))
    folder(tmp_path).rename(tmp_path / "moved away")
    hand._look_at = 0.0
    hand.returned(return_data(jid(101), "web1"))
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in range(102)]
    hand.close()


@pytest.mark.parametrize("child", ["ends", "lives on", "hands over"])
def test_a_child_that_is_forked_while_a_file_is_open_changes_nothing_for_its_parent(tmp_path: Path, child: str) -> None:
    script = (
        "hand.returned(return_data(jid(1), 'parent'))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    if sys.argv[3] == 'hands over':\n"
        "        spool.of(opts(Path(sys.argv[1]))).returned(return_data(jid(1), 'child'))\n"
        "    if sys.argv[3] == 'lives on':\n"
        "        sys.stdin.readline()\n"
        "    os._exit(0)\n"
        "if sys.argv[3] != 'lives on':\n"
        "    os.waitpid(child, 0)\n"
        "hand.returned(return_data(jid(2), 'parent'))\n"
        "print('done', flush=True)\n"
        "os._exit(0)\n"
    )
    parent = process(script, tmp_path, "{}", child)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "done\n"
    assert parent.wait(60) == 0
    wanted = [(jid(1), "parent"), (jid(2), "parent")]
    assert [(record.jid, record.minion) for record in spooled(tmp_path) if record.minion == "parent"] == wanted
    with engine(tmp_path) as (journal, taking):
        assert balanced(journal)["captured"] == 2 + (child == "hands over")
        taking.step()
        assert files(tmp_path) == [], "a child that lives on does not make its parent's file look alive"
    parent.communicate()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_call_waits_for_a_disk_or_for_a_lock(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    script = "print('ready', flush=True); sys.stdin.readline()\n"
    script += "for number in range(1, 3001):\n    hand.returned(return_data(jid(number), 'web1'))\n"
    script += "print('done', flush=True); sys.stdin.readline()\n"
    worker = process(script, tmp_path, "{}")
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    calls = "trace=fsync,fdatasync,msync,sync_file_range,pwrite64,flock,fcntl,poll,select,connect"
    with subprocess.Popen(["strace", "-qq", "-f", "-e", calls, "-o", str(trace), "-p", str(worker.pid)]) as strace:
        wait_until(lambda: trace.exists() and _is_traced(worker.pid), timeout=30, what="strace")
        worker.stdin.write("go\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "done\n"
        strace.terminate()
    worker.kill()
    worker.communicate()
    assert len(spooled(tmp_path)) == 3000
    lines = trace.read_text().splitlines()
    assert len([line for line in lines if "pwrite64" in line]) < 3020, "one write a return"
    assert not [line for line in lines if "sync" in line or "poll" in line or "select" in line]
    assert all("LOCK_NB" in line for line in lines if "flock" in line)
    assert not [line for line in lines if "F_SETLKW" in line]


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text()


def test_a_file_that_is_large_is_followed_by_another_and_removed(tmp_path: Path) -> None:
    hand = HandOff(opts(tmp_path, journal_max_bytes=4 * MIB))
    with engine(tmp_path) as (journal, taking):
        for number in range(500):
            hand.returned(return_data(jid(number), "web1", "x" * 1000))
            if number % 50 == 49:
                taking.drain()
                taking.step()
                assert (
                    sum((folder(tmp_path) / spool.FOLDER / name).stat().st_size for name in files(tmp_path)) < 200_000
                )
        assert len(files(tmp_path)) == 1
        assert [event.captured_at for event in reversed(journal.held(jid=None, at=0, rows=1000, max_bytes=10**9))]
        assert balanced(journal)["captured"] == 500
    hand.close()


def garbage(spool_folder: Path) -> dict[str, Path]:
    """What may lie in the spool that is none of ours, by what it is."""
    name = "0179561014116364289{}-17468-55a9db18-000001.spool"
    paths = {
        what: spool_folder / name.format(number)
        for number, what in enumerate(["a link", "a folder", "a pipe", "of another", "random", "empty", "cut"])
    }
    (spool_folder.parent / "target").write_bytes(b"a secret")
    paths["a link"].symlink_to(spool_folder.parent / "target")
    paths["a folder"].mkdir()
    os.mkfifo(paths["a pipe"])
    paths["of another"].write_bytes(b"x" * 100)
    os.chown(paths["of another"], 65533, 65533)
    paths["random"].write_bytes(os.urandom(5000))
    paths["empty"].touch()
    paths["cut"].write_bytes(spool.HEADER.pack(spool.MAGIC, b"k" * 8, 0, 0, 0)[:20])
    (spool_folder / "notes.txt").write_text("mine")
    return paths


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_lies_in_the_spool_and_is_none_of_ours_harms_nothing(tmp_path: Path, hand: HandOff) -> None:
    hand.returned(return_data(jid(1), "web1"))
    paths = garbage(folder(tmp_path) / spool.FOLDER)
    with engine(tmp_path) as (journal, taking):
        for _ in range(30):
            taking.step()
        books = balanced(journal)
        assert (books["captured"], books["pending"], books["dropped"]) == (2, 1, {"spool_torn": 1})
    assert {what for what, path in paths.items() if os.path.lexists(path)} == {
        "a link", "a folder", "a pipe", "of another",
    }  # fmt: skip
    assert (folder(tmp_path) / "target").read_bytes() == b"a secret"


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped", "length", "middle"])
def test_a_damaged_record_costs_itself_and_is_counted_once(
    tmp_path: Path, damage: str, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a minion put into its value, which looks like a record, is none."""
    hand = HandOff(opts(tmp_path))
    fake = b"k" * 8 + spool.pack(spool.Record(1.0, jid(666), "forged", returned(jid(666), "forged")))
    for number in range(20):
        hand.returned(return_data(jid(number), "web1", [fake] * 5))
    (name,) = files(tmp_path)
    path = folder(tmp_path) / spool.FOLDER / name
    content = path.read_bytes()
    key = content[8:16]
    begins = [at for at in range(len(content)) if content.startswith(key, at)][1:]
    assert len(begins) == 20
    middle, last = begins[10], begins[19]
    changed = {
        "cut": content[: last + 50],
        "zeros": content[: last + 50] + bytes(len(content) - last - 50),
        "flipped": content[: last + 50] + b"?" + content[last + 51 :],
        "length": content[: middle + 8] + b"\xff\xff\xff\x7f" + content[middle + 12 :],
        "middle": content[:middle] + bytes(30) + content[middle + 30 :],
    }[damage]
    path.write_bytes(changed)
    if not alive:
        hand.close()
    with engine(tmp_path) as (journal, taking):
        for _ in range(4):
            taking.step()
        hand.close()
        for _ in range(4):
            taking.step()
        books = balanced(journal)
        assert (books["captured"], books["pending"], books["dropped"]) == (20, 19, {"spool_torn": 1})
        jids = {saltevent.PLAIN_RETURN.match(entry.body)[1].decode() for entry in  # type: ignore[index] # all are returns
                journal.held(jid=None, at=0, rows=100, max_bytes=10**9)}  # fmt: skip
        assert jids == {jid(number) for number in range(20)} - {jid(10 if damage in ("length", "middle") else 19)}
    assert files(tmp_path) == []


def test_the_log_says_once_for_all_processes_that_nobody_ships(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        HandOff(opts(tmp_path)).returned(return_data(jid(1), "web1"))
    said = [record for record in caplog.records if "No mysql_jobcache engine runs" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.ERROR


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_root_makes_belongs_to_the_master(tmp_path: Path) -> None:
    cachedir = tmp_path / "cache"
    cachedir.mkdir()
    os.chown(cachedir, 65534, 65534)
    hand = HandOff(opts(cachedir))
    hand.returned(return_data(jid(1), "web1"))
    hand.keep_out(jid(2))
    with engine(cachedir):
        made = {path.name: path.stat() for path in [folder(cachedir), *folder(cachedir).rglob("*")]}
    hand.close()
    assert made.keys() >= {"mysql_jobcache", "journal.sqlite", "journal.sqlite-wal", "spool", "used", jid(2)}
    assert {(info.st_uid, info.st_mode & 0o077) for info in made.values()} == {(65534, 0)}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_follows_no_link_in_the_folder_and_gives_away_only_what_it_made(tmp_path: Path) -> None:
    cachedir, target = tmp_path / "cache", tmp_path / "shadow"
    cachedir.mkdir()
    target.write_text("root's own")
    target.chmod(0o640)
    os.chown(cachedir, 65534, 65534)
    with engine(cachedir):
        pass
    for name in ("said", "used", "lock", "spool/00.last", f"nocache/{jid(1)}"):
        path = folder(cachedir) / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    hand = HandOff(opts(cachedir))
    hand.keep_out(jid(1))
    hand.returned(return_data(jid(2), "web1"))
    with pytest.raises(JournalError, match="cannot be used"), engine(cachedir):
        pass
    (folder(cachedir) / "lock").unlink()
    (folder(cachedir) / "journal.sqlite").unlink()
    (folder(cachedir) / "journal.sqlite").symlink_to(target)
    with pytest.raises(JournalError, match="is a link"), engine(cachedir):
        pass
    hand.close()
    assert (target.read_text(), target.stat().st_uid, target.stat().st_mode & 0o777) == ("root's own", 0, 0o640)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("what", ["a link", "of another"])
def test_a_folder_that_is_a_link_or_of_another_user_is_refused_with_what_to_do(tmp_path: Path, what: str) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    if what == "a link":
        folder(tmp_path).symlink_to(other)
    else:
        folder(tmp_path).mkdir()
        os.chown(folder(tmp_path), 65533, 65533)
    with pytest.raises(
        JournalError, match="put a real folder there" if what == "a link" else "belongs to the user 65533"
    ):
        Journal(folder(tmp_path)).open()
    hand = HandOff(opts(tmp_path))
    hand.returned(return_data(jid(1), "web1"))
    hand.keep_out(jid(2))
    assert hand._held, "it is held in memory"
    assert (list(other.iterdir()), other.stat().st_mode & 0o777) == ([], 0o755)


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "", "x", jid(1) + "/../x", jid(1) + chr(10)])
def test_a_mark_is_made_for_a_jid_alone(tmp_path: Path, hand: HandOff, name: str) -> None:
    hand.keep_out(name)
    assert list(tmp_path.rglob("*")) == []


def test_on_a_disk_that_is_full_to_the_last_byte_publishes_are_taken_and_returns_held(tmp_path: Path) -> None:
    load = {"tgt": "*", "fun": "test.ping", "arg": [], "user": "root", "tgt_type": "glob"}
    with mounted(tmp_path / "disk") as disk:
        hand = HandOff(opts(disk))
        hand.returned(return_data(jid(0), "web1"))
        ballast = fill(disk)
        hand._look_at = 0.0
        began = time.monotonic()
        for number in range(1, 501):
            hand.published(jid(number), load, ["web1", "web2"])
            hand.returned(return_data(jid(number), "web1"))
        assert time.monotonic() - began < 5.0
        there = spooled(disk)
        found = sorted(record.jid for record in there if record.minion == "")
        assert found == [jid(number) for number in range(1, 501)]
        assert len(hand._held) == 500
        assert set(Pending(opts(disk)).jobs()) == {jid(number) for number in range(501)}, "they are found at once"
        ballast.unlink()
        wait_until(lambda: not hand._held, timeout=30, what="the returns")
        with engine(disk) as (journal, taking):
            for _ in range(3):
                taking._last_at = 0.0
                taking.drain()
            books = balanced(journal)
        assert (books["captured"], books["dropped"]) == (1001, {})
        last = [(folder(disk) / spool.FOLDER / name).read_bytes()[spool.HEADER.size :] for name in spool.LAST]
        assert not b"".join(last).strip(bytes(1)), "there is room for the next time"
        hand.close()


async def test_a_publish_is_found_at_once_on_a_full_disk_where_an_engine_runs(shipping: Make, tmp_path: Path) -> None:
    """Else `salt` takes its own job for none of anybody's."""
    with mounted(tmp_path / "disk") as disk:
        hand = HandOff(opts(disk))
        async with shipping("disk/mysql_jobcache", handed_off=True, listens_in=disk, paused=True) as ship:
            ballast = fill(disk)
            await ship._take(ship.intake.drain)
            hand._look_at = 0.0
            for number in range(3):
                hand.published(jid(number), {"tgt": "*", "fun": "test.ping", "user": "root"}, ["web1"])
                found = await asyncio.to_thread(Pending(opts(disk)).job, jid(number))
                assert found.load["Minions"] == ["web1"]
            ballast.unlink()
            await ship._take(ship.intake.drain)
            found = await asyncio.to_thread(Pending(opts(disk)).job, jid(2))
            assert found.load["Minions"] == ["web1"]
            assert (await ship.books())["captured"] == 3
        hand.close()


def test_short_processes_that_come_and_go_cost_the_workers_nothing(tmp_path: Path) -> None:
    """Without an engine: nobody's end takes anything along that others handed over."""
    script = (
        "for number in range(2000):\n"
        "    hand.returned(return_data(jid(number), f'worker-{sys.argv[3]}', 'x' * 40_000))\n"
        "    if number % 400 == 399:\n"
        "        print(number, flush=True); sys.stdin.readline()\n"
    )
    short = "hand.returned(return_data(jid(1), f'short-{sys.argv[3]}', 'x' * 40_000))\n"
    workers = [process(script, tmp_path, "{}", name) for name in "abc"]
    for number in range(5):
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == f"{400 * number + 399}\n"
        done = process(short, tmp_path, "{}", number)
        done.communicate(timeout=60)
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("on\n")
            worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=60)
    with engine(tmp_path) as (journal, taking):
        while taking.drain().more:
            pass
        books = balanced(journal)
        assert (books["captured"], books["pending"]) == (6005, 6005)
        found = journal._db.execute("SELECT minion, COUNT(DISTINCT jid) FROM events GROUP BY minion").fetchall()
    assert sorted(found) == sorted(
        [(f"worker-{name}", 2000) for name in "abc"] + [(f"short-{number}", 1) for number in range(5)]
    )


def test_many_files_that_short_processes_left_are_taken_in_small_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1000):
        hand = HandOff(opts(tmp_path))
        hand._check_engine_at = float("inf")
        hand.returned(return_data(jid(number), "web1", "x" * 1000))
        hand.close()
    listed = []
    real = os.scandir
    monkeypatch.setattr(intake.os, "scandir", lambda folder: (listed.append(folder), real(folder))[1])
    with engine(tmp_path) as (journal, taking):
        while files(tmp_path):
            assert taking.step().events <= 64
            assert len(taking._files) <= 200
        assert balanced(journal)["captured"] == 1000
    assert files(tmp_path) == []
    assert len(listed) < 15, "they are not listed again for each few"


def test_workers_drop_nothing_while_large_dead_letters_are_tried_again(tmp_path: Path) -> None:
    script = (
        "print('ready', flush=True); sys.stdin.readline(); slowest = 0.0\n"
        "for number in range(2000):\n"
        "    began = time.perf_counter()\n"
        "    hand.returned(return_data(jid(number), f'worker-{sys.argv[3]}', 'x' * 2000))\n"
        "    slowest = max(slowest, time.perf_counter() - began)\n"
        "print(slowest)\n"
    )
    with engine(tmp_path) as (journal, taking):
        for number in range(20):
            journal.append([NewEvent(1.0, jid(number), "large", os.urandom(5 * MIB))])
        seqs = [entry.seq for entry in journal.read(after=0, rows=100, max_bytes=10**9)]
        journal.settle(Settlement(seqs, {}, dict.fromkeys(seqs, ("refused", "too large"))))
        workers = [process(script, tmp_path, "{}", name) for name in "ab"]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdin is not None
            assert worker.stdout.readline() == "ready\n"
            worker.stdin.write("go\n")
            worker.stdin.flush()
        assert journal.retry_dead_letters(None, trusted=True) == 20
        slowest = [float(worker.communicate(timeout=60)[0]) for worker in workers]
        while taking.drain().more:
            pass
        books = balanced(journal)
    assert (books["captured"], books["pending"], books["dropped"]) == (4020, 4020, {})
    assert max(slowest) < 0.25, "nobody waited for the engine"


def test_a_write_that_was_cut_short_is_written_over(tmp_path: Path) -> None:
    """The file may grow no further in the middle of a record: what failed is held, and written once it may."""
    script = (
        "import resource, signal\n"
        "spool._RETRY_SECONDS = 0.05\n"
        "for number in range(200):\n"
        "    if number % 40 == 20:\n"
        "        there = os.fstat(hand._file).st_size\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (there + 500, resource.RLIM_INFINITY))\n"
        "    hand.returned(return_data(jid(number), 'web1', 'x' * 300))\n"
        "    if number % 40 == 30:\n"
        "        assert hand._held, 'nothing failed'\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "        while hand._held: time.sleep(0.01)\n"
        "os._exit(0)\n"
    )
    worker = process(script, tmp_path, "{}")
    worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in range(200)]
    with engine(tmp_path) as (journal, _):
        books = balanced(journal)
    assert (books["captured"], books["dropped"]) == (200, {})


def test_a_file_that_the_disk_does_not_give_holds_up_no_other(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = HandOff(opts(tmp_path))
    hand.returned(return_data(jid(1), "web1"))
    other.returned(return_data(jid(2), "web1"))
    first, _ = files(tmp_path)
    real = os.pread

    def pread(file: int, *args: int) -> bytes:
        if first in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.EIO, "Input/output error")
        return real(file, *args)

    monkeypatch.setattr(intake.os, "pread", pread)
    with engine(tmp_path) as (journal, taking):
        for _ in range(3):
            taking.step()
        assert balanced(journal)["captured"] == 1
        assert "Input/output error" in taking.error
        assert caplog.text.count("cannot be read") == 1
        monkeypatch.undo()
        taking.step()
        assert balanced(journal)["captured"] == 2
        assert taking.error == ""
    other.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_file_that_root_has_not_given_away_yet_is_taken_a_moment_later(tmp_path: Path, hand: HandOff) -> None:
    hand.returned(return_data(jid(1), "web1"))
    (name,) = files(tmp_path)
    path = folder(tmp_path) / spool.FOLDER / name
    os.chown(path, 65533, 65533)
    with engine(tmp_path) as (journal, taking):
        assert journal.pending == 0
        os.chown(path, 0, 0)
        taking.step()
        assert journal.pending == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_file_that_was_named_as_none_of_ours_is_taken_once_it_is_ours(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long root was stopped between the two calls."""
    monkeypatch.setattr(intake, "_FOREIGN_SECONDS", 0.0)
    monkeypatch.setattr(intake, "_TIDY_SECONDS", 0.1)
    hand.returned(return_data(jid(1), "web1"))
    path = folder(tmp_path) / spool.FOLDER / files(tmp_path)[0]
    os.chown(path, 65533, 65533)
    with engine(tmp_path) as (journal, taking):
        for _ in range(50):
            taking.step()
        assert caplog.text.count("is not taken") == 1
        os.chown(path, 0, 0)
        wait_until(lambda: bool(taking.step().events or journal.pending), timeout=10, what="the file")
        assert balanced(journal)["captured"] == 1


def test_a_child_that_another_thread_forks_off_while_a_file_begins_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps a descriptor of the new file that its parent does not know of yet, and with it the lock."""
    real, children, (end, alive) = spool._is_begun, [], os.pipe()

    def forking(file: int, header: bytes) -> bool:
        begun = real(file, header)
        child = os.fork()
        if child == 0:
            os.close(alive)
            os.read(end, 1)
            os._exit(0)
        children.append(child)
        return begun

    monkeypatch.setattr(spool, "_is_begun", forking)
    hand = HandOff(opts(tmp_path, journal_max_bytes=4 * MIB))
    for number in range(30):
        hand.returned(return_data(jid(number), "web1", "x" * 10_000))
    assert len(children) > 2
    with engine(tmp_path) as (journal, taking):
        for _ in range(20):
            taking.step()
        assert balanced(journal)["captured"] == 30
        assert len(files(tmp_path)) == 1
    os.close(alive)
    for child in children:
        os.waitpid(child, 0)
    os.close(end)
    hand.close()


def test_where_no_thread_can_be_started_a_later_return_starts_it(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.05)
    hand.returned(return_data(jid(0), "web1"))
    monkeypatch.setattr(spool, "free_bytes", lambda _: MIB)
    hand._look_at = 0.0
    real, refused = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    for number in range(1, 4):
        hand.returned(return_data(jid(number), "web1"))
    assert refused
    monkeypatch.setattr(spool, "free_bytes", lambda _: 2**40)
    wait_until(lambda: len(spooled(tmp_path)) == 4, timeout=10, what="what was held")


def test_a_process_that_is_out_of_descriptors_hands_over_all_the_same(tmp_path: Path) -> None:
    script = (
        "import resource\n"
        "spool._LOOK_BYTES = 0\n"
        "hand.returned(return_data(jid(0), 'web1'))\n"
        "free = os.open('/', os.O_RDONLY)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "for number in range(1, 200):\n"
        "    hand.returned(return_data(jid(number), 'web1', 'x' * 2000))\n"
        "    assert not hand._held\n"
        "os._exit(0)\n"
    )
    worker = process(script, tmp_path, json.dumps({"journal_max_bytes": 4 * MIB}))
    worker.communicate(timeout=60)
    assert worker.returncode == 0
    with engine(tmp_path) as (journal, _):
        books = balanced(journal)
    assert (books["captured"], books["dropped"]) == (200, {})


@pytest.mark.parametrize("step", ["the file", "the folder"])
def test_a_child_that_another_thread_forks_off_while_a_file_is_closed_closes_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What was closed has left its number to whatever was opened next."""
    hand = HandOff(opts(tmp_path, journal_max_bytes=4 * MIB))
    hand.returned(return_data(jid(1), "web1"))
    real, parent = os.close, os.getpid()
    reads: list[int] = []

    def forking(descriptor: int) -> None:
        real(descriptor)
        if reads or descriptor != closed or os.getpid() != parent:
            return
        mine, others = os.pipe()
        os.dup2(mine, descriptor)  # as if another thread had opened something
        child = os.fork()
        if child == 0:
            os._exit(0 if _is_open(descriptor) else 1)
        reads.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        for each in {mine, others, descriptor}:
            real(each)

    closed = hand._file if step == "the file" else hand._place.spool
    monkeypatch.setattr(os, "close", forking)
    if step == "the file":
        while not reads:
            hand.returned(return_data(jid(2), "web1", "x" * 10_000))
    else:
        hand._place.leave()
    monkeypatch.undo()
    assert reads == [0]
    hand.close()


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_nothing_happens_at_import_and_forks_are_watched_from_the_first_hand_off_on() -> None:
    script = (
        "import os; watched = []; os.register_at_fork = lambda **kwargs: watched.append(kwargs)\n"
        "from salt_mysql_engine import spool\n"
        "ours = lambda: [each for each in watched if spool._after_fork in each.values()]\n"
        "assert not ours()\n"
        "for _ in range(3): spool.HandOff({'cachedir': '/nowhere', 'sock_dir': '/nowhere', 'id': 'm'})\n"
        "assert len(ours()) == 1\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Who reads what was handed over


async def test_what_was_handed_over_is_told_at_once_by_the_engine_and_nobody_else_opens_its_file(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shipping("mysql_jobcache", handed_off=True, listens_in=tmp_path, paused=True):
        monkeypatch.setattr(pending, "sqlite3", None)
        for number in range(100):
            hand.published(jid(number), {"tgt": "*", "fun": "test.ping", "user": "root"}, ["web1", "web2"])
            hand.returned(return_data(jid(number), "web1", "x" * 50_000))
            found = await asyncio.to_thread(Pending(opts(tmp_path)).job, jid(number))
            assert (found.load["Minions"], list(found.returns)) == (["web1", "web2"], ["web1"])
        hand.returned(return_data(jid(7), "large", "x" * 10 * MIB))
        found = await asyncio.to_thread(Pending(opts(tmp_path)).job, jid(7))
        assert found.returns["large"].return_json == '"' + "x" * 10 * MIB + '"'
        jobs = await asyncio.to_thread(Pending(opts(tmp_path)).jobs)
        assert sorted(jobs) == [jid(number) for number in range(100)]
        assert {tuple(job.returns) for job in jobs.values()} == {("web1",), ("web1", "large")}


async def test_the_engine_knows_whether_it_holds_a_job_whole(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff
) -> None:
    load = {"tgt": ["web1"], "tgt_type": "list", "fun": "test.ping", "user": "root"}
    old, new = jid(1), moments.jid_at(time.time() + 60)
    async with shipping("mysql_jobcache", handed_off=True, listens_in=tmp_path, flush_interval=0.05) as ship:
        asked = Pending(opts(tmp_path))
        ship.mysql["mysql.port"] = 1  # nobody listens there
        for job in (old, new):
            hand.published(job, load, ["web1"])
        assert not (await asyncio.to_thread(asked.job, old)).whole, "an earlier engine may have shipped some of it"
        assert (await asyncio.to_thread(asked.job, new)).whole
        await ship.until(lambda: ship.writer.away)
        assert "Can't connect" in (await asyncio.to_thread(_away, asked))
        ship.mysql["mysql.port"] = database.mysql["mysql.port"]
        await ship.settled()
        hand.returned(return_data(new, "web1"))
        assert not (await asyncio.to_thread(asked.job, new)).whole
        assert await asyncio.to_thread(_away, asked) == ""


def _away(asked: Pending) -> str:
    asked.jobs()
    return asked.away


async def test_no_process_waits_for_a_database_for_which_another_has_just_waited(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff
) -> None:
    nobody = {**opts(tmp_path, connect_timeout=1.0), **database.mysql}
    load = {"tgt": ["web1"], "tgt_type": "list", "fun": "test.ping", "user": "root"}
    hand.published(jid(1), load, ["web1"])
    asks = [returner("mysql_jobcache.get_load", jid(1)), returner("mysql_jobcache.get_jid", jid(1))]
    async with shipping("mysql_jobcache", handed_off=True, listens_in=tmp_path, paused=True):
        database.server.freeze()
        try:
            first = await asyncio.to_thread(ask, asks, opts=nobody)
            second = await asyncio.to_thread(ask, asks, opts=nobody)
        finally:
            database.server.thaw()
    for answers in (first, second):
        assert values(answers)[0]["Minions"] == ["web1"]
    assert sum(answer.seconds for answer in first) > 0.9
    assert sum(answer.seconds for answer in second) < 0.5


@pytest.mark.parametrize("how", ["none", "hangs"])
async def test_without_an_engine_that_answers_the_files_are_read(tmp_path: Path, hand: HandOff, how: str) -> None:
    hand.returned(return_data(jid(1), "web1"))
    with engine(tmp_path):
        pass
    hand.returned(return_data(jid(2), "web1"))
    with socket.socket(socket.AF_UNIX) as sock:
        if how == "hangs":
            sock.bind(str(socket_path(opts(tmp_path))))
            sock.listen(5)
        began = time.monotonic()
        asked = Pending(opts(tmp_path))
        for number in (1, 2):
            assert list(asked.job(jid(number)).returns) == ["web1"]
        assert sorted(Pending(opts(tmp_path)).jobs()) == [jid(1), jid(2)]
        assert time.monotonic() - began < 2.0, "it is waited for once"
    pending._silent_until.clear()


def test_a_file_that_becomes_shorter_while_it_is_read_ends_no_reader(tmp_path: Path, hand: HandOff) -> None:
    """A write that failed on a full disk is cut off again; whoever has the file mapped is killed by the next look."""
    hand.returned(return_data(jid(1), "web1"))
    path = folder(tmp_path) / spool.FOLDER / files(tmp_path)[0]
    end = path.stat().st_size
    script = (
        "from salt_mysql_engine import pending\n"
        "place = os.open(sys.argv[3], os.O_RDONLY)\n"
        "until = time.monotonic() + 1.5\n"
        "while time.monotonic() < until: pending._records_of(place, sys.argv[4], jid(99))\n"
        "assert len(pending._records_of(place, sys.argv[4], jid(1))) == 1\n"
    )
    reader = process(script, tmp_path, "{}", path.parent, path.name)
    while reader.poll() is None:
        os.truncate(path, end + 8 * MIB)
        os.truncate(path, end)
    reader.communicate()
    assert reader.returncode == 0


async def test_what_the_engine_takes_while_the_spool_is_read_beside_it_is_found(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that the spool holds more, since the disk was full, and a moment later there was room."""
    hand.returned(return_data(jid(1), "web1"))
    with engine(tmp_path) as (journal, taking):
        teller = Teller(journal, _at_once, taking, _at_once, None, handed_off=True)  # type: ignore[arg-type]
        monkeypatch.setattr(Teller, "_away", lambda _: "")
        hand.returned(return_data(jid(1), "web2"))
        hand.close()
        real = Intake.drain

        def full(taking: Intake) -> Taken:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(Intake, "drain", full)
        loop = asyncio.new_event_loop()
        asked = Pending(opts(tmp_path))

        def ask_engine(verb: str, **arguments: Any) -> Any:
            answer = loop.run_until_complete(getattr(teller, verb)(**arguments))
            real(taking)
            real(taking)
            return answer

        monkeypatch.setattr(asked, "_ask_engine", ask_engine)
        found = await asyncio.to_thread(asked.job, jid(1))
        assert files(tmp_path) == []
        loop.close()
    assert sorted(found.returns) == ["web1", "web2"]


async def _at_once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
