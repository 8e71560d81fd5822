"""``master_job_cache: mysql_jobcache``: the master's processes hand over jobs and returns, and read what they wrote."""

from __future__ import annotations

import datetime
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from salt_mysql_engine import spool
from tests.support.asking import PUBLISHED, Answer, Ask, ask, publish, returner, runner, values
from tests.support.mariadb import wait_until
from tests.support.salt import SaltMaster, SaltMinion, fire
from tests.support.syndic import SaltSyndic
from tests.system import test_jobs
from tests.system.conftest import ENGINE, PATIENCE, Site, ended
from tests.system.test_fault_forgery import VICTIM, attacker, forged, ret, unknown_jid
from tests.system.test_faults import SERIES
from tests.system.test_jobs import WHEEL, output_of

HANDED_OFF = {
    "master_job_cache": ENGINE,
    "job_cache_store_endtime": True,
    "event_return": ENGINE,
    "event_return_whitelist": ["my/app/*"],
}
AT_ONCE = 3.0
"""Seconds that no fault of the database's or the engine's may add to a command."""
CONNECT_SECONDS = 5.0


@pytest.fixture(scope="module")
def site(make_module_site: Callable[..., Site]) -> Iterator[Site]:
    """A master with the engine that keeps no job cache but ours, and two minions. Tests leave it as they found it."""
    here = make_module_site(HANDED_OFF)
    with here.master, here.minion("alpha", {"max_event_size": 50_000_000}), here.minion("beta"):
        for minion in here.minions.values():
            minion.wait_ready()
        yield here


def asked(site: Site, *asks: Ask) -> list[Answer]:
    return ask(asks, config=site.master.config_dir / "master")


def quickly(site: Site, *args: str, within: float) -> subprocess.CompletedProcess[str]:
    """What ``salt`` gives in so many seconds.

    That of 3007 leaves the bus for a moment whenever nothing came for one (``PublishClient.recv``,
    salt/transport/tcp.py), and waits for its timeout where a return came just then: one quick answer of three will do.
    """
    for _ in range(3 if SERIES == 3007 else 1):
        began = time.monotonic()
        done = site.master.cli("salt", "--out=json", "--timeout=60", *args)
        took = time.monotonic() - began
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done
        if took < within:
            break
    assert took < within
    return done


def printed(site: Site, *args: str, within: float = PATIENCE) -> dict[str, Any]:
    """What ``salt`` prints, without waiting for its timeout. (With ``--static`` it would be a batch job.)"""
    done = quickly(site, *args, within=within)
    decoder, answers, rest = json.JSONDecoder(), {}, done.stdout.strip()
    while rest:
        document, end = decoder.raw_decode(rest)
        answers |= document
        rest = rest[end:].lstrip()
    return answers


def newest_jid(site: Site, fun: str) -> str:
    """The jid of the newest job of a function, once the tables have it."""
    return str(site.wait_for("SELECT jid FROM jids WHERE fun = %s ORDER BY jid DESC LIMIT 1", fun)[0])


def listed(site: Site, jid: str) -> dict[str, Any]:
    """``salt-run jobs.list_job``, without `ext_source`."""
    (job,) = values(asked(site, runner("jobs.list_job", jid)))
    return dict(job)


def handed_over(site: Site) -> list[tuple[str, str]]:
    """The jid and minion of every event in the spool, and in the journal of an engine that does not run."""
    place = site.master.directory / "cache" / ENGINE
    found: list[tuple[str, str]] = []
    for path in (place / spool.FOLDER).glob("*"):
        content = path.read_bytes()
        header = spool.header_of(content)
        if header is not None:
            records, _, _ = spool.parse(content[spool.HEADER.size :], header.key)
            found += [(record.jid, record.minion) for record in records]
    return found


