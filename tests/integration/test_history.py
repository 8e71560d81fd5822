"""The runner's questions to a real server: every filter beside the same question asked in Python, page by page."""

from __future__ import annotations

import fnmatch
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from salt_mysql_engine import history, schema
from salt_mysql_engine.backfill import backfill
from salt_mysql_engine.errors import EngineError, ServerUnavailable
from salt_mysql_engine.steady import Steady
from tests.integration.test_schema import database_of
from tests.support.mariadb import MariaDB
from tests.support.oldtables import MAKERS
from tests.support.scratch import Scratch, scratch, sequence
from tests.support.shipping import MASTER, Shipping, body, published, return_data, returned

pytestmark = pytest.mark.usefixtures("own_connections")

Make = Callable[..., Shipping]

FUNS = ("test.ping", "test.arg", "state.apply", "state.sls", "cmd.run", "a%b", "a_b", "x|y\\z'\"")
USERS = ("root", "sudo_alice", "bob")
TARGETS = ("*", "web*", "web1", "web1,web2", "G@os:Debian and 'x'")
OF_RETURN = "`fun`, `jid`, `return`, `id`, `success`, `full_ret`"
MINIONS = ("web1", "web2", "db1", "db_1", "db%1", "Web1", "grün/..")


class Made(NamedTuple):
    """A job as it was made: its answers are whether each minion failed."""

    jid: str
    fun: str
    user: str
    target: str
    answers: dict[str, bool]
    minions: list[str]


def master(database: Scratch, tmp_path: Path) -> dict[str, Any]:
    return {**database.mysql, "id": MASTER, "cachedir": str(tmp_path), "master_job_cache": "mysql_jobcache"}


def at(number: int) -> str:
    """The jid of a job: one a minute."""
    return f"20260329{number // 60:02}{number % 60:02}00{number:06}"


def make_jobs(count: int = 150) -> list[Made]:
    """Jobs in the order of their jids; the same ones each time."""
    chance = random.Random(7)
    made = []
    for number in range(count):
        minions = chance.sample(MINIONS, chance.randint(1, len(MINIONS)))
        answered = chance.sample(minions, chance.randint(0, len(minions)))
        made.append(
            Made(
                at(number),
                chance.choice(FUNS),
                chance.choice(USERS),
                chance.choice(TARGETS),
                {minion: chance.random() < 0.2 for minion in answered},
                minions,
            )
        )
    return made


def store(database: Scratch, jobs: list[Made], *, columns: bool = True) -> None:
    """The rows, with the columns that other writers do not know or without. Half of what failed says `success`."""
    names = "`jid`, `load`, `fun`, `user`, `tgt`" if columns else "`jid`, `load`"
    loads: list[list[Any]] = []
    returns: list[list[Any]] = []
    for job in jobs:
        target: Any = job.target.split(",") if "," in job.target else job.target
        load = {"jid": job.jid, "fun": job.fun, "user": job.user, "tgt": target, "arg": [], "Minions": job.minions}
        own = [job.fun, job.user, job.target] if columns else []
        loads.append([job.jid, json.dumps(load, ensure_ascii=False), *own])
        for minion, failed in job.answers.items():
            success = not failed or len(returns) % 2 == 0
            value = "no" if failed else True
            ret = return_data(job.jid, minion, value, fun=job.fun, retcode=int(failed), success=success)
            row = [job.fun, job.jid, json.dumps(value), minion, str(int(success)), json.dumps(ret)]
            returns.append([*row, int(failed)] if columns else row)
    with database.server.connect(database=database.name) as connection, connection.cursor() as cursor:
        cursor.executemany(f"INSERT INTO jids ({names}) VALUES ({', '.join(['%s'] * len(loads[0]))})", loads)
        into = f"{OF_RETURN}, `failed`" if columns else OF_RETURN
        marks = ", ".join(["%s"] * len(returns[0]))
        cursor.executemany(f"INSERT INTO salt_returns ({into}) VALUES ({marks})", returns)


def tables(database: Scratch) -> None:
    for ddl in schema.statements().values():
        database.sql(ddl)


