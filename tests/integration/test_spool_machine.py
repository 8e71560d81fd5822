"""The hand-off as a state machine with real processes: workers, their forks and an engine come, go and are killed.

Each process writes into a ledger what it is about to hand over and, when the call has returned, that it did. The engine
ships now and then into a file that stands for MySQL: it may be written to twice, and holds a row once. In the end what
was handed over is in the journal or in that file, once, or was counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import folders, saltevent, spool
from salt_mysql_engine.intake import Intake
from salt_mysql_engine.journal import Entry, Journal, Settlement
from salt_mysql_engine.spool import HandOff
from tests.support.disks import fill, mounted
from tests.support.mariadb import wait_until
from tests.support.shipping import MASTER, jid, return_data

MIB = 1024 * 1024
CAP = 24 * MIB
SIZES = [10] * 20 + [2_000] * 4 + [40_000] * 2 + [300_000]
PATIENCE = 60.0
FORKS = "forks.lock"


def opts(cachedir: Path) -> dict[str, Any]:
    options = {"journal_max_bytes": CAP}
    return {
        "cachedir": str(cachedir),
        "sock_dir": str(cachedir),
        "id": MASTER,
        "engines": [{"mysql_jobcache": options}],
    }


# The processes


class Ledger:
    """What one process offered and handed over. It is on another disk, and each line is one write."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._file = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._count = 0

    def hand(self, to: HandOff, size: int) -> None:
        self._count += 1
        number = self._count
        os.write(self._file, f"offered {number}\n".encode())
        if number % 5:
            to.returned(return_data(jid(number), self.name, "x" * size))
        else:  # its jid says all of it
            load = {"tgt": self.name, "fun": "test.ping", "arg": ["x" * min(size, 2000)], "tgt_type": "glob"}
            to.published(jid(number), load, [self.name])
        os.write(self._file, f"{'held' if to._held else 'handed'} {number}\n".encode())

    def say_whether_all_is_written(self, to: HandOff) -> None:
        if not to._held:
            os.write(self._file, b"clean 0\n")


def worker(cachedir: Path, ledgers: Path) -> None:
    """Does what stands on standard input, a line at a time, and answers each."""
    hand, ledger = spool.of(opts(cachedir)), Ledger(ledgers)
    spool._RETRY_SECONDS, spool._LOOK_SECONDS = 0.05, 0.05
    for line in sys.stdin:
        verb, *sizes = json.loads(line)
        if verb == "hand":
            for size in sizes:
                ledger.hand(hand, size)
        elif verb == "fork" and forked(cachedir.parent / FORKS):
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # whoever waits for its parent's end need not wait for its own
            hand, ledger = spool.of(opts(cachedir)), Ledger(ledgers)
            for size in sizes:
                ledger.hand(hand, size)
            time.sleep(0.3)  # it lives on, with what its parent had open
            while hand._held:
                time.sleep(0.01)
            ledger.say_whether_all_is_written(hand)
            os._exit(0)
        elif verb == "catch up":
            while hand._held or any(hand._uncounted):
                time.sleep(0.01)
        ledger.say_whether_all_is_written(hand)
        print("done", flush=True)