def shipped(site: Site) -> dict[str, Any]:
    """The books once all is in the tables; they balance, and nothing was lost or set aside."""
    site.master.run(f"{ENGINE}.flush")
    books = dict(site.status()["books"])
    assert (books["dead_letters"], books["dropped"]) == (0, {})
    return books


@pytest.mark.smoke
def test_salt_prints_every_answer_and_the_tables_have_them(site: Site) -> None:
    assert printed(site, "*", "test.echo", "grün 🧂") == {"alpha": "grün 🧂", "beta": "grün 🧂"}
    rows = site.returned(newest_jid(site, "test.echo"), "alpha", "beta")
    assert {row["return"] for row in rows.values()} == {'"grün 🧂"'}
    load = json.loads(site.load(rows["alpha"]["jid"]) or "")
    assert (load["fun"], load["tgt"], load["arg"], load["user"]) == ("test.echo", "*", ["grün 🧂"], "root")
    assert sorted(load["Minions"]) == ["alpha", "beta"]
    assert "kwargs" in load  # which no event on the bus has


@pytest.mark.smoke
def test_a_job_is_found_at_the_moment_it_is_published(site: Site) -> None:
    jid, load, job, answers, newest = values(
        asked(
            site,
            publish("*", "test.sleep", 2),
            returner(f"{ENGINE}.get_load", PUBLISHED),
            runner("jobs.list_job", PUBLISHED),
            runner("jobs.lookup_jid", PUBLISHED, missing=True),
            runner("jobs.list_jobs_filter", 1),
        )
    )
    assert (load["fun"], load["arg"], load["Minions"]) == ("test.sleep", [2], ["alpha", "beta"])
    assert (job["Function"], job["Minions"], job["Result"]) == ("test.sleep", ["alpha", "beta"], {})
    assert answers == dict.fromkeys(("alpha", "beta"), "Minion did not return")
    assert [its["JID"] for its in newest] == [jid]
    site.returned(jid, "alpha", "beta")
    assert site.master.run("jobs.lookup_jid", jid) == {"alpha": True, "beta": True}


def test_a_job_in_batches_prints_and_stores_every_answer(site: Site) -> None:
    done = site.master.cli("salt", "-b", "1", "--out=json", "*", "test.echo", "in batches")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in batches") == 2
    where = "WHERE `return` = '\"in batches\"'"
    wait_until(
        lambda: site.database.sql(f"SELECT COUNT(*) FROM salt_returns {where}") == [(2,)],
        timeout=PATIENCE,
        what="both returns",
    )
    rows = [row for row in site.database.rows("salt_returns") if row["return"] == '"in batches"']
    assert sorted(row["id"] for row in rows) == ["alpha", "beta"]
    for jid in {row["jid"] for row in rows}:  # one on 3008, one for each minion before
        job = listed(site, jid)
        assert job["Minions"] == sorted(row["id"] for row in rows if row["jid"] == jid)
        assert (job["Function"], sorted(job["Result"])) == ("test.echo", job["Minions"])