def wanted(job: Made, **filters: Any) -> bool:
    """The question, asked in Python."""

    def like(text: str, glob: str | None) -> bool:
        if glob is None:
            return True
        # Brackets are themselves in our globs.
        return fnmatch.fnmatchcase(text, glob.replace("[", "[[]"))

    answers = {name: failed for name, failed in job.answers.items() if like(name, filters.get("minion"))}
    return (
        like(job.fun, filters.get("fun"))
        and like(job.user, filters.get("user"))
        and like(job.target, filters.get("target"))
        and ("minion" not in filters or bool(answers))
        and (not filters.get("failed") or any(answers.values()))
        and filters.get("since", "") <= job.jid
        and job.jid <= filters.get("until", "9")
    )


QUESTIONS: list[dict[str, Any]] = [
    {},
    {"fun": "test.ping"},
    {"fun": "test.*"},
    {"fun": "*e*"},
    {"fun": "a%b"},
    {"fun": "a_b"},
    {"fun": "a?b"},
    {"fun": "*%*"},
    {"fun": "*|*"},
    {"fun": "x|y\\z'\""},
    {"fun": "*\\z'\""},
    {"fun": "*"},
    {"fun": "Test.Ping"},
    {"user": "bob"},
    {"user": "sudo_*"},
    {"user": "s?do_alice"},
    {"target": "*"},
    {"target": "web*"},
    {"target": "web1,web2"},
    {"target": "*'x'"},
    {"minion": "web1"},
    {"minion": "web?"},
    {"minion": "db_1"},
    {"minion": "db%1"},
    {"minion": "*"},
    {"minion": "grün/.."},
    {"failed": True},
    {"failed": True, "minion": "web1"},
    {"failed": True, "minion": "db*"},
    {"failed": True, "fun": "state.*"},
    {"fun": "test.ping", "user": "root", "target": "web*", "minion": "w*", "failed": True},
    {"since": at(30), "until": at(90)},
    {"since": at(30), "fun": "cmd.run"},
    {"until": at(90), "failed": True},
    {"since": at(140), "minion": "web*"},
    {"fun": "nothing.*"},
    {"minion": "nobody"},
    {"minion": "nobody*"},
]
HOSTILE = [
    "' OR '1'='1",
    "') UNION SELECT 1 -- ",
    "\\",
    "\\'",
    "%",
    "%%",
    "_",
    "\0",
    "..",
    "../../etc/passwd",
    "[a-z]*",
    "%s",
]


def ask(opts: dict[str, Any], **filters: Any) -> list[str]:
    return list(history.jobs(opts, limit=1000, **filters))


@pytest.fixture(scope="module")
def filled(mariadb: MariaDB) -> Iterator[Scratch]:
    with scratch(mariadb) as database:
        tables(database)
        store(database, make_jobs())
        yield database


@pytest.mark.parametrize("filters", QUESTIONS, ids=str)
def test_a_filter_leaves_the_jobs_that_it_says(filled: Scratch, tmp_path: Path, filters: dict[str, Any]) -> None:
    expected = [job.jid for job in reversed(make_jobs()) if wanted(job, **filters)]
    assert ask(master(filled, tmp_path), **filters) == expected


