"""Faults of the server and of the network: each must bite, nothing may be lost or twice, and the engine catches up.

Every fault is done to a real server's process, to its settings, or to the connection. The tests' own look at the tables
goes through the server's unix socket, never through the faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymysql
import pytest

from salt_mysql_engine import schema
from tests.support.mariadb import MariaDB, Server, free_port, wait_until
from tests.support.proxy import Proxy
from tests.support.scratch import PASSWORD, Scratch, scratch, sequence
from tests.support.shipping import PATIENCE, Shipping, jid, return_data, returned

pytestmark = pytest.mark.faults

Make = Callable[..., Shipping]
QUICK = {"connect_timeout": 0.5, "statement_timeout": 0.5}  # seconds
INSERT_RETURNS = b"INSERT INTO `salt_returns`"
COMMIT = b"\x03COMMIT"
FRESH = 10**6


def value(number: int) -> dict[str, Any]:
    """What the return with this number holds."""
    return {"number": number, "text": 'it\'s 100 % of a "value" \\ \U0001f600\n'}


def numbered(first: int, last: int) -> list[bytes]:
    """The returns with these numbers, each of a job and a minion of its own."""
    return [returned(jid(number), f"minion-{number}", value(number)) for number in range(first, last + 1)]


def sent(count: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The events of `numbered(1, count)` and of the fresh one, by jid and minion."""
    numbers = [*range(1, count + 1), FRESH]
    return {(jid(n), f"minion-{n}"): return_data(jid(n), f"minion-{n}", value(n)) for n in numbers}


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log lines that ask for a person."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def all_arrive(ship: Shipping, *databases: Scratch, count: int) -> dict[str, Any]:
    """The oracle, after a fault: `numbered(1, count)` and then a fresh one are in the databases.

    Each is in one of them, once, as it was sent, and nothing else is; the books balance and there are no dead letters.
    """
    await ship.drain()
    books = await ship.ship(*numbered(FRESH, FRESH))
    rows = [row for database in databases for row in database.rows("salt_returns")]
    keys = [(row["jid"], row["id"]) for row in rows]
    assert sorted(keys) == sorted(sent(count)), "missing, spurious or twice"
    for row, event in zip(rows, map(sent(count).__getitem__, keys), strict=True):
        assert json.loads(row["return"]) == event["return"]
        assert json.loads(row["full_ret"]) == event
        assert (row["fun"], row["success"]) == ("test.ping", "1")
    jobs = {row["jid"] for database in databases for row in database.rows("jids")}
    assert jobs == {job for job, _ in keys}
    assert books["written"] + books["duplicates"] == books["captured"] > count
    assert (books["pending"], books["dead_letters"], books["ignored"], books["dropped"]) == (0, 0, {}, {})
    assert await ship.dead_letters() == []
    assert not ship.writer.failing
    return books


async def catches_up(ship: Shipping, *databases: Scratch, count: int) -> dict[str, Any]:
    """The same, after a fault that made an attempt fail."""
    await ship.drain()
    assert ship.writer.retries > 0, "the fault never bit"
    return await all_arrive(ship, *databases, count=count)


@pytest.fixture
def proxy(database: Scratch) -> Iterator[Proxy]:
    """The network between the engine and the test's database."""
    with Proxy(database.server.host, database.server.port) as made:
        yield made


@pytest.fixture
def proxied(proxy: Proxy, shipping: Make) -> Make:
    """`shipping` through the proxy."""

    def make(*args: Any, **options: Any) -> Shipping:
        return shipping(*args, mysql={"mysql.port": proxy.port}, **options)

    return make


@pytest.fixture
async def tables(shipping: Make) -> None:
    """The tables are there, and the first return is in them."""
    async with shipping("before") as ship:
        await ship.ship(*numbered(1, 1))


@contextlib.contextmanager
def locked_job(database: Scratch, number: int) -> Iterator[pymysql.connections.Connection[Any]]:
    """Another transaction, which keeps the row of a job locked until it is rolled back."""
    with database.server.connect(database=database.name, autocommit=False) as other:
        with other.cursor() as cursor:
            cursor.execute("INSERT INTO jids (jid, `load`) VALUES (%s, '{}')", (jid(number),))
        yield other


