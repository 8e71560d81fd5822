"""What was written for the tables of Salt's mysql returner goes on working beside the engine: Alcali, saltext.mysql.

On tables of ours, and on tables of the documented old shape, which the engine writes to as they are.
"""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import saltext_returner
from tests.support.alcali import OWN_TABLES, Alcali, own_rows
from tests.support.asking import Answer, ask, returner, values
from tests.support.scratch import Scratch
from tests.support.shipping import (
    MASTER,
    Shipping,
    body,
    call_data,
    jid,
    master_data,
    published,
    return_data,
    returned,
)

Make = Callable[..., Shipping]
Ask = Callable[..., list[Answer]]

OURS, OLD = "ours", "documented"
COLUMNS = {
    "jids": ["jid", "load"],
    "salt_returns": ["fun", "jid", "return", "id", "success", "full_ret", "alter_time"],
    "salt_events": ["id", "tag", "data", "alter_time", "master_id"],
}


@pytest.fixture(params=[OURS, OLD])
def shape(request: pytest.FixtureRequest, database: Scratch) -> str:
    """Tables of ours, which the engine makes, or those of saltext.mysql's docstring, which stand there before it."""
    if request.param == OLD:
        documented(database)
    return str(request.param)


def documented(database: Scratch) -> None:
    """The tables of saltext.mysql's docstring."""
    database.sql(f"ALTER DATABASE `{database.name}` DEFAULT CHARACTER SET utf8 DEFAULT COLLATE utf8_general_ci")
    for statement in saltext_returner.documented_schema():
        database.sql(statement)


@pytest.fixture
def alcali(database: Scratch) -> Iterator[Callable[[], Alcali]]:
    """Opens an Alcali on the test's database, once there are tables."""
    opened: list[Alcali] = []

    def make() -> Alcali:
        opened.append(Alcali(database))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def at(day: int, hour: int = 12) -> str:
    """An event's `_stamp`."""
    return f"2026-03-{day:02}T{hour:02}:00:00.000000"


def highstate(*results: bool | None) -> dict[str, Any]:
    """What a state run returns."""
    return {
        f"test_|-state{number}_|-state{number}_|-nop": {"result": result, "comment": "häß", "changes": {}}
        for number, result in enumerate(results)
    }


def answered(number: int, minion: str, value: Any = True, **changes: Any) -> bytes:
    """A return of job `number`."""
    return returned(jid(number), minion, value, **changes)


JOBS = [
    published(jid(1), ["web1", "web2"], user="sudo_alice"),
    answered(1, "web1", _stamp=at(1)),
    answered(1, "web2", _stamp=at(1, 13)),
    # A job of everything, well; then one of a single state, ill; then a dry run of everything, ill.
    answered(2, "web1", highstate(True, True), fun="state.highstate", fun_args=[], _stamp=at(2)),
    answered(3, "web1", highstate(False), fun="state.apply", fun_args=["app"], success=False, retcode=2, _stamp=at(3)),
    answered(
        4, "web2", highstate(True, False), fun="state.apply", fun_args=["test=True"], success=False, retcode=2,
        _stamp=at(3, 13),
    ),
    answered(
        5, "web1", "no", fun="cmd.run", fun_args=["false", "shell=/bin/sh"], success=False, retcode=1,
        _stamp=at(3, 14),
    ),
    body(
        f"salt/job/{jid(6)}/ret/web3",
        call_data(jid(6), "web3", {"a": 1}, fun="test.arg", fun_args=["x"], _stamp=at(4)),
    ),
    body(f"salt/run/{jid(7)}/ret", master_data(jid(7), "runner.jobs.active", {}, _stamp=at(5))),
    body(f"salt/wheel/{jid(8)}/ret", master_data(jid(8), "wheel.key.list_all", {}, success=False, _stamp=at(5, 13))),
    body(
        f"salt/job/{jid(9)}/ret/web1",
        return_data(
            jid(9), "web1", {"test.ping": True, "test.arg": "x"}, fun=["test.ping", "test.arg"], fun_args=[[], ["x"]],
            success={"test.ping": True, "test.arg": True}, retcode={"test.ping": 0, "test.arg": 0}, _stamp=at(6),
        ),
    ),
    answered(10, "web2", "find", fun="saltutil.find_job", _stamp=at(6, 13)),
]  # fmt: skip


