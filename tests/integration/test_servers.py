"""Servers that are set up otherwise than we would: what is stored and read is right, or nothing is, with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pymysql
import pytest

from salt_mysql_engine import upkeep, verbs
from salt_mysql_engine.errors import OperatorNeeded
from salt_mysql_engine.reader import Reader
from tests.support.mariadb import Server
from tests.support.oldtables import add_job, make_2014, opts_of
from tests.support.proxy import Proxy
from tests.support.scratch import Scratch, scratch
from tests.support.shipping import Shipping, jid, published, returned

pytestmark = pytest.mark.usefixtures("own_connections")

Make = Callable[..., Shipping]
TEXT = "Grüße, 😀, 縗"
BREAKOUT = "縗\\"
"""Its last byte of UTF-8 and the backslash are one character of gbk's: in such a session nothing escapes any more."""
CRAFTED = f"{BREAKOUT}'), ('sys.crafted', '{jid(9)}', '1', 'forged', '1', '{{}}', NOW()) -- "


async def ship_texts(ship: Shipping) -> None:
    """Returns with texts that only utf8mb4 has, and such as would run as SQL under gbk."""
    await ship.ship(
        published(jid(1), ["web1"], fun=CRAFTED, user=TEXT),
        *(
            returned(jid(number), "web1", {TEXT: text}, fun=text)
            for number, text in enumerate([TEXT, BREAKOUT, CRAFTED])
        ),
    )
    assert await ship.dead_letters() == []


def check_texts(database: Scratch, tmp_path: Path) -> None:
    with database.server.connect(database=database.name, init_command="SET NAMES utf8mb4") as connection:
        cursor = connection.cursor(pymysql.cursors.DictCursor)
        cursor.execute("SELECT * FROM salt_returns ORDER BY jid")
        rows = cursor.fetchall()
    assert [(row["fun"], json.loads(row["return"])) for row in rows] == [
        (text, {TEXT: text}) for text in (TEXT, BREAKOUT, CRAFTED)
    ]
    reader = Reader(opts_of(database, tmp_path))
    assert [fun for (fun,) in reader.query("SELECT fun FROM salt_returns ORDER BY jid")] == [TEXT, BREAKOUT, CRAFTED]
    assert reader.query("SELECT COUNT(*) FROM salt_returns WHERE fun = %s", [CRAFTED]) == [(1,)]


# Character sets


@pytest.mark.parametrize("charset", ["latin1", "utf8mb3", "gbk", "utf8mb4 COLLATE utf8mb4_bin"])
async def test_texts_are_stored_as_they_are_whatever_init_connect_says(
    database: Scratch, shipping: Make, tmp_path: Path, charset: str
) -> None:
    with database.globally(init_connect=f"SET NAMES {charset}"):
        async with shipping() as ship:
            await ship_texts(ship)
        check_texts(database, tmp_path)


@pytest.mark.parametrize("charset", ["latin1", "gbk"])
async def test_texts_are_stored_as_they_are_where_the_server_forces_its_own_character_set(
    product: type[Server], tmp_path: Path, charset: str
) -> None:
    if product.is_mysql:
        pytest.skip("MySQL 9 has no such option")
    options = [f"--character-set-server={charset}", "--skip-character-set-client-handshake"]
    with product(tmp_path / "server", options=options) as server, scratch(server) as database:
        async with Shipping(tmp_path / "journal", database.mysql) as ship:
            await ship_texts(ship)
        check_texts(database, tmp_path)


