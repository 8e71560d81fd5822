"""What the tables and the books hold after events were shipped to a healthy server."""

from __future__ import annotations

import asyncio
import datetime
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from salt_mysql_engine import database as database_module
from salt_mysql_engine import jobload, moments, records, saltevent, settings, sql, writer
from salt_mysql_engine.errors import OperatorNeeded
from tests.support.oldtables import make_version_1
from tests.support.scratch import Scratch
from tests.support.shipping import (
    MASTER,
    STAMP,
    Shipping,
    body,
    call_data,
    copy_journal,
    jid,
    master_data,
    published,
    returned,
    returns,
)

Make = Callable[..., Shipping]
NEVER = 300.0  # seconds: the longest flush_interval, for batches that must become due in another way


def load(database: Scratch, job: str) -> dict[str, object]:
    """The stored load of a job."""
    (row,) = [row for row in database.rows("jids") if row["jid"] == job]
    return dict(json.loads(row["load"]))


# Exactly once


async def test_a_return_becomes_one_complete_row(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        books = await ship.ship(returned(jid(1), "web1", {"a": [1, "ü"]}, fun="test.arg", fun_args=["x"]))
    assert books["written"] == books["captured"] == 1
    row = database.row("salt_returns")
    full_ret = json.loads(row.pop("full_ret"))
    assert row == {
        "fun": "test.arg",
        "jid": jid(1),
        "return": '{"a": [1, "ü"]}',
        "id": "web1",
        "success": "1",
        "alter_time": datetime.datetime.fromisoformat(STAMP),
        "failed": 0,
    }
    assert full_ret["return"] == {"a": [1, "ü"]}
    assert (full_ret["fun_args"], full_ret["success"], full_ret["retcode"]) == (["x"], True, 0)


async def test_a_replayed_batch_adds_no_row_and_counts_duplicates(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    bodies = [published(jid(1), ["minion-1"]), *returns(20), returned(jid(1), "other")]
    async with shipping("first", paused=True) as ship:
        await ship.take(*bodies)
    copy_journal(tmp_path / "first", tmp_path / "second")
    async with shipping("first") as ship:
        books = await ship.drain()
        assert (books["written"], books["duplicates"]) == (len(bodies), 0)
    before = {table: database.rows(table) for table in ("jids", "salt_returns")}
    async with shipping("second") as ship:
        books = await ship.drain()
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (0, len(bodies), 0)
    assert {table: database.rows(table) for table in ("jids", "salt_returns")} == before


async def test_a_replay_overlapping_new_returns_writes_only_the_new_ones(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(*returns(10))
        books = await ship.ship(*returns(10, first=6))
        assert (books["written"], books["duplicates"]) == (15, 5)
    assert [row["jid"] for row in database.rows("salt_returns")] == [jid(number) for number in range(1, 16)]


async def test_the_first_return_stands_and_a_differing_later_one_is_a_conflict(
    database: Scratch, shipping: Make
) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", "first"))
        books = await ship.ship(returned(jid(1), "web1", "later"))
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (1, 1, 1)
    assert database.row("salt_returns")["return"] == '"first"'


async def test_the_first_of_two_differing_returns_in_one_batch_stands(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        books = await ship.ship(*(returned(jid(1), "web1", value) for value in ("first", "later", "first")))
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (1, 2, 1)
        assert sum(ship.writer.batches.values()) == 1
    assert database.row("salt_returns")["return"] == '"first"'


async def test_a_minion_that_returns_the_same_twice_is_no_conflict(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", "ü😀"))
        books = await ship.ship(returned(jid(1), "web1", "ü😀"))
        assert (books["duplicates"], ship.writer.conflicts) == (1, 0)
    assert database.count("salt_returns") == 1


async def test_two_masters_on_one_database_write_each_return_once(database: Scratch, shipping: Make) -> None:
    bodies = returns(400)
    async with (
        shipping("one", batch_size=7, flush_interval=0.01) as one,
        shipping("two", batch_size=11, flush_interval=0.01) as two,
    ):
        books = await asyncio.gather(one.ship(*bodies), two.ship(*reversed(bodies)))
    assert sum(book["written"] for book in books) == len(bodies)
    assert sum(book["duplicates"] for book in books) == len(bodies)
    assert database.count("salt_returns") == database.count("jids") == len(bodies)


async def test_what_was_journalled_before_a_restart_is_shipped_after_it(database: Scratch, shipping: Make) -> None:
    async with shipping(paused=True) as ship:
        await ship.take(*returns(5))
    async with shipping(flush_interval=0.01) as ship:
        await ship.until(lambda: ship.journal.pending == 0)
        assert (await ship.books())["written"] == 5
    assert database.count("salt_returns") == 5


# Loads


@pytest.mark.parametrize("published_first", [True, False])
@pytest.mark.parametrize("one_batch", [True, False])
async def test_a_published_load_beats_a_synthesised_one_in_any_order(
    database: Scratch, shipping: Make, published_first: bool, one_batch: bool
) -> None:
    new = published(jid(1), ["web1", "web2"], tgt="web*", user="sudo_alice")
    bodies = [new, returned(jid(1), "web1")] if published_first else [returned(jid(1), "web1"), new]
    async with shipping() as ship:
        for part in [bodies] if one_batch else [[each] for each in bodies]:
            books = await ship.ship(*part)
        assert (books["written"], books["duplicates"]) == (2, 0)
    assert load(database, jid(1)) == {
        "jid": jid(1),
        "tgt": "web*",
        "tgt_type": "glob",
        "fun": "test.ping",
        "arg": [],
        "user": "sudo_alice",
        "Minions": ["web1", "web2"],
        "missing": [],
    }


@pytest.mark.parametrize("from_elsewhere", [{"fun": "test.ping", "id": "web1", "return": 1}, {"cmd": "publish"}])
async def test_a_job_that_another_writes_between_the_look_and_the_insert_is_merged_all_the_same(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch, from_elsewhere: dict[str, object]
) -> None:
    query, looks = database_module.Session.query, []

    async def looked(session: database_module.Session, statement: bytes) -> list[tuple[object, ...]]:
        found = await query(session, statement)
        if statement == sql.select_loads([jid(1)]) and not looks:
            text = json.dumps({"jid": jid(1), **from_elsewhere})
            database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", jid(1), text)
            looks.append(found)
        return found

    monkeypatch.setattr(database_module.Session, "query", looked)
    async with shipping() as ship:
        await ship.ship(published(jid(2), ["web1"]))  # the tables are there
        books = await ship.ship(published(jid(1), ["web1", "web2"], tgt="web*", user="sudo_alice"))
        assert (books["written"], books["dead_letters"]) == (2, 0)
    assert looks == [[]]
    merged = load(database, jid(1))
    assert (merged["Minions"], merged["tgt"], merged["user"]) == (["web1", "web2"], "web*", "sudo_alice")


async def test_a_return_does_not_touch_a_published_load(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(published(jid(1), ["web1"]))
        before = database.rows("jids")
        await ship.ship(returned(jid(1), "web1"), returned(jid(1), "web2"))
    assert database.rows("jids") == before


@pytest.mark.parametrize("one_batch", [True, False])
async def test_the_loads_of_a_batch_job_merge(database: Scratch, shipping: Make, one_batch: bool) -> None:
    parts = [["web1", "web2"], ["web3"], ["web2", "web4"]]
    bodies = [published(jid(1), part, tgt=part, tgt_type="list", missing=part[-1:]) for part in parts]
    async with shipping() as ship:
        for group in [bodies] if one_batch else [[each] for each in bodies]:
            await ship.ship(*group)
        await ship.ship(*bodies)  # replayed: changes nothing
    merged = load(database, jid(1))
    assert merged["Minions"] == merged["tgt"] == ["web1", "web2", "web3", "web4"]
    assert merged["missing"] == ["web2", "web3", "web4"]


async def test_a_salt_call_makes_a_load_and_a_success_of_its_own(database: Scratch, shipping: Make) -> None:
    data = call_data(jid(1), "web1", fun_args=["a", 1], arg=["a", 1])
    async with shipping() as ship:
        await ship.ship(
            body(f"salt/job/{jid(1)}/ret/web1", data),
            body(f"salt/job/{jid(2)}/ret/web1", {**data, "jid": jid(2), "retcode": 2}),
        )
    assert [row["success"] for row in database.rows("salt_returns")] == ["1", "0"]
    made = load(database, jid(1))
    assert (made["tgt"], made["tgt_type"], made["fun"], made["arg"]) == ("web1", "glob", "test.ping", ["a", 1])
    assert "return" not in made


async def test_every_return_has_a_jids_row(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(
            *returns(3),
            published(jid(4), ["web1"]),
            returned(jid(4), "web1"),
            body(f"salt/job/{jid(5)}/ret/web1", call_data(jid(5), "web1")),
            body(f"salt/run/{jid(6)}/ret", master_data(jid(6), "runner.jobs.active")),
            body(f"salt/wheel/{jid(7)}/ret", master_data(jid(7), "wheel.key.list_all")),
        )
    assert {row["jid"] for row in database.rows("jids")} == {jid(number) for number in range(1, 8)}
    orphans = database.sql("SELECT jid FROM salt_returns WHERE jid NOT IN (SELECT jid FROM jids)")
    assert orphans == []


async def test_a_job_that_an_earlier_batch_wrote_costs_no_statement(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(young(1), "web1"))
        before = inserts(database)
        await ship.ship(returned(young(1), "web2"))
        assert inserts(database) - before == 1  # into salt_returns
        await ship.ship(returned(young(1), "web3"), returned(young(2), "web1"))
        assert inserts(database) - before == 3
    assert {row["jid"] for row in database.rows("jids")} == {young(1), young(2)}


async def test_a_job_whose_batch_was_rolled_back_is_not_taken_for_written(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(young(2), "web1"))
        database.sql("ALTER TABLE salt_returns ADD CONSTRAINT no_thirteen CHECK (id <> 'web13')")
        await ship.ship(returned(young(1), "web13"))
        database.sql("DELETE FROM jids WHERE jid = %s", young(1))
        await ship.ship(returned(young(1), "web1"))
        assert [row["jid"] for row in database.rows("jids")] == [young(1), young(2)]


async def test_another_session_knows_no_jobs(database: Scratch, shipping: Make) -> None:
    """It may be with another server, that has not all of what the first one had."""
    async with shipping() as ship:
        await ship.ship(returned(young(1), "web1"))
        database.sql("DELETE FROM jids")
        for (connection,) in database.sql(
            "SELECT ID FROM information_schema.PROCESSLIST WHERE DB = %s AND ID <> CONNECTION_ID()", database.name
        ):
            database.sql(f"KILL {connection}")
        await ship.ship(returned(young(1), "web2"))
    assert database.count("jids") == 1


async def test_minions_of_a_known_job_whose_row_is_gone_are_not_lost(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(young(1), "web1"))
        database.sql("DELETE FROM jids")
        minions = saltevent.minions_event(young(1), ["web1", "web2"])
        assert minions is not None
        await ship.take_at(time.time(), minions, returned(young(1), "web2"))
        await ship.drain()
    assert load(database, young(1))["Minions"] == ["web1", "web2"]


async def test_a_jids_row_that_somebody_deletes_is_made_again_within_a_minute(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shipping() as ship:
        await ship.ship(returned(young(1), "web1"))
        database.sql("DELETE FROM jids")
        monkeypatch.setattr(writer, "LOOK_AT_TABLES_SECONDS", 0.0)
        ship.writer.tables_known = False  # the minute is over
        await ship.ship(returned(young(1), "web2"))
        assert database.count("jids") == 1
        database.sql("DELETE FROM jids")
        await ship.ship(returned(young(1), "web3"))
    assert database.count("jids") == 1


async def test_a_job_that_may_be_purged_is_never_taken_for_written(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1"))
        database.sql("DELETE FROM jids")
        await ship.ship(returned(jid(1), "web2"))
    assert database.count("jids") == 1


@functools.cache
def began() -> str:
    """The jids of a second of this run begin so."""
    return moments.jid_at(time.time())[:14]


def young(number: int) -> str:
    """The jid of a job that began just now."""
    return f"{began()}{number:06d}"


def inserts(database: Scratch) -> int:
    """The server's INSERT statements so far."""
    ((_, count),) = database.sql("SHOW GLOBAL STATUS LIKE 'Com_insert'")
    return int(count)


# Kinds of jobs


async def test_a_multi_function_job_is_one_row_with_all_of_it(database: Scratch, shipping: Make) -> None:
    value = {"test.ping": True, "test.arg": {"args": ["a"]}}
    async with shipping() as ship:
        await ship.ship(
            published(jid(1), ["web1"], fun=["test.ping", "test.arg"], arg=[[], ["a"]]),
            returned(
                jid(1),
                "web1",
                value,
                fun=["test.ping", "test.arg"],
                fun_args=[[], ["a"]],
                success={"test.ping": True, "test.arg": False},
                retcode={"test.ping": 0, "test.arg": 1},
            ),
        )
    row = database.row("salt_returns")
    assert (row["fun"], json.loads(row["return"]), row["success"]) == ("test.ping,test.arg", value, "0")
    assert json.loads(row["full_ret"])["retcode"] == {"test.ping": 0, "test.arg": 1}
    assert load(database, jid(1))["arg"] == [[], ["a"]]


@pytest.mark.parametrize(("prefix", "fun"), [("run", "runner.jobs.active"), ("wheel", "wheel.key.list_all")])
async def test_a_job_of_the_master_is_stored_under_its_id(
    database: Scratch, shipping: Make, prefix: str, fun: str
) -> None:
    data = master_data(jid(1), fun, {"web1": "up"})
    new = {key: value for key, value in data.items() if key not in ("return", "success")}
    async with shipping() as ship:
        books = await ship.ship(body(f"salt/{prefix}/{jid(1)}/new", new), body(f"salt/{prefix}/{jid(1)}/ret", data))
        assert books["written"] + books["duplicates"] == 2
    row = database.row("salt_returns")
    assert (row["id"], row["fun"], row["success"]) == (MASTER, fun, "1")
    assert json.loads(row["return"]) == data
    full_ret = json.loads(row["full_ret"])
    assert (full_ret["return"], full_ret["fun_args"]) == (data, data["fun_args"])
    assert (load(database, jid(1))["fun"], load(database, jid(1))["user"]) == (fun, "root")


async def test_jobs_that_are_skipped_or_were_switched_off_meanwhile_are_counted_and_not_stored(
    database: Scratch, shipping: Make
) -> None:
    async with shipping(paused=True) as ship:
        await ship.take(
            body(f"salt/run/{jid(1)}/ret", master_data(jid(1), "runner.jobs.active")),
            body(f"salt/wheel/{jid(2)}/ret", master_data(jid(2), "wheel.key.list_all")),
            returned(jid(3), "web1", fun="saltutil.find_job"),
            returned(jid(4), "web1", fun="test.ping"),
            returned(jid(5), "web1", fun="grains.items"),
        )
    options = {"runner_jobs": False, "wheel_jobs": False, "skip_functions": ["saltutil.*", "test.ping"]}
    async with shipping(**options) as ship:
        books = await ship.drain()
        assert (books["written"], books["ignored"]) == (1, {"skipped_function": 2, "switched_off": 2})
        await ship.take(body(f"salt/run/{jid(6)}/ret", master_data(jid(6), "runner.jobs.active")))
        assert (await ship.books())["captured"] == books["captured"]  # not even journalled
    assert [row["jid"] for row in database.rows("salt_returns")] == [jid(5)]
    assert [row["jid"] for row in database.rows("jids")] == [jid(5)]


async def test_forged_and_malformed_events_become_no_row_and_are_counted_by_reason(
    database: Scratch, shipping: Make
) -> None:
    tag = f"salt/job/{jid(1)}/ret/web1"
    async with shipping() as ship:
        books = await ship.ship(
            returned(jid(1), "web1", cmd="_minion_event"),
            returned(jid(1), "web1", id="web2"),
            returned(jid(1), "web1", jid=jid(2)),
            returned("nocache", "web1"),
            returned("1; DROP", "web1"),
            body(tag, {"jid": jid(1), "id": "web1", "fun": "x"}),
            body(tag, {"jid": jid(1), "id": "web1", "fun": 7, "return": 1}),
            tag.encode() + b"\n\n\xc1garbage",
            tag.encode() + b"\n\n",
        )
        assert books["ignored"] == {
            "bad_jid": 1,
            "minion_event": 1,
            "missing_key": 1,
            "nocache": 1,
            "tag_mismatch": 2,
            "undecodable": 2,
            "wrong_type": 1,
        }
        await ship.ship(*returns(1))
    assert [row["id"] for row in database.rows("salt_returns")] == ["minion-1"]


# Chosen events


async def test_events_that_match_a_glob_are_stored_exactly_once_also_when_replayed(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    options = {"events": ["salt/auth", "salt/job/*/ret/*", "salt/beacon/*"]}
    bodies = [
        body("salt/auth", {"id": "web1", "act": "accept", "_stamp": STAMP}),
        body("salt/auth", {"id": "web1", "act": "accept", "_stamp": STAMP}),  # the same again is another event
        returned(jid(1), "web1"),
        body("salt/beacon/web1/load/", {"id": "web1", "1m": 0.5, "_stamp": STAMP}),
    ]
    async with shipping("first", paused=True, **options) as ship:
        await ship.take(*bodies, body("salt/key", {"id": "web1", "_stamp": STAMP}))
        assert (await ship.books())["captured"] == len(bodies)
    copy_journal(tmp_path / "first", tmp_path / "second")
    for journal, written, duplicates in (("first", 4, 0), ("second", 0, 4)):
        async with shipping(journal, **options) as ship:
            books = await ship.drain()
            assert (books["written"], books["duplicates"]) == (written, duplicates)
        rows = database.rows("salt_events")
        assert sorted(row["tag"] for row in rows) == sorted(each.split(b"\n\n")[0].decode() for each in bodies)
        assert {row["master_id"] for row in rows} == {MASTER}
        assert {row["alter_time"] for row in rows} == {datetime.datetime.fromisoformat(STAMP)}
    beacon = next(row for row in rows if row["tag"].startswith("salt/beacon"))
    assert json.loads(beacon["data"]) == {"id": "web1", "1m": 0.5, "_stamp": STAMP}
    assert database.count("salt_returns") == 1


# Values


@pytest.mark.parametrize("zone", ["+00:00", "+05:30", "-09:00", "SYSTEM"])
async def test_alter_time_is_the_masters_stamp_in_utc_whatever_the_servers_zone(
    database: Scratch, shipping: Make, zone: str
) -> None:
    async with shipping(events=["salt/auth"]) as ship:
        with database.globally(time_zone=zone):
            await ship.ship(
                returned(jid(1), "web1"),
                returned(jid(2), "web1", _stamp=f"{STAMP}+00:00"),  # as 3008 writes it
                body("salt/auth", {"_stamp": STAMP}),
            )
    times = {row["alter_time"] for table in ("salt_returns", "salt_events") for row in database.rows(table)}
    assert times == {datetime.datetime.fromisoformat(STAMP)}


async def test_a_return_without_a_stamp_gets_the_time_of_its_capture(database: Scratch, shipping: Make) -> None:
    captured = datetime.datetime(2026, 7, 1, 12, 30, 15, 250000, tzinfo=datetime.timezone.utc)
    async with shipping() as ship:
        await ship.take_at(captured.timestamp(), returned(jid(1), "web1", _stamp="soon"))
        await ship.drain()
    assert database.row("salt_returns")["alter_time"] == captured.replace(tzinfo=None)


async def test_four_byte_utf8_is_kept_everywhere(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "w😀", {"k😀": "v𝄞"}, fun="f😀", user="u😀"))
    row = database.row("salt_returns")
    assert (row["id"], row["fun"], row["return"]) == ("w😀", "f😀", '{"k😀": "v𝄞"}')
    assert load(database, jid(1))["user"] == "u😀"


@pytest.mark.parametrize("one_batch", [True, False])
@pytest.mark.parametrize("ids", [("web1", "Web1", "WEB1"), ("strasse", "straße"), ("a", "ä", "a\0"), ("web1 ", "web1")])
async def test_minion_ids_that_look_alike_to_a_collation_are_rows_of_their_own(
    database: Scratch, shipping: Make, ids: tuple[str, ...], one_batch: bool
) -> None:
    async with shipping() as ship:
        for group in [ids] if one_batch else [(each,) for each in ids]:
            books = await ship.ship(*(returned(jid(1), each, each) for each in group))
        assert books["written"] == len(ids)
    assert {row["id"]: json.loads(row["return"]) for row in database.rows("salt_returns")} == {i: i for i in ids}


@pytest.mark.parametrize("one_batch", [True, False])
async def test_in_tables_of_version_1_minion_ids_that_differ_in_a_trailing_space_do_not_swallow_each_other(
    database: Scratch, shipping: Make, one_batch: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make_version_1(database)
    ids = ("web1 ", "web1")
    async with shipping() as ship:
        for group in [ids] if one_batch else [(each,) for each in ids]:
            books = await ship.ship(*(returned(jid(1), each, each) for each in group))
        kept = {letter.minion for letter in await ship.dead_letters()} | {
            r["id"] for r in database.rows("salt_returns")
        }
        assert kept == set(ids)
        assert books["duplicates"] == 0
    assert "are of an older shape" in caplog.text


HOSTILE = (
    "'",
    '"',
    "`",
    "\\",
    "\\'",
    "\\\\'",
    "'; DROP TABLE jids; -- ",
    "', '1', '2'), ('x",
    "' OR ''='",
    "/*! SELECT SLEEP(9) */",
    "%s %(x)s {} ? :a",
    "\0\n\r\x1a\t",
    "\u2028\u2018\u2019\u02bc\uff07\u00a5",  # what a careless conversion would make quotes of
)


def as_id(text: str) -> str:
    """A text as a minion's id, in which Salt allows all but a few characters."""
    return text.translate({ord(character): None for character in "/\n\0"})


@pytest.mark.parametrize("mode", ["", "NO_BACKSLASH_ESCAPES", "ANSI_QUOTES", "ANSI", "TRADITIONAL"])
async def test_quotes_and_sql_in_every_field_are_data_under_sql_mode(
    database: Scratch, shipping: Make, mode: str
) -> None:
    async with shipping(events=["*"], master="m'\\\"") as ship:
        with database.globally(sql_mode=mode):
            for number, text in enumerate(HOSTILE, start=1):
                id_ = as_id(text)
                new = published(jid(number), [text], tgt=text, arg=[{text: text}], user=text, fun=text)
                books = await ship.ship(
                    new,
                    returned(jid(number), id_, {text: [text]}, fun=text, user=text, fun_args=[text]),
                    new,
                    returned(jid(number), id_, {text: [text]}, fun=text, user=text, fun_args=[text]),
                )
        assert books["dead_letters"] == sum(books["ignored"].values()) == ship.writer.conflicts == 0
    for number, (row, text) in enumerate(zip(database.rows("salt_returns"), HOSTILE, strict=True), start=1):
        assert (row["jid"], row["fun"], json.loads(row["return"])) == (jid(number), text, {text: [text]})
        assert row["id"] == as_id(text)
        stored = load(database, jid(number))
        assert (stored["tgt"], stored["arg"], stored["Minions"]) == (text, [{text: text}], [text])
    assert database.count("salt_returns") == database.count("jids") == len(HOSTILE)
    assert {row["master_id"] for row in database.rows("salt_events")} == {"m'\\\""}
    assert database.count("salt_events") == 4 * len(HOSTILE)


# When a batch is due


async def test_a_batch_is_written_when_it_has_batch_size_rows(database: Scratch, shipping: Make) -> None:
    async with shipping(batch_size=10, flush_interval=NEVER) as ship:
        await ship.take(*returns(25))
        await ship.until(lambda: ship.journal.pending == 5)
        assert ship.writer.batches == {"size": 2}
        assert database.count("salt_returns") == 20
        await ship.take(*returns(5, first=26))
        await ship.until(lambda: ship.journal.pending == 0)
        assert ship.writer.batches == {"size": 3}


async def test_a_batch_is_written_when_it_has_batch_bytes_of_sql(database: Scratch, shipping: Make) -> None:
    async with shipping(batch_bytes=64 * 1024, flush_interval=NEVER) as ship:
        await ship.take(*returns(1, value="x" * 20_000))  # 40 kB of SQL: the value stands in two columns
        await ship.until(lambda: len(ship.writer.batcher) == 1)
        await ship.take(*returns(1, first=2, value="x" * 20_000))
        await ship.until(lambda: ship.journal.pending < 2, timeout=5)
        assert set(ship.writer.batches) == {"bytes"}


async def test_a_batch_is_written_by_the_timer_without_another_event(database: Scratch, shipping: Make) -> None:
    async with shipping(flush_interval=0.3) as ship:
        began = time.monotonic()
        await ship.take(*returns(3))
        await ship.until(lambda: ship.journal.pending == 0)
        assert time.monotonic() - began >= 0.25
        assert ship.writer.batches == {"age": 1}
    assert database.count("salt_returns") == 3


async def test_a_batch_is_written_on_request(database: Scratch, shipping: Make) -> None:
    async with shipping(flush_interval=NEVER) as ship:
        await ship.take(*returns(3))
        await ship.drain(timeout=5)
        assert ship.writer.batches == {"asked": 1}
        await ship.take(*returns(1, first=4))
        await ship.drain(timeout=5)  # a second request is as good as the first
    assert database.count("salt_returns") == 4


async def test_a_flush_with_nothing_pending_returns_at_once(shipping: Make) -> None:
    async with shipping(flush_interval=NEVER) as ship:
        await ship.drain(timeout=5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"flush_interval": 0.01}, "age"), ({"batch_size": 3}, "size"), ({"batch_bytes": 100}, "bytes")],
)
async def test_a_limit_that_is_lowered_while_rows_wait_takes_effect_at_once(
    database: Scratch, shipping: Make, change: dict[str, float], reason: str
) -> None:
    async with shipping(flush_interval=NEVER) as ship:
        await ship.take(*returns(3))
        await ship.until(lambda: len(ship.writer.batcher) == 3)
        ship.retune(**change)
        await ship.until(lambda: ship.journal.pending == 0)
        assert set(ship.writer.batches) == {reason}
    assert database.count("salt_returns") == 3


async def test_a_batch_size_that_is_raised_while_running_makes_larger_batches(
    database: Scratch, shipping: Make
) -> None:
    async with shipping(batch_size=2, flush_interval=NEVER) as ship:
        await ship.take(*returns(4))
        await ship.until(lambda: ship.journal.pending == 0)
        ship.retune(batch_size=50)
        await ship.take(*returns(50, first=5))
        await ship.until(lambda: ship.journal.pending == 0)
        assert ship.writer.batches == {"size": 3}
    assert database.count("salt_returns") == 54


# Rows that are large, and rows that are refused


SMALL_PACKET = 64 * 1024


async def test_a_batch_is_split_into_statements_under_a_small_max_allowed_packet(
    database: Scratch, shipping: Make
) -> None:
    async with shipping(events=["*"]) as ship:
        with database.globally(max_allowed_packet=SMALL_PACKET):
            books = await ship.ship(*returns(100, value="x" * 5_000))  # 1 MB of SQL, and as much for salt_events
            assert sum(ship.writer.batches.values()) == 1
        assert (books["written"], ship.writer.retries) == (100, 0)
    assert database.count("salt_returns") == database.count("jids") == database.count("salt_events") == 100


async def test_a_replay_under_a_small_max_allowed_packet_counts_duplicates(database: Scratch, shipping: Make) -> None:
    minion = "a-minion-with-a-long-name.in.a.rather.deep.domain.example.com-" + "x" * 100
    bodies = [each for n in range(1, 401) for each in (published(jid(n), []), returned(jid(n), f"{minion}{n}"))]
    async with shipping(batch_size=1000) as ship:
        with database.globally(max_allowed_packet=SMALL_PACKET):
            await ship.ship(*bodies)
            await ship.take(*bodies)
            books = await ship.drain(timeout=5)
    assert (books["written"], books["duplicates"]) == (800, 800)


async def test_a_batch_job_of_many_minions_merges_under_a_small_max_allowed_packet(
    database: Scratch, shipping: Make
) -> None:
    parts = [[f"minion-{part}-{number:030d}" for number in range(1000)] for part in range(2)]
    async with shipping() as ship:
        with database.globally(max_allowed_packet=SMALL_PACKET):
            await ship.ship(published(jid(1), parts[0], tgt=""))
            await ship.take(published(jid(1), parts[1], tgt=""), *returns(2, first=2))
            books = await ship.drain(timeout=5)  # merged it is too large: a dead letter, and no obstacle
    assert (books["written"], books["dead_letters"]) == (3, 1)


@pytest.mark.parametrize(
    "large",
    [
        pytest.param(returned(jid(7), "large", "x" * 40_000), id="return"),
        pytest.param(returned(jid(7), "large", fun_args=["x" * 40_000]), id="return whose load is larger than itself"),
        pytest.param(published(jid(7), [f"minion-{number:040d}" for number in range(2_000)]), id="published load"),
        pytest.param(body("salt/auth", {"id": "large", "x": "x" * 70_000, "_stamp": STAMP}), id="event"),
    ],
)
async def test_a_row_larger_than_max_allowed_packet_becomes_a_dead_letter_and_its_neighbours_are_committed(
    database: Scratch, shipping: Make, large: bytes
) -> None:
    async with shipping(events=["salt/auth"]) as ship:
        with database.globally(max_allowed_packet=SMALL_PACKET):
            await ship.take(*returns(5), large, *returns(5, first=10))
            books = await ship.drain(timeout=5)
        assert (books["written"], books["dead_letters"]) == (10, 1)
        ((_, _, error),) = await ship.dead_letters()
        assert "max_allowed_packet" in error
    assert database.count("salt_returns") == 10


@pytest.mark.parametrize("known", [False, True], ids=["unknown job", "published job"])
@pytest.mark.parametrize(
    "large",
    [
        returned(jid(7), "large", "x" * 40_000, fun_args=["here"]),
        body(f"salt/run/{jid(7)}/ret", master_data(jid(7), "runner.test.arg", "x" * 40_000)),
    ],
    ids=["of a minion", "of a runner"],
)
async def test_a_return_that_cannot_be_stored_does_not_take_its_job_along(
    database: Scratch, shipping: Make, large: bytes, known: bool
) -> None:
    if known:
        async with shipping("before") as ship:
            await ship.ship(published(jid(7), ["large"], arg=["published"]))
    async with shipping() as ship:
        with database.globally(max_allowed_packet=SMALL_PACKET):
            await ship.take(*returns(5), large, *returns(5, first=10))
            books = await ship.drain(timeout=5)
        assert (books["written"], books["dead_letters"]) == (10, 1)
    stored = load(database, jid(7))
    assert stored["arg"] == (
        ["published"] if known else ["here"] if stored["fun"] == "test.ping" else ["web*", {"timeout": 5}]
    )
    assert database.count("salt_returns") == 10


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({1}, id="first"),
        pytest.param({9}, id="middle"),
        pytest.param({16}, id="last"),
        pytest.param({1, 8, 9, 16}, id="several"),
        pytest.param(set(range(1, 17)), id="all"),
    ],
)
async def test_a_refused_row_becomes_a_dead_letter_and_its_neighbours_are_committed(
    database: Scratch, shipping: Make, bad: set[int]
) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(100), "first"))  # creates the tables
        database.sql("ALTER TABLE salt_returns MODIFY fun VARCHAR(20) NOT NULL")
        await ship.take(
            *(returned(jid(n), "web1", fun="f" * 21 if n in bad else "f" * 20) for n in range(1, 17)),
        )
        books = await ship.drain()
        assert (books["written"], books["dead_letters"]) == (17 - len(bad), len(bad))
        letters = await ship.dead_letters()
        assert [(letter.jid, letter.minion) for letter in letters] == [(jid(n), "web1") for n in sorted(bad)]
        assert all("Data too long for column 'fun'" in letter.error for letter in letters)
        assert ship.writer.retries == 0  # the server was well throughout
        await ship.ship(returned(jid(101), "fresh"))
    assert {row["jid"] for row in database.rows("salt_returns")} == {jid(n) for n in {*range(1, 17), 100, 101} - bad}


@pytest.mark.parametrize(
    ("table", "constraint"),
    [
        ("salt_returns", "CHECK (`return` <> '13')"),
        ("jids", "CHECK (`load` NOT LIKE '%\"web13\"%')"),
        ("salt_events", "CHECK (JSON_EXTRACT(`data`, '$.return') <> 13)"),
    ],
)
async def test_a_row_that_an_owners_constraint_refuses_is_a_dead_letter_with_the_servers_error(
    database: Scratch, shipping: Make, table: str, constraint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping(events=["salt/job/*/ret/*"]) as ship:
        await ship.ship(returned(jid(1), "web1", 1))  # creates the tables
        database.sql(f"ALTER TABLE {table} ADD CONSTRAINT no_thirteen {constraint}")
        books = await ship.ship(*(returned(jid(n), f"web{n}", n) for n in range(11, 16)))
        assert (books["written"], books["dead_letters"]) == (5, 1)
        ((job, minion, error),) = await ship.dead_letters()
        assert (job, minion) == (jid(13), "web13")
        assert "no_thirteen" in error
        assert error in caplog.text
    stored = {jid(n) for n in (1, 11, 12, 14, 15)}
    assert {row["jid"] for row in database.rows("salt_returns")} == stored
    assert {row["jid"] for row in database.rows("jids")} == (stored if table == "jids" else stored | {jid(13)})


async def test_a_return_that_an_owners_unique_key_keeps_out_is_a_dead_letter_and_not_a_duplicate(
    database: Scratch, shipping: Make
) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", 13))
        database.sql("ALTER TABLE salt_returns ADD UNIQUE KEY one_of_each (`return`(50))")
        books = await ship.ship(*(returned(jid(n), f"web{n}", n) for n in range(11, 16)))
        assert (books["written"], books["duplicates"], books["dead_letters"]) == (5, 0, 1)


async def test_a_payload_that_no_reader_expects_is_kept_and_its_neighbours_are_committed(
    database: Scratch, shipping: Make
) -> None:
    tag = f"salt/job/{jid(50)}/ret/web1".encode()
    async with shipping() as ship:
        books = await ship.ship(
            *returns(3),
            tag + b"\n\n\x81\x91\x01\x01",  # a map whose key is a list
            tag + b"\n\n\x81\xa1a\xd4\x4f\x01",  # Salt's extension type for constants, with no constant in it
            tag + b"\n\n" + b"\x91" * 5000,  # a list in a list in a list
            *returns(3, first=4),
        )
        assert books["written"] == 6
        assert books["dead_letters"] + sum(books["ignored"].values()) == 3
    assert database.count("salt_returns") == 6


async def test_settings_of_the_session_are_what_the_statements_rely_on(database: Scratch, shipping: Make) -> None:
    isolation_name = "transaction_isolation" if database.server.is_mysql else "tx_isolation"
    async with shipping(paused=True) as ship:
        with database.globally(
            sql_mode="NO_BACKSLASH_ESCAPES,ANSI_QUOTES", time_zone="+05:30", tx_isolation="SERIALIZABLE"
        ):
            session = await ship.open_session()
        try:
            ((mode, zone, isolation, charset, autocommit, packet),) = await session.query(
                f"SELECT @@sql_mode, @@time_zone, @@{isolation_name}, @@character_set_client, @@autocommit, "
                "@@max_allowed_packet"
            )
        finally:
            session.close()
    assert "STRICT_ALL_TABLES" in mode.split(",")
    assert "NO_BACKSLASH_ESCAPES" not in mode.split(",")
    assert (zone, isolation, charset, autocommit) == ("+00:00", "READ-COMMITTED", "utf8mb4", 0)
    assert session.max_packet == packet
    assert session.server_version.partition(" (")[0] == database.sql("SELECT VERSION()")[0][0]


async def test_two_statements_in_one_are_refused_by_the_server(database: Scratch, shipping: Make) -> None:
    async with shipping(paused=True) as ship:
        session = await ship.open_session()
        with pytest.raises(OperatorNeeded, match="syntax"):
            await session.execute("CREATE TABLE one (a INT); CREATE TABLE two (a INT)")
        assert not session.usable
    assert database.sql("SHOW TABLES") == []


# Whatever goes wrong with one event makes one dead letter


class OfOurs(Exception):
    """A fault that nobody expects."""


async def test_settings_that_change_while_returns_wait_end_nothing_and_change_none_of_them(
    database: Scratch, shipping: Make
) -> None:
    bodies = returns(3)
    async with shipping(flush_interval=NEVER) as ship:
        await ship.ship(*bodies)
        await ship.take(*bodies, returned(jid(1), "web2"))
        await ship.until(lambda: len(ship.writer.batcher) == 4)
        without = settings.combine({"skip_functions": ["test.*"], "skip_values": ["*"]}, {})
        ship.writer.selection = ship.verifier.selection = records.Selection(without, master_id=MASTER)
        books = await ship.drain()
        assert (books["written"], books["duplicates"], ship.writer.conflicts) == (4, 3, 0)
    assert {row["return"] for row in database.rows("salt_returns")} == {"true"}


async def test_a_load_that_is_null_is_written_over_and_ends_nothing(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1"))
        database.sql("ALTER TABLE jids MODIFY `load` LONGTEXT NULL")
        database.sql(f"INSERT INTO jids (jid, `load`) VALUES ('{jid(2)}', NULL)")
        books = await ship.ship(published(jid(2), ["web1"]), returned(jid(2), "web1"), published(jid(3), ["web1"]))
        assert (books["written"], books["dead_letters"]) == (4, 0)
        assert ship.writer.faults == 0
    assert load(database, jid(2))["Minions"] == ["web1"]


async def test_an_event_at_which_the_writer_fails_is_one_dead_letter_and_its_neighbours_are_written(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    genuine = jobload.job_columns

    def columns(load: dict[str, object]) -> tuple[str, str, str]:
        if load["jid"] == jid(7):
            raise OfOurs("seven")
        return genuine(load)

    monkeypatch.setattr(jobload, "job_columns", columns)
    async with shipping() as ship:
        books = await ship.ship(*returns(20))
        assert (books["written"], books["dead_letters"]) == (19, 1)
        (letter,) = await ship.dead_letters()
        assert letter == (jid(7), "minion-7", "OfOurs: seven")
        assert "OfOurs: seven" in caplog.text
    assert database.count("salt_returns") == 19


async def test_faults_that_come_event_after_event_do_not_bury_what_waits(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OfOurs("always")

    async with shipping(flush_interval=0.01) as ship:
        with monkeypatch.context() as patch:
            patch.setattr(jobload, "job_columns", fail)
            await ship.take(*returns(100))
            await ship.until(lambda: ship.writer.failing)
        await ship.until(lambda: ship.journal.pending == 0)
        books = await ship.books()
        assert books["written"] + books["dead_letters"] == 100
        assert books["dead_letters"] < 10
    assert database.count("salt_returns") == books["written"]


@pytest.mark.parametrize("where", ["read", "ready", "settle"])
async def test_a_fault_around_a_batch_ends_nothing_and_costs_no_event(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async with shipping(flush_interval=0.01) as ship:
        await ship.ship(returned(jid(100), "first"))
        ship.writer.tables_known = False
        owner, name = {
            "read": (ship.verifier, "read"),
            "ready": (writer.schema, "ensure"),
            "settle": (ship.journal, "settle"),
        }[where]
        genuine, failed = getattr(owner, name), []

        def once(*args: object, **more: object) -> object:
            if not failed:
                failed.append(name)
                raise OfOurs(name)
            return genuine(*args, **more)

        monkeypatch.setattr(owner, name, once)
        await ship.take(*returns(5))
        await ship.until(lambda: database.count("salt_returns") == 6)
        await ship.until(lambda: ship.writer.faults == 1)
        monkeypatch.setattr(owner, name, genuine)
        if where != "settle":
            await ship.until(lambda: ship.journal.pending == 0)
            assert (await ship.books())["written"] == 6
