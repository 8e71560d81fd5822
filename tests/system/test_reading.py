"""The jobs runner answers from the tables as it does from the master's own job cache, command by command.

The same jobs, on one master, are asked for twice: of the local job cache, and with ``ext_source=mysql_jobcache``. The
answers are compared as the JSON that a program gets of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.support.asking import Answer, Ask, ask, publish, returner, runner, values
from tests.support.mariadb import wait_until
from tests.support.salt import fire
from tests.system.conftest import ENGINE, PATIENCE, Site
from tests.system.test_jobs import WHEEL, forged

OURS = {"ext_source": ENGINE}
MASTER = "lab_master"
CONNECT_SECONDS = 5.0
"""What the reader gives a server that does not answer."""


Both = dict[tuple[str, str], tuple[Any, Any]]
"""By question and job (none: a list), the local job cache's answer and ours."""


class Jobs(NamedTuple):
    """The jobs that were run, by what they are, and the minions that answered each."""

    site: Site
    ids: dict[str, str]


@pytest.fixture(scope="module")
def jobs(make_module_site: Callable[..., Site]) -> Iterator[Jobs]:
    """Jobs of every kind, in the job cache and in the tables."""
    site = make_module_site(skip_values=[])
    with site.master, site.minion("alpha"), site.minion("beta"):
        for minion in site.minions.values():
            minion.wait_ready()
        yield Jobs(site, run_jobs(site))


ODD = """
import datetime
def values():
    return {"bytes": b"\\xff", "text": "grün".encode(), "when": datetime.datetime(2026, 1, 2, 3, 4, 5)}
"""


def run_jobs(site: Site) -> dict[str, str]:
    (site.states / "_modules").mkdir()
    (site.states / "_modules" / "odd.py").write_text(ODD)  # a minion fetches it with its first states
    (site.states / "top.sls").write_text("base:\n  '*':\n    - mixed\n")
    (site.states / "mixed.sls").write_text("good:\n  test.succeed_without_changes\nbad:\n  test.fail_without_changes\n")
    (site.states / "orch.sls").write_text("inner:\n  salt.function:\n    - name: test.version\n    - tgt: '*'\n")
    keys = site.master.directory / "pki" / "minions"
    both, alpha, beta, master = ("alpha", "beta"), ("alpha",), ("beta",), (MASTER,)
    published = {
        "ping": (publish("*", "test.ping"), both),
        "list with an unknown": (publish(["beta", "ghost", "alpha"], "test.echo", "grün 🧂", tgt_type="list"), both),
        "failing": (publish("alpha", "cmd.run", "echo out; exit 3"), alpha),
        "false": (publish("*", "test.false"), both),
        "unknown function": (publish("alpha", "no.such", "thing"), alpha),
        "keywords": (publish("alpha", "test.kwarg", "one=1", kwarg={"two": {"three": [4]}}), alpha),
        "metadata": (
            publish("alpha or beta", "test.true", tgt_type="compound", metadata={"team": "blue", "ticket": 7}),
            both,
        ),
        "metadata as argument": (publish("beta", "test.kwarg", kwarg={"metadata": {"team": "red"}}), beta),
        "highstate": (publish("*", "state.apply"), both),
        "outputter": (publish("beta", "test.outputter", "text"), beta),
        "values": (publish("beta", "test.echo", {"a": [1, 2.5, None, True], "b": {}, "c": "\u2028"}), beta),
        "numbers as keys": (publish("beta", "test.arg", "{1: 2, true: 3}"), beta),
        "asked by the master": (publish("alpha", "saltutil.find_job", "20260101000000000001"), ()),
    }
    jids = values(asked(site, *(one for one, _ in published.values())))
    ids = dict(zip(published, jids, strict=True))
    expected = {jid: minions for jid, (_, minions) in zip(jids, published.values(), strict=True)}
    site.returned(ids["highstate"], *both)  # a minion does one run of states at a time
    # An accepted minion that does not answer; not for long, or every job would be for it.
    shutil.copy(keys / "alpha", keys / "gamma")
    ids["silent"], ids["states"] = values(
        asked(
            site,
            publish("*", "test.echo", "who is there"),
            publish("alpha", "state.apply", "mixed", kwarg={"test": True}),
        )
    )
    (keys / "gamma").unlink()
    expected |= {ids["silent"]: both, ids["states"]: alpha}

    def made(name: str, fun: str, minions: tuple[str, ...]) -> None:
        """A job whose jid nobody tells."""
        (jid,) = site.wait_for("SELECT jid FROM salt_returns WHERE fun = %s AND id = %s", fun, minions[0])
        ids[name], expected[jid] = jid, minions

    site.minions["alpha"].call("test.arg_type", "here")
    made("salt-call", "test.arg_type", alpha)
    site.minions["alpha"].cli("salt-call", "cmd.run_all", "exit 3")
    made("failing salt-call", "cmd.run_all", alpha)
    site.minions["alpha"].cli("salt-call", "--set-metadata", '{"team": "green"}', "test.collatz", "3")
    made("salt-call with metadata", "test.collatz", alpha)
    site.master.salt("beta", "schedule.add", "tick", "function=test.arg_repr", "seconds=1", "maxrunning=1")
    made("schedule", "test.arg_repr", beta)
    site.master.salt("beta", "schedule.delete", "tick")
    site.master.run("test.arg", "one", "two=2")
    made("runner", "runner.test.arg", master)
    site.master.run("test.metasyntactic")
    made("runner without", "runner.test.metasyntactic", master)
    site.master.run("state.orchestrate", "orch")
    made("orchestration", "runner.state.orchestrate", master)
    made("of the orchestration", "test.version", both)
    subprocess.run([sys.executable, "-c", WHEEL, str(site.master.config_dir / "master")], check=True)
    made("wheel", "wheel.key.list_all", master)
    for jid, minions in expected.items():
        site.returned(jid, *minions)
    return ids


