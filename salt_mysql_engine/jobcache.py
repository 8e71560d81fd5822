"""The master's local job cache, read directly: what the master itself accepted, and as it accepted it.

``<cachedir>/jobs/<hash[:2]>/<hash[2:]>/`` with the hash of the jid (``jid_dir``, salt/utils/jid.py) holds ``jid``
(text), ``.load.p`` (the publish, or the first return of a job that nobody published), ``.minions.p`` and
``.minions.<syndic>.p``, ``nocache`` (an empty mark), and a folder for each minion with ``return.p`` (``return``,
``retcode``, ``success``) and ``out.p`` (salt/returners/local_cache.py 3006-3008). The files are msgpack, written
beside and renamed, one after the other; 3006.28 and 3008 sync each before, for as long as the disk takes. Only what
passed the master's own ``_return`` is there, and the first return of a minion stands. A runner that did not end yet
is known by ``<cachedir>/proc/<jid>`` (salt/client/mixins.py 3006-3008).

What is confirmed is made of these files alone. Of the event come its ``_stamp`` and ``ts``, two times that they do not
hold, each only in the form that Salt gives it. No word of a stranger gets into another one's row.

A file that is half written, of someone else or not there is ``None``. An error that says nothing about the file (out of
descriptors, a failing disk, no permission) is no answer: it is told apart as :class:`Unreadable`. Salt's own reader is
not used, because it raises where ``.minions.p`` is missing and waits a second for a file that it cannot read.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import heapq
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import jobload, moments, saltevent
from .saltevent import Ignored, Kind, Opened, Tag

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 1024 * 1024
"""A larger value would not fit into any row; it is treated as not there."""

_CALL_BYTES = 4 * 1024 * 1024
_SYNDICS_BYTES = 8 * 1024 * 1024
"""Of the names of a job's minions that its syndics found: some 300,000."""
_BETWEEN_SECONDS = 1.0
"""For so long the master may take from one file of a folder to the beginning of the next."""
_FUTURE_SECONDS = 5.0
_ATOMIC_WRITE = ".___atomic_write"
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""The errors that say that there is no such file. EISDIR, ENXIO and EAGAIN come for what is no file at all."""
_NO_FILE = _NOT_THERE | {errno.EISDIR, errno.ENXIO, errno.EAGAIN}
_MAX_TS = 2**33


class Unreadable(NamedTuple):
    """The cache gave no answer; ``error`` says why."""

    error: str


class TooLarge(NamedTuple):
    """A file of the answer has more bytes than the caller wants to read."""

    size: int


class NotAsked(NamedTuple):
    """So much was read for the other events that this one has to be asked for again."""


Answer = Opened | Ignored | Unreadable | TooLarge | NotAsked | None
"""What the cache has of an event: the event as it holds it, ``Ignored.NOCACHE`` for a job that asked not to be kept,
nothing (yet), or no answer."""


class Folder(NamedTuple):
    """A job's folder: when something was last put into it (seconds since the epoch), and its name."""

    changed_at: float
    name: str


class Job(NamedTuple):
    """What a folder holds: the job's function (``None`` without a load), whether the load is a publish's and names a
    target, and the minions that returned."""

    jid: str
    fun: Any
    is_publish: bool
    has_target: bool
    returned: list[str]


