"""Any value becomes JSON text that every MySQL and MariaDB JSON function accepts."""

from __future__ import annotations

import base64
import datetime
import json
import random
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from salt_mysql_engine import jsontext, records, saltevent, settings, sql
from salt_mysql_engine.records import Selection
from tests.support.shipping import returned
from tests.unit import values

ordinary = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(ordinary)
@example({"€": ["\x00\u2028'\"\\", 1.0, -0.0, 1e22, {}]})
def test_an_ordinary_value_becomes_what_salts_own_returners_store(value: Any) -> None:
    assert jsontext.dumps(value) == json.dumps(value, ensure_ascii=False)


def test_many_numbers_in_a_deep_part_are_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a mebibyte holds as many of them as it has bytes: one by one they took a quarter of a second."""
    numbers = [*range(100)] * 1000
    value: Any = [*numbers, {"k": [1.5, None, True]}, *numbers]
    for _ in range(100):
        value = [value]
    pieces, real = [], jsontext._encode
    monkeypatch.setattr(jsontext, "_encode", lambda value: pieces.append(1) or real(value))
    outer = json.loads(jsontext.dumps(value))
    assert len(pieces) < 20
    for _ in range(jsontext.MAX_DEPTH):
        (outer,) = outer
    for _ in range(jsontext.MAX_DEPTH):
        (value,) = value
    assert outer == json.dumps(value)


@given(values.python_values)
def test_any_value_becomes_strict_json_that_is_not_too_deep(value: Any) -> None:
    assert values.depth(values.strict_json(jsontext.dumps(value))) <= jsontext.MAX_DEPTH + 1  # for {"__base64__": ...}


@given(st.binary())
def test_bytes_become_their_text_or_can_be_had_back_from_base64(data: bytes) -> None:
    stored = values.strict_json(jsontext.dumps([data]))[0]
    if isinstance(stored, dict):
        assert base64.b64decode(stored.pop("__base64__")) == data
        assert stored == {}
    else:
        assert stored.encode() == data


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.datetime.fromisoformat("2026-01-02T03:04:05.000006"), '"2026-01-02T03:04:05.000006"'),
        (datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), '"2026-01-02T00:00:00+00:00"'),
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        (datetime.time(3, 4), '"03:04:00"'),
        (float("nan"), '"NaN"'),
        ([float("inf"), float("-inf")], '["Infinity", "-Infinity"]'),
        (2**64 - 1, "18446744073709551615"),
        (-(2**63), "-9223372036854775808"),
        ("\ud800", '"\\\\ud800"'),
        ("\ud83d\ude00", '"😀"'),
        (b"caf\xc3\xa9", '"café"'),
        (b"\xff", '{"__base64__": "/w=="}'),
        ({b"\xff": 1, b"a": 2}, '{"/w==": 1, "a": 2}'),
        ({1: 1, None: 3, 1.5: 4}, '{"1": 1, "null": 3, "1.5": 4}'),
        ({True: b"", None: 1, 2: 2, 1.5: 3}, '{"true": "", "null": 1, "2": 2, "1.5": 3}'),
        ({float("nan"): 1}, '{"NaN": 1}'),
        ((1, (2,)), "[1, [2]]"),
        ({b"x"}, '["x"]'),
        (1j, '"1j"'),
    ],
    ids=repr,
)
def test_what_json_cannot_hold_has_one_documented_form(value: Any, text: str) -> None:
    assert jsontext.dumps(value) == text


@pytest.mark.parametrize("levels", [jsontext.MAX_DEPTH + 1, 100, 5_000, 200_000])
def test_a_part_that_is_too_deep_becomes_the_json_of_that_part(levels: int) -> None:
    value: Any = "core\ud800"
    for _ in range(levels):
        value = {"k": value}
    stored = values.strict_json(jsontext.dumps(value))
    assert values.depth(stored) == jsontext.MAX_DEPTH
    for _ in range(jsontext.MAX_DEPTH):
        stored = stored["k"]
    rest = levels - jsontext.MAX_DEPTH
    assert stored == '{"k": ' * rest + '"core\\\\ud800"' + "}" * rest
    while value != "core\ud800":  # unwound by hand: freeing it in one go is deep recursion too
        value = value["k"]


@given(st.integers(0, jsontext.MAX_DEPTH))
def test_a_value_of_the_deepest_allowed_nesting_stays_as_it_is(levels: int) -> None:
    value = values.nested(levels, "core")
    assert jsontext.dumps(value) == json.dumps(value)


def test_a_wide_value_is_not_taken_for_a_deep_one() -> None:
    value = {str(n): [n, {"n": [n]}] for n in range(1000)}
    assert jsontext.dumps(value) == json.dumps(value)


def test_megabytes_that_are_no_text_are_a_row_in_a_moment() -> None:
    noise = random.Random(6).randbytes(3_000_000)
    job = "20260329000000000001"
    event = returned(job, "web1", "X" * len(noise)).replace(b"X" * len(noise), noise)
    selection = Selection(settings.combine({}, {}), master_id="master")
    began = time.process_time()
    opened = saltevent.open_event(event)
    assert isinstance(opened, saltevent.Opened)
    record = records.interpret(opened, 0.0, selection)
    assert isinstance(record, records.Record)
    assert record.ret is not None
    row = sql.return_row(record.ret)
    assert time.process_time() - began < 1.5
    assert len(row) > 20_000_000
