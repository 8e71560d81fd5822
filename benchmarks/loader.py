"""Fills tables as years of a fleet would, with the texts that the engine itself would have written.

Jobs of many sizes, one of them of 1,000 minions and one of 10,000, over the 60 days before now; several functions,
users and targets; 2 % of the returns failed. A job's rows differ in the minion and the time alone, so each job's
texts are made once, by ``records.py``, and ``LOAD DATA`` takes them through a pipe.
"""

from __future__ import annotations

import datetime
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from benchmarks import payloads
from salt_mysql_engine import jobload, jsontext, records, settings
from salt_mysql_engine.records import Record, Selection
from salt_mysql_engine.saltevent import Opened, open_event
from tests.support.mariadb import MariaDB

DAYS = 60
BIG, HUGE = 1_000, 10_000
FAILED = 0.02
RARE = "network.traceroute"
"""A function of a few jobs among all."""

_MARK = "@minion@"
_LARGE = 50
_SIZES = ((1, 30), (10, 30), (50, 25), (200, 15))
_USERS = ("root", "root", "root", "sudo_alice", "sudo_bob", "deploy", "salt")
_TARGETS = ("*", "web-0*", "db-*", "G@os:Debian", "web-0001.example.com", "I@role:proxy")
_STAMP = "%Y-%m-%dT%H:%M:%S.%f"


class Loaded(NamedTuple):
    """What is there: ``functions`` by name with their number of jobs, ``middle`` a moment that halves the returns."""

    returns: int
    jobs: int
    seconds: float
    big: str
    huge: str
    functions: dict[str, int]
    users: list[str]
    targets: list[str]
    middle: float
    oldest: datetime.date


class _Job(NamedTuple):
    moment: datetime.datetime
    jid: str
    size: int
    first: int
    fun: str
    user: str
    tgt: str


def minion(number: int) -> str:
    """The id of one of the fleet's minions."""
    return f"{'web' if number % 3 else 'db'}-{number:05d}.example.com"


def load(server: MariaDB, database: str, folder: Path, *, returns: int, jobs: int, seed: int = 1) -> Loaded:
    """Fills the empty tables ``jids`` and ``salt_returns`` of a database."""
    began = time.monotonic()
    planned = _plan(random.Random(seed), returns, jobs)
    selection = Selection(settings.combine({}, {}), master_id="master")
    _take_in(server, database, folder, "jids (`jid`, `load`, `fun`, `user`, `tgt`)", _loads(planned, selection))
    _take_in(
        server,
        database,
        folder,
        "salt_returns (`fun`, `jid`, `return`, `id`, `success`, `full_ret`, `failed`, `alter_time`)",
        _returns(planned, selection, random.Random(seed)),
    )
    server.sql("ANALYZE TABLE jids, salt_returns", db=database)
    functions: dict[str, int] = {}
    for job in planned:
        functions[job.fun] = functions.get(job.fun, 0) + 1
    so_far, middle = 0, planned[0].moment
    for job in planned:
        so_far += job.size
        if so_far > returns / 2:
            middle = job.moment
            break
    sizes = {job.size: job.jid for job in planned}
    return Loaded(
        returns=sum(job.size for job in planned),
        jobs=len(planned),
        seconds=time.monotonic() - began,
        big=sizes[BIG],
        huge=sizes[max(sizes)],
        functions=functions,
        users=sorted(set(_USERS)),
        targets=list(_TARGETS),
        middle=middle.replace(tzinfo=datetime.timezone.utc).timestamp(),
        oldest=planned[0].moment.date(),
    )


