"""The event bus: a plain asyncio reader of the master's publisher socket. It never stops reading.

An unread bus makes the 3006 EventPublisher grow without limit, and a slow reader is thrown off on
3007 and 3008; so the callback that gets the events must be quick and must not wait for anything.
Salt's own client costs two to twenty times as much CPU per event, and differs in all three series.

Frames
    A msgpack map ``{"head": {}, "body": <bytes>}``. 3007.15 and 3008.3 send them back to back
    (``frame_msg``, salt/transport/frame.py); 3006.28 puts a 4-byte big-endian length before each
    (``frame_msg_ipc``), which earlier 3006 releases did not. The first byte of a stream tells them
    apart: ``0x82`` is a map of two, and as the first byte of a length would mean 2 GiB.

Gaps
    The bus has no replay and no numbering: what was published while nobody listened is gone. Every
    end of a stream is therefore reported as a possible gap.

What comes in is from strangers: a frame over 64 MiB or anything that is no frame ends the connection,
and the next one begins at a frame's start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgpack

from .errors import GarbageError

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 1024 * 1024
_RECONNECT_FIRST, _RECONNECT_MAX = 0.05, 1.0  # seconds
_SHORT_LIVED = 1.0  # seconds
_BREATH_SECONDS = 0.04
_FULL_BYTES, _FULL_EVENTS, _FULL_SHARE = 128 * 1024, 150, 0.75
"""After a read the next waits up to 40 ms for more to come: at 1,500 events a second each would else wake the loop by
itself, which costs more than everything else that the reader does. The kernel's buffer holds what comes meanwhile, 208
KiB or, of small events, some 170: the wait ends when three quarters of 128 KiB or 150 events will have come at the pace
of the last read, and a read that found as much as that is followed by the next at once. Whoever gets the events is
told how long they may have waited."""
_READ_BYTES = 256 * 1024
_ANEW_BYTES = 8 * 1024 * 1024
_FIXMAP_2 = 0x82


Buffer = bytes | memoryview


class Parser(Protocol):
    """Bytes in, bodies of whole frames out.

    Raises:
        GarbageError: what was fed is not frames; the parser is of no more use.
    """

    def feed(self, data: Buffer) -> list[bytes]: ...


def parser_for(first: Buffer) -> Parser:
    """The parser for a stream that begins with ``first`` (one byte or more)."""
    return BareParser() if first[0] == _FIXMAP_2 else PrefixedParser()


class BareParser:
    """Frames back to back: 3007, 3008, and 3006 before its length prefix."""

    def __init__(self) -> None:
        self._unpacker = _unpacker()
        self._fed = self._unread = 0

    def feed(self, data: Buffer) -> list[bytes]:
        """The bodies of the frames that ``data`` completes."""
        try:
            self._unpacker.feed(data)
            self._fed += len(data)
            bodies = [_body(frame) for frame in self._unpacker] if self._fed < _ANEW_BYTES else self._last(data)
        except (ValueError, msgpack.exceptions.UnpackException) as exc:
            raise GarbageError(f"not a frame of the event bus: {exc!r}") from exc
        self._unread = 0 if bodies else self._unread + len(data)
        if self._unread > MAX_FRAME_BYTES:
            raise GarbageError(f"a frame of more than {MAX_FRAME_BYTES} bytes on the event bus")
        return bodies

    def _last(self, data: Buffer) -> list[bytes]:
        """The same, and from then on by another unpacker: one never gives back what a huge frame took."""
        bodies: list[bytes] = []
        whole = 0
        for frame in self._unpacker:
            bodies.append(_body(frame))
            whole = self._unpacker.tell()
        if bodies:
            left = data[len(data) - (self._fed - whole) :]
            self._unpacker, self._fed = _unpacker(), len(left)
            self._unpacker.feed(left)
        return bodies


class PrefixedParser:
    """Each frame after its length, four bytes big-endian: 3006."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: Buffer) -> list[bytes]:
        """The bodies of the frames that ``data`` completes."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) >= start + 4:
            end = start + 4 + int.from_bytes(buffer[start : start + 4], "big")
            if end - start - 4 > MAX_FRAME_BYTES:
                raise GarbageError(f"a frame of {end - start - 4} bytes on the event bus")
            if len(buffer) < end:
                break
            unpacker = _unpacker()
            try:
                unpacker.feed(memoryview(buffer)[start + 4 : end])
                bodies.append(_body(unpacker.unpack()))
            except (ValueError, msgpack.exceptions.UnpackException) as exc:
                raise GarbageError(f"not a frame of the event bus: {exc!r}") from exc
            start = end
        del buffer[:start]
        return bodies


def _unpacker() -> msgpack.Unpacker:
    # raw: keys stay bytes, which saves decoding them; and an old peer's body may be a msgpack str.
    return msgpack.Unpacker(
        raw=True, max_buffer_size=2 * MAX_FRAME_BYTES, max_bin_len=MAX_FRAME_BYTES, max_str_len=MAX_FRAME_BYTES,
        max_array_len=64, max_map_len=64, max_ext_len=0,
    )  # fmt: skip


def _body(frame: Any) -> bytes:
    body = frame.get(b"body") if isinstance(frame, dict) else None
    if not isinstance(body, bytes):
        raise GarbageError("not a frame of the event bus: no body in it")
    return body


class BusReader(asyncio.BufferedProtocol):
    """Reads the bus for as long as :meth:`run` runs; connects again by itself.

    ``on_events`` gets the bytes of the events of each read, and for how many seconds at most they waited in the
    kernel; ``on_gap`` is told of every end of a stream.
    """

    def __init__(
        self, opts: Mapping[str, Any], *, on_events: Callable[[list[bytes], float], None], on_gap: Callable[[], None]
    ) -> None:
        self.events_seen = 0
        self.connects = 0
        self.garbage = 0
        self.connected = False
        self._ipc = opts.get("ipc_mode", "ipc") == "ipc"
        self._socket = Path(opts["sock_dir"]) / "master_event_pub.ipc"
        self._host = "::1" if opts.get("ipv6") else "127.0.0.1"
        self._port = int(opts.get("tcp_master_pub_port", 4512))
        self._on_events = on_events
        self._on_gap = on_gap
        self._parser: Parser | None = None
        # One buffer for all reads: asyncio's own reads each take 256 KiB anew, which the kernel has to clear.
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._transport: asyncio.Transport | None = None
        self._lost: asyncio.Event = asyncio.Event()
        self._read_at = 0.0
        self._breath = 0.0
        self._finishing = False

    @property
    def address(self) -> str:
        """Where the master publishes, for people."""
        return str(self._socket) if self._ipc else f"{self._host}:{self._port}"

    async def run(self) -> None:
        """Connects, reads until the stream ends, and connects again; until cancelled."""
        loop = asyncio.get_running_loop()
        delay = _RECONNECT_FIRST
        quiet = False
        try:
            while True:
                try:
                    await self._connect()
                except OSError as exc:
                    if not quiet:
                        log.info("The event bus at %s is not there yet (%s); trying on", self.address, exc)
                    quiet = True
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, _RECONNECT_MAX)
                    continue
                log.info("Reading the event bus at %s", self.address)
                quiet = False
                began = loop.time()
                await self._lost.wait()
                log.warning("The event bus at %s ended; events may have passed unseen", self.address)
                self._on_gap()
                # A publisher that threw off all its readers (3008, at 10,000 outstanding writes) goes on
                # publishing: every millisecond counts. One that ends each connection at once is let be.
                if loop.time() - began < _SHORT_LIVED:
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, _RECONNECT_MAX)
                else:
                    delay = _RECONNECT_FIRST
        finally:
            if self._transport is not None:
                self._transport.close()

    async def finish(self) -> None:
        """Takes in what was published until now and waits in the kernel; then cancel :meth:`run`."""
        self._finishing = True
        if self._transport is not None:
            self._transport.resume_reading()
        await asyncio.sleep(2 * _BREATH_SECONDS)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._lost.clear()
        if self._ipc:
            await loop.create_unix_connection(lambda: self, str(self._socket))
        else:
            await loop.create_connection(lambda: self, self._host, self._port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: a new stream begins."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parser = None
        self._read_at, self._breath = asyncio.get_running_loop().time(), 0.0
        self.connected = True
        self.connects += 1

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (asyncio's signature)
        """asyncio: where to put what comes."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: bytes came; whole events go on at once."""
        data = self._buffer[:nbytes]
        if self._parser is None:
            self._parser = parser_for(data)
        try:
            bodies = self._parser.feed(data)
        except GarbageError as exc:
            self.garbage += 1
            log.error("%s; connecting again", exc)
            if self._transport is not None:
                self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        waited, pause, self._read_at = self._breath, loop.time() - self._read_at, loop.time()
        full = max(nbytes / _FULL_BYTES, len(bodies) / _FULL_EVENTS)
        self._breath = min(_BREATH_SECONDS, pause * _FULL_SHARE / full) if full < 1 else 0.0
        if self._breath and self._transport is not None and not self._finishing:
            self._transport.pause_reading()
            loop.call_later(self._breath, self._transport.resume_reading)
        self.events_seen += len(bodies)
        self._on_events(bodies, waited)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        """asyncio: the stream ended."""
        self.connected = False
        self._transport = None
        self._lost.set()
