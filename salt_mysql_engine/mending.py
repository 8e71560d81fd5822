"""A journal's file that mends itself: a corrupt one is set aside and salvaged, a deleted one made again.

The owner calls its methods from one thread. One that :func:`mended` wraps may meet a corrupt file, and is done again in
the new one. Nothing of the old file goes before the new one is complete, so that a crash in between loses nothing: what
is complete waits under ``journal.ready.sqlite``, and is put in its place at the next start.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
import fcntl
import functools
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from . import folders, journalfile, salvage
from .errors import JournalError

log = logging.getLogger(__name__)

TIMEOUT = 5.0
"""Seconds that a statement may wait for another process."""

Method = TypeVar("Method", bound=Callable[..., Any])


def mended(method: Method) -> Method:
    """Sets a corrupt file aside and does the same in the new one, once."""

    @functools.wraps(method)
    def wrapper(self: MendedFile, *args: Any, **kwargs: Any) -> Any:
        try:
            if not self._broken:
                return method(self, *args, **kwargs)
        except salvage.BROKEN as exc:
            if not salvage.is_corruption(exc):
                raise
            log.critical("The journal %s is corrupt: %s", self.path, exc)
        self._begin_anew()
        return method(self, *args, **kwargs)

    return cast("Method", wrapper)


class MendedFile(abc.ABC):
    """The file at ``path``, locked and open as ``_db`` between :meth:`open` and :meth:`close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.salvaged = ""
        """The path of the last corrupt file, set aside since this object was opened."""
        self._broken = False
        """Whether the file is corrupt and not replaced yet."""
        self._lock_fd = -1
        self._identity: tuple[int, int] | None = None
        self._db: sqlite3.Connection

    @abc.abstractmethod
    def _load(self) -> None:
        """What the owner knows of a file that was just opened.

        Raises:
            sqlite3.DatabaseError: it is corrupt.
        """

    def open(self) -> None:
        """Creates, upgrades or opens the file; a corrupt one is set aside and salvaged.

        Raises:
            JournalError: it is in use, not ours, of a newer format, or the folder cannot be used.
        """
        try:
            self._lock()
        except OSError as exc:
            raise JournalError(f"the journal's folder {self.path.parent} cannot be used: {exc}") from exc
        try:
            try:
                # One that was killed while it made a new file: that is of no use, or complete.
                salvage.remove(journalfile.new_path(self.path))
                if journalfile.ready_path(self.path).exists():
                    self._replace()
                self._db = self._connect()
                self._load()
            except salvage.BROKEN as exc:
                if not salvage.is_corruption(exc):
                    raise
                log.critical("The journal %s is corrupt: %s", self.path, exc)
                self._begin_anew()
        except (OSError, sqlite3.Error) as exc:
            os.close(self._lock_fd)
            raise JournalError(f"the journal {self.path} cannot be opened: {exc}") from exc
        except JournalError:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Closes the file and frees the lock."""
        self._db.close()
        os.close(self._lock_fd)

    @property
    def size_on_disk(self) -> int:
        """Bytes of the file and its write-ahead log."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(path.stat().st_size for path in files if path.exists())

    def _begin_anew(self) -> None:
        """Goes on in a new file with what can be read of the corrupt one, which is set aside.

        It stays in place until the new one is complete, so that a crash or a full disk in between loses nothing.
        """
        self._broken = True
        if hasattr(self, "_db"):
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        with self._new_file() as new:
            new.execute("BEGIN IMMEDIATE")
            report = salvage.copy(self.path, new)
            new.execute("COMMIT")
        lost = "an unknown number" if report.lost is None else report.lost
        log.critical(
            "The corrupt journal was set aside as %s. Saved from it: %d events, %d dead letters; lost: %s",
            self.salvaged, report.events, report.dead_letters, lost,
        )  # fmt: skip

    def be_there(self) -> bool:
        """Somebody may have deleted the file under us, or mounted a disk over it: then all that it holds goes into a
        new one, with what another journal holds that is in its place now. Whether it did."""
        if journalfile.identity(self.path) == self._identity:
            return False
        old, salvaged = self._db, self.salvaged
        try:
            lock_fd = self._lock_fd
            if not folders.is_at(lock_fd, self.path.with_name("lock")):
                self._lock()
                os.close(lock_fd)
        except OSError as exc:
            raise sqlite3.OperationalError(f"the journal's folder cannot be made again: {exc}") from exc
        with self._new_file() as new:
            old.backup(new)
            others = self._others(new)
        old.close()
        aside, self.salvaged = self.salvaged, salvaged
        log.error(
            "Somebody deleted the journal %s while it was in use; it was made again, nothing of it is lost%s",
            self.path,
            others and f". {others}; that file is {aside} now",
        )
        return True

    def _others(self, new: sqlite3.Connection) -> str:
        """Takes along what another journal holds that is in our file's place, and says so."""
        if not self.path.exists():
            return ""
        try:
            with contextlib.closing(journalfile.connect(self.path, timeout=TIMEOUT)) as other:
                taken = salvage.merge(other, new)
        except (sqlite3.Error, *salvage.BROKEN, JournalError) as exc:
            if not isinstance(exc, JournalError) and not salvage.is_corruption(exc):
                raise  # a full disk, say: everything is as before
            return f"Another file in its place cannot be read ({exc}), and nothing of it is taken"
        return f"{taken} events and dead letters of another journal in its place are taken along" if taken else ""

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[sqlite3.Connection]:
        """A journal to be filled, that then takes the place of what is there.

        Raises:
            sqlite3.OperationalError: the disk is full or read-only, say; everything is as before.
        """
        path = journalfile.new_path(self.path)
        try:
            salvage.remove(path)
            with contextlib.closing(journalfile.connect(path, timeout=TIMEOUT)) as new:
                yield new
            path.rename(journalfile.ready_path(self.path))
            self._broken = True  # until that is open
            self._replace()
            self._db = self._connect()
        except OSError as exc:
            raise sqlite3.OperationalError(f"a new journal cannot be made: {exc}") from exc
        finally:
            with contextlib.suppress(OSError):
                salvage.remove(path)
        self._load()
        self._broken = False

    def _replace(self) -> None:
        """Puts the new file in the corrupt one's place. May be interrupted, and is then done again at the next start:
        the last step alone makes the new file the journal, when nothing of the old one is left beside it."""
        now = datetime.datetime.now(datetime.timezone.utc)
        self.salvaged = str(salvage.set_aside(self.path, f"{now:%Y%m%dT%H%M%S%f}"))
        journalfile.ready_path(self.path).rename(self.path)

    def _lock(self) -> None:
        folder = folders.open_folder(self.path.parent)
        try:
            fd = folders.open_or_create(folder, "lock")
        finally:
            os.close(folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 20, 0).decode(errors="replace") or "?"
            os.close(fd)
            raise JournalError(
                f"another mysql_jobcache engine is using the journal {self.path}: process {pid}. List it once "
                "under engines, and give each master a cachedir of its own"
            ) from None
        with contextlib.suppress(OSError):  # a full disk, say: this is for people alone
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock_fd = fd

    def _connect(self) -> sqlite3.Connection:
        db = journalfile.connect(self.path, timeout=TIMEOUT)
        self._identity = journalfile.identity(self.path)
        return db
