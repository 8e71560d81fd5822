"""The disk under the journal is full, fails, or damages it: nothing ends, nothing is half done, all is counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import capture, writer
from salt_mysql_engine.errors import JournalError
from salt_mysql_engine.journal import Journal, NewEvent
from tests.support.disks import fill, mounted
from tests.support.scratch import Scratch
from tests.support.shipping import Shipping, jid, returned, returns

pytestmark = pytest.mark.faults

Make = Callable[..., Shipping]
MIB = 1024 * 1024
NOWHERE = 1
"""A port at which no server listens: the database is down."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB of its own."""
    with mounted(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again soon."""
    monkeypatch.setattr(capture, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(writer, "_JOURNAL_RETRY_SECONDS", 0.05)


def large(count: int, *, first: int = 1) -> list[bytes]:
    """Returns of 10 KB."""
    return returns(count, first=first, value="x" * 10_000)


@contextlib.asynccontextmanager
async def capturing(ship: Shipping) -> AsyncIterator[None]:
    """The task that journals what the bus brings."""
    task = asyncio.create_task(ship.capture.run())
    try:
        yield
        assert not task.done(), "capture ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def hear(ship: Shipping, bodies: list[bytes]) -> None:
    ship.capture.on_events(bodies)


async def journalled(ship: Shipping) -> None:
    """Until nothing is in memory only."""
    await ship.until(lambda: ship.capture._bytes == ship.capture.dropped == 0)


def stored(database: Scratch) -> set[str]:
    return {row["jid"] for row in database.rows("salt_returns")}


def down(ship: Shipping) -> None:
    ship.mysql["mysql.port"] = NOWHERE


def up(ship: Shipping, database: Scratch) -> None:
    ship.mysql["mysql.port"] = database.mysql["mysql.port"]


# A full disk


@pytest.mark.usefixtures("quick")
async def test_on_a_full_disk_events_are_held_in_memory_and_journalled_once_there_is_room(
    database: Scratch, shipping: Make, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping(small_disk / "journal", flush_interval=0.05) as ship, capturing(ship):
        down(ship)
        hear(ship, returns(10))
        await journalled(ship)
        ballast = fill(small_disk)
        for start in range(100, 1000, 50):
            hear(ship, returns(50, first=start))
            await asyncio.sleep(0)
        await ship.until(lambda: "disk is full" in ship.capture.last_error)
        books = await ship.books()
        assert ship.capture.held + books["pending"] == 910
        assert ship.capture.held > 0
        assert caplog.text.count("holding events in memory") <= 2, "said once"
        ballast.unlink()
        await journalled(ship)
        assert ship.capture.last_error == ""
        up(ship, database)
        books = await ship.settled()
        assert (books["captured"], books["written"], books["dropped"]) == (910, 910, {})
    assert stored(database) == {jid(n) for n in (*range(1, 11), *range(100, 1000))}


@pytest.mark.usefixtures("quick")
async def test_when_memory_is_full_too_what_comes_is_dropped_counted_and_asked_for_again(
    database: Scratch, shipping: Make, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MEMORY_BYTES", 2 * MIB)
    async with shipping(small_disk / "journal", flush_interval=0.05) as ship, capturing(ship):
        lost: list[int] = []
        ship.capture._on_loss = lambda: lost.append(1)
        ballast = fill(small_disk)
        for start in range(1, 1001, 10):
            hear(ship, large(10, first=start))
            assert ship.capture._bytes < 2 * MIB + 20_000, "memory is bounded"
            await asyncio.sleep(0.001)
        assert ship.capture.dropped > 500
        ballast.unlink()
        await journalled(ship)
        books = await ship.settled()
        assert (books["captured"], set(books["dropped"])) == (1000, {"memory_full"})
        assert books["written"] == 1000 - books["dropped"]["memory_full"] > 100
        hear(ship, returns(10, first=2000))
        await ship.until(lambda: bool(lost))
        books = await ship.settled()
        assert books["captured"] == 1010
    assert len(stored(database)) == books["written"]


@pytest.mark.usefixtures("quick")
async def test_with_the_disk_full_the_database_still_gets_rows_and_all_of_them_once_there_is_room(
    database: Scratch, shipping: Make, small_disk: Path
) -> None:
    async with shipping(small_disk / "journal", flush_interval=0.05, batch_size=20) as ship, capturing(ship):
        down(ship)
        hear(ship, large(300))
        await journalled(ship)
        ballast = fill(small_disk)
        hear(ship, large(300, first=1001))
        await ship.until(lambda: "disk is full" in ship.capture.last_error)
        up(ship, database)
        await ship.until(lambda: not ship.writer.failing and ("disk is full" in ship.fault or not ship.journal.pending))
        assert len(stored(database)) >= 20
        ballast.unlink()
        await journalled(ship)
        books = await ship.settled()
        assert (books["captured"], books["written"], books["dropped"], books["duplicates"]) == (600, 600, {}, 0)
    assert len(stored(database)) == 600


@pytest.mark.usefixtures("quick")
async def test_a_journal_that_fills_its_own_disk_still_empties_itself(
    database: Scratch, shipping: Make, small_disk: Path
) -> None:
    """Nobody else will ever make room there."""
    async with shipping(small_disk / "journal", flush_interval=0.05) as ship, capturing(ship):
        down(ship)
        for start in range(1, 3001, 10):
            hear(ship, large(10, first=start))
            await asyncio.sleep(0.002)
        await ship.until(lambda: bool(ship.capture.last_error) or ship.journal.full)
        up(ship, database)
        await ship.until(lambda: ship.capture._bytes == ship.capture.dropped == 0, timeout=30)
        books = await ship.settled(timeout=30)
        assert books["captured"] == 3000
        assert books["written"] + sum(books["dropped"].values()) == 3000
        assert books["written"] > 1000
    assert len(stored(database)) == books["written"]


@pytest.mark.usefixtures("quick")
async def test_a_batch_that_cannot_be_settled_on_a_full_disk_is_settled_once_there_is_room(
    database: Scratch, shipping: Make, small_disk: Path
) -> None:
    """Its rows are in the database then; a second delivery would change nothing either."""
    async with shipping(small_disk / "journal", flush_interval=0.05) as ship:
        await ship.ship(*returns(1))
        real = ship.journal.settle
        ballast = None

        def settle(*args: Any) -> None:
            nonlocal ballast
            if ballast is None:  # full at the worst moment: between COMMIT and the journal
                ship.journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                ballast = fill(small_disk)
            real(*args)

        ship.journal.settle = settle  # type: ignore[method-assign, assignment] # a disk that fills up just then
        await ship.take(*large(20, first=100))
        await ship.until(lambda: "disk is full" in ship.fault or ship.journal.pending == 0)
        assert ballast is not None
        ballast.unlink()
        books = await ship.settled()
        assert (books["captured"], books["written"], books["duplicates"]) == (21, 21, 0)
    assert len(stored(database)) == 21


@pytest.mark.usefixtures("quick")
async def test_a_corrupt_journal_on_a_full_disk_goes_on_once_there_is_room(
    database: Scratch, shipping: Make, small_disk: Path
) -> None:
    async with shipping(small_disk / "journal", flush_interval=0.05) as ship, capturing(ship):
        down(ship)
        hear(ship, large(200))
        await journalled(ship)
        await ship._in_journal(damage, ship.journal, 0.5)
        ballast = fill(small_disk)
        hear(ship, returns(300, first=1000))
        await asyncio.sleep(0.3)
        ballast.unlink()
        await journalled(ship)
        up(ship, database)
        books = await ship.settled()
        assert books["captured"] == 500
        assert books["dropped"].get("journal_corrupt", 0) <= 10
    assert stored(database) >= {jid(n) for n in range(1000, 1300)}


# A disk that fails

_LIMITED = """
import os, resource, signal, sqlite3, sys
from pathlib import Path
from salt_mysql_engine.journal import Journal, NewEvent, Settlement

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path(sys.argv[1]))
journal.open()
taken = failed = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
for n in range(400):
    try:
        taken += journal.append([NewEvent(float(n), f"j{n}", "m", bytes(10_000))])
    except sqlite3.Error as exc:
        failed += 1
        said = str(exc)
