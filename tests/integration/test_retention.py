"""What is too old goes, from tables of every shape, in small steps, and nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import partitions, purge, retention, schema, upkeep
from salt_mysql_engine.clock import Clock
from salt_mysql_engine.control import Control, Verb, socket_path
from salt_mysql_engine.database import Database
from salt_mysql_engine.retention import Retention
from salt_mysql_engine.settings import Connection
from salt_mysql_engine.steady import Steady
from salt_mysql_engine.upkeep import EngineError
from tests.support.mariadb import wait_until
from tests.support.oldtables import MAKERS, NOW, add_job, add_return, job, load_of, make_ours, make_saltext, opts_of
from tests.support.proxy import Proxy
from tests.support.scratch import Scratch
from tests.support.shipping import Shipping, published, returned

QUIET: Callable[[str], None] = [].append
"""Where lines of progress go."""


def make_partitioned(database: Scratch) -> None:
    make_ours(database)
    today = NOW.date()
    clause = partitions.clause(partitions.layout("week", today - datetime.timedelta(days=60), today))
    for table in schema.PARTITIONED:
        database.sql(f"ALTER TABLE {table} {clause}")


SHAPES: dict[str, Callable[[Scratch], None]] = {**MAKERS, "ours": make_ours, "partitioned": make_partitioned}
OLD = [job(40), job(31), job(30.1) + "_4711"]
NEW = [job(29.9), job(1), job(-400)]
STRANGE = ["", "1", "20250101", "20250101000000000000x", "2025010100000000000\u0661", "no jid", job(50) + "\n"]


def fill(database: Scratch) -> None:
    for each in [*OLD, *NEW, *STRANGE]:
        if each == OLD[1]:
            database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", each, load_of())  # nobody answered
        else:
            add_job(database, each, "web1", "we'b2\\")
    for days in (40, 29):
        at = (NOW - datetime.timedelta(days=days)).strftime("%Y-%m-%d %H:%M:%S")
        database.sql(
            "INSERT INTO salt_events (tag, data, alter_time, master_id) VALUES (%s, '', %s, '')", str(days), at
        )


def jids(database: Scratch, table: str = "jids") -> set[str]:
    return {row[0] for row in database.sql(f"SELECT jid FROM {table}")}


def parts_of(database: Scratch, table: str) -> list[str]:
    """The names of a table's partitions, in order."""
    rows = database.sql(
        "SELECT PARTITION_NAME FROM information_schema.PARTITIONS WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s "
        "ORDER BY PARTITION_ORDINAL_POSITION",
        database.name,
        table,
    )
    return [name for (name,) in rows]


@pytest.fixture
def opts(database: Scratch, tmp_path: Path) -> dict[str, Any]:
    return opts_of(database, tmp_path)


def database_of(database: Scratch) -> Database:
    return Database(lambda: Connection.from_opts(database.mysql), connect_timeout=10, statement_timeout=60)


# What goes


@pytest.mark.parametrize("shape", SHAPES)
def test_a_purge_takes_jobs_and_events_that_are_too_old_and_nothing_else(
    database: Scratch, opts: dict[str, Any], shape: str
) -> None:
    SHAPES[shape](database)
    fill(database)
    would = upkeep.purge(opts, 30, True, QUIET)
    assert {name: would[name] for name in schema.TABLES} == {"jids": 3, "salt_returns": 4, "salt_events": 1}
    assert jids(database) == {*OLD, *NEW, *STRANGE}
    did = upkeep.purge(opts, 30, False, QUIET)
    assert {name: did[name] for name in schema.TABLES} == {"jids": 3, "salt_returns": 4, "salt_events": 1}
    assert jids(database) == jids(database, "salt_returns") == {*NEW, *STRANGE}
    assert [row["tag"] for row in database.rows("salt_events")] == ["29"]
    again = upkeep.purge(opts, 30, False, QUIET)
    assert {name: again[name] for name in schema.TABLES} == dict.fromkeys(schema.TABLES, 0)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "2014"])
