"""What the engine tells those who read (``pending.py``): what is not in MySQL yet, and whether the database answers."""

from __future__ import annotations

import base64
import sqlite3
import time
from collections.abc import Awaitable, Callable
from typing import Any

from .control import Argument, Verb
from .intake import Intake, Taken
from .journal import Journal
from .writer import Writer

_PAGE_EVENTS, _PAGE_BYTES = 1000, 1024 * 1024
_PART_BYTES = 4 * 1024 * 1024
_AWAY_SECONDS = 30.0
"""For how long somebody's word counts that the database does not answer."""


class Teller:
    """Answers two verbs of the control socket.

    ``take`` has the intake take something in; ``handed_off``: jobs come that way alone.
    """

    def __init__(
        self,
        journal: Journal,
        in_journal: Callable[..., Awaitable[Any]],
        intake: Intake,
        take: Callable[[Callable[[], Taken]], Awaitable[Taken]],
        writer: Writer,
        *,
        handed_off: bool,
    ) -> None:
        self._journal = journal
        self._in_journal = in_journal
        self._intake = intake
        self._take = take
        self._writer = writer
        self._handed_off = handed_off
        self._said_away: tuple[float, str] | None = None

    def verbs(self) -> dict[str, Verb]:
        """What is answered."""
        return {
            "pending": Verb(self.pending, {"jid": Argument(str, most=100, optional=True), "at": Argument(int)}),
            "pending_part": Verb(self.pending_part, {"seq": Argument(int), "start": Argument(int)}),
            "database_away": Verb(self.database_away, {"error": Argument(str, most=1000)}),
        }

    async def pending(self, jid: str | None = None, at: int = 0) -> dict[str, Any]:
        """A page of what is not in MySQL yet, of one job or of all; and what is known of the database.

        ``behind``: the spool holds more. ``whole``: of this job MySQL holds nothing.
        """
        behind = False
        if not at:
            try:
                behind = (await self._take(self._intake.drain)).more
            except sqlite3.Error:  # a full disk, say
                behind = True
        held, more, whole = await self._in_journal(self._held, jid, at)
        return {
            "events": held,
            "more": more,
            "at": held[-1][0] if held else at,
            "behind": behind,
            "whole": whole and not behind,
            "away": self._away(),
        }

    async def pending_part(self, seq: int = 0, start: int = 0) -> str:
        """Some of the body of an event that is too large for a page; nothing at its end."""
        return str(await self._in_journal(lambda: _text(self._journal.part_of(seq, start, _PART_BYTES))))

    def _held(self, jid: str | None, at: int) -> tuple[list[tuple[int, float, str, int, int]], bool, bool]:
        entries = self._journal.held(jid=jid, at=at, rows=_PAGE_EVENTS, max_bytes=_PAGE_BYTES)
        held = [(entry.seq, entry.captured_at, _text(entry.body), entry.state, entry.size) for entry in entries]
        more = len(entries) == _PAGE_EVENTS or sum(len(entry.body) for entry in entries) >= _PAGE_BYTES
        return held, more, jid is not None and self._handed_off and self._intake.holds_whole(jid)

    async def database_away(self, error: str = "") -> dict[str, Any]:
        """A reader waited for the database in vain."""
        self._said_away = time.monotonic(), error or "it did not answer"
        return {}

    def _away(self) -> str:
        """Why the database does not answer; nothing where it does, or nobody tried."""
        writer = self._writer
        if writer.away and writer.fault:
            return writer.fault.message
        if self._said_away is None:
            return ""
        at, error = self._said_away
        is_news = time.monotonic() - at < _AWAY_SECONDS and writer.committed_at < at
        return error if is_news else ""


def _text(body: bytes) -> str:
    return base64.b64encode(body).decode()
