"""What was handed over or captured and is not in MySQL yet, for those who read: a caller reads its own writes.

The engine is asked, over its socket. It takes in what is in the spool files first, and says beside whether the database
answers and whether it holds the job whole, so that nobody waits for a server that it knows to be away. Where no engine
runs, or none answers in time, the spool files and the journal's file are read, without a change to either.

Only what will become rows is told: what the hand-off put in, and what the master's job cache confirms. What is not
there, of another format, corrupt, locked or not ours to read holds nothing, and costs a line in the log at most.

Ask before MySQL: an event leaves the journal once its row's COMMIT was confirmed, so what was not there any more is
in MySQL by then.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from . import control, folders, jobload, journalfile, records, saltevent, settings, spool
from .errors import ControlError
from .jobcache import JobCache
from .records import Record, Return, Selection
from .saltevent import Opened

log = logging.getLogger(__name__)

MOST_EVENTS, MOST_BYTES = 20_000, 64 * 1024 * 1024
"""So many of the newest events are looked at when no job is named."""
_ANSWER_SECONDS = 1.0
_PAUSE_SECONDS = 30.0
"""How long an engine that did not answer in time is not asked."""
_LOCK_SECONDS = 0.5
_SAY_AGAIN_SECONDS = 60.0
_WORTH_SAYING_SECONDS = 0.2

_Row = tuple[int, float, bytes, int]
"""``seq``, when it was captured, the event's bytes, its state."""

_said: dict[str, float] = {}
_silent_until: dict[str, float] = {}
"""By socket: engines that hang."""