def test_with_archive_what_goes_is_in_the_archive_tables_and_a_replay_adds_nothing(
    database: Scratch, tmp_path: Path, shape: str
) -> None:
    SHAPES[shape](database)
    fill(database)
    opts = opts_of(database, tmp_path, archive=True)
    before = set(database.sql("SELECT jid, id, full_ret FROM salt_returns"))
    upkeep.purge(opts, 30, False, QUIET)
    assert jids(database, "jids_archive") == set(OLD)
    gone = before - set(database.sql("SELECT jid, id, full_ret FROM salt_returns"))
    assert set(database.sql("SELECT jid, id, full_ret FROM salt_returns_archive")) == gone
    assert len(gone) == 4
    assert [tag for (tag,) in database.sql("SELECT tag FROM salt_events_archive")] == ["40"]
    assert "PARTITION" not in database.sql("SHOW CREATE TABLE salt_returns_archive")[0][1]
    add_job(database, OLD[0], "web1", "web3", value='"later"')
    did = upkeep.purge(opts, 30, False, QUIET)
    assert (did["salt_returns"], did["jids"]) == (2, 1)
    rows = database.sql("SELECT id, `return` FROM salt_returns_archive WHERE jid = %s ORDER BY id", OLD[0])
    assert rows == [("we'b2\\", "true"), ("web1", "true"), ("web3", '"later"')]
    assert database.count("jids_archive") == 3


def test_archive_tables_that_saltext_made_are_written_to_with_the_columns_they_have(
    database: Scratch, tmp_path: Path
) -> None:
    make_saltext(database)
    for table in schema.TABLES:
        database.sql(f"CREATE TABLE {table}_archive LIKE {table}")
    database.sql("DROP TABLE jids, salt_returns, salt_events")
    make_ours(database)
    fill(database)
    upkeep.purge(opts_of(database, tmp_path, archive=True), 30, False, QUIET)
    assert jids(database, "jids_archive") == set(OLD)
    assert database.count("salt_returns_archive") == 4
    add_return(database, job(60), "web1", value='"\U0001f600"')
    with pytest.raises(EngineError, match=r"salt_returns_archive cannot hold .* mysql_jobcache.migrate brings"):
        upkeep.purge(opts_of(database, tmp_path, archive=True), 30, False, QUIET)
    assert job(60) in jids(database, "salt_returns")
    upkeep.migrate(opts_of(database, tmp_path), False, QUIET)
    upkeep.purge(opts_of(database, tmp_path, archive=True), 30, False, QUIET)
    assert (job(60), '"\U0001f600"') in database.sql("SELECT jid, `return` FROM salt_returns_archive")


def test_tables_without_an_index_are_not_archived_row_by_row(database: Scratch, tmp_path: Path) -> None:
    MAKERS["2014"](database)
    fill(database)
    with pytest.raises(EngineError, match=r"no index that begins with jid.*mysql_jobcache.migrate first"):
        upkeep.purge(opts_of(database, tmp_path, archive=True), 30, False, QUIET)
    assert jids(database) == {*OLD, *NEW, *STRANGE}


@pytest.mark.parametrize("archive", [False, True])
def test_partitions_that_are_too_old_are_dropped_but_for_one_with_a_jid_that_is_none(
    database: Scratch, tmp_path: Path, archive: bool
) -> None:
    make_partitioned(database)
    names = [part.name for part in partitions.layout("week", (NOW - datetime.timedelta(days=60)).date(), NOW.date())]
    strange = f"{names[2][1:]}-x"
    for days in range(0, 60):
        add_job(database, job(days), "web1")
    add_return(database, strange, "web1")
    opts = opts_of(database, tmp_path, archive=archive)
    expected = upkeep.purge(opts, 30, True, QUIET)
    did = upkeep.purge(opts, 30, False, QUIET)
    whole = [name for name in names[:-1] if (NOW.date() - partitions.day(name[1:])).days >= 30 + 7]
    assert len(whole) >= 3
    kept = f"salt_returns.{names[2]}"
    assert did["partitions_dropped"] == [name for name in expected["partitions_dropped"] if name != kept]
    assert {f"jids.{name}" for name in whole} <= set(did["partitions_dropped"])
    present = parts_of(database, "salt_returns")
    assert names[2] in present
    assert not set(present) & (set(whole) - {names[2]})
    assert jids(database, "salt_returns") == {job(days) for days in range(30)} | {strange}
    assert jids(database) == {job(days) for days in range(30)}
    if archive:
        assert jids(database, "salt_returns_archive") == {job(days) for days in range(30, 60)}
        assert jids(database, "jids_archive") == {job(days) for days in range(30, 60)}


