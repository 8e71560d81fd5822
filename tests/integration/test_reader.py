"""Reading from a real server: the answers of Salt's local cache, one connection that survives what servers do."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import history, pending, pool, schema
from salt_mysql_engine.answers import Answers
from salt_mysql_engine.errors import DatabaseError, OperatorNeeded, ServerUnavailable
from salt_mysql_engine.reader import Reader, as_cached
from tests.support.asking import ask, returner, values
from tests.support.mariadb import LOOPBACK, MariaDB, free_port, wait_until
from tests.support.oldtables import MAKERS
from tests.support.scratch import Scratch, scratch
from tests.support.shipping import (
    MASTER,
    STAMP,
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
CONNECT_SECONDS = 0.5


@pytest.fixture(autouse=True)
def _fresh(own_connections: None) -> None:
    """Each test has its own connections, and its own warnings."""
    pending._said.clear()


def master(database: Scratch, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """The opts of a master whose engine's journal is where `shipping("mysql_jobcache")` has it."""
    engine = {"mysql_jobcache": {"connect_timeout": CONNECT_SECONDS}}
    return {**database.mysql, "id": MASTER, "cachedir": str(tmp_path), "engines": [engine], **options}


def connection_id(reader: Reader) -> int:
    ((number,),) = reader.query("SELECT CONNECTION_ID()")
    return int(number)


def make_tables(database: Scratch) -> None:
    for ddl in schema.statements().values():
        database.sql(ddl)


def tag(data: dict[str, Any]) -> str:
    return f"salt/job/{data['jid']}/ret/{data['id']}"


def job_of(data: dict[str, Any]) -> bytes:
    return body(tag(data), data)


EVENTS = [
    published(jid(1), ["web2", "web1", "web3"]),
    returned(jid(1), "web1", {"a": [1, None, "grün 🧂"]}),
    returned(jid(1), "web2", "no", success=False, retcode=3),
    published(jid(2), ["web1"], fun="state.apply", arg=["app", {"__kwarg__": True, "test": True}], tgt=["web1"]),
    returned(jid(2), "web1", {"s": {"result": True}}, fun="state.apply", out="highstate"),
    job_of(call_data(jid(3), "web1", "called", fun="test.arg", fun_args=["x"], arg=["x"])),
    body(f"salt/run/{jid(4)}/ret", master_data(jid(4), "runner.manage.up", {"web1": {"up": True}})),
    published(jid(5), ["web1"], fun=["test.ping", "test.arg"], arg=[[], ["x"]]),
    job_of(
        return_data(
            jid(5), "web1", {"test.ping": True, "test.arg": 1}, fun=["test.ping", "test.arg"], fun_args=[[], ["x"]],
            success={"test.ping": True, "test.arg": True}, retcode={"test.ping": 0, "test.arg": 0},
        )
    ),
    published(jid(6), ["web1"]),
]  # fmt: skip


@pytest.mark.parametrize("shipped", [True, False], ids=["in MySQL", "in the journal"])
async def test_answers_are_those_of_salts_local_cache(
    database: Scratch, shipping: Make, tmp_path: Path, shipped: bool
) -> None:
    cache = Cache(tmp_path)
    cache.accept(*EVENTS)
    for number, minions in ((3, ["web1"]), (4, [])):  # whom the master finds for jobs that nobody published
        cache.job(jid(number), minions=minions)
    async with shipping("mysql_jobcache", cachedir=tmp_path, paused=not shipped) as ship:
        await (ship.ship(*EVENTS) if shipped else ship.take(*EVENTS))
        jids = [jid(number) for number in range(1, 8)]
        asks = [returner(f"{name}.get_jid", each) for name in ("local_cache", "mysql_jobcache") for each in jids]
        asks += [returner(f"{name}.get_load", each) for name in ("local_cache", "mysql_jobcache") for each in jids]
        asks += [returner(f"{name}.get_jids") for name in ("local_cache", "mysql_jobcache")]
        asks += [returner(f"{name}.get_jids_filter", 3) for name in ("local_cache", "mysql_jobcache")]
        found = values(await asyncio.to_thread(ask, asks, opts=master(database, tmp_path)))
    local, ours = found[:7], found[7:14]
    assert ours == local
    assert ours[6] == {}
    for its, mine in zip(found[14:21], found[21:28], strict=True):
        for key in ("tgt", "fun", "arg", "user", "kwargs", "jid"):
            assert mine.get(key) == its.get(key), (key, mine)
    assert [mine.get("Minions") for mine in found[21:28]] == [
        ["web1", "web2", "web3"], ["web1"], ["web1"], None, ["web1"], ["web1"], None
    ]  # fmt: skip
    assert list(found[29]) == sorted(found[28]) == jids[:6]
    assert {key: {**job, "Metadata": None} for key, job in found[29].items()} == {
        key: {**job, "Metadata": None} for key, job in found[28].items()
    }
    assert [job["JID"] for job in found[31]] == [job["JID"] for job in found[30]] == jids[3:6]