class PendingJob(NamedTuple):
    """What the journal has of a job: its load, as published (``{}`` when it has none), and returns by minion.

    ``whole``: MySQL has nothing of it yet.
    """

    load: dict[str, Any]
    returns: dict[str, Return]
    whole: bool = False

    def load_over(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The load that ``jids`` will hold, where ``stored`` (``{}``: no row) stands now."""
        if not stored and self.returns:
            stored = records.synthesised_load(next(iter(self.returns.values())))
        load = jobload.merged_load(stored or None, self.load) if self.load else stored
        return {} if jobload.is_minions_alone(load) and not stored else load


class Pending:
    """What waits at the master of ``opts``."""

    def __init__(self, opts: Mapping[str, Any]) -> None:
        self._opts = opts
        self._folder = folders.of_journal(str(opts["cachedir"]))
        self._path = self._folder / "journal.sqlite"
        self.away = ""
        """Why the database does not answer, as the engine said last; nothing where it does, or nobody knows."""

    def job(self, jid: str) -> PendingJob:
        """What is pending of one job."""
        rows, whole = self._asked(jid)
        found = self._jobs(rows).get(jid, PendingJob({}, {}))
        return found._replace(whole=whole and bool(found.load))

    def jobs(self) -> dict[str, PendingJob]:
        """What is pending of all jobs, by jid; as the newest 20,000 events have it, which a warning says."""
        rows, _ = self._asked(None)
        if len(rows) >= MOST_EVENTS or sum(len(row[2]) for row in rows) >= MOST_BYTES:
            warn(
                f"More than {MOST_EVENTS:,} events or {MOST_BYTES >> 20} MiB wait for MySQL in {self._folder}; the "
                "newest of them are shown"
            )
        return self._jobs(rows)

    def say_away(self, error: str, seconds: float) -> None:
        """The database did not answer for so many seconds: nobody else need wait for that."""
        if seconds >= _WORTH_SAYING_SECONDS and not self.away:
            with contextlib.suppress(ControlError, KeyError):
                control.ask(self._opts, "database_away", timeout=0.0, margin=_ANSWER_SECONDS, error=error)

    def _asked(self, jid: str | None) -> tuple[list[_Row], bool]:
        """The events, oldest first, of one job or of all, and whether they are all that there is of it anywhere."""
        self.away = ""
        try:
            return self._of_engine(jid)
        except ControlError as exc:
            log.debug("What waits for MySQL is read beside the engine: %s", exc)
        # In this order: what the engine takes in the moment between is in the journal, and was in the spool.
        handed_over = self._in_spool(jid)
        return self._in_journal(jid) + handed_over, False

    def _of_engine(self, jid: str | None) -> tuple[list[_Row], bool]:
        page = self._ask_engine("pending", jid=jid, at=0)
        # In this order: what the engine takes in the moment between is in the journal, and was in the spool.
        behind = page["behind"]
        handed_over = self._in_spool(jid) if behind else []
        if behind:
            page = self._ask_engine("pending", jid=jid, at=0)
        rows: list[_Row] = []
        room = MOST_BYTES
        while True:
            new = [
                (seq, at, self._large(seq, size) if size else base64.b64decode(body), state)
                for seq, at, body, state, size in page["events"]
            ]
            rows += new
            room -= sum(len(row[2]) for row in new)
            if not page["more"] or (jid is None and (room <= 0 or len(rows) >= MOST_EVENTS)):
                break
            page = self._ask_engine("pending", jid=jid, at=page["at"])
        self.away = page["away"]
        rows.sort(key=lambda row: row[0])
        return rows + handed_over, page["whole"] and not behind

    def _large(self, seq: int, size: int) -> bytes:
        """A body that has no room in a page; what is left of it when it has gone into MySQL meanwhile."""
        body = b""
        while len(body) < size and (part := self._ask_engine("pending_part", seq=seq, start=len(body))):
            body += base64.b64decode(part)
        return body

    def _ask_engine(self, verb: str, **arguments: Any) -> Any:
        socket = str(self._opts.get("sock_dir"))
        if time.monotonic() < _silent_until.get(socket, 0.0):
            raise ControlError("the engine did not answer a moment ago")
        began = time.monotonic()
        try:
            return control.ask(self._opts, verb, timeout=0.0, margin=_ANSWER_SECONDS, **arguments)
        except (ControlError, KeyError) as exc:
            if time.monotonic() - began >= _ANSWER_SECONDS / 2:
                _silent_until[socket] = time.monotonic() + _PAUSE_SECONDS
            raise ControlError(str(exc)) from exc

    def _in_spool(self, jid: str | None) -> list[_Row]:
        """What was handed over and is in no journal yet, and perhaps some that is."""
        found: list[spool.Record] = []
        room = MOST_BYTES
        with contextlib.suppress(OSError):
            folder = os.open(self._folder / spool.FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with os.scandir(folder) as entries:
                    names = [each.name for each in entries if spool.is_name(each.name)]
                for name in sorted(names, reverse=True):
                    some = _records_of(folder, name, jid)
                    found += some
                    room -= sum(len(record.body) for record in some)
                    if room <= 0 and jid is None:
                        break
            finally:
                os.close(folder)
        found.sort(key=lambda record: record.captured_at)
        if jid is None:
            found = found[-MOST_EVENTS:]
        return [
            (0, record.captured_at, record.body, journalfile.CONFIRMED) for record in found if jid in (None, record.jid)
        ]

    def _in_journal(self, jid: str | None) -> list[_Row]:
        which = "ORDER BY seq DESC LIMIT ?" if jid is None else "WHERE jid = ? ORDER BY seq"
        try:
            if not self._path.exists():
                return []
            where = f"{self._path.absolute().as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(where, uri=True, timeout=_LOCK_SECONDS)) as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version != journalfile.FORMAT:
                    log.debug("The journal %s is of another format (%s), and is not read", self._path, version)
                    return []
                value = MOST_EVENTS if jid is None else jid
                rows: list[_Row] = []
                room = MOST_BYTES
                for row in db.execute(
                    f"SELECT seq, captured_at, {journalfile.BODY}, state FROM events {which}", (value,)
                ):
                    rows.append(row)
                    room -= len(row[2])
                    if room <= 0 and jid is None:
                        break
        except (sqlite3.Error, OSError, ValueError, TypeError) as exc:  # the last two: a file that holds nonsense
            warn(f"What waits for MySQL in {self._path} cannot be read: {exc}")
            return []
        return sorted(rows, key=lambda row: row[0])

    def _jobs(self, rows: Iterable[_Row]) -> dict[str, PendingJob]:
        """By the rules of the writer: loads of one job add up, the first return stands unless a whole one comes."""
        jobs: dict[str, PendingJob] = {}
        for record in self._records(rows):
            load, ret = record.load, record.ret
            if load is not None:
                known = jobs.get(load.jid, PendingJob({}, {}))
                jobs[load.jid] = known._replace(load=jobload.merged_load(known.load or None, load.load))
            if ret is not None:
                returns = jobs.setdefault(ret.jid, PendingJob({}, {})).returns
                if ret.id not in returns or (returns[ret.id].trimmed and not ret.trimmed):
                    returns[ret.id] = ret
        return jobs

    def _records(self, rows: Iterable[_Row]) -> list[Record]:
        options, _ = settings.parse(settings.of_master(self._opts))
        peers = settings.peers(settings.usable_opts(self._opts)[0])
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
            event = saltevent.open_event(body) if isinstance(body, bytes) else None
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


def _records_of(folder: int, name: str, jid: str | None) -> list[spool.Record]:
    """The records of a spool file; of one that holds nothing of the job, none."""
    try:
        file = folders.open_file(folder, name)
    except OSError:
        return []
    try:
        header = spool.header_of(os.pread(file, spool.HEADER.size, 0))
        # Read, not mapped: its process may make it shorter, and a page that is gone would end this one.
        content = os.pread(file, os.fstat(file).st_size, spool.HEADER.size)
    except OSError:
        return []
    finally:
        os.close(file)
    if header is None or (jid is not None and jid.encode() not in content):
        return []
    return spool.parse(content, header.key)[0]


def warn(message: str) -> None:
    """Logs a warning, the same one once a minute: some processes ask again and again."""
    now = time.monotonic()
    if now >= _said.get(message, now):
        _said[message] = now + _SAY_AGAIN_SECONDS
        log.warning(message)
