"""The intake: takes what the master's processes handed over out of their spool files (``spool.py``) into the journal.

How far it came in a file is put down in the journal in the same transaction as the events, so that whoever is killed,
each record is taken once. A file that was taken whole and whose process is gone, or goes on in another, is removed. All
calls block, and are made in the journal's thread; each takes some MiB at most, of every process its share. Of one
process records are taken in order, of several by the time when they were handed over.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import heapq
import logging
import os
import resource
import time
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from . import folders, moments, spool
from .journal import Journal
from .journalfile import CONFIRMED, NewEvent

log = logging.getLogger(__name__)

_STEP_BYTES, _STEP_FILES = 4 * 1024 * 1024, 64
_DRAIN_SECONDS = 0.4
"""Less than those who ask wait (``pending.py``)."""
_SAY_SECONDS, _LAST_SECONDS = 0.5, 1.0
_TIDY_SECONDS = 10.0
_MARK = "spool "
_MOST_JOBS = 10_000
_FOREIGN_SECONDS = 2.0
_NO_FILE = (errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM)
"""How the system says that a name is no file of ours."""
_TORN = "dropped.spool_torn"


class Taken(NamedTuple):
    """What a step took: events, their bytes, and whether there is more."""

    events: int
    size: int
    more: bool


class _File:
    """A spool file that is open."""

    def __init__(self, name: str, file: int, taken: dict[str, float]) -> None:
        found = spool.NAME.fullmatch(name)
        assert found is not None
        self.name = name
        self.file = file
        self.process, self.number = found[1], int(found[2])
        self.offset = int(taken.get(_MARK + name, spool.HEADER.size))
        """What is before it was taken."""
        self.key = b""
        self.counted = tuple(int(taken.get(mark, 0)) for mark in self._count_marks)
        self.read_at = 0.0
        self.is_ended = False
        """Whether its process writes nothing more into it."""
        self.is_suspect = False
        """Whether what comes next was no record when it was looked at last."""

    @property
    def _count_marks(self) -> list[str]:
        return [f"{_MARK}{self.name} {reason}" for reason in spool.REASONS]

    def marks(self, offset: int, counted: tuple[int, ...]) -> dict[str, float]:
        """What the journal keeps of how far we came."""
        return {_MARK + self.name: offset, **dict(zip(self._count_marks, counted, strict=True))}

    @property
    def size(self) -> int:
        return os.fstat(self.file).st_size


class _Step:
    """What is read in a step, before it is in the journal."""

    def __init__(self) -> None:
        self.found: list[list[spool.Record]] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.reached: dict[str, tuple[int, tuple[int, ...]]] = {}
        """Of files of which there is something new: what is before it, and what was dropped."""
        self.finished: list[_File] = []
        self.more = False


class Intake:
    """The way from the spool files in ``folder``, the journal's, into the journal."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        self.error = ""
        """Why the folder, or a file in it, could not be read the last time."""
        self._logged = ""
        self._journal = journal
        self._place = spool.Place(folder)
        self._files: dict[str, _File] = {}
        self._foreign: dict[str, float] = {}
        """Names that are no file of ours, and since when: one that root makes is given away a moment later."""
        self._said_foreign: set[str] = set()
        """Those of them that the log has named; they are looked at seldom."""
        self._unopened: list[str] = []
        """What is left of the last listing, newest first: thousands of files are not listed again for each few."""
        self._marks: dict[str, float] | None = None
        self._salvaged = ""
        self._since = moments.jid_at(time.time())
        self._jobs: dict[str, int] = {}
        """How many events of each of the newest jobs were taken."""
        self._said = -1
        self._say_at = self._tidy_at = self._last_at = 0.0
        self._last_waits = False
        """Whether something stands in the files for a full disk, which is still full."""

    @property
    def waiting_bytes(self) -> int:
        """What the files hold that was not taken yet."""
        return sum(max(0, file.size - file.offset) for file in self._files.values())

    def holds_whole(self, jid: str) -> bool:
        """Whether the journal holds every event that ever came of a job: one that began since we did."""
        return self._jobs.get(jid) == self._journal.rows_of(jid)

    def drain(self) -> Taken:
        """Takes all that is there now, or as much as a moment and the disk allow."""
        self._last_at = 0.0
        until = time.monotonic() + _DRAIN_SECONDS
        events = size = 0
        while True:
            taken = self.step()
            events, size = events + taken.events, size + taken.size
            if not taken.more or time.monotonic() > until:
                return Taken(events, size, taken.more or self._last_waits)

    def step(self) -> Taken:
        """Takes what is there, some MiB at most.

        Raises:
            sqlite3.Error: the journal cannot be written now; nothing was taken, and the same call may be made again.
        """
        self.error = ""
        try:
            more = self._find()
        except OSError as exc:
            self._note(f"The spool in {self._place.path} cannot be read: {exc}")
            return Taken(0, 0, more=False)
        step = self._read_all()
        step.more |= more
        events = [NewEvent(*record, CONFIRMED) for record in heapq.merge(*step.found, key=attrgetter("captured_at"))]
        if step.reached:
            self._take(events, step)
        for file in step.finished:
            self._finish(file)
        self._say_used()
        return Taken(len(events), sum(len(event.body) for event in events), step.more)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            os.close(file.file)
        self._files.clear()
        self._place.leave()

    # What is there

    def _find(self) -> bool:
        """Opens what is new, some at a time; whether there is more."""
        if self._place.enter():
            self._marks = None  # a journal that is in this place may have taken of its files
            self._said = -1
            self._foreign.clear()
            self._said_foreign.clear()
            self._unopened.clear()
        if self._marks is None:
            self._journal.be_there()
            self._marks = self._journal.marks(_MARK)
        if not self._unopened:
            self._list()
        room = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2) - len(self._files)
        for _ in range(min(room, _STEP_FILES, len(self._unopened))):
            self._open(self._unopened.pop(), self._marks)
        if self._salvaged != self._journal.salvaged:  # a damaged journal may have lost how far we came
            self._salvaged = self._journal.salvaged
            again = _Step()
            again.reached = {file.name: (file.offset, file.counted) for file in self._files.values()}
            self._take([], again)
        return bool(self._unopened) and room > 0

    def _list(self) -> None:
        now = time.monotonic()
        with os.scandir(self._place.spool) as entries:
            names = [each.name for each in entries if each.name not in self._files]
        if now >= self._tidy_at:
            self._tidy_at = now + _TIDY_SECONDS
            self._tidy({*names, *self._files})
            self._foreign = {name: self._foreign[name] for name in names if name in self._foreign}
            self._said_foreign &= {*names}
            known: set[str] = set()  # they may have become ours
        else:
            known = self._said_foreign
        new = (name for name in names if spool.NAME.fullmatch(name) and name not in known)
        self._unopened = sorted(new, reverse=True)
        if now >= self._last_at:
            self._last_at = now + _LAST_SECONDS
            self._take_last([name for name in names if name in spool.LAST])

    def _open(self, name: str, marks: dict[str, float]) -> None:
        try:
            file = folders.open_file(self._place.spool, name)
        except FileNotFoundError:
            return
        except OSError as exc:
            if exc.errno in _NO_FILE:
                self._ignore(name, str(exc))
            else:  # no more descriptors, say
                self._note(f"The spool file {name} cannot be opened: {exc}")
            return
        if os.fstat(file).st_uid not in (os.geteuid(), os.fstat(self._place.spool).st_uid):
            os.close(file)
            self._ignore(name, "it belongs to somebody else")
            return
        if not folders.claim(file, alone=False):  # which says to its process that we read it to its end
            os.close(file)  # it is copied just now into a new one
            return
        self._files[name] = _File(name, file, marks)

    def _ignore(self, name: str, why: str) -> None:
        now = time.monotonic()
        if now - self._foreign.setdefault(name, now) < _FOREIGN_SECONDS or name in self._said_foreign:
            return
        self._said_foreign.add(name)
        log.error("The spool file %s is not taken: %s", self._place.path / spool.FOLDER / name, why)

    def _take_last(self, names: Sequence[str]) -> None:
        """What was written on a full disk becomes a file like the others, once there is room to make it again."""
        is_full = spool.free_bytes(self._place.spool) < spool.DISK_BYTES
        self._last_waits = False
        for number, name in enumerate(sorted(names)):
            with contextlib.suppress(OSError):
                file = folders.open_file(self._place.spool, name)
                try:
                    if not os.pread(file, 4, spool.HEADER.size).strip(b"\0"):
                        continue
                    if is_full:
                        self._last_waits = True
                        return
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    new = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(4).hex()}-{number:06d}.spool"
                    os.rename(name, new, src_dir_fd=self._place.spool, dst_dir_fd=self._place.spool)
                finally:
                    os.close(file)
        spool.make_last(self._place.spool)

    # Reading

    def _read_all(self) -> _Step:
        step = _Step()
        first: dict[str, _File] = {}
        busy: list[_File] = []
        for file in sorted(self._files.values(), key=lambda each: (each.process, each.number)):
            older = first.setdefault(file.process, file)
            if older is not file:
                step.more |= older.is_ended
                continue
            if not file.is_ended:
                file.is_ended = _is_ended(file)
            with self._noting(file):
                header = spool.header_of(os.pread(file.file, spool.HEADER.size, 0))
                if header is not None:
                    file.key = header.key
                    self._count(file, header.dropped, step)
            if file.offset < file.size:
                busy.append(file)
            elif file.is_ended and file.name not in step.reached:
                step.finished.append(file)
        step.more |= len(busy) > _STEP_FILES
        busy = sorted(busy, key=lambda each: each.read_at)[:_STEP_FILES]
        for file in busy:
            file.read_at = time.monotonic()
            with self._noting(file):
                self._read(file, _STEP_BYTES // len(busy), step)
        return step

    @contextlib.contextmanager
    def _noting(self, file: _File) -> Iterator[None]:
        """A file that the disk does not give holds up no other."""
        try:
            yield
        except OSError as exc:
            self._note(f"The spool file {file.name} cannot be read: {exc}")

    def _note(self, error: str) -> None:
        if error != self._logged:
            log.error(error)
        self.error = self._logged = error

    def _count(self, file: _File, dropped: tuple[int, ...], step: _Step) -> None:
        """What the file's process says that it dropped."""
        for reason, now, before in zip(spool.REASONS, dropped, file.counted, strict=True):
            if now > before:
                step.counts["captured"] += now - before
                step.counts[f"dropped.{reason}"] += now - before
                step.reached[file.name] = file.offset, dropped

    def _read(self, file: _File, share: int, step: _Step) -> None:
        data = os.pread(file.file, share, file.offset)
        found, end, need = spool.parse(data, file.key)
        if not found and need > len(data) and file.offset + need <= file.size:
            data = os.pread(file.file, need, file.offset)  # one that is larger than the share
            found, end, need = spool.parse(data, file.key)
        size = file.size
        if need == spool.BROKEN or (need == 0 and end < len(data)) or file.offset + end + need > size:
            end += self._behind(file, end, step)
        else:
            file.is_suspect = False
        if end:
            step.found.append(found)
            _, counted = step.reached.get(file.name, (0, file.counted))
            step.reached[file.name] = file.offset + end, counted
            step.more |= file.offset + end < size

    def _behind(self, file: _File, end: int, step: _Step) -> int:
        """Bytes to pass over behind a file's good records. While its process lives they may become one yet."""
        at = file.offset + end
        if not file.is_ended and not file.is_suspect:
            file.is_suspect = end == 0
            return 0
        rest = os.pread(file.file, file.size - at, at)
        if not rest.strip(b"\0"):
            return len(rest) if file.is_ended else 0
        if spool.parse(rest, file.key)[0]:
            return 0  # it is whole by now
        following = rest.find(file.key, 1) if file.key else -1
        if following < 0 and not file.is_ended:
            return 0
        step.counts["captured"] += 1
        step.counts[_TORN] += 1
        log.error("The spool file %s is damaged at byte %d; what stood there is lost, counted", file.name, at)
        file.is_suspect = False
        return len(rest) if following < 0 else following

    # Afterwards

    def _take(self, events: Sequence[NewEvent], step: _Step) -> None:
        assert self._marks is not None
        marks: dict[str, float] = {}
        for name, reached in step.reached.items():
            marks |= self._files[name].marks(*reached)
        self._journal.take(events, counts=step.counts, marks=marks)
        for event in events:
            if event.jid in self._jobs:
                self._jobs[event.jid] += 1
            elif event.jid > self._since:
                self._jobs[event.jid] = 1
        while len(self._jobs) > _MOST_JOBS:
            oldest = next(iter(self._jobs))
            self._since = max(self._since, oldest)
            del self._jobs[oldest]
        self._marks |= marks
        for name, reached in step.reached.items():
            self._files[name].offset, self._files[name].counted = reached

    def _finish(self, file: _File) -> None:
        """Removes a file of which nothing is left. Its marks stay until the disk has forgotten it (:meth:`_tidy`)."""
        with contextlib.suppress(OSError):  # somebody deleted it, or it is tried again
            os.unlink(file.name, dir_fd=self._place.spool)
        os.close(file.file)
        del self._files[file.name]

    def _tidy(self, there: set[str]) -> None:
        assert self._marks is not None
        stale = [mark for mark in self._marks if mark.split(" ")[1] not in there]
        if stale:
            # Else a file might be there again after a power cut, and its mark not.
            os.fsync(self._place.spool)
            self._journal.forget_marks(stale)
            for mark in stale:
                del self._marks[mark]

    def _say_used(self) -> None:
        """Tells the processes what of the cap is taken beside their files."""
        now = time.monotonic()
        if now < self._say_at:
            return
        self._say_at = now + _SAY_SECONDS
        used = self._journal.measured() + self._journal.log_bytes
        used -= sum(file.offset for file in self._files.values())
        if used == self._said:
            return
        with contextlib.suppress(OSError):
            file = folders.open_or_create(self._place.folder, spool.USED)
            try:
                os.pwrite(file, f"{used:<24}\n".encode(), 0)
            finally:
                os.close(file)
            self._said = used


def _is_ended(file: _File) -> bool:
    try:
        fcntl.flock(file.file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
