"""The hand-off: with ``master_job_cache: mysql_jobcache`` the master's processes put jobs and returns into the journal.

Promise
    No call waits for the network or for a disk's sync, none raises into Salt, and none waits longer than
    a quarter of a second for another process; after such a wait the next calls do not wait at all.

What comes this way is whole (Salt trims only what it puts on the bus) and cannot be forged over the bus: it
is what the master's request channel accepted. Each process appends it to the engine's journal for itself, and the
engine ships it. While the file cannot be written (a full disk, a hanging process that holds it) events are held in
memory, up to 16 MiB a process, and a thread tries on; what has no room is dropped, and counted as soon as the file
can be written. Without an engine the journal grows to its cap, and the log says so once a minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import journalfile, records, settings
from .control import socket_path
from .errors import JournalError
from .journalfile import NewEvent

log = logging.getLogger(__name__)

_FAILURES = (sqlite3.Error, OSError, JournalError, UnicodeDecodeError)
"""What keeps the file from being written; the last one is how Python tells of some damages."""
_WAIT_SECONDS = 0.25
_MEMORY_BYTES = 16 * 1024 * 1024
_EVENT_BYTES = 400
"""What an event takes in memory beside its body."""
_RETRY_SECONDS = 0.5
_GROUP_EVENTS = 500
_CHECK_ENGINE_SECONDS = 60.0
_KEEP_OUT_SECONDS = 7 * 86_400.0
_WAL_BYTES = 16 * journalfile.WAL_BYTES
"""The engine empties the log long before; so large it becomes only without one."""
_LOG_TRIES, _LOG_AGAIN_SECONDS = 100, 0.02
_OVER_CAP_BYTES = 64 * 1024 * 1024
"""With ``journal_full: drop_oldest`` the engine makes room; until it does, the file may be larger by this."""


def is_used(opts: Mapping[str, Any]) -> bool:
    """Whether this master hands its returns over (``store_job``, salt/utils/job.py 3006-3008)."""
    return bool(
        opts.get("master_job_cache") == settings.PILLAR_KEY
        and opts.get("job_cache", True)
        and not opts.get("ext_job_cache")
    )


class HandOff:
    """One process's way into the journal. Every method may be called from any thread."""

    def __init__(self, opts: Mapping[str, Any]) -> None:
        options, _ = settings.parse(settings.of_master(opts))
        chosen = settings.combine(options, {})
        self._path = journalfile.folder(opts["cachedir"]) / "journal.sqlite"
        self._no_cache = self._path.parent / "nocache"
        self._socket = str(socket_path(opts))
        self._master_id = str(opts["id"])
        self._max_bytes = chosen.journal_max_bytes
        self._over_cap = _OVER_CAP_BYTES if chosen.journal_full == "drop_oldest" else 0
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._memory: list[NewEvent] = []
        self._memory_bytes = 0
        self._dropped = 0
        self._full = False
        self._thread: threading.Thread | None = None
        self._check_engine_at = 0.0

    def published(self, jid: str, load: Mapping[str, Any], minions: Iterable[str] | None) -> None:
        """A job's load (``save_load``). Of a job that nobody published the return says everything: nothing is added."""
        if not records.is_jid(jid):
            return
        body = records.publish_event(jid, load, _texts(minions))
        if body is not None:
            self._append(jid, "", body)

    def minions(self, jid: str, minions: Iterable[str]) -> None:
        """More minions of a job (``save_minions``)."""
        body = records.minions_event(jid, _texts(minions)) if records.is_jid(jid) else None
        if body is not None:
            self._append(jid, "", body)

    def returned(self, load: Mapping[str, Any]) -> None:
        """A minion's return, or a runner's (``returner``)."""
        jid, minion = load.get("jid"), load.get("id")
        if not isinstance(jid, str) or not isinstance(minion, str) or "return" not in load:
            return
        if not records.is_jid(jid) or self._is_not_kept(jid):
            return
        kind = records.master_return_kind(load["return"], jid) if minion == self._master_id else None
        if kind is not None:
            body = records.try_pack(f"salt/{kind}/{jid}/ret", load["return"])
        else:
            body = records.try_pack(f"salt/job/{jid}/ret/{minion}", load)
        if body is None:
            log.error("The return of %r for jid %s cannot be packed, and is dropped", minion, jid)
            return
        self._append(jid, minion, body)

    def events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Events for ``salt_events`` (``event_return``): ``tag`` and ``data`` each."""
        for event in events:
            tag, data = event.get("tag"), event.get("data")
            if isinstance(tag, str) and isinstance(data, dict):
                body = records.try_pack(tag, data)
                if body is not None:
                    self._append("", "", records.chosen_event(body))

    def keep_out(self, jid: str) -> None:
        """The job of this jid asks not to be stored (``nocache``)."""
        with contextlib.suppress(OSError):
            journalfile.make_folder(self._path.parent)
            journalfile.make_folder(self._no_cache)
            (self._no_cache / jid).touch(mode=0o600)
            journalfile.give_away(self._no_cache / jid)

    def _is_not_kept(self, jid: str) -> bool:
        return os.path.exists(f"{self._no_cache}/{jid}")  # noqa: PTH110 (once a return, and never raises)

    def _append(self, jid: str, minion: str, body: bytes) -> None:
        event = NewEvent(time.time(), jid, minion, body, journalfile.CONFIRMED)
        with self._lock:
            if self._thread is not None:  # what came first goes first, and nobody waits twice
                self._hold(event)
                return
            try:
                self._store([event], 0)
            except _FAILURES as exc:
                log.error("The journal %s cannot be written: %s; holding returns in memory", self._path, exc)
                self._hold(event)
                self._thread = threading.Thread(target=self._try_on, name="mysql_jobcache hand-off", daemon=True)
                self._thread.start()
            if time.monotonic() >= self._check_engine_at:
                self._check_engine_at = time.monotonic() + _CHECK_ENGINE_SECONDS
                self._say_whether_anyone_ships()

    def _hold(self, event: NewEvent) -> None:
        if self._memory_bytes < _MEMORY_BYTES:
            self._memory.append(event)
            self._memory_bytes += len(event.body) + _EVENT_BYTES
            return
        if not self._dropped:
            log.error("Memory for returns is full and the journal takes none; dropping and counting")
        self._dropped += 1

    def _try_on(self) -> None:
        """Until the memory is empty again. The lock is free while this thread waits for the file."""
        while True:
            time.sleep(_RETRY_SECONDS)
            try:
                while self._memory or self._dropped:
                    group, dropped = self._memory[:_GROUP_EVENTS], self._dropped
                    self._store(group, dropped)
                    with self._lock:
                        del self._memory[: len(group)]
                        self._memory_bytes -= sum(len(event.body) + _EVENT_BYTES for event in group)
                        self._dropped -= dropped
            except _FAILURES as exc:
                log.debug("The journal %s still cannot be written: %s", self._path, exc)
                continue
            with self._lock:
                if not self._memory and not self._dropped:
                    log.warning("The journal %s takes returns again", self._path)
                    self._thread = None
                    return

    def _store(self, events: list[NewEvent], dropped: int) -> None:
        db = self._connection()
        journalfile.leave_room_to_settle(db, self._path)
        lost = self._over(db, events)
        try:
            db.execute("BEGIN IMMEDIATE")
            if not lost:
                journalfile.insert(db, events)
            journalfile.count(
                db,
                {
                    "captured": len(events) + dropped,
                    "dropped.memory_full": dropped,
                    "dropped.journal_full": len(events) if lost else 0,
                },
            )
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            self._db = None  # it may be the connection that is broken
            raise
        if self._is_replaced():  # the engine sets a corrupt file aside, perhaps without this
            self._db = None
            self._store(events, 0)
        elif journalfile.wal_bytes(self._path) > _WAL_BYTES:
            self._empty_log()

    def _over(self, db: sqlite3.Connection, events: list[NewEvent]) -> bool:
        used = journalfile.used_bytes(db) + journalfile.size_of(events)
        full, self._full = self._full, used > self._max_bytes + self._over_cap
        if self._full and not full:
            log.error(
                "The journal %s holds journal_max_bytes (%d): returns are dropped, counted. Mend the database, or "
                "start the engine, or raise it",
                self._path,
                self._max_bytes,
            )
        return self._full

    def _connection(self) -> sqlite3.Connection:
        if self._db is None or self._is_replaced():
            journalfile.make_folder(self._path.parent)
            if journalfile.is_being_replaced(self._path):
                raise JournalError("a corrupt file is being replaced")
            inode = journalfile.inode(self._path)  # from before, so that one that is replaced meanwhile is noticed
            self._db = journalfile.connect(self._path, timeout=_WAIT_SECONDS, upgrade=False)
            self._db.execute("PRAGMA synchronous = OFF")  # see journalfile.py
            self._inode = inode or journalfile.inode(self._path)
        return self._db

    def _is_replaced(self) -> bool:
        # In this order: the new file is there before the old one goes.
        return journalfile.is_being_replaced(self._path) or journalfile.inode(self._path) != self._inode

    def _empty_log(self) -> None:
        """Without an engine someone must; in a thread, since it waits for the disk."""

        def work() -> None:
            try:
                with contextlib.closing(journalfile.connect(self._path, timeout=_WAIT_SECONDS, upgrade=False)) as db:
                    for _ in range(_LOG_TRIES):
                        if journalfile.checkpoint(db, timeout=_WAIT_SECONDS):
                            return
                        time.sleep(_LOG_AGAIN_SECONDS)
            except _FAILURES as exc:
                log.debug("The journal's log cannot be brought back now: %s", exc)

        if not any(thread.name == "mysql_jobcache log" for thread in threading.enumerate()):
            threading.Thread(target=work, name="mysql_jobcache log", daemon=True).start()

    def _say_whether_anyone_ships(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_WAIT_SECONDS)
            try:
                sock.connect(self._socket)
            except OSError:
                pass
            else:
                return
        said = self._path.with_name("said")
        try:
            if time.time() - said.stat().st_mtime < _CHECK_ENGINE_SECONDS:
                return  # another process did
        except OSError:
            pass
        with contextlib.suppress(OSError):
            said.touch(mode=0o600)
            journalfile.give_away(said)
        log.error(
            "No mysql_jobcache engine runs, so nothing is shipped to the database; jobs and returns wait in the "
            "journal %s (%d MiB of %d). Is `mysql_jobcache` under `engines:` in the master config?",
            self._path, journalfile.wal_bytes(self._path) // 2**20 + _size(self._path) // 2**20,
            self._max_bytes // 2**20,
        )  # fmt: skip


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _texts(values: Iterable[Any] | None) -> list[str]:
    return [value for value in values or () if isinstance(value, str)]


def forget_old(opts: Mapping[str, Any]) -> None:
    """Takes away the marks of jobs that ended long ago (``keep_out``)."""
    with contextlib.suppress(OSError), os.scandir(journalfile.folder(opts["cachedir"]) / "nocache") as entries:
        for entry in entries:
            if entry.stat().st_mtime < time.time() - _KEEP_OUT_SECONDS:
                os.unlink(entry.path)  # noqa: PTH108 (an entry)


_of_process: dict[int, HandOff] = {}
"""By process id: a child must use neither its parent's connection nor close it, so that is kept and left alone."""


def of(opts: Mapping[str, Any]) -> HandOff:
    """This process's hand-off."""
    found = _of_process.get(os.getpid())
    if found is None:
        found = _of_process[os.getpid()] = HandOff(opts)
    return found