@pytest.mark.smoke
def test_salt_call_schedules_runners_wheels_and_orchestrations_are_jobs(site: Site) -> None:
    (site.states / "orch.sls").write_text("inner:\n  salt.function:\n    - name: test.kwarg\n    - tgt: '*'\n")
    site.minions["alpha"].call("test.outputter", "here")
    site.minions["alpha"].cli("salt-call", "cmd.run_all", "exit 3")
    site.master.salt("beta", "schedule.add", "tick", "function=test.arg_repr", "seconds=1", "maxrunning=1")
    site.master.run("test.arg", "one", "two=2")
    site.master.run("state.orchestrate", "orch")
    subprocess.run([sys.executable, "-c", WHEEL, str(site.master.config_dir / "master")], check=True)
    ids = {
        fun: newest_jid(site, fun)
        for fun in (
            "test.outputter", "cmd.run_all", "test.arg_repr", "runner.test.arg", "runner.state.orchestrate",
            "wheel.key.list_all", "test.kwarg",
        )
    }  # fmt: skip
    site.master.salt("beta", "schedule.delete", "tick")
    expected = {"test.outputter": {"alpha"}, "cmd.run_all": {"alpha"}, "test.arg_repr": {"beta"},
                "test.kwarg": {"alpha", "beta"}}  # fmt: skip
    for fun, jid in ids.items():
        site.returned(jid, *expected.get(fun, {"lab_master"}))
    jobs = dict(zip(ids, values(asked(site, *(runner("jobs.list_job", jid) for jid in ids.values()))), strict=True))
    for fun, job in jobs.items():
        assert job["Function"] == fun
        assert job["Result"].keys() == expected.get(fun, {"lab_master"})
    assert (jobs["test.outputter"]["Arguments"], jobs["test.outputter"]["Target"]) == (["here"], "alpha")
    assert jobs["cmd.run_all"]["Result"]["alpha"]["retcode"] == 3
    assert jobs["runner.test.arg"]["Result"]["lab_master"]["return"]["return"] == {
        "args": ["one"],
        "kwargs": {"two": 2},
    }
    ((success,),) = site.database.sql("SELECT success FROM salt_returns WHERE jid = %s", ids["cmd.run_all"])
    assert success == "0"
    for jid in ids.values():  # once, though the bus has each of them too
        assert site.database.sql("SELECT COUNT(*) FROM jids WHERE jid = %s", jid) == [(1,)]


@pytest.mark.smoke
def test_a_return_that_is_larger_than_the_bus_carries_is_stored_whole(site: Site) -> None:
    for minion, mebibytes in (("beta", 2), ("alpha", 5)):
        if minion == "beta":  # its salt-call sends everything; the master trims what it puts on the bus
            site.minions[minion].call("cmd.run", output_of(mebibytes))
            jid = newest_jid(site, "cmd.run")
        else:
            jid = test_jobs.publish(site, minion, "cmd.run", output_of(mebibytes))
        (row,) = site.returned(jid, minion).values()
        assert json.loads(row["return"]) == "x" * mebibytes * 2**20
        assert "trimmed" not in json.loads(row["full_ret"])
        (answer,) = values(asked(site, runner("jobs.lookup_jid", jid)))
        assert answer == {minion: "x" * mebibytes * 2**20}


def test_a_jobs_end_is_known(site: Site) -> None:
    jid = test_jobs.publish(site, "*", "test.sleep", "1")
    site.returned(jid, "alpha", "beta")
    job, jobs, end = values(
        asked(
            site,
            runner("jobs.list_job", jid),
            runner("jobs.list_jobs", search_function="test.sleep"),
            returner(f"{ENGINE}.get_endtime", jid),
        )
    )
    moment = datetime.datetime.strptime(end, "%Y, %b %d %H:%M:%S.%f").replace(tzinfo=datetime.timezone.utc)
    start = datetime.datetime.strptime(jid, "%Y%m%d%H%M%S%f").replace(tzinfo=datetime.timezone.utc)
    assert datetime.timedelta(seconds=1) <= moment - start < datetime.timedelta(seconds=PATIENCE)
    assert job["EndTime"] == jobs[jid]["EndTime"] == end


@pytest.mark.smoke
def test_event_return_stores_chosen_events_and_no_others(site: Site) -> None:
    site.minions["alpha"].call("event.send", "my/app/started", '{"version": "1.2"}')
    fire(site.master, "my/other", {"nothing": 1})
    tag, data, master = site.wait_for("SELECT tag, data, master_id FROM salt_events WHERE tag LIKE 'my/%%'")
    assert (tag, master) == ("my/app/started", "lab_master")
    assert json.loads(data)["data"]["version"] == "1.2"
    shipped(site)
    assert site.database.sql("SELECT DISTINCT tag FROM salt_events") == [("my/app/started",)]
    assert site.database.count("salt_events") == 1