class JobCache:
    """The cache of the master of ``opts``. All methods block."""

    def __init__(self, opts: Mapping[str, Any]) -> None:
        self._jobs = Path(opts["cachedir"]) / "jobs"
        self._proc = Path(opts["cachedir"]) / "proc"
        self._hash = getattr(hashlib, str(opts.get("hash_type", "sha256")), hashlib.sha256)
        self._master_id = str(opts["id"])

    @staticmethod
    def is_kept(opts: Mapping[str, Any]) -> bool:
        """Whether the master writes one (``store_job``, salt/utils/job.py)."""
        return bool(
            opts.get("master_job_cache", "local_cache") == "local_cache"
            and opts.get("job_cache", True)
            and not opts.get("ext_job_cache")
        )

    def confirm(
        self,
        events: Iterable[Opened],
        patience: float,
        *,
        max_bytes: int = MAX_FILE_BYTES,
        leaves_out: Callable[[Any], bool] = lambda _: False,
    ) -> list[Answer]:
        """For each event the same as the cache has it.

        ``patience``: for how many seconds a file that does not come is taken for one that is being written.
        ``max_bytes``: of one file; an event that needs a larger one is :class:`TooLarge`. Some megabytes of files are
        read in a call, and what is left over is :class:`NotAsked`. Of what a runner or wheel function that
        ``leaves_out`` names returned, the value is not read where it is larger.
        Each job's folder is opened, and its load read, once a call; one at a time.
        """
        read = 0
        answers: dict[int, Answer] = {}
        by_job: dict[str, list[tuple[int, Tag, dict[str, Any]]]] = collections.defaultdict(list)
        total = 0
        for number, event in enumerate(events):
            total += 1
            if event.job is not None and moments.is_jid(event.job.jid):
                by_job[event.job.jid].append((number, event.job, event.data))
        for jid, of_job in by_job.items():
            if read >= _CALL_BYTES:
                answers.update((number, NotAsked()) for number, _, _ in of_job)
                continue
            try:
                with _open_job(self._folder(jid)) as job:
                    reader = _JobReader(job, max_bytes, leaves_out)
                    for number, tag, data in of_job:
                        enough = read + reader.bytes_read >= _CALL_BYTES
                        answers[number] = NotAsked() if enough else self._confirm_in(reader, tag, data, patience)
                read += reader.bytes_read
            except OSError as exc:
                trouble = Unreadable(f"the job cache cannot be read: {exc}")
                answers.update((number, trouble) for number, _, _ in of_job if number not in answers)
        return [answers.get(number) for number in range(total)]

    def _confirm_in(self, job: _JobReader, tag: Tag, data: dict[str, Any], patience: float) -> Answer:
        if tag in job.answered:  # a thousand copies of one event cost as much as one
            found, size = job.answered[tag]
            job.bytes_read += size
        else:
            before = job.bytes_read
            found = self._found(job, tag, data, patience)
            if found is not None:  # that may depend on what the event says
                job.answered[tag] = found, job.bytes_read - before
        return found._replace(data={**found.data, **_times(found, data)}) if isinstance(found, Opened) else found

    def _found(self, job: _JobReader, tag: Tag, data: dict[str, Any], patience: float) -> Answer:
        try:
            if tag.kind is Kind.JOB_NEW:
                return self._published(job, tag, patience)
            if tag.kind in (Kind.RUNNER_NEW, Kind.WHEEL_NEW):
                return self._begun(job, tag)
            return self._returned(job, tag, data, patience)
        except _OverLimit as exc:
            return TooLarge(exc.size)
        except (saltevent.TooManyObjects, MemoryError):  # the decoder's own
            raise
        except OSError as exc:
            return Unreadable(f"the job cache cannot be read: {exc}")
        except Exception:  # whatever a stranger made the master store, the next event must be looked at
            log.exception("The job cache cannot be compared with an event of jid %s", tag.jid)
            return None

    def _published(self, job: _JobReader, tag: Tag, patience: float) -> Opened | None:
        """The publish of a job; none where the load is a return's."""
        load = job.load
        if load is None or not jobload.is_publish(load):
            return None
        minions = job.minions()
        if minions is None:
            if load.get("tgt") and _is_being_written(job.path, patience):  # they are written a moment after the load
                return None
            minions = [], []
        return saltevent.opened(f"salt/job/{tag.jid}/new", jobload.publish_data(tag.jid, load, *minions))

    def _begun(self, job: _JobReader, tag: Tag) -> Opened | None:
        """The start of a runner or wheel function: what its process says of itself, or its return afterwards."""
        kind = "run" if tag.kind is Kind.RUNNER_NEW else "wheel"
        said = _read(f"{self._proc}/{tag.jid}", max_bytes=job.max_bytes)
        if said is None and (cached := job.returned(self._master_id)) is not None:
            said = None if _is_published(job) else cached["return"]
        if saltevent.master_return_kind(said, tag.jid) != kind:
            return None
        data = {key: said[key] for key in ("fun", "jid", "user", "fun_args") if key in said}
        return saltevent.opened(f"salt/{kind}/{tag.jid}/new", data)

    def _returned(self, job: _JobReader, tag: Tag, data: Mapping[str, Any], patience: float) -> Opened | Ignored | None:
        minion = tag.minion if tag.kind is Kind.JOB_RETURN else self._master_id
        too_large: _OverLimit | None = None
        try:
            cached = job.returned(minion)
        except _OverLimit as exc:
            cached, too_large = None, exc
        if cached is None and tag.kind in saltevent.MASTER_RETURNS:
            cached = job.outline(minion)
        if cached is None and too_large is not None:
            raise too_large
        if cached is None:
            return Ignored.NOCACHE if _asked_not_to_be_kept(job) else None
        kind = saltevent.master_return_kind(cached["return"], tag.jid) if minion == self._master_id else None
        if kind is not None and not _is_published(job):
            return saltevent.opened(f"salt/{kind}/{tag.jid}/ret", dict(cached["return"]))
        if tag.kind is not Kind.JOB_RETURN or job.load is None:
            return None
        if not _is_published(job) and is_made_up(tag.jid, job.stored_at(minion)):
            return Ignored.BAD_JID  # a minion made it up, and no retention would ever reach the row
        out = job.read(f"{minion}/out.p")
        if out is not None:
            cached["out"] = out
        elif _may_have_outputter(data, cached) and _is_being_written(f"{job.path}/{minion}", patience):
            return None
        return saltevent.opened(
            f"salt/job/{tag.jid}/ret/{minion}", jobload.return_data(tag.jid, minion, cached, job.load)
        )

    def present(self, keys: Iterable[tuple[str, str]]) -> list[bool]:
        """Whether the cache has something for each (jid, minion), ``""`` for the job itself: a quick first look. What
        cannot be told counts as there."""
        return [self._is_present(jid, minion) for jid, minion in keys]

    def _is_present(self, jid: str, minion: str) -> bool:
        if not moments.is_jid(jid) or not _is_name(minion or "-"):
            return False
        names = [f"{self._folder(jid)}/{minion}/return.p"]
        if not minion:
            names = [f"{self._folder(jid)}/.load.p", f"{self._proc}/{jid}"]
        return any(map(_may_be_there, names))

    def folders(self, *, since: float, before: Folder | None, most: int) -> list[Folder]:
        """The ``most`` newest folders that changed at or after ``since``, newest first, older than ``before``."""
        return heapq.nlargest(most, (folder for folder in self._walk(since) if before is None or folder < before))

    def _walk(self, since: float) -> Iterator[Folder]:
        for top in _entries(str(self._jobs)):
            for folder in _entries(top.path):
                try:
                    changed_at = folder.stat(follow_symlinks=False).st_mtime
                except OSError:
                    continue
                if changed_at >= since:
                    yield Folder(changed_at, f"{top.name}/{folder.name}")

    def job(self, folder: Folder) -> Job | None:
        """What a folder holds; ``None`` for one that is no job's (any more), or whose job asked not to be kept.

        Raises:
            OSError: the cache cannot be read.
        """
        path = str(self._jobs / folder.name)
        with _open_job(path) as opened:
            returned = [entry.name for entry in _entries(path) if _is_id(entry.name) and entry.is_dir()]
            load = _JobReader(opened, MAX_FILE_BYTES).load
            jid = _text_of("jid", opened.fd)
            if not moments.is_jid(jid) and load:
                # Salt truncates the file and writes it anew at every return: a master that died then left it empty.
                jid = str(load.get("jid"))
            if not moments.is_jid(jid) or self._folder(jid) != path or _asked_not_to_be_kept(opened):
                return None
            if load is None:
                return Job(jid, None, False, False, returned)
            return Job(jid, load.get("fun", ""), jobload.is_publish(load), bool(load.get("tgt")), returned)

    def publish(self, jid: str) -> dict[str, Any] | None:
        """The payload of a job's publish; ``None`` where the load is no publish's.

        Raises:
            OSError: the cache cannot be read.
        """
        with _open_job(self._folder(jid)) as opened:
            reader = _JobReader(opened, MAX_FILE_BYTES)
            load = reader.load
            if load is None or not jobload.is_publish(load):
                return None
            return jobload.publish_data(jid, load, *(reader.minions() or ([], [])))

    def is_being_written(self, job: Job, minion: str, *, patience: float) -> bool:
        """Whether the master may be about to add to what it stored of a minion's return, or (``""``) of the publish."""
        folder = self._folder(job.jid)
        if minion:
            return _is_being_written(f"{folder}/{minion}", patience)
        return job.has_target and _is_being_written(folder, patience) and not _has_minions(folder)

    def stored_at(self, jid: str, minion: str) -> float | None:
        """When the return of a minion was stored (seconds since the epoch); ``None``: it was not, or is none.

        Raises:
            OSError: the cache cannot be read.
        """
        with _open_job(self._folder(jid)) as opened:
            reader = _JobReader(opened, 0)
            try:
                if reader.returned(minion) is None:
                    return None
            except _OverLimit:  # whoever makes a row of it reads it
                pass
            return reader.stored_at(minion)

    def _folder(self, jid: str) -> str:
        digest = self._hash(jid.encode()).hexdigest()
        return f"{self._jobs}/{digest[:2]}/{digest[2:]}"


