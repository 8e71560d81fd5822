"""What an event becomes on its way into a batch, and how many bytes of SQL a batch counts for it."""

from __future__ import annotations

import logging

import pytest

from salt_mysql_engine import records, settings
from salt_mysql_engine.items import Item, Maker, Plain
from salt_mysql_engine.records import Record, Selection
from salt_mysql_engine.saltevent import Ignored, keyed_event
from tests.support.shipping import body, jid, published, returned

PUBLISH = published(jid(1), ["web1", "web2"])
RETURN = returned(jid(1), "web1", "é" * 1000)
EVENT = body("my/app/1", {"a": 1})


def make(event: bytes, **options: object) -> Item:
    """Of an event with the number 7."""
    selection = Selection(settings.combine(options, {}), master_id="master")
    return Maker(selection, lambda seq: b"%016d" % seq).make(7, 1e9, event)


def test_a_return_is_a_row_of_its_own_and_counts_as_many_bytes() -> None:
    item = make(RETURN)
    assert isinstance(item.outcome, Plain)
    assert (item.outcome.key, item.event_row) == ((jid(1), "web1"), b"")
    assert item.size == len(item.return_row) > 2000
    assert item.outcome.data is not None
    assert "return" not in item.outcome.data


def test_a_publish_counts_as_its_event_until_its_text_is_made() -> None:
    item = make(PUBLISH)
    assert isinstance(item.outcome, Record)
    assert item.outcome.load is not None
    assert (item.return_row, item.event_row, item.size) == (b"", b"", len(PUBLISH))


def test_what_is_a_row_of_events_too_counts_for_both() -> None:
    item = make(EVENT, events=["my/*"])
    assert (item.return_row, item.size) == (b"", len(item.event_row))
    assert b"0000000000000007".hex().encode() in item.event_row
    item = make(RETURN, events=["salt/job/*"])
    assert item.size == len(item.return_row) + len(item.event_row)
    assert min(len(item.return_row), len(item.event_row)) > 1000


def test_an_event_that_brings_its_key_along_is_known_by_it() -> None:
    item = make(keyed_event(EVENT, bytes(range(16))))
    assert bytes(range(16)).hex().encode() in item.event_row


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (EVENT, Ignored.SWITCHED_OFF),
        (returned(jid(1), "web1", fun=7), Ignored.WRONG_TYPE),
        (b"\xc1", Ignored.UNDECODABLE),
    ],
)
def test_what_is_no_row_is_ignored_for_a_reason(event: bytes, why: Ignored) -> None:
    assert make(event) == Item(7, 1e9, why)


def test_whatever_goes_wrong_with_an_event_is_its_own_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("of ours")

    monkeypatch.setattr(records, "interpret", fail)
    with caplog.at_level(logging.ERROR):
        assert make(RETURN) == Item(7, 1e9, None, error="LookupError: of ours")
    assert "goes to the dead letters" in caplog.text