def test_what_a_minion_forges_on_the_bus_is_never_a_row_nor_an_answer(site: Site) -> None:
    unknown, invented, empty = unknown_jid(1), unknown_jid(2), unknown_jid(3)
    with attacker(site.master) as mallory:
        load = {"tgt": VICTIM, "tgt_type": "glob", "fun": "forged", "arg": [], "user": "root", "minions": [VICTIM]}
        mallory.fire(ret(unknown), forged(unknown))
        mallory.fire("new", {"jid": invented, **load}, pretag=f"salt/job/{invented}")
        mallory.fire(f"salt/run/{unknown}/ret", {"jid": unknown, "fun": "runner.forged", "return": "forged"})
        for prefix in ("minions/", "event/my/app/"):  # the names of what we journal ourselves
            mallory.fire(f"{ENGINE}/{prefix}{unknown}", {"jid": unknown, "minions": ["forged"]})
        mallory.fire("whatever", {"jid": empty, "minions": ["forged"]})  # which the master gives to save_minions
        jid = test_jobs.publish(site, VICTIM, "test.sleep", "3")
        for job in (jid, unknown):
            mallory.fire(ret(job), forged(job))
        mallory.fire(ret(jid, "nobody"), forged(jid, "nobody"))
        mallory.fire("new", {"jid": jid, **load}, pretag=f"salt/job/{jid}")
        assert values(asked(site, runner("jobs.lookup_jid", jid), runner("jobs.lookup_jid", unknown))) == [{}, {}]
        row = site.returned(jid, VICTIM)[VICTIM]
        mallory.fire(ret(jid), forged(jid))
    (site.master.directory / "pki" / "minions" / "mallory").unlink()
    assert site.master.salt(VICTIM, "test.true") == {VICTIM: True}
    shipped(site)
    assert (row["return"], row["success"], row["fun"]) == ("true", "1", "test.sleep")
    assert site.returned(jid, VICTIM) == {VICTIM: row}
    for table, column in (("salt_returns", "full_ret"), ("jids", "load"), ("salt_events", "data")):
        assert site.database.sql(f"SELECT * FROM {table} WHERE `{column}` LIKE '%%forged%%'") == []
    assert [site.load(made_up) for made_up in (unknown, invented, empty)] == [None, None, None]
    (jobs,) = values(asked(site, runner("jobs.list_jobs")))
    assert jobs.keys().isdisjoint({unknown, invented, empty})


@pytest.mark.smoke
@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_with_mysql_away_jobs_run_and_are_found_and_arrive_once_afterwards(site: Site, fault: str) -> None:
    shipped(site)
    server = site.database.server
    began = time.monotonic()
    assert len(printed(site, "*", "test.ping")) == 2
    usual = min(time.monotonic() - began, PATIENCE)
    if fault == "killed":
        server.kill()
    else:
        server.freeze()
    try:
        within = usual + AT_ONCE  # what was published just now needs no database
        assert printed(site, "*", "test.echo", fault, within=within) == {"alpha": fault, "beta": fault}
        # Nor do the parts of a batch, which the engine holds whole.
        done = quickly(site, "--static", "*", "test.outputter", f"static {fault}", within=within)
        assert done.stdout.count(f"static {fault}") == 2, done
        site.minions["alpha"].call("test.arg", fault)
        answers = asked(
            site,
            publish("*", "test.sleep", 0),
            runner("jobs.list_jobs_filter", 1),
            runner("jobs.list_job", PUBLISHED),
            runner("jobs.list_jobs", search_function="test.echo"),
            runner("jobs.lookup_jid", PUBLISHED),
        )
        jid, newest, job, jobs, _ = values(answers)
        assert [its["JID"] for its in newest] == [jid]
        assert (job["Function"], job["Minions"]) == ("test.sleep", ["alpha", "beta"])
        echo = max(jobs)
        assert jobs[echo]["Arguments"] == [fault]
        assert answers[0].seconds < AT_ONCE
        assert answers[1].seconds < CONNECT_SECONDS + 1.0
        assert sum(answer.seconds for answer in answers[2:]) < AT_ONCE
        assert site.master.run("jobs.lookup_jid", echo) == {"alpha": fault, "beta": fault}
        assert "Traceback" not in site.master.log
    finally:
        if fault == "killed":
            server.start()
        else:
            server.thaw()
    site.returned(echo, "alpha", "beta")
    site.returned(jid, "alpha", "beta")
    books = shipped(site)
    assert books["pending"] <= 2  # the runners that looked
    for job_id in (echo, jid):
        assert site.database.sql("SELECT COUNT(*) FROM salt_returns WHERE jid = %s", job_id) == [(2,)]
        assert site.database.sql("SELECT COUNT(*) FROM jids WHERE jid = %s", job_id) == [(1,)]
    ((called,),) = site.database.sql(
        "SELECT COUNT(*) FROM salt_returns WHERE fun = 'test.arg' AND `return` LIKE %s", f"%{fault}%"
    )
    assert called == 1


