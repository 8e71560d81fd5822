"""A TCP relay on loopback that loses the server's answer to a chosen request, as a network can."""

from __future__ import annotations

import asyncio
from types import TracebackType

from tests.support.mariadb import LOOPBACK


class Relay:
    """Passes bytes between clients and (`host`, `port`); the answer to a request that holds `losing` never arrives.

    The server gets the request and answers it; then both connections end. That happens `times` times.
    """

    def __init__(self, host: str, port: int, *, losing: bytes, times: int = 1) -> None:
        self.port = 0
        self.lost = 0
        self._to = (host, port)
        self._losing = losing
        self._times = times
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server_reader, server_writer = await asyncio.open_connection(*self._to)
        losing = asyncio.Event()

        async def requests() -> None:
            while data := await reader.read(65536):
                if self._losing in data and self.lost < self._times:
                    losing.set()
                server_writer.write(data)

        async def answers() -> None:
            while data := await server_reader.read(65536):
                if losing.is_set():
                    self.lost += 1
                    return
                writer.write(data)

        ways = [asyncio.create_task(way) for way in (requests(), answers())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for each in (writer, server_writer):
                each.close()
