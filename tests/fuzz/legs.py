"""A leg of the fuzzer: events of one seed through capture, journal, verifier, encoder and writer into a real server.

Asserted: no task dies and nothing is at fault; the books balance, on the way and at the end; every text is JSON to the
server and to Python; what is written is what was accepted, which is what the job cache holds where returns are
verified, and what events say by themselves, one after the other, where not.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from salt_mysql_engine import jsontext, records, saltevent, settings
from salt_mysql_engine.records import Record, Return, Selection
from salt_mysql_engine.saltevent import Ignored, Opened
from tests.fuzz.events import FORGED, Chance, Genuine, Story
from tests.support.scratch import Scratch
from tests.support.shipping import MASTER, Cache, Shipping

CONFIGS: Final[tuple[dict[str, Any], ...]] = (
    {"verified": True},
    {"verified": False, "events": ["*"]},
    {
        "verified": True,
        "events": ["salt/auth", "custom/*", "minion_*", "salt/job/*/ret/minion-1*"],
        "skip_functions": ["secret.*"],
        "skip_values": ["runner.jobs.*", "wheel.key.*", "grains.items"],
    },
    {"verified": False, "batch_size": 37, "skip_functions": ["secret.*"]},
    {"verified": True, "runner_jobs": False, "batch_size": 50, "batch_bytes": 65536},
    {"verified": False, "cached": True, "events": ["salt/job/*", "salt/run/*"], "wheel_jobs": False},
)
"""What the engine is told, leg by leg. Verified or not: with a job cache or without, unless `cached` says otherwise."""
_CHUNK: Final = 200
_MOST_IN_MEMORY: Final = 2000
_BEAT_SECONDS: Final = 0.01
_PATIENCE_SECONDS: Final = 300.0
_DEAR_BYTES: Final = 60_000
"""A larger event may be a dead letter, for a limit of the engine's or the server's; a smaller one is a row."""


@dataclasses.dataclass
class Tally:
    """What legs did so far."""

    events: int = 0
    rows: int = 0
    stall: float = 0.0
    """The longest time for which the loop stood still, less what the machine had others do meanwhile."""
    books: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def story(seed: int, leg: int, events: int, *, dear_bytes: int) -> Story:
    """The events of a leg."""
    return Chance(f"{seed}/{leg}", first_job=leg * 1_000_000, dear_bytes=dear_bytes).story(events)


def run(
    leg: int,
    told: Story,
    database: Scratch,
    folder: Path,
    tally: Tally,
    on_progress: Callable[[int], object] = id,
) -> None:
    """Runs a leg with the settings of its turn; raises where something does not hold."""
    options = dict(CONFIGS[leg % len(CONFIGS)])
    verified, cached = options.pop("verified"), options.pop("cached", False)
    cache = Cache(folder / "cache") if verified or cached else None
    chosen, problems = settings.parse({"skip_values": [], **options})
    assert not problems, problems
    selection = Selection(settings.combine(chosen, {}), master_id=MASTER)
    ship = Shipping(
        folder / "journal",
        database.mysql,
        cachedir=cache.cachedir if cache else None,
        verify_returns=verified,
        flush_interval=0.05,
        **options,
    )
    for name in ("jids", "salt_returns", "salt_events"):
        database.sql(f"DROP TABLE IF EXISTS `{name}`")
    try:
        with faults() as seen:
            books, letters = asyncio.run(_ship(ship, told, cache, tally, on_progress))
        assert not seen, f"something went wrong unexpectedly: {seen[0]}"
        for name in ("captured", "written", "duplicates", "dead_letters"):
            tally.books[name] += books[name]
        tally.books["ignored"] += sum(books["ignored"].values())
        tally.rows += _check_json(database, [*_TEXTS_OF])
        _check_captured(told, books, selection)
        dear = _keys(body for body in told.bodies if len(body) > _DEAR_BYTES)
        # Not the letters themselves: some are megabytes.
        lost = [letter[3:7] for letter in letters if letter.reason != "unconfirmed" and letter[3:5] not in dear]
        assert not lost, lost[:5]
        if verified:
            _check_verified(told, database, selection)
        else:
            _check_heard(told, database, selection, books, letters, exactly=not cached)
    finally:
        shutil.rmtree(folder)


async def _ship(
    ship: Shipping, told: Story, cache: Cache | None, tally: Tally, on_progress: Callable[[int], object]
) -> tuple[dict[str, Any], list[Any]]:
    """Everything onto the bus, and what the master accepts into its cache, until all have met their fate.

    Gives the books and the dead letters.
    """
    loop = asyncio.get_running_loop()
    if cache is not None:
        await loop.run_in_executor(None, _accept, cache, told.early)
    async with ship:
        capture = asyncio.create_task(ship.capture.run(), name="capture")
        ship._beside.append(capture)
        heart = asyncio.create_task(_beat(tally), name="heartbeat")
        ship._beside.append(heart)
        for start in range(0, len(told.bodies), _CHUNK):
            ship.capture.on_events(told.bodies[start : start + _CHUNK])
            late = [each for place in range(start, start + _CHUNK) for each in told.late.get(place, ())]
            if cache is not None and late:
                await loop.run_in_executor(None, _accept, cache, late)
            await ship.until(lambda: ship.capture.held < _MOST_IN_MEMORY, timeout=_PATIENCE_SECONDS)
            if start % (10 * _CHUNK) == 0:
                await ship.books()
            tally.events += len(told.bodies[start : start + _CHUNK])
            on_progress(tally.events)
        await ship.until(lambda: not ship.capture.held, timeout=_PATIENCE_SECONDS)
        # All of the cache is there by now: what is not in it will never be.
        await ship.until(lambda: ship.journal.pending <= ship.verifier.waiting, timeout=_PATIENCE_SECONDS)
        ship.verifier.wait_seconds = 0.1
        books = await ship.settled(timeout=_PATIENCE_SECONDS)
        assert (ship.writer.faults, ship.large_writer.faults) == (0, 0)
        return books, await ship._in_journal(lambda: ship.journal.dead_letters(limit=100_000))


def _accept(cache: Cache, genuine: list[Genuine]) -> None:
    cache.accept(*(each.body for each in genuine))


async def _beat(tally: Tally) -> None:
    """Notes how long the loop stands still at most."""
    while True:
        began, queued = time.monotonic(), _queued()
        await asyncio.sleep(_BEAT_SECONDS)
        late = time.monotonic() - began - _BEAT_SECONDS
        if late > tally.stall:
            tally.stall = max(tally.stall, late - (_queued() - queued))


def _queued() -> float:
    """Seconds for which this thread could have run, and the machine ran others."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