def test_partitions_are_dropped_few_at_a_time(database: Scratch, tmp_path: Path) -> None:
    """Everybody waits while the server deletes files, for as long as there are files in one statement."""
    make_ours(database)
    today = NOW.date()
    clause = partitions.clause(partitions.layout("day", today - datetime.timedelta(days=42), today))
    for table in schema.PARTITIONED:
        database.sql(f"ALTER TABLE {table} {clause}")
    for days in range(43):
        add_job(database, job(days), "web1")
    before = altered(database)
    did = upkeep.purge(opts_of(database, tmp_path), 30, False, QUIET)
    assert len(did["partitions_dropped"]) == 2 * 12
    assert altered(database) - before == 2 * 3
    assert jids(database) == jids(database, "salt_returns") == {job(days) for days in range(30)}


def test_partitions_whose_drop_was_not_answered_are_dropped_once_and_counted(database: Scratch, tmp_path: Path) -> None:
    make_partitioned(database)
    for days in range(60):
        add_job(database, job(days), "web1")
    with Proxy(database.server.host, database.server.port) as proxy:
        proxy.lose_answer(to=b"DROP PARTITION", times=1)
        did = upkeep.purge(opts_of(database, tmp_path) | {"mysql.port": proxy.port}, 30, False, QUIET)
        assert proxy.lost == 1
    assert did["salt_returns"] == did["jids"] == 30
    assert jids(database) == jids(database, "salt_returns") == {job(days) for days in range(30)}


def altered(database: Scratch) -> int:
    """The server's ALTER TABLE statements so far."""
    ((_, count),) = database.sql("SHOW GLOBAL STATUS LIKE 'Com_alter_table'")
    return int(count)


# What an operator may ask


@pytest.mark.parametrize(
    ("days", "words"),
    [(-1, "-1 is not allowed; it must be a number from 0"), ("x", "'x' is not allowed"), (True, "True is not allowed"),
     (40_000, "40000 is not allowed"), (0, "retention_days is 0: everything stays for ever"),
     (None, "retention_days is 0: everything stays for ever")],
)  # fmt: skip
def test_days_that_are_none_delete_nothing(database: Scratch, opts: dict[str, Any], days: Any, words: str) -> None:
    make_ours(database)
    fill(database)
    with pytest.raises(EngineError) as caught:
        upkeep.purge(opts, days, False, QUIET)
    assert words in str(caught.value)
    assert jids(database) == {*OLD, *NEW, *STRANGE}


def test_the_days_are_those_of_the_master_config_or_of_the_running_engine(database: Scratch, tmp_path: Path) -> None:
    make_ours(database)
    fill(database)
    opts = opts_of(database, tmp_path, retention_days=35)
    assert upkeep.purge(opts, None, True, QUIET)["jids"] == 1
    with pytest.raises(EngineError, match="confirmed by the master's own pillar"):
        upkeep.purge(opts, None, False, QUIET)
    with pytest.raises(EngineError, match=r"master config: retention_days: 'x' is not allowed"):
        upkeep.purge(opts_of(database, tmp_path, retention_days="x"), None, True, QUIET)

    async def status() -> dict[str, Any]:
        settings = {"retention_days": 30.0, "archive": False, "partitions": "none"}
        return {"settings": {name: {"value": value} for name, value in settings.items()}}

    async def asked() -> dict[str, Any]:
        serving = asyncio.create_task(Control(socket_path(opts), {"status": Verb(status)}).run())
        await asyncio.to_thread(wait_until, socket_path(opts).exists, timeout=10, what="the socket")
        try:
            return await asyncio.to_thread(upkeep.purge, opts, None, True, QUIET)
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    assert asyncio.run(asked())["jids"] == 3