async def filled(shipping: Make, **options: Any) -> None:
    """The jobs above in the tables, those that the master asks by itself too."""
    async with shipping(skip_functions=[], **options) as ship:
        books = await ship.ship(*JOBS)
        assert (books["written"], books["dead_letters"]) == (len(JOBS), 0)


# Alcali


async def test_alcali_lists_every_return_with_the_user_of_its_job(
    database: Scratch, shipping: Make, alcali: Callable[[], Alcali], shape: str
) -> None:
    await filled(shipping)
    jobs = alcali().jobs()
    assert [(job["jid"], job["id"]) for job in jobs] == [
        (jid(9), "web1"),
        (jid(8), MASTER),
        (jid(7), MASTER),
        (jid(6), "web3"),
        (jid(5), "web1"),
        (jid(4), "web2"),
        (jid(3), "web1"),
        (jid(2), "web1"),
        (jid(1), "web2"),
        (jid(1), "web1"),
    ]
    by_job = {(job["jid"], job["id"]): job for job in jobs}
    assert by_job[jid(1), "web2"]["user"] == "sudo_alice"
    assert by_job[jid(6), "web3"]["user"] == ""  # nobody published a salt-call
    failed = by_job[jid(5), "web1"]
    assert (failed["arguments"], failed["keyword_arguments"], failed["success_bool"]) == (
        "false",
        "shell=/bin/sh",
        False,
    )
    assert by_job[jid(7), MASTER]["success_bool"] is True
    assert alcali().users() == {"root", "sudo_alice", ""}
    assert alcali().minions() == {"web1", "web2", "web3", MASTER}


async def test_alcali_has_empty_pages_where_there_is_nothing_to_show(
    database: Scratch, shipping: Make, alcali: Callable[[], Alcali], shape: str
) -> None:
    async with shipping() as ship:  # which stores no events
        await ship.ship(answered(1, "web1"))
    page = alcali()
    assert page.stats() == (1, 0)
    assert page.events() == []
    assert (page.jobs(targets=("web2",)), page.search("nothing"), page.last_highstate("web1")) == ([], [], None)


async def test_alcali_finds_one_row_for_a_job_and_a_minion_however_often_it_was_returned(
    database: Scratch, shipping: Make, alcali: Callable[[], Alcali], shape: str
) -> None:
    async with shipping() as ship:
        await ship.ship(answered(1, "web1"), answered(1, "web1"))
        await ship.ship(answered(1, "web1"), answered(1, "Web1", "another"), answered(1, "web2"))
    assert alcali().one(jid(1), "web2")["return"] == "true"
    assert len(alcali().job(jid(1))) == 3
    if shape == OURS:  # the old shape compares without case, and Alcali with it
        assert json.loads(alcali().one(jid(1), "web1")["full_ret"])["id"] == "web1"
        assert alcali().one(jid(1), "Web1")["return"] == '"another"'


async def test_alcali_filters_by_minion_by_date_and_by_text(
    database: Scratch, shipping: Make, alcali: Callable[[], Alcali], shape: str
) -> None:
    await filled(shipping)
    page = alcali()
    assert [job["jid"] for job in page.jobs(targets=("web2", "web3"))] == [jid(6), jid(4), jid(1)]
    assert {job["jid"] for job in page.jobs(dates=("2026-03-02", "2026-03-03"))} == {jid(2), jid(3), jid(4), jid(5)}
    assert {row["jid"] for row in page.search("state.")} == {jid(2), jid(3), jid(4)}
    assert {row["jid"] for row in page.search(jid(5))} == {jid(5)}
    last = page.last_job("web1")
    assert last is not None
    assert (last["jid"], last["alter_time"]) == (jid(9), datetime.datetime.fromisoformat(at(6)))