async def engine_waits_for_a_lock(database: Scratch) -> int:
    """Until the engine's statement waits for somebody's lock; gives the id of its connection."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for (connection,) in database.sql(
            "SELECT ID FROM information_schema.INNODB_TRX JOIN information_schema.PROCESSLIST"
            " ON ID = trx_mysql_thread_id WHERE trx_state = 'LOCK WAIT' AND USER = %s",
            database.name,
        ):
            return int(connection)
        await asyncio.sleep(0.15)  # the server renews INNODB_TRX only when nobody read it for 0.1 s
    raise TimeoutError("the engine waits for no lock")


# The server or the network is away


def killed(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    server.kill()
    return server.start


def stopped(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    server.stop()
    return server.start


def frozen(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    server.freeze()
    return server.thaw


def refusing(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    proxy.refuse()
    proxy.reset()
    return proxy.heal


def unreachable(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    proxy.blackhole()
    return proxy.heal


def resetting(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    proxy.reset(at=INSERT_RETURNS)
    return proxy.heal


def resetting_a_new_one_too(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    proxy.reset(at=INSERT_RETURNS, times=2)
    return proxy.heal


def losing_answers(server: MariaDB, proxy: Proxy) -> Callable[[], None]:
    proxy.lose_answer(to=COMMIT)
    return proxy.heal


AWAY = (killed, stopped, frozen, refusing, unreachable, resetting, losing_answers)


@pytest.mark.parametrize("fault", AWAY)
async def test_returns_survive_a_fault_that_comes_again_and_again_while_they_arrive(
    database: Scratch, proxied: Make, proxy: Proxy, fault: Callable[[MariaDB, Proxy], Callable[[], None]]
) -> None:
    enough = asyncio.Event()
    async with proxied(batch_size=20, flush_interval=0.01, **QUICK) as ship:

        async def arrive() -> int:
            count = 0
            while not enough.is_set():
                await ship.take(*numbered(count + 1, count + 10))
                await asyncio.sleep(0.005)
                count += 10
            return count

        arriving = asyncio.create_task(arrive())
        for times in range(1, 4):
            await ship.until(lambda: ship.journal.pending > 0)
            before = ship.writer.retries
            mend = await asyncio.to_thread(fault, database.server, proxy)
            await ship.until(lambda before=before: ship.writer.retries > before)
            await asyncio.to_thread(mend)
            await ship.drain()
            assert ship.writer.retries >= times
        enough.set()
        await catches_up(ship, database, count=await arriving)
    assert fault is not resetting or proxy.resets == 3
    assert fault is not losing_answers or proxy.lost == 3


async def test_returns_wait_for_a_server_that_is_not_there_at_start(database: Scratch, shipping: Make) -> None:
    database.server.stop()
    async with shipping() as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(3)
        assert (await ship.books())["pending"] == 5
        assert "Can't connect" in ship.fault
        await asyncio.to_thread(database.server.start)
        await catches_up(ship, database, count=5)


async def test_returns_survive_a_restart_of_the_server(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        await asyncio.to_thread(database.server.restart)
        await ship.ship(*numbered(6, 10))
        await all_arrive(ship, database, count=10)


async def test_without_a_request_the_writer_tries_again_by_itself(database: Scratch, shipping: Make) -> None:
    database.server.stop()
    async with shipping(flush_interval=0.01) as ship:
        await ship.take(*numbered(1, 5))
        await ship.until(lambda: ship.writer.retries >= 2)
        await asyncio.to_thread(database.server.start)
        await ship.until(lambda: ship.journal.pending == 0)
        await catches_up(ship, database, count=5)


async def test_a_server_that_freezes_is_given_up_after_the_statement_timeout(database: Scratch, shipping: Make) -> None:
    async with shipping(**QUICK) as ship:
        await ship.ship(*numbered(1, 5))
        database.server.freeze()
        await ship.take(*numbered(6, 10))
        await ship.fail(1)
        assert "no answer within 0.5 s" in ship.fault
        await ship.fail(2)
        assert "no login within 0.5 s" in ship.fault or "Can't connect" in ship.fault
        database.server.thaw()
        await catches_up(ship, database, count=10)


async def test_a_server_that_refuses_connections_is_waited_for(database: Scratch, proxied: Make, proxy: Proxy) -> None:
    proxy.refuse()
    async with proxied() as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(3)
        assert "Can't connect" in ship.fault
        assert proxy.connections == 0
        proxy.heal()
        await catches_up(ship, database, count=5)


async def test_an_unreachable_server_is_given_up_after_the_connect_timeout(
    database: Scratch, proxied: Make, proxy: Proxy
) -> None:
    proxy.blackhole()
    async with proxied(**QUICK) as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(2)
        assert "no login within 0.5 s" in ship.fault
        assert proxy.swallowed >= 2
        proxy.heal()
        await catches_up(ship, database, count=5)


async def test_a_stop_at_any_moment_of_connecting_leaves_no_connection_open(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        for steps in range(60):
            opening = asyncio.create_task(ship.open_session())
            for _ in range(steps):
                await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled():
                opening.result().close()
        del opening
        gc.collect()  # what nobody closed is a warning now, and so an error


@pytest.mark.parametrize(("at", "duplicates"), [(INSERT_RETURNS, 0), (COMMIT, 5)], ids=["insert", "commit"])
async def test_a_server_that_becomes_unreachable_in_mid_statement_is_given_up_after_the_statement_timeout(
    database: Scratch, proxied: Make, proxy: Proxy, at: bytes, duplicates: int
) -> None:
    async with proxied(**QUICK) as ship:
        await ship.ship(*numbered(1, 5))
        proxy.blackhole(at=at)
        await ship.take(*numbered(6, 10))
        await ship.fail(1)
        assert "no answer within 0.5 s" in ship.fault
        assert proxy.swallowed >= 1
        await ship.fail(2)
        assert "no login within 0.5 s" in ship.fault
        proxy.heal()
        books = await catches_up(ship, database, count=10)
        assert books["duplicates"] == duplicates


async def test_a_slow_server_is_only_slower(database: Scratch, proxied: Make, proxy: Proxy) -> None:
    round_trip = 0.2  # seconds
    async with proxied(batch_size=10) as ship:
        proxy.delay(round_trip)
        began = time.monotonic()
        await ship.ship(*numbered(1, 20))
        took = time.monotonic() - began
        assert proxy.delayed >= 6
        assert took >= proxy.delayed * round_trip
        await all_arrive(ship, database, count=20)
        assert ship.writer.retries == 0


async def test_a_throttled_link_is_only_slower(database: Scratch, proxied: Make, proxy: Proxy) -> None:
    rate = 80_000  # bytes a second
    returns = numbered(1, 200)
    async with proxied(batch_size=50) as ship:
        proxy.throttle(rate)
        began = time.monotonic()
        await ship.ship(*returns)
        took = time.monotonic() - began
        assert proxy.throttled > sum(map(len, returns))
        assert took >= proxy.throttled / rate / 2  # two ways
        await all_arrive(ship, database, count=200)
        assert ship.writer.retries == 0


async def test_a_link_too_slow_for_a_whole_batch_gets_it_in_parts(
    database: Scratch, proxied: Make, proxy: Proxy
) -> None:
    async with proxied(batch_size=200, **{**QUICK, "statement_timeout": 1.0}) as ship:
        await ship.ship(*numbered(1, 1))
        proxy.throttle(40_000)  # bytes a second: some 80 of the rows within the timeout
        await ship.take(*numbered(2, 200))
        await ship.drain()
        assert "no answer within" in ship.fault
        await all_arrive(ship, database, count=200)


@pytest.mark.parametrize("at", [INSERT_RETURNS, COMMIT], ids=["insert", "commit"])
async def test_a_connection_that_is_reset_in_mid_batch_leaves_no_half_of_it(
    database: Scratch, proxied: Make, proxy: Proxy, at: bytes
) -> None:
    async with proxied() as ship:
        await ship.ship(*numbered(1, 5))
        proxy.reset(at=at, times=2)
        await ship.take(*numbered(6, 10))
        await ship.fail(2)
        assert proxy.resets == 2
        assert re.search("Lost connection|gone away", ship.fault), ship.fault
        books = await catches_up(ship, database, count=10)
        assert books["duplicates"] == 0  # the batch's first statements were taken back


async def test_a_commit_whose_answer_is_lost_adds_no_row_when_it_is_sent_again(
    database: Scratch, proxied: Make, proxy: Proxy
) -> None:
    proxy.lose_answer(to=COMMIT, times=3)
    async with proxied() as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(3)
        assert proxy.lost == 3
        assert database.count("salt_returns") == 5
        books = await ship.drain()
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (0, 5, 0)
        await catches_up(ship, database, count=5)
        assert ship.writer.retries == 3


# The server ends what we do


@pytest.mark.parametrize("how", ["KILL", "KILL HARD CONNECTION", "KILL QUERY"])
async def test_a_statement_that_the_server_kills_is_sent_again(
    database: Scratch, shipping: Make, tables: None, how: str
) -> None:
    async with shipping() as ship:
        with locked_job(database, 3):
            await ship.take(*numbered(1, 5))
            if database.server.is_mysql:
                how = how.replace("HARD ", "")
            database.sql(f"{how} {await engine_waits_for_a_lock(database)}")
            await ship.until(lambda: ship.writer.retries > 0)
            assert re.search(r"\(1317\)" if "QUERY" in how else r"Lost connection|\(1927\)", ship.fault), ship.fault
        await catches_up(ship, database, count=5)


async def test_a_connection_that_the_server_kills_costs_one_retry(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        for number in connections(database):
            database.sql("KILL %s", number)
        await ship.ship(*numbered(6, 10))
        await all_arrive(ship, database, count=10)
        assert ship.writer.retries <= 1  # none, where it was idle for long enough to be looked at first
        assert ship.fault == ""


async def test_an_idle_connection_that_the_server_closed_costs_no_retry(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_mysql_engine.writer._PING_AFTER_SECONDS", 0.0)
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        ((before,),) = database.sql("SELECT ID FROM information_schema.PROCESSLIST WHERE USER = %s", database.name)
        database.sql("KILL %s", before)
        await ship.ship(*numbered(6, 10))
        ((after,),) = database.sql("SELECT ID FROM information_schema.PROCESSLIST WHERE USER = %s", database.name)
        assert after != before
        await all_arrive(ship, database, count=10)
        assert ship.writer.retries == 0


async def test_a_statement_that_the_server_drops_as_it_shuts_down_is_sent_again(
    database: Scratch, shipping: Make, tables: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping() as ship:
        with locked_job(database, 3):
            await ship.take(*numbered(1, 5))
            await engine_waits_for_a_lock(database)
            await asyncio.to_thread(database.server.stop)
            await ship.until(lambda: ship.writer.retries > 0)
            # MariaDB 10.11 ends the connection without the word (1053) that MySQL has for it.
            assert re.search(r"Lost connection|\(1053\)", caplog.text), caplog.text
        await asyncio.to_thread(database.server.start)
        await catches_up(ship, database, count=5)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(1021, id="1021 disk full"),
        pytest.param(1047, id="1047 Galera node not ready"),
        pytest.param(1053, id="1053 shutting down"),
        pytest.param(1114, id="1114 table full"),
        pytest.param(1180, id="1180 error during COMMIT"),
        pytest.param(1290, id="1290 super-read-only"),
        pytest.param(1317, id="1317 query interrupted"),
        pytest.param(1792, id="1792 read-only transaction"),
        pytest.param(1836, id="1836 read-only mode"),
        pytest.param(3101, id="3101 Group Replication"),
        pytest.param(4031, id="4031 MySQL's idle timeout"),
    ],
)
async def test_an_error_that_passes_is_waited_for(
    database: Scratch, shipping: Make, tables: None, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers that this server does not say by itself, or that would need its disk full: a trigger says them."""
    database.sql(
        "CREATE TRIGGER refuse BEFORE INSERT ON salt_returns FOR EACH ROW"
        f" SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'not now'"
    )
    async with shipping() as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(2)
        assert f"not now ({number})" in ship.fault
        # In a thread: it waits for the end of a transaction, which may be the engine's next try.
        await asyncio.to_thread(database.sql, "DROP TRIGGER refuse")
        await catches_up(ship, database, count=5)
    assert errors(caplog) == []