def asked(site: Site, *asks: Ask) -> list[Answer]:
    return ask(asks, config=site.master.config_dir / "master")


PER_JOB = {
    "list_job": runner("jobs.list_job"),
    "lookup_jid": runner("jobs.lookup_jid"),
    "lookup_jid missing": runner("jobs.lookup_jid", missing=True),
    "lookup_jid only missing": runner("jobs.lookup_jid", missing=True, returned=False),
    "print_job": runner("jobs.print_job"),
    "exit_success": runner("jobs.exit_success"),
}
LISTS = {
    "list_jobs": runner("jobs.list_jobs"),
    "of a function": runner("jobs.list_jobs", search_function="test.echo"),
    "of functions": runner("jobs.list_jobs", search_function="test.*,cmd.run"),
    "of a list of functions": runner("jobs.list_jobs", search_function=["runner.*", "wheel.*"]),
    "of no function": runner("jobs.list_jobs", search_function="nothing.*"),
    "of a target": runner("jobs.list_jobs", search_target="alpha"),
    "of targets": runner("jobs.list_jobs", search_target="gh*,lab_*"),
    "of metadata": runner("jobs.list_jobs", search_metadata={"team": "blue"}),
    "of any metadata": runner("jobs.list_jobs", search_metadata={"team": "red", "ticket": 7}),
    "last_run": runner("jobs.last_run"),
    "last_run of a function": runner("jobs.last_run", function="test.echo"),
    "last_run on a target": runner("jobs.last_run", target="alpha"),
    "last_run with metadata": runner("jobs.last_run", metadata={"team": "blue"}),
    "last_run of nothing": runner("jobs.last_run", function="nothing.*"),
}


