"""The hand-off: with ``master_job_cache: mysql_jobcache`` the master's processes put jobs and returns into spool files.

Promise
    No call waits for the network, for a disk's sync or for another process, and none raises into Salt. What a call
    returned for survives the death of its process at any instant.

What comes this way is whole (Salt trims only what it puts on the bus) and cannot be forged over the bus: it is what the
master's request channel accepted. Each process writes to a file of its own in ``<cachedir>/mysql_jobcache/spool``; the
engine takes it into the journal (``intake.py``), and alone opens that.

A spool file
    ``<start>-<pid>-<random>-<number>.spool``: a header with its key and what its process dropped, then records, each
    the key, a length, the CRC-32 of the rest, and that. One write a record, at an offset that this process alone
    knows, so that a write that failed is written over. ``flock`` is held on it while its process lives. After some
    MiB, and after a fork, comes a new file.

When there is no room
    Returns count toward ``journal_max_bytes``, with the journal and all spool files; what is beyond is dropped and
    counted. A publish, which a command line waits for, has 64 MiB more. With less than 16 MiB left on the disk returns
    are held in memory, up to 16 MiB a process, and a thread tries on; publishes go on, on a full disk into the blocks
    of files that were made before (``*.last``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import math
import os
import re
import socket
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import folders, jobload, moments, saltevent, settings
from .control import socket_path

log = logging.getLogger(__name__)

FOLDER = "spool"
NAME = re.compile(r"(\d{20}-\d{1,10}-[0-9a-f]{8})-(\d{6,12})\.spool", re.ASCII)
"""A spool file's name: its process, and its number among the files of that."""
LAST = tuple(f"{number:02d}.last" for number in range(8))
REASONS = ("journal_full", "memory_full", "unpackable")
"""What a header counts as dropped."""
USED = "used"
"""A file in which the engine says what the journal takes of the cap, less what it took of the spool files there."""

HEADER = struct.Struct("<8s8sQQQ")
"""The format, the file's key, and counts of what its process dropped."""
MAGIC = b"jobcache"
KEY_BYTES = 8
"""With so many random bytes each record begins: nothing that a minion sends can look like one."""
_HEAD = struct.Struct("<8sII")
_FIELDS = struct.Struct("<dBH")
MOST_BYTES = 256 * 1024 * 1024
"""A longer record is not written, nor believed."""
BROKEN = -1

_MEMORY_BYTES = 16 * 1024 * 1024
_EVENT_BYTES = 200
"""What a record takes in memory beside its bytes."""
_RETRY_SECONDS = 0.5
_CHECK_ENGINE_SECONDS = 60.0
_KEEP_OUT_SECONDS = 7 * 86_400.0
_RESERVE_BYTES = 64 * 1024 * 1024
"""What publishes may take beyond the cap."""
_OVER_CAP_BYTES = 64 * 1024 * 1024
"""With ``journal_full: drop_oldest`` the engine makes room; until it does, there may be more by this."""
_LAST_BYTES = 128 * 1024
DISK_BYTES = 16 * 1024 * 1024
_DISK_IS_LOW = f"less than {DISK_BYTES // 2**20} MiB are left on the disk"
_LOOK_SECONDS, _LOOK_SHARE, _LOOK_BYTES = 1.0, 50, 256 * 1024
_TRIES = 5


def is_name(name: str) -> bool:
    """Whether records may be in a file of this name."""
    return name in LAST or NAME.fullmatch(name) is not None


class Record(NamedTuple):
    """What was handed over: when (seconds since the epoch), whose, and an event's bytes."""

    captured_at: float
    jid: str
    minion: str
    body: bytes


def pack(record: Record) -> bytes:
    """A record as it stands in a file, behind the file's key.

    Raises:
        ValueError: it is too large.
    """
    jid, minion = record.jid.encode(), record.minion.encode()
    if len(jid) > 255 or len(minion) > 65_535 or len(record.body) > MOST_BYTES - 2**17:
        raise ValueError("too large")
    content = b"".join((_FIELDS.pack(record.captured_at, len(jid), len(minion)), jid, minion, record.body))
    return _HEAD.pack(b"", len(content), zlib.crc32(content))[KEY_BYTES:] + content


