"""Old tables become ours in place, beside writers and through crashes, and no row is lost, changed or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymysql
import pytest

from salt_mysql_engine import schema, upkeep
from salt_mysql_engine.database import Session
from salt_mysql_engine.upkeep import EngineError
from tests.support import migrator
from tests.support.mariadb import MariaDB, accepts, wait_until
from tests.support.oldtables import (
    MAKERS,
    add_job,
    add_return,
    load_of,
    make_2014,
    make_saltext,
    make_version_1,
    make_version_2,
    opts_of,
)
from tests.support.proxy import Proxy
from tests.support.scratch import Scratch, scratch
from tests.support.shipping import Shipping, jid, published, returned

Make = Callable[..., Shipping]
Opts = dict[str, Any]
MANY = 5000
"""Jobs: enough to migrate for some seconds in small steps."""
QUIET: Callable[[str], None] = [].append
"""Where lines of progress go."""


@pytest.fixture
def opts(database: Scratch, tmp_path: Path) -> Opts:
    return opts_of(database, tmp_path)


def migrate(opts: Opts) -> dict[str, Any]:
    """Migrate, and see that nothing is left to do."""
    done = upkeep.migrate(opts, False, QUIET)
    said = upkeep.schema(opts)
    assert (said["kind"], said["missing"], said["version"]) == ("ours", [], schema.newest())
    assert said["migration_to_go_on_with"] == []
    return done


def shown(database: Scratch) -> dict[str, Any]:
    """Everything that a change of anything would change."""
    tables = [name for (name,) in database.sql("SHOW TABLES")]
    return {
        name: (database.sql(f"SHOW CREATE TABLE {name}"), database.sql(f"CHECKSUM TABLE {name}")) for name in tables
    }


def returns(database: Scratch) -> dict[tuple[str, str], str]:
    """Each return's value."""
    rows = database.sql("SELECT jid, id, `return` FROM salt_returns")
    values = {(job, minion): value for job, minion, value in rows}
    assert len(values) == len(rows)
    return values


def fill(database: Scratch, jobs: int, *, minions: int = 2) -> dict[tuple[str, str], str]:
    """Many jobs and their returns, quickly; gives each return's value."""
    with database.server.connect(database=database.name) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO jids (jid, `load`) VALUES (%s, %s)", [(jid(10 * n), load_of()) for n in range(jobs)]
        )
        rows = [
            ("test.ping", jid(10 * n), str(n), f"m{m}", "1", f'{{"return": {n}}}')
            for n in range(jobs)
            for m in range(minions)
        ]
        cursor.executemany(
            "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) VALUES (%s, %s, %s, %s, %s, %s)", rows
        )
        cursor.executemany(
            "INSERT INTO salt_events (tag, data, master_id) VALUES (%s, '{}', 'm')", [(f"t/{n}",) for n in range(jobs)]
        )
    return {(row[1], row[3]): row[2] for row in rows}


# What becomes of what


@pytest.mark.parametrize("shape", MAKERS)
def test_every_old_shape_becomes_ours_with_all_of_its_rows(database: Scratch, opts: Opts, shape: str) -> None:
    MAKERS[shape](database)
    values = fill(database, 60)
    before = upkeep.schema(opts)
    assert before["kind"] == shape
    done = migrate(opts)
    assert done["migrated"] == ["jids", "salt_events", "salt_returns"]
    assert returns(database) == values
    assert [row["jid"] for row in database.rows("jids")] == sorted({job for job, _ in values})
    assert {row["load"] for row in database.rows("jids")} == {load_of()}
    assert {(row["fun"], row["user"], row["tgt"]) for row in database.rows("jids")} == {("test.ping", "root", "*")}
    assert [row["tag"] for row in database.rows("salt_events")] == [f"t/{n}" for n in range(60)]
    assert sorted(name for (name,) in database.sql("SHOW TABLES")) == [
        "jids",
        "mysql_jobcache_schema",
        "salt_events",
        "salt_returns",
    ]
    again = migrate(opts)
    assert (again["created"], again["migrated"], again["rows_filled_in"]) == ([], [], 0)