def forked(lock: Path) -> bool:
    """Forks; whether this is the child, which shares a lock for as long as it lives."""
    fd = os.open(lock, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    if os.fork() == 0:
        return True
    os.close(fd)
    return False


def engine(cachedir: Path, shipped: Path) -> None:
    """Takes in and ships until standard input ends; each line there is answered after another step."""
    journal = Journal(folders.of_journal(str(cachedir)))
    journal.open()
    taking = Intake(journal, folders.of_journal(str(cachedir)))
    rows = os.open(shipped, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    dice = random.Random()
    while True:
        asked, _, _ = select.select([0], [], [], 0.005)
        if asked and not os.read(0, 4096):
            break
        with contextlib.suppress(Exception):  # a full disk
            taking.step()
        with contextlib.suppress(Exception):
            journal.tend(time.time())
            if dice.random() < 0.1:
                entries = journal.read(after=0, rows=100, max_bytes=MIB)
                for entry in entries:
                    os.write(rows, (json.dumps([entry.seq, *identity(body_of(journal, entry))]) + "\n").encode())
                seqs = [entry.seq for entry in entries]
                journal.settle(Settlement(seqs, {"written": len(seqs)}, {}))
        if asked:
            print("done" if taking.waiting_bytes else "all done", flush=True)
    taking.drain()
    taking.close()
    journal.close()


def body_of(journal: Journal, entry: Entry) -> bytes:
    return journal.part_of(entry.seq, 0, entry.size) if entry.size else entry.body


def holds(last: Path) -> bool:
    """Whether something was written into a file for a disk that is full."""
    return last.exists() and bool(last.read_bytes()[spool.HEADER.size :].strip(b"\0"))


def identity(body: bytes) -> tuple[str, int]:
    """Whose event it is: the process and its number."""
    event = saltevent.open_event(body)
    assert isinstance(event, saltevent.Opened)
    assert event.job is not None
    return event.job.minion or event.data["tgt"], int(event.job.jid[8:])


# The machine


class Process:
    def __init__(self, function: str, *args: Path) -> None:
        command = [sys.executable, "-c", f"import sys; from tests.integration.test_spool_machine import *; {function}("
                   "*map(Path, sys.argv[1:]))", *map(str, args)]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, *line: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()

    def ask(self, *line: Any) -> bool:
        """Whether all is done."""
        self.tell(*line)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        assert answer in ("done\n", "all done\n")
        return answer == "all done\n"

    def end(self, *, kill: bool) -> None:
        if kill:
            self.process.kill()
        self.process.communicate(timeout=PATIENCE)


class Machine:
    """The processes of one master, and steps that happen to them."""

    def __init__(self, disk: Path, beside: Path, seed: int) -> None:
        self.cachedir, self.disk = disk / "cache", disk
        self.cachedir.mkdir()
        (disk / FORKS).touch()
        self.ledgers, self.shipped = beside / "ledgers", beside / "shipped"
        self.ledgers.mkdir()
        self.dice = random.Random(seed)
        self.workers: list[Process] = []
        self.engine: Process | None = None
        self.ballast: Path | None = None
        self.done: list[str] = []

    def step(self) -> None:
        weights = {
            self.hand: 40, self.come: 6, self.go: 3, self.kill: 5, self.kill_at_work: 6, self.fork: 5,
            self.start_engine: 8, self.stop_engine: 2, self.kill_engine: 4, self.fill: 2, self.free: 6, self.delete: 2,
        }  # fmt: skip
        (what,) = self.dice.choices(list(weights), list(weights.values()))
        self.done.append(what.__name__)
        what()

    def sizes(self, most: int) -> list[int]:
        return self.dice.choices(SIZES, k=self.dice.randint(1, most))

    def any_worker(self) -> Process:
        if not self.workers:
            self.come()
        return self.dice.choice(self.workers)

    def come(self) -> None:
        if len(self.workers) < 5:
            self.workers.append(Process("worker", self.cachedir, self.ledgers))

    def hand(self) -> None:
        self.any_worker().ask("hand", *self.sizes(30))

    def fork(self) -> None:
        self.any_worker().ask("fork", *self.sizes(10))

    def go(self) -> None:
        if self.workers and self.ballast is None:
            leaving = self.workers.pop()
            leaving.ask("catch up")
            leaving.end(kill=False)

    def kill(self) -> None:
        if self.workers:
            self.workers.pop(self.dice.randrange(len(self.workers))).end(kill=True)

    def kill_at_work(self) -> None:
        victim = self.any_worker()
        victim.tell("hand", *self.sizes(300))
        time.sleep(self.dice.random() * 0.01)
        self.workers.remove(victim)
        victim.end(kill=True)

    def start_engine(self) -> None:
        if self.engine is None and self.ballast is None:
            self.engine = Process("engine", self.cachedir, self.shipped)
            if self.dice.random() < 0.5:
                self.engine.ask("are you there")

    def stop_engine(self) -> None:
        if self.engine is not None:
            self.engine.end(kill=False)
            self.engine = None

    def kill_engine(self) -> None:
        if self.engine is not None:
            self.engine.end(kill=True)
            self.engine = None

    def fill(self) -> None:
        if self.ballast is None:
            self.ballast = fill(self.disk)

    def free(self) -> None:
        if self.ballast is not None:
            self.ballast.unlink()
            self.ballast = None

    def delete(self) -> None:
        """Everything that the master caches, under those that run: nobody is killed until they have noticed."""
        if self.engine is None or self.ballast is not None:
            return
        for each in self.workers:
            each.ask("catch up")
        with (self.disk / FORKS).open() as forks:  # these end before they would notice
            fcntl.flock(forks, fcntl.LOCK_EX)
        while not self.engine.ask("is all taken?"):
            time.sleep(0.01)
        for each in self.workers:
            each.ask("hand", *self.sizes(5))
        with contextlib.suppress(OSError):  # who is there makes it again meanwhile
            shutil.rmtree(folders.of_journal(str(self.cachedir)))
        for each in self.workers:
            each.ask("hand", 10)
        while not self.engine.ask("is all taken?"):
            time.sleep(0.01)

    def finish(self) -> None:
        self.free()
        for each in self.workers:
            each.ask("catch up")
            each.end(kill=False)
        self.stop_engine()
        self.engine = Process("engine", self.cachedir, self.shipped)
        place = folders.of_journal(str(self.cachedir)) / spool.FOLDER
        last = [place / name for name in spool.LAST]
        wait_until(lambda: place.exists() and not list(place.glob("*.spool")) and not any(map(holds, last)),
                   timeout=PATIENCE, what="the engine to take everything")  # fmt: skip
        self.stop_engine()

    def check(self) -> None:
        offered, handed, excused = set(), set(), set()
        for path in self.ledgers.iterdir():
            held: set[tuple[str, int]] = set()
            for line in path.read_text().splitlines():
                what, number = line.split()
                event = path.name, int(number)
                if what == "offered":
                    offered.add(event)
                elif what == "clean":
                    held.clear()
                else:
                    handed.add(event)
                    held = held | {event} if what == "held" else set()
            excused |= held  # it was killed with these in memory, on a full disk
        journal = Journal(folders.of_journal(str(self.cachedir)))
        journal.open()
        books = journal.books()
        entries = journal.held(jid=None, at=0, rows=10**6, max_bytes=10**9)
        rows = {(entry.seq, *identity(body_of(journal, entry))) for entry in entries}
        journal.close()
        waiting = len(rows)
        if self.shipped.exists():
            rows |= {tuple(json.loads(line)) for line in self.shipped.read_text().splitlines()}
        stored = [(name, number) for _, name, number in rows]
        assert len(stored) == len(set(stored)), "something was taken twice"
        assert set(stored) <= offered
        assert not journal.salvaged
        dropped = sum(books["dropped"].values())
        torn = books["dropped"].get("spool_torn", 0)
        lost, unsure = handed - set(stored) - excused, offered - handed
        assert set(books["dropped"]) <= {"journal_full", "spool_torn", "memory_full"}
        assert len(lost) <= dropped - torn <= len(lost) + len(unsure | excused), (len(lost), books)
        assert torn <= len(unsure | excused)
        assert all(number % 5 for _, number in lost), "no publish is given up"
        assert books["captured"] == books["written"] + books["pending"] + dropped
        assert books["pending"] == waiting
        assert len(stored) == books["written"] + books["pending"]


@contextlib.contextmanager
def machine(tmp_path: Path, seed: int) -> Iterator[Machine]:
    with mounted(tmp_path / "disk", mebibytes=80) as disk:
        made = Machine(disk, tmp_path, seed)
        try:
            yield made
        finally:
            for each in [*made.workers, *filter(None, [made.engine])]:
                each.process.kill()
                each.process.communicate()


def run(tmp_path: Path, seed: int, steps: int) -> None:
    with machine(tmp_path, seed) as made:
        try:
            for _ in range(steps):
                made.step()
            made.finish()
            made.check()
        except BaseException:
            print(f"seed {seed}: {made.done}")
            raise


@pytest.mark.parametrize("seed", range(2))
def test_what_is_handed_over_is_taken_once_whoever_is_killed_when(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, 120)


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_thousands_of_steps_later_everything_was_still_taken_once(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, 400)
