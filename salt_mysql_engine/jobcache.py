"""The master's local job cache, read directly: what the master itself accepted, and as it accepted it.

``<cachedir>/jobs/<hash[:2]>/<hash[2:]>/`` with the hash of the jid (``jid_dir``, salt/utils/jid.py) holds ``jid``
(text), ``.load.p`` (the publish, or the first return of a job that nobody published), ``.minions.p`` and
``.minions.<syndic>.p``, ``nocache`` (an empty mark), and a folder for each minion with ``return.p`` (``return``,
``retcode``, ``success``) and ``out.p`` (salt/returners/local_cache.py 3006-3008). The files are msgpack, written
beside and renamed, one after the other; 3006.28 and 3008 sync each before, for as long as the disk takes. Only what
passed the master's own ``_return`` is there, and the first return of a minion stands.

Everything is tolerated: a file that is half written, of someone else or not there is ``None``. Salt's own reader is
not used, because it raises where ``.minions.p`` is missing and waits a second for a file that it cannot read.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import heapq
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import records
from .records import Kind, Opened, Tag

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 1024 * 1024
"""A larger value would not fit into any row; it is treated as not there."""

_BETWEEN_SECONDS = 1.0
"""For so long the master may take from one file of a folder to the beginning of the next."""
_ATOMIC_WRITE = ".___atomic_write"
_OF_LOAD = ("fun", "user")


class Folder(NamedTuple):
    """A job's folder: when something was last put into it (seconds since the epoch), and its name."""

    changed_at: float
    name: str


class Job(NamedTuple):
    """What a folder holds: the load (``{}`` when there is none), and the minions with their return's time."""

    jid: str
    load: dict[str, Any]
    returned: list[str]