async def test_alcali_counts_the_errors_of_each_day(
    database: Scratch, shipping: Make, alcali: Callable[[], Alcali], shape: str
) -> None:
    await filled(shipping)
    page = alcali()
    assert page.graph("2026-02-25") == [
        ("2026-03-01", 2, 0),
        ("2026-03-02", 1, 0),
        ("2026-03-03", 3, 3),
        ("2026-03-04", 1, 0),
        ("2026-03-05", 2, 1),
        ("2026-03-06", 1, 0),
    ]
    assert page.graph("2026-02-25", fun="highstate") == [("2026-03-02", 1, 0), ("2026-03-03", 2, 2)]
    assert page.graph("2026-02-25", fun="other", minion="web1") == [
        ("2026-03-01", 1, 0),
        ("2026-03-03", 1, 1),
        ("2026-03-06", 1, 0),
    ]
    assert {row["success"] for row in database.rows("salt_returns")} == {"0", "1"}


async def test_alcali_knows_the_last_highstate_of_a_minion_and_whether_it_was_well(
    database: Scratch, shipping: Make, alcali: Callable[[], Alcali], shape: str
) -> None:
    await filled(shipping)
    page = alcali()
    found = page.last_highstate("web1")
    assert found is not None
    assert found["jid"] == jid(2)  # not that of a single state, which is newer
    assert [page.conformity(minion) for minion in ("web1", "web2", "web3")] == [True, False, None]


async def test_alcali_shows_the_last_fifty_events(
    database: Scratch, shipping: Make, alcali: Callable[[], Alcali], shape: str
) -> None:
    events = [
        body(f"my/app/{number}", {"number": number, "_stamp": f"2026-03-01T00:{number:02}:00.000000"})
        for number in range(60)
    ]
    async with shipping(events=["my/app/*"]) as ship:
        await ship.ship(*events)
    rows = alcali().events()
    assert [row["tag"] for row in rows] == [f"my/app/{number}" for number in range(59, 9, -1)]
    assert json.loads(rows[0]["data"])["number"] == 59
    assert {row["master_id"] for row in rows} == {MASTER}


async def test_tables_of_alcali_and_of_others_stay_untouched(database: Scratch, shipping: Make, shape: str) -> None:
    for statement in OWN_TABLES.values():
        database.sql(statement)
    database.sql("INSERT INTO salt_keys (minion_id, pub, status) VALUES ('web1', 'ab:cd', 'accepted')")
    database.sql("INSERT INTO salt_minions (minion_id, grain, pillar) VALUES ('web1', '{}', '{}')")
    before = dict(own_rows(database))
    await filled(shipping, events=["salt/*"])
    assert dict(own_rows(database)) == before


async def test_the_documented_columns_come_first_and_in_their_order(
    database: Scratch, shipping: Make, shape: str
) -> None:
    await filled(shipping, events=["salt/*"])
    for table, columns in COLUMNS.items():
        found = [row[0] for row in database.sql(f"SHOW COLUMNS FROM `{table}`")]
        assert found[: len(columns)] == columns
    load = next(row for row in database.rows("jids") if row["jid"] == jid(1))["load"]
    assert json.loads(load)["user"] == "sudo_alice"


# saltext.mysql 1.1.0


@pytest.fixture
def old(database: Scratch, tmp_path: Path) -> Ask:
    """Asks saltext.mysql's returner and ours through Salt's loader, at the test's database."""
    opts = {**database.mysql, "id": MASTER, "cachedir": str(tmp_path / "cache"), "sock_dir": str(tmp_path / "run")}
    return lambda *asks: ask(asks, opts=opts)


