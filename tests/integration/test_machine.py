"""Journal, batcher, verifier and writer against a model: whatever happens in whatever order, each event has one fate.

The database is the one stand-in: rows in a dict, transactions, unique keys, and every way to fail. This checks what our
own parts do with a server's answers; what a server answers is checked against a real one in the other files.
`HYPOTHESIS_PROFILE=faults` runs many more and longer examples.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from salt_mysql_engine import capture, journal, schema, settings, verify, writer
from salt_mysql_engine.batcher import Limits
from salt_mysql_engine.capture import Capture
from salt_mysql_engine.errors import OperatorNeeded, RowsRejected, ServerUnavailable
from salt_mysql_engine.jobcache import JobCache
from salt_mysql_engine.journal import Journal
from salt_mysql_engine.large import LargeEvents
from salt_mysql_engine.records import Selection
from salt_mysql_engine.verify import Verifier
from salt_mysql_engine.writer import Writer
from tests.support.shipping import Cache, jid, published, returned

pytestmark = pytest.mark.faults

Result = TypeVar("Result")

hypothesis.settings.register_profile("faults", max_examples=60, stateful_step_count=80, deadline=None)
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "faults"
PROFILE = (
    hypothesis.settings.get_profile("faults")
    if THOROUGH
    else hypothesis.settings(max_examples=110, stateful_step_count=40, deadline=None)
)

_STRING = re.compile(r"'((?:[^'\\]|\\.|'')*)'", re.DOTALL)


def literals(statement: str) -> list[str]:
    """The strings in a statement; nothing here sends an escape but the two doublings."""
    return [found.replace("''", "'").replace("\\\\", "\\") for found in _STRING.findall(statement)]


class Store:
    """The database's tables, and how it answers."""

    def __init__(self) -> None:
        self.loads: dict[str, str] = {}
        self.returns: dict[tuple[str, str], tuple[str, str]] = {}
        """The return and full_ret of each (jid, minion)."""
        self.down = False
        self.refuses = "bad"
        """Rows of a minion of this name are refused."""
        self.fail_after: int | None = None
        """So many statements more, then the connection breaks."""
        self.lose_commit: str | None = None
        """The next COMMIT's answer is lost; ``done`` or ``undone``: what had become of it."""
        self.bitten: collections.Counter[str] = collections.Counter()