class NoCache(Exception):
    """The job asked not to be kept: the master will never have its returns."""


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

    def confirm(self, events: Iterable[Opened], patience: float) -> list[dict[str, Any] | None | NoCache]:
        """For each event the payload as the cache has it; ``None`` when the cache does not have it, or not yet.

        ``patience``: for how many seconds a file that does not come is taken for one that is being written.
        Each job's folder is opened, and its load read, once a call; one at a time.
        """
        confirmed: dict[int, dict[str, Any] | None | NoCache] = {}
        by_job: dict[str, list[tuple[int, Tag, dict[str, Any]]]] = collections.defaultdict(list)
        total = 0
        for number, event in enumerate(events):
            total += 1
            if event.job is not None and records.is_jid(event.job.jid):
                by_job[event.job.jid].append((number, event.job, event.data))
        for jid, of_job in by_job.items():
            with _open_job(self._folder(jid)) as job:
                load = _load(job)
                for number, tag, data in of_job:
                    try:
                        confirmed[number] = self._confirm_in(job, load, tag, data, patience)
                    except Exception:  # whatever a stranger wrote, the next event must be looked at
                        log.exception("The job cache cannot be compared with an event of jid %s", jid)
        return [confirmed.get(number) for number in range(total)]

    def _confirm_in(
        self, job: _OpenJob, load: dict[str, Any] | None, tag: Tag, data: dict[str, Any], patience: float
    ) -> dict[str, Any] | None | NoCache:
        if tag.kind is Kind.JOB_NEW:
            return None if load is None else self._published(tag, data, load)
        if tag.kind in (Kind.RUNNER_NEW, Kind.WHEEL_NEW):
            return data if load is not None or os.path.exists(f"{self._proc}/{tag.jid}") else None  # noqa: PTH110 (never raises)
        minion = tag.minion if tag.kind is Kind.JOB_RETURN else self._master_id
        cached = _return(minion, job)
        if cached is None:
            return NoCache() if _asked_not_to_be_kept(job) else None
        if tag.kind is not Kind.JOB_RETURN:
            value = cached["return"]
            return {**value, "_stamp": data.get("_stamp")} if isinstance(value, dict) else None
        out = _read(f"{minion}/out.p", job.fd)
        if out is not None:
            cached["out"] = out
        elif "out" in data and _is_being_written(f"{job.path}/{minion}", patience):
            return None
        return _as_cached(data, cached, load or {})

    def present(self, keys: Iterable[tuple[str, str]]) -> list[bool]:
        """Whether the cache has something for each (jid, minion), ``""`` for the job itself: a quick first look."""
        return [self._is_present(jid, minion) for jid, minion in keys]

    def _is_present(self, jid: str, minion: str) -> bool:
        if not records.is_jid(jid) or not _is_name(minion or "-"):
            return False
        names = [f"{self._folder(jid)}/{minion}/return.p"]
        if not minion:
            names = [f"{self._folder(jid)}/.load.p", f"{self._proc}/{jid}"]
        return any(map(os.path.exists, names))  # which, unlike Path.exists(), raises nothing

    def _published(self, tag: Tag, data: dict[str, Any], load: dict[str, Any]) -> dict[str, Any] | None:
        """The payload of a ``/new`` with what the master stored of it."""
        cached: dict[str, Any] = {
            key: load[key] for key in ("tgt", "tgt_type", "fun", "arg", "user", "kwargs", "ret") if key in load
        }
        minions = self._minions(self._folder(tag.jid))
        if minions is None:
            if load.get("tgt"):  # they are written a moment after the load
                return None
            minions = []
        # One part of a batch job (3008) names its own minions, and the folder has those of all parts.
        of_part = [name for name in _texts(data.get("minions")) if name in set(minions)]
        targets = data.get("tgt")
        if targets and targets == _texts(targets) and set(targets) <= set(minions):
            cached["tgt"] = targets
        aimed_at = cached.get("tgt")
        if isinstance(aimed_at, str):
            aimed_at = aimed_at.split(",")
        missing = [name for name in _texts(data.get("missing")) if name in _texts(aimed_at)]
        return {**data, "jid": tag.jid, **cached, "minions": of_part or minions, "missing": missing}

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
        """What a folder holds; ``None`` for one that is no job's (any more), or whose job asked not to be kept."""
        path = str(self._jobs / folder.name)
        with _open_job(path) as opened:
            names = [entry.name for entry in _entries(path)]
            try:
                jid = Path(path, "jid").read_bytes()[:64].decode()
            except (OSError, UnicodeDecodeError):
                jid = ""
            load = _load(opened) or {}
            if not records.is_jid(jid):
                # Salt truncates the file and writes it anew at every return: a master that died then left it empty.
                jid = str(load.get("jid"))
            if not records.is_jid(jid) or self._folder(jid) != path or _asked_not_to_be_kept(opened):
                return None
            return Job(jid, load, [name for name in names if _is_id(name) and name not in ("jid", "endtime")])

    def is_being_written(self, job: Job, minion: str, *, patience: float) -> bool:
        """Whether the master may be about to add to what it stored of a minion's return, or (``""``) of the publish."""
        folder = self._folder(job.jid)
        if minion:
            return _is_being_written(f"{folder}/{minion}", patience)
        return bool(job.load.get("tgt")) and _is_being_written(folder, patience) and self._minions(folder) is None

    def new_event(self, job: Job) -> bytes | None:
        """The event of a job's publish; ``None`` where the load is no publish's."""
        return records.publish_event(job.jid, job.load, self._minions(self._folder(job.jid)) or [])

    def return_event(self, job: Job, minion: str) -> bytes | None:
        """The event of a minion's return, stamped with the time at which it was stored; ``None``: no such return."""
        with _open_job(self._folder(job.jid)) as opened:
            cached = _return(minion, opened)
            if cached is None:
                return None
            out = _read(f"{minion}/out.p", opened.fd)
            stored_at = _changed_at(f"{minion}/return.p", opened.fd) or _changed_at(minion, opened.fd)
        if stored_at is None:
            return None
        stamp = {"_stamp": records.utc(stored_at).isoformat()}
        kind = records.master_return_kind(cached["return"], job.jid) if minion == self._master_id else None
        if kind is not None:
            return records.try_pack(f"salt/{kind}/{job.jid}/ret", {**cached["return"], **stamp})
        if out is not None:
            cached["out"] = out
        if "return" in job.load and job.load.get("id") == minion:  # a salt-call: the load is the return
            data = {**job.load, **cached}
        else:
            data = {
                "cmd": "_return",
                "id": minion,
                **{key: cached[key] for key in ("success", "return", "retcode") if key in cached},
                "jid": job.jid,
                "fun": job.load.get("fun", ""),
                "fun_args": job.load.get("arg", []),
                **{key: job.load[key] for key in ("user",) if key in job.load},
                **{key: cached[key] for key in ("out",) if key in cached},
            }
        return records.try_pack(f"salt/job/{job.jid}/ret/{minion}", {**data, **stamp})

    def _folder(self, jid: str) -> str:
        digest = self._hash(jid.encode()).hexdigest()
        return f"{self._jobs}/{digest[:2]}/{digest[2:]}"

    def _minions(self, folder: str) -> list[str] | None:
        """Whom the job was for, by this master and its syndics."""
        minions: set[str] = set()
        found = False
        for entry in _entries(folder):
            if entry.name.startswith(".minions.") and entry.name.endswith("p"):
                part = _read(entry.path)
                if isinstance(part, list):
                    found = True
                    minions.update(name for name in part if isinstance(name, str))
        return sorted(minions) if found else None