assert taken and failed, (taken, failed)
assert journal.pending == taken, (journal.pending, taken)
try:
    batch = [entry.seq for entry in journal.read(after=0, rows=20, max_bytes=10**9)]
    journal.settle(Settlement(batch, {"written": 20}, {}))
    taken -= 20
except sqlite3.Error:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert journal.append([NewEvent(1.0, "last", "m", b"last")]) == 1
print(taken + 1, failed, said)
sys.stdout.flush()
os._exit(0)
"""


def test_a_write_that_the_disk_refuses_costs_only_what_was_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout.split()[0])
    journal = Journal(tmp_path)
    journal.open()
    entries = journal.read(after=0, rows=1000, max_bytes=10**9)
    assert (len(entries), entries[-1].body, journal.pending) == (taken, b"last", taken)
    books = journal.books()
    assert books["captured"] == books["pending"] + books["written"]
    assert not journal.salvaged
    journal.close()


@pytest.mark.usefixtures("quick")
async def test_an_io_error_while_running_ends_nothing(database: Scratch, shipping: Make, tmp_path: Path) -> None:
    """No file may grow: SQLite says ``disk I/O error`` or ``database or disk is full`` for everything it writes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with shipping(flush_interval=0.05) as ship, capturing(ship):
        await ship.ship(*returns(10))
        await ship._in_journal(lambda: ship.journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            hear(ship, large(50, first=100))
            await ship.until(lambda: bool(ship.capture.last_error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        await journalled(ship)
        books = await ship.settled()
        assert (books["captured"], books["written"], books["dropped"]) == (60, 60, {})
    assert len(stored(database)) == 60


@pytest.mark.usefixtures("quick")
async def test_another_process_that_locks_the_file_delays_and_ends_nothing(database: Scratch, shipping: Make) -> None:
    async with shipping(flush_interval=0.05) as ship, capturing(ship):
        await ship.ship(*returns(10))
        await ship._in_journal(lambda: ship.journal._db.execute("PRAGMA busy_timeout = 50"))
        with contextlib.closing(sqlite3.connect(ship.journal.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            hear(ship, returns(50, first=100))
            await ship.until(lambda: "locked" in ship.capture.last_error)
            other.execute("ROLLBACK")
        await journalled(ship)
        books = await ship.settled()
        assert (books["captured"], books["written"], books["dropped"]) == (60, 60, {})
    assert len(stored(database)) == 60


@pytest.mark.usefixtures("quick")
async def test_a_cache_that_is_deleted_under_the_engine_takes_nothing_along(
    database: Scratch, shipping: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """`rm -rf` of all that Salt caches, again and again, while the database is down; nothing comes at the end."""
    async with shipping(flush_interval=0.05, batch_size=50) as ship, capturing(ship):
        down(ship)
        for start in (100, 200, 300):
            hear(ship, returns(100, first=start))
            await journalled(ship)
            await ship.until(lambda: ship.writer.retries > 0)
            shutil.rmtree(ship.journal.path.parent)
        await ship._in_journal(ship.journal.tend, 0.0)
        assert ship.journal.path.exists()
        assert "Somebody deleted the journal" in caplog.text
        with pytest.raises(JournalError, match="another mysql_jobcache engine"):
            Journal(ship.journal.path.parent).open()
        up(ship, database)
        books = await ship.settled()
        assert (books["captured"], books["written"], books["dropped"]) == (300, 300, {})
    assert len(stored(database)) == 300


# Damage


def damage(journal: Journal, share: float) -> None:
    """Overwrites a page in the middle of the file under the open journal, which has nothing of it in memory."""
    journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    size = journal.path.stat().st_size
    with journal.path.open("r+b") as file:
        file.seek(int(share * size / 4096) * 4096)
        file.write(os.urandom(4096))
    journal._db.execute("PRAGMA shrink_memory").fetchall()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
async def test_a_journal_that_is_damaged_while_it_runs_goes_on_and_ships_what_is_left(
    database: Scratch, shipping: Make, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping(flush_interval=0.05, batch_size=50) as ship, capturing(ship):
        down(ship)
        hear(ship, returns(3000, value="x" * 300))
        await journalled(ship)
        await ship.until(lambda: ship.writer.retries > 0)
        await ship._in_journal(damage, ship.journal, share)
        hear(ship, returns(100, first=5000))
        await journalled(ship)
        up(ship, database)
        books = await ship.settled()
        lost = books["dropped"].get("journal_corrupt", 0)
        assert books["captured"] == 3100
        assert books["written"] + books["duplicates"] + lost == 3100
        assert lost <= 60
        if ship.journal.salvaged:
            assert ship.journal.salvaged in caplog.text
    found = stored(database)
    assert found >= {jid(n) for n in range(5000, 5100)}
    assert len(found) == books["written"]


@pytest.mark.usefixtures("quick")
async def test_a_journal_whose_header_is_gone_at_the_start_begins_anew(
    database: Scratch, shipping: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping(paused=True) as ship:
        await ship.take(*returns(100))
    with (tmp_path / "journal" / "journal.sqlite").open("r+b") as file:
        file.write(os.urandom(4096))
    async with shipping(flush_interval=0.05) as ship:
        assert (await ship.ship(returned(jid(200), "web1")))["written"] == 1
        assert "was set aside as" in caplog.text
        assert Path(ship.journal.salvaged).exists()
    assert stored(database) == {jid(200)}


def test_a_disk_that_is_mounted_over_the_journal_is_seen_also_where_its_file_has_the_same_number(
    tmp_path: Path,
) -> None:
    """A snapshot of the disk, say: what is written goes to where it is found again."""
    with mounted(tmp_path / "one") as one, mounted(tmp_path / "two") as two:
        journal, other = Journal(one / "mysql_jobcache"), Journal(two / "mysql_jobcache")
        journal.open()
        other.open()
        other.close()
        if journal.path.stat().st_ino != other.path.stat().st_ino:
            pytest.skip("the numbers differ here")
        subprocess.run(["mount", "--bind", str(two), str(one)], check=True)
        try:
            journal.append([NewEvent(1.0, "20261122214227130648", "web1", b"x")])
            journal.close()
            journal.open()
            assert journal.pending == 1
            journal.close()
        finally:
            subprocess.run(["umount", "-l", str(one)], check=True)