class _OpenJob(NamedTuple):
    """A job's folder, open (``fd`` is ``None``: there is none)."""

    path: str
    fd: int | None


@contextlib.contextmanager
def _open_job(folder: str) -> Iterator[_OpenJob]:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno not in _NOT_THERE:
            raise
        yield _OpenJob(folder, None)
        return
    try:
        yield _OpenJob(folder, fd)
    finally:
        os.close(fd)


class _JobReader:
    """Reads the files of a job, its load once. Files of more than ``max_bytes`` raise :class:`_OverLimit`."""

    def __init__(self, job: _OpenJob, max_bytes: int, leaves_out: Callable[[Any], bool] = lambda _: False) -> None:
        self.path = job.path
        self.fd = job.fd
        self.max_bytes = max_bytes
        self.bytes_read = 0
        self.answered: dict[Tag, tuple[Answer, int]] = {}
        """What it has of events that were asked for, and the bytes that were read for it."""
        self._leaves_out = leaves_out
        self._load: dict[str, Any] | None = None
        self._is_read = False

    @property
    def load(self) -> dict[str, Any] | None:
        """The job's load without what authenticated it."""
        if not self._is_read:
            load = self.read(".load.p")
            self._load = jobload.without_secrets(load) if isinstance(load, dict) else None
            self._is_read = True
        return self._load

    def read(self, name: str) -> Any:
        """A file of the job's folder, unpacked; ``None``: there is none."""
        if self.fd is None:
            return None
        content = _content(name, self.fd, self.max_bytes)
        self.bytes_read += len(content or b"")
        return _unpacked(content)

    def minions(self) -> tuple[list[str], list[str]] | None:
        """Whom the job was for, by this master alone, and by its syndics too.

        Any minion can add a file of its own (``_handle_minion_event``, salt/master.py 3006-3008). So of the syndics'
        files some megabytes are read, small ones first.
        """
        own: set[str] = set()
        minions: set[str] = set()
        found = False
        room = _SYNDICS_BYTES
        for size, name in sorted(
            (_size_of(entry), entry.name) for entry in _entries(self.path) if _names_minions(entry)
        ):
            if name != ".minions.p":
                room -= size
                if room < 0:
                    continue
            part = self.read(name)
            if isinstance(part, list):
                found = True
                (own if name == ".minions.p" else minions).update(each for each in part if isinstance(each, str))
        return (sorted(own), sorted(own | minions)) if found else None

    def returned(self, minion: str) -> dict[str, Any] | None:
        """What the cache has of a minion's return."""
        if self.fd is None or not _is_name(minion):
            return None
        cached = self.read(f"{minion}/return.p")
        if cached is None:
            # A master that died before it renamed the file (salt/utils/atomicfile.py) takes no second return either.
            for entry in _entries(f"{self.path}/{minion}"):
                if cached is None and entry.name.startswith(_ATOMIC_WRITE):
                    cached = _read(entry.path, max_bytes=self.max_bytes)
        return cached if isinstance(cached, dict) and "return" in cached else None

    def stored_at(self, minion: str) -> float | None:
        """When a minion's return was stored (seconds since the epoch)."""
        return _changed_at(f"{minion}/return.p", self.fd) or _changed_at(minion, self.fd)

    def outline(self, minion: str) -> dict[str, Any] | None:
        """What the cache has of a return of the master's own, where the value is not wanted: without it."""
        if self.fd is None or not _is_name(minion):
            return None
        try:
            fd = os.open(f"{minion}/return.p", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self.fd)
            with os.fdopen(fd, "rb") as file:
                said = saltevent.outline_of_master_return(file, self._leaves_out)
        except OSError as exc:
            if exc.errno not in _NO_FILE:
                raise
            return None
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        return None if said is None else {"return": said}