@pytest.mark.parametrize("many", [0, 64])
@pytest.mark.parametrize("filters", QUESTIONS, ids=str)
def test_globs_that_match_many_values_and_those_that_match_few_are_one(
    filled: Scratch, tmp_path: Path, filters: dict[str, Any], many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_mysql_engine.search._MANY_VALUES", many)
    assert ask(master(filled, tmp_path), **filters) == [
        job.jid for job in reversed(make_jobs()) if wanted(job, **filters)
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_sql_in_a_filter_is_data(filled: Scratch, tmp_path: Path, text: str) -> None:
    opts = master(filled, tmp_path)
    for name in ("fun", "user", "target", "minion"):
        for glob in (text, f"{text}*"):
            expected = [job.jid for job in reversed(make_jobs()) if wanted(job, **{name: glob})]
            assert ask(opts, **{name: glob}) == expected
    assert history.minion(opts, text) == {}
    assert filled.count("jids") == 150


@pytest.mark.parametrize("filters", [{}, {"fun": "test.*"}, {"minion": "web*"}, {"failed": True}], ids=str)
def test_pages_follow_each_other_without_a_gap(filled: Scratch, tmp_path: Path, filters: dict[str, Any]) -> None:
    opts = master(filled, tmp_path)
    found: list[str] = []
    while page := list(history.jobs(opts, limit=7, after=found[-1] if found else None, **filters)):
        assert len(page) <= 7
        found += page
    assert found == ask(opts, **filters)
    assert len(found) > 7
    assert ask(opts, after=found[3], until=found[1], **filters) == found[4:]
    assert ask(opts, after=found[1], until=found[3], **filters) == found[3:]


def test_a_job_is_listed_with_its_counts(filled: Scratch, tmp_path: Path) -> None:
    listed = history.jobs(master(filled, tmp_path), limit=1000)
    for job in make_jobs():
        line = listed[job.jid]
        assert (line["fun"], line["user"], line["target"]) == (job.fun, job.user, job.target)
        assert (line["targeted"], line["answered"]) == (len(job.minions), len(job.answers))
        assert line["failed"] == sum(job.answers.values())
        assert line["missing"] == len(job.minions) - len(job.answers)
        assert (
            line["started"] == f"{job.jid[:4]}-{job.jid[4:6]}-{job.jid[6:8]}T{job.jid[8:10]}:{job.jid[10:12]}:00+00:00"
        )


def test_jobs_that_others_wrote_are_found_before_anybody_fills_their_columns_in(
    database: Scratch, tmp_path: Path
) -> None:
    tables(database)
    jobs = make_jobs()
    store(database, jobs[::2])
    store(database, jobs[1::2], columns=False)
    for filters in QUESTIONS:
        assert ask(master(database, tmp_path), **filters) == [j.jid for j in reversed(jobs) if wanted(j, **filters)], (
            filters
        )


@pytest.mark.parametrize("style", MAKERS)
def test_tables_of_an_older_shape_are_searched_as_they_are(database: Scratch, tmp_path: Path, style: str) -> None:
    MAKERS[style](database)
    jobs = make_jobs()
    store(database, jobs, columns=False)
    opts = master(database, tmp_path)
    for filters in QUESTIONS:
        # Their columns compare without regard to case.
        if "Test.Ping" in filters.values() or "web1" in filters.values() or "w*" in filters.values():
            continue
        if any("eb" in str(glob) for glob in filters.values()):
            continue
        assert ask(opts, **filters) == [j.jid for j in reversed(jobs) if wanted(j, **filters)], filters
    database.sql(f"INSERT INTO salt_returns ({OF_RETURN}) SELECT {OF_RETURN} FROM salt_returns")  # twice each
    for jid, line in history.jobs(opts, limit=1000).items():
        (job,) = (job for job in jobs if job.jid == jid)
        assert (line["answered"], line["failed"]) == (len(job.answers), sum(job.answers.values()))
    assert history.job(opts, jobs[5].jid)["answered"] == len(jobs[5].answers)
    assert history.failures(opts, since=at(0))
    assert history.minion(opts, "db1")


async def test_one_job_is_told_with_who_answered_failed_and_is_missing(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    job = at(1)  # began at 00:01:00
    minions = ["web1", "web2", "web3", "web4"]
    async with shipping("mysql_jobcache") as ship:
        await ship.ship(
            published(job, minions, fun="state.apply", arg=["app"], user="sudo_alice", tgt="web*"),
            returned(job, "web1", fun="state.apply", _stamp="2026-03-29T00:01:02.500000"),
            returned(job, "web2", "ERROR: no\nmore", fun="state.apply", success=False, retcode=2,
                     _stamp="2026-03-29T00:01:10.000000"),
        )  # fmt: skip
    async with shipping("mysql_jobcache", paused=True) as ship:
        await ship.take(returned(job, "web4", "late", success=False, retcode=3, _stamp="2026-03-29T00:01:20.000000"))
        found = history.job(master(database, tmp_path), int(job))
    assert found == {
        "jid": job,
        "started": "2026-03-29T00:01:00+00:00",
        "fun": "state.apply",
        "arguments": ["app"],
        "target": "web*",
        "target_type": "glob",
        "user": "sudo_alice",
        "targeted": 4,
        "answered": 3,
        "failed": 2,
        "missing": 1,
        "not_in_mysql_yet": 1,
        "first_answer_after_seconds": 2.5,
        "last_answer_after_seconds": 20.0,
        "retcodes_of_failed": {"2": 1, "3": 1},
        "failed_minions": {
            "web2": {"retcode": 2, "reason": "ERROR: no"},
            "web4": {"retcode": 3, "reason": "late"},
        },
        "missing_minions": ["web3"],
        "answered_minions": ["web1", "web2", "web4"],
    }


def test_a_job_of_ten_thousand_minions_is_told_in_a_page(database: Scratch, tmp_path: Path) -> None:
    tables(database)
    load = {
        "jid": at(1),
        "fun": "test.ping",
        "tgt": "*",
        "arg": ["x" * 10_000],
        "Minions": [f"m{n}" for n in range(11_000)],
    }
    database.sql("INSERT INTO jids (jid, `load`, fun) VALUES (%s, %s, 'test.ping')", at(1), json.dumps(load))
    database.sql(
        f"INSERT INTO salt_returns ({OF_RETURN}) "
        "SELECT 'test.ping', %s, REPEAT('x', 100), CONCAT('m', seq), IF(seq %% 2, '0', '1'), "
        "CONCAT('{\"return\": 1, \"retcode\": ', seq %% 3, '}') FROM " + sequence(0, 9999),
        at(1),
    )
    found = history.job(master(database, tmp_path), at(1))
    bad = sum(number % 2 == 1 or number % 3 != 0 for number in range(10_000))
    assert (found["targeted"], found["answered"], found["failed"], found["missing"]) == (11_000, 10_000, bad, 1000)
    assert sum(found["retcodes_of_failed"].values()) == bad
    assert len(found["failed_minions"]) == len(found["missing_minions"]) == len(found["answered_minions"]) == 100
    assert len(json.dumps(found)) < 40_000


def test_a_minions_jobs_are_its_newest_with_what_came_of_them(filled: Scratch, tmp_path: Path) -> None:
    opts = master(filled, tmp_path)
    expected = [(job.jid, job.fun, not job.answers["db_1"]) for job in reversed(make_jobs()) if "db_1" in job.answers]
    found = history.minion(opts, "db_1", limit=1000)
    assert [(jid, line["fun"], line["success"]) for jid, line in found.items()] == expected
    assert [line["retcode"] for line in found.values()] == [int(not success) for _, _, success in expected]
    assert list(history.minion(opts, "db_1", limit=3)) == [jid for jid, _, _ in expected[:3]]
    assert history.minion(opts, "nobody") == history.minion(opts, "db*") == {}


def test_failures_are_the_newest_returns_that_failed(filled: Scratch, tmp_path: Path) -> None:
    opts = master(filled, tmp_path)
    expected = {
        (job.jid, minion)
        for job in make_jobs()
        for minion, failed in job.answers.items()
        if failed and job.jid >= at(50)
    }
    found = history.failures(opts, since=at(50), limit=1000)
    assert {(jid, minion) for jid, its in found.items() for minion in its} == expected
    assert list(found) == sorted(found, reverse=True)
    assert {line["reason"] for its in found.values() for line in its.values()} == {"no"}
    assert {line["retcode"] for its in found.values() for line in its.values()} == {1}
    assert sum(map(len, history.failures(opts, since=at(50), limit=5).values())) == 5
    assert history.failures(opts, since="2026-03-30") == {}


SCHEDULED = {"s1": {"result": True}, "s2": {"result": False, "comment": "No such file", "__id__": "/etc/app"}}
OUTCOMES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"success": False}, True),
    ({"success": False, "retcode": 2}, True),
    ({"success": True, "retcode": 2}, True),  # a state that the minion's schedule ran
    ({"retcode": -1}, True),
    ({"retcode": True}, True),
    ({"retcode": False}, False),
    ({"retcode": None}, False),
    ({"retcode": 0.0}, False),
    ({"retcode": "0"}, False),
    ({"retcode": "10"}, True),
    ({"retcode": "null and void"}, True),
    ({"retcode": {}}, False),
    ({"retcode": []}, False),
    ({"retcode": [0, 0]}, False),
    ({"retcode": [0, 20]}, True),
    ({"retcode": {"test.ping": 0, "test.arg": 0}}, False),
    ({"retcode": {"test.ping": 0, "1": 30}}, True),
    ({"retcode": {"a": [0, {"b": 0}]}}, True),
]