async def test_saltext_mysql_reads_what_the_engine_wrote(
    database: Scratch, shipping: Make, old: Ask, shape: str
) -> None:
    await filled(shipping)
    load, job, fun, jids, newest, everything, minions, nothing = values(
        old(
            returner("mysql.get_load", jid(1)),
            returner("mysql.get_jid", jid(1)),
            returner("mysql.get_fun", "state.highstate"),
            returner("mysql.get_jids"),
            returner("mysql.get_jids_filter", 3),
            returner("mysql.get_jids_filter", 3, False),
            returner("mysql.get_minions"),
            returner("mysql.get_load", jid(99)),
        )
    )
    assert (load["fun"], load["user"], load["Minions"]) == ("test.ping", "sudo_alice", ["web1", "web2"])
    assert {minion: full["return"] for minion, full in job.items()} == {"web1": True, "web2": True}
    assert fun["web1"]["jid"] == jid(2)
    assert sorted(jids) == [jid(number) for number in range(1, 11)]
    assert (jids[jid(1)]["User"], jids[jid(5)]["Function"], jids[jid(7)]["Target"]) == ("sudo_alice", "cmd.run", MASTER)
    assert jids[jid(9)]["Function"] == ["test.ping", "test.arg"]
    assert [its["JID"] for its in newest] == [jid(7), jid(8), jid(9)]
    assert [its["JID"] for its in everything] == [jid(8), jid(9), jid(10)]
    assert sorted(minions) == sorted([MASTER, "web1", "web2", "web3"])
    assert nothing == {}


OTHERS_JOB = {"cmd": "publish", "ret": "", "kwargs": {"metadata": {"team": "blue"}}, "jid": jid(1), "tgt": "web*",
              "tgt_type": "glob", "fun": "test.arg", "arg": ["grün"], "user": "sudo_bob"}  # fmt: skip


async def test_our_returner_reads_what_saltext_mysql_wrote(
    database: Scratch, shipping: Make, old: Ask, shape: str
) -> None:
    async with shipping() as ship:
        await ship.ship(answered(50, "web9"))  # the engine has been here, and made what was missing
    called = call_data(jid(2), "web2", "done", fun="state.apply", fun_args=[])
    wrote = old(
        returner("mysql.save_load", jid(1), OTHERS_JOB, ["web1", "web2"]),
        returner("mysql.returner", return_data(jid(1), "web1", "grün", fun="test.arg", fun_args=["grün"])),
        returner("mysql.returner", return_data(jid(1), "web2", None, fun="test.arg", success=False, retcode=3)),
        returner("mysql.save_load", jid(2), called),
        returner("mysql.returner", called),
        returner("mysql.save_load", jid(3), {**OTHERS_JOB, "jid": jid(3), "fun": "saltutil.find_job"}),
    )
    assert [answer.error for answer in wrote] == [None] * len(wrote)
    load, job, call, jids, newest, everything, fun, minions = values(
        old(
            returner("mysql_jobcache.get_load", jid(1)),
            returner("mysql_jobcache.get_jid", jid(1)),
            returner("mysql_jobcache.get_jid", jid(2)),
            returner("mysql_jobcache.get_jids"),
            returner("mysql_jobcache.get_jids_filter", 2),
            returner("mysql_jobcache.get_jids_filter", 2, False),
            returner("mysql_jobcache.get_fun", "test.arg"),
            returner("mysql_jobcache.get_minions"),
        )
    )
    assert {key: load[key] for key in OTHERS_JOB} == OTHERS_JOB
    assert {minion: (its["return"], its["success"], its["retcode"]) for minion, its in job.items()} == {
        "web1": ("grün", True, 0),
        "web2": (None, False, 3),
    }
    assert (call["web2"]["return"], call["web2"]["retcode"]) == ("done", 0)
    assert sorted(jids) == [jid(1), jid(2), jid(3), jid(50)]
    assert (jids[jid(1)]["Target"], jids[jid(1)]["Metadata"]) == ("web*", {"team": "blue"})
    assert [its["JID"] for its in newest] == [jid(2), jid(50)]
    assert [its["JID"] for its in everything] == [jid(3), jid(50)]
    assert fun["web1"]["return"] == "grün"
    assert sorted(minions) == ["web1", "web2", "web9"]