@pytest.fixture(scope="module")
def answers(jobs: Jobs) -> Both:
    """All answers, the local job cache's and ours, by question and job (no job: a list)."""
    asks: dict[tuple[str, str], Ask] = {}
    for question, one in PER_JOB.items():
        for name, jid in jobs.ids.items():
            asks[question, name] = dataclasses.replace(one, args=(jid,))
    asks |= {(question, ""): one for question, one in LISTS.items()}
    ids = sorted(jobs.ids.values())
    middle = spelled(ids[len(ids) // 2])
    asks["since", ""] = runner("jobs.list_jobs", start_time=middle)
    asks["until", ""] = runner("jobs.list_jobs", end_time=middle)
    asks["between", ""] = runner("jobs.list_jobs", start_time=spelled(ids[3]), end_time=middle)
    for count in (1, 5, 1000):
        for filtered in (True, False):
            asks[f"newest {count} {filtered}", ""] = runner("jobs.list_jobs_filter", count, filtered)
    found = values(asked(jobs.site, *doubled(asks.values())))
    return dict(zip(asks, zip(found[::2], found[1::2], strict=True), strict=True))


def doubled(asks: Iterable[Ask]) -> list[Ask]:
    """Each question for the local job cache, then for us."""
    return [each for one in asks for each in (one, dataclasses.replace(one, kwargs={**one.kwargs, **OURS}))]


def spelled(jid: str) -> str:
    """A jid's time as a person writes it."""
    return f"{jid[:4]}-{jid[4:6]}-{jid[6:8]} {jid[8:10]}:{jid[10:12]}:{jid[12:14]}.{jid[14:20]}"


OF_THE_MASTER = ("runner.", "wheel.")
SKIPPED = "saltutil.find_job"
"""What the engine does not store as long as `skip_functions` names it."""


def told(answer: Any) -> Any:
    """An answer without what we know better than the local job cache of a job that the master itself did.

    That has in its return the stamp of its beginning, where the bus has that of its end (``SyncClientMixin.low``,
    salt/client/mixins.py). And without what is not stored.
    """
    if isinstance(answer, list):
        return [told(item) for item in answer if not (isinstance(item, dict) and item.get("Function") == SKIPPED)]
    if not isinstance(answer, dict):
        return answer
    left = {"_stamp"} if str(answer.get("fun")).startswith(OF_THE_MASTER) else set()
    return {
        key: told(value)
        for key, value in answer.items()
        if key not in left and not (isinstance(value, dict) and value.get("Function") == SKIPPED)
    }


@pytest.mark.smoke
@pytest.mark.parametrize("question", PER_JOB)
def test_a_job_is_answered_for_as_by_the_local_job_cache(jobs: Jobs, answers: Both, question: str) -> None:
    for name in jobs.ids.keys() - {"asked by the master"}:
        local, ours = answers[question, name]
        assert told(ours) == told(local), name
        assert local or "only missing" in question, name  # else nothing was compared


@pytest.mark.smoke
def test_jobs_are_listed_as_by_the_local_job_cache(jobs: Jobs, answers: Both) -> None:
    for (question, name), (local, ours) in answers.items():
        if not name:
            assert told(ours) == told(local), question
    listed, _ = answers["list_jobs", ""]
    assert listed.keys() >= set(jobs.ids.values())
    for question, found in (("of metadata", {"metadata"}), ("of any metadata", {"metadata", "metadata as argument"})):
        assert {name for name, jid in jobs.ids.items() if jid in answers[question, ""][1]} == found
    assert answers["of no function", ""] == ({}, {})
    assert answers["last_run of nothing", ""] == (False, False)
    assert 0 < len(answers["between", ""][1]) < len(answers["until", ""][1]) < len(listed)
    assert [len(answers[f"newest {count} True", ""][1]) for count in (1, 5)] == [1, 5]


def test_who_did_not_answer_is_missing(jobs: Jobs, answers: Both) -> None:
    echo = "who is there"
    assert answers["lookup_jid missing", "silent"][1] == {
        "alpha": echo,
        "beta": echo,
        "gamma": "Minion did not return",
    }
    assert answers["lookup_jid only missing", "silent"][1] == {"gamma": "Minion did not return"}
    assert answers["exit_success", "silent"][1] == {"alpha": True, "beta": True, "gamma": False}
    assert answers["list_job", "silent"][1]["Minions"] == ["alpha", "beta", "gamma"]
    assert answers["list_job", "list with an unknown"][1]["Minions"] == ["alpha", "beta"]  # ghost has no key


@pytest.mark.parametrize(
    ("name", "arguments"), [("runner", ["one", {"two": 2}]), ("runner without", []), ("wheel", [])]
)
def test_a_job_of_the_masters_own_is_run_again_with_the_same_arguments(
    jobs: Jobs, answers: Both, name: str, arguments: list[Any]
) -> None:
    # SaltGUI (scripts/panels/Job.js): without arguments in the list, a runner's are those of its return, where every
    # mapping is of keywords; in the list only one that says so, with `__kwarg__`.
    for answer in answers["list_job", name]:
        assert (answer["Arguments"], answer["Target-type"]) == ([], "list")
        assert answer["Result"][MASTER]["return"]["fun_args"] == arguments


@pytest.mark.smoke
def test_salt_run_prints_what_it_prints_of_the_local_job_cache(jobs: Jobs) -> None:
    for out in ("--out=json", "--out=highstate"):
        command = ["jobs.lookup_jid", jobs.ids["highstate"], out]
        local, ours = (jobs.site.master.cli("salt-run", *command, *source) for source in ([], [f"ext_source={ENGINE}"]))
        assert (ours.returncode, complaints(ours.stderr)) == (local.returncode, "")
        if out == "--out=json":
            assert json.loads(ours.stdout) == json.loads(local.stdout)
        else:  # minions come in any order, in either
            assert sorted(ours.stdout.splitlines()) == sorted(local.stdout.splitlines())
            assert ours.stdout.count("Failed:    1") == 2


def complaints(stderr: str) -> str:
    """What a program of Salt's said, without what 3008 always says of its own objects when it ends."""
    return "".join(line for line in stderr.splitlines(keepends=True) if "use as a context manager" not in line)


def test_a_job_of_several_functions_is_answered_for_as_by_the_local_job_cache(jobs: Jobs, answers: Both) -> None:
    # After `answers`: with such a job in either cache, `list_jobs search_function=` of Salt's own raises TypeError.
    config = jobs.site.master.config_dir / "master"
    (jid,) = values(ask([publish("*", ["test.ping", "test.echo"], [], ["häß"])], config=config))
    jobs.site.returned(jid, "alpha", "beta")
    asks = [dataclasses.replace(one, args=(jid,)) for one in PER_JOB.values()]
    asks += [runner("jobs.list_jobs"), runner("jobs.list_jobs_filter", 1)]
    found = values(asked(jobs.site, *doubled(asks)))
    assert told(found[1::2]) == told(found[::2])
    assert found[1]["Function"] == ["test.ping", "test.echo"]
    assert found[1]["Result"]["beta"]["return"] == {"test.ping": True, "test.echo": "häß"}


def test_values_that_json_has_no_form_for_have_the_documented_one(jobs: Jobs) -> None:
    (jid,) = values(asked(jobs.site, publish("beta", "odd.values")))
    jobs.site.returned(jid, "beta")
    local, ours = values(asked(jobs.site, *doubled([runner("jobs.lookup_jid", jid)])))
    # docs/rows.md. The local cache gives Python's own values, which Salt's outputters then make something of.
    assert ours == {"beta": {"bytes": {"__base64__": "/w=="}, "text": "grün", "when": "2026-01-02T03:04:05"}}
    assert local["beta"].keys() == ours["beta"].keys()
    assert "xff" in local["beta"]["bytes"]  # `repr`


def test_the_returner_knows_functions_minions_and_ends(jobs: Jobs) -> None:
    opts = {"job_cache_store_endtime": True}
    echo, unknown, minions, end, no_end, listed = values(
        ask(
            [
                returner(f"{ENGINE}.get_fun", "test.echo"),
                returner(f"{ENGINE}.get_fun", "no.function' OR 1=1 -- "),
                returner(f"{ENGINE}.get_minions"),
                returner(f"{ENGINE}.get_endtime", jobs.ids["highstate"]),
                returner(f"{ENGINE}.get_endtime", "20260101000000000001"),
                runner("jobs.list_jobs", **OURS),
            ],
            config=jobs.site.master.config_dir / "master",
            opts=opts,
        )
    )
    assert {minion: (its["jid"], its["return"]) for minion, its in echo.items()} == dict.fromkeys(
        ("alpha", "beta"), (jobs.ids["silent"], "who is there")
    )
    assert (unknown, minions, no_end) == ({}, ["alpha", "beta", MASTER], False)
    rows = jobs.site.returned(jobs.ids["highstate"], "alpha", "beta")
    last = max(row["alter_time"] for row in rows.values())
    assert end == f"{last:%Y, %b %d %H:%M:%S.%f}"
    assert listed[jobs.ids["highstate"]]["EndTime"] == end


@pytest.mark.smoke
@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_with_mysql_away_the_journal_answers_within_the_connect_timeout(jobs: Jobs, fault: str) -> None:
    site, server = jobs.site, jobs.site.database.server
    command = ["salt-run", "--out=json", "jobs.lookup_jid"]
    began = time.monotonic()
    assert json.loads(site.master.cli(*command, jobs.ids["ping"], f"ext_source={ENGINE}").stdout) == {
        "alpha": True,
        "beta": True,
    }
    usual = time.monotonic() - began
    if fault == "killed":
        server.kill()
    else:
        server.freeze()
    try:
        (jid,) = values(asked(site, publish("*", "test.echo", fault)))
        wait_until(lambda: journalled(site, jid) >= {"alpha", "beta"}, timeout=PATIENCE, what="the returns' capture")
        # A return that nobody sent, and no job cache has, is in the journal now, and in no answer.
        fire(site.master, f"salt/job/{jid}/ret/ghost", forged(id="ghost", jid=jid))
        wait_until(lambda: "ghost" in journalled(site, jid), timeout=PATIENCE, what="the forgery's capture")
        began = time.monotonic()
        done = site.master.cli(*command, jid, f"ext_source={ENGINE}", "missing=True")
        assert time.monotonic() - began < usual + CONNECT_SECONDS + 4.0  # on a machine with other work, too
        assert json.loads(done.stdout) == {"alpha": fault, "beta": fault}
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)
        assert "The database does not answer" in done.stderr
        local, ours, old, jids, more, unknown = asked(
            site,
            runner("jobs.list_job", jid),
            runner("jobs.list_job", jid, **OURS),
            runner("jobs.lookup_jid", jobs.ids["ping"], **OURS),
            runner("jobs.list_jobs", **OURS),
            runner("jobs.list_jobs_filter", 2, **OURS),
            runner("jobs.list_job", jobs.ids["ping"], **OURS),
        )
        assert ours.value == local.value
        assert ours.seconds < CONNECT_SECONDS + 1.0  # once, for the load and the returns
        assert (old.value, unknown.value["Error"].split()[:3]) == ({}, ["Cannot", "contact", "returner"])
        # Beside it the runner above, and what else was not shipped yet.
        assert jid in jids.value
        assert [job["JID"] for job in more.value] == sorted(jids.value)[-2:]
        assert old.seconds + jids.seconds + more.seconds < 1.0
    finally:
        if fault == "killed":
            server.start()
        else:
            server.thaw()
    site.returned(jid, "alpha", "beta")
    wait_until(lambda: not journalled(site, jid), timeout=PATIENCE, what="what waited to be shipped or set aside")
    assert site.returned(jid).keys() == {"alpha", "beta"}


def journalled(site: Site, jid: str) -> set[str]:
    """The minions of whose returns to a job the journal has one, read beside the engine."""
    path = site.master.directory / "cache" / ENGINE / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as journal:
        rows = journal.execute("SELECT minion FROM events WHERE jid = ?", (jid,)).fetchall()
    return {row[0] for row in rows if row[0]}


# For people


@pytest.mark.smoke
def test_the_runner_shows_jobs_a_job_a_minion_and_failures(jobs: Jobs) -> None:
    run, ids = jobs.site.master.run, jobs.ids
    found = run(f"{ENGINE}.jobs", "fun=state.*", "failed=True", "since=1h", "minion=beta", "limit=5")
    assert list(found) == [ids["highstate"]]
    line = found[ids["highstate"]]
    assert (line["fun"], line["target"], line["user"]) == ("state.apply", "*", "root")
    assert (line["targeted"], line["answered"], line["failed"], line["missing"]) == (2, 2, 2, 0)
    job = run(f"{ENGINE}.job", ids["silent"])
    assert (job["targeted"], job["answered"], job["failed"], job["missing"]) == (3, 2, 0, 1)
    assert (job["missing_minions"], job["answered_minions"]) == (["gamma"], ["alpha", "beta"])
    of_beta = run(f"{ENGINE}.minion", "beta", "limit=100")
    assert ids["outputter"] in of_beta and ids["failing"] not in of_beta
    assert list(of_beta) == sorted(of_beta, reverse=True)
    failed = run(f"{ENGINE}.failures")
    assert failed[ids["failing"]]["alpha"]["retcode"] == 3
    assert "bad" in failed[ids["highstate"]]["alpha"]["reason"]
    assert ids["ping"] not in failed


@pytest.mark.smoke
def test_the_runners_pages_follow_each_other(jobs: Jobs) -> None:
    first = jobs.site.master.run(f"{ENGINE}.jobs", "limit=3")
    second = jobs.site.master.run(f"{ENGINE}.jobs", "limit=3", f"after={min(first)}")
    assert [len(first), len(second)] == [3, 3]
    assert max(second) < min(first)


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        (["jobs", "limit=3"], "highstate"),
        (["job", "highstate"], "highstate"),
        (["minion", "alpha"], "alpha"),
        (["failures"], "state"),
    ],
    ids=["jobs", "job", "minion", "failures"],
)
def test_a_terminal_shows_the_runners_answers_as_text(jobs: Jobs, verb: list[str], shown: str) -> None:
    name, *args = verb
    done = jobs.site.master.cli("salt-run", f"{ENGINE}.{name}", *(jobs.ids.get(arg, arg) for arg in args))
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    assert len(done.stdout.splitlines()) > 3
    assert max(map(len, done.stdout.splitlines())) < 280
    assert not done.stdout.lstrip().startswith("{")


