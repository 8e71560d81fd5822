"""From an event to what a batch holds of it: its rows as SQL, or the reason why it has none. No I/O."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from . import jsontext, moments, records, saltevent, sql
from .records import Event, Load, Record, Return, Selection
from .saltevent import Ignored, Opened
from .stencil import Stencils

log = logging.getLogger(__name__)


class Plain(NamedTuple):
    """A return of which no more is kept than its row, for a batch of highstates would else take a hundred megabytes.

    ``key`` is its jid and minion, ``body`` its event, for those who need all of it, ``selection`` the one by which its
    row was made, and ``data`` what it says but for the value, where that is known.
    """

    key: tuple[str, str]
    body: bytes
    selection: Selection
    data: dict[str, Any] | None = None

    def whole(self, captured_at: float) -> Return:
        """All of it, as its row has it, whatever the settings are by now."""
        event = saltevent.open_event(self.body)
        record = records.interpret(event, captured_at, self.selection) if isinstance(event, Opened) else None
        if not isinstance(record, Record) or record.ret is None:
            raise ValueError(
                f"the event of {self.key[1]!r} for jid {self.key[0]} is no return when it is looked at again"
            )
        return record.ret


class Fit(NamedTuple):
    """What the tables take: ``alter_time``, ``failed``, four-byte characters, characters in ``fun``, ``event_key``; and
    the server: the bytes of a statement, ``max_allowed_packet``."""

    timed: bool
    failed: bool
    utf8mb4: bool
    fun_characters: int
    event_key: bool
    max_packet: int


class Large(NamedTuple):
    """What is kept of a large event beside its rows, which are made for tables that ``fit``.

    ``key`` is a return's jid and minion, ``length`` and ``digest`` its value's, ``data`` what it says but for
    the value; ``load`` is what was published.
    """

    key: tuple[str, str] | None
    length: int
    digest: str
    trimmed: bool
    load: Load | None
    data: dict[str, Any] | None
    event: Event | None
    fit: Fit
    refused: str
    """Why the server would refuse a row, which was not made then."""


class Item(NamedTuple):
    """An event in a batch."""

    seq: int
    captured_at: float
    outcome: Record | Plain | Large | Ignored | None
    return_row: bytes = b""
    event_row: bytes = b""
    size: int = 0
    """Bytes of SQL, about."""
    error: str = ""
    """Why there is no outcome, which makes the event a dead letter, for this ``reason``."""
    reason: str = "fault"
    confirmed: bytes | None = None
    """The event's bytes, where the job cache confirmed them."""


def harmless(value: Any, master_id: str, *, with_event: bool) -> Item:
    """A return that nobody sent, to ask a server whether it takes rows."""
    data: dict[str, Any] = {"jid": "0" * 20, "id": master_id, "fun": "", "fun_args": [], "return": value}
    altered = moments.altered_at(None, time.time())
    ret = Return(data["jid"], master_id, "", jsontext.dumps(value), jsontext.dumps(data), True, altered, data)
    event = Event("mysql_jobcache", "{}", altered) if with_event else None
    event_row = sql.event_row(event, master_id, bytes(saltevent.EVENT_KEY_BYTES)) if event else b""
    return Item(0, 0.0, Record(ret=ret, event=event), sql.return_row(ret), event_row)


class Maker:
    """Makes items by one choice of settings. ``event_key`` gives 16 bytes for an event's ``seq``, as no other has."""

    def __init__(self, selection: Selection, event_key: Callable[[int], bytes]) -> None:
        self.selection = selection
        self._event_key = event_key
        self._stencils = Stencils(selection)

    def make(
        self, seq: int, captured_at: float, body: bytes, event: Opened | Ignored | None = None, error: str = ""
    ) -> Item:
        """What an event becomes; ``event`` is what ``body`` holds, where somebody looked."""
        if error:
            return Item(seq, captured_at, None, error=error)
        if isinstance(event, Ignored):
            return Item(seq, captured_at, event)
        try:
            cut = self._stencils.cut(body)
            if cut is not None:
                key, row = cut
                return Item(seq, captured_at, Plain(key, body, self.selection), row, b"", len(row))
            return self._made(seq, captured_at, body, event or saltevent.open_event(body))
        except Exception as exc:  # whatever strangers sent, it costs this event alone
            log.exception("An event cannot be made a row, and goes to the dead letters")
            return Item(seq, captured_at, None, error=f"{type(exc).__name__}: {exc}")

    def _made(self, seq: int, captured_at: float, body: bytes, event: Opened | Ignored) -> Item:
        if isinstance(event, Ignored):
            return Item(seq, captured_at, event)
        record = records.interpret(event, captured_at, self.selection)
        if isinstance(record, Ignored):
            return Item(seq, captured_at, record)
        load, ret, stored = record
        return_row = sql.return_row(ret) if ret else b""
        if ret and not ret.trimmed and not load and not stored:
            self._stencils.learn(body, record)
            data = {key: value for key, value in ret.data.items() if key != "return"}
            return Item(
                seq, captured_at, Plain((ret.jid, ret.id), body, self.selection, data), return_row, b"", len(return_row)
            )
        master = self.selection.master_id
        event_row = sql.event_row(stored, master, stored.key or self._event_key(seq)) if stored else b""
        # A load's text is made when it has met the one that stands; until then its event's size will do.
        size = len(return_row) + len(event_row) + (len(body) if load else 0)
        return Item(seq, captured_at, record, return_row, event_row, size)