def parse(data: bytes, key: bytes) -> tuple[list[Record], int, int]:
    """The whole records at the begin of ``data``, where they end, and how long what follows them is by its own word:
    0 for nothing, ``BROKEN`` for no record."""
    found: list[Record] = []
    at, size = 0, len(data)
    while size - at >= _HEAD.size:
        mark, length, checksum = _HEAD.unpack_from(data, at)
        begin = at + _HEAD.size
        if mark != key or not _FIELDS.size <= length <= MOST_BYTES:
            return found, at, BROKEN if data[at:].strip(b"\0") else 0
        if begin + length > size:
            return found, at, _HEAD.size + length
        content = data[begin : begin + length]
        record = _record(content) if zlib.crc32(content) == checksum else None
        if record is None:
            return found, at, BROKEN
        found.append(record)
        at = begin + length
    return found, at, _HEAD.size if data[at:].strip(b"\0") else 0


def _record(content: bytes) -> Record | None:
    captured_at, jid, minion = _FIELDS.unpack_from(content)
    begin = _FIELDS.size
    body = begin + jid + minion
    try:
        texts = content[begin : begin + jid].decode(), content[begin + jid : body].decode()
    except UnicodeDecodeError:
        return None
    return Record(captured_at, *texts, content[body:]) if math.isfinite(captured_at) and body <= len(content) else None


class Header(NamedTuple):
    """What a file says of itself: with what its records begin, and what its process dropped, by ``REASONS``."""

    key: bytes
    dropped: tuple[int, ...]


def header_of(data: bytes) -> Header | None:
    """The header at the begin of a file; ``None`` for one that is none of ours."""
    if len(data) < HEADER.size:
        return None
    magic, key, *counts = HEADER.unpack_from(data)
    return Header(key, tuple(counts)) if magic == MAGIC and key.strip(b"\0") and max(counts) < 2**48 else None