async def test_failed_is_what_says_no_success_or_a_retcode_that_is_not_0(
    database: Scratch, shipping: Make, tmp_path: Path
) -> None:
    opts = master(database, tmp_path)
    runner = {"jid": at(99), "fun": "runner.x.y", "user": "root", "fun_args": [], "return": {}, "success": True}
    async with shipping() as ship:
        await ship.ship(
            *(returned(at(n), "web1", SCHEDULED, **said) for n, (said, _) in enumerate(OUTCOMES)),
            body(f"salt/run/{at(99)}/ret", {**runner, "retcode": 1}),
        )
    bad = [at(n) for n, (_, failed) in enumerate(OUTCOMES) if failed] + [at(99)]

    def check() -> None:
        found = history.failures(opts, since=at(0))
        assert list(found) == ask(opts, failed=True) == ask(opts, failed=True, fun="*.*") == bad[::-1]
        assert {line["reason"] for its in found.values() for line in its.values()} == {
            "1 of 2 states failed: /etc/app: No such file", "{}"
        }  # fmt: skip
        for jid, line in history.jobs(opts).items():
            assert line["failed"] == history.job(opts, jid)["failed"] == (jid in bad)
        shown = history.minion(opts, "web1", limit=100)
        assert [jid for jid, line in shown.items() if not line["success"]] == bad[-2::-1]

    check()
    stored = database.sql("SELECT jid, failed FROM salt_returns ORDER BY jid")
    assert [jid for jid, failed in stored if failed] == bad
    database.sql("UPDATE salt_returns SET failed = NULL WHERE jid > %s", at(3))  # as other writers leave it
    check()
    async with Steady(database_of(database), "test", patience=10) as steady:
        shape = schema.shape_of(await steady.transaction(schema.look))
        while await steady.transaction(lambda session: backfill(session, shape, limit=7)):
            pass
    assert database.sql("SELECT jid, failed FROM salt_returns ORDER BY jid") == stored
    database.sql("ALTER TABLE salt_returns DROP COLUMN failed")
    check()


