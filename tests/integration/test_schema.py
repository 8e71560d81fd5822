"""What a database is said to be, and how the tables come into being."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from salt_mysql_engine import partitions, schema, upkeep
from salt_mysql_engine.database import Database, Session
from salt_mysql_engine.errors import OperatorNeeded
from salt_mysql_engine.settings import Connection
from salt_mysql_engine.steady import Steady
from tests.support.oldtables import MAKERS, make_2014, make_saltext, opts_of
from tests.support.scratch import Scratch

QUIET: Callable[[str], None] = [].append
"""Where lines of progress go."""
NEWEST = schema.newest()
TODAY = datetime.datetime.now(datetime.timezone.utc).date()


def database_of(database: Scratch) -> Database:
    return Database(lambda: Connection.from_opts(database.mysql), connect_timeout=10, statement_timeout=60)


@pytest.fixture
async def session(database: Scratch) -> AsyncIterator[Session]:
    session = await database_of(database).open()
    yield session
    session.close()


# What can be written to


async def test_an_empty_database_gets_our_tables_and_their_version(database: Scratch, session: Session) -> None:
    created, shape = await schema.ensure(session, create=True, events=True)
    assert created == ["jids", "salt_returns", "salt_events"]
    assert shape == schema.Shape(frozenset(schema.TABLES), True, True, True, 255, True, True, True, True)
    assert database.sql("SELECT MAX(version) FROM mysql_jobcache_schema") == [(NEWEST,)]
    assert await schema.ensure(session, create=True, events=True) == ([], shape)


async def test_a_new_database_gets_all_tables_and_an_old_one_its_events_only_when_they_are_stored(
    database: Scratch, session: Session
) -> None:
    created, shape = await schema.ensure(session, create=True, events=False)
    assert created == ["jids", "salt_returns", "salt_events"]
    assert (shape.unique, shape.event_key) == ({"jids", "salt_returns"}, False)
    database.sql("DROP TABLE salt_events")
    assert (await schema.ensure(session, create=True, events=False))[0] == []
    created, shape = await schema.ensure(session, create=True, events=True)
    assert created == ["salt_events"]
    assert shape.event_key


async def test_a_missing_table_is_an_error_where_none_may_be_made(session: Session) -> None:
    with pytest.raises(OperatorNeeded, match="there is no table jids; use schema: create"):
        await schema.ensure(session, create=False, events=False)


async def test_saltexts_tables_can_be_written_to_and_their_shape_says_how(database: Scratch, session: Session) -> None:
    make_saltext(database)
    created, shape = await schema.ensure(session, create=True, events=True)
    assert created == []
    assert shape == schema.Shape(frozenset({"jids"}), False, False, False, 50, True, False, False, True)


async def test_tables_of_2014_can_be_written_to_and_their_shape_says_how(database: Scratch, session: Session) -> None:
    make_2014(database)
    _, shape = await schema.ensure(session, create=True, events=True)
    assert shape == schema.Shape(frozenset(), False, False, False, 50, False, False, False, False)


async def test_a_key_on_a_part_of_a_column_or_on_more_columns_is_no_key_of_ours(
    database: Scratch, session: Session
) -> None:
    await schema.ensure(session, create=True, events=False)
    database.sql(
        "ALTER TABLE salt_returns DROP PRIMARY KEY, ADD UNIQUE KEY k (jid, id(200)), ADD UNIQUE KEY l (jid, id, fun(9))"
    )
    _, shape = await schema.ensure(session, create=True, events=False)
    assert shape.unique == {"jids"}
    database.sql("ALTER TABLE salt_returns ADD UNIQUE KEY m (id, jid)")
    _, shape = await schema.ensure(session, create=True, events=False)
    assert shape.unique == {"jids", "salt_returns"}


async def test_a_table_without_a_column_that_writing_needs_is_an_error(database: Scratch, session: Session) -> None:
    make_saltext(database)
    database.sql("ALTER TABLE salt_returns DROP COLUMN full_ret")
    with pytest.raises(OperatorNeeded, match="the table salt_returns has no column full_ret"):
        await schema.ensure(session, create=True, events=False)


# What it is said to be


def test_each_kind_of_database_is_told_from_the_others(database: Scratch, tmp_path: Path) -> None:
    opts = opts_of(database, tmp_path)
    assert upkeep.schema(opts)["kind"] == "none"
    for name, make in MAKERS.items():
        make(database)
        said = upkeep.schema(opts)
        assert (said["kind"], said["version"]) == (name, None)
        assert "salt_returns: no unique key on (jid, id)" in said["missing"]
        assert said["what_to_do"] == "salt-run mysql_jobcache.migrate"
        database.sql("DROP TABLE jids, salt_returns, salt_events")
    upkeep.migrate(opts, False, QUIET)
    said = upkeep.schema(opts)
    assert (said["is"], said["missing"], said["what_to_do"]) == (
        f"ours at version {schema.newest()}",
        [],
        "nothing to do",
    )
    database.sql("ALTER TABLE salt_returns DROP KEY failed, MODIFY `return` MEDIUMTEXT NOT NULL")
    said = upkeep.schema(opts)
    assert said["kind"] == "ours"
    assert [line.split(" of ")[0] for line in said["missing"]] == [
        "salt_returns: return is mediumtext",
        "salt_returns: no key on (failed, jid)",
    ]


def test_tables_of_our_names_that_are_not_salts_are_foreign_and_left_alone(database: Scratch, tmp_path: Path) -> None:
    database.sql("CREATE TABLE jids (person INT)")
    opts = opts_of(database, tmp_path)
    assert upkeep.schema(opts)["kind"] == "foreign"
    with pytest.raises(upkeep.EngineError, match="not Salt's: jids has no column jid, load"):
        upkeep.migrate(opts, False, QUIET)
    assert database.sql("SHOW TABLES") == [("jids",)]


# Numbered files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The package's files, and two more."""
    folder = tmp_path / "schema"
    folder.mkdir()
    for path in schema.FOLDER.glob("*.sql"):
        (folder / path.name).write_text(path.read_text())
    (folder / f"{NEWEST + 1:03}_colours.sql").write_text(
        "-- name: jids\nALTER TABLE `jids` ADD COLUMN `colour` INT NULL;\n"
        "ALTER TABLE `jids` ADD KEY `colour` (`colour`);\n"
        "-- name: salt_events\nALTER TABLE `salt_events` ADD COLUMN `colour` INT NULL;\n"
    )
    (folder / f"{NEWEST + 2:03}_shapes.sql").write_text(
        "-- name: jids\nALTER TABLE `jids` ADD COLUMN `shape` INT NULL;\n"
    )
    return folder


