"""The decoder: a process of its own for what is large, so that no event holds up another one.

Opening, comparing, encoding and quoting a body of megabytes takes seconds of the interpreter's lock and many times its
memory, both of which a stranger chooses. So the engine only moves such bodies, and the decoder (``decoding.py``) does
the rest: with a limit on its memory, for a time that is limited here, and a death that costs nothing but itself.

It is started by the first that needs it, kept, and started again when it died. It is not forked off: the engine has
threads. It reads a socket that ends with the engine, and the kernel kills it when the engine is killed.

One request at a time, each a header (msgpack) and a body, and so are the answers. What comes back is bounded, since
whoever takes a decoder over must not take the engine along.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack

from .waits import within

log = logging.getLogger(__name__)

_MEMORY_SHARE = 12
"""What the decoder may take beyond what it has when it is idle, as a multiple of the largest event. Measured: a text of
16 MiB takes 80 MiB, a Cyrillic one 140; one character beyond the basic plane makes Python take four bytes for each."""
_ANSWER_SHARE = 2
_ANSWER_MARGIN = 1024 * 1024
_SECONDS, _START_SECONDS = 20.0, 60.0
_HEADER_BYTES = 64 * 1024
_REAP_SECONDS, _END_SECONDS = 0.01, 1.0
FRAME = struct.Struct(">IQ")
HELLO = b"+"
"""What it says first."""
_NAME = "mysql_jobcache decoder"


class DecoderDied(Exception):
    """The decoder did not answer; the message says why."""


class DecoderMissing(Exception):
    """No decoder could be started, whatever it was to do; the message says why."""


class Answer(NamedTuple):
    """What was said, and the bytes that belong to it."""

    said: list[Any]
    body: bytes


class Decoder:
    """The engine's end. ``setup`` is what every request is to be done by; it may change between any two."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.setup = dict(setup)
        self.deaths = 0
        self._memory = 0
        self.seconds = _SECONDS
        """How long a request may take."""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._dead: list[subprocess.Popen[bytes]] = []
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The process, where there is one."""
        return None if self._process is None else self._process.pid

    async def ask(self, task: str, arguments: list[Any], body: list[bytes]) -> Answer:
        """Has a task done. ``body`` is emptied, so that its bytes are nowhere but there while it is done.

        Raises:
            DecoderDied: it crashed, took too long, or said what it cannot mean. The next request gets a new one.
            DecoderMissing: there is none, and ``body`` is as it was.
        """
        async with self._turn:
            await self._reap()
            if self._memory != _MEMORY_SHARE * self.setup["max_bytes"]:
                self.close()
            sock = self._socket or await self._started()
            process = self._process
            assert process is not None
            is_late = False

            def give_up() -> None:
                nonlocal is_late
                is_late = True
                process.kill()  # and so it hangs up

            timer = asyncio.get_running_loop().call_later(self.seconds, give_up)
            try:
                return await self._ask(sock, task, arguments, body)
            except (OSError, EOFError, ValueError, msgpack.exceptions.UnpackException) as exc:
                self.deaths += 1
                self.close()
                raise DecoderDied(f"it took more than {self.seconds:g} s" if is_late else f"it died ({exc})") from exc
            except BaseException:  # what it answers now, nobody will read
                self.close()
                raise
            finally:
                timer.cancel()

    async def _ask(self, sock: socket.socket, task: str, arguments: list[Any], body: list[bytes]) -> Answer:
        loop = asyncio.get_running_loop()
        header = msgpack.packb([self.setup, task, arguments])
        await loop.sock_sendall(sock, FRAME.pack(len(header), len(body[0])) + header)
        await loop.sock_sendall(sock, body[0])
        body.clear()
        header_size, body_size = FRAME.unpack(await _received(sock, FRAME.size))
        if header_size > _HEADER_BYTES or body_size > _ANSWER_SHARE * self.setup["max_bytes"] + _ANSWER_MARGIN:
            raise ValueError(f"an answer of {header_size} and {body_size} bytes")
        said = msgpack.unpackb(await _received(sock, header_size))
        if not isinstance(said, list) or len(said) < 2 or not isinstance(said[0], str):
            raise ValueError("an answer that says nothing")
        answer = Answer([said[0], *said[2:]], bytes(await _received(sock, body_size)))
        for line in said[1]:
            log.warning("%s", line)
        return answer

    async def _started(self) -> socket.socket:
        try:
            await within(_received(self._start(), len(HELLO)), _START_SECONDS)
        except (OSError, EOFError, asyncio.TimeoutError) as exc:
            self.deaths += 1
            self.close()
            raise DecoderMissing(str(exc) or f"it took more than {_START_SECONDS:g} s") from exc
        except BaseException:
            self.close()
            raise
        assert self._socket is not None
        return self._socket

    def _start(self) -> socket.socket:
        self._memory = _MEMORY_SHARE * self.setup["max_bytes"]
        ours, its = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        with its:
            path = [entry for entry in sys.path if isinstance(entry, str)]
            code = (
                f"import sys; sys.path[:] = {path!r}; from salt_mysql_engine.decoding import main; "
                f"main({its.fileno()}, {os.getpid()}, {self._memory})"
            )
            self._process = subprocess.Popen(  # noqa: S603 (ourselves)
                [sys.executable, "-I", "-c", code, _NAME],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
            )
        return ours

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._dead.append(self._process)
            self._process = None

    async def end(self) -> None:
        """Ends the process, and waits for that, but not for ever."""
        self.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._reap(), _END_SECONDS)

    async def _reap(self) -> None:
        # Not wait(): the kernel takes its time to take back a process of hundreds of megabytes.
        while any(process.poll() is None for process in self._dead):  # noqa: ASYNC110 (nothing tells of that)
            await asyncio.sleep(_REAP_SECONDS)
        self._dead.clear()


async def _received(sock: socket.socket, size: int) -> bytearray:
    loop = asyncio.get_running_loop()
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = await loop.sock_recv_into(sock, view[got:])
        if not count:
            raise EOFError("it hung up")
        got += count
    return data