@pytest.mark.parametrize(
    "bad",
    [
        ["jobs", "limit=-1"],
        ["jobs", "since=the day before"],
        ["jobs", "after=../../etc/passwd"],
        ["job", "1' OR '1'='1"],
        ["job", "20260101000000000001"],
        ["minion", "beta", "limit=many"],
        ["failures", "since=31st of February"],
    ],
    ids=" ".join,
)
def test_bad_input_is_a_sentence_and_an_exit_code(jobs: Jobs, bad: list[str]) -> None:
    verb, *args = bad
    done = jobs.site.master.cli("salt-run", "--out=json", f"{ENGINE}.{verb}", *args)
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert args[-1].partition("=")[2][:5] in error or args[-1][:5] in error
    assert "Traceback" not in done.stdout + done.stderr


def test_globs_and_ids_with_sql_or_paths_in_them_are_data(jobs: Jobs) -> None:
    hostile = ["' OR 1=1 -- ", "%", "_lpha", "../../etc/passwd", 'a"b', "alph\\", "al/pha"]
    before = jobs.site.database.count("salt_returns")
    answers = values(
        asked(
            jobs.site,
            *(runner(f"{ENGINE}.minion", each) for each in hostile),
            *(
                runner(f"{ENGINE}.jobs", **{name: each})
                for each in hostile
                for name in ("fun", "user", "target", "minion")
            ),
            *(runner("jobs.lookup_jid", each, **OURS) for each in hostile),
            *(returner(f"{ENGINE}.get_fun", each) for each in hostile),
        )
    )
    assert [answer for answer in answers if answer] == []
    assert jobs.site.database.count("salt_returns") >= before
