"""Tables of an older shape are written to as they are: no unique key to lean on, narrow columns, three-byte texts."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import writer
from tests.support.mariadb import MariaDB
from tests.support.oldtables import MAKERS, make_version_2
from tests.support.scratch import Scratch
from tests.support.shipping import Shipping, body, copy_journal, jid, published, return_data, returned, returns

Make = Callable[..., Shipping]
EVENTS = {"events": ["my/*"]}


@pytest.fixture(params=[*MAKERS.values(), make_version_2])
def old(request: pytest.FixtureRequest, database: Scratch) -> Scratch:
    """A database whose tables were made long ago."""
    request.param(database)
    return database


def keys(database: Scratch) -> list[tuple[str, str]]:
    return sorted((row["jid"], row["id"]) for row in database.rows("salt_returns"))


def events_of(number: int) -> list[bytes]:
    return [
        published(jid(number), ["web1", "web2"]),
        returned(jid(number), "web1", {"n": number}),
        returned(jid(number), "web2", {"n": number}),
        body(f"my/tag/{number}", {"n": number, "_stamp": f"2026-03-29T01:30:{number:02d}.123456"}),
    ]


async def test_rows_are_written_and_a_replayed_batch_adds_none(old: Scratch, shipping: Make, tmp_path: Path) -> None:
    events = [event for number in range(20) for event in events_of(number)]
    async with shipping(paused=True, **EVENTS) as ship:
        await ship.take(*events)
    copy_journal(tmp_path / "journal", tmp_path / "replayed")
    async with shipping(batch_size=7, **EVENTS) as ship:
        books = await ship.drain()
    assert books["written"] == 80
    before = {table: old.rows(table) for table in ("jids", "salt_returns", "salt_events")}
    async with shipping("replayed", batch_size=9, **EVENTS) as ship:
        books = await ship.drain()
    assert (books["written"], books["duplicates"]) == (0, 80)
    assert before == {table: old.rows(table) for table in before}
    assert keys(old) == [(jid(number), name) for number in range(20) for name in ("web1", "web2")]
    assert len(old.rows("jids")) == 20
    assert len(old.rows("salt_events")) == 20


async def test_the_same_return_in_one_batch_and_in_the_next_stays_one_row(old: Scratch, shipping: Make) -> None:
    async with shipping(batch_size=4) as ship:
        await ship.ship(*returns(2), *returns(2), *returns(2))
        await ship.ship(*returns(3))
    assert len(keys(old)) == len(set(keys(old))) == 3


async def test_two_engines_write_the_same_rows_once(old: Scratch, shipping: Make) -> None:
    events = [event for number in range(60) for event in events_of(number)[:3]]
    async with shipping("one", batch_size=11) as one, shipping("two", batch_size=7) as two:
        await asyncio.gather(one.take(*events), two.take(*events))
        await asyncio.gather(one.drain(), two.drain())
        assert len(keys(old)) == len(set(keys(old))) == 120
        assert len(old.rows("jids")) == 60


async def test_an_event_whose_commit_was_not_confirmed_is_written_once(
    old: Scratch, shipping: Make, mariadb: MariaDB
) -> None:
    async with shipping(**EVENTS) as ship:
        settle = ship.journal.settle
        failures = 3

        def fail(settlement: Any) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise sqlite3.OperationalError("disk I/O error")
            settle(settlement)

        ship.journal.settle = fail  # type: ignore[method-assign]
        await ship.ship(*events_of(1))
        assert failures < 0
    assert len(old.rows("salt_events")) == 1


async def test_texts_of_four_byte_characters_become_the_same_json(old: Scratch, shipping: Make) -> None:
    value = {"a": "grün 日本 😀", "\U0001d518": ["\\", "'"]}
    async with shipping(**EVENTS) as ship:
        await ship.ship(
            published(jid(1), ["web1"], arg=["😀"]),
            returned(jid(1), "web1", value),
            body("my/tag", {"x": "😀"}),
        )
        books = await ship.ship(returned(jid(1), "web1", value))
        assert (books["duplicates"], ship.writer.conflicts) == (1, 0)
    (row,) = old.rows("salt_returns")
    assert json.loads(row["return"]) == value
    assert json.loads(row["full_ret"])["return"] == value
    assert json.loads(old.rows("jids")[0]["load"])["arg"] == ["😀"]
    assert json.loads(old.rows("salt_events")[0]["data"]) == {"x": "😀"}


async def test_values_in_a_column_of_bytes_are_compared_as_texts(old: Scratch, shipping: Make) -> None:
    old.sql("ALTER TABLE salt_returns MODIFY `return` MEDIUMBLOB NOT NULL")
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", "green"))
        books = await ship.ship(returned(jid(1), "web1", "green"))
        assert (books["duplicates"], ship.writer.conflicts) == (1, 0)
        await ship.ship(returned(jid(1), "web1", "grey!"))
        assert ship.writer.conflicts == 1


async def test_functions_are_cut_to_their_column_and_are_whole_in_full_ret(old: Scratch, shipping: Make) -> None:
    functions = [f"module{number}.function" for number in range(10)]
    data = return_data(jid(1), "web1", dict.fromkeys(functions, True), fun=functions)
    async with shipping() as ship:
        await ship.ship(body(f"salt/job/{jid(1)}/ret/web1", data))
    (row,) = old.rows("salt_returns")
    ((width,),) = old.sql(
        "SELECT CHARACTER_MAXIMUM_LENGTH FROM information_schema.COLUMNS "
        "WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'salt_returns' AND COLUMN_NAME = 'fun'"
    )
    assert row["fun"] == ",".join(functions)[:width]
    assert json.loads(row["full_ret"])["fun"] == functions


async def test_loads_are_merged_and_a_whole_return_takes_a_trimmed_ones_place(old: Scratch, shipping: Make) -> None:
    async with shipping(batch_size=1) as ship:
        await ship.ship(returned(jid(1), "web1", "VALUE_TRIMMED"))
        await ship.ship(published(jid(1), ["web1"]), published(jid(1), ["web2"]))
        await ship.ship(returned(jid(1), "web1", "whole"))
        books = await ship.books()
    assert books["trimmed"] == 1
    assert [json.loads(row["return"]) for row in old.rows("salt_returns")] == ["whole"]
    assert [json.loads(row["load"])["Minions"] for row in old.rows("jids")] == [["web1", "web2"]]


async def test_a_batch_that_fails_frees_the_lock_for_other_engines(old: Scratch, shipping: Make) -> None:
    async with shipping("one") as one, shipping("two") as two:
        # One row that no column takes: halved until it stands alone, each time with the lock given back.
        bad = returned(jid(1), "m" * 255, "x" * (17 * 1024 * 1024))
        await one.ship(bad, *returns(5, first=10))
        await two.ship(*returns(5, first=20))
        assert len(await one.dead_letters()) == 1
    assert len(keys(old)) == 10


async def test_the_log_says_that_the_tables_are_old_and_migrated_ones_are_noticed(
    old: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "LOOK_AT_TABLES_SECONDS", 0.0)
    async with shipping() as ship:
        await ship.ship(*returns(2))
        await ship.ship(*returns(2, first=3))
        assert len([record for record in caplog.records if "older shape" in record.getMessage()]) == 1
        for table in ("jids", "salt_returns", "salt_events"):
            old.sql(f"DROP TABLE `{table}`")
        await ship.ship(*returns(2, first=5))
        assert ship.writer._shape is not None
        assert ship.writer._shape.unique >= {"jids", "salt_returns"}
    assert len(keys(old)) == 2
    assert [row["fun"] for row in old.rows("jids")] == ["test.ping"] * 2