async def test_saltext_mysql_and_the_engine_write_into_the_same_tables_at_the_same_time(
    database: Scratch, shipping: Make, old: Ask, shape: str
) -> None:
    jobs = 60
    async with shipping(flush_interval=0.01, batch_size=5, events=["my/*"]) as ship:
        await ship.ship(answered(1, "first"))
        # Of each of these jobs one minion answers to the other returner, which also saves the load and an event.
        theirs = []
        for number in range(2, jobs):
            load = {**OTHERS_JOB, "jid": jid(number)}
            theirs += [
                returner("mysql.save_load", jid(number), load),
                returner("mysql.returner", return_data(jid(number), "theirs", f"their {number}", fun="test.arg")),
                returner("mysql.event_return", [{"tag": f"my/their/{number}", "data": {"number": number}}]),
            ]
        writing = asyncio.create_task(asyncio.to_thread(old, *theirs))
        sent = 0
        while not writing.done() or sent < jobs - 2:
            number = 2 + sent % (jobs - 2)
            await ship.ship(
                published(jid(number), ["ours", "theirs"], tgt="web*", fun="test.arg", user="sudo_bob"),
                answered(number, "ours", f"our {number}"),
                body(f"my/our/{sent}", {"number": sent, "_stamp": at(1)}),
            )
            sent += 1
        assert [answer.error for answer in await writing] == [None] * len(theirs)
        assert (await ship.books())["dead_letters"] == 0
    rows = database.rows("salt_returns")
    assert sorted((row["jid"], row["id"]) for row in rows) == sorted(
        [(jid(1), "first"), *((jid(number), minion) for number in range(2, jobs) for minion in ("ours", "theirs"))]
    )
    assert {row["return"] for row in rows if row["id"] == "theirs"} == {f'"their {n}"' for n in range(2, jobs)}
    loads = {row["jid"]: json.loads(row["load"]) for row in database.rows("jids")}
    assert len(loads) == len(database.rows("jids")) == jobs - 1
    for number in range(2, jobs):  # whoever came first: what the engine knows of the job is in it
        assert loads[jid(number)]["Minions"] == ["ours", "theirs"]
        assert (loads[jid(number)]["tgt"], loads[jid(number)]["user"]) == ("web*", "sudo_bob")
    tags = [row["tag"] for row in database.rows("salt_events")]
    assert len(tags) == len(set(tags)) == jobs - 2 + sent


async def test_a_return_that_saltext_mysql_wrote_first_stands_alone(
    database: Scratch, shipping: Make, old: Ask, shape: str
) -> None:
    async with shipping() as ship:
        await ship.ship(answered(50, "web9"))
        first = return_data(jid(1), "web1", "first")
        assert old(returner("mysql.save_load", jid(1), first), returner("mysql.returner", first))[1].error is None
        books = await ship.ship(answered(1, "web1", "first"), answered(1, "web2"))
        assert (books["duplicates"], books["dead_letters"]) == (1, 0)
    assert [(row["id"], row["return"]) for row in database.rows("salt_returns") if row["jid"] == jid(1)] == [
        ("web1", '"first"'),
        ("web2", "true"),
    ]


async def test_on_tables_of_ours_saltext_mysql_cannot_store_a_return_twice(
    database: Scratch, shipping: Make, old: Ask
) -> None:
    async with shipping() as ship:
        await ship.ship(published(jid(1), ["web1"]), answered(1, "web1"))
    same, load, other = old(
        returner("mysql.returner", return_data(jid(1), "web1", "again")),
        returner("mysql.save_load", jid(1), OTHERS_JOB),
        returner("mysql.returner", return_data(jid(1), "web2")),
    )
    assert same.error is not None and "Duplicate entry" in same.error
    assert (load.error, other.error) == (None, None)
    assert [(row["id"], row["return"]) for row in database.rows("salt_returns")] == [("web1", "true"), ("web2", "true")]
    assert json.loads(database.row("jids")["load"])["Minions"] == ["web1"]