async def test_nothing_is_written_or_read_in_a_session_that_lost_what_was_said_at_login(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    if database.server.is_mysql:
        pytest.skip("the reading driver encrypts where the server lets it, and the proxy sees nothing")
    with Proxy(database.server.host, database.server.port) as proxy:
        mysql = {"mysql.host": proxy.host, "mysql.port": proxy.port}
        proxy.swap(b"SET NAMES utf8mb4 COLLATE utf8mb4_general_ci", b"SET NAMES latin1  COLLATE latin1_swedish_ci ")
        async with shipping(mysql=mysql) as ship:
            await ship.take(returned(jid(1), "web1", TEXT))
            await ship.until(lambda: "character_set_client is 'latin1' instead of 'utf8mb4'" in ship.fault)
            opts = {**opts_of(database, tmp_path), **mysql}
            with pytest.raises(OperatorNeeded, match="character_set_client is 'latin1' instead of 'utf8mb4'"):
                Reader(opts).query("SELECT 1")
            asks = upkeep.schema, lambda opts: upkeep.migrate(opts, False, [].append), verbs.test_connection
            for ask in asks:
                with pytest.raises(OperatorNeeded, match="character_set_client is 'latin1' instead of 'utf8mb4'"):
                    ask(opts)
            assert database.sql("SHOW TABLES") == []
            proxy.heal()
            await ship.drain()
    assert json.loads(database.row("salt_returns")["return"]) == TEXT


# Other settings of sessions


@pytest.mark.parametrize(
    "settings",
    [
        {"completion_type": "CHAIN"},
        {"completion_type": "RELEASE"},
        {"sql_select_limit": 1},
        {"tx_read_only": 1},
        {"sql_safe_updates": 1},
        {"max_join_size": 1, "sql_big_selects": 0},
        {"autocommit": 0},
        {"tx_isolation": "SERIALIZABLE"},
    ],
)
async def test_what_the_server_sets_globally_for_sessions_changes_nothing(
    database: Scratch, shipping: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    names = [f"web{number}" for number in range(5)]
    with database.globally(**settings):
        async with shipping() as ship:
            for _ in range(2):
                await ship.ship(published(jid(1), names), *(returned(jid(1), name, name) for name in names))
            assert ship.writer.retries == 0
            assert ship.writer.conflicts == 0
        assert len(Reader(opts_of(database, tmp_path)).query("SELECT id FROM salt_returns")) == 5
    assert [json.loads(row["return"]) for row in database.rows("salt_returns")] == names


def test_a_migration_heeds_no_limit_that_the_server_sets_globally(database: Scratch, tmp_path: Path) -> None:
    make_2014(database)
    for number in range(20):
        add_job(database, jid(number), "web1", "web2")
    with database.globally(sql_select_limit=1, sql_safe_updates=1):
        done = upkeep.migrate(opts_of(database, tmp_path), False, [].append)
    assert done["migrated"] == ["jids", "salt_events", "salt_returns"]
    assert (database.count("jids"), database.count("salt_returns")) == (20, 40)


# What users have on the tables


@pytest.mark.parametrize("together", [True, False])
async def test_a_trigger_that_changes_what_stands_does_not_make_a_collision_look_like_a_new_row(
    database: Scratch, shipping: Make, together: bool
) -> None:
    async with shipping(events=["*"]) as ship:
        await ship.ship(returned(jid(1), "web1", 1), returned(jid(2), "web1", 2))
        database.sql(
            "CREATE TRIGGER touch BEFORE UPDATE ON salt_returns FOR EACH ROW SET NEW.alter_time = '2030-01-01 00:00:00'"
        )
        bodies = [returned(jid(1), "web1", 1), returned(jid(2), "web1", "another"), returned(jid(3), "web1", 3)]
        for some in [bodies] if together else [[each] for each in bodies]:
            books = await ship.ship(*some)
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (3, 2, 1)


async def test_a_row_that_a_trigger_refuses_is_a_dead_letter_and_its_neighbours_are_committed(
    database: Scratch, shipping: Make
) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", 1))
        database.sql(
            "CREATE TRIGGER picky BEFORE INSERT ON salt_returns FOR EACH ROW BEGIN IF NEW.id = 'web2' THEN "
            "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no web2 here'; END IF; END"
        )
        await ship.ship(*(returned(jid(number), f"web{number}", number) for number in (2, 3)))
        (letter,) = await ship.dead_letters()
        assert (letter.minion, "no web2 here (1644)" in letter.error) == ("web2", True)
        assert ship.writer.retries == 0
    assert [row["id"] for row in database.rows("salt_returns")] == ["web1", "web3"]


@pytest.mark.parametrize(
    ("made", "number"),
    [
        (
            "ALTER TABLE salt_returns ADD COLUMN share INT GENERATED ALWAYS AS "
            "(100 / CAST(JSON_EXTRACT(full_ret, '$.return') AS SIGNED)) STORED",
            1365,
        ),
        (
            "CREATE TRIGGER one BEFORE INSERT ON salt_returns FOR EACH ROW "
            "SET NEW.fun = IF(NEW.`return` = '0', (SELECT 1 UNION SELECT 2), NEW.fun)",
            1242,
        ),
    ],
    ids=["generated column", "trigger"],
)
async def test_a_row_that_the_server_refuses_for_whatever_reason_holds_up_no_other(
    database: Scratch, shipping: Make, made: str, number: int
) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", 5))
        database.sql(made)
        await ship.take(*(returned(jid(n), "web1", n % 5) for n in range(2, 22)))
        assert (await ship.drain())["written"] == 17
        letters = await ship.dead_letters()
    assert [letter.jid for letter in letters] == [jid(n) for n in (5, 10, 15, 20)]
    assert all(f"({number})" in letter.error for letter in letters)
    assert len(database.rows("jids")) == 21, "no job goes along"


async def test_an_unknown_error_that_every_row_meets_is_no_rows_fault(database: Scratch, shipping: Make) -> None:
    async with shipping(flush_interval=0.01) as ship:
        await ship.ship(returned(jid(1), "web1"))
        database.sql(
            "CREATE TRIGGER one BEFORE INSERT ON salt_returns FOR EACH ROW SET NEW.fun = (SELECT 1 UNION SELECT 2)"
        )
        await ship.take(returned(jid(2), "web1"), returned(jid(3), "web1"))
        await ship.fail(2)
        await ship.take(returned(jid(4), "web1"))
        await ship.fail(4)
        assert "(1242)" in ship.fault
        database.sql("DROP TRIGGER one")
        books = await ship.drain()
    assert (books["written"], books["dead_letters"]) == (4, 0)
    assert len(database.rows("salt_returns")) == 4


async def test_an_unknown_error_of_a_commit_is_no_rows_fault(database: Scratch, shipping: Make) -> None:
    """Group Replication without a majority, a binary log that cannot be written: the rows were taken before."""
    with Proxy(database.server.host, database.server.port) as proxy:
        async with shipping(mysql={"mysql.port": proxy.port}, flush_interval=0.01) as ship:
            await ship.ship(returned(jid(1), "web1"))
            proxy.swap(b"\x03COMMIT", b"\x03COMMYT")
            await ship.take(returned(jid(2), "web1"), returned(jid(3), "web1"))
            await ship.fail(3)
            assert "COMMYT" in ship.fault
            proxy.heal()
            books = await ship.drain()
    assert (books["written"], books["dead_letters"]) == (3, 0)


async def test_tables_that_take_nothing_back_are_sent_no_row_of_ours(database: Scratch, shipping: Make) -> None:
    make_2014(database)  # jids is MyISAM
    database.sql(
        "CREATE TRIGGER one BEFORE INSERT ON salt_returns FOR EACH ROW "
        "SET NEW.fun = IF(NEW.`return` = '0', (SELECT 1 UNION SELECT 2), NEW.fun)"
    )
    async with shipping(flush_interval=0.01) as ship:
        await ship.take(returned(jid(1), "web1", 0))
        await ship.fail(2)
        assert "(1242)" in ship.fault
        database.sql("DROP TRIGGER one")
        await ship.drain()
    assert [row["jid"] for row in database.rows("jids")] == [jid(1)]


async def test_a_missing_table_that_is_not_ours_is_named_and_nobody_is_told_to_create_ours(
    database: Scratch, shipping: Make
) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", 1))
        database.sql("CREATE TABLE audit (id TEXT)")
        database.sql(
            "CREATE TRIGGER left_over AFTER INSERT ON salt_returns FOR EACH ROW INSERT INTO audit VALUES (NEW.id)"
        )
        database.sql("DROP TABLE audit")
        await ship.take(returned(jid(2), "web2", 2))
        await ship.until(lambda: "(1146)" in ship.fault)
        assert "audit is no table of Salt's: a trigger or a view on these tables names it" in ship.fault
        assert "schema" not in ship.fault
        database.sql("DROP TRIGGER left_over")
        await ship.drain()
    assert database.count("salt_returns") == 2


async def test_an_init_connect_that_fails_is_named(database: Scratch, shipping: Make) -> None:
    with database.globally(init_connect="SELECT nonsense"):
        async with shipping() as ship:
            await ship.take(returned(jid(1), "web1", 1))
            await ship.until(lambda: "init_connect" in ship.fault)
            database.sql("SET GLOBAL init_connect = ''")
            await ship.drain()


async def test_a_server_that_takes_encrypted_connections_alone_is_told_so(database: Scratch, shipping: Make) -> None:
    if not database.server.is_mysql:
        pytest.skip("the session's MariaDB has no certificate, and would let nobody in")
    with database.globally(require_secure_transport=1):
        async with shipping() as ship:
            await ship.take(returned(jid(1), "web1", 1))
            await ship.until(lambda: "(3159); the server takes encrypted connections alone" in ship.fault)
            database.sql("SET GLOBAL require_secure_transport = 0")
            await ship.drain()


@pytest.mark.parametrize("kind", ["STORED", "VIRTUAL"])
async def test_generated_columns_of_others_are_no_hindrance(
    database: Scratch, shipping: Make, tmp_path: Path, kind: str
) -> None:
    make_2014(database)
    for statement in (
        f"ALTER TABLE salt_returns ADD COLUMN day CHAR(8) AS (LEFT(jid, 8)) {kind}, ADD KEY day (day)",
        f"ALTER TABLE jids ADD COLUMN size BIGINT AS (CHAR_LENGTH(`load`)) {kind}",
    ):
        database.sql(statement)
    async with shipping() as ship:
        for number in range(2):
            await ship.ship(
                published(jid(1), ["web1"]), returned(jid(1), "web1", 1), returned(jid(2 + number), "web2", 2)
            )
            if not number:
                opts = opts_of(database, tmp_path)
                upkeep.migrate(opts, False, [].append)
                assert upkeep.schema(opts)["missing"] == []
                ship.writer.tables_known = False
        assert ship.writer.retries == 0
    assert {row["day"] for row in database.rows("salt_returns")} == {jid(1)[:8]}
    assert all(row["size"] == len(row["load"]) for row in database.rows("jids"))
