"""What the decoder's process does: opens large events, confirms them, makes rows. ``decoder.py`` is its other end.

A crash, a fault or too little memory here is an answer, or the end of this process, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack

from . import decoder, records, saltevent, settings
from .items import Fit
from .jobcache import JobCache
from .journal import Entry
from .large import MARGIN_BYTES, LargeEvents, parts_of, too_large
from .records import Selection
from .verify import Verifier, sorted_out

_PR_SET_PDEATHSIG = 1
_NICE = 5
_MOST_ERROR_CHARACTERS, _MOST_LINES = 500, 5
_TRIM_BYTES = 1024 * 1024

_TOO_MUCH = "opening it takes too much memory"

Said = tuple[list[Any], bytes]


def main(fd: int, parent: int, memory: int) -> None:
    """Answers on a socket until it ends."""
    libc = _prepare(parent, memory)
    lines = _Lines()
    logging.getLogger().addHandler(lines)
    desk = Desk()
    with socket.socket(fileno=fd) as sock:
        sock.sendall(decoder.HELLO)
        while (head := _received(sock, decoder.FRAME.size)) is not None:
            header_size, body_size = decoder.FRAME.unpack(head)
            header, body = _received(sock, header_size), _received(sock, body_size)
            if header is None or body is None:
                return
            setup, task, arguments = msgpack.unpackb(header)
            bodies = [bytes(body)]
            del body
            (said, answer), is_spent = desk.answer(setup, task, arguments, bodies)
            packed = msgpack.packb([*said[:1], lines.take(), *said[1:]])
            sock.sendall(decoder.FRAME.pack(len(packed), len(answer)) + packed)
            sock.sendall(answer)
            if is_spent:  # what ran out of memory may have left anything half done
                return
            if max(body_size, len(answer)) > _TRIM_BYTES:
                del answer, said
                gc.collect()
                if libc is not None:
                    libc.malloc_trim(0)


def _prepare(parent: int, memory: int) -> Any:
    """Limits and manners of the process. Gives the C library, where there is the usual one."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)  # whoever stops the engine sends it to the whole group; we end with it
    libc = None
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.malloc_trim(0)
    if os.getppid() != parent:
        raise SystemExit
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")  # rather than the engine
    return libc


def _received(sock: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = sock.recv_into(view[got:])
        if not count:
            return None
        got += count
    return data


class _Lines(logging.Handler):
    """Keeps what is logged, for the engine's log."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """logging: one more."""
        if len(self._lines) < _MOST_LINES:
            self._lines.append(record.getMessage()[:_MOST_ERROR_CHARACTERS])

    def take(self) -> list[str]:
        """What came since the last time."""
        lines, self._lines = self._lines, []
        return lines


class Desk:
    """Does the tasks, by the setup that came with the last one."""

    def __init__(self) -> None:
        self._tasks: dict[str, Callable[..., Said]] = {"confirm": self._confirm, "make": self._make}
        self._setup: Mapping[str, Any] = {}

    def answer(self, setup: Mapping[str, Any], task: str, arguments: list[Any], body: list[bytes]) -> tuple[Said, bool]:
        """What a task came to, and whether this process is of no more use."""
        try:
            if setup != self._setup:
                self._set_up(setup)
            return self._tasks[task](body, *arguments), False
        except saltevent.TooManyObjects:
            return (["too_large", f"more than {setup['max_objects']:,} objects (max_event_objects)"], b""), False
        except MemoryError:
            return (["too_large", _TOO_MUCH], b""), True
        except Exception as exc:  # noqa: BLE001 (it is said)
            return (["fault", f"{type(exc).__name__}: {exc}"[:_MOST_ERROR_CHARACTERS]], b""), False

    def _set_up(self, setup: Mapping[str, Any]) -> None:
        self._selection = Selection(
            settings.combine(setup["settings"], {}), master_id=setup["master"], peers=setup["peers"]
        )
        saltevent.limit_objects(setup["max_objects"])
        cache = JobCache(setup["cache"]) if setup["cache"] else None
        nobody: Any = None  # there is no journal here
        large = LargeEvents(nobody, _at_once, nobody, on_made=lambda _, __: None)
        large.max_bytes = large.file_bytes = setup["max_bytes"]
        self._verifier = Verifier(
            nobody, _at_once, cache, _at_once, self._selection, on_confirmed=lambda _, __: None, large=large
        )
        self._verifier.enabled = setup["verified"]
        self._setup = setup

    def _confirm(self, body: list[bytes], seq: int, captured_at: float, state: int, patience: float) -> Said:
        """What the job cache has of an event: its bytes, or why there are none."""
        corrected = self._verifier.corrected
        look = asyncio.run(self._verifier.look_at([Entry(seq, captured_at, bytes(body.pop()), state)], patience))
        if look.absent:
            return ["absent"], b""
        if look.large:
            return ["too_large", f"{look.large[0][1]:,} bytes in the job cache (max_event_bytes)"], b""
        if look.unknown:
            return ["unknown", self._verifier.trouble], b""
        confirmed, ignored, dead = sorted_out(look.going_on)
        if ignored:
            return ["ignored", ignored[seq]], b""
        if dead:
            is_memory = dead[seq][1].startswith("MemoryError")
            return (["too_large", _TOO_MUCH] if is_memory else ["dead", *dead[seq]]), b""
        if len(confirmed[seq]) > self._setup["max_bytes"]:
            return ["too_large", too_large(len(confirmed[seq]), self._setup["max_bytes"])], b""
        return ["confirmed", self._verifier.corrected - corrected], confirmed[seq]

    def _make(self, body: list[bytes], captured_at: float, event_key: bytes, fit: list[Any], most: int) -> Said:
        """The rows of an event that needs no confirmation, ``most`` bytes of them, for tables that ``fit``."""
        event = saltevent.open_event(bytes(body.pop()))
        if isinstance(event, saltevent.Ignored):
            return ["ignored", event.value], b""
        record = records.interpret(event, captured_at, self._selection)
        del event
        if isinstance(record, saltevent.Ignored):
            return ["ignored", record.value], b""
        load, ret, stored = record
        del record
        texts = [ret.return_json, ret.full_ret_json] if ret else []
        texts += [stored.data_json] if stored else []
        said = ["too_large", f"its row has more than {most:,} bytes, twice max_event_bytes"]
        if sum(map(len, texts)) > most:
            return said, b""
        del texts
        parts, about = parts_of(load, ret, stored, self._selection.master_id, event_key, Fit(*fit))
        if sum(map(len, parts)) > most + MARGIN_BYTES:
            return said, b""
        return ["item", [len(part) for part in parts], *about], b"".join(parts)


async def _at_once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