@contextlib.contextmanager
def faults() -> Iterator[list[str]]:
    """What the package logs as an exception that nobody expects."""
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info:
                seen.append(logging.Formatter().format(record))

    logger, handler = logging.getLogger("salt_mysql_engine"), Handler(logging.ERROR)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield seen
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


_TEXTS_OF: Final = {"jids": ("load",), "salt_returns": ("return", "full_ret"), "salt_events": ("data",)}


def _check_json(database: Scratch, tables: list[str]) -> int:
    """Every text is JSON to the server and to Python; gives the number of rows."""
    count = 0
    for table in tables:
        if not database.sql(f"SHOW TABLES LIKE '{table}'"):
            continue
        columns = _TEXTS_OF[table]
        wrong = " OR ".join(f"NOT COALESCE(JSON_VALID(`{column}`), FALSE)" for column in columns)
        assert not database.sql(f"SELECT * FROM `{table}` WHERE {wrong} LIMIT 3"), "the server calls it no JSON"
        for row in database.sql(f"SELECT {', '.join(f'`{column}`' for column in columns)} FROM `{table}`"):
            count += 1
            for text in row:
                json.loads(text, parse_constant=_refuse)
    return count


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_captured(body: bytes, selection: Selection) -> bool:
    end = body.find(b"\n\n", 0, 1024)
    try:
        tag = body[:end].decode() if end > 0 else ""
    except UnicodeDecodeError:
        return False
    job = saltevent.parse_tag(tag)
    if job is not None and selection.wants_job(job):
        return True
    return selection.wants_event(tag) and not tag.startswith("mysql_jobcache/")


def _check_captured(told: Story, books: dict[str, Any], selection: Selection) -> None:
    captured = sum(_is_captured(body, selection) for body in told.bodies)
    assert (books["captured"], books["pending"]) == (captured, 0)
    assert set(books["dropped"]) <= {"dead_letters_full"}, books


def _check_verified(told: Story, database: Scratch, selection: Selection) -> None:
    """No row but the master's, each as the master has it, and one for each that was on the bus."""
    accepted: dict[tuple[str, str], dict[str, Any]] = {}
    published: dict[str, dict[str, Any]] = {}
    for each in [*told.early, *(each for late in told.late.values() for each in late)]:
        if each.key[1]:
            accepted[each.key] = each.data
        else:
            published[each.key[0]] = each.data
    stored = set()
    for row in database.rows("salt_returns"):
        key = row["jid"], row["id"]
        assert key in accepted, f"a row that the master never accepted: {row}"
        stored.add(key)
        data = accepted[key]
        assert not selection.skips(data["fun"]), row
        _check_return(row, key, data, published, selection)
    wanted = {key for key in told.sent if key in accepted and _is_wanted(key, accepted[key], selection)}
    assert wanted <= stored, f"not written: {sorted(wanted - stored)[:5]}"
    for row in database.rows("jids"):
        load = json.loads(row["load"])
        said = published.get(row["jid"]) or next(data for key, data in accepted.items() if key[0] == row["jid"])
        assert FORGED not in row["load"], row
        assert load["fun"] == said["fun"], row
        assert load.get("user", "") == said.get("user", ""), row
        assert row["fun"] == _joined(said["fun"]), row
        if (row["jid"], "") in told.sent:
            assert load["tgt"] == said["tgt"], row
    jobs = {row["jid"] for row in database.rows("jids")}
    wanted_jobs = {jid for jid, minion in told.sent if not minion and not selection.skips(published[jid]["fun"])}
    assert {jid for jid, _ in stored} | wanted_jobs <= jobs