def is_made_up(jid: str, stored_at: float | None) -> bool:
    """Whether a jid that nobody published lies in the future of when its return was stored, and of now."""
    return moments.is_ahead(jid, max(stored_at or 0.0, time.time()))


def _has_minions(folder: str) -> bool:
    return any(map(_names_minions, _entries(folder)))


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _names_minions(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".minions.") and entry.name.endswith("p")


def _is_published(job: _JobReader) -> bool:
    """Whether a job was published: what stands there of the master's id is then the return of a minion of that id."""
    try:
        return job.load is not None and jobload.is_publish(job.load)
    except _OverLimit:  # it is a return of the master's own, which the master stores as the load, too
        return False


def _asked_not_to_be_kept(job: _OpenJob | _JobReader) -> bool:
    """By a file. A folder of this name is the return of a minion that is called so."""
    return job.fd is not None and (it := _stat("nocache", job.fd)) is not None and stat.S_ISREG(it.st_mode)


def _may_have_outputter(data: Mapping[str, Any], cached: Mapping[str, Any]) -> bool:
    """Whether an outputter may belong to a return: its event has one, or is not the genuine one."""
    try:
        return "out" in data or data.get("return") != cached["return"]
    except RecursionError:
        return True


def _times(found: Opened, data: Mapping[str, Any]) -> dict[str, Any]:
    """What is taken from an event: when the minion sent its return, and when the master saw it.

    What a runner or wheel function returned has its own ``_stamp`` in the cache, where it is part of the value.
    """
    ts, stamp = data.get("ts"), data.get("_stamp")
    kind = found.job and found.job.kind
    times: dict[str, Any] = {}
    if kind is Kind.JOB_RETURN and type(ts) is int and 0 <= ts < _MAX_TS:
        times["ts"] = ts
    if moments.is_stamp(stamp) and not (
        kind in saltevent.MASTER_RETURNS and moments.is_stamp(found.data.get("_stamp"))
    ):
        times["_stamp"] = stamp
    return times


