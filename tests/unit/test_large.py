"""What is large, and how much is unpacked of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgpack
import pytest

from salt_mysql_engine import records, saltevent, settings
from salt_mysql_engine.items import Fit
from salt_mysql_engine.journal import Entry
from salt_mysql_engine.large import is_large, parts_of
from tests.support.shipping import MASTER, jid, returned


@pytest.fixture
def hundred() -> Iterator[None]:
    """At most so many objects."""
    saltevent.limit_objects(100)
    yield
    saltevent.limit_objects(0)


def entry(body: bytes, size: int = 0) -> Entry:
    return Entry(1, 0.0, body, 0, size)


@pytest.mark.parametrize(
    ("body", "large"),
    [
        (b"", False),
        (b"\x80" * 8_000, False),
        (b"\x80" * 8_000 + b"a" * 200_000, False),
        (b"\x80" * 9_000, True),
        (b"a" * 256 * 1024, False),
        (b"a" * 256 * 1024 + b"a", True),
    ],
)
def test_an_event_is_large_by_its_bytes_or_by_what_they_are(body: bytes, large: bool) -> None:
    assert is_large(entry(body)) is large


def test_an_event_that_was_not_read_is_large() -> None:
    assert is_large(entry(b"", 300_000))


@pytest.mark.usefixtures("hundred")
@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ([None] * 100, True),
        ([None] * 101, False),
        (dict.fromkeys(range(50)), True),
        (dict.fromkeys(range(51)), False),
        ([[None] * 49] * 2, True),
        ([[None] * 50] * 2, False),
        ([{"": [None] * 3}] * 16, True),
        ([{"": [None] * 3}] * 17, False),
        ("x" * 10_000, True),
    ],
)
def test_no_more_objects_are_unpacked_than_the_limit_lets_pass(value: object, fits: bool) -> None:
    packed = msgpack.packb(value)
    if fits:
        assert saltevent.unpack(packed) == value
    else:
        with pytest.raises(saltevent.TooManyObjects):
            saltevent.unpack(packed)


def test_what_is_cut_keeps_its_tag_and_its_size() -> None:
    event = saltevent.open_event(saltevent.cut(b"salt/job/20260329000000000001/ret/web1\n\n" + b"x" * 999, 0.0))
    assert isinstance(event, saltevent.Opened)
    assert event.job == saltevent.Tag(saltevent.Kind.JOB_RETURN, "20260329000000000001", "web1")
    assert event.data[saltevent.TOO_LARGE] == 1039
    for hostile in (b"", b"\n\n", b"\xff" * 5000, b"salt/job/x/ret/y"):
        assert isinstance(saltevent.open_event(saltevent.cut(hostile, 0.0)), saltevent.Opened)


@pytest.mark.parametrize("characters", [400, 600])
def test_a_row_that_the_server_would_refuse_is_not_made(characters: int) -> None:
    selection = records.Selection(settings.combine({}, {}), master_id=MASTER)
    event = saltevent.open_event(returned(jid(1), "web1", "x" * characters))
    assert isinstance(event, saltevent.Opened)
    record = records.interpret(event, 0.0, selection)
    assert isinstance(record, records.Record)
    parts, about = parts_of(*record, MASTER, bytes(16), Fit(True, True, True, 100, True, 1200))
    row, _, load, _ = parts
    assert (row == b"") is (characters == 600)
    assert ("max_allowed_packet (1200 bytes)" in about[-1]) is (characters == 600)
    assert json.loads(load)["id"] == "web1"
