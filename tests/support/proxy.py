"""A TCP proxy on loopback that can do to a connection what a network does: delay, throttle, swallow, reset, refuse.

It runs an event loop in a thread of its own, and its methods may be called from any thread: one class serves the
asynchronous tests (``async with``) and the synchronous ones (``with``). Every fault lasts until `heal`. Each counts how
often it bit, so that a test can fail when its fault never did.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from tests.support.mariadb import LOOPBACK, free_port

_CHUNK: Final = 65536
_TICK: Final = 0.05  # seconds that a throttled way passes bytes for at once
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close() throws away what was not sent, and sends RST
_PATIENCE: Final = 30.0
_LONGEST_NEEDLE: Final = 256


class _Trap:
    """What to do when a request holds `needle`; the trap is spent after `times` requests."""

    def __init__(self, needle: bytes, times: int, spring: Callable[[_Link], None]) -> None:
        self.needle = needle
        self.times = times
        self.spring = spring

    def is_in(self, before: bytes, data: bytes) -> bool:
        """Whether `needle` ends in `data`, which came after `before`."""
        overlap = before[len(before) - len(self.needle) + 1 :] if len(before) >= len(self.needle) else before
        return self.needle in overlap + data


class _Link:
    """A client's connection and the one to the server that goes with it."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.task: asyncio.Task[None] | None = None
        self.lose_next_answer = False
        self.reset = False

    def close(self) -> None:
        for each in (self.client, self.server):
            if each is not None and each.fileno() >= 0:
                if self.reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.close()