def _is_being_written(folder: str, patience: float) -> bool:
    """Whether a file may still come: one lies there unfinished, or the last one came just now.

    The folder's time says so, not the last file's, which is from before that file was synced and renamed.
    """
    changed_at = _changed_at(folder)
    age = time.time() - changed_at if changed_at is not None else patience
    if not -_FUTURE_SECONDS < age < patience:  # a clock that was set back leaves times far ahead of it
        return False
    return age < _BETWEEN_SECONDS or any(entry.name.startswith(_ATOMIC_WRITE) for entry in _entries(folder))


def _is_name(minion: str) -> bool:
    """Whether an id, a stranger's word, is the name of one folder in a job's, and none of Salt's own files there."""
    if not minion or minion in (".", "..") or "/" in minion or "\0" in minion:
        return False
    return not minion.startswith((".load.p", ".minions.", ".batch.p", _ATOMIC_WRITE))


def _is_id(name: str) -> bool:
    """Whether a folder's name can be a minion's id: text, and not Salt's own."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return _is_name(name)


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except ValueError:  # a surrogate in a name
        return []
    except OSError as exc:
        if exc.errno not in _NOT_THERE:
            raise
        return []


def _changed_at(path: str, folder_fd: int | None = None) -> float | None:
    its = _stat(path, folder_fd)
    return None if its is None else its.st_mtime


def _stat(path: str, folder_fd: int | None) -> os.stat_result | None:
    try:
        return os.stat(path, dir_fd=folder_fd)
    except ValueError:
        return None
    except OSError as exc:
        if exc.errno not in _NOT_THERE:
            raise
        return None


def _may_be_there(path: str) -> bool:
    try:
        return _changed_at(path) is not None
    except OSError:
        return True


class _OverLimit(Exception):
    """A file is larger than its reader may read."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def _content(path: str, folder_fd: int | None, max_bytes: int) -> bytes | None:
    """The bytes of a file; ``None``: there is none, or it is larger than any row."""
    try:
        # From an open folder: walking the long path anew takes as long as everything else here.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder_fd)
    except ValueError:  # a surrogate in a name
        return None
    except OSError as exc:
        if exc.errno not in _NO_FILE:
            raise
        return None
    try:
        content = os.read(fd, 65536)
        if len(content) < 65536:
            return content
        size = os.fstat(fd).st_size
        if size > MAX_FILE_BYTES:
            return None
        if size > max_bytes:
            raise _OverLimit(size)
        with open(fd, "rb", closefd=False) as file:  # a descriptor
            return content + file.read(size - len(content))  # which makes room for so much at once
    except OSError as exc:
        if exc.errno not in _NO_FILE:
            raise
        return None
    finally:
        os.close(fd)


def _read(path: str, folder_fd: int | None = None, *, max_bytes: int = MAX_FILE_BYTES) -> Any:
    """A msgpack file; ``None`` when there is none, or none that Salt wrote.

    Raises:
        OSError: the cache cannot be read.
        _OverLimit: the file has more than ``max_bytes``, and more than 64 KiB.
    """
    return _unpacked(_content(path, folder_fd, max_bytes))


def _unpacked(content: bytes | None) -> Any:
    try:
        return None if content is None else saltevent.unpack(content)
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _text_of(path: str, folder_fd: int | None) -> str:
    content = None if folder_fd is None else _content(path, folder_fd, MAX_FILE_BYTES)
    try:
        return (content or b"")[:64].decode()
    except UnicodeDecodeError:
        return ""
