"""The least privileges of each mode, as docs/operations.md lists them: each suffices, and what is missing is named."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import partitions, schema, upkeep
from salt_mysql_engine.clock import Clock
from salt_mysql_engine.database import Database
from salt_mysql_engine.errors import EngineError, OperatorNeeded
from salt_mysql_engine.reader import Reader
from salt_mysql_engine.retention import Retention
from salt_mysql_engine.settings import Connection
from tests.support.oldtables import NOW, add_job, job, make_ours, make_saltext, opts_of
from tests.support.scratch import Scratch
from tests.support.shipping import Shipping, published, returned

QUIET: Callable[[str], None] = [].append

WRITE = ["SELECT", "INSERT", "UPDATE"]
MIGRATE = [*WRITE, "DELETE", "CREATE", "ALTER", "DROP", "TRIGGER"]


@dataclasses.dataclass(frozen=True)
class Mode:
    """What is to be done, as a user with these privileges on the database, after `before`."""

    privileges: list[str]
    before: Callable[[Scratch], None]
    work: Callable[[dict[str, Any], Path], None]
    only_mysql: tuple[str, ...] = ()
    """What MySQL asks for (its manual's ALTER TABLE), and MariaDB does not."""


def write(opts: dict[str, Any], directory: Path, **options: Any) -> None:
    async def ship() -> None:
        async with Shipping(directory / "journal", opts, flush_interval=0.01, **options) as shipping:
            await shipping.take(published(job(0), ["web1"]), published(job(0), ["web2"]), returned(job(0), "web1"))
            await shipping.until(lambda: shipping.journal.pending == 0 or bool(shipping.writer.fault))
            if shipping.writer.fault:
                raise OperatorNeeded(shipping.fault)

    asyncio.run(ship())


def create(opts: dict[str, Any], directory: Path) -> None:
    write(opts, directory, events=["*"])


def read(opts: dict[str, Any], directory: Path) -> None:
    assert len(Reader(opts).newest_jobs(10)) == 1
    upkeep.schema(opts)
    upkeep.purge(opts, 1, True, QUIET)
    upkeep.migrate(opts, True, QUIET)


def migrate(opts: dict[str, Any], directory: Path) -> None:
    upkeep.migrate(opts, False, QUIET)
    assert upkeep.schema(opts)["missing"] == []


def migrate_to_partitions(opts: dict[str, Any], directory: Path) -> None:
    migrate({**opts, "engines": [{"mysql_jobcache": {"partitions": "month"}}]}, directory)


def purge(opts: dict[str, Any], directory: Path) -> None:
    assert upkeep.purge(opts, 30, False, QUIET)["jids"] == 1


def archive(opts: dict[str, Any], directory: Path) -> None:
    purge({**opts, "engines": [{"mysql_jobcache": {"archive": True}}]}, directory)


def keep_partitions(opts: dict[str, Any], directory: Path) -> None:
    async def keep() -> None:
        login = Database(lambda: Connection.from_opts(opts), connect_timeout=10, statement_timeout=60)
        keeper = Retention(login, Clock())
        keeper.confirmed = True
        keeper.days = 30
        keeper.partitions = "month"
        await keeper.round()
        assert keeper.last is not None
        assert keeper.last["partitions_dropped"]

    asyncio.run(keep())


def nothing(database: Scratch) -> None:
    pass


def ours_with_rows(database: Scratch) -> None:
    make_ours(database)
    add_job(database, job(40), "web1")


def saltext_with_rows(database: Scratch) -> None:
    make_saltext(database)
    add_job(database, job(40), "web1")
    for table in schema.TABLES:
        database.sql(f"CREATE TABLE {table}_archive LIKE {table}")


def partitions_with_rows(database: Scratch) -> None:
    make_ours(database)
    then = NOW.date() - datetime.timedelta(days=60)
    for table in schema.PARTITIONED:
        database.sql(f"ALTER TABLE {table} {partitions.clause(partitions.layout('day', then, then))}")
    add_job(database, job(55), "web1")
    add_job(database, job(30.1), "web1")


MODES = {
    "write": Mode(WRITE, ours_with_rows, write),
    "write to old tables": Mode(WRITE, saltext_with_rows, write),
    "create": Mode([*WRITE, "CREATE"], nothing, create),
    "read": Mode(["SELECT"], ours_with_rows, read),
    "migrate": Mode(MIGRATE, saltext_with_rows, migrate),
    "migrate to partitions": Mode(MIGRATE, saltext_with_rows, migrate_to_partitions),
    "purge": Mode(["SELECT", "DELETE"], ours_with_rows, purge),
    "purge with archive": Mode(["SELECT", "DELETE", "INSERT", "UPDATE", "CREATE"], ours_with_rows, archive),
    "partitions": Mode(
        ["SELECT", "UPDATE", "DELETE", "ALTER", "DROP", "CREATE", "INSERT"],
        partitions_with_rows,
        keep_partitions,
        only_mysql=("CREATE", "INSERT"),
    ),
}


@pytest.fixture
def granted(database: Scratch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A master's opts whose account has just these privileges on the database."""

    def grant(privileges: list[str]) -> dict[str, Any]:
        server, name = database.server, database.name
        server.sql(f"REVOKE ALL ON `{name}`.* FROM `{name}`@'%'")
        if privileges:
            server.sql(f"GRANT {', '.join(privileges)} ON `{name}`.* TO `{name}`@'%'")
        return opts_of(database, tmp_path)

    return grant


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_works_with_the_privileges_that_are_listed_for_it(
    database: Scratch, tmp_path: Path, granted: Callable[..., dict[str, Any]], mode: str
) -> None:
    MODES[mode].before(database)
    MODES[mode].work(granted(MODES[mode].privileges), tmp_path)


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        (mode, privilege)
        for mode, its in MODES.items()
        for privilege in its.privileges
        if privilege not in its.only_mysql
    ],
)
def test_a_privilege_that_is_missing_is_named(
    database: Scratch, tmp_path: Path, granted: Callable[..., dict[str, Any]], mode: str, missing: str
) -> None:
    MODES[mode].before(database)
    opts = granted([privilege for privilege in MODES[mode].privileges if privilege != missing])
    with pytest.raises(EngineError) as caught:
        MODES[mode].work(opts, tmp_path)
    assert missing in str(caught.value)
