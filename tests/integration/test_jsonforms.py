"""Every value that a return can hold is stored as JSON that the server's own JSON functions take."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable
from typing import Any

import msgpack
import pymysql
import pytest

from salt_mysql_engine import jsontext
from tests.support.scratch import Scratch
from tests.support.shipping import (
    MASTER,
    STAMP,
    Shipping,
    body,
    jid,
    master_data,
    published,
    return_data,
    returned,
)

Make = Callable[..., Shipping]


def nested(depth: int, *, leaf: Any = 1) -> Any:
    """Lists and dicts in turn, `depth` levels of them, around a leaf."""
    value = leaf
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def depth_of(value: Any) -> int:
    """How many levels of containers a value has; its texts are not looked into."""
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max((depth_of(each) for each in (value.values() if isinstance(value, dict) else value)), default=0)


def wants_json(database: Scratch) -> None:
    """Make the server itself refuse, by CHECK, whatever is not JSON."""
    database.sql("ALTER TABLE salt_returns MODIFY `return` JSON NOT NULL, MODIFY full_ret JSON NOT NULL")
    database.sql("ALTER TABLE jids MODIFY `load` JSON NOT NULL")
    database.sql("ALTER TABLE salt_events MODIFY `data` JSON NOT NULL")


# What msgpack carries, so what an event can hold, and its form.
EVENT_FORMS: dict[str, tuple[Any, Any]] = {
    "ordinary": ({"a": [1, -1.5, None, True, "x"]}, {"a": [1, -1.5, None, True, "x"]}),
    "null": (None, None),
    "empty": ([{}, [], ""], [{}, [], ""]),
    "bytes that are text": ("grün".encode(), "grün"),
    "bytes that are none": (b"\xff\x00", {"__base64__": "/wA="}),
    "bytes as keys": ({b"a": 1, b"\xff": 2}, {"a": 1, "/w==": 2}),
    "datetime": (msgpack.ExtType(78, b"20260102T03:04:05.000006"), "2026-01-02T03:04:05.000006"),
    "NaN": (float("nan"), "NaN"),
    "infinities": ([float("inf"), float("-inf")], ["Infinity", "-Infinity"]),
    "NaN as a key": ({float("nan"): 1}, {"NaN": 1}),
    "largest integers": ([2**64 - 1, 2**63, -(2**63)], [2**64 - 1, 2**63, -(2**63)]),
    "lone surrogate": ("a\ud800b", "a\\udced\\udca0\\udc80b"),  # three bytes that are no UTF-8, as msgpack gives them
    "keys that are no text": (
        [{1: "a", None: "b", 1.5: "c"}, {True: "d"}],
        [{"1": "a", "null": "b", "1.5": "c"}, {"true": "d"}],
    ),
    "keys that become one": ({1: "a", "1": "b"}, {"1": "b"}),
    "control characters": ("\0\1\x1f\x7f\u2028\t\n\r\\\"'/", "\0\1\x1f\x7f\u2028\t\n\r\\\"'/"),
    "four-byte text": ({"😀": "𝄞"}, {"😀": "𝄞"}),
    "wide": ([[]] * 1000, [[]] * 1000),
    "long": ("x" * 1_000_000, "x" * 1_000_000),
    "small and large numbers": ([5e-324, 1.7976931348623157e308, -0.0], [5e-324, 1.7976931348623157e308, -0.0]),
}


@pytest.mark.parametrize("name", EVENT_FORMS)
async def test_the_server_takes_and_reads_every_form_of_a_value(database: Scratch, shipping: Make, name: str) -> None:
    value, form = EVENT_FORMS[name]
    data = return_data(jid(1), "web1", value, fun_args=[value])
    packed = msgpack.packb(data, use_bin_type=True, unicode_errors="surrogatepass")
    async with shipping("before", events=["salt/auth"]) as ship:
        await ship.ship(body("salt/auth", {"id": "web1", "_stamp": STAMP}))  # creates the tables
    wants_json(database)
    async with shipping(events=["salt/*"]) as ship:
        books = await ship.ship(f"salt/job/{jid(1)}/ret/web1".encode() + b"\n\n" + packed)
        assert (books["written"], books["dead_letters"]) == (1, 0)
    ((ret, in_full, argument, in_load, in_event),) = database.sql(
        "SELECT `return`, JSON_EXTRACT(full_ret, '$.return'), JSON_EXTRACT(full_ret, '$.fun_args[0]'), "
        "JSON_EXTRACT(`load`, '$.arg[0]'), JSON_EXTRACT(`data`, '$.return') "
        "FROM salt_returns JOIN jids USING (jid) JOIN salt_events ON tag LIKE 'salt/job/%'"
    )
    assert [json.loads(text) for text in (ret, in_full, argument, in_load, in_event)] == [form] * 5


DIRECT_FORMS: dict[str, tuple[Any, Any]] = {
    "datetime": (datetime.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),  # noqa: DTZ001 (naive, as Salt sends)
    "date and time": ([datetime.date(2026, 1, 2), datetime.time(3, 4)], ["2026-01-02", "03:04:00"]),
    "sets and tuples": ([{1}, frozenset({2}), (3,)], [[1], [2], [3]]),
    "lone surrogate": (["\ud800", {"\udfff": 1}], ["\\ud800", {"\\udfff": 1}]),
    "surrogate pair": ("\ud83d\ude00", "😀"),
    "a tuple as a key": ({("a", 1): 2}, {"('a', 1)": 2}),
    "anything else": ([decimal.Decimal("1.5"), bytearray(b"\xff")], ["1.5", {"__base64__": "/w=="}]),
}


@pytest.mark.parametrize("name", DIRECT_FORMS)
def test_the_server_reads_the_form_of_a_value_that_only_python_has(database: Scratch, name: str) -> None:
    value, form = DIRECT_FORMS[name]
    ((valid, extracted),) = database.sql("SELECT JSON_VALID(%s), JSON_EXTRACT(%s, '$')", *[jsontext.dumps(value)] * 2)
    assert valid == 1
    assert json.loads(extracted) == form


# Depth


def servers_depth(database: Scratch) -> int:
    """How many levels of containers this server takes."""
    for depth in range(1, 200):
        try:
            ((valid,),) = database.sql("SELECT JSON_VALID(%s)", json.dumps(nested(depth)))
        except pymysql.err.OperationalError as exc:
            assert exc.args[0] == 3157  # ER_JSON_DOCUMENT_TOO_DEEP, which MariaDB does not say
            valid = 0
        if not valid:
            return depth - 1
    raise AssertionError("it takes more than we ask for")


@pytest.mark.parametrize("depth", [jsontext.MAX_DEPTH, jsontext.MAX_DEPTH + 1, 40, 200, 400])
@pytest.mark.parametrize("leaf", [pytest.param("x", id="small"), pytest.param("x" * 2000, id="large")])
async def test_rows_of_every_kind_stay_within_the_servers_depth_however_deep_the_value(
    database: Scratch, shipping: Make, depth: int, leaf: str
) -> None:
    value = nested(depth, leaf=leaf)
    async with shipping("before", events=["salt/auth"]) as ship:
        await ship.ship(body("salt/auth", {"id": "web1", "_stamp": STAMP}))
    wants_json(database)
    async with shipping(events=["salt/job/*", "salt/run/*"]) as ship:
        books = await ship.ship(
            published(jid(1), ["web1"], arg=[value]),
            returned(jid(1), "web1", value),
            returned(jid(2), "web1", {"a.b": value}, fun=["a.b"], fun_args=[[value]], success={"a.b": True}),
            body(f"salt/run/{jid(3)}/ret", master_data(jid(3), "runner.state.orchestrate", value)),
        )
        assert books["dead_letters"] == 0
        assert books["written"] + books["duplicates"] == 4
    limit = servers_depth(database)
    rows = database.rows("salt_returns")
    assert {row["id"] for row in rows} == {"web1", MASTER}
    texts = [row[column] for row in rows for column in ("return", "full_ret")]
    texts += [row["load"] for row in database.rows("jids")] + [row["data"] for row in database.rows("salt_events")]
    assert all(depth_of(json.loads(text)) <= limit for text in texts)
    assert (json.loads(rows[0]["return"]) == value) == (depth <= jsontext.MAX_DEPTH)


def test_the_deepest_json_of_ours_is_below_what_this_server_takes(database: Scratch) -> None:
    # full_ret adds one level to what jsontext.dumps() gives, for minions and for the master's own jobs.
    assert servers_depth(database) >= jsontext.MAX_DEPTH + 1


async def test_what_is_cut_off_for_its_depth_is_kept_as_text(database: Scratch, shipping: Make) -> None:
    async with shipping() as ship:
        await ship.ship(returned(jid(1), "web1", nested(jsontext.MAX_DEPTH + 3, leaf="deep")))
    value = json.loads(database.row("salt_returns")["return"])
    while isinstance(value, (dict, list)):
        value = value["a"] if isinstance(value, dict) else value[0]
    assert depth_of(json.loads(value)) == 3
    assert "deep" in value