def _plan(dice: random.Random, returns: int, jobs: int) -> list[_Job]:
    """The jobs, oldest first; their sizes add up to ``returns``."""
    huge = max(BIG, returns // 100)
    sizes = dice.choices([size for size, _ in _SIZES], [weight for _, weight in _SIZES], k=jobs - 2)
    missing = returns - BIG - huge - sum(sizes)
    large = [place for place, size in enumerate(sizes) if size >= _LARGE]
    even, rest = divmod(missing, len(large))
    for number, place in enumerate(large):
        sizes[place] += even + (number < rest)
    sizes.insert(len(sizes) * 3 // 4, BIG)
    sizes.insert(len(sizes) * 9 // 10, huge)
    kinds = (
        ["test.ping"] * 25 + ["cmd.run"] * 25 + ["state.apply"] * 20 + ["saltutil.find_job"] * 10
        + ["grains.get"] * 8 + ["pkg.version"] * 8 + ["service.restart"] * 3 + ["state.highstate"]
    )  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    step = datetime.timedelta(days=DAYS) / jobs
    planned = []
    for place, size in enumerate(sizes):
        moment = now - (jobs - place) * step
        fun = RARE if place % (jobs // 5) == 7 else dice.choice(kinds)
        if size in (BIG, huge):
            fun = "test.ping"
        planned.append(
            _Job(
                moment,
                moment.strftime("%Y%m%d%H%M%S%f"),
                size,
                dice.randrange(HUGE),
                fun,
                dice.choice(_USERS),
                dice.choice(_TARGETS),
            )
        )
    return planned


def _minions(job: _Job) -> list[str]:
    return [minion((job.first + number) % HUGE) for number in range(job.size)]


def _loads(jobs: list[_Job], selection: Selection) -> Iterator[str]:
    for job in jobs:
        data = {
            "jid": job.jid,
            "tgt_type": "compound" if "@" in job.tgt else "glob",
            "tgt": job.tgt,
            "user": job.user,
            "fun": job.fun,
            "arg": _answer(job.fun, failed=False)[0],
            "minions": _minions(job),
            "missing": [],
            "_stamp": job.moment.strftime(_STAMP),
        }
        record = _interpreted(f"salt/job/{job.jid}/new", data, selection)
        assert record.load is not None
        yield _line(job.jid, jsontext.dumps(record.load.load), *map(str, jobload.job_columns(record.load.load)))


def _returns(jobs: list[_Job], selection: Selection, dice: random.Random) -> Iterator[str]:
    for job in jobs:
        texts = [_text(job, selection, failed=failed) for failed in (False, True)]
        for number, each in enumerate(_minions(job)):
            altered = job.moment + datetime.timedelta(milliseconds=200 + 3 * number)
            yield f"{texts[dice.random() < FAILED].replace(_MARK, each)}\t{altered}\n"


def _text(job: _Job, selection: Selection, *, failed: bool) -> str:
    """A job's row for any minion, without its time."""
    arguments, value, retcode = _answer(job.fun, failed=failed)
    data = {
        "cmd": "_return",
        "id": _MARK,
        "success": retcode == 0,
        "return": value,
        "retcode": retcode,
        "jid": job.jid,
        "fun": job.fun,
        "fun_args": arguments,
        "user": job.user,
        "_stamp": job.moment.strftime(_STAMP),
    }
    ret = _interpreted(f"salt/job/{job.jid}/ret/{_MARK}", data, selection, find_job=True).ret
    assert ret is not None
    outcome = f"{ret.success:d}", ret.full_ret_json, f"{ret.failed:d}"
    return _line(ret.fun, ret.jid, ret.return_json, ret.id, *outcome)[:-1]


def _answer(fun: str, *, failed: bool) -> tuple[list[Any], Any, int]:
    """Arguments, value, retcode."""
    if failed:
        return [], "ERROR: the minion function caused an exception: OSError: [Errno 5] Input/output error", 1
    if fun == "state.highstate":
        return [], payloads.highstate(), 0
    if fun == "state.apply":
        first = dict(list(payloads.highstate().items())[:3])
        return ["app"], first, 0
    if fun == "cmd.run":
        return ["uptime"], " 21:42:27 up 41 days,  3:07,  1 user,  load average: 0.11, 0.08, 0.05", 0
    values = {"grains.get": "Debian", "pkg.version": "2.1.4-3+deb12u1", "saltutil.find_job": {}}
    return ["os"] if fun in values else [], values.get(fun, True), 0


def _interpreted(tag: str, data: dict[str, Any], selection: Selection, *, find_job: bool = False) -> Record:
    # saltext.mysql stores find_job, the engine does not: its text is made under another name.
    hidden = find_job or "find_job" in str(data.get("fun"))
    if hidden and data["fun"] == "saltutil.find_job":
        record = _interpreted(tag, {**data, "fun": "saltutil.find_jo_"}, selection)
        return Record(
            load=record.load and record.load._replace(load={**record.load.load, "fun": data["fun"]}),
            ret=record.ret
            and record.ret._replace(
                fun=data["fun"], full_ret_json=record.ret.full_ret_json.replace("find_jo_", "find_job")
            ),
        )
    event = open_event(tag.encode() + b"\n\n" + msgpack.packb(data, use_bin_type=True))
    assert isinstance(event, Opened), event
    outcome = records.interpret(event, 0.0, selection)
    assert isinstance(outcome, Record), outcome
    return outcome


def _line(*values: str) -> str:
    """A line as ``LOAD DATA`` reads it by default."""
    escaped = (value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n") for value in values)
    return "\t".join(escaped) + "\n"


def _take_in(server: MariaDB, database: str, folder: Path, into: str, lines: Iterator[str]) -> None:
    pipe = folder / "load.pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with pipe.open("w", encoding="utf-8", newline="", buffering=1 << 20) as out:
                out.writelines(lines)
        except BaseException as exc:  # noqa: BLE001 (told below)
            failed.append(exc)

    writer = threading.Thread(target=write, daemon=True)
    with server.connect(database=database, local_infile=True) as connection, connection.cursor() as cursor:
        cursor.execute("SET unique_checks = 0, foreign_key_checks = 0, time_zone = '+00:00'")
        writer.start()
        table, _, columns = into.partition(" ")
        cursor.execute(f"LOAD DATA LOCAL INFILE '{pipe}' INTO TABLE {table} CHARACTER SET utf8mb4 {columns}")
        connection.commit()
    writer.join()
    pipe.unlink()
    if failed:
        raise failed[0]
