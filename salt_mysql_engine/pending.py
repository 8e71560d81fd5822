"""What the journal holds of jobs and MySQL does not yet, for those who read: with it a caller reads its own writes.

The file is opened for reading alone, and only what will become rows is told: what the hand-off put in, and what the
master's job cache confirms. A journal that is not there, of another format, corrupt, locked or not ours to read holds
nothing, and costs a line in the log at most.

Read it before MySQL: an event leaves the journal once its row's COMMIT was confirmed, so what was not there any more is
in MySQL by then.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from . import journalfile, records, settings
from .jobcache import JobCache
from .records import Opened, Record, Return, Selection

log = logging.getLogger(__name__)

MOST_EVENTS = 20_000
"""So many of the newest events are looked at when no job is named."""
_LOCK_SECONDS = 0.5
_SAY_AGAIN_SECONDS = 60.0

_Row = tuple[int, float, bytes, int]
"""``seq``, when it was captured, the event's bytes, its state."""

_said: dict[str, float] = {}


class PendingJob(NamedTuple):
    """What the journal has of a job: its load, as published (``{}`` when it has none), and returns by minion."""

    load: dict[str, Any]
    returns: dict[str, Return]

    def load_over(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The load that ``jids`` will hold, where ``stored`` (``{}``: no row) stands now."""
        if not stored and self.returns:
            stored = records.synthesised_load(next(iter(self.returns.values())))
        load = records.merged_load(stored or None, self.load) if self.load else stored
        return {} if records.is_minions_alone(load) and not stored else load


class Pending:
    """The journal of the master of ``opts``."""

    def __init__(self, opts: Mapping[str, Any]) -> None:
        self._opts = opts
        self._path = journalfile.folder(str(opts["cachedir"])) / "journal.sqlite"

    def job(self, jid: str) -> PendingJob:
        """What is pending of one job."""
        return self._read("WHERE jid = ? ORDER BY seq", jid).get(jid, PendingJob({}, {}))

    def jobs(self) -> dict[str, PendingJob]:
        """What is pending of all jobs, by jid; as the newest 20,000 events have it, which a warning says."""
        return self._read("ORDER BY seq DESC LIMIT ?", MOST_EVENTS)

    def _read(self, which: str, value: str | int) -> dict[str, PendingJob]:
        try:
            if not self._path.exists():
                return {}
            where = f"{self._path.absolute().as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(where, uri=True, timeout=_LOCK_SECONDS)) as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version != journalfile.FORMAT:
                    log.debug("The journal %s is of another format (%s), and is not read", self._path, version)
                    return {}
                rows = db.execute(f"SELECT seq, captured_at, body, state FROM events {which}", (value,)).fetchall()
                if not rows:
                    return {}
        except (sqlite3.Error, OSError, ValueError, TypeError) as exc:  # the last two: a file that holds nonsense
            warn(f"What waits for MySQL in {self._path} cannot be read: {exc}")
            return {}
        if len(rows) == value:
            warn(f"More than {MOST_EVENTS:,} events wait for MySQL in {self._path}; the newest of them are shown")
        return self._jobs(sorted(rows))

    def _jobs(self, rows: Iterable[_Row]) -> dict[str, PendingJob]:
        """By the rules of the writer: loads of one job add up, the first return stands unless a whole one comes."""
        jobs: dict[str, PendingJob] = {}
        for record in self._records(rows):
            load, ret = record.load, record.ret
            if load is not None:
                known = jobs.get(load.jid, PendingJob({}, {}))
                jobs[load.jid] = known._replace(load=records.merged_load(known.load or None, load.load))
            if ret is not None:
                returns = jobs.setdefault(ret.jid, PendingJob({}, {})).returns
                if ret.id not in returns or (returns[ret.id].trimmed and not ret.trimmed):
                    returns[ret.id] = ret
        return jobs

    def _records(self, rows: Iterable[_Row]) -> list[Record]:
        options, _ = settings.parse(settings.of_master(self._opts))
        peers = self._opts.get("cluster_peers") or [] if self._opts.get("cluster_id") else None
        selection = Selection(settings.combine(options, {}), master_id=str(self._opts["id"]), peers=peers)
        found = []
        for captured_at, event in self._trustworthy(rows, selection):
            try:
                record = records.interpret(event, captured_at, selection)
            except Exception:  # whatever is in it, the next event must be looked at
                log.exception("A pending event cannot be made a row")
                continue
            if isinstance(record, Record):
                found.append(record)
        return found

    def _trustworthy(self, rows: Iterable[_Row], selection: Selection) -> list[tuple[float, Opened]]:
        """The events that will become rows, with what the job cache says of those that nobody confirmed yet."""
        all_trusted = not JobCache.is_kept(self._opts)
        events: list[tuple[float, Opened | None]] = []
        unsure: dict[int, Opened] = {}
        for _, captured_at, body, state in rows:
            event = records.open_event(body) if isinstance(body, bytes) else None
            if not isinstance(event, Opened):
                continue
            if state != journalfile.STUB and records.refusal(event.job, event.data, selection) is not None:
                continue
            if state != journalfile.CONFIRMED and not (all_trusted and state != journalfile.STUB):
                unsure[len(events)] = event
            events.append((captured_at, event))
        if unsure:
            answers = JobCache(self._opts).confirm(unsure.values(), patience=0.0)
            for number, answer in zip(unsure, answers, strict=True):
                events[number] = events[number][0], answer if isinstance(answer, Opened) else None
        return [(captured_at, event) for captured_at, event in events if event is not None]


def warn(message: str) -> None:
    """Logs a warning, the same one once a minute: some processes ask again and again."""
    now = time.monotonic()
    if now >= _said.get(message, now):
        _said[message] = now + _SAY_AGAIN_SECONDS
        log.warning(message)