def test_progress_has_a_bar_a_share_and_the_time_that_is_left(
    database: Scratch, opts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_SHOW_SECONDS", 0.0)
    make_ours(database)
    for number in range(120):
        add_job(database, job(40, number), "web1")
    lines: list[str] = []
    upkeep.purge(opts, 30, False, lines.append)
    assert any("salt_returns: 42 % of about 120 rows, 0:00 left" in line for line in lines), lines
    assert lines[-1] == ""


# Beside others


def test_a_purge_beside_a_writer_holds_no_lock_for_long_and_takes_only_what_is_old(
    database: Scratch, opts: dict[str, Any]
) -> None:
    make_ours(database)
    with database.server.connect(database=database.name) as connection, connection.cursor() as cursor:
        for start in range(0, 20_000, 1000):
            rows = [(job(40, n // 10), f"m{n}", "x" * 500) for n in range(start, start + 1000)]
            cursor.executemany(
                "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) "
                "VALUES ('f', %s, '1', %s, '1', %s)",
                rows,
            )
    waits: list[float] = []
    stop = threading.Event()
    written: set[str] = set()

    def write() -> None:
        """Locks the very rows that go, one after another, and writes new ones between."""
        number = 0
        with database.server.connect(database=database.name) as connection, connection.cursor() as cursor:
            while not stop.is_set():
                number += 1
                began = time.monotonic()
                cursor.execute(
                    "UPDATE salt_returns SET success = '0' WHERE jid = %s AND id = %s",
                    (job(40, number * 7 % 2000), f"m{number * 70 % 20_000}"),
                )
                cursor.execute(
                    "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) "
                    "VALUES ('f', %s, '1', 'm', '1', '')",
                    (job(0, number),),
                )
                waits.append(time.monotonic() - began)
                written.add(job(0, number))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        did = upkeep.purge(opts, 30, False, QUIET)
    finally:
        stop.set()
        thread.join()
    assert did["salt_returns"] == 20_000
    assert jids(database, "salt_returns") == written
    assert len(waits) > 50
    # The benchmark holds it to 100 ms; here other tests share the machine.
    assert sorted(waits)[int(len(waits) * 0.98)] < 0.1, sorted(waits)[-20:]


def test_a_row_that_somebody_else_holds_is_waited_for(
    database: Scratch, opts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from salt_mysql_engine import steady

    monkeypatch.setattr(steady, "_ROW_LOCK_SECONDS", 1)
    make_ours(database)
    fill(database)
    done: list[Any] = []
    holder = database.server.connect(database=database.name, autocommit=False)
    with holder, holder.cursor() as cursor:
        cursor.execute("SELECT * FROM salt_returns WHERE jid = %s FOR UPDATE", (OLD[0],))
        waits = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_waits'"
        before = int(database.sql(waits)[0][1])
        thread = threading.Thread(target=lambda: done.append(upkeep.purge(opts, 30, False, QUIET)))
        thread.start()
        wait_until(
            lambda: int(database.sql(waits)[0][1]) > before + 1,
            timeout=30,
            what="a second try",
        )
        holder.rollback()
    thread.join()
    assert done[0]["salt_returns"] == 4


async def test_one_at_a_time_purges_a_database(database: Scratch, opts: dict[str, Any]) -> None:
    make_ours(database)
    async with Steady(database_of(database), purge.LOCK, patience=5):
        with pytest.raises(EngineError, match="a migration or a purge of this database runs now"):
            await asyncio.to_thread(upkeep.purge, opts, 30, False, QUIET)
    assert (await asyncio.to_thread(upkeep.purge, opts, 30, False, QUIET))["jids"] == 0


# The engine's own


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(retention, "_ROUND_SECONDS", 0.05)


def keeper_of(database: Scratch) -> Retention:
    keeper = Retention(database_of(database), Clock())
    keeper.confirmed = True
    return keeper


@contextlib.contextmanager
def running(keeper: Retention) -> Iterator[asyncio.Task[None]]:
    task = asyncio.create_task(keeper.run())
    try:
        yield task
    finally:
        task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition, timeout=30, what="the round")


@pytest.mark.usefixtures("quick")
async def test_the_engine_takes_out_what_is_too_old_and_at_once_when_told_of_new_settings(database: Scratch) -> None:
    make_ours(database)
    fill(database)
    keeper = keeper_of(database)
    with running(keeper):
        await asyncio.sleep(0.3)
        assert jids(database) == {*OLD, *NEW, *STRANGE}  # for ever, by default
        keeper.days = 35
        keeper.retime()
        await until(lambda: OLD[0] not in jids(database))
        await until(lambda: keeper.last is not None)
        assert keeper.last is not None
        assert (keeper.last["jids"], keeper.last["salt_returns"]) == (1, 2)
        keeper.days = 30
        keeper.archive = True
        keeper.retime()
        await until(lambda: jids(database) == {*NEW, *STRANGE})
        await until(lambda: jids(database, "jids_archive") == set(OLD[1:]))


@pytest.mark.usefixtures("quick")
async def test_the_engine_makes_the_coming_partitions(database: Scratch) -> None:
    make_ours(database)
    then = NOW.date() - datetime.timedelta(days=30)
    for table in schema.PARTITIONED:
        database.sql(f"ALTER TABLE {table} {partitions.clause(partitions.layout('day', then, then))}")
    add_job(database, "99991231000000000000", "web1")
    keeper = keeper_of(database)
    keeper.partitions = "day"
    wanted = [part.name for part in partitions.layout("day", then, NOW.date())]
    with running(keeper):
        for table in schema.PARTITIONED:
            await until(lambda table=table: parts_of(database, table) == wanted)
    assert jids(database) == {"99991231000000000000"}


@pytest.mark.usefixtures("quick")
async def test_the_engine_fills_in_what_other_writers_leave_out(database: Scratch) -> None:
    make_ours(database)
    loads = {
        job(1, 1): (load_of(), ("test.ping", "root", "*")),
        job(1, 2): (json.dumps({"fun": ["a.b", "c.d"], "tgt": ["w1", "w2"], "user": None}), ("a.b,c.d", "", "w1,w2")),
        job(1, 3): ("{not json", ("", "", "")),
        job(1, 4): ("[]", ("", "", "")),
        job(1, 5): (
            json.dumps({"fun": "f" * 300, "user": "ü😀'\\", "tgt": "\ud800"}),
            ("f" * 255, "ü😀'\\", "\\ud800"),
        ),
    }
    for each, (load, _) in loads.items():
        database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", each, load)
    database.sql("INSERT INTO jids VALUES (%s, '{}', 'there', 'is', 'one')", job(1, 6))
    keeper = keeper_of(database)
    with running(keeper):
        await until(lambda: database.sql("SELECT 1 FROM jids WHERE fun IS NULL") == [])
        await until(lambda: keeper.filled == len(loads))
    rows = {row["jid"]: (row["fun"], row["user"], row["tgt"]) for row in database.rows("jids")}
    assert rows == {each: texts for each, (_, texts) in loads.items()} | {job(1, 6): ("there", "is", "one")}


@pytest.mark.usefixtures("quick")
async def test_nothing_is_purged_by_settings_that_no_pillar_has_confirmed(database: Scratch) -> None:
    make_ours(database)
    fill(database)
    keeper = Retention(database_of(database), Clock())
    keeper.days = 30
    with running(keeper):
        await asyncio.sleep(0.5)
        assert jids(database) == {*OLD, *NEW, *STRANGE}
        keeper.confirmed = True
        await until(lambda: jids(database) == {*NEW, *STRANGE})


@pytest.mark.usefixtures("quick")
async def test_a_clock_that_is_ahead_makes_nothing_old(
    database: Scratch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_ours(database)
    fill(database)
    keeper = keeper_of(database)
    keeper.days = 30
    ahead = time.time() + 300 * 86_400
    monkeypatch.setattr(retention.time, "time", lambda: ahead)
    with running(keeper):
        await until(lambda: jids(database) == {*NEW, *STRANGE})
        await until(lambda: keeper.last is not None)
    assert "The clocks of the master and of the database server are" in caplog.text


@pytest.mark.usefixtures("quick")
async def test_a_clock_that_is_set_forward_while_it_runs_makes_nothing_old_though_the_server_shares_it(
    database: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ours(database)
    fill(database)
    keeper = keeper_of(database)
    keeper.days = 30
    ahead = time.time() + 300 * 86_400
    monkeypatch.setattr(time, "time", lambda: ahead)
    with database.globally(init_connect=f"SET timestamp = {ahead}"), running(keeper):
        await until(lambda: keeper.last is not None)
        assert jids(database) == {*NEW, *STRANGE}


def test_a_purge_that_is_asked_for_goes_by_the_earlier_clock_too(
    database: Scratch, opts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_ours(database)
    fill(database)
    ahead = time.time() + 300 * 86_400
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert upkeep.purge(opts, 30, True, QUIET)["jids"] == len(OLD)
    upkeep.purge(opts, 30, False, QUIET)
    assert jids(database) == {*NEW, *STRANGE}
    assert "The clocks of the master and of the database server are" in caplog.text


@pytest.mark.usefixtures("quick")
async def test_upkeep_goes_on_whatever_rows_others_left_and_whatever_goes_wrong(
    database: Scratch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_ours(database)
    database.sql("ALTER TABLE jids MODIFY `load` LONGTEXT NULL")
    database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, NULL)", job(1))
    keeper = keeper_of(database)

    async def fail(*_: Any, **__: Any) -> int:
        raise ZeroDivisionError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(retention, "backfill", fail)
        with running(keeper) as task:
            await until(lambda: "ZeroDivisionError: a fault of ours" in keeper.error)
            assert "a fault of ours" in caplog.text
            assert not task.done()
            patch.undo()
            await until(lambda: keeper.filled == 1 or not keeper.error)
            assert not task.done()
    await until(lambda: database.sql("SELECT fun FROM jids") == [("",)])


@pytest.mark.usefixtures("quick")
async def test_what_goes_wrong_is_said_once_and_ends_nothing(
    database: Scratch, caplog: pytest.LogCaptureFixture
) -> None:
    make_ours(database)
    add_job(database, OLD[0], "web1")
    keeper = keeper_of(database)
    keeper.days = 30
    database.server.sql(f"REVOKE ALL ON `{database.name}`.* FROM `{database.name}`")
    database.server.sql(f"GRANT SELECT, UPDATE ON `{database.name}`.* TO `{database.name}`")
    with running(keeper) as task, caplog.at_level(logging.WARNING):
        await until(lambda: bool(keeper.error))
        await asyncio.sleep(0.5)
        assert not task.done()
        said = [record.message for record in caplog.records if "cannot be looked after" in record.message]
        assert len(said) == 1
        assert "DELETE command denied" in said[0]
        database.server.sql(f"GRANT ALL ON `{database.name}`.* TO `{database.name}`")
        await until(lambda: jids(database) == set())
        await until(lambda: not keeper.error)


async def test_upkeep_beside_the_writer_costs_no_row(
    database: Scratch, shipping: Callable[..., Shipping], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_PURGE_SECONDS", 0.0)
    keeper = keeper_of(database)
    keeper.days = 30
    rounds = 0
    async with shipping(flush_interval=0.01, batch_size=30) as ship:
        await ship.ship(returned(job(0), "first"))
        loop = asyncio.get_running_loop()
        end = loop.time() + 3
        number = 0
        while loop.time() < end:
            bodies = []
            for _ in range(40):
                number += 1
                for days in (0, 40):
                    bodies += [published(job(days, number), ["w"]), returned(job(days, number), "w")]
            await ship.take(*bodies)
            await keeper.round()
            rounds += 1
        books = await ship.settled()
    assert rounds > 3
    assert (books["pending"], books["dead_letters"]) == (0, 0)
    new = {job(0, each) for each in range(1, number + 1)}
    assert {each for each in jids(database) if each > job(1)} == new | {job(0)}
    await keeper.round()
    assert jids(database) == jids(database, "salt_returns") == new | {job(0)}