class _OpenJob(NamedTuple):
    """A job's folder, open (``fd`` is ``None``: there is none)."""

    path: str
    fd: int | None


@contextlib.contextmanager
def _open_job(folder: str) -> Iterator[_OpenJob]:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield _OpenJob(folder, None)
        return
    try:
        yield _OpenJob(folder, fd)
    finally:
        os.close(fd)


def _load(job: _OpenJob) -> dict[str, Any] | None:
    """A job's load without what authenticated it."""
    load = None if job.fd is None else _read(".load.p", job.fd)
    return records.without_secrets(load) if isinstance(load, dict) else None


def _asked_not_to_be_kept(job: _OpenJob) -> bool:
    return job.fd is not None and _changed_at("nocache", job.fd) is not None


def _return(minion: str, job: _OpenJob) -> dict[str, Any] | None:
    if job.fd is None or not _is_name(minion):
        return None
    cached = _read(f"{minion}/return.p", job.fd)
    if cached is None:
        # A master that died before it renamed the file (salt/utils/atomicfile.py) takes no second return either.
        for entry in _entries(f"{job.path}/{minion}"):
            if cached is None and entry.name.startswith(_ATOMIC_WRITE):
                cached = _read(entry.path)
    return cached if isinstance(cached, dict) and "return" in cached else None


def _is_being_written(folder: str, patience: float) -> bool:
    """Whether a file may still come: one lies there unfinished, or the last one came just now.

    The folder's time says so, not the last file's, which is from before that file was synced and renamed.
    """
    changed_at = _changed_at(folder)
    age = time.time() - changed_at if changed_at is not None else patience
    if age >= patience:
        return False
    return age < _BETWEEN_SECONDS or any(entry.name.startswith(_ATOMIC_WRITE) for entry in _entries(folder))


def _as_cached(data: dict[str, Any], cached: Mapping[str, Any], load: Mapping[str, Any]) -> dict[str, Any]:
    """A return's payload with every word that the cache has about it, in the payload's own order."""
    cached = {**cached, **{key: load[key] for key in _OF_LOAD if key in load and key in data}}
    if "arg" in load and "fun_args" in data:
        cached["fun_args"] = load["arg"]
    said = {key: value for key, value in data.items() if key not in ("return", "retcode", "success", "out")
            or key in cached}  # fmt: skip
    said.update(cached)
    return said


def _is_name(minion: str) -> bool:
    """Whether an id, a stranger's word, is the name of one folder in a job's."""
    return bool(minion) and "/" not in minion and "\0" not in minion and not minion.startswith(".")


def _is_id(name: str) -> bool:
    """Whether a file's name can be a minion's id: text, and not hidden."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return not name.startswith(".")


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (OSError, ValueError):  # ValueError: a surrogate in a name
        return []


def _changed_at(path: str, folder_fd: int | None = None) -> float | None:
    try:
        return os.stat(path, dir_fd=folder_fd).st_mtime
    except (OSError, ValueError):
        return None


def _read(path: str, folder_fd: int | None = None) -> Any:
    """A msgpack file; ``None`` when there is none, or none that can be read."""
    try:
        # From an open folder: walking the long path anew takes as long as everything else here.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder_fd)
    except (OSError, ValueError):  # ValueError: a surrogate in a name
        return None
    try:
        content = os.read(fd, 65536)
        if len(content) == 65536:
            with open(fd, "rb", closefd=False) as file:  # a descriptor
                content += file.read(MAX_FILE_BYTES)
                if len(content) > MAX_FILE_BYTES:
                    return None
        return records.unpack(content)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    finally:
        os.close(fd)