# Locks


async def test_a_row_that_another_transaction_locks_is_tried_again(
    database: Scratch, shipping: Make, tables: None
) -> None:
    async with shipping(statement_timeout=2.0) as ship:
        with locked_job(database, 3):
            await ship.take(*numbered(1, 5))
            await ship.fail(1)
            assert "(1205)" in ship.fault
        await catches_up(ship, database, count=5)


async def test_the_victim_of_a_deadlock_is_tried_again(database: Scratch, shipping: Make, tables: None) -> None:
    if database.server.is_mysql:
        pytest.skip("its INNODB_TRX shows no statement with four-byte characters")
    database.sql("CREATE TABLE ballast (number INT PRIMARY KEY)")
    with database.server.connect(database=database.name, autocommit=False) as other, other.cursor() as cursor:
        # InnoDB's victim is the transaction that changed less.
        cursor.execute(f"INSERT INTO ballast SELECT seq FROM {sequence(1, 5000)}")
        cursor.execute(
            "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) VALUES ('', %s, '', %s, '', '')",
            (jid(5), "minion-5"),
        )
        async with shipping() as ship:
            await ship.take(*numbered(1, 5))
            await engine_waits_for_a_lock(database)  # it has the rows of jids, and wants one of salt_returns
            await asyncio.to_thread(
                cursor.execute, "UPDATE jids SET `load` = '' WHERE jid IN (%s, %s)", (jid(4), jid(5))
            )
            await ship.until(lambda: ship.writer.retries > 0)
            assert "(1213)" in ship.fault
            other.rollback()
            await catches_up(ship, database, count=5)


