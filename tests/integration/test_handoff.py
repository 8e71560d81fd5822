"""The hand-off: what the master's own processes put into the journal, beside the engine and without it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import handoff, journalfile, salvage
from salt_mysql_engine.handoff import HandOff
from tests.support.mariadb import wait_until
from tests.support.scratch import Scratch
from tests.support.shipping import (
    MASTER,
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
        "from salt_mysql_engine import handoff\n"
        "from tests.integration.test_handoff import *\n"
        "hand = handoff.of(opts(Path(sys.argv[1]), **json.loads(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", start + script, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs)


def pending(cachedir: Path) -> int:
    """How many events the journal's file holds."""
    with contextlib.closing(sqlite3.connect(handed(cachedir))) as db:
        return int(db.execute("SELECT COUNT(*) FROM events").fetchone()[0])


def handed(cachedir: Path) -> Path:
    return journalfile.folder(str(cachedir)) / "journal.sqlite"


@pytest.fixture
def hand(tmp_path: Path) -> HandOff:
    """The way of this process."""
    return HandOff(opts(tmp_path))


@contextlib.contextmanager
def hung_process(cachedir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that stopped in the middle of writing to the journal."""
    script = (
        "import sqlite3\n"
        f"db = sqlite3.connect({str(handed(cachedir))!r}, isolation_level=None); db.execute('BEGIN IMMEDIATE')\n"
        "print('begun', flush=True); sys.stdin.readline()\n"
    )
    hung = process(script, cachedir, "{}")
    assert hung.stdout is not None
    assert hung.stdout.readline() == "begun\n"
    hung.send_signal(signal.SIGSTOP)
    try:
        yield hung
    finally:
        hung.kill()
        hung.communicate()


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
        await ship.until(lambda: pending(tmp_path) == 0)
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
        books = await ship.drain()
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
        await ship.drain()
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
        await ship.drain()
        hand.minions(jid(1), ["late"])
        hand.minions(jid(2), ["nobody knows this job"])
        await ship.until(lambda: pending(tmp_path) == 2)
        await ship.drain()
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
        books = await ship.drain()
    assert (books["written"], books["ignored"]) == (1, {"too_long": 1})
    (row,) = database.rows("salt_events")
    assert (row["tag"], json.loads(row["data"])) == (f"salt/job/{jid(1)}/ret/web1", data)
    assert not database.rows("salt_returns")


async def test_a_job_that_asked_not_to_be_kept_is_not(database: Scratch, shipping: Make, hand: HandOff) -> None:
    hand.keep_out(jid(1))
    hand.returned(return_data(jid(1), "web1"))
    hand.returned(return_data(jid(2), "web1"))
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        await ship.drain()
    assert [row["jid"] for row in database.rows("salt_returns")] == [jid(2)]


def test_the_marks_of_such_jobs_do_not_stay_for_ever(tmp_path: Path, hand: HandOff) -> None:
    hand.keep_out(jid(1))
    hand.keep_out(jid(2))
    marks = handed(tmp_path).parent / "nocache"
    os.utime(marks / jid(1), (1, 1))
    handoff.forget_old(opts(tmp_path))
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
    assert not handed(tmp_path).exists()


def test_nobody_waits_for_a_process_that_hangs_with_the_file(tmp_path: Path, hand: HandOff) -> None:
    hand.returned(return_data(jid(0), "web1"))
    with hung_process(tmp_path):
        began = time.monotonic()
        hand.returned(return_data(jid(1), "web1"))
        first = time.monotonic() - began
        began = time.monotonic()
        for number in range(2, 500):
            hand.returned(return_data(jid(number), "web1"))
        rest = time.monotonic() - began
    assert 0.2 < first < 1.0, "the file was not held"
    assert rest < 0.5
    wait_until(lambda: pending(tmp_path) == 500, timeout=30, what="what was held in memory")
    with contextlib.closing(sqlite3.connect(handed(tmp_path))) as db:
        assert [row[0] for row in db.execute("SELECT jid FROM events ORDER BY seq")] == [jid(n) for n in range(500)]


def test_what_has_no_room_in_memory_is_counted(tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "_MEMORY_BYTES", 100_000)
    hand.returned(return_data(jid(0), "web1"))
    with hung_process(tmp_path):
        for number in range(1, 41):
            hand.returned(return_data(jid(number), "web1", "x" * 10_000))

    def counters() -> dict[str, int]:
        with contextlib.closing(sqlite3.connect(handed(tmp_path))) as db:
            return dict(db.execute("SELECT name, value FROM counters"))

    wait_until(lambda: counters().get("captured") == 41, timeout=30, what="the books")
    dropped = counters()["dropped.memory_full"]
    assert 25 < dropped < 35
    assert pending(tmp_path) == 41 - dropped


def test_a_full_journal_takes_no_more_and_counts_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hand = HandOff(opts(tmp_path, journal_max_bytes=MIB))
    for number in range(300):
        hand.returned(return_data(jid(number), "web1", "x" * 10_000))
    assert 50 < pending(tmp_path) < 110
    with contextlib.closing(sqlite3.connect(handed(tmp_path))) as db:
        counters = dict(db.execute("SELECT name, value FROM counters"))
    assert counters["captured"] == 300
    assert counters["dropped.journal_full"] == 300 - pending(tmp_path)
    assert len([record for record in caplog.records if "journal_max_bytes" in record.getMessage()]) == 1


async def test_the_engine_makes_room_for_what_is_handed_over(
    shipping: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = HandOff(opts(tmp_path, journal_max_bytes=MIB, journal_full="drop_oldest"))
    async with shipping("mysql_jobcache", handed_off=True, paused=True) as ship:
        ship.journal.caps = ship.journal.caps._replace(max_bytes=MIB, drop_oldest=True)
        for number in range(300):
            hand.returned(return_data(jid(number), "web1", "x" * 10_000))
        await ship.until(lambda: pending(tmp_path) < 110)
        books = await ship.books()
    assert books["dropped"]["journal_full"] == 300 - books["pending"]
    with contextlib.closing(sqlite3.connect(handed(tmp_path))) as db:
        assert db.execute("SELECT MAX(jid) FROM events").fetchone() == (jid(299),)


async def test_a_file_that_was_set_aside_is_left_for_the_new_one(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff
) -> None:
    for number in range(50):
        hand.returned(return_data(jid(number), "web1"))
    async with shipping("mysql_jobcache", handed_off=True, paused=True) as ship:
        await ship._in_journal(ship.journal._begin_anew)
        for number in range(50, 100):
            hand.returned(return_data(jid(number), "web1"))
    assert ship.journal.salvaged
    async with shipping("mysql_jobcache", handed_off=True) as ship:
        await ship.drain()
    assert {row["jid"] for row in database.rows("salt_returns")} == {jid(number) for number in range(100)}


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["before", "while"])
async def test_what_is_handed_over_while_a_file_is_replaced_is_in_the_new_one(
    database: Scratch, shipping: Make, hand: HandOff, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """After the new one was made of the old one, and before it takes that one's place."""
    monkeypatch.setattr(handoff, "_RETRY_SECONDS", 0.05)
    hand.returned(return_data(jid(1), "web1"))
    copy, insert = salvage.copy, journalfile.insert

    def copied(*args: Any) -> salvage.Report:
        report = copy(*args)
        if moment == "before":
            hand.returned(return_data(jid(2), "web1"))
        return report

    async with shipping("mysql_jobcache", handed_off=True, flush_interval=0.05) as ship:
        if moment == "before":
            monkeypatch.setattr(salvage, "copy", copied)
            await ship._in_journal(ship.journal._begin_anew)
        else:  # the copy is made between the insert and its commit

            def inserted(*args: Any) -> None:
                insert(*args)
                monkeypatch.setattr(journalfile, "insert", insert)
                ship.journal._begin_anew()

            monkeypatch.setattr(journalfile, "insert", inserted)
            await ship._in_journal(hand.returned, return_data(jid(2), "web1"))
        await ship.until(lambda: hand._thread is None)  # it holds nothing in memory
        books = await ship.settled()
    assert (books["captured"], books["written"]) == (2, 2)
    assert {row["jid"] for row in database.rows("salt_returns")} == {jid(1), jid(2)}


@pytest.mark.faults
async def test_a_cache_that_is_deleted_under_the_master_takes_nothing_along(
    database: Scratch, shipping: Make, tmp_path: Path, hand: HandOff
) -> None:
    """`rm -rf` of all that Salt caches: the engine and the other processes find together again, in one file."""
    async with shipping("mysql_jobcache", handed_off=True, flush_interval=0.05) as ship:
        ship.mysql["mysql.port"] = 1  # nobody listens there
        for number in range(50):
            hand.returned(return_data(jid(number), "web1"))
        await ship.until(lambda: ship.writer.retries > 0)
        shutil.rmtree(tmp_path / "mysql_jobcache")
        for number in range(50, 100):
            hand.returned(return_data(jid(number), "web1"))
        await ship.until(lambda: pending(tmp_path) == 100)
        for number in range(100, 150):
            hand.returned(return_data(jid(number), "web1"))
        ship.mysql["mysql.port"] = database.mysql["mysql.port"]
        books = await ship.settled()
    assert (books["captured"], books["written"]) == (150, 150)
    assert {row["jid"] for row in database.rows("salt_returns")} == {jid(number) for number in range(150)}
    assert [path.name for path in (tmp_path / "mysql_jobcache").glob("*corrupt*")] == []


def test_a_forked_child_opens_the_file_for_itself(tmp_path: Path) -> None:
    script = (
        "hand.returned(return_data(jid(1), 'parent'))\n"
        "if os.fork() == 0:\n"
        "    handoff.of(opts(Path(sys.argv[1]))).returned(return_data(jid(1), 'child'))\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "hand.returned(return_data(jid(2), 'parent'))\n"
    )
    done = process(script, tmp_path, "{}")
    done.communicate(timeout=60)
    assert done.returncode == 0
    with contextlib.closing(sqlite3.connect(handed(tmp_path))) as db:
        rows = db.execute("SELECT jid, minion FROM events ORDER BY seq").fetchall()
    assert rows == [(jid(1), "parent"), (jid(1), "child"), (jid(2), "parent")]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_call_waits_for_a_disk(tmp_path: Path) -> None:
    HandOff(opts(tmp_path)).returned(return_data(jid(0), "web1"))
    trace = tmp_path / "trace"
    script = "print('ready', flush=True); sys.stdin.readline()\n"
    script += "for number in range(1, 3001):\n    hand.returned(return_data(jid(number), 'web1'))\n"
    script += "print('done', flush=True); sys.stdin.readline()\n"
    worker = process(script, tmp_path, "{}")
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    calls = "trace=fsync,fdatasync,msync,sync_file_range,pwrite64"
    with subprocess.Popen(["strace", "-qq", "-f", "-e", calls, "-o", str(trace), "-p", str(worker.pid)]) as strace:
        wait_until(lambda: trace.exists() and _is_traced(worker.pid), timeout=30, what="strace")
        worker.stdin.write("go\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "done\n"
        strace.terminate()
    worker.kill()
    worker.communicate()
    assert pending(tmp_path) == 3001
    lines = trace.read_text().splitlines()
    assert [line for line in lines if "pwrite64" in line], "nothing was traced"
    assert not [line for line in lines if "sync" in line]


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text()


def test_without_an_engine_the_write_ahead_log_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "_WAL_BYTES", 2 * MIB)
    hand = HandOff(opts(tmp_path))
    for number in range(2000):
        hand.returned(return_data(jid(number), "web1"))
        if number % 200 == 199:
            wait_until(lambda: journalfile.wal_bytes(handed(tmp_path)) < 3 * MIB, timeout=30, what="the log")
    assert pending(tmp_path) == 2000


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
    HandOff(opts(cachedir)).returned(return_data(jid(1), "web1"))
    made = [handed(cachedir).parent, *handed(cachedir).parent.iterdir()]
    assert {path.name for path in made} >= {"mysql_jobcache", "journal.sqlite", "journal.sqlite-wal"}
    assert {(path.stat().st_uid, path.stat().st_mode & 0o077) for path in made} == {(65534, 0)}