def columns(database: Scratch, table: str) -> list[str]:
    return [row[0] for row in database.sql(f"SHOW COLUMNS FROM {table}")][-2:]


async def test_the_numbered_files_after_a_databases_version_are_applied_in_order_and_once(
    database: Scratch, session: Session, folder: Path
) -> None:
    from salt_mysql_engine import migrate

    await schema.ensure(session, create=True, events=False)
    async with Steady(database_of(database), "test", patience=10) as steady:
        done = await migrate.migrate(steady, "none", lambda *_: None, folder=folder)
        assert (done["files_applied"], done["version"]) == ([NEWEST + 1, NEWEST + 2], NEWEST + 2)
        assert columns(database, "jids") == ["colour", "shape"]
        assert database.sql("SELECT version FROM mysql_jobcache_schema ORDER BY version") == [
            (number,) for number in range(1, NEWEST + 3)
        ]
        done = await migrate.migrate(steady, "none", lambda *_: None, folder=folder)
        assert (done["files_applied"], done["version"]) == ([], NEWEST + 2)


async def test_a_table_that_is_made_later_is_made_by_all_of_the_files(
    database: Scratch, session: Session, folder: Path
) -> None:
    await schema.create_table(session, "salt_events", folder=folder)
    assert columns(database, "salt_events") == ["event_key", "colour"]