class FakeSession:
    """What the writer uses of `database.Session`."""

    host = "model"
    server_version = "model"
    tls_cipher = ""
    max_packet = 4 * 1024 * 1024

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loads: dict[str, str] = {}
        self._returns: dict[tuple[str, str], tuple[str, str]] = {}
        self.usable = True
        self.worked = False
        self.idle_seconds = 0.0

    def _reach(self) -> None:
        if not self.usable:
            raise AssertionError("a session is used that is closed")
        store = self._store
        if store.fail_after is not None:
            store.fail_after -= 1
            if store.fail_after < 0:
                store.fail_after = None
                store.bitten["connection"] += 1
                self._break()
        if store.down:
            store.bitten["down"] += 1
            self._break()

    def _break(self) -> None:
        self.close()
        raise ServerUnavailable("the model is away")

    async def execute(self, statement: bytes | str) -> int:
        self._reach()
        text = statement.decode() if isinstance(statement, bytes) else statement
        found = literals(text)
        if text.startswith("INSERT INTO `jids`"):
            rows = [found[start : start + 5] for start in range(0, len(found), 5)]
            return sum(self._insert(self._store.loads, self._loads, job, load) for job, load, *_ in rows)
        if text.startswith("INSERT INTO `salt_returns`"):
            rows = [found[start : start + 7] for start in range(0, len(found), 7)]
            if any(self._store.refuses in row[3] for row in rows):
                self._store.bitten["refused"] += 1
                raise RowsRejected("the model refuses a row")
            inserted = 0
            for _, job, value, minion, _, full, _ in rows:
                inserted += self._insert(self._store.returns, self._returns, (job, minion), (value, full))
            return inserted
        if text.startswith("UPDATE `jids`"):
            self._loads[found[-1]] = found[0]
            return 1
        if text.startswith("UPDATE `salt_returns`"):
            self._returns[found[2], found[3]] = (found[0], found[1])
            return 1
        raise AssertionError(f"what is this: {text[:80]}")

    insert = execute

    @staticmethod
    def _insert(table: dict[Any, Any], changed: dict[Any, Any], key: Any, row: Any) -> int:
        if key in table or key in changed:
            return 0
        changed[key] = row
        return 1

    async def query(self, statement: bytes | str) -> list[tuple[Any, ...]]:
        self._reach()
        text = statement.decode() if isinstance(statement, bytes) else statement
        if "FROM `jids`" in text:
            loads = {**self._store.loads, **self._loads}
            return [(job, loads[job]) for job in literals(text) if job in loads]
        assert "FROM `salt_returns`" in text, text[:80]
        returns = {**self._store.returns, **self._returns}
        keys = [key for key in asked_for(text) if key in returns]
        values = [(*key, *returns[key]) for key in keys]
        if "CHAR_LENGTH" in text:
            return [(job, id_, len(value), full.endswith(', "trimmed": true}')) for job, id_, value, full in values]
        return [row[:3] for row in values] if "`return`" in text else list(keys)

    async def commit(self) -> None:
        how, self._store.lose_commit = self._store.lose_commit, None
        if how is None:
            self._reach()
        if how != "undone":
            self._store.loads.update(self._loads)
            self._store.returns.update(self._returns)
            self.worked = True
        self._loads, self._returns = {}, {}
        if how is not None:
            self._store.bitten[f"commit {how}"] += 1
            self._break()

    async def rollback(self) -> None:
        self._reach()
        self._loads, self._returns = {}, {}

    async def ping(self) -> None:
        self._reach()

    def check_escapes(self) -> None:
        pass

    def close(self) -> None:
        self.usable = False
        self._loads, self._returns = {}, {}


def asked_for(text: str) -> list[tuple[str, str]]:
    """The (jid, minion) of a statement that looks for returns; the ids of these tests are plain."""
    of_jobs = re.findall(r"`jid` = '(\w+)' AND `id` IN \(([^)]+)\)", text)
    assert of_jobs, text
    return [(job, minion) for job, listed in of_jobs for minion in literals(listed)]


