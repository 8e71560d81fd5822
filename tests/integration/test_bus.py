"""The bus reader against real sockets: a publisher that restarts, that was not there, that speaks nonsense."""

from __future__ import annotations

import asyncio
import concurrent.futures
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest

from salt_mysql_engine.bus import MAX_FRAME_BYTES, BusReader
from salt_mysql_engine.capture import Capture
from salt_mysql_engine.journal import Journal
from salt_mysql_engine.records import Selection
from salt_mysql_engine.settings import combine
from tests.support.mariadb import free_port

PATIENCE = 20.0


def bare(body: bytes) -> bytes:
    """A frame as 3007 and 3008 send it."""
    return msgpack.packb({"head": {}, "body": body}, use_bin_type=True)


def prefixed(body: bytes) -> bytes:
    """A frame as 3006 sends it."""
    frame = bare(body)
    return struct.pack(">I", len(frame)) + frame


class Publisher:
    """Sends what it is told to everyone who is connected."""

    def __init__(self, address: Path | int) -> None:
        self._address = address
        self._server: asyncio.Server | None = None
        self.readers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        if isinstance(self._address, Path):
            self._server = await asyncio.start_unix_server(self._take, str(self._address))
        else:
            self._server = await asyncio.start_server(self._take, "127.0.0.1", self._address)

    async def _take(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.readers.append(writer)

    async def send(self, *frames: bytes) -> None:
        await until(lambda: bool(self.readers))
        for writer in self.readers:
            writer.write(b"".join(frames))
            await writer.drain()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self.readers:
                writer.close()
            self.readers.clear()
            await self._server.wait_closed()
            self._server = None
        if isinstance(self._address, Path):
            self._address.unlink(missing_ok=True)


async def until(condition: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


class Listening:
    """A running reader and what it heard."""

    def __init__(self, opts: dict[str, Any]) -> None:
        self.heard: list[bytes] = []
        self.gaps = 0
        self.reader = BusReader(opts, on_events=lambda bodies, _waited: self.heard.extend(bodies), on_gap=self._gap)
        self._task = asyncio.create_task(self.reader.run())

    def _gap(self) -> None:
        self.gaps += 1

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture(params=["ipc", "tcp"])
async def bus(request: pytest.FixtureRequest, tmp_path_factory: Any) -> AsyncIterator[tuple[Publisher, Listening]]:
    """A publisher that is not started yet, and a reader that already looks for it."""
    folder = tmp_path_factory.mktemp("b")
    port = free_port()
    publisher = Publisher(folder / "master_event_pub.ipc" if request.param == "ipc" else port)
    listening = Listening({"sock_dir": str(folder), "ipc_mode": request.param, "tcp_master_pub_port": port})
    yield publisher, listening
    await listening.stop()
    await publisher.stop()


@pytest.mark.parametrize("frame", [bare, prefixed])
async def test_a_reader_that_was_there_before_the_bus_hears_everything(
    bus: tuple[Publisher, Listening], frame: Callable[[bytes], bytes]
) -> None:
    publisher, listening = bus
    await asyncio.sleep(0.2)  # it has looked in vain by now; nothing tells
    await publisher.start()
    bodies = [b"tag/%d\n\n\x80" % number for number in range(1000)]
    await publisher.send(*map(frame, bodies))
    await until(lambda: len(listening.heard) == 1000)
    assert listening.heard == bodies
    assert (listening.reader.events_seen, listening.reader.connects, listening.gaps) == (1000, 1, 0)


async def test_a_restarted_publisher_is_a_gap_and_is_heard_again(bus: tuple[Publisher, Listening]) -> None:
    publisher, listening = bus
    for round_number in range(3):
        await publisher.start()
        await publisher.send(bare(b"round/%d\n\n\x80" % round_number))
        await until(lambda number=round_number: len(listening.heard) == number + 1)
        await publisher.stop()
        await until(lambda number=round_number: listening.gaps == number + 1)
    assert listening.heard == [b"round/%d\n\n\x80" % number for number in range(3)]
    assert listening.reader.connects == 3


async def test_after_an_upgrade_of_salt_the_other_frame_format_is_understood(
    bus: tuple[Publisher, Listening],
) -> None:
    publisher, listening = bus
    for frame in (prefixed, bare):
        await publisher.start()
        await publisher.send(frame(b"tag\n\n\x80"))
        await until(lambda: len(listening.heard) == listening.reader.connects)
        await publisher.stop()
        await until(lambda: not listening.reader.connected)
    assert listening.heard == [b"tag\n\n\x80"] * 2


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\x00\x00\x05hello", b"\x82nonsense", b"\xff" * 64, struct.pack(">I", MAX_FRAME_BYTES + 1)],
    ids=["prefixed", "bare", "noise", "oversize"],
)
async def test_garbage_is_counted_and_the_next_connection_is_heard(
    bus: tuple[Publisher, Listening], garbage: bytes
) -> None:
    publisher, listening = bus
    await publisher.start()
    await publisher.send(garbage)
    await until(lambda: listening.reader.garbage == 1 and listening.reader.connects == 2)
    publisher.readers.pop(0).close()
    await publisher.send(bare(b"after\n\n\x80"))
    await until(lambda: bool(listening.heard))
    assert listening.heard == [b"after\n\n\x80"]
    assert listening.gaps == 1


async def test_a_reader_that_finishes_has_taken_in_what_was_published_before(bus: tuple[Publisher, Listening]) -> None:
    publisher, listening = bus
    await publisher.start()
    await publisher.send(bare(b"first\n\n\x80"))
    await until(lambda: len(listening.heard) == 1)  # now it takes its breath
    await publisher.send(*[bare(b"tag/%d\n\n\x80" % number) for number in range(2000)])
    await listening.reader.finish()
    assert len(listening.heard) == 2001


async def test_a_frame_of_sixty_four_mebibytes_arrives_whole(bus: tuple[Publisher, Listening]) -> None:
    publisher, listening = bus
    body = b"big\n\n" + bytes(MAX_FRAME_BYTES - 5)
    await publisher.start()
    await publisher.send(bare(body), bare(b"next\n\n\x80"))
    await until(lambda: len(listening.heard) == 2)
    assert listening.heard[0] == body
    assert listening.reader.garbage == 0


@pytest.mark.faults
async def test_no_event_is_in_memory_alone_for_more_than_fifty_milliseconds(
    bus: tuple[Publisher, Listening], tmp_path: Path
) -> None:
    """The kernel's buffer included. A machine with other work may be late now and then, not each time."""
    publisher, listening = bus
    await publisher.start()
    with closing(opened(tmp_path / "journal")) as journal, concurrent.futures.ThreadPoolExecutor(1) as thread:
        sent: list[float] = []
        waits: list[float] = []
        loop = asyncio.get_running_loop()

        def in_journal(function: Callable[..., Any]) -> Any:
            return loop.run_in_executor(thread, function)

        def journalled(count: int, _size: int) -> None:
            waits.extend(loop.time() - sent[place] for place in range(len(waits), len(waits) + count))

        capture = Capture(journal, in_journal, Selection(combine({}, {}), master_id="master"), on_append=journalled)
        listening.reader._on_events = capture.on_events
        running = asyncio.create_task(capture.run())
        for _ in range(20):
            for _ in range(60):
                sent.append(loop.time())
                await publisher.send(bare(f"salt/job/20260329{len(sent):012d}/ret/web1\n\n\x80".encode("latin-1")))
                await asyncio.sleep(0.005)
            await until(lambda: len(waits) == len(sent))
            if max(waits[-60:]) <= 0.05:
                break
        running.cancel()
    assert max(waits[-60:]) <= 0.05


def opened(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.open()
    return journal
