"""Faults of the server: each must bite, nothing may be lost or twice, and the engine catches up by itself."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pymysql
import pytest

from salt_mysql_engine import schema
from tests.support.mariadb import MariaDB
from tests.support.relay import Relay
from tests.support.scratch import PASSWORD, Scratch
from tests.support.shipping import Shipping, jid, returned, returns

Make = Callable[..., Shipping]
QUICK = {"connect_timeout": 0.5, "statement_timeout": 0.5}  # seconds


def stored(database: Scratch) -> dict[str, object]:
    """What the table holds: the return by jid."""
    return {row["jid"]: json.loads(row["return"]) for row in database.rows("salt_returns")}


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log lines that ask for a person."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def catches_up(ship: Shipping, database: Scratch, *, count: int) -> None:
    """After the fault: all are there, once and unchanged, and one more gets through."""
    await ship.drain()
    assert ship.writer.retries > 0, "the fault never bit"
    assert stored(database) == {jid(number): number for number in range(1, count + 1)}
    assert not ship.writer.failing
    await ship.ship(returned(jid(10**6), "fresh", "fresh"))
    assert stored(database)[jid(10**6)] == "fresh"
    books = await ship.books()
    assert books["written"] + books["duplicates"] == books["captured"] > count


def numbered(first: int, last: int) -> list[bytes]:
    """Returns whose value is their number."""
    return [returned(jid(number), f"minion-{number}", number) for number in range(first, last + 1)]


# The server is away


async def test_returns_survive_a_server_that_is_killed_again_and_again_while_they_arrive(
    database: Scratch, shipping: Make
) -> None:
    kills = 3
    enough = asyncio.Event()
    async with shipping(batch_size=20, flush_interval=0.01, **QUICK) as ship:

        async def arrive() -> int:
            count = 0
            while not enough.is_set():
                await ship.take(*numbered(count + 1, count + 10))
                await asyncio.sleep(0.005)
                count += 10
            return count

        arriving = asyncio.create_task(arrive())
        for kill in range(1, kills + 1):
            await ship.until(lambda: ship.journal.pending > 0)
            before = ship.writer.retries
            database.server.kill()
            await ship.until(lambda before=before: ship.writer.retries > before)
            await asyncio.to_thread(database.server.start)
            await ship.drain()
            assert ship.writer.retries >= kill
        enough.set()
        await catches_up(ship, database, count=await arriving)


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
        await asyncio.to_thread(database.server.stop)
        await ship.take(*numbered(6, 10))
        await ship.fail(2)
        await asyncio.to_thread(database.server.start)
        await catches_up(ship, database, count=10)


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


async def test_a_connection_that_the_server_kills_costs_one_retry(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        database.sql("KILL USER %s", database.name)
        await ship.take(*numbered(6, 10))
        await catches_up(ship, database, count=10)
        assert ship.writer.retries == 1
        assert re.search("Lost connection|gone away|killed", ship.fault), ship.fault


async def test_an_idle_connection_that_the_server_closed_costs_no_retry(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_mysql_engine.writer._PING_AFTER_SECONDS", 0.0)
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        ((before,),) = database.sql("SELECT ID FROM information_schema.PROCESSLIST WHERE USER = %s", database.name)
        database.sql("KILL %s", before)
        await ship.ship(*numbered(6, 10))
        assert ship.writer.retries == 0
        ((after,),) = database.sql("SELECT ID FROM information_schema.PROCESSLIST WHERE USER = %s", database.name)
    assert after != before
    assert stored(database) == {jid(number): number for number in range(1, 11)}


async def test_a_commit_whose_answer_is_lost_is_not_stored_twice(database: Scratch, shipping: Make) -> None:
    relay = Relay(database.server.host, database.server.port, losing=b"\x03COMMIT", times=3)
    async with relay, shipping() as ship:
        ship.mysql["mysql.port"] = relay.port
        await ship.take(*numbered(1, 5))
        await ship.fail(3)
        assert relay.lost == 3
        books = await ship.drain()
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (0, 5, 0)
        await catches_up(ship, database, count=5)


async def test_a_row_that_another_transaction_locks_is_tried_again(database: Scratch, shipping: Make) -> None:
    async with shipping("before") as ship:
        await ship.ship(*numbered(1, 1))
    with database.globally(innodb_lock_wait_timeout=1), database.server.connect(database=database.name) as other:
        other.begin()
        with other.cursor() as cursor:
            cursor.execute("INSERT INTO jids VALUES (%s, '{}')", (jid(3),))
        async with shipping() as ship:
            await ship.take(*numbered(1, 5))
            await ship.fail(1)
            assert "Lock wait timeout" in ship.fault
            other.rollback()
            await catches_up(ship, database, count=5)


async def test_a_locked_table_is_given_up_after_the_statement_timeout(database: Scratch, shipping: Make) -> None:
    async with shipping("before") as ship:
        await ship.ship(*numbered(1, 1))
    with database.server.connect(database=database.name) as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLES salt_returns WRITE")
        async with shipping(**QUICK) as ship:
            await ship.take(*numbered(1, 5))
            await ship.fail(2)
            assert "no answer within 0.5 s" in ship.fault
            cursor.execute("UNLOCK TABLES")
            await catches_up(ship, database, count=5)


async def test_a_read_only_server_is_waited_for(
    database: Scratch, shipping: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        with database.globally(read_only=1):
            await ship.take(*numbered(6, 10))
            await ship.fail(3)
        assert "read-only" in ship.fault
        assert errors(caplog) == []  # a failover does that for a while; it mends itself
        await catches_up(ship, database, count=10)


async def test_a_full_server_is_waited_for(database: Scratch, shipping: Make) -> None:
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


async def test_the_second_host_is_used_while_the_first_is_away(database: Scratch, shipping: Make) -> None:
    async with shipping(mysql={"mysql.host": ["127.0.0.9", database.server.host]}) as ship:
        await ship.ship(*numbered(1, 5))
        assert ship.writer.server_host == f"{database.server.host}:{database.server.port}"
    assert stored(database) == {jid(number): number for number in range(1, 6)}


async def test_a_primary_that_was_demoted_is_left_for_the_next_host(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    promoted = MariaDB(tmp_path / "promoted", options=["--bind-address=127.0.0.2"])
    promoted.port = database.server.port
    with promoted:
        promoted.create_database(database.name, database.name, PASSWORD)
        with database.globally(read_only=1):
            async with shipping(mysql={"mysql.host": [database.server.host, "127.0.0.2"]}, schema="create") as ship:
                await ship.take(*numbered(1, 5))
                await ship.drain()
                assert ship.writer.retries > 0
                assert ship.writer.server_host == f"127.0.0.2:{promoted.port}"
        assert promoted.sql("SELECT COUNT(*) FROM salt_returns", db=database.name) == [(5,)]


async def test_a_journal_that_is_locked_for_a_while_ends_nothing(database: Scratch, shipping: Make) -> None:
    async with shipping(flush_interval=0.2) as ship:
        with contextlib.closing(sqlite3.connect(ship.journal.path, isolation_level=None)) as shell:
            await ship.take(*numbered(1, 5))
            shell.execute("BEGIN IMMEDIATE")  # an operator's sqlite3, say
            await ship.until(lambda: "database is locked" in ship.fault)
            shell.execute("ROLLBACK")
        await ship.drain()
        assert (await ship.books())["pending"] == 0
    assert stored(database) == {jid(number): number for number in range(1, 6)}


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
        f"{privilege} command denied .* grant the user",
    )


REFUSALS = (
    Refusal(
        "wrong password",
        "SET PASSWORD FOR `{db}` = PASSWORD('another')",
        f"SET PASSWORD FOR `{{db}}` = PASSWORD('{pymysql.converters.escape_string(PASSWORD)}')",
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
        "locked .* unlock the user's account",
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
        "SELECT 1",
        schema.statements()["salt_events"].replace("`salt_events`", "`{db}`.`salt_events`"),
        "no table salt_events; use schema: create, or create it",
        {"schema": "check", "events": ["*"]},
    ),
    Refusal(
        "missing column",
        "ALTER TABLE `{db}`.salt_returns DROP COLUMN full_ret",
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
        await ship.ship(returned(jid(1), "minion-1", 1))  # creates the tables
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
    ("table", "breaks", "spared"),
    [
        ("jids", "DROP PRIMARY KEY", ""),
        ("salt_returns", "DROP PRIMARY KEY", ""),
        ("salt_returns", "DROP PRIMARY KEY, ADD PRIMARY KEY (jid, id, fun)", " DROP PRIMARY KEY,"),
        ("salt_events", "DROP COLUMN event_key", ""),
    ],
)
async def test_a_table_without_its_unique_key_gets_no_row_and_the_statement_in_the_log_mends_it(
    database: Scratch, shipping: Make, table: str, breaks: str, spared: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping("before", events=["salt/auth"]) as ship:
        await ship.ship(returned(jid(1), "minion-1", 1))
    database.sql(f"ALTER TABLE {table} {breaks}")
    before = database.count(table)
    async with shipping(events=["salt/auth"]) as ship:
        await ship.take(*numbered(1, 10))
        await ship.fail(3)
        (line,) = errors(caplog)
        assert f"the table {table} has no unique key" in line
        assert database.count(table) == before
        found = re.search(r"then run: (ALTER TABLE `\w+`)([^;]+\)) \(events wait", line)
        assert found, line
        database.sql(found[1] + spared + found[2])
        await catches_up(ship, database, count=10)


async def test_a_table_that_is_dropped_while_running_is_created_again(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(*returns(1))
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