def test_a_migrated_table_is_the_one_that_we_would_create(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    migrate(opts)
    migrated = {table: database.sql(f"SHOW CREATE TABLE {table}")[0][1] for table in schema.TABLES}
    database.sql(f"DROP TABLE {', '.join(migrated)}, mysql_jobcache_schema")
    assert migrate(opts)["created"] == list(schema.TABLES)
    for table, ddl in migrated.items():
        created = database.sql(f"SHOW CREATE TABLE {table}")[0][1]
        # MySQL says of what it altered also what is the default.
        said = ddl.replace("CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_ai_ci ", "")
        assert said.split("AUTO_INC")[0] == created.split("AUTO_INC")[0]


def test_of_duplicates_the_first_return_stands(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    for value, at in (("2", "2026-03-29 02:00:00"), ("1", "2026-03-29 01:00:00"), ("3", "2026-03-29 01:00:00")):
        add_return(database, jid(1), "web1", value=value, at=at)
    for value in ("1", "2", "3"):
        add_return(database, jid(2), "web1", value=value, at="2026-03-29 01:00:00")
    add_return(database, jid(2), "Web1", value="4")
    migrate(opts)
    assert returns(database) == {(jid(1), "web1"): "1", (jid(2), "web1"): "1", (jid(2), "Web1"): "4"}


@pytest.mark.parametrize("make", [make_2014, make_saltext, make_version_1])
def test_keys_compare_byte_by_byte_once_migrated_trailing_spaces_too(
    database: Scratch, opts: Opts, make: Callable[[Scratch], None]
) -> None:
    make(database)
    add_job(database, jid(1), "web1")
    if make is not make_version_1:
        add_return(database, jid(1), "web1 ", value="2")
    assert any("salt_returns: id is varchar(255)" in each for each in upkeep.schema(opts)["missing"])
    done = migrate(opts)
    assert done["version"] == schema.newest()
    assert set(done["rows_folded"].values()) == {0}
    if make is make_version_1:
        add_return(database, jid(1), "web1 ", value="2")
    add_return(database, jid(1), "Web1", value="3")
    assert returns(database) == {(jid(1), "web1"): "true", (jid(1), "web1 "): "2", (jid(1), "Web1"): "3"}
    assert database.sql("SELECT `return` FROM salt_returns WHERE id = 'web1 '") == [("2",)]
    add_job(database, jid(1) + " ")
    assert upkeep.schema(opts)["missing"] == []


def test_a_migration_says_how_many_rows_it_folded(database: Scratch, opts: Opts) -> None:
    make_2014(database)
    for minion in ("web1", "web1", "web1", "web2"):
        add_return(database, jid(1), minion)
    for _ in range(2):
        database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", jid(1), load_of())
    assert migrate(opts)["rows_folded"] == {"jids": 1, "salt_returns": 2, "salt_events": 0}


def test_of_duplicates_without_a_time_the_one_that_was_inserted_first_stands(database: Scratch, opts: Opts) -> None:
    make_2014(database)
    for value in ("1", "2", "3"):
        for minion in ("web2", "web1"):
            add_return(database, "20260228235959123456", minion, value=value)
    migrate(opts)
    assert set(returns(database).values()) == {"1"}
    assert {str(row["alter_time"]) for row in database.rows("salt_returns")} == {"2026-02-28 23:59:59.123456"}


def test_of_several_loads_of_a_job_a_published_one_stands(database: Scratch, opts: Opts) -> None:
    make_2014(database)
    for load in (json.dumps({"fun": "test.ping", "return": 1}), load_of("test.arg"), load_of("test.kwarg")):
        database.sql("INSERT INTO jids VALUES (%s, %s)", jid(1), load)
    migrate(opts)
    row = database.row("jids")
    assert (row["load"], row["fun"]) == (load_of("test.arg"), "test.arg")


def test_a_whole_return_stands_before_a_trimmed_one(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    trimmed = '{"return": "VALUE_TRIMMED", "trimmed": true}'
    for full_ret, value in ((trimmed, '"VALUE_TRIMMED"'), ('{"return": 1}', "1"), (trimmed, '"VALUE_TRIMMED"')):
        database.sql(
            "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) VALUES ('f', %s, %s, 'm', '1', %s)",
            jid(1), value, full_ret,
        )  # fmt: skip
    migrate(opts)
    assert returns(database) == {(jid(1), "m"): "1"}


def test_rows_whose_jid_is_no_jid_texts_of_every_kind_and_dates_of_zeros_come_along(
    database: Scratch, opts: Opts
) -> None:
    make_saltext(database)
    database.sql("ALTER TABLE salt_returns MODIFY success VARCHAR(10) NULL")
    jids = ["", "20261131246161000000", "2026", "abc", "ABC", "no jid 'at' \\all", "zz%_", "20260329000000000001_77"]
    for number, job in enumerate(jids):
        add_return(database, job, "ü 'm' \\", value=str(number))
    database.sql("UPDATE salt_returns SET success = NULL WHERE jid = 'abc'")
    with database.globally(sql_mode=""):
        database.sql("UPDATE salt_returns SET alter_time = 0")
    database.sql("ALTER TABLE salt_returns ADD when_seen DATETIME NOT NULL DEFAULT '1999-01-01', ADD note TEXT")
    with database.globally(sql_mode=""):
        database.sql("UPDATE salt_returns SET when_seen = 0, note = 'mine' WHERE jid = 'zz%_'")
    migrate(opts)
    expected = {(job, "ü 'm' \\"): str(number) for number, job in enumerate(jids)}
    assert returns(database) == expected
    assert database.sql("SELECT note FROM salt_returns WHERE when_seen = 0") == [("mine",)]
    ((at,),) = database.sql("SELECT alter_time FROM salt_returns WHERE jid LIKE '%%77'")
    assert str(at) == "2026-03-29 00:00:00.000001"


def test_rows_without_a_jid_come_along_under_an_empty_one(database: Scratch, opts: Opts) -> None:
    make_2014(database)
    database.sql("INSERT INTO jids VALUES (NULL, 'a'), (%s, NULL), ('', 'b')", jid(1))
    migrate(opts)
    assert [(row["jid"], row["load"]) for row in database.rows("jids")] in (
        [("", "a"), (jid(1), "")],
        [("", "b"), (jid(1), "")],
    )


def test_columns_and_keys_of_others_stay_where_they_are(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    database.sql(
        "ALTER TABLE salt_returns ADD pk BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY FIRST, "
        "ADD team VARCHAR(30) CHARACTER SET latin1 NOT NULL DEFAULT 'ops' AFTER fun, "
        "ADD twice INT GENERATED ALWAYS AS (CHAR_LENGTH(id) * 2) STORED, ADD KEY failed (team), "
        "ADD KEY mine (team, id(9))"
    )
    values = fill(database, 5)
    database.sql("UPDATE salt_returns SET team = 'dev' WHERE id = 'm1'")
    before = database.sql("SELECT pk, team, twice, id, jid FROM salt_returns ORDER BY pk")
    migrate(opts)
    assert database.sql("SELECT pk, team, twice, id, jid FROM salt_returns ORDER BY pk") == before
    assert returns(database) == values
    names = [row[0] for row in database.sql("SHOW COLUMNS FROM salt_returns")]
    assert names == ["pk", "fun", "team", "jid", "return", "id", "success", "full_ret", "alter_time", "twice", "failed"]
    keys: dict[str, list[str]] = {}
    for row in database.sql("SHOW KEYS FROM salt_returns"):
        keys.setdefault(row[2], []).append(row[4])
    assert keys["PRIMARY"] == ["pk"]
    assert keys["jid_id"] == ["jid", "id"]
    assert (keys["failed"], keys["mysql_jobcache_failed"]) == (["team"], ["failed", "jid"])
    assert keys["mine"] == ["team", "id"]
    assert keys["fun"] == ["fun", "id", "jid"]
    assert "jid" not in keys


def test_tables_of_version_2_get_the_column_that_says_what_failed_and_an_archive_too(
    database: Scratch, opts: Opts
) -> None:
    make_version_2(database)
    database.sql("CREATE TABLE salt_returns_archive LIKE salt_returns")
    said = [("1", 0), ("0", 0), ("1", 2)]
    for table in ("salt_returns", "salt_returns_archive"):
        for number, (success, retcode) in enumerate(said):
            database.sql(
                f"INSERT INTO {table} (fun, jid, `return`, id, success, full_ret) VALUES ('f', %s, '1', 'm', %s, %s)",
                jid(number), success, json.dumps({"return": 1, "retcode": retcode}),
            )  # fmt: skip
    assert migrate(opts)["version"] == schema.newest()
    for table in ("salt_returns", "salt_returns_archive"):
        assert database.sql(f"SELECT failed FROM {table} ORDER BY jid") == [(0,), (1,), (1,)]
        keys = {row[2] for row in database.sql(f"SHOW KEYS FROM {table}")}
        assert "failed" in keys and "success" not in keys
    database.sql(
        "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) VALUES ('f', 'x', '1', 'm', 0, '')"
    )
    database.sql("INSERT INTO salt_returns_archive SELECT * FROM salt_returns WHERE jid = 'x'")  # as saltext.mysql does
    assert upkeep.schema(opts)["missing"] == []


def test_archives_come_along_in_the_order_of_columns_that_saltext_copies_in(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    fill(database, 4)
    for table in schema.TABLES:
        database.sql(f"CREATE TABLE {table}_archive LIKE {table}")
    database.sql("ALTER TABLE jids_archive ADD mine INT NULL DEFAULT 3 FIRST")
    for job in (jid(1001), jid(1002)):
        database.sql("INSERT INTO jids_archive (jid, `load`) VALUES (%s, %s)", job, load_of())
        for _ in range(2):
            database.sql(
                "INSERT INTO salt_returns_archive (fun, jid, `return`, id, success, full_ret) "
                "VALUES ('f', %s, '1', 'm', '1', '{}')",
                job,
            )
    assert len(migrate(opts)["migrated"]) == 6
    assert database.sql("SELECT mine, jid FROM jids_archive") == [(3, jid(1001)), (3, jid(1002))]
    assert database.count("salt_returns_archive") == 2
    database.sql("ALTER TABLE jids_archive DROP COLUMN mine")
    for table in schema.TABLES:
        database.sql(f"INSERT INTO {table}_archive SELECT * FROM {table}")  # as saltext.mysql's _archive_jobs does
    assert database.count("salt_returns_archive") == 10
    assert database.sql("SELECT fun FROM jids_archive WHERE jid = %s", jid(10)) == [("test.ping",)]


@pytest.mark.parametrize("kind", ["week", "month"])
def test_tables_are_cut_into_partitions_where_the_settings_ask_for_it(
    database: Scratch, tmp_path: Path, kind: str
) -> None:
    make_saltext(database)
    for day in ("20251231", "20260101", "20261101"):
        add_job(database, f"{day}000000000000", "web1", "web2")
    add_job(database, "no jid", "web1")
    opts = opts_of(database, tmp_path)
    migrate(opts)
    values = returns(database)
    cut = opts_of(database, tmp_path, partitions=kind)
    assert "jids: no partitions by" in " ".join(upkeep.schema(cut)["missing"])
    done = migrate(cut)
    assert done["migrated"] == ["jids", "salt_returns"]
    assert returns(database) == values
    first = {"week": "p20251229", "month": "p20251201"}[kind]
    assert database.sql(f"SELECT COUNT(*) FROM jids PARTITION ({first})") == [(2 if kind == "week" else 1,)]
    assert migrate(opts_of(database, tmp_path))["migrated"] == []  # asked for no more, they stay


# What is refused


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    fill(database, 50)
    before = shown(database)
    plan = upkeep.migrate(opts, True, QUIET)
    assert plan["dry_run"] is True
    assert plan["is"] == "tables as saltext.mysql documents them"
    assert set(plan["migrates"]) == set(schema.TABLES)
    assert "no unique key on (jid, id)" in plan["migrates"]["salt_returns"]["because"]
    assert plan["migrates"]["salt_returns"]["rows_about"] > 0
    assert plan["disk_bytes_needed_about"] > 0
    assert plan["seconds_about"] > 0
    assert shown(database) == before


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("CREATE TRIGGER mine AFTER INSERT ON salt_returns FOR EACH ROW SET @x = 1", "has the trigger mine"),
        (
            "CREATE TABLE t (j VARCHAR(255) CHARACTER SET utf8, CONSTRAINT tie FOREIGN KEY (j) REFERENCES jids (jid))",
            "the foreign key tie",
        ),
        ("ALTER TABLE jids ADD mine INT NOT NULL", "jids.mine is NOT NULL without a default"),
        ("ALTER TABLE salt_events MODIFY id BIGINT, DROP PRIMARY KEY", "no unique key on (id)"),
        ("ALTER TABLE jids ADD SYSTEM VERSIONING", "SYSTEM VERSIONING"),
    ],
)
def test_what_would_get_lost_is_named_before_anything_is_changed(
    database: Scratch, opts: Opts, statement: str, words: str
) -> None:
    if "VERSIONING" in statement and database.server.is_mysql:
        pytest.skip("MySQL keeps no table's history")
    make_saltext(database)
    fill(database, 5)
    database.sql(statement)
    before = shown(database)
    assert words in " ".join(upkeep.migrate(opts, True, QUIET)["in_the_way"])
    with pytest.raises(EngineError) as caught:
        upkeep.migrate(opts, False, QUIET)
    assert "nothing was changed" in str(caught.value)
    assert words in str(caught.value)
    assert shown(database) == before


def test_a_unique_key_that_forbids_partitions_is_named(database: Scratch, tmp_path: Path) -> None:
    make_saltext(database)
    database.sql("ALTER TABLE salt_returns ADD pk BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY")
    with pytest.raises(EngineError, match="salt_returns has the unique key PRIMARY without jid"):
        upkeep.migrate(opts_of(database, tmp_path, partitions="day"), False, QUIET)


def test_a_value_that_no_column_of_ours_takes_stops_it_with_the_tables_name_and_after_mending_it_goes_on(
    database: Scratch, opts: Opts
) -> None:
    make_saltext(database)
    values = fill(database, 5)
    database.sql("ALTER TABLE salt_returns MODIFY success VARCHAR(99) NOT NULL, MODIFY fun TEXT, DROP KEY fun")
    database.sql("UPDATE salt_returns SET fun = REPEAT('f', 300) WHERE jid = %s", jid(20))
    with pytest.raises(EngineError, match=r"fun.*That is in the table salt_returns"):
        upkeep.migrate(opts, False, QUIET)
    assert returns(database) == values
    database.sql("UPDATE salt_returns SET fun = REPEAT('f', 255) WHERE jid = %s", jid(20))
    migrate(opts)
    assert returns(database) == values


def test_arguments_that_are_none_are_refused(opts: Opts) -> None:
    with pytest.raises(EngineError, match="dry_run: 'yes' must be True or False"):
        upkeep.migrate(opts, "yes", QUIET)


# Beside others


class SaltextWriter:
    """Writes as saltext.mysql does, in a thread, jids of every age; knows what was committed."""

    def __init__(self, database: Scratch) -> None:
        self.written: dict[tuple[str, str], str] = {}
        self.events: list[str] = []
        self.slowest = 0.0
        self._database = database
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._connection: Any = None

    def __enter__(self) -> SaltextWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._drop_connection()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(pymysql.err.Error, OSError):  # of a server that is gone
                connection.close()

    def _run(self) -> None:
        chance = random.Random(7)
        number = 0
        while not self._stop.is_set():
            number += 1
            job, minion = jid(10 * chance.randrange(4000) + 1 + number % 9), f"saltext-{number}"
            began = time.monotonic()
            while not self._stop.is_set():
                try:
                    self._write(job, minion, number)
                    break
                except pymysql.err.IntegrityError:
                    raise
                except (pymysql.err.OperationalError, pymysql.err.InterfaceError, OSError):
                    self._drop_connection()
                    time.sleep(0.05)
            else:
                return
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.written[job, minion] = str(number)
            self.events.append(f"saltext/{number}")
            time.sleep(0.002)

    def _write(self, job: str, minion: str, number: int) -> None:
        if self._connection is None:
            if not accepts(str(self._database.server.socket)):  # PyMySQL leaks its socket when it finds nobody
                raise ConnectionRefusedError
            self._connection = self._database.server.connect(database=self._database.name, autocommit=False)
        with self._connection.cursor() as cursor:
            with contextlib.suppress(pymysql.err.IntegrityError):
                cursor.execute("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", (job, load_of()))
            cursor.execute("SELECT 1 FROM salt_returns WHERE jid = %s AND id = %s", (job, minion))
            if not cursor.fetchall():  # else the COMMIT was done, and its answer lost
                cursor.execute(
                    "INSERT INTO salt_returns (fun, jid, `return`, id, success, full_ret) "
                    "VALUES ('test.ping', %s, %s, %s, '1', '{}')",
                    (job, str(number), minion),
                )
                cursor.execute(
                    "INSERT INTO salt_events (tag, data, master_id) VALUES (%s, '', 'm')", (f"saltext/{number}",)
                )
        self._connection.commit()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from salt_mysql_engine import shadow

    for name in ("_CHUNK_FIRST", "_CHUNK_LEAST", "_CHUNK_MOST"):
        monkeypatch.setattr(shadow, name, migrator.SMALL_CHUNK)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("shape", MAKERS)
async def test_what_is_written_while_it_runs_is_there_afterwards(
    database: Scratch, opts: Opts, shipping: Make, shape: str
) -> None:
    MAKERS[shape](database)
    values = await asyncio.to_thread(fill, database, 1500, minions=1)
    shipped = {}
    async with shipping(flush_interval=0.02, batch_size=20) as ship:
        with SaltextWriter(database) as writer:
            running = asyncio.create_task(asyncio.to_thread(migrate, opts))
            number = 0
            while not running.done():
                number += 1
                job = jid(10 * (number * 7919 % 4000) + 5)
                await ship.take(published(job, ["web1"]), returned(job, f"web{number}", number))
                shipped[job, f"web{number}"] = str(number)
                await asyncio.sleep(0.005)
            await running
            seen = len(writer.written)
            await asyncio.to_thread(
                wait_until, lambda: len(writer.written) > seen + 20, timeout=30, what="rows after the migration"
            )
        books = await ship.settled()
    assert len(shipped) > 50
    assert seen > 50
    assert books["dead_letters"] == 0
    assert returns(database) == values | writer.written | shipped
    assert {job for job, _ in values | writer.written | shipped} == {row["jid"] for row in database.rows("jids")}
    tags = [row["tag"] for row in database.rows("salt_events")]
    assert sorted(tags) == sorted([f"t/{n}" for n in range(1500)] + writer.events)


@pytest.mark.usefixtures("small_steps")
def test_what_changes_behind_the_copy_is_brought_over(
    database: Scratch, opts: Opts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salt_mysql_engine.shadow import Shadow

    make_saltext(database)
    values = fill(database, 100)
    trimmed = '{"return": "VALUE_TRIMMED", "trimmed": true}'
    database.sql(
        "UPDATE salt_returns SET `return` = '\"VALUE_TRIMMED\"', full_ret = %s WHERE jid = %s", trimmed, jid(10)
    )
    swap = Shadow._swap

    async def swap_after_changes(self: Shadow) -> None:
        if self._name == "jids":
            database.sql("UPDATE jids SET `load` = %s WHERE jid = %s", load_of(Minions=["a", "b"]), jid(20))
            database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", jid(1), load_of("late.load"))
        if self._name == "salt_returns":
            database.sql("UPDATE salt_returns SET `return` = '1', full_ret = '{\"return\": 1}' WHERE jid = %s", jid(10))
            add_return(database, jid(1), "late")
        if self._name == "salt_events":
            database.sql("INSERT INTO salt_events (tag, data, master_id) VALUES ('late', '', '')")
        await swap(self)
        if self._name == "salt_events":
            database.sql("INSERT INTO salt_events (tag, data, master_id) VALUES ('later', '', '')")

    monkeypatch.setattr(Shadow, "_swap", swap_after_changes)
    migrate(opts)
    assert returns(database) == values | {(jid(1), "late"): "true"}
    loads = {row["jid"]: json.loads(row["load"]) for row in database.rows("jids")}
    assert loads[jid(20)]["Minions"] == ["a", "b"]
    assert loads[jid(1)]["fun"] == "late.load"
    tags = [row["tag"] for row in database.rows("salt_events")]
    assert tags == [f"t/{n}" for n in range(100)] + ["late", "later"]


def test_a_second_migration_is_refused_while_one_runs(
    database: Scratch, opts: Opts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_LOCK_SECONDS", 0)
    make_saltext(database)
    fill(database, MANY)
    first = migrator.start(opts)
    try:
        wait_until(
            lambda: bool(database.sql("SHOW TABLES LIKE 'mysql_jobcache_new_%%'")), timeout=60, what="the first one"
        )
        with pytest.raises(EngineError, match="a migration or a purge of this database runs now"):
            upkeep.migrate(opts, False, QUIET)
        with pytest.raises(EngineError, match="a migration or a purge of this database runs now"):
            upkeep.purge(opts, 1, False, QUIET)
    finally:
        first.kill()
        first.communicate()


def test_a_transaction_that_holds_a_table_makes_nobody_else_wait_for_long(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    fill(database, 10)
    holder = database.server.connect(database=database.name, autocommit=False)
    done: list[Any] = []
    with holder, holder.cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM jids")
        thread = threading.Thread(target=lambda: done.append(migrate(opts)))
        thread.start()
        with SaltextWriter(database) as writer:
            # It tries to rename the table, and gives way, several times.
            waits = (
                "SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE STATE LIKE 'Waiting for table metadata%%'"
            )
            for _ in range(3):
                wait_until(lambda: database.sql(waits) != [(0,)], timeout=30, what="an attempt", interval=0.005)
                wait_until(lambda: database.sql(waits) == [(0,)], timeout=30, what="its end", interval=0.005)
            assert not done
        assert writer.slowest < 5.0
        holder.rollback()
    thread.join()
    assert done


# Crashes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MariaDB]:
    """A server of the test's own, to be killed."""
    with MariaDB(tmp_path / "server") as server:
        yield server


def run_for(opts: Opts, seconds: float, before_kill: Callable[[], None] = lambda: None) -> bool:
    """A migration that is killed after a while; whether it had ended before."""
    process = migrator.start(opts)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        before_kill()
        process.kill()
        process.communicate()
        return False
    assert process.returncode == 0, output
    return True


@pytest.mark.parametrize("partitions", ["none", "month"])
def test_a_migration_that_is_killed_again_and_again_goes_on_where_it_stopped(
    database: Scratch, tmp_path: Path, partitions: str
) -> None:
    opts = opts_of(database, tmp_path, partitions=partitions)
    make_saltext(database)
    values = fill(database, MANY)
    chance = random.Random(5)
    kills, seen = 0, set()
    with SaltextWriter(database) as writer:
        while not run_for(opts, 0.6 + chance.random()):
            kills += 1
            seen |= {name for (name,) in database.sql("SHOW TABLES LIKE 'mysql_jobcache_%%'")}
            assert kills < 200
    assert kills >= 3
    assert {"mysql_jobcache_migration", "mysql_jobcache_new_salt_returns"} <= seen
    migrate(opts)
    assert returns(database) == values | writer.written
    assert {job for job, _ in values | writer.written} == {row["jid"] for row in database.rows("jids")}
    assert len(database.rows("salt_events")) == MANY + len(writer.events)


def test_a_server_that_is_killed_in_the_middle_again_and_again_costs_no_row(server: MariaDB, tmp_path: Path) -> None:
    with scratch(server) as database:
        opts = opts_of(database, tmp_path)
        make_saltext(database)
        values = fill(database, MANY)
        chance = random.Random(3)
        with SaltextWriter(database) as writer:
            kills = 0
            while not run_for(opts, 0.7 + 2 * chance.random(), before_kill=server.kill):
                kills += 1
                server.start()
        assert kills >= 3
        migrate(opts)
        assert returns(database) == values | writer.written
        assert len(database.rows("salt_events")) == MANY + len(writer.events)


def test_a_server_that_dies_and_comes_back_is_waited_for(server: MariaDB, tmp_path: Path) -> None:
    with scratch(server) as database:
        opts = opts_of(database, tmp_path)
        make_saltext(database)
        values = fill(database, MANY)
        process = migrator.start(opts)
        wait_until(lambda: bool(database.sql("SHOW TABLES LIKE 'mysql_jobcache_new%%'")), timeout=60, what="a start")
        server.kill()
        server.start()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        migrate(opts)
        assert returns(database) == values


@pytest.mark.parametrize("change", ["CREATE TABLE", "ALTER TABLE", "ADD KEY", "RENAME TABLE", "DROP TABLE"])
def test_a_change_whose_answer_was_lost_is_found_done(database: Scratch, tmp_path: Path, change: str) -> None:
    make_2014(database)
    values = fill(database, 50)
    with Proxy(database.server.host, database.server.port) as proxy:
        opts = opts_of(database, tmp_path, partitions="month") | {"mysql.port": proxy.port}
        proxy.lose_answer(to=change.encode(), times=1)
        migrate(opts)
        assert proxy.lost == 1
    assert returns(database) == values


@pytest.mark.parametrize("change", ["CREATE TABLE", "ALTER TABLE", "RENAME TABLE", "DROP TABLE"])
def test_a_change_after_whose_answer_the_connection_is_lost_is_found_done(
    database: Scratch, opts: Opts, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    make_2014(database)
    values = fill(database, 50)
    execute, commit, done, lost = Session.execute, Session.commit, [""], []

    async def executed(session: Session, statement: bytes | str) -> int:
        done.append(statement if isinstance(statement, str) else "")
        return await execute(session, statement)

    async def committed(session: Session) -> None:
        if done[-1].startswith(change) and not lost:
            lost.append(done[-1])
            session.close()
        await commit(session)

    monkeypatch.setattr(Session, "execute", executed)
    monkeypatch.setattr(Session, "commit", committed)
    migrate(opts)
    assert len(lost) == 1
    assert returns(database) == values


def test_a_rename_that_was_done_by_half_is_done_whole(database: Scratch, opts: Opts) -> None:
    """As servers before MySQL 8 and MariaDB 10.6 leave it when they die; the engine may have made the table anew."""
    for made_anew in (False, True):
        make_saltext(database)
        values = fill(database, 30)
        database.sql("RENAME TABLE salt_returns TO mysql_jobcache_old_salt_returns")
        database.sql(schema.statements()["salt_returns"].replace("`salt_returns`", "`mysql_jobcache_new_salt_returns`"))
        if made_anew:
            database.sql(schema.statements()["salt_returns"])
            add_return(database, jid(5), "anew", value="true")
            values[jid(5), "anew"] = "true"
        migrate(opts)
        assert returns(database) == values
        database.sql("DROP TABLE jids, salt_returns, salt_events, mysql_jobcache_schema")


def test_a_shadow_that_was_half_made_is_made_anew(database: Scratch, opts: Opts) -> None:
    make_saltext(database)
    values = fill(database, 30)
    database.sql("CREATE TABLE mysql_jobcache_new_salt_returns LIKE salt_returns")
    database.sql("INSERT INTO mysql_jobcache_new_salt_returns SELECT * FROM salt_returns")
    migrate(opts)
    assert returns(database) == values