def test_with_the_engine_stopped_and_killed_jobs_run_and_are_found_and_arrive_once(site: Site) -> None:
    engine = site.engine()
    engine.send_signal(signal.SIGSTOP)
    try:
        assert printed(site, "*", "test.echo", "stopped") == {"alpha": "stopped", "beta": "stopped"}
        jid, *_, job = values(asked(site, publish("*", "test.sleep", 0), runner("jobs.list_job", PUBLISHED)))
        assert (job["Function"], job["Minions"]) == ("test.sleep", ["alpha", "beta"])
        wait_until(lambda: handed_over(site).count((jid, "beta")) == 1, timeout=PATIENCE, what="the return")
        assert site.master.run("jobs.lookup_jid", jid) == {"alpha": True, "beta": True}
    finally:
        engine.send_signal(signal.SIGCONT)
    site.returned(jid, "alpha", "beta")
    ids = [jid]
    for _ in range(3):
        engine = site.engine()
        engine.kill()
        ids += values(asked(site, *(publish("*", "test.echo", "killed") for _ in range(5))))
        wait_until(functools.partial(ended, engine), timeout=PATIENCE, what="the engine's end")
    site.engine()
    for each in ids:
        site.returned(each, "alpha", "beta")
        assert site.database.sql("SELECT COUNT(*) FROM salt_returns WHERE jid = %s", each) == [(2,)]
        assert json.loads(site.load(each) or "")["Minions"] == ["alpha", "beta"]
    wait_until(lambda: (site.master.sock_dir / f"{ENGINE}.ipc").exists(), timeout=PATIENCE, what="an engine")
    shipped(site)