async def test_a_file_that_was_interrupted_is_applied_to_its_end(
    database: Scratch, session: Session, folder: Path
) -> None:
    from salt_mysql_engine import migrate

    await schema.ensure(session, create=True, events=False)
    database.sql("ALTER TABLE jids ADD COLUMN colour INT NULL")  # its first statement was
    async with Steady(database_of(database), "test", patience=10) as steady:
        assert await migrate.apply(steady, NEWEST, folder) == [NEWEST + 1, NEWEST + 2]
    assert columns(database, "jids") == ["colour", "shape"]
    assert database.sql("SHOW KEYS FROM jids WHERE Key_name = 'colour'")


# Partitions


def test_periods_begin_and_follow_as_the_calendar_has_them() -> None:
    date = datetime.date
    assert partitions.begin("week", date(2026, 11, 22)) == date(2026, 11, 16)
    assert partitions.following("week", date(2026, 12, 30)) == date(2027, 1, 4)
    assert partitions.following("month", date(2026, 12, 31)) == date(2027, 1, 1)
    assert partitions.following("day", date(2028, 2, 28)) == date(2028, 2, 29)
    made = partitions.layout("month", date(2026, 9, 5), date(2026, 11, 22))
    assert made == [
        ("p20260901", "20261001"),
        ("p20261001", "20261101"),
        ("p20261101", "20261201"),
        ("p20261201", "20270101"),
        ("p20270101", "20270201"),
        ("pmax", None),
    ]
    assert len(partitions.layout("day", date(2014, 1, 1), date(2026, 11, 22))) == partitions.MOST + 1


@pytest.mark.parametrize("kind", ["day", "week", "month"])
async def test_new_tables_have_partitions_for_now_and_two_periods_to_come(
    database: Scratch, session: Session, kind: str
) -> None:
    await schema.ensure(session, create=True, events=True, partitions=kind)
    for table in schema.PARTITIONED:
        found = await partitions.look(session, table)
        assert found == partitions.layout(kind, TODAY, TODAY)
        assert len(found) == 4
    assert await partitions.look(session, "salt_events") == []


async def test_coming_partitions_are_cut_off_also_when_a_forged_jid_of_the_far_future_is_there(
    database: Scratch, session: Session
) -> None:
    then = TODAY - datetime.timedelta(days=40)
    ddl = schema.statements()["jids"]
    await session.execute(f"{ddl} {partitions.clause(partitions.layout('week', then, then))}")
    days = [then, TODAY, TODAY + datetime.timedelta(days=15)]
    jids = [f"{day:%Y%m%d}000000000000" for day in days] + ["99991231235959999999", "no jid"]
    for jid in jids:
        database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, '{}')", jid)
    async with Steady(database_of(database), "test", patience=10) as steady:
        made = await partitions.extend(steady, "jids", "week", TODAY)
        assert made
        assert await partitions.extend(steady, "jids", "week", TODAY) == []
        assert await partitions.extend(steady, "jids", "week", TODAY + datetime.timedelta(days=7)) != []
    wanted = partitions.layout("week", then, TODAY + datetime.timedelta(days=7))
    assert await partitions.look(session, "jids") == wanted
    assert [row["jid"] for row in database.rows("jids")] == jids
    ((here,),) = database.sql(f"SELECT COUNT(*) FROM jids PARTITION (p{partitions.begin('week', TODAY):%Y%m%d})")
    assert here == 1


async def test_a_table_without_partitions_or_with_somebody_elses_is_left_as_it_is(
    database: Scratch, session: Session
) -> None:
    await schema.ensure(session, create=True, events=False)
    database.sql("ALTER TABLE jids PARTITION BY KEY (jid) PARTITIONS 3")
    async with Steady(database_of(database), "test", patience=10) as steady:
        for table in schema.PARTITIONED:
            assert await partitions.extend(steady, table, "day", TODAY) == []