class FakeDatabase:
    """What the writer uses of `database.Database`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def open(self) -> FakeSession:
        if self._store.down:
            self._store.bitten["down"] += 1
            raise (ServerUnavailable if self._store.bitten["down"] % 3 else OperatorNeeded)("the model is away")
        return FakeSession(self._store)

    @staticmethod
    def is_first(host: str) -> bool:
        return host == FakeSession.host

    def failed(self, host: str) -> None:
        pass


async def tables_are_there(*args: Any, **kwargs: Any) -> tuple[list[str], schema.Shape]:
    return [], schema.Shape(frozenset(schema.TABLES), True, True, True, 255, True, True, True, True)


class EngineAgainstAModel(RuleBasedStateMachine):
    """``heard`` is what the journal took, each event by its bytes; ``genuine`` what the master's job cache holds."""

    bitten: ClassVar[collections.Counter[str]] = collections.Counter()
    fates: ClassVar[collections.Counter[str]] = collections.Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.loop = asyncio.new_event_loop()
        self.moment = 0.0
        self.loop.time = lambda: self.moment  # type: ignore[method-assign] # the injected clock
        self.wall = 1_700_000_000.0
        self.patch = pytest.MonkeyPatch()
        for module in (capture, journal, verify, writer):
            self.patch.setattr(module, "time", self)  # what they use of it: time() and monotonic()
        self.patch.setattr(writer, "random", self)  # and uniform()
        self.patch.setattr(schema, "ensure", tables_are_there)
        self.store = Store()
        self.cache = Cache(self.folder / "cache")
        self.in_memory: list[bytes] = []
        """With capture, which the journal refused."""
        self.generation = 0
        self.numbers = 0
        self.heard: collections.Counter[bytes] = collections.Counter()
        self.genuine: dict[tuple[str, str], Any] = {}

    # The two clocks

    def time(self) -> float:
        return self.wall + self.moment

    def monotonic(self) -> float:
        return self.moment

    def uniform(self, low: float, high: float) -> float:
        """The longest back-off."""
        return max(low, high)

    @initialize(
        batch_size=st.sampled_from([1, 2, 5, 50]),
        verifying=st.booleans(),
        batch_bytes=st.sampled_from([16 * 1024, 4 * 1024 * 1024]),
    )
    def start(self, batch_size: int, verifying: bool, batch_bytes: int) -> None:
        self.limits = Limits(batch_size, batch_bytes, 1.0)
        self.verifying = verifying
        self.boot()

    def boot(self) -> None:
        """A new process on the journal as it is."""
        self.journal = Journal(self.folder / f"journal-{self.generation}")
        self.journal.open()
        self.full = False
        chosen = Selection(settings.combine({}, {}), master_id=self.cache.master)
        cache = JobCache({"cachedir": str(self.cache.cachedir), "id": self.cache.master})
        nobody: Any = None  # no event here is large
        large = LargeEvents(self.journal, self.at_once, nobody, on_made=lambda _, __: None)
        self.verifier = Verifier(
            self.journal, self.at_once, cache, self.at_once, chosen,
            on_confirmed=lambda events, size: self.writer.announce(events, size), large=large,
        )  # fmt: skip
        self.verifier.enabled = self.verifying
        database: Any = FakeDatabase(self.store)
        self.writer = Writer(self.journal, self.at_once, self.verifier, database, chosen, self.limits, large)
        self.capture = Capture(self.journal, self.at_once, chosen, on_append=self.writer.announce)
        self.tasks = [self.loop.create_task(self.writer.run()), self.loop.create_task(self.verifier.run())]
        self.run_for(0.0)

    async def at_once(self, function: Callable[..., Any], *args: Any) -> Any:
        """The journal's thread, and the job cache's."""
        await asyncio.sleep(0)
        return function(*args)

    def run_for(self, seconds: float) -> None:
        """Lets the engine do all it can, and the time pass, deadline by deadline."""
        end = self.moment + seconds
        while True:
            self.run_now()
            for task in self.tasks:
                if task.done():
                    task.result()
                    raise AssertionError("an actor ended")
            due = [handle.when() for handle in self.loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
            if not due or min(due) > end:
                break
            self.moment = max(self.moment, min(due))
        self.moment = max(self.moment, end)

    def run_now(self) -> None:
        """Lets the engine do all that it can do at this moment."""
        for _ in range(200):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
            if not self.loop._ready:  # type: ignore[attr-defined] # nothing left
                break

    def do(self, work: Awaitable[Result]) -> Result:
        """An awaitable that needs no time to pass."""
        task = asyncio.ensure_future(work, loop=self.loop)
        self.run_for(0.0)
        assert task.done(), "it waits for something"
        return task.result()

    # What happens

    def hear(self, bodies: list[bytes]) -> None:
        """As many as the journal takes: what it does not take stays with capture, and is tried again."""
        self.capture.on_events(bodies)
        before = self.journal.books()["captured"]
        try:
            self.do(self.capture.drain())
        except sqlite3.OperationalError:
            assert self.full
            assert self.journal.books()["captured"] == before, "half a group"
        else:
            self.heard.update(self.in_memory + bodies)
            self.in_memory = []
            return
        self.in_memory = self.in_memory + bodies

    def event(self, minion: str, value: Any, *, at: int | None = None) -> tuple[bytes, tuple[str, str]]:
        self.numbers += at is None
        number = self.numbers if at is None else at
        return returned(jid(number), minion, value), (jid(number), minion)

    @rule(count=st.integers(1, 12), large=st.booleans(), cached=st.sampled_from(["before", "after", "never"]))
    def publish(self, count: int, large: bool, cached: str) -> None:
        """Genuine returns; the cache has them before or after the event. Or forged ones, which it never has."""
        value = "x" * 6000 if large else "genuine"
        made = [self.event("web", value if cached != "never" else "forged") for _ in range(count)]
        bodies = [each for each, _ in made]
        if cached == "before":
            self.cache.accept(*bodies)
        self.hear(bodies)
        if cached == "after":
            self.run_for(0.05)
            self.cache.accept(*bodies)
        if cached != "never":
            self.genuine.update({key: value for _, key in made})

    @rule(count=st.integers(1, 3))
    def publish_a_job(self, count: int) -> None:
        """A load, and its returns."""
        self.numbers += 1
        job = jid(self.numbers)
        made = [returned(job, f"web{n}", "genuine") for n in range(count)]
        load = published(job, [f"web{n}" for n in range(count)])
        self.cache.accept(load, *made)
        self.genuine.update({(job, f"web{n}"): "genuine" for n in range(count)})
        self.hear([made[0], load, *made[1:]])

    @rule()
    def publish_a_bad_row(self) -> None:
        """One that the database refuses, among good ones."""
        made = [self.event(minion, "genuine") for minion in ("web", "bad", "web")]
        self.cache.accept(*(each for each, _ in made))
        self.genuine.update({key: "genuine" for _, key in made})
        self.hear([each for each, _ in made])

    @rule(garbage=st.sampled_from([b"\xc1", b"", b"\x90"]))
    def publish_garbage(self, garbage: bytes) -> None:
        self.numbers += 1
        self.hear([f"salt/job/{jid(self.numbers)}/ret/web".encode() + b"\n\n" + garbage])

    @rule(data=st.data(), differing=st.booleans())
    def publish_again(self, data: st.DataObject, differing: bool) -> None:
        """The same return once more, or a forged one in its place."""
        if self.genuine:
            job, minion = data.draw(st.sampled_from(sorted(self.genuine)))
            self.hear([returned(job, minion, "forged" if differing else self.genuine[job, minion])])

    @rule(seconds=st.sampled_from([0.2, 1.5, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.run_for(seconds)

    @rule()
    def flush(self) -> None:
        flush = self.loop.create_task(self.writer.flush())
        self.run_for(0.5)
        if flush.done():
            flush.result()
        flush.cancel()
        self.run_for(0.0)

    @rule()
    def database_goes_down(self) -> None:
        self.store.down = True

    @rule()
    def database_comes_up(self) -> None:
        self.store.down = False

    @rule(after=st.integers(0, 6))
    def connection_breaks(self, after: int) -> None:
        self.store.fail_after = after
        self.run_for(1.5)

    @rule(how=st.sampled_from(["done", "undone"]))
    def the_answer_to_a_commit_is_lost(self, how: str) -> None:
        self.store.lose_commit = how
        self.publish_a_job(1)  # there is something to commit
        self.run_for(1.5)

    @rule()
    def disk_fills_up(self) -> None:
        (pages,) = self.journal._db.execute("PRAGMA page_count").fetchone()
        self.journal._db.execute(f"PRAGMA max_page_count = {pages}")
        self.full = True

    @rule()
    def disk_has_room(self) -> None:
        self.journal._db.execute("PRAGMA max_page_count = 1000000")
        self.full = False
        self.hear([])

    @rule()
    def the_cache_forgets(self) -> None:
        """What was not looked at by then is forged as far as anybody knows."""
        self.cache.forget()

    @rule(steps=st.integers(0, 60), seconds=st.sampled_from([0.0, 1.5, 20.0]))
    def crash(self, steps: int, seconds: float) -> None:
        """In the middle of anything: what is in memory is gone; the file is as a kill leaves it."""
        self.moment += seconds
        for _ in range(steps):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        before = self.journal
        self.generation += 1
        shutil.copytree(before.path.parent, self.folder / f"journal-{self.generation}")
        self.end()
        self.in_memory = []
        self.boot()

    @rule()
    def restart(self) -> None:
        """What is in memory goes to the journal, if that takes it."""
        self.hear([])
        self.end()
        self.in_memory = []
        self.boot()

    @precondition(lambda self: not self.full)
    @rule(trust=st.booleans())
    def retry(self, trust: bool) -> None:
        again = self.journal.retry_dead_letters(None, trusted=trust and not self.verifying)
        self.writer.announce(again, 0)

    def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        for _ in range(30):
            self.run_now()
            if all(task.done() for task in self.tasks):
                break
            self.moment += 0.1
        assert all(task.done() for task in self.tasks), "an actor does not end"
        self.run_now()
        self.journal.close()

    # What must hold at every moment

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "journal"):
            return
        books = self.journal.books()
        fates = [books[name] for name in ("written", "duplicates", "pending", "dead_letters")]
        assert books["captured"] == sum([*fates, *books["ignored"].values(), *books["dropped"].values()]), books
        assert books["captured"] == sum(self.heard.values()), books
        (events,) = self.journal._db.execute("SELECT COUNT(*) FROM events").fetchone()
        assert books["pending"] == events, books
        assert not books["dropped"], books

    @invariant()
    def nothing_stands_in_the_store_that_was_not_heard(self) -> None:
        for (job, minion), (value, _) in self.store.returns.items():
            said = {json.loads(value)}
            heard = {"x" * 6000, "genuine", "forged"}
            assert said <= heard
            assert any(f"/{job}/ret/{minion}\n\n".encode() in each for each in self.heard), (job, minion)
            if self.verifying:
                assert said == {self.genuine.get((job, minion))}, "a forged return was stored"

    @invariant()
    def what_is_written_is_a_row(self) -> None:
        """Only after a COMMIT; so there may be more rows than are counted, never less."""
        if hasattr(self, "journal"):
            books = self.journal.books()
            assert books["written"] <= len(self.store.returns) + 2 * len(self.store.loads)

    def teardown(self) -> None:
        """All is well again: then every event has its fate."""
        try:
            if hasattr(self, "journal"):
                self.drain()
        finally:
            if hasattr(self, "journal"):
                self.end()
            self.loop.close()
            self.patch.undo()
            shutil.rmtree(self.folder)
            type(self).bitten += self.store.bitten

    def drain(self) -> None:
        self.store.down, self.store.fail_after, self.store.lose_commit = False, None, None
        self.disk_has_room()
        for _ in range(40):
            self.run_for(15.0)
            if not self.journal.pending:
                break
        books = self.journal.books()
        assert books["pending"] == 0, books
        self.the_books_balance()
        self.nothing_stands_in_the_store_that_was_not_heard()
        dead = collections.Counter(letter.body for letter in self.journal.dead_letters(limit=10**6))
        for each in self.heard:
            tag = each.partition(b"\n\n")[0].decode().split("/")
            key = tag[2], tag[-1]
            is_row = key in self.store.returns or (tag[3] == "new" and tag[2] in self.store.loads)
            is_garbage = len(each.partition(b"\n\n")[2]) < 2
            buried = any(letter.partition(b"\n\n")[0] == each.partition(b"\n\n")[0] for letter in dead)
            assert is_row or is_garbage or buried, f"{each[:80]!r} has no fate"
        assert set(self.store.loads) >= {job for job, _ in self.store.returns}, "a return without its job"
        for reason in ("written", "duplicates", "dead_letters"):
            type(self).fates[reason] += books[reason]


class TestEngineAgainstAModel(EngineAgainstAModel.TestCase):  # type: ignore[misc, valid-type] # made by Hypothesis
    """Runs it, and makes sure that every fault has bitten."""

    settings = PROFILE

    def runTest(self) -> None:
        EngineAgainstAModel.bitten.clear()
        EngineAgainstAModel.fates.clear()
        logging.disable(logging.CRITICAL)
        try:
            super().runTest()
        finally:
            logging.disable(logging.NOTSET)
        assert EngineAgainstAModel.bitten.keys() == {"down", "connection", "commit done", "commit undone", "refused"}
        assert all(EngineAgainstAModel.fates[fate] for fate in ("written", "duplicates", "dead_letters"))