def test_without_an_engine_jobs_go_on_and_the_journal_keeps_them_until_there_is_one(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(HANDED_OFF)
    engines, site.master.config["engines"] = site.master.config["engines"], []
    nobody = "No mysql_jobcache engine runs"
    with site.master, site.minion("alpha") as alpha:
        for number in range(3):
            assert printed(site, "alpha", "test.echo", f"no {number}") == {"alpha": f"no {number}"}
        alpha.call("test.arg", "called")
        (jobs,) = values(asked(site, runner("jobs.list_jobs", search_function="test.echo")))
        assert [job["Arguments"] for _, job in sorted(jobs.items())] == [["no 0"], ["no 1"], ["no 2"]]
        assert site.master.run("jobs.lookup_jid", max(jobs)) == {"alpha": "no 2"}
        assert {(jid, "alpha") for jid in jobs} <= set(handed_over(site))
        assert site.database.sql("SHOW TABLES") == []
        assert 1 <= site.master.log.count(nobody) <= 2  # once a minute
        assert "Traceback" not in site.master.log
    site.master.config["engines"] = engines
    with site.master:
        site.engine()
        wait_until(lambda: len(site.database.sql("SHOW TABLES")) >= 2, timeout=PATIENCE, what="the tables")
        for jid in jobs:
            site.returned(jid, "alpha")
        site.wait_for("SELECT jid FROM salt_returns WHERE fun = 'test.arg' AND id = 'alpha'")
        shipped(site)
        assert site.database.sql("SELECT COUNT(*) FROM salt_returns WHERE fun = 'test.echo'") == [(3,)]


def test_what_a_syndic_passes_up_belongs_to_its_job(site: Site) -> None:
    jid = test_jobs.publish(site, "*", "test.echo", "everywhere")
    site.returned(jid, "alpha", "beta")
    load = {
        "jid": jid,
        "tgt": "*",
        "tgt_type": "glob",
        "fun": "test.echo",
        "arg": ["everywhere"],
        "ret": "",
        "user": "x",
    }
    up = {"jid": jid, "id": "lower", "master_id": "lower", "fun": "test.echo", "fun_args": ["everywhere"], "load": load}
    answer = {"return": "from below", "retcode": 0, "success": True}
    with attacker(site.master) as syndic:  # of a real one's messages, the two that the job cache gets something of
        syndic.fire(f"salt/job/{jid}/new", {"jid": jid, "minions": ["gamma", "delta"]})
        syndic.fire("", {}, cmd="_syndic_return", load=[{**up, "return": {"gamma": answer}}])
    (site.master.directory / "pki" / "minions" / "mallory").unlink()
    row = site.returned(jid, "alpha", "beta", "gamma")["gamma"]
    assert (row["return"], row["success"], row["fun"]) == ('"from below"', "1", "test.echo")
    assert json.loads(row["full_ret"])["master_id"] == "lower"
    shipped(site)
    stored = json.loads(site.load(jid) or "")
    assert (stored["user"], sorted(stored["Minions"])) == ("root", ["alpha", "beta", "delta", "gamma"])
    (missing,) = values(asked(site, runner("jobs.lookup_jid", jid, missing=True, returned=False)))
    assert missing == {"delta": "Minion did not return"}


@pytest.mark.smoke
@pytest.mark.skipif(
    SERIES >= 3008, reason="salt-syndic 3008.3 cannot pass returns up: 'str' object has no attribute 'done'"
)
def test_a_syndics_minions_are_among_those_of_the_job_and_their_returns_in_the_tables(
    make_site: Callable[..., Site],
) -> None:
    site = make_site({**HANDED_OFF, "order_masters": True})
    top = site.master
    lower = SaltMaster(top.directory / "lower", id="lower_master")
    syndic = SaltSyndic(lower, top)

    def answers(*args: str) -> str:
        return top.cli("salt", "--out=json", "--timeout=5", "*", *args).stdout  # the syndic is a minion that is silent

    with top, site.minion("alpha"), lower, SaltMinion(lower, "gamma"), syndic:
        wait_until(lambda: '"gamma": true' in answers("test.ping"), timeout=120.0, what="the syndic")
        assert answers("test.echo", "down and up").count("down and up") == 2
        jid = newest_jid(site, "test.echo")
        rows = site.returned(jid, "alpha", "gamma")
        assert (rows["gamma"]["return"], rows["gamma"]["success"]) == ('"down and up"', "1")
        load = json.loads(site.load(jid) or "")
        assert (load["tgt"], load["fun"]) == ("*", "test.echo")
        assert {"alpha", "gamma"} <= set(load["Minions"])
        job = top.run("jobs.list_job", jid)
        assert {"alpha", "gamma"} <= set(job["Minions"])
        assert sorted(job["Result"]) == ["alpha", "gamma"]
        shipped(site)
        assert site.database.sql("SELECT COUNT(*) FROM salt_returns WHERE jid = %s", jid) == [(2,)]