def test_values_too_large_and_texts_that_are_no_json_fail_for_a_reason_too(database: Scratch, tmp_path: Path) -> None:
    tables(database)
    values = (
        json.dumps("x" * 300_000),
        "no json",
        "",
        json.dumps({"s": {"result": False, "comment": "c", "__id__": "i"}}),
    )
    for number, value in enumerate(values):
        statement = f"INSERT INTO salt_returns ({OF_RETURN}) VALUES ('f', %s, %s, 'web1', '0', %s)"
        database.sql(statement, at(number), value, value)
    found = history.failures(master(database, tmp_path), since=at(0))
    assert [found[at(number)]["web1"]["reason"] for number in range(4)] == [
        "a value of 300002 bytes", "no json", "", "1 of 1 states failed: i: c"
    ]  # fmt: skip
    assert {found[at(number)]["web1"]["retcode"] for number in range(4)} == {None}


def test_an_unknown_job_is_said_to_be_none(filled: Scratch, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"there is no job {at(999)}"):
        history.job(master(filled, tmp_path), at(999))


async def test_with_mysql_away_a_job_is_what_the_journal_holds(
    shipping: Make, tmp_path: Path, database: Scratch
) -> None:
    opts = {**master(database, tmp_path), "mysql.port": 1}
    async with shipping("mysql_jobcache", paused=True) as ship:
        await ship.take(published(at(1), ["web1", "web2"]), returned(at(1), "web1"))
        found = history.job(opts, at(1))
        assert (found["fun"], found["answered"], found["missing_minions"]) == ("test.ping", 1, ["web2"])
        assert "this is what the journal holds; the database does not answer: 127.0.0.1:1" in found["error"]
        for question in (history.jobs, history.failures):
            with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
                question(opts)
        with pytest.raises(ServerUnavailable):
            history.job(opts, at(2))
