"""Large events: what the decoder makes of them, one after the other, while all others go their way.

An event is large that could hold up the loop: by its bytes, by how many of them are not plain text, or because the job
cache has more of it than is read beside other work. It stays in the journal until the decoder has confirmed it, and
again until the writer takes its rows; of its bytes the engine has one event's at a time.

What is beyond ``max_event_bytes``, ``max_event_objects`` or the decoder's memory is a dead letter, and so is an event
that ended two decoders.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

from . import jsontext, saltevent, sql
from .decoder import Answer, Decoder, DecoderDied, DecoderMissing
from .errors import RowsRejected, ServerUnavailable
from .items import Fit, Item, Large
from .journal import Entry, Journal, Settlement
from .journalfile import WHOLE_BYTES
from .records import Event, Load, Return
from .settings import OPTIONS, Settings

log = logging.getLogger(__name__)

FILE_BYTES = 64 * 1024
"""A larger file of the job cache is read by the decoder."""
_FEW_BYTES, _MOST_STRANGE = 8 * 1024, 8_000
_PLAIN = bytes(range(0x80))
_OUT_BYTES = 8 * 1024 * 1024
"""Of rows that the writer has not written yet; a single one may be larger."""
_USUAL_PACKET = 16 * 1024 * 1024
"""``max_allowed_packet``, until the server has said its own."""
_DEATHS = 2
_AGAIN_SECONDS = 1.0
MARGIN_BYTES = 64 * 1024

InThread = Callable[..., Awaitable[Any]]


def is_large(entry: Entry) -> bool:
    """Whether an event is the decoder's. Measured: the worst of the others hold the interpreter's lock for 50 ms."""
    body = entry.body
    if len(body) <= _FEW_BYTES:
        return entry.size > 0
    # Maps, lists and what is no UTF-8 cost a hundred times as much as text, and have the eighth bit set.
    return len(body) > WHOLE_BYTES or len(body.translate(None, _PLAIN)) > _MOST_STRANGE


Setup = dict[str, Any]
"""What the decoder does all by, in msgpack's types."""


def setup_of(opts: Mapping[str, Any], chosen: Settings, *, peers: Iterable[str] | None, has_cache: bool) -> Setup:
    """The setup for a master and its settings; ``has_cache``: it keeps a local job cache."""
    return {
        "master": opts["id"],
        "peers": None if peers is None else list(peers),
        "settings": {name: getattr(chosen, name) for name in OPTIONS},
        "cache": {key: opts[key] for key in ("id", "cachedir", "hash_type") if key in opts} if has_cache else None,
        "verified": has_cache and chosen.verify_returns is not False,
        "max_bytes": chosen.max_event_bytes,
        "max_objects": chosen.max_event_objects,
    }


def too_large(size: int, most: int) -> str:
    """What a dead letter says of it."""
    return f"an event of {size:,} bytes; max_event_bytes is {most:,}"


def parts_of(
    load: Load | None, ret: Return | None, stored: Event | None, master_id: str, event_key: bytes, fit: Fit
) -> tuple[list[bytes], list[Any]]:
    """Rows, a load's JSON, and what is said of them. A row that the server would refuse is not made."""
    key: list[str] | None = None
    length, digest, trimmed = 0, "", False
    text = (lambda of: of) if fit.utf8mb4 else jsontext.ascii_only
    return_row = event_row = load_json = event_json = b""
    refused = ""
    if ret is not None:
        key, trimmed = [ret.jid, ret.id], ret.trimmed
        ret = ret._replace(
            fun=ret.fun[: fit.fun_characters], return_json=text(ret.return_json), full_ret_json=text(ret.full_ret_json)
        )
        length, digest = len(ret.return_json), sql.digest_of(ret.return_json)
        load_json = jsontext.dumps({name: value for name, value in ret.data.items() if name != "return"}).encode()
        refused = _refused(length + len(ret.full_ret_json), fit)
        return_row = b"" if refused else sql.return_row(ret, timed=fit.timed, failed=fit.failed)
    if load is not None:
        load_json = jsontext.dumps(load.load).encode()
    event: list[str] | None = None
    if stored is not None:
        event = [stored.tag, stored.altered]
        refused = refused or _refused(len(stored.data_json), fit)
        if refused:
            pass
        elif fit.event_key:
            event_row = sql.event_row(stored, master_id, stored.key or event_key)
        else:
            event_json = text(stored.data_json).encode()
    about = [key, length, digest, trimmed, load and load.jid, event, refused]
    return [return_row, event_row, load_json, event_json], about


def _refused(characters: int, fit: Fit) -> str:
    """Why the server would refuse a row of so many characters, which may take more bytes yet; else nothing."""
    if characters < fit.max_packet:
        return ""
    return (
        f"a row of more than {characters} bytes is larger than max_allowed_packet ({fit.max_packet} bytes); raise that"
    )


