"""The journal's folder and what is made in it. Nothing here follows a link, and root gives away only what it made.

``salt-run`` and the like may run as root in a folder of the master's user. So every name is looked up under a
descriptor of its folder, with ``O_NOFOLLOW``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def of_journal(cachedir: str) -> Path:
    """Where the journal of a master lives, with all that belongs to it."""
    return Path(cachedir) / "mysql_jobcache"


def open_folder(path: Path) -> int:
    """Opens a folder, made where there is none, mode 0700, of the owner of the one above; gives its descriptor.

    Raises:
        OSError: it cannot be made, is a link, or belongs to somebody else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    above = os.open(path.parent, _FOLDER)
    try:
        return open_inside(above, path.name)
    except OSError as exc:
        raise type(exc)(exc.errno, exc.strerror, str(path)) from exc
    finally:
        os.close(above)


def open_inside(above: int, name: str) -> int:
    """The same, of a name in the folder that is open as ``above``."""
    made = True
    try:
        os.mkdir(name, 0o700, dir_fd=above)
    except FileExistsError:
        made = False
    try:
        folder = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR):
            raise NotADirectoryError(exc.errno, "it is a link, or no folder; put a real folder there", name) from exc
        raise
    try:
        _take_care(above, folder, name, made=made)
    except BaseException:
        os.close(folder)
        raise
    return folder


def _take_care(above: int, folder: int, name: str, *, made: bool) -> None:
    owner, user, its = os.fstat(above), os.geteuid(), os.fstat(folder)
    if user == 0 and (made or its.st_uid == 0):
        os.fchown(folder, owner.st_uid, owner.st_gid)
    elif its.st_uid not in (user, owner.st_uid):
        raise PermissionError(errno.EPERM, f"it belongs to the user {its.st_uid}; give it to the master's user", name)
    if stat.S_IMODE(its.st_mode) != 0o700 and user in (0, its.st_uid):
        os.fchmod(folder, 0o700)


def create(folder: int, name: str) -> int:
    """A new file, mode 0600, of the folder's owner; gives its descriptor, for reading and writing.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be made.
    """
    file = os.open(name, _FILE | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    if os.geteuid() == 0:
        try:
            owner = os.fstat(folder)
            os.fchown(file, owner.st_uid, owner.st_gid)
        except BaseException:
            os.close(file)
            raise
    return file


def open_file(folder: int, name: str) -> int:
    """A file that is there.

    Raises:
        OSError: there is none, or it is no file of its own.
    """
    file = os.open(name, _FILE, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no file", name)
    return file


def open_or_create(folder: int, name: str) -> int:
    """A file that is there, or a new one."""
    try:
        return create(folder, name)
    except FileExistsError:
        return open_file(folder, name)


def claim(file: int, *, alone: bool) -> bool:
    """Locks an open file, beside the lock of ``flock``; whether nobody else's claim is in the way. It ends with the
    descriptor."""
    kind = fcntl.F_WRLCK if alone else fcntl.F_RDLCK
    try:
        # Of the open file, not of the process: another descriptor of the file that is closed takes it not away.
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open is still what has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False