class Place:
    """The journal's folder and the spool's in it, open as ``folder`` and ``spool``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = self.spool = -1

    def enter(self) -> bool:
        """Opens them, again where they are others by now. Whether it did."""
        if self.spool >= 0 and folders.is_at(self.folder, self.path) and folders.is_at(self.spool, self.path / FOLDER):
            return False
        folder = folders.open_folder(self.path)
        try:
            spool = folders.open_inside(folder, FOLDER)
        except BaseException:
            os.close(folder)
            raise
        self.leave()
        self.folder, self.spool = folder, spool
        make_last(spool)
        return True

    def leave(self) -> None:
        """Closes them."""
        # Forgotten first: a child that is forked in between would close whatever has their numbers by then.
        descriptors, self.folder, self.spool = (self.folder, self.spool), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)


def is_used(opts: Mapping[str, Any]) -> bool:
    """Whether this master hands its returns over (``store_job``, salt/utils/job.py 3006-3008)."""
    return bool(
        opts.get("master_job_cache") == settings.PILLAR_KEY
        and opts.get("job_cache", True)
        and not opts.get("ext_job_cache")
    )


class HandOff:
    """One process's way to the engine. Every method may be called from any thread."""

    def __init__(self, opts: Mapping[str, Any]) -> None:
        options, _ = settings.parse(settings.of_master(opts))
        chosen = settings.combine(options, {})
        self._path = folders.of_journal(str(opts["cachedir"]))
        self._no_cache = f"{self._path}/nocache/"
        self._socket = str(socket_path(opts))
        self._master_id = str(opts["id"])
        self._cap = chosen.journal_max_bytes
        self._most = self._cap + (_OVER_CAP_BYTES if chosen.journal_full == "drop_oldest" else 0)
        self._file_bytes = min(max(self._cap // 64, 64 * 1024), 4 * 1024 * 1024)
        self._lock = threading.Lock()
        self._place = Place(self._path)
        self._file = -1
        self._process = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(4).hex()}"
        self._number = 0
        self._key = b""
        self._end = 0
        self._is_elsewhere = False
        """Whether the folder that the file is in is no more the journal's."""
        self._counts = [0] * len(REASONS)
        """What the file's header says."""
        self._uncounted = [0] * len(REASONS)
        """What no file says yet."""
        self._used = self._since = 0
        """What counted toward the cap at the last look, and what this process has added."""
        self._disk_is_low = False
        self._look_at = 0.0
        self._full = False
        self._last_ends: dict[bytes, int] = {}
        """Where this process wrote last into files for a full disk, by their key."""
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._thread: threading.Thread | None = None
        self._check_engine_at = 0.0
        _watch_forks()
        _all.add(self)

    def published(self, jid: str, load: Mapping[str, Any], minions: Iterable[str] | None) -> None:
        """A job's load (``save_load``). Of a job that nobody published the return says everything: nothing is added."""
        if not moments.is_jid(jid):
            return
        body = jobload.publish_event(jid, load, _texts(minions))
        if body is not None:
            self._append(jid, "", body, published=True)

    def minions(self, jid: str, minions: Iterable[str]) -> None:
        """More minions of a job (``save_minions``)."""
        body = saltevent.minions_event(jid, _texts(minions)) if moments.is_jid(jid) else None
        if body is not None:
            self._append(jid, "", body, published=True)

    def returned(self, load: Mapping[str, Any]) -> None:
        """A minion's return, or a runner's (``returner``)."""
        jid, minion = load.get("jid"), load.get("id")
        if not isinstance(jid, str) or not isinstance(minion, str) or "return" not in load:
            return
        if not moments.is_jid(jid) or self._is_not_kept(jid):
            return
        kind = saltevent.master_return_kind(load["return"], jid) if minion == self._master_id else None
        if kind is not None:
            body = saltevent.try_pack(f"salt/{kind}/{jid}/ret", load["return"])
        else:
            body = saltevent.try_pack(f"salt/job/{jid}/ret/{minion}", load)
        self._append(jid, minion, body)

    def events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Events for ``salt_events`` (``event_return``): ``tag`` and ``data`` each."""
        for event in events:
            tag, data = event.get("tag"), event.get("data")
            if isinstance(tag, str) and isinstance(data, dict):
                body = saltevent.try_pack(tag, data)
                key = os.urandom(saltevent.EVENT_KEY_BYTES)
                self._append("", "", None if body is None else saltevent.keyed_event(body, key))

    def keep_out(self, jid: str) -> None:
        """The job of this jid asks not to be stored (``nocache``)."""
        if not moments.is_jid(jid):
            return
        with (
            contextlib.suppress(OSError),
            _opened(folders.open_folder(self._path)) as folder,
            _opened(folders.open_inside(folder, "nocache")) as marks,
        ):
            os.close(folders.open_or_create(marks, jid))

    def _is_not_kept(self, jid: str) -> bool:
        return os.path.exists(self._no_cache + jid)  # noqa: PTH110 (once a return, and never raises)

    def close(self) -> None:
        """Closes what is open; what is held in memory is gone."""
        self._place.leave()
        file, self._file = self._file, -1
        if file >= 0:
            with contextlib.suppress(OSError):
                os.close(file)

    def _append(self, jid: str, minion: str, body: bytes | None, *, published: bool = False) -> None:
        record = None
        if body is not None:
            with contextlib.suppress(ValueError):
                record = pack(Record(time.time(), jid, minion, body))
        with self._lock:
            if record is None:
                log.error("An event of jid %s, minion %r, cannot be packed, and is dropped", jid, minion)
                self._drop("unpackable")
            elif self._held and not published:  # what came first goes first
                self._hold(record)
            else:
                self._write_or_hold(record, published=published)
            if time.monotonic() >= self._check_engine_at:
                self._check_engine_at = time.monotonic() + _CHECK_ENGINE_SECONDS
                self._say_whether_anyone_ships()

    def _write_or_hold(self, record: bytes, *, published: bool) -> None:
        try:
            self._write(record, published=published)
        except OSError as exc:
            if published and self._write_last(record):
                return
            if not self._held:
                log.error("The spool in %s cannot be written: %s; holding returns in memory", self._path, exc)
            self._hold(record)

    def _hold(self, record: bytes) -> None:
        if self._held_bytes < _MEMORY_BYTES:
            self._held.append(record)
            self._held_bytes += len(record) + _EVENT_BYTES
            self._begin_trying()
            return
        self._drop("memory_full")

    def _begin_trying(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._try_on, name="mysql_jobcache hand-off", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:  # no more threads for this user: the next return tries again
                log.debug("No thread can be started to write what is held in memory: %s", exc)
            else:
                self._thread = thread

    def _try_on(self) -> None:
        """Until all that is held is written, and all that was dropped is counted."""
        while True:
            time.sleep(_RETRY_SECONDS)
            with self._lock:
                try:
                    self._catch_up()
                except (OSError, MemoryError) as exc:
                    log.debug("The spool in %s still cannot be written: %s", self._path, exc)
                if not self._held and not any(self._uncounted):
                    log.warning("The spool in %s takes returns again", self._path)
                    self._thread = None
                    return

    def _catch_up(self) -> None:
        done = 0
        try:
            for record in self._held:
                self._write(record, published=False)
                done += 1
        finally:
            self._held_bytes -= sum(len(record) + _EVENT_BYTES for record in self._held[:done])
            del self._held[:done]
        if any(self._uncounted):
            self._be_open()
            self._count(self._uncounted)
            self._uncounted = [0] * len(REASONS)

    def _drop(self, reason: str) -> None:
        if reason == "memory_full" and not self._counts[1] + self._uncounted[1]:
            log.error("Memory for returns is full and the spool takes none; dropping and counting")
        more = [int(reason == each) for each in REASONS]
        try:
            self._be_open()
            self._count(more)
        except OSError:
            self._uncounted = [had + one for had, one in zip(self._uncounted, more, strict=True)]
            self._begin_trying()

    def _count(self, more: list[int]) -> None:
        counts = [had + one for had, one in zip(self._counts, more, strict=True)]
        os.pwrite(self._file, HEADER.pack(MAGIC, self._key, *counts), 0)
        self._counts = counts

    def _write(self, record: bytes, *, published: bool) -> None:
        if self._since >= _LOOK_BYTES or time.monotonic() >= self._look_at:
            self._look()
        size = len(record)
        over = self._used + self._since + size - self._most
        if over > 0 and self._is_over(over, published=published):
            self._drop("journal_full")
            return
        if self._disk_is_low and not published:
            raise OSError(errno.ENOSPC, _DISK_IS_LOW)
        self._be_open()
        self._put(record)

    def _put(self, record: bytes) -> None:
        written = os.pwrite(self._file, self._key + record, self._end)
        if written < KEY_BYTES + len(record):
            with contextlib.suppress(OSError):  # else the next record is written over it
                os.ftruncate(self._file, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += written
        self._since += written

    def _is_over(self, over: int, *, published: bool) -> bool:
        if not self._full:
            self._full = True
            log.error(
                "The journal in %s holds journal_max_bytes (%d): returns are dropped, counted. Mend the database, or "
                "start the engine, or raise it",
                self._path,
                self._cap,
            )
        return over > _RESERVE_BYTES or not published

    def _look(self) -> None:
        """At what counts toward the cap, and at the disk."""
        began = time.monotonic()
        self._enter()
        try:
            used = _said_used(self._place.folder) + _spooled_bytes(self._place.spool)
        except OSError as exc:  # out of descriptors: as it was
            log.debug("The spool in %s cannot be looked at: %s", self._path, exc)
            used = self._used + self._since
        self._disk_is_low = free_bytes(self._place.spool) < DISK_BYTES
        self._used, self._since = used, 0
        if self._full and used < self._most - self._cap // 8:
            self._full = False
        now = time.monotonic()
        self._look_at = now + max(_LOOK_SECONDS / 4 if self._full else _LOOK_SECONDS, _LOOK_SHARE * (now - began))

    def _enter(self) -> None:
        if self._place.enter():
            self._is_elsewhere = self._file >= 0

    def _be_open(self) -> None:
        """There is a file to write to, under its name in the folder."""
        if self._file >= 0:
            if not os.fstat(self._file).st_nlink or self._is_elsewhere:
                self._move()
                return
            if self._end < self._file_bytes:
                return
            with contextlib.suppress(OSError):  # out of descriptors: the old one takes more
                self._begin()
            return
        self._begin()

    def _begin(self) -> None:
        """A new file in the old one's place. What nobody has counted yet stands in its header."""
        self._enter()
        key = os.urandom(KEY_BYTES - 1) + b"\1"
        file = self._new_file(key, self._uncounted)
        old, self._file, self._key, self._end = self._file, file, key, HEADER.size
        self._counts, self._uncounted = self._uncounted, [0] * len(REASONS)
        if old >= 0:
            _leave(old)  # the last of all: see :meth:`Place.leave`

    def _new_file(self, key: bytes, counts: list[int]) -> int:
        header = HEADER.pack(MAGIC, key, *counts)
        for _ in range(_TRIES):
            self._number += 1
            file = folders.create(self._place.spool, self._name)
            try:
                if _is_begun(file, header):
                    return file
            except BaseException:  # a full disk, say
                self._discard(file)
                raise
            os.close(file)
        raise OSError(errno.EAGAIN, "a new spool file is taken away again and again", str(self._path))

    @property
    def _name(self) -> str:
        return f"{self._process}-{self._number:06d}.spool"

    def _discard(self, file: int) -> None:
        """Takes the newest file away, of which nothing counts."""
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.unlink(self._name, dir_fd=self._place.spool)
        os.close(file)

    def _move(self) -> None:
        """Somebody deleted the file, or moved its folder away. An engine that had it open reads it to its end; else all
        that it holds goes into a new one."""
        self._enter()
        if not folders.claim(self._file, alone=True):
            self._begin()
            self._is_elsewhere = False
            return
        file = self._new_file(self._key, [had + one for had, one in zip(self._counts, self._uncounted, strict=True)])
        try:
            _copy(self._file, file, self._end)
        except BaseException:
            self._discard(file)
            raise
        old, self._file, self._is_elsewhere = self._file, file, False
        _leave(old)
        self._counts = [had + one for had, one in zip(self._counts, self._uncounted, strict=True)]
        self._uncounted = [0] * len(REASONS)
        log.error("Somebody deleted the spool in %s while it was in use; it was made again", self._path)

    def _write_last(self, record: bytes) -> bool:
        """Into a file whose blocks are its own already; whether there was room."""
        for number in range(len(LAST)):
            name = LAST[(os.getpid() + number) % len(LAST)]
            with contextlib.suppress(OSError), _locked(folders.open_file(self._place.spool, name)) as file:
                its = os.stat(name, dir_fd=self._place.spool, follow_symlinks=False)
                if not os.path.samestat(os.fstat(file), its):
                    continue  # the engine has just renamed it
                header = header_of(os.pread(file, HEADER.size, 0))
                if header is None:
                    continue
                known = self._last_ends.get(header.key, HEADER.size)  # others may have written behind that
                content = os.pread(file, _LAST_BYTES, known)
                end = known + parse(content, header.key)[1]
                whole = header.key + record + bytes(_HEAD.size)
                if end + len(whole) <= known + len(content) and os.pwrite(file, whole, end) == len(whole):
                    self._last_ends[header.key] = end
                    return True
        return False

    def _say_whether_anyone_ships(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            try:
                sock.connect(self._socket)
            except BlockingIOError:
                return  # somebody is there, and busy
            except OSError:
                pass
            else:
                return
        with contextlib.suppress(OSError):
            self._enter()
            with _opened(folders.open_or_create(self._place.folder, "said")) as said:
                info = os.fstat(said)
                if info.st_size and abs(time.time() - info.st_mtime) < _CHECK_ENGINE_SECONDS:
                    return  # another process did
                os.write(said, b"\n")
        log.error(
            "No mysql_jobcache engine runs, so nothing is shipped to the database; jobs and returns wait in "
            "%s (%d MiB of %d). Is `mysql_jobcache` under `engines:` in the master config?",
            self._path, (self._used + self._since) // 2**20, self._cap // 2**20,
        )  # fmt: skip


def free_bytes(folder: int) -> int:
    """What is left on the disk of a folder."""
    disk = os.fstatvfs(folder)
    return disk.f_bavail * disk.f_frsize


def make_last(spool: int) -> None:
    """Makes the files for a disk that is full, where they are missing and it is not."""
    with contextlib.suppress(OSError):
        for name in LAST:
            try:
                os.stat(name, dir_fd=spool, follow_symlinks=False)
            except FileNotFoundError:
                if free_bytes(spool) < DISK_BYTES + _LAST_BYTES:
                    return
                with contextlib.suppress(FileExistsError), _opened(folders.create(spool, name)) as file:
                    # Of its own blocks: on a full disk they may be written all the same.
                    header = HEADER.pack(MAGIC, os.urandom(KEY_BYTES - 1) + b"\1", *[0] * len(REASONS))
                    os.pwrite(file, header + bytes(_LAST_BYTES - HEADER.size), 0)


def forget_old(opts: Mapping[str, Any], now: float) -> None:
    """Takes away the marks of jobs that ended long ago (:meth:`HandOff.keep_out`)."""
    path = folders.of_journal(str(opts["cachedir"]))
    with (
        contextlib.suppress(OSError),
        _opened(folders.open_folder(path)) as folder,
        _opened(folders.open_inside(folder, "nocache")) as marks,
        os.scandir(marks) as entries,
    ):
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_mtime < now - _KEEP_OUT_SECONDS:
                os.unlink(entry.name, dir_fd=marks)


def _said_used(folder: int) -> int:
    """What the engine said last that the journal takes; where it said nothing, the file's size."""
    try:
        with _opened(folders.open_file(folder, USED)) as file:
            return int(os.pread(file, 32, 0))
    except (OSError, ValueError):
        try:
            return os.stat("journal.sqlite", dir_fd=folder, follow_symlinks=False).st_size
        except OSError:
            return 0


def _spooled_bytes(spool: int) -> int:
    size = 0
    with os.scandir(spool) as entries:
        for entry in entries:
            if entry.name.endswith(".spool"):
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_size
    return size


def _is_begun(file: int, header: bytes) -> bool:
    """Locks a new file and writes its header; not where the engine was quicker, and took it for a dead process's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if os.pwrite(file, header, 0) < len(header):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return bool(os.fstat(file).st_nlink)


def _copy(source: int, into: int, end: int) -> None:
    at = HEADER.size
    while at < end:
        chunk = os.pread(source, min(2**20, end - at), at)
        if not chunk or os.pwrite(into, chunk, at) < len(chunk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        at += len(chunk)


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[int]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        _leave(descriptor)


def _leave(file: int) -> None:
    """Closes a file and frees its lock, which a child would keep that another thread forked off just now."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _texts(values: Iterable[Any] | None) -> list[str]:
    return [value for value in values or () if isinstance(value, str)]


_all: weakref.WeakSet[HandOff] = weakref.WeakSet()
_of_process: dict[int, HandOff] = {}


def _after_fork() -> None:
    # A child keeps none of its parent's files: it would write into them, and they would never look finished.
    for hand in list(_all):
        hand.close()
    _all.clear()
    _of_process.clear()


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_after_fork)


def current() -> HandOff | None:
    """This process's hand-off, if it has handed over anything yet."""
    return _of_process.get(os.getpid())


def of(opts: Mapping[str, Any]) -> HandOff:
    """This process's hand-off."""
    return current() or _of_process.setdefault(os.getpid(), HandOff(opts))