async def test_a_locked_table_is_given_up_after_the_statement_timeout(
    database: Scratch, shipping: Make, tables: None
) -> None:
    with database.server.connect(database=database.name) as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLES salt_returns WRITE")
        async with shipping(**QUICK) as ship:
            await ship.take(*numbered(1, 5))
            await ship.fail(2)
            assert "no answer within 0.5 s" in ship.fault
            cursor.execute("UNLOCK TABLES")
            await catches_up(ship, database, count=5)


# The server takes no rows, or no more connections, for a while


async def test_a_read_only_server_is_waited_for(
    database: Scratch, shipping: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        with database.globally(read_only=1):
            await ship.take(*numbered(6, 10))
            await ship.fail(3)
        assert "(1290)" in ship.fault
        assert errors(caplog) == []  # a failover does that for a while; it mends itself
        await catches_up(ship, database, count=10)


async def test_a_server_that_is_out_of_connections_is_waited_for(
    database: Scratch, shipping: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as others, database.globally(max_connections=10):  # the least there is
        for _ in range(10):  # the one more that a server has is for its root
            others.enter_context(database.server.connect())
        async with shipping() as ship:
            await ship.take(*numbered(1, 5))
            await ship.fail(3)
            assert "(1040)" in ship.fault
            others.close()
            await catches_up(ship, database, count=5)
    assert errors(caplog) == []


async def test_a_server_with_no_connection_left_for_our_user_is_waited_for(database: Scratch, shipping: Make) -> None:
    database.server.sql(f"ALTER USER `{database.name}` WITH MAX_USER_CONNECTIONS 1")
    other = pymysql.connect(host=database.server.host, port=database.server.port, user=database.name, password=PASSWORD)
    try:
        async with shipping() as ship:
            await ship.take(*numbered(1, 5))
            await ship.fail(2)
            assert "max_user_connections" in ship.fault
            other.close()
            await catches_up(ship, database, count=5)
    finally:
        if other.open:
            other.close()


# Several hosts


@pytest.fixture
def standby(database: Scratch, tmp_path: Path) -> Iterator[Scratch]:
    """Another server with an empty database and an account of the same name. It is no replica."""
    with MariaDB(tmp_path / "standby") as server:
        server.create_database(database.name, database.name, PASSWORD)
        yield Scratch(server, database.name)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two hosts on one port: the way to the test's database, and the one to the standby."""

    first: Proxy
    second: Proxy

    @property
    def mysql(self) -> dict[str, Any]:
        return {"mysql.host": [self.first.host, self.second.host], "mysql.port": self.first.port}

    def name(self, proxy: Proxy) -> str:
        """How the writer calls a host."""
        return f"{proxy.host}:{proxy.port}"


@pytest.fixture
def pair(database: Scratch, standby: Scratch) -> Iterator[Pair]:
    """The two hosts of `mysql.host`."""
    port = free_port()
    with (
        Proxy(database.server.host, database.server.port, host="127.0.0.2", port=port) as first,
        Proxy(standby.server.host, standby.server.port, host="127.0.0.3", port=port) as second,
    ):
        yield Pair(first, second)


@pytest.mark.parametrize("fault", [killed, stopped, frozen, refusing, unreachable, resetting_a_new_one_too])
async def test_the_next_host_takes_over_from_one_that_goes_away(
    database: Scratch,
    standby: Scratch,
    pair: Pair,
    shipping: Make,
    fault: Callable[[MariaDB, Proxy], Callable[[], None]],
) -> None:
    async with shipping(mysql=pair.mysql, **QUICK) as ship:
        await ship.ship(*numbered(1, 5))
        assert ship.writer.server_host == pair.name(pair.first)
        await asyncio.to_thread(fault, database.server, pair.first)
        await ship.ship(*numbered(6, 10))
        assert ship.writer.server_host == pair.name(pair.second)
        if fault is frozen:
            database.server.thaw()  # to be looked into
        elif not database.server.running:
            await asyncio.to_thread(database.server.start)
        assert database.count("salt_returns") == 5
        await all_arrive(ship, database, standby, count=10)


def times_out(database: Scratch, proxy: Proxy) -> None:
    """The server closes the connection that it had nothing from for a second."""
    wait_until(lambda: connections(database) == [], timeout=30, what="the end of an idle connection")


def is_killed(database: Scratch, proxy: Proxy) -> None:
    """Somebody ends the connection."""
    for number in connections(database):
        database.sql("KILL %s", number)


def is_reset(database: Scratch, proxy: Proxy) -> None:
    """What is between ends the connection in the next batch."""
    proxy.reset(at=INSERT_RETURNS)


def connections(database: Scratch) -> list[int]:
    return [
        number
        for (number,) in database.sql(
            "SELECT ID FROM information_schema.PROCESSLIST WHERE USER = %s AND COMMAND <> 'Killed'", database.name
        )
    ]


@pytest.mark.parametrize("end", [times_out, is_killed, is_reset])
async def test_a_connection_that_ends_is_opened_again_on_the_same_host_without_a_word(
    database: Scratch,
    pair: Pair,
    shipping: Make,
    end: Callable[[Scratch, Proxy], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with database.globally(wait_timeout=1 if end is times_out else 28_800):
        async with shipping(mysql=pair.mysql, **QUICK) as ship:
            await ship.ship(*numbered(1, 5))
            caplog.clear()
            await asyncio.to_thread(end, database, pair.first)
            await ship.ship(*numbered(6, 10))
            assert ship.writer.server_host == pair.name(pair.first)
            assert (ship.fault, ship.writer.failing, caplog.messages) == ("", False, [])
            assert pair.second.connections == 0
            await all_arrive(ship, database, count=10)


async def test_the_victim_of_a_deadlock_stays_on_its_host(database: Scratch, pair: Pair, shipping: Make) -> None:
    async with shipping(mysql=pair.mysql, **QUICK) as ship:
        await ship.ship(*numbered(1, 5))
        database.sql(
            "CREATE TRIGGER refuse BEFORE INSERT ON salt_returns FOR EACH ROW"
            " SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'a deadlock'"
        )
        await ship.take(*numbered(6, 10))
        await ship.fail(2)
        await asyncio.to_thread(database.sql, "DROP TRIGGER refuse")
        await ship.drain()
        assert ship.writer.server_host == pair.name(pair.first)
        await all_arrive(ship, database, count=10)


# A limit on one statement or transaction


async def test_a_batch_that_is_over_max_statement_time_is_halved_and_no_row_becomes_a_dead_letter(
    database: Scratch, shipping: Make, tables: None, caplog: pytest.LogCaptureFixture
) -> None:
    if database.server.is_mysql:
        pytest.skip("MySQL has such a limit for SELECT alone")
    database.sql(
        "CREATE TRIGGER dear BEFORE INSERT ON salt_returns FOR EACH ROW SET NEW.fun = IF(SLEEP(0.02), NEW.fun, NEW.fun)"
    )
    with database.globally(max_statement_time=0.3):
        async with shipping(batch_size=64, flush_interval=60.0) as ship:
            await ship.take(*numbered(1, 64))
            await ship.until(lambda: ship.journal.pending == 0)
            database.sql("DROP TRIGGER dear")
            await all_arrive(ship, database, count=64)
            assert (ship.writer.failing, ship.fault) == (False, "")
    assert not [record for record in caplog.records if "needs a person" in record.getMessage()]


async def test_a_batch_that_is_over_max_binlog_cache_size_is_halved_and_no_row_becomes_a_dead_letter(
    product: type[Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--log-bin=binlog", "--server-id=1", "--max-binlog-cache-size=8192", "--binlog-cache-size=4096"]
    with product(tmp_path / "server", options=options) as server, scratch(server) as database:
        async with Shipping(tmp_path / "journal", database.mysql, batch_size=64, flush_interval=60.0) as ship:
            await ship.take(*numbered(1, 64))
            await ship.until(lambda: ship.journal.pending == 0)
            await all_arrive(ship, database, count=64)
            assert (ship.writer.failing, ship.fault) == (False, "")
    assert errors(caplog) == []


@pytest.mark.parametrize(("number", "remedy"), [(1197, "max_binlog_cache_size"), (3024, "max_execution_time")])
async def test_a_row_that_is_too_much_by_itself_waits_for_a_person(
    database: Scratch, shipping: Make, tables: None, number: int, remedy: str
) -> None:
    database.sql(
        "CREATE TRIGGER dear BEFORE INSERT ON salt_returns FOR EACH ROW BEGIN IF NEW.id = 'minion-3' THEN "
        f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'too much'; END IF; END"
    )
    async with shipping() as ship:
        await ship.take(*numbered(1, 5))
        await ship.until(lambda: f"raise {remedy}" in ship.fault)
        assert await ship.dead_letters() == []
        await asyncio.to_thread(database.sql, "DROP TRIGGER dear")
        await catches_up(ship, database, count=5)


async def test_a_name_that_stops_resolving_while_it_runs_is_waited_for(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, resolves = "db.salt.test", True
    usual = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **more: Any) -> Any:
        if host != name:
            return usual(host, *args, **more)
        if not resolves:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return usual(database.server.host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with shipping(mysql={"mysql.host": name}) as ship:
        await ship.ship(*numbered(1, 5))
        resolves = False
        await ship.ship(*numbered(6, 10))  # a connection that is there needs no name
        for number in connections(database):
            database.sql("KILL %s", number)
        await ship.take(*numbered(11, 15))
        await ship.until(lambda: "Name or service not known" in ship.fault)
        resolves = True
        await catches_up(ship, database, count=15)


async def test_the_second_host_is_used_while_the_first_is_away(database: Scratch, shipping: Make) -> None:
    async with shipping(mysql={"mysql.host": ["127.0.0.9", database.server.host]}) as ship:
        await ship.ship(*numbered(1, 5))
        assert ship.writer.server_host == f"{database.server.host}:{database.server.port}"
        await all_arrive(ship, database, count=5)
        assert ship.writer.retries == 0


async def test_a_primary_that_was_demoted_is_left_for_the_next_host(
    database: Scratch, standby: Scratch, pair: Pair, shipping: Make
) -> None:
    async with shipping(mysql=pair.mysql) as ship:
        await ship.ship(*numbered(1, 5))
        with database.globally(read_only=1):
            await ship.take(*numbered(6, 10))
            await ship.drain()
            assert "(1290)" in ship.fault
            assert ship.writer.server_host == pair.name(pair.second)
            await catches_up(ship, database, standby, count=10)


async def test_with_all_hosts_away_the_one_that_comes_back_is_used(
    database: Scratch, standby: Scratch, pair: Pair, shipping: Make
) -> None:
    pair.first.refuse()
    pair.second.blackhole()
    async with shipping(mysql=pair.mysql, **QUICK) as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(2)
        assert "Can't connect" in ship.fault
        assert "no login within 0.5 s" in ship.fault
        pair.second.heal()
        await ship.drain()
        assert ship.writer.server_host == pair.name(pair.second)
        await ship.ship()
        database.sql(schema.statements()["salt_returns"])  # for the oracle: nobody has been there
        database.sql(schema.statements()["jids"])
        await catches_up(ship, database, standby, count=5)


async def ship_until_on(ship: Shipping, host: str, *, first: int) -> int:
    """Ships returns one by one, as batches to move between, until the writer is on `host`; gives the last number."""
    deadline = time.monotonic() + 10.0
    number = first
    await ship.ship(*numbered(number, number))
    while ship.writer.server_host != host:
        assert time.monotonic() < deadline, f"still on {ship.writer.server_host}"
        await asyncio.sleep(0.02)
        number += 1
        await ship.ship(*numbered(number, number))
    return number


async def test_the_writer_goes_back_to_the_first_host_when_that_has_recovered(
    database: Scratch, standby: Scratch, pair: Pair, shipping: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_mysql_engine.writer.HOME_PROBE_SECONDS", 0.1)
    async with shipping(mysql=pair.mysql, **QUICK) as ship:
        await ship.ship(*numbered(1, 5))
        pair.first.refuse()
        pair.first.reset()
        await ship.ship(*numbered(6, 10))
        assert ship.writer.server_host == pair.name(pair.second)
        retries = ship.writer.retries
        pair.first.heal()
        count = await ship_until_on(ship, pair.name(pair.first), first=11)
        assert ship.writer.retries == retries  # moving is no failure
        await catches_up(ship, database, standby, count=count)
        assert ship.writer.server_host == pair.name(pair.first)
    assert database.count("salt_returns") >= 5 + 2  # those before, the one that found it there, and the fresh one


async def test_the_writer_does_not_go_back_to_a_first_host_that_is_read_only(
    database: Scratch, standby: Scratch, pair: Pair, shipping: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_mysql_engine.writer.HOME_PROBE_SECONDS", 0.1)
    async with shipping(mysql=pair.mysql, **QUICK) as ship:
        await ship.ship(*numbered(1, 5))
        with database.globally(read_only=1):
            await ship.ship(*numbered(6, 10))
            assert ship.writer.server_host == pair.name(pair.second)
            retries = ship.writer.retries
            probed = pair.first.connections + 3
            count = 10
            deadline = time.monotonic() + 10.0
            while pair.first.connections < probed:
                assert time.monotonic() < deadline, "the first host is not probed"
                await asyncio.sleep(0.02)
                count += 1
                await ship.ship(*numbered(count, count))
                assert ship.writer.server_host == pair.name(pair.second)
            assert ship.writer.retries == retries
            assert database.count("salt_returns") == 5
        count = await ship_until_on(ship, pair.name(pair.first), first=count + 1)
        await catches_up(ship, database, standby, count=count)


# What is around it


async def test_a_journal_that_is_locked_for_a_while_ends_nothing(database: Scratch, shipping: Make) -> None:
    async with shipping(flush_interval=0.2) as ship:
        with contextlib.closing(sqlite3.connect(ship.journal.path, isolation_level=None)) as shell:
            await ship.take(*numbered(1, 5))
            shell.execute("BEGIN IMMEDIATE")  # an operator's sqlite3, say
            await ship.until(lambda: "database is locked" in ship.fault)
            shell.execute("ROLLBACK")
        await all_arrive(ship, database, count=5)


async def test_a_flush_while_the_database_is_away_times_out_and_the_events_are_still_pending(
    database: Scratch, shipping: Make
) -> None:
    database.server.stop()
    async with shipping() as ship:
        await ship.take(*numbered(1, 5))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ship.writer.flush(), 1.0)
        assert (await ship.books())["pending"] == 5
        assert ship.writer.failing
        await asyncio.to_thread(database.server.start)
        await catches_up(ship, database, count=5)


async def test_an_outage_is_logged_once_and_so_is_its_end(
    database: Scratch, shipping: Make, caplog: pytest.LogCaptureFixture
) -> None:
    database.server.stop()
    async with shipping() as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(4)
        await asyncio.to_thread(database.server.start)
        await catches_up(ship, database, count=5)
    assert errors(caplog) == []
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("not to be had" in line for line in lines) == 1
    assert sum("takes rows again" in line for line in lines) == 1


# The server refuses until a person acts


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Statements that make the server refuse us and mend it again; `says` is what the log must tell the person."""

    name: str
    breaks: str
    mends: str
    says: str
    options: dict[str, object] = dataclasses.field(default_factory=dict)


def revoked(privilege: str) -> Refusal:
    """A privilege that is missing."""
    return Refusal(
        f"no {privilege} privilege",
        f"REVOKE {privilege} ON `{{db}}`.* FROM `{{db}}`",
        f"GRANT {privilege} ON `{{db}}`.* TO `{{db}}`",
        f"{privilege} command denied .* GRANT {privilege} on the database",
    )


REFUSALS = (
    Refusal(
        "wrong password",
        "ALTER USER `{db}` IDENTIFIED BY 'another'",
        f"ALTER USER `{{db}}` IDENTIFIED BY '{pymysql.converters.escape_string(PASSWORD)}'",
        "Access denied .* check mysql.user and mysql.pass in the master config",
    ),
    Refusal(
        "unknown user",
        "RENAME USER `{db}` TO `{db}_gone`",
        "RENAME USER `{db}_gone` TO `{db}`",
        "Access denied .* check mysql.user and mysql.pass in the master config",
    ),
    Refusal(
        "locked account",
        "ALTER USER `{db}` ACCOUNT LOCK",
        "ALTER USER `{db}` ACCOUNT UNLOCK",
        "locked.* unlock the user's account",
    ),
    Refusal(
        "unknown database",
        "DROP DATABASE `{db}`",
        "CREATE DATABASE `{db}`",
        "Unknown database .* create the database, or correct mysql.db",
    ),
    Refusal(
        "no access to the database",
        "REVOKE ALL ON `{db}`.* FROM `{db}`",
        "GRANT ALL ON `{db}`.* TO `{db}`",
        "Access denied for user .* to database .* grant the user",
    ),
    revoked("INSERT"),
    revoked("SELECT"),
    revoked("UPDATE"),
    dataclasses.replace(revoked("CREATE"), breaks="DROP TABLE `{db}`.jids; REVOKE CREATE ON `{db}`.* FROM `{db}`"),
    Refusal(
        "missing table with schema: check",
        "DROP TABLE `{db}`.salt_returns",
        schema.statements()["salt_returns"].replace("`salt_returns`", "`{db}`.`salt_returns`"),
        "no table salt_returns; use schema: create, or create it",
        {"schema": "check"},
    ),
    Refusal(
        "missing table of events with schema: check",
        "DROP TABLE `{db}`.salt_events",
        schema.statements()["salt_events"].replace("`salt_events`", "`{db}`.`salt_events`"),
        "no table salt_events; use schema: create, or create it",
        {"schema": "check", "events": ["*"]},
    ),
    Refusal(
        "missing column",
        "DELETE FROM `{db}`.salt_returns; ALTER TABLE `{db}`.salt_returns DROP COLUMN full_ret",
        "ALTER TABLE `{db}`.salt_returns ADD COLUMN full_ret LONGTEXT NOT NULL",
        "salt_returns has no column full_ret; it is not of the documented shape",
    ),
    Refusal(
        "added column without a default",
        "ALTER TABLE `{db}`.salt_returns ADD COLUMN site INT NOT NULL",
        "ALTER TABLE `{db}`.salt_returns ALTER COLUMN site SET DEFAULT 0",
        "'site' .* give the added column a default",
    ),
)


@pytest.mark.parametrize("refusal", [pytest.param(each, id=each.name) for each in REFUSALS])
async def test_a_refusal_is_logged_once_with_its_remedy_and_after_it_the_writer_catches_up(
    database: Scratch, shipping: Make, refusal: Refusal, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping("before") as ship:
        await ship.ship(*numbered(1, 1))  # creates the tables
    for statement in refusal.breaks.format(db=database.name).split("; "):
        database.server.sql(statement)
    caplog.clear()
    async with shipping(**refusal.options) as ship:
        await ship.take(*numbered(1, 10))
        await ship.fail(3)
        (line,) = errors(caplog)
        assert re.search(refusal.says, line), line
        assert "nothing is lost" in line
        assert (await ship.books())["pending"] == 10
        database.server.sql(refusal.mends.format(db=database.name))
        await catches_up(ship, database, count=10)
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize(
    ("table", "breaks"),
    [
        ("jids", "DROP PRIMARY KEY"),
        ("salt_returns", "DROP PRIMARY KEY"),
        ("salt_returns", "DROP PRIMARY KEY, ADD PRIMARY KEY (jid, id, fun)"),
        ("salt_events", "DROP COLUMN event_key"),
    ],
)
async def test_a_table_that_lost_its_unique_key_gets_every_row_and_none_twice(
    database: Scratch, shipping: Make, table: str, breaks: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping("before", events=["salt/auth"]) as ship:
        await ship.ship(*numbered(1, 1))
    database.sql(f"ALTER TABLE {table} {breaks}")
    async with shipping(events=["salt/auth"]) as ship:
        await ship.take(*numbered(1, 10))
        books = await ship.drain()
        assert (books["written"], books["duplicates"]) == (9, 1)
        assert database.count("salt_returns") == database.count("jids") == 10
        assert [record for record in caplog.records if "of an older shape" in record.getMessage()]


async def test_a_table_that_is_dropped_while_running_is_created_again(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(*numbered(1, 1))
        database.sql("DROP TABLE salt_returns")
        await ship.take(*numbered(1, 10))
        await ship.fail(1)
        await catches_up(ship, database, count=10)
        assert "doesn't exist" in ship.fault


async def test_a_setting_that_cannot_be_used_is_a_refusal_and_not_the_end(
    database: Scratch, shipping: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping(mysql={"mysql.port": "none of your business"}) as ship:
        await ship.take(*numbered(1, 5))
        await ship.fail(2)
        (line,) = errors(caplog)
        assert "mysql.port: 'none of your business' must be a whole number" in line
        ship.mysql["mysql.port"] = database.server.port
        await catches_up(ship, database, count=5)