async def test_what_is_in_the_journal_and_what_is_in_mysql_are_one_answer(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    answers = Answers(master(database, tmp_path, master_job_cache="mysql_jobcache"))
    async with shipping("mysql_jobcache") as ship:
        await ship.ship(published(jid(1), ["web1"]), returned(jid(1), "web1", "stored"), returned(jid(2), "web9"))
    async with shipping("mysql_jobcache", paused=True) as ship:
        await ship.take(
            published(jid(1), ["web2"], tgt_type="list", tgt=["web2"]),  # as 3008 publishes the parts of a batch
            returned(jid(1), "web1", "late"),
            returned(jid(1), "web2", "pending"),
            published(jid(3), ["web1"], fun="saltutil.find_job"),
            published(jid(4), ["web3"]),
            returned(jid(4), "web3", "pending", fun="test.ping"),
        )
        assert answers.load(jid(1))["Minions"] == ["web1", "web2"]
        assert {key: its["return"] for key, its in answers.returns(jid(1)).items()} == {
            "web1": "stored",
            "web2": "pending",
        }
        assert [job for job, _ in answers.jobs()] == [jid(1), jid(2), jid(4)]
        assert [job for job, _ in answers.newest_jobs(2)] == [jid(2), jid(4)]
        assert answers.minions() == ["web1", "web2", "web3", "web9"]
        last = answers.last_of_function("test.ping")
        assert {minion: its["jid"] for minion, its in last.items()} == {
            "web1": jid(1), "web2": jid(1), "web3": jid(4), "web9": jid(2)
        }  # fmt: skip
        assert answers.endtime(jid(4)) == datetime.datetime.fromisoformat(STAMP)


async def test_a_whole_return_in_the_journal_is_told_for_a_trimmed_one_in_mysql(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    async with shipping("mysql_jobcache") as ship:
        await ship.ship(returned(jid(1), "web1", {"a": "VALUE_TRIMMED"}))
    async with shipping("mysql_jobcache", paused=True) as ship:
        await ship.take(returned(jid(1), "web1", {"a": "whole"}))
        answers = Answers(master(database, tmp_path, master_job_cache="mysql_jobcache"))
        assert answers.returns(jid(1))["web1"]["return"] == {"a": "whole"}


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[MariaDB]:
    with MariaDB(tmp_path / "own") as server:
        yield server


async def test_with_mysql_away_the_journal_answers_and_a_warning_says_so_once(
    shipping: Make, own_server: MariaDB, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with scratch(own_server) as database:
        opts = master(database, tmp_path, master_job_cache="mysql_jobcache")
        own_server.stop()
        async with shipping("mysql_jobcache", paused=True) as ship:
            await ship.take(published(jid(1), ["web1"]), returned(jid(1), "web1", "kept"))
            answers = Answers(opts)
            assert answers.load(jid(1))["Minions"] == ["web1"]
            assert answers.returns(jid(1))["web1"]["return"] == "kept"
            assert [job for job, _ in answers.jobs()] == [job for job, _ in answers.newest_jobs(5)] == [jid(1)]
            assert (answers.load(jid(2)), answers.returns(jid(2)), answers.minions()) == ({}, {}, ["web1"])
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING and "pending" in record.name]
    assert len(warnings) == 1
    assert "does not answer" in warnings[0].message
    assert warnings[0].exc_info is None


@pytest.mark.parametrize("idle", [True, False], ids=["with a connection", "without"])
def test_a_frozen_server_costs_the_connect_timeout_once(database: Scratch, tmp_path: Path, idle: bool) -> None:
    make_tables(database)
    reader = Reader(master(database, tmp_path))
    if idle:
        assert reader.minions() == []
        (its,) = pool._pools.values()
        its._idle_since -= 10  # so long ago that it is asked first whether the server is there
    database.server.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(ServerUnavailable, match="timed out"):
            reader.minions()
        assert CONNECT_SECONDS * 0.9 < time.monotonic() - began < CONNECT_SECONDS + 1
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(ServerUnavailable, match="timed out"):
                Reader(master(database, tmp_path)).minions()
        assert time.monotonic() - began < 0.2
    finally:
        database.server.thaw()
    (its,) = pool._pools.values()
    its._closed_until = 0.0  # half a minute later
    assert reader.minions() == []


def test_a_server_that_is_away_keeps_nothing_of_its_callers_alive(database: Scratch, tmp_path: Path) -> None:
    class Callers:
        """What a caller has in its hands."""

    def call() -> weakref.ref[Callers]:
        mine = Callers()
        with contextlib.suppress(ServerUnavailable):
            Reader(master(database, tmp_path, **{"mysql.port": 1})).minions()
        return weakref.ref(mine)

    asked = call()
    gc.collect()
    assert asked() is None  # Salt's loaders, for one, must be gone before the interpreter is


def test_one_connection_serves_all_questions(database: Scratch, tmp_path: Path) -> None:
    make_tables(database)
    first = connection_id(Reader(master(database, tmp_path)))
    for _ in range(5):
        assert connection_id(Reader(master(database, tmp_path))) == first
    with pytest.raises(OperatorNeeded, match=r"no_such"):
        Reader(master(database, tmp_path)).query("SELECT * FROM no_such")
    assert connection_id(Reader(master(database, tmp_path))) == first


@pytest.mark.parametrize("idle_seconds", [0, 10])
def test_a_connection_that_the_server_closed_is_replaced_without_a_word(
    database: Scratch, tmp_path: Path, idle_seconds: int
) -> None:
    reader = Reader(master(database, tmp_path))
    for _ in range(3):
        (its,) = pool._pools.values()
        old = connection_id(reader)
        database.server.sql(f"KILL {old}")
        wait_until(
            lambda old=old: not database.server.sql(f"SELECT 1 FROM information_schema.PROCESSLIST WHERE ID = {old}"),
            timeout=10,
            what="the connection's end",
        )
        its._idle_since -= idle_seconds
        assert connection_id(reader) != old


def test_a_server_that_restarted_is_read_from_at_once(own_server: MariaDB, tmp_path: Path) -> None:
    with scratch(own_server) as database:
        make_tables(database)
        reader = Reader(master(database, tmp_path))
        assert reader.minions() == []
        own_server.restart()
        assert reader.minions() == []


def test_a_fork_takes_a_connection_of_its_own(database: Scratch, tmp_path: Path) -> None:
    reader = Reader(master(database, tmp_path))
    ours = connection_id(reader)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            inherited = connection_id(Reader(master(database, tmp_path)))
            os.write(write, str(inherited).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        theirs = int(file.read())
    os.waitpid(child, 0)
    assert theirs != ours
    assert connection_id(reader) == ours  # it still is ours, and open


def test_threads_ask_at_the_same_time_and_leave_one_connection(database: Scratch, tmp_path: Path) -> None:
    make_tables(database)
    reader = Reader(master(database, tmp_path))
    began = time.monotonic()
    threads = [threading.Thread(target=reader.query, args=("SELECT SLEEP(0.5)",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 3
    user = database.mysql["mysql.user"]
    wait_until(
        lambda: len(database.server.sql("SELECT 1 FROM information_schema.PROCESSLIST WHERE USER = %s", (user,))) == 1,
        timeout=10,
        what="the connections' end",
    )


def test_the_next_host_is_read_from_when_the_first_is_away(database: Scratch, tmp_path: Path) -> None:
    make_tables(database)
    opts = master(database, tmp_path, **{"mysql.host": ["127.0.0.2", "no-such-host.invalid", LOOPBACK]})
    assert Reader(opts).minions() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mysql.pass": "wrong"}, r"Access denied.*check mysql\.user and mysql\.pass"),
        ({"mysql.db": "nowhere"}, r"to database 'nowhere'.*grant the user"),
        ({"mysql.port": free_port()}, r"Connection refused"),
    ],
)
def test_what_is_wrong_with_a_connection_is_said(
    database: Scratch, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(DatabaseError, match=said):
        Reader(master(database, tmp_path, **change)).minions()


def test_a_database_without_tables_is_said_to_have_none(database: Scratch, tmp_path: Path) -> None:
    with pytest.raises(OperatorNeeded, match=r"jids.*doesn't exist.*schema: create"):
        Reader(master(database, tmp_path)).load(jid(1))


GREETING = (
    b"\x0a5.7.0-stranger\0" + bytes(4) + b"saltsalt\0"
    b"\x00\xa2\x2d\x02\x00\x08\x00\x15" + bytes(10) + b"saltsaltsalt\0mysql_native_password\0"
)  # fmt: skip


@pytest.mark.parametrize("nonsense", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", GREETING])
async def test_a_stranger_learns_no_password_and_is_an_error(tmp_path: Path, nonsense: bytes) -> None:
    heard = b""

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        with contextlib.closing(writer):
            if nonsense is not GREETING:
                writer.write(nonsense)
                return
            writer.write(len(GREETING).to_bytes(3, "little") + b"\0" + GREETING)
            size = int.from_bytes((await reader.readexactly(4))[:3], "little")
            await reader.readexactly(size)
            switch = b"\xfemysql_clear_password\0"
            writer.write(len(switch).to_bytes(3, "little") + b"\2" + switch)
            heard = await reader.read()

    async with await asyncio.start_server(stranger, LOOPBACK, 0) as server:
        port = server.sockets[0].getsockname()[1]
        opts = {
            "mysql.host": LOOPBACK,
            "mysql.port": port,
            "mysql.pass": "TOPSECRET",
            "cachedir": str(tmp_path),
            "id": "m",
        }
        assert await asyncio.to_thread(Answers(opts).load, jid(1)) == {}
    assert heard == b""


HOSTILE = [
    "",
    "x",
    "' OR 1=1 --",
    "\\",
    "%",
    "_",
    "../..",
    "\0",
    "\ud800",
    "a" * 10_000,
    "🧂",
    "') UNION SELECT 1,2 -- ",
]


async def test_whatever_is_asked_for_is_data(database: Scratch, shipping: Make, tmp_path: Path) -> None:
    async with shipping() as ship:
        await ship.ship(*EVENTS)
    for sql_mode in ("", "NO_BACKSLASH_ESCAPES,ANSI_QUOTES"):
        with database.globally(sql_mode=sql_mode):
            pool._pools.clear()
            answers = Answers(master(database, tmp_path))
            for text in HOSTILE:
                assert (answers.load(text), answers.returns(text), answers.last_of_function(text)) == ({}, {}, {})
                assert answers.endtime(text) is None
    assert database.count("salt_returns") == 6


def fill_old(database: Scratch) -> None:
    """Rows as saltext.mysql writes them; of a table without keys some of them twice."""
    for number in range(1, 6):
        fun = "saltutil.find_job" if number == 4 else "test.ping"
        load = {
            "cmd": "publish",
            "jid": jid(number),
            "tgt": "*",
            "tgt_type": "glob",
            "fun": fun,
            "arg": [],
            "user": "bob",
        }
        database.sql("INSERT INTO jids VALUES (%s, %s)", jid(number), json.dumps(load))
        for minion in ("web1", "web2"):
            for value in ("first", "second") if number == 2 else ("first",):
                ret = return_data(jid(number), minion, value, fun=fun)
                database.sql(
                    "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) "
                    "VALUES (%s, %s, %s, %s, '1', %s)",
                    fun, jid(number), json.dumps(value), minion, json.dumps(ret),
                )  # fmt: skip


ODD_VALUES = {
    "plain": ["true", '"gr\u00fcn \U0001f9c2"', "[1, null]"],
    "with zero bytes": ["true", '"a\0b"', '"\0"', "\0"],
    "as zero bytes alone": ["", "\0", ""],
    "long": [json.dumps("x" * 3_000_000), json.dumps("\u00fc" * 1_500_000)],
    "one": ["true"],
}


@pytest.mark.parametrize("values_of", ODD_VALUES)
@pytest.mark.parametrize("charset", ["utf8mb4", "latin1", "utf8mb3", "utf16"])
@pytest.mark.parametrize("ids", [["web1", "web2", "web3"], ["", "a\0b", "\u00fc"]], ids=["ids", "odd ids"])
def test_returns_of_any_text_are_those_of_their_rows(
    database: Scratch, tmp_path: Path, values_of: str, charset: str, ids: list[str]
) -> None:
    make_tables(database)
    database.sql(f"ALTER TABLE salt_returns MODIFY full_ret LONGTEXT CHARACTER SET {charset} NOT NULL")
    stored = [value for value in ODD_VALUES[values_of] if charset in ("utf8mb4", "utf16") or "\U0001f9c2" not in value]
    rows = dict(zip(ids, (f'{{"return": {value}}}' for value in stored), strict=False))
    for minion, text in rows.items():
        database.sql(
            "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) VALUES ('f', %s, '', %s, '1', %s)",
            jid(1),
            minion,
            text,
        )
    reader = Reader(master(database, tmp_path))
    assert reader.returns(jid(1)) == {minion: as_cached(text) for minion, text in rows.items()}
    assert reader.returns(jid(2)) == {}


@pytest.mark.parametrize("style", MAKERS)
def test_tables_of_an_older_shape_are_read_as_they_are(database: Scratch, tmp_path: Path, style: str) -> None:
    MAKERS[style](database)
    fill_old(database)
    if style == "2014":  # several rows of one job, the one of the publish in the middle
        for load in ({"id": "web1", "tgt": "web1"}, {"id": "web2", "tgt": "web2"}):
            database.sql("INSERT INTO jids VALUES (%s, %s)", jid(3), json.dumps({"fun": "x", **load}))
    answers = Answers(master(database, tmp_path))
    assert (answers.load(jid(3))["tgt"], answers.load(jid(3))["user"]) == ("*", "bob")
    assert {minion: its["return"] for minion, its in answers.returns(jid(2)).items()} == {
        "web1": "first",
        "web2": "first",
    }
    assert [job for job, _ in answers.jobs()] == [jid(number) for number in range(1, 6)]
    assert [job for job, _ in answers.newest_jobs(2, skip="saltutil.find_job")] == [jid(3), jid(5)]
    assert {minion: its["jid"] for minion, its in answers.last_of_function("test.ping").items()} == {
        "web1": jid(5),
        "web2": jid(5),
    }
    assert answers.minions() == ["web1", "web2"]
    assert (answers.endtime(jid(2)) is None) is (style == "2014")
    assert (answers.endtimes("") == {}) is (style == "2014")


def test_a_job_whose_rows_are_on_two_pages_is_one_job(database: Scratch, tmp_path: Path) -> None:
    """Tables without a key, and the row of its publish on the other page."""
    MAKERS["2014"](database)
    synthesised = {"id": "web1", "tgt": "web1", "fun": "x"}
    published = {"cmd": "publish", "tgt": "*", "fun": "x", "user": "bob"}
    find_job = {"tgt": "*", "fun": "saltutil.find_job", "user": "bob"}
    loads = [(jid(n), find_job) for n in range(1, 500)] + [(jid(500), each) for each in (synthesised, published)]
    loads += [(jid(n), find_job) for n in range(501, 511)]
    values_of = [value for job, load in loads for value in (job, json.dumps(load))]
    database.sql("INSERT INTO jids VALUES " + ", ".join(["(%s, %s)"] * len(loads)), *values_of)
    answers = Answers(master(database, tmp_path))
    assert [job for job, _ in answers.jobs()] == [jid(n) for n in range(1, 511)]
    assert dict(answers.jobs())[jid(500)]["user"] == "bob"
    ((job, load),) = answers.newest_jobs(1, skip="saltutil.find_job")
    assert (job, load.get("user")) == (jid(500), "bob")


async def test_find_job_is_left_out_also_where_nobody_filled_fun_in(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    async with shipping(skip_functions=[]) as ship:
        await ship.ship(*(published(jid(number), ["web1"], fun="saltutil.find_job") for number in range(10, 800)))
        await ship.ship(*(published(jid(number), ["web1"]) for number in range(5)))
    database.sql("UPDATE jids SET fun = NULL WHERE jid > %s", jid(400))
    answers = Answers(master(database, tmp_path))
    assert [job for job, _ in answers.newest_jobs(3, skip="saltutil.find_job")] == [jid(2), jid(3), jid(4)]
    assert [job for job, _ in answers.newest_jobs(2)] == [jid(798), jid(799)]
    assert answers.newest_jobs(0) == answers.newest_jobs(-1) == []
    assert len(list(answers.jobs())) == 795  # more than a page


def test_numbers_of_jobs_that_are_none_get_an_empty_answer(database: Scratch, tmp_path: Path) -> None:
    make_tables(database)
    asks = [returner("mysql_jobcache.get_jids_filter", count) for count in (0, -1, "5 OR 1", None, True, 2.5)]
    assert values(ask(asks, opts=master(database, tmp_path))) == [[]] * len(asks)


async def test_the_end_of_a_job_is_told_as_salt_tells_times(database: Scratch, shipping: Make, tmp_path: Path) -> None:
    late = STAMP.replace(".123456", ".654321")
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1"), returned(jid(1), "web2", _stamp=late), published(jid(2), ["web1"]))
    opts = master(database, tmp_path, job_cache_store_endtime=True)
    end, none, jobs = values(
        ask(
            [
                returner("mysql_jobcache.get_endtime", jid(1)),
                returner("mysql_jobcache.get_endtime", jid(2)),
                returner("mysql_jobcache.get_jids"),
            ],
            opts=opts,
        )
    )
    assert (end, none) == ("2026, Mar 29 01:30:00.654321", False)
    assert (jobs[jid(1)]["EndTime"], "EndTime" in jobs[jid(2)]) == (end, False)


def test_a_row_that_is_no_job_of_salts_hides_no_other(database: Scratch, tmp_path: Path) -> None:
    make_tables(database)
    good = json.dumps({"fun": "test.ping", "tgt": "*", "arg": []})
    loads = [good, "", "{", "[]", '{"arg": 5}', '{"kwargs": 5}', '{"Minions": 5}', '{"fun": ["a"], "arg": null}']
    for number, load in enumerate(loads):
        database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", jid(number), load)
    for job in ("req", "20261399999999999999", "x" * 20):
        database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", job, good)
    asks = [returner("mysql_jobcache.get_jids"), returner("mysql_jobcache.get_jids_filter", 100)]
    asks += [returner("mysql_jobcache.get_load", jid(number)) for number in range(len(loads))]
    jobs, newest, *_ = values(ask(asks, opts=master(database, tmp_path)))
    assert jobs[jid(0)]["Function"] == "test.ping"
    assert jid(0) in [job["JID"] for job in newest]


def test_a_load_or_jid_that_is_null_hides_no_other_job(database: Scratch, tmp_path: Path) -> None:
    MAKERS["2014"](database)
    good = json.dumps({"fun": "test.ping", "tgt": "*", "arg": [], "user": "root"})
    for job, load in ((jid(0), good), (jid(1), None), (None, good)):
        database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", job, load)
    opts = master(database, tmp_path)
    asks = [returner("mysql_jobcache.get_jids"), returner("mysql_jobcache.get_jids_filter", 100)]
    asks += [returner("mysql_jobcache.get_load", jid(1))]
    jobs, newest, load = values(ask(asks, opts=opts))
    assert (jobs[jid(0)]["Function"], newest[0]["JID"], load) == ("test.ping", jid(0), {})
    assert jid(0) in history.jobs(opts)


def make_many_jobs(database: Scratch, doublings: int) -> None:
    """2 to the power of ``doublings`` jobs."""
    load = json.dumps({"fun": "test.ping", "tgt": "*", "tgt_type": "glob", "arg": [], "user": "root", "Minions": ["a"]})
    database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", jid(0), load)
    for power in range(doublings):
        later = "CAST(CAST(jid AS DECIMAL(20)) + %s AS CHAR)"
        database.sql(f"INSERT INTO jids (jid, `load`) SELECT {later}, `load` FROM jids", 2**power)


async def test_list_jobs_max_is_how_many_of_the_newest_jobs_are_listed_and_the_log_says_so_once(
    database: Scratch, shipping: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tables(database)
    make_many_jobs(database, 5)
    async with shipping("mysql_jobcache", paused=True) as ship:
        await ship.take(published(jid(40), ["web1"]))
        engine = {"mysql_jobcache": {"list_jobs_max": 10}}
        opts = master(database, tmp_path, master_job_cache="mysql_jobcache", engines=[engine])
        for _ in range(2):
            found = [job for job, _ in await asyncio.to_thread(lambda: list(Answers(opts).jobs()))]
            assert found == [*(jid(number) for number in range(23, 32)), jid(40)]
        assert [text for text in caplog.messages if "list_jobs_max" in text] == [
            "There are more jobs than list_jobs_max: the newest 10 are listed"
        ]
        for most, count in ((33, 33), (0, 33)):
            engine["mysql_jobcache"]["list_jobs_max"] = most
            assert len(list(await asyncio.to_thread(Answers(opts).jobs))) == count
    assert len(caplog.messages) == 1


def test_a_thousand_of_many_jobs_are_listed_at_once(database: Scratch, tmp_path: Path) -> None:
    make_tables(database)
    make_many_jobs(database, 18)
    opts = master(database, tmp_path, engines=[{"mysql_jobcache": {"list_jobs_max": 1000}}])
    began = time.monotonic()
    assert [job for job, _ in Answers(opts).jobs()][::999] == [jid(2**18 - 1000), jid(2**18 - 1)]
    assert time.monotonic() - began < 1.0