def _check_return(
    row: dict[str, Any],
    key: tuple[str, str],
    data: dict[str, Any],
    published: dict[str, dict[str, Any]],
    selection: Selection,
) -> None:
    assert not any(isinstance(value, str) and FORGED in value for value in row.values()), row
    full = json.loads(row["full_ret"])
    of_master = key[1] == MASTER
    value = _as_json(data if of_master else data["return"])
    if selection.leaves_out(data["fun"]):
        value = {**value, "return": saltevent.LEFT_OUT} if of_master else saltevent.LEFT_OUT
    returned = json.loads(row["return"])
    if of_master:
        returned.pop("_stamp", None), value.pop("_stamp", None)
    assert _same(returned, value), (row, value)
    assert row["fun"] == _joined(data["fun"]), row
    if of_master:
        return
    says = {"cmd", "id", "jid", "fun", "fun_args", "user", "retcode", "success", "out"}
    expected = {name: _as_json(data[name]) for name in says if name in data}
    actual = {name: full[name] for name in says if name in full}
    if key[0] not in published:  # what is missing in a salt-call is added
        expected.setdefault("success", True)
    assert _same(actual, expected), (row, expected)
    assert _same(full["return"], value), row
    more = {"tgt", "tgt_type", "arg", "metadata", "_stamp", "ts", "return"}
    assert full.keys() <= says | more, row


def _is_wanted(key: tuple[str, str], data: dict[str, Any], selection: Selection) -> bool:
    if selection.skips(data["fun"]):
        return False
    kind = saltevent.master_kind(data["fun"])
    return kind is None or selection.wants_job(saltevent.Tag(kind, *key))


def _joined(fun: str | list[str]) -> str:
    return fun if isinstance(fun, str) else ",".join(fun)


def _as_json(value: Any) -> Any:
    """A value as a row should have it: itself, where JSON has it."""
    try:
        text = json.dumps(value, allow_nan=False)
        if text.count("[") + text.count("{") < jsontext.MAX_DEPTH:
            return json.loads(text)
    except (TypeError, ValueError):
        pass
    return json.loads(jsontext.dumps(value))


def _same(one: Any, other: Any) -> bool:
    """Whether values are equal, types too."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _keys(bodies: Iterable[bytes]) -> set[tuple[str, str]]:
    tags = [saltevent.parse_tag(body.partition(b"\n\n")[0].decode("utf-8", "replace")) for body in bodies]
    return {(tag.jid, tag.minion) for tag in tags if tag is not None}


def _check_heard(
    told: Story, database: Scratch, selection: Selection, books: dict[str, Any], letters: list[Any], *, exactly: bool
) -> None:
    """Every event by itself, the long way: just its rows are there, the first return of a minion for a job."""
    dead = {(letter.jid, letter.minion) for letter in letters}
    dead_jobs = {jid for jid, _ in dead}
    returns: dict[tuple[str, str], Return] = {}
    jobs: set[str] = set()
    stored: collections.Counter[tuple[str, str]] = collections.Counter()
    ignored: collections.Counter[str] = collections.Counter()
    for body in told.bodies:
        if not _is_captured(body, selection) or not dead.isdisjoint(_keys([body])):
            continue
        event = saltevent.open_event(body)
        record = records.interpret(event, 0.0, selection) if isinstance(event, Opened) else event
        if isinstance(record, Ignored):
            ignored[record.value] += 1
            continue
        assert isinstance(record, Record)
        if record.load:
            jobs.add(record.load.jid)
        if record.event:
            stored[record.event.tag, record.event.data_json] += 1
        ret = record.ret
        if ret is not None:
            jobs.add(ret.jid)
            stands = returns.setdefault((ret.jid, ret.id), ret)
            if stands.trimmed and not ret.trimmed:
                returns[ret.jid, ret.id] = ret
    assert {row["jid"] for row in database.rows("jids")} - dead_jobs == jobs - dead_jobs
    rows = {(row["jid"], row["id"]): row for row in database.rows("salt_returns")}
    assert rows.keys() == returns.keys()
    there = database.rows("salt_events") if selection.wants_events else []
    assert collections.Counter((row["tag"], row["data"]) for row in there) == stored
    assert books["ignored"] == ignored
    if not exactly:  # a value that Salt trimmed waits for the cache, and others come first meanwhile
        return
    for key, ret in returns.items():
        row = rows[key]
        assert (row["return"], row["full_ret"]) == (ret.return_json, ret.full_ret_json), row
        assert (row["fun"], row["success"]) == (ret.fun, str(int(ret.success))), row
