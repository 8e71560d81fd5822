"""Rows of returns that differ from earlier ones in little, cut with a stencil.

Most of what a fleet sends says the same. The events of two pings differ in minion, jid and time; those of two
highstates that changed nothing also in how long each state took; and so do their rows. A return that looks like many
before is therefore not unpacked, checked and encoded again: its bytes are cut where such events differ, the pieces that
must be the same are compared, and the others are put into a row that was made the long way. For a ping that takes a
sixth of the time, for a highstate less.

How it is sure
    A stencil holds every byte of such events but the values of ``id``, ``jid``, ``ts`` and ``_stamp``, and within the
    return those of ``duration`` and ``start_time``, each found behind its key. msgpack says every length before the
    value, so whatever stands in their places, the rest is read as it was. That these are values of those keys, and no
    look-alikes in somebody's output, is tried out before a stencil is used: an event with other values in all the
    places is made a row both ways, and the rows must be equal.

    Of the values, too, it takes the ordinary ones alone: a jid of 20 digits and a minion of plain characters, the same
    in tag and payload, and times as they should be. Anything else goes the long way.
"""

from __future__ import annotations

import collections
import json
import logging
import math
import re
import struct
from typing import Any, NamedTuple

from . import jsontext, moments, records, saltevent, sql
from .records import Record, Return, Selection
from .saltevent import Opened

log = logging.getLogger(__name__)

_MOST_BYTES = 64 * 1024
"""Of an event. What is larger is rarely said twice."""
_MOST_PLACES = 400
"""In an event: two for each of its states. More would take long to try out."""
_SAMPLE, _SIGHTS = 16, 2
"""Of the events that went the long way one in 16 is looked at, and what was seen twice so gets a stencil: the look is
wasted on what never comes again."""
_MOST_SEEN, _MOST_KNOWN_BYTES, _MOST_OF_A_LENGTH = 4096, 2 * 1024 * 1024, 8
"""What is remembered, for events come from strangers. It is forgotten all at once when it is too much."""

_PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
_CLOCK = b"0123456789:."
_JID, _TS, _TS_BYTES = b"\xa3jid\xb4", b"\xa2ts\xce", 4
_TOOK = re.compile(rb"\xa8duration\xcb(.{8})|\xaastart_time\xaf([0-9:.]{15})", re.DOTALL)
_STAMP = re.compile(rb"\xa6_stamp(?:\xba|\xd9\x20)([0-9T:.-]{26})")
_MOMENT = re.compile(rb"20[0-3]\d-\d\d-\d\dT(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d\.\d{6}")
_TEXT, _NUMBER = "\0", "\1"
"""Places in a row that is being made."""


class _Stencil(NamedTuple):
    layout: struct.Struct
    """Cuts an event: what is always the same and what is not, by turns."""
    same: tuple[bytes, ...]
    has_ts: bool
    row: bytes
    """With a place for each value, and two for ``said``."""
    said: bytes
    """What the return says, with a place for each of its times; it stands in the row twice. Empty: it says none."""


class _Sight(NamedTuple):
    """An event taken apart.

    ``values``: jid and minion of the tag, ``id``, what the return says of times, ``jid``, ``ts`` if there is one, and
    ``_stamp`` to the microsecond. ``formats`` say how each is packed (``struct``); ``same`` stands around them.
    """

    same: tuple[bytes, ...]
    values: tuple[bytes, ...]
    formats: tuple[str, ...]

    @property
    def has_ts(self) -> bool:
        """Whether there is a ``ts``."""
        return "I" in self.formats


