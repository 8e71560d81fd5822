"""Large events: the decoder takes them apart, and whatever one holds, others are not late by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from salt_mysql_engine import records, saltevent, settings
from salt_mysql_engine.decoder import Decoder, DecoderDied
from salt_mysql_engine.errors import ServerUnavailable
from salt_mysql_engine.items import Large
from salt_mysql_engine.journalfile import CONFIRMED, STUB
from salt_mysql_engine.large import setup_of
from tests.support.mariadb import wait_until
from tests.support.oldtables import make_2014, make_version_2
from tests.support.scratch import Scratch
from tests.support.shipping import MASTER, Cache, Shipping, body, jid, return_data, returned

Make = Callable[..., Shipping]
NOISE = random.Random(1).randbytes(6_300_000)
SOON = {"flush_interval": 0.05}
TEXT = "line ü\n" * 100_000


def with_value(job: str, minion: str, packed: bytes) -> bytes:
    """A return whose value is these bytes of msgpack."""
    return returned(job, minion, []).replace(b"\xa6return\x90", b"\xa6return" + packed)


def noise(size: int) -> bytes:
    """A text of bytes that are no UTF-8."""
    return b"\xdb" + size.to_bytes(4, "big") + NOISE[:size]


def nested(levels: int, times: int) -> bytes:
    """Lists in lists, and that several times."""
    return b"\xdd" + times.to_bytes(4, "big") + (b"\x91" * levels + b"\x90") * times


def many(count: int) -> bytes:
    """A map of so many keys."""
    return b"\xdf" + count.to_bytes(4, "big") + b"".join(b"\xa8%08d\xc0" % n for n in range(count))


HOSTILE = {
    "bytes that are no text": noise(6_300_000),
    "empty maps": b"\xdd" + (12_000_000).to_bytes(4, "big") + b"\x80" * 12_000_000,
    "deep lists": nested(400, 10_000),
    "keys": many(500_000),
    "control characters": b"\xdb" + (8_000_000).to_bytes(4, "big") + b"\x01" * 8_000_000,
    "too much": b"\xc6" + (40_000_000).to_bytes(4, "big") + bytes(40_000_000),
}


async def letters(ship: Shipping) -> list[Any]:
    return list(await ship._in_journal(ship.journal.dead_letters))


async def killed_once(ship: Shipping) -> None:
    """Kills the decoder over its first event."""
    await ship.until(lambda: ship.decoder.pid is not None)
    assert ship.decoder.pid is not None
    os.kill(ship.decoder.pid, signal.SIGKILL)
    await ship.until(lambda: ship.decoder.deaths == 1)


class Others:
    """Small returns that come all the time, and how late they are written."""

    def __init__(self, ship: Shipping) -> None:
        self.decoder_bytes = 0
        self._ship = ship
        self._number = 1000
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Others:
        self._task = asyncio.create_task(self._come())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _come(self) -> None:
        while True:
            self._number += 1
            self._ship.capture.on_events([returned(jid(self._number), "small")])
            await self._ship.capture.drain()
            with contextlib.suppress(psutil.Error, TypeError):
                memory = psutil.Process(self._ship.decoder.pid or 0).memory_info()
                self.decoder_bytes = max(self.decoder_bytes, memory.rss)
            await asyncio.sleep(0.02)

    @property
    def latest(self) -> float:
        """Seconds from capture to COMMIT of the one that was written latest."""
        return max(self._ship.writer.lags, default=0.0)


@pytest.mark.parametrize("what", HOSTILE)
async def test_whatever_one_event_holds_others_are_not_late_by_it(shipping: Make, what: str) -> None:
    bodies = [with_value(jid(2), "web1", HOSTILE[what])]
    async with shipping(**SOON) as ship:
        await ship.ship(returned(jid(1), "web1"))
        async with Others(ship) as others:
            ship.writer.lags.clear()
            before = psutil.Process().memory_info().rss
            await ship.take(*bodies)
            bodies.clear()
            last = await ship._in_journal(ship.journal.newest_seq)

            async def is_done() -> bool:
                oldest = await ship._in_journal(ship.journal.oldest_seq)
                return oldest is None or oldest > last

            deadline = time.monotonic() + 60
            while not await is_done():
                assert time.monotonic() < deadline, await ship.books()
                await asyncio.sleep(0.01)
            assert others.latest < 1.0
            assert psutil.Process().memory_info().rss - before < 150e6
            assert others.decoder_bytes < 250e6
        books = await ship.settled()
        # One that was cancelled while it was appended is captured twice.
        assert books["written"] + books["dead_letters"] + books["duplicates"] == books["captured"]
        assert books["duplicates"] <= 1


async def test_a_large_return_is_the_row_that_a_small_one_would_be(database: Scratch, shipping: Make) -> None:
    data = return_data(jid(1), "web1", {"stdout": TEXT, b"\xff": [1.5, None, {"a": NOISE[:99]}]}, retcode=2)
    event = body(f"salt/job/{jid(1)}/ret/web1", data)
    opened = saltevent.open_event(event)
    assert isinstance(opened, saltevent.Opened)
    selection = records.Selection(settings.combine({}, {}), master_id=MASTER)
    record = records.interpret(opened, 0.0, selection)
    assert isinstance(record, records.Record)
    assert record.ret is not None
    async with shipping(**SOON, events=["salt/job/*"]) as ship:
        books = await ship.ship(event)
        assert ship.decoder.pid is not None
    assert books["written"] == 1
    row = database.row("salt_returns")
    assert (row["return"], row["full_ret"]) == (record.ret.return_json, record.ret.full_ret_json)
    assert (row["fun"], row["success"]) == ("test.ping", "1")
    assert json.loads(database.row("jids")["load"])["fun"] == "test.ping"
    assert json.loads(database.row("salt_events")["data"])["return"]["stdout"] == TEXT


async def test_a_large_return_that_comes_again_is_a_duplicate_and_another_one_differs(
    database: Scratch, shipping: Make
) -> None:
    large = returned(jid(1), "web1", TEXT)
    async with shipping(**SOON) as ship:
        books = await ship.ship(large)
        books = await ship.ship(large)
        assert (books["written"], books["duplicates"], ship.large_writer.conflicts) == (1, 1, 0)
        books = await ship.ship(returned(jid(1), "web1", TEXT + "!"))
        assert (books["written"], books["duplicates"], ship.large_writer.conflicts) == (1, 2, 1)
    assert json.loads(database.row("salt_returns")["return"]) == TEXT


async def test_a_large_whole_value_takes_a_trimmed_ones_place(database: Scratch, shipping: Make) -> None:
    async with shipping(**SOON) as ship:
        await ship.ship(returned(jid(1), "web1", saltevent.TRIMMED))
        await ship.ship(returned(jid(1), "web1", f"it's \\ {TEXT}"))
    row = database.row("salt_returns")
    assert json.loads(row["return"]) == json.loads(row["full_ret"])["return"] == f"it's \\ {TEXT}"


@pytest.mark.parametrize("make", [make_2014, make_version_2])
async def test_large_returns_fit_tables_of_an_older_shape(
    database: Scratch, shipping: Make, make: Callable[[Scratch], None]
) -> None:
    make(database)
    async with shipping(**SOON) as ship:
        books = await ship.ship(returned(jid(1), "web1", f"\U0001f600{TEXT}"), returned(jid(2), "web1"))
        assert books["written"] == 2
        books = await ship.ship(returned(jid(3), "web1", f"\U0001f600{TEXT}"))
        assert books["written"] == 3
    assert {json.loads(row["return"]) for row in database.rows("salt_returns")} == {f"\U0001f600{TEXT}", True}


async def test_a_large_row_beyond_max_allowed_packet_is_a_dead_letter_until_that_is_raised(
    database: Scratch, shipping: Make
) -> None:
    large = returned(jid(1), "web1", TEXT)
    with database.globally(max_allowed_packet=1024 * 1024):
        async with shipping(**SOON) as ship:
            books = await ship.ship(large, returned(jid(2), "web1", TEXT[:200_000]))
            assert (books["written"], books["dead_letters"]) == (1, 1)
            (letter,) = await letters(ship)
            assert (letter.reason, letter.body) == ("refused", large)
            assert "max_allowed_packet (1048576 bytes); raise that" in letter.error
    assert database.count("jids") == 2
    async with shipping(**SOON) as ship:
        assert await ship.retry() == 1
        assert (await ship.settled())["written"] == 2


@pytest.mark.parametrize("size", [2_000_000, 200_000], ids=["large", "small"])
async def test_a_row_that_was_too_large_is_taken_once_max_allowed_packet_is_raised_while_it_runs(
    database: Scratch, shipping: Make, size: int
) -> None:
    with database.globally(max_allowed_packet=size):
        async with shipping(**SOON) as ship:
            books = await ship.ship(returned(jid(1), "web1", "x" * size), returned(jid(2), "web1"))
            assert (books["written"], books["dead_letters"]) == (1, 1)
            database.sql("SET GLOBAL max_allowed_packet = 16777216")
            assert await ship.retry() == 1
            assert (await ship.settled())["written"] == 2


async def test_a_batch_of_costly_small_events_does_not_hold_up_the_loop_in_one_piece(shipping: Make) -> None:
    costly = nested(400, 18)
    async with shipping(flush_interval=0.2) as ship:
        await ship.ship(returned(jid(999), "web1"))
        gaps: list[float] = []

        async def beat() -> None:
            while True:
                before = time.thread_time()
                await asyncio.sleep(0.001)
                gaps.append(time.thread_time() - before)

        beating = asyncio.create_task(beat())
        began = time.thread_time()
        books = await ship.ship(*(with_value(jid(number), "web1", costly) for number in range(1, 151)))
        took = time.thread_time() - began
        beating.cancel()
        assert books["written"] == 151
        assert max(gaps) < took / 5


async def test_a_decoder_that_is_killed_costs_a_start(database: Scratch, shipping: Make) -> None:
    async with shipping(**SOON) as ship:
        await ship.take(returned(jid(1), "web1", TEXT))
        await killed_once(ship)
        assert (await ship.settled())["written"] == 1


async def test_a_decoder_that_is_killed_over_rows_for_other_tables_makes_no_dead_letter(shipping: Make) -> None:
    async with shipping(paused=True, **SOON) as ship:
        await ship.take(with_value(jid(1), "web1", noise(1_000_000)))
        ship.large.make(1)
        await ship.until(lambda: bool(ship.large._made))
        (item,) = ship.large._made
        ship.large.fit = ship.large.fit._replace(max_packet=2**29)
        ship.decoder.seconds = 0.0001
        with pytest.raises(ServerUnavailable, match="ended over one"):
            await ship.large.fitted(item)
        assert not await letters(ship)
        ship.decoder.seconds = 20
        fitted = (await ship.large.fitted(item)).outcome
        assert isinstance(fitted, Large)
        assert fitted.fit.max_packet == 2**29


@pytest.mark.parametrize("program", ["", "/nowhere/python", "/bin/false", "/bin/echo"])
async def test_while_no_decoder_can_be_started_large_events_wait(
    database: Scratch, shipping: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, program: str
) -> None:
    async with shipping(**SOON) as ship:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", program)
            await ship.take(returned(jid(1), "web1", TEXT), returned(jid(2), "web1"))
            await ship.until(lambda: ship.decoder.deaths >= 3)
            assert database.count("salt_returns") == 1
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (2, 0)
    assert caplog.text.count("Large events wait") == 1


async def test_an_event_that_ends_two_decoders_is_a_dead_letter_and_stays_one(
    database: Scratch, shipping: Make
) -> None:
    async with shipping(**SOON) as ship:
        ship.decoder.seconds = 0.001
        books = await ship.ship(with_value(jid(1), "web1", noise(1_000_000)), returned(jid(2), "web1"))
        assert (books["written"], books["dead_letters"], ship.decoder.deaths) == (1, 1, 2)
        (letter,) = await letters(ship)
        assert (letter.reason, letter.jid, letter.minion) == ("decoder", jid(1), "web1")
        assert "it took more than 0.001 s" in letter.error
        ship.decoder.seconds = 20
        assert (await ship.ship(returned(jid(3), "web1", TEXT)))["written"] == 2
    async with shipping(**SOON) as ship:
        assert (await ship.drain())["dead_letters"] == 1
        assert ship.decoder.deaths == 0
        assert await ship.retry() == 1
        assert (await ship.settled())["written"] == 3


async def test_a_large_return_is_what_the_job_cache_holds(database: Scratch, cache: Cache, verifying: Make) -> None:
    genuine, forged = returned(jid(1), "web1", TEXT), returned(jid(1), "web1", TEXT[:-1])
    cache.accept(genuine)
    async with verifying() as ship:
        books = await ship.ship(forged)
        assert (books["written"], ship.verifier.corrected) == (1, 1)
        assert (await ship.ship(genuine))["duplicates"] == 1
        assert ship.verifier.corrected == 1
    assert json.loads(database.row("salt_returns")["return"]) == TEXT


async def test_a_small_event_of_a_large_return_is_read_by_the_decoder(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    cache.accept(returned(jid(1), "web1", TEXT))
    async with verifying() as ship:
        assert (await ship.ship(returned(jid(1), "web1", "forged")))["written"] == 1
        assert ship.decoder.pid is not None
    assert json.loads(database.row("salt_returns")["return"]) == TEXT


async def test_a_large_return_waits_for_its_copy_in_the_job_cache_and_is_a_dead_letter_without(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    first, second = returned(jid(1), "web1", TEXT), returned(jid(2), "web1", TEXT)
    async with verifying(verify_wait_seconds=2.0) as ship:
        await ship.take(first, second)
        await ship.until(lambda: ship.verifier.waiting == 2)
        cache.accept(first)
        books = await ship.settled()
        assert (books["written"], books["dead_letters"]) == (1, 1)
        (letter,) = await letters(ship)
        assert (letter.reason, letter.jid, letter.body) == ("unconfirmed", jid(2), second)
        cache.accept(second)
        assert await ship.retry() == 1
        assert (await ship.settled())["written"] == 2


async def test_large_events_are_confirmed_while_the_database_is_away(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    genuine = returned(jid(1), "web1", TEXT)
    cache.accept(genuine)
    async with verifying(mysql={"mysql.port": 1}) as ship:
        await ship.take_at(time.time() - 60, returned(jid(1), "web1", "forged"))
        await ship.until(lambda: ship._read("SELECT state FROM events") == [(CONFIRMED,)])
        cache.forget()
    async with verifying() as ship:
        assert (await ship.drain())["written"] == 1
    assert json.loads(database.row("salt_returns")["return"]) == TEXT


async def test_what_is_beyond_the_limits_is_a_dead_letter_unopened_and_the_job_cache_still_has_it(
    database: Scratch, cache: Cache, verifying: Make
) -> None:
    huge = returned(jid(1), "web1", "x" * 3_000_000)
    cache.accept(huge)
    async with verifying(max_event_bytes=1024 * 1024) as ship:
        books = await ship.ship(huge, returned(jid(2), "web1", "x" * 3_000_000))
        assert (books["written"], books["dead_letters"]) == (0, 2)
        assert ship.decoder.pid is None
        for letter in await letters(ship):
            assert (letter.reason, letter.state) == ("too_large", STUB)
            assert "max_event_bytes is 1,048,576" in letter.error
            assert len(letter.body) < 500
    async with verifying() as ship:
        assert await ship.retry() == 2
        books = await ship.settled()
        assert (books["written"], books["ignored"]) == (1, {"forgotten": 1})
    assert len(json.loads(database.row("salt_returns")["return"])) == 3_000_000


async def test_too_many_objects_or_too_much_memory_make_a_dead_letter(database: Scratch, shipping: Make) -> None:
    async with shipping(**SOON, max_event_objects=300_000) as ship:
        await ship.ship(
            with_value(jid(1), "web1", b"\xdd" + (300_001).to_bytes(4, "big") + b"\x80" * 300_001),
            with_value(jid(2), "web1", (b"\x92" + b"\xdd" + (200_000).to_bytes(4, "big") + b"\xc0" * 200_000) * 2),
            with_value(jid(3), "web1", noise(6_300_000)),
            returned(jid(4), "web1", TEXT),
        )
        await ship.settled()
        found = {letter.jid: (letter.reason, letter.error) for letter in await letters(ship)}
        assert ship.decoder.deaths <= 1  # the one that ran out of memory ends by itself
    assert {reason for reason, _ in found.values()} == {"too_large"}
    assert "max_event_objects" in found[jid(1)][1]
    assert set(found) >= {jid(1), jid(3)}
    assert database.row("salt_returns")["jid"] == jid(4)


def test_the_decoder_ends_with_the_engine_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        "import asyncio, time\n"
        "from salt_mysql_engine import settings\n"
        "from salt_mysql_engine.decoder import Decoder\n"
        "from salt_mysql_engine.large import setup_of\n"
        "async def main():\n"
        "    decoder = Decoder(setup_of({'id': 'm'}, settings.combine({}, {}), peers=None, has_cache=False))\n"
        "    print((await decoder.ask('nothing', [], [b'x'])).said, decoder.pid, flush=True)\n"
        "    time.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline().split()[-1])
        decoder = psutil.Process(pid)
        os.kill(pid, signal.SIGTERM)  # as a service manager sends it to all of a unit
        os.kill(pid, signal.SIGINT)
        assert decoder.is_running()
        engine.kill()
        wait_until(lambda: not psutil.pid_exists(pid), timeout=10, what="the decoder's end")


async def test_a_decoder_that_was_taken_over_cannot_fill_the_engines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import re, socket, struct, sys, time\n"
        "sock = socket.socket(fileno=int(re.search(r'main[(]([0-9]+),', sys.argv[3])[1]))\n"
        "sock.sendall(b'+' + struct.pack('>IQ', 3, 2**33) + b'xxx')\n"
        "time.sleep(600)\n"
    )
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    decoder = Decoder(setup_of({"id": "m"}, settings.combine({}, {}), peers=None, has_cache=False))
    with pytest.raises(DecoderDied, match="an answer of 3 and 8589934592 bytes"):
        await decoder.ask("make", [], [b"x"])
    assert decoder.pid is None
    await decoder.end()
