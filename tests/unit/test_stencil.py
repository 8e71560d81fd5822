"""Rows cut with a stencil beside rows made the long way: they are the same, or there is none."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from salt_mysql_engine import records, saltevent, settings, sql
from salt_mysql_engine.records import Record, Selection
from salt_mysql_engine.saltevent import Opened
from salt_mysql_engine.stencil import Stencils
from tests.support.shipping import jid

SELECTION = Selection(settings.combine({}, {}), master_id="master")
STAMPS = ("2026-11-22T10:11:12.131415", "2026-11-22T10:11:12.131415+00:00")


def body(job: str = jid(1), minion: str = "web1", *, tag: str | None = None, **changes: Any) -> bytes:
    """A return as 3008 has it on its bus; `...` leaves a key out."""
    data = {
        "cmd": "_return",
        "id": minion,
        "success": True,
        "return": True,
        "retcode": 0,
        "jid": job,
        "fun": "test.ping",
        "fun_args": [],
        "user": "root",
        "ts": 1_790_000_000,
        "_stamp": STAMPS[1],
    }
    data = {key: value for key, value in (data | changes).items() if value is not ...}
    packed: bytes = msgpack.packb(data, use_bin_type=True)
    return (tag or f"salt/job/{job}/ret/{minion}").encode() + b"\n\n" + packed


def long_way(event: bytes) -> bytes | None:
    opened = saltevent.open_event(event)
    record = records.interpret(opened, 0.0, SELECTION) if isinstance(opened, Opened) else None
    return sql.return_row(record.ret) if isinstance(record, Record) and record.ret else None


def taught(*events: bytes, times: int = 40, selection: Selection = SELECTION) -> Stencils:
    stencils = Stencils(selection)
    for event in itertools.chain.from_iterable(itertools.repeat(events, times)):
        opened = saltevent.open_event(event)
        record = records.interpret(opened, 0.0, selection) if isinstance(opened, Opened) else None
        if isinstance(record, Record) and stencils.cut(event) is None:
            stencils.learn(event, record)
    return stencils


LOOK_ALIKES = [
    True,
    None,
    '50 % of \'\\ "web1" \u00e4\U0001f9c2',
    {"a": {"_stamp": STAMPS[0], "id": "web1"}, "b": [jid(1), "web1", 1.5, -1, b"\xff"]},
    [b"\xa2id\xa4web1", b"\xa6_stamp\xba2026-11-22T10:11:12.131415"],
    {
        f"file_|-{number}_|-{number}_|-managed": {
            "name": f"/etc/{number}",
            "changes": {},
            "comment": "7000000.5 <0000000000001> %a",
            "start_time": f"10:11:12.00000{number}",
            "duration": 1.5 * number,
            "__run_num__": number,
        }
        for number in range(4)
    },
    {"duration": 7, "start_time": "10:11", "more": {"duration": [1.5], "start_time": "10:11:12.131415"}},
]


def told_otherwise(value: Any, number: int) -> Any:
    """The same return with other times."""
    if not isinstance(value, dict):
        return value
    return {
        key: told_otherwise(item, number)
        if isinstance(item, dict)
        else item + number / 7
        if key == "duration" and isinstance(item, float)
        else f"0{number % 10}:59:59.987654"
        if key == "start_time" and len(item) == 15
        else item
        for key, item in value.items()
    }


@pytest.mark.parametrize("stamp", STAMPS)
@pytest.mark.parametrize("ts", [1_790_000_000, ...], ids=["ts", "no ts"])
@pytest.mark.parametrize("value", LOOK_ALIKES, ids=range(len(LOOK_ALIKES)))
def test_a_stencil_cuts_the_rows_that_the_long_way_makes(value: Any, ts: Any, stamp: str) -> None:
    same = {"return": value, "ts": ts, "_stamp": stamp}
    stencils = taught(body(**same))
    later = {"_stamp": stamp.replace("11-22T10", "12-31T23"), "ts": ts if ts is ... else 4_000_000_000}
    events = [
        body(**same),
        body(jid(77), "db-2", **same | {"return": told_otherwise(value, 3)}),
        body(jid(78), "X.y_", **same | {"return": told_otherwise(value, 10**9)} | later),
    ]
    for event in events:
        cut = stencils.cut(event)
        assert cut is not None
        assert cut[1] == long_way(event)
    assert cut[0] == (jid(78), "X.y_")


def test_a_return_that_holds_its_own_jid_as_a_minion_would_say_it_teaches_nothing() -> None:
    event = body(**{"return": {"id": "web1", "jid": jid(1), "ts": 1_790_000_000, "_stamp": STAMPS[1]}})
    assert taught(event).cut(event) is None


@pytest.mark.parametrize(
    "event",
    [
        body(tag=f"salt/job/{jid(2)}/ret/web1"),
        body(tag=f"salt/job/{jid(1)}/ret/web2"),
        body(_stamp="2026-02-31T10:11:12.131415+00:00"),
        body(_stamp="2039-11-22T10:11:12.131415+00:00"),
        body(_stamp="2026-11-22T24:11:12.131415+00:00"),
        body(_stamp="2026-11-22T10:11:12.131415+01:00"),
        body(_stamp="2026-11-22T10:11:12+00:00"),
        body(minion="we'1"),
        body(minion="we\\1"),
        body(job="2026112210111213141x"),
        body(success=False),
        body(fun="test.pong"),
        body(ts=5),
        body() + b"\xc0",
        body()[:-1],
    ],
)
def test_what_is_no_such_return_goes_the_long_way(event: bytes) -> None:
    assert taught(body()).cut(event) is None


@pytest.mark.parametrize("took", [{"duration": math.nan}, {"duration": -math.inf}, {"start_time": "10:11:12.13141'"}])
def test_times_that_are_none_go_the_long_way(took: dict[str, Any]) -> None:
    state = {"start_time": "10:11:12.131415", "duration": 1.5}
    stencils = taught(body(**{"return": {"a": state}}))
    assert stencils.cut(body(**{"return": {"a": state | {"duration": 1e300}}})) is not None
    assert stencils.cut(body(**{"return": {"a": state | took}})) is None


def test_a_few_returns_or_large_ones_teach_nothing() -> None:
    assert taught(body(), times=20).cut(body()) is None
    for value in ("x" * 70_000, [{"duration": 1.5}] * 500):
        large = body(**{"return": value})
        assert taught(large).cut(large) is None


def test_a_trimmed_return_and_one_whose_event_is_stored_have_no_stencil() -> None:
    trimmed = body(**{"return": {"a": saltevent.TRIMMED}})
    assert taught(trimmed).cut(trimmed) is None
    choosy = Selection(settings.combine({"events": ["salt/job/*"]}, {}), master_id="master")
    assert taught(body(), selection=choosy).cut(body()) is None


def test_what_was_learnt_is_forgotten_when_it_is_too_much() -> None:
    stencils = Stencils(SELECTION)
    events = [body(fun=f"test.fun{number:04d}", **{"return": "x" * number * 20}) for number in range(1, 600)]
    for event in events:
        for _ in range(40):
            opened = saltevent.open_event(event)
            assert isinstance(opened, Opened)
            record = records.interpret(opened, 0.0, SELECTION)
            assert isinstance(record, Record)
            stencils.learn(event, record)
    known = [event for event in events if stencils.cut(event)]
    assert 0 < len(known) < 400
    assert sum(map(len, known)) <= 2 * 1024 * 1024
    assert all(stencils.cut(event)[1] == long_way(event) for event in known)  # type: ignore[index]


_TAUGHT = taught(*(body(**{"return": value}) for value in LOOK_ALIKES), times=80)


@given(
    value=st.sampled_from(range(len(LOOK_ALIKES))),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    minion=st.text("ab-.'\\%\x00\u00e9", min_size=4, max_size=4),
    number=st.integers(0, 10**6),
)
def test_whatever_bytes_come_a_cut_row_is_that_of_the_long_way(
    value: int, changes: list[tuple[int, int]], minion: str, number: int
) -> None:
    event = bytearray(body(jid(number), minion, **{"return": LOOK_ALIKES[value]}))
    for place, byte in changes:
        event[place % len(event)] = byte
    cut = _TAUGHT.cut(bytes(event))
    assert cut is None or cut[1] == long_way(bytes(event))


class Pairs(list[Any]):
    """A map as its pairs, in any order and with a key as often as it comes."""


_KEYS = st.sampled_from(
    ["duration", "start_time", "_stamp", "id", "jid", "ts", "a", 1.5, 1e16, "10:11:12.131415", 7, b"x"]
)
_LEAVES = st.sampled_from(
    ["duration", "start_time", "id", "web1", jid(1), STAMPS[0], "10:11:12.131415", 1.5, -0.0, 1e22, 1_790_000_000, True]
) | st.floats(allow_nan=False, allow_infinity=False)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(_KEYS, inner), max_size=4).map(Pairs),
    max_leaves=12,
)


def packed(value: Any) -> bytes:
    if isinstance(value, Pairs):
        return bytes([0x80 | len(value)]) + b"".join(packed(each) for pair in value for each in pair)
    if isinstance(value, list):
        return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
    return bytes(msgpack.packb(value, use_bin_type=True))


def mutated(value: Any, moved: float) -> Any:
    """The same tree with other numbers and times, keys too."""
    if isinstance(value, Pairs):
        return Pairs((mutated(key, moved), mutated(item, moved)) for key, item in value)
    if isinstance(value, list):
        return [mutated(item, moved) for item in value]
    if isinstance(value, float):
        return value * moved
    return "23:59:59.999999" if value == "10:11:12.131415" else value


@settings_of_hypothesis(max_examples=300, deadline=None)
@given(
    top=st.lists(st.tuples(_KEYS, _TREES), max_size=4),
    order=st.permutations(["id", "return", "jid", "fun", "ts", "_stamp", "success", "retcode"]),
    moved=st.sampled_from([1.0, 3.0, 1e16, 1e-7, -1.0]),
)
def test_whatever_trees_come_a_cut_row_is_that_of_the_long_way(
    top: list[tuple[Any, Any]], order: list[str], moved: float
) -> None:
    def event(job: str, minion: str, value: Any) -> bytes:
        said = {"id": minion, "jid": job, "fun": "test.ping", "ts": 1_790_000_000, "_stamp": STAMPS[1]}
        said |= {"return": value, "success": True, "retcode": 0}
        whole = Pairs([*((key, said[key]) for key in order), ("cmd", "_return")])
        return f"salt/job/{job}/ret/{minion}".encode() + b"\n\n" + packed(whole)

    value = Pairs(top)
    stencils = taught(event(jid(1), "web1", value), times=40)
    for other in (event(jid(1), "web1", value), event(jid(2), "db-1", mutated(value, moved))):
        cut = stencils.cut(other)
        assert cut is None or cut[1] == long_way(other)


@pytest.mark.parametrize("key", [1.5, "10:11:12.131415"])
def test_what_is_a_key_of_a_map_is_no_place(key: Any) -> None:
    name = "duration" if isinstance(key, float) else "start_time"
    event = body(**{"return": {"x": name, key: 1}})
    assert taught(event).cut(event) is None


def test_learning_never_fails_an_event() -> None:
    class Hostile(Stencils):
        def _learn(self, *_: Any) -> None:
            raise ZeroDivisionError

    opened = saltevent.open_event(body())
    assert isinstance(opened, Opened)
    record = records.interpret(opened, 0.0, SELECTION)
    assert isinstance(record, Record)
    Hostile(SELECTION).learn(body(), record)
    for stamp in (..., 5, "2026-11-22"):
        nested = {"_stamp": "2026-11-22T10:11:12.131415", "duration": 1.5}
        event = body(_stamp=stamp, **{"return": nested, "fun_args": [nested]})
        taught(event)