class Proxy:
    """Passes bytes between its clients and (`to_host`, `to_port`).

    It listens on `host` and `port`, which stay the same for its life; several proxies on one `port` and different
    loopback addresses stand for the hosts of one `mysql.host` list.
    """

    def __init__(self, to_host: str, to_port: int, *, host: str = LOOPBACK, port: int | None = None) -> None:
        self.host = host
        self.port = port or free_port()
        self.connections = 0
        """Connections accepted."""
        self.delayed = 0
        """Answers that `delay` held back."""
        self.throttled = 0
        """Bytes that passed while `throttle` was on."""
        self.swallowed = 0
        """Connections that got nothing, and pieces of data that were held back, by `blackhole`."""
        self.resets = 0
        """Connections that `reset` ended."""
        self.lost = 0
        """Answers that `lose_answer` took."""
        self._to = (to_host, to_port)
        self._delay = 0.0
        self._rate = 0
        self._traps: list[_Trap] = []
        self._swaps: dict[bytes, bytes] = {}
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop
        self._passable: asyncio.Event
        self._thread: threading.Thread

    def __enter__(self) -> Proxy:
        self._loop = asyncio.new_event_loop()
        self._passable = asyncio.Event()
        self._passable.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        try:
            self._do(self._listen)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_PATIENCE)
        self._end()

    async def __aenter__(self) -> Proxy:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    # The faults

    def delay(self, seconds: float) -> None:
        """Every answer comes `seconds` late: the time of a round trip."""
        self._do(lambda: setattr(self, "_delay", seconds))

    def throttle(self, bytes_per_second: int) -> None:
        """Each way of each connection passes so many bytes in a second."""
        self._do(lambda: setattr(self, "_rate", bytes_per_second))

    def blackhole(self, at: bytes = b"") -> None:
        """Nothing passes any more: new connections get no answer, those that are open stay open and silent.

        With `at`, this begins behind the next request that holds these bytes: the server gets and does it (a request
        of less than 64 KiB), and its answer stays away. What is held back when `heal` comes is passed then, as TCP
        would send it again.
        """
        if at:
            self._do(lambda: self._traps.append(_Trap(at, 1, self._silence)))
        else:
            self._do(self._silence)

    def reset(self, at: bytes = b"", times: int = 1) -> None:
        """RST to both ends of every open connection, now.

        With `at`: to both ends of the connection whose request holds these bytes, instead of passing it on; `times`
        times.
        """
        if at:
            self._do(lambda: self._traps.append(_Trap(at, times, self._reset)))
        else:
            self._do(self._reset_all)

    def refuse(self) -> None:
        """New connections are refused; those that are open go on."""
        self._do(self._stop_listening)

    def lose_answer(self, to: bytes = b"COMMIT", times: int = 1) -> None:
        """The server gets the request that holds `to` and answers it; then both connections end without the answer."""
        self._do(lambda: self._traps.append(_Trap(to, times, self._lose)))

    def swap(self, text: bytes, by: bytes) -> None:
        """Put another text of the same length into requests that hold `text`, as a proxy that knows better does."""
        assert len(text) == len(by)
        self._do(lambda: self._swaps.update({text: by}))

    def heal(self) -> None:
        """No fault any more."""

        def heal() -> None:
            self._delay, self._rate = 0.0, 0
            self._traps.clear()
            self._swaps.clear()
            self._passable.set()
            if self._listener is None:
                self._listen()

        self._do(heal)

    # In the loop's thread

    def _do(self, work: Callable[[], Any]) -> None:
        async def run() -> None:
            work()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(_PATIENCE)

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
            listener.listen(128)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._loop.add_reader(listener, self._accept, listener)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the client has gone again
            return
        client.setblocking(False)
        self.connections += 1
        link = _Link(client)
        self._links.add(link)
        link.task = self._loop.create_task(self._serve(link))
        link.task.add_done_callback(functools.partial(self._forget, link))  # also of one that never began

    def _forget(self, link: _Link, _task: asyncio.Task[None]) -> None:
        self._links.discard(link)
        link.close()

    async def _serve(self, link: _Link) -> None:
        with contextlib.suppress(OSError):  # one of the ends is gone, which ends the other
            if not self._passable.is_set():
                self.swallowed += 1
                await self._passable.wait()
                if _ended_by_peer(link.client):
                    return
            link.server = server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            server.setblocking(False)
            await self._loop.sock_connect(server, self._to)
            for each in (link.client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._pass_both_ways(link, server)

    async def _pass_both_ways(self, link: _Link, server: socket.socket) -> None:
        ways = {
            self._loop.create_task(self._pass_requests(link, server)),
            self._loop.create_task(self._pass_answers(link, server)),
        }
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                way.result()
        finally:
            for way in ways:
                await _ended(way)

    async def _pass_requests(self, link: _Link, server: socket.socket) -> None:
        before = b""  # a needle may lie across two pieces
        while data := await self._receive(link.client):
            await self._through_blackhole()
            for trap in [trap for trap in self._traps if trap.is_in(before, data)]:
                trap.times -= 1
                if not trap.times:
                    self._traps.remove(trap)
                trap.spring(link)
            before = (before + data)[-_LONGEST_NEEDLE:]
            if link.reset:
                return
            for text, by in self._swaps.items():
                data = data.replace(text, by)
            await self._loop.sock_sendall(server, data)

    async def _pass_answers(self, link: _Link, server: socket.socket) -> None:
        while data := await self._receive(server):
            if link.lose_next_answer:
                self.lost += 1
                return
            if self._delay:
                self.delayed += 1
                await asyncio.sleep(self._delay)
            await self._through_blackhole()
            await self._loop.sock_sendall(link.client, data)

    async def _through_blackhole(self) -> None:
        if not self._passable.is_set():
            self.swallowed += 1
            await self._passable.wait()

    async def _receive(self, end: socket.socket) -> bytes:
        data = await self._loop.sock_recv(end, min(_CHUNK, max(1, int(self._rate * _TICK))) if self._rate else _CHUNK)
        if self._rate:
            self.throttled += len(data)
            await asyncio.sleep(len(data) / self._rate)
        if not data:
            await self._passable.wait()  # nor does the end of a stream get through a blackhole
        return data

    def _silence(self, _link: _Link | None = None) -> None:
        self._passable.clear()

    def _lose(self, link: _Link) -> None:
        link.lose_next_answer = True

    def _reset_all(self) -> None:
        for link in self._links:
            self._reset(link)

    def _reset(self, link: _Link) -> None:
        if not link.reset and link.task is not None:
            self.resets += 1
            link.reset = True
            link.task.cancel()

    async def _close(self) -> None:
        self._stop_listening()
        for link in list(self._links):
            assert link.task is not None
            await _ended(link.task)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop.close()


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel a task of ours and see it end."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def _ended_by_peer(end: socket.socket) -> bool:
    """Whether the stream is over and nothing is left to be read."""
    try:
        return end.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