def _item(seq: int, captured_at: float, answer: Answer, fit: Fit) -> Item:
    """The item of what :func:`parts_of` gave."""
    _, sizes, key, length, digest, trimmed, jid, event, refused = answer.said
    parts = []
    view, start = memoryview(answer.body), 0
    for size in sizes:
        parts.append(bytes(view[start : start + size]))
        start += size
    return_row, event_row, load_json, event_json = parts
    load = json.loads(load_json) if load_json else None
    outcome = Large(
        key=None if key is None else (key[0], key[1]),
        length=length,
        digest=digest,
        trimmed=trimmed,
        load=None if jid is None or load is None else Load(jid, load),
        data=load if jid is None else None,
        event=None if event is None else Event(event[0], event_json.decode(), event[1]),
        fit=fit,
        refused=refused,
    )
    size = len(return_row) + len(event_row) + (len(load_json) if jid is not None else 0)
    return Item(seq, captured_at, outcome, return_row, event_row, size)


class _Waiting(NamedTuple):
    """A large event in line: for how many seconds an absent file is waited for, and whether its time is over."""

    patience: float
    is_over: bool


class LargeEvents:
    """The line of large events. ``on_made`` is told of each that their writer can take, ``on_settled`` that some are
    settled."""

    def __init__(
        self,
        journal: Journal,
        in_journal: InThread,
        decoder: Decoder,
        *,
        on_made: Callable[[int, int], None],
        on_settled: Callable[[], None] = lambda: None,
    ) -> None:
        self.max_bytes = 16 * 1024 * 1024
        self.file_bytes = FILE_BYTES
        self.fit = Fit(True, True, True, saltevent.MAX_FUN_CHARACTERS, True, _USUAL_PACKET)
        """The tables' and the server's, once they were looked at."""
        self.on_looked: Callable[[Entry, Answer, bool, list[int]], Awaitable[None]] | None = None
        """Is told what the job cache has of one, whether its time is over, and of which others that is true, too."""
        self._journal = journal
        self._in_journal = in_journal
        self._decoder = decoder
        self._on_made = on_made
        self._on_settled = on_settled
        self._unchecked: dict[int, _Waiting] = {}
        self._lines: tuple[dict[bytes, list[int]], dict[bytes, list[int]]] = ({}, {})
        """The same in the order in which they are looked at, together where they stand for one row; behind all others
        those of which the job cache holds nothing."""
        self._confirmed: dict[int, None] = {}
        self._made: collections.deque[Item] = collections.deque()
        self._out: dict[int, int] = {}
        """Bytes of what was made and is not settled."""
        self._deaths: dict[int, int] = {}
        self._news = asyncio.Event()
        self._said = ""
        """Why there is no decoder."""

    def apply(self, setup: Setup) -> None:
        """From now on everything is done by this."""
        self.max_bytes = setup["max_bytes"]
        self._decoder.setup = setup

    def __contains__(self, seq: int) -> bool:
        return seq in self._unchecked or seq in self._confirmed or seq in self._out

    def look_for(
        self, entry: Entry, patience: float, *, is_over: bool = False, alone: bool = False, is_last: bool = False
    ) -> None:
        """One more to confirm, together with others of its tag or ``alone``; ``is_last``: behind all others."""
        tag = entry.body[: saltevent.MAX_TAG_BYTES].partition(saltevent.SEPARATOR)[0]
        self._unchecked[entry.seq] = _Waiting(patience, is_over)
        self._lines[is_last].setdefault(b"%d %b" % (entry.seq if alone else 0, tag), []).append(entry.seq)
        self._news.set()

    def make(self, seq: int) -> None:
        """One more to make rows of, for the writer."""
        if seq not in self._out:
            self._confirmed[seq] = None
            self._news.set()

    async def read(self, *, after: int, rows: int, max_bytes: int) -> tuple[list[Item], int, bool]:
        """What was made, for its writer."""
        made: list[Item] = []
        while self._made and len(made) < rows and max_bytes > 0:
            item = self._made.popleft()
            max_bytes -= item.size
            made.append(item)
        return made, after, not self._made

    def settled(self, seqs: Iterable[int]) -> None:
        """The writer is done with some."""
        if self._out:
            for seq in seqs:
                self._out.pop(seq, None)
            self._news.set()
            self._on_settled()

    async def run(self) -> None:
        """Does one after the other, until cancelled."""
        try:
            while True:
                self._news.clear()
                try:
                    if not await self._next():
                        await self._news.wait()
                except sqlite3.Error as exc:
                    log.debug("The journal cannot be used now: %s", exc)  # capture and writer say it
                    await asyncio.sleep(_AGAIN_SECONDS)
                except DecoderMissing as exc:
                    if str(exc) != self._said:
                        self._said = str(exc)
                        log.error("Large events wait: the process that decodes them cannot be started: %s", exc)
                    await asyncio.sleep(_AGAIN_SECONDS)
        finally:
            await self._decoder.end()

    async def _next(self) -> bool:
        if self._confirmed and sum(self._out.values()) < _OUT_BYTES:
            seq = next(iter(self._confirmed))
            try:
                await self._make(seq, self.fit)
                del self._confirmed[seq]
            except DecoderDied:
                self._confirmed[seq] = self._confirmed.pop(seq)  # behind all others
            return True
        if line := self._lines[0] or self._lines[1]:
            key = next(iter(line))
            seqs = line.pop(key)  # who comes now is looked at later: a publish may have grown by then
            try:
                for seq in await self._look(seqs):
                    self._unchecked.pop(seq, None)
            except DecoderDied:
                pass
            finally:
                if left := [seq for seq in seqs if seq in self._unchecked]:
                    line[key] = left + line.get(key, [])
            return True
        return False

    async def _look(self, seqs: list[int]) -> list[int]:
        """Has the first of some looked at, and gives those whose look has ended by that.

        What is confirmed is so for all: the job cache has it once. Any other fate may be that of the event itself,
        whose bytes are a stranger's; where these are few, it is that of what the job cache has.
        """
        seq = seqs[0]
        waiting = self._unchecked[seq]
        entry = await self._entry(seq)
        if entry is None:
            return [seq]
        alike = [seq] if is_large(entry) else seqs
        body = [entry.body]
        entry = entry._replace(body=entry.body[: saltevent.MAX_TAG_BYTES])  # for its tag
        answer = await self._ask(entry, "confirm", [seq, entry.captured_at, entry.state, waiting.patience], body, alike)
        if answer is None:
            return alike
        if answer.said[0] in ("absent", "unknown"):
            alike = [seq]
        elif answer.said[0] == "confirmed":
            alike = seqs
        if self.on_looked is not None:
            await self.on_looked(entry, answer, waiting.is_over, alike[1:])
        return alike

    async def _make(self, seq: int, fit: Fit) -> None:
        entry = await self._entry(seq)
        if entry is None:
            return
        answer = await self._ask_to_make(entry, fit)
        if answer is None:
            return
        if answer.said[0] == "ignored":
            await self._settle(Settlement([seq], {f"ignored.{answer.said[1]}": 1}, {}))
            return
        item = _item(seq, entry.captured_at, answer, fit)
        self._out[seq] = item.size
        self._made.append(item)
        self._on_made(1, item.size)

    async def _ask_to_make(self, entry: Entry, fit: Fit) -> Answer | None:
        body = [entry.body]
        entry = entry._replace(body=entry.body[: saltevent.MAX_TAG_BYTES])
        most = 2 * self.max_bytes
        key = self._journal.event_key(entry.seq)
        return await self._ask(entry, "make", [entry.captured_at, key, [*fit], most], body)

    async def fitted(self, item: Item) -> Item:
        """The item with rows for the tables as they are now.

        Raises:
            RowsRejected: there are none.
            ServerUnavailable: nobody can make them now.
        """
        if not isinstance(item.outcome, Large) or item.outcome.fit == self.fit:
            return item
        entry: Entry | None = await self._in_journal(self._journal.read_whole, item.seq, self.max_bytes)
        fit = self.fit
        try:
            answer = None if entry is None or entry.size else await self._ask_to_make(entry, fit)
        except DecoderDied as exc:  # once more; the second time makes a dead letter of it
            raise ServerUnavailable(f"the process that decodes large events ended over one: {exc}") from exc
        except DecoderMissing as exc:
            raise ServerUnavailable(f"the process that decodes large events cannot be started: {exc}") from exc
        if answer is None or answer.said[0] != "item":
            raise RowsRejected("the tables changed, and no row can be made for them")
        return _item(item.seq, item.captured_at, answer, fit)

    async def _entry(self, seq: int) -> Entry | None:
        """An event that is there, and not beyond ``max_event_bytes``."""
        most = self.max_bytes
        entry: Entry | None = await self._in_journal(self._journal.read_whole, seq, most)
        if entry is not None and entry.size:
            await self._bury([seq], "too_large", too_large(entry.size, most))
            return None
        return entry

    async def _ask(
        self, entry: Entry, task: str, arguments: list[Any], body: list[bytes], alike: list[int] | None = None
    ) -> Answer | None:
        """What the decoder says, where it is no end of the event, and of those that are ``alike``."""
        seqs = alike or [entry.seq]
        try:
            answer = await self._decoder.ask(task, arguments, body)
        except DecoderDied as exc:
            deaths = self._deaths.pop(entry.seq, 0) + 1
            log.error("The process that decodes large events ended over one (%s): %s", _tag(entry), exc)
            if deaths < _DEATHS:
                self._deaths[entry.seq] = deaths
                raise
            await self._bury(seqs, "decoder", f"it ended the decoder {deaths} times: {exc}")
            return None
        self._deaths.pop(entry.seq, None)
        self._said = ""
        if answer.said[0] in ("too_large", "fault"):
            await self._bury(seqs, *map(str, answer.said[:2]))
            return None
        return answer

    async def _bury(self, seqs: list[int], reason: str, error: str) -> None:
        await self._settle(Settlement(seqs, {}, dict.fromkeys(seqs, (reason, error))))

    async def _settle(self, settlement: Settlement) -> None:
        await self._in_journal(self._journal.settle, settlement)
        self._on_settled()


def _tag(entry: Entry) -> str:
    return entry.body.partition(saltevent.SEPARATOR)[0].decode(errors="backslashreplace")