class Stencils:
    """What was learnt from returns that were made rows the long way, for one choice of settings."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._by_length: dict[int, list[_Stencil]] = {}
        self._known: set[tuple[bytes, ...]] = set()
        self._bytes = 0
        self._seen: collections.Counter[int] = collections.Counter()
        self._passed = 0

    def cut(self, body: bytes) -> tuple[tuple[str, str], bytes] | None:
        """The jid and minion of an event that looks like those before, and its row; else ``None``."""
        for stencil in self._by_length.get(len(body), ()):
            pieces = stencil.layout.unpack(body)
            if pieces[::2] == stencil.same:
                return _filled(stencil, pieces[1::2])
        return None

    def learn(self, body: bytes, record: Record) -> None:
        """Looks at an event that became a row the long way. It never fails one."""
        try:
            self._learn(body, record)
        except Exception as exc:  # noqa: BLE001 (what strangers send; the row is made)
            log.debug("No stencil is made of an event: %r", exc)

    def _learn(self, body: bytes, record: Record) -> None:
        self._passed += 1
        if self._passed % _SAMPLE or record.ret is None or record.ret.trimmed or self._selection.wants_events:
            return
        sight = _look(body)
        if sight is None or sight.same in self._known:
            return
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        seen = hash(sight.same)
        self._seen[seen] += 1
        if self._seen[seen] < _SIGHTS:
            return
        if self._bytes + len(body) > _MOST_KNOWN_BYTES:
            self._bytes = 0
            self._known.clear()
            self._by_length.clear()
        self._bytes += len(body)
        self._known.add(sight.same)
        stencil = self._made(sight)
        if stencil is not None:
            alike = self._by_length.setdefault(len(body), [])
            alike.insert(0, stencil)
            del alike[_MOST_OF_A_LENGTH:]

    def _made(self, sight: _Sight) -> _Stencil | None:
        places = self._row_with_places(sight)
        if places is None:
            return None
        parts = (f"{len(same)}s{packed}" for same, packed in zip(sight.same, (*sight.formats, ""), strict=True))
        stencil = _Stencil(struct.Struct(">" + "".join(parts)), sight.same, sight.has_ts, *places)
        for each in (sight, _other(sight)):
            ret, pieces = self._long_way(each), stencil.layout.unpack(_body(each))
            cut = _filled(stencil, pieces[1::2])
            if ret is None or pieces[::2] != stencil.same or cut != ((ret.jid, ret.id), sql.return_row(ret)):
                return None
        return stencil

    def _row_with_places(self, sight: _Sight) -> tuple[bytes, bytes] | None:
        marked, marks = _marked(sight)
        ret = self._long_way(marked)
        if ret is None:
            return None
        full_ret: dict[str, Any] = json.loads(ret.full_ret_json)
        text = f'"{_TEXT}"'
        offset = full_ret["_stamp"][26:]
        places = {"id": text, "jid": text, "_stamp": f'"{_TEXT}{offset}"'}
        if sight.has_ts:
            places["ts"] = _NUMBER
        items = (f"{jsontext.dumps(key)}: {places.get(key) or jsontext.dumps(full_ret[key])}" for key in full_ret)
        whole = "{" + ", ".join(items) + "}"
        row = sql.return_row(ret._replace(jid=_TEXT, id=_TEXT, full_ret_json=whole, altered=_TEXT))
        # JSON spells out what marks a place, but a function's name may hold it.
        if row.count(b"\0") != 6 or row.count(b"\1") != sight.has_ts:
            return None
        row = row.replace(b"%", b"%%")
        # A number, or a text, says otherwise as a map's key: each must be the value of its own key, and stand once.
        if not all(ret.return_json.count(_value_of(mark, packed)) == 1 for mark, packed in marks):
            return None
        said = sql.quote(ret.return_json)[1:-1].replace("%", "%%").encode() if marks else b""
        if marks:
            if row.count(said) != 2:  # in `return` and in `full_ret`
                return None
            row = row.replace(said, b"%b")
        for mark, packed in marks:
            if said.count(mark) != 1:
                return None
            said = said.replace(mark, b"%a" if packed == "d" else b"%b")
        return row.replace(b"\0", b"%b").replace(b"\1", b"%d"), said

    def _long_way(self, sight: _Sight) -> Return | None:
        event = saltevent.open_event(_body(sight))
        record = records.interpret(event, 0.0, self._selection) if isinstance(event, Opened) else None
        return record.ret if isinstance(record, Record) else None


def _look(body: bytes) -> _Sight | None:
    """Takes an event apart, if it is one of those that a stencil could be made of."""
    if len(body) > _MOST_BYTES or (head := saltevent.PLAIN_RETURN.match(body)) is None:
        return None
    jid, minion = head.groups()
    size = len(minion)
    id_mark = b"\xa2id" + bytes([0xA0 | size] if size < 32 else [0xD9, size]) + minion  # as msgpack has it
    id_at = body.find(id_mark, head.end())
    jid_at = body.find(_JID + jid, id_at)
    stamp = _STAMP.search(body, jid_at)
    if id_at < 0 or jid_at < 0 or stamp is None:
        return None
    id_end, jid_start = id_at + len(id_mark), jid_at + len(_JID)
    places = [(*head.span(1), "20s"), (*head.span(2), f"{size}s"), (id_end - size, id_end, f"{size}s")]
    for took in _TOOK.finditer(body, id_end, jid_at):
        which = took.lastindex or 0
        places += [(*took.span(which), "d" if which == 1 else "15s")]
    places.append((jid_start, jid_start + len(jid), "20s"))
    ts_at = body.rfind(_TS, jid_start + len(jid), stamp.start() - _TS_BYTES)
    if ts_at >= 0:
        places.append((ts_at + len(_TS), ts_at + len(_TS) + _TS_BYTES, "I"))
    places.append((*stamp.span(1), "26s"))
    if len(places) > _MOST_PLACES:
        return None
    ends = [0, *(end for _, end, _ in places)]
    starts = [*(start for start, _, _ in places), len(body)]
    return _Sight(
        tuple(body[end:start] for end, start in zip(ends, starts, strict=True)),
        tuple(body[start:end] for start, end, _ in places),
        tuple(packed for _, _, packed in places),
    )


def _body(sight: _Sight) -> bytes:
    """The event again."""
    return b"".join(part for pair in zip(sight.same, (*sight.values, b""), strict=True) for part in pair)


def _within(sight: _Sight) -> slice:
    """Where the values of the return itself stand."""
    return slice(3, -3 if sight.has_ts else -2)


def _marked(sight: _Sight) -> tuple[_Sight, list[tuple[bytes, str]]]:
    """The event with marks for the values of the return itself, and those as a row has them."""
    within = _within(sight)
    marks = [
        (b"%d.5" % (7_000_000 + number) if packed == "d" else b"<%013d>" % number, packed)
        for number, packed in enumerate(sight.formats[within])
    ]
    values = list(sight.values)
    values[within] = [struct.pack(">d", float(mark)) if packed == "d" else mark for mark, packed in marks]
    return sight._replace(values=tuple(values)), marks


def _value_of(mark: bytes, packed: str) -> str:
    """What JSON has of a mark that is the value of its key."""
    return f'"duration": {mark.decode()}' if packed == "d" else f'"start_time": "{mark.decode()}"'


def _other(sight: _Sight) -> _Sight:
    """An event with other values of the same lengths."""
    jid, minion = sight.values[:2]
    jid = b"20350418075301000999" if jid[-1:] != b"9" else b"20350418075301000111"
    minion = (b"y" if minion[:1] != b"y" else b"z") * len(minion)
    took = [
        struct.pack(">d", 0.125 + number) if packed == "d" else b"23:59:5%d.%06d" % (number % 9, number)
        for number, packed in enumerate(sight.formats[_within(sight)])
    ]
    ts = [bytes(byte ^ 0x15 for byte in sight.values[-2])] if sight.has_ts else []
    return sight._replace(values=(jid, minion, minion, *took, jid, *ts, b"2031-12-30T23:58:57.504030"))


def _filled(stencil: _Stencil, values: tuple[Any, ...]) -> tuple[tuple[str, str], bytes] | None:
    """The row of an event, of its values; ``None`` where one is unusual."""
    job, name, minion, *took, jid, ts, stamp = values if stencil.has_ts else (*values[:-1], None, values[-1])
    if jid != job or minion != name or not jid.isdigit() or minion.translate(None, _PLAIN):
        return None
    if not _MOMENT.fullmatch(stamp) or not moments.is_day(stamp[:10].decode()) or (took and not _are_times(took)):
        return None
    seconds = () if ts is None else (ts,)
    said = (stencil.said % tuple(took),) if took else ()
    row = (jid, *said, minion, minion, *said, jid, *seconds, stamp, stamp.replace(b"T", b" "))
    return (jid.decode(), minion.decode()), stencil.row % row


def _are_times(took: list[Any]) -> bool:
    numbers = [value for value in took if type(value) is float]
    texts = b"".join([value for value in took if type(value) is bytes])
    return math.isfinite(sum(numbers)) and not texts.translate(None, _CLOCK)
