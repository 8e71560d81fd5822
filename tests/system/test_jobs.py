"""What a job becomes, from a real master and real minions to the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from salt_mysql_engine.saltevent import LEFT_OUT
from tests.support.mariadb import wait_until
from tests.support.salt import fire
from tests.system.conftest import PATIENCE, Site

JID = "20260101000000000001"


def publish(site: Site, *args: str) -> str:
    """``salt --async``: the jid."""
    done = site.master.cli("salt", "--async", "--out=json", *args)
    return done.stdout.strip().rsplit(maxsplit=1)[-1].strip('"')


@pytest.mark.smoke
def test_a_ping_is_a_job_and_a_return_of_every_minion(site: Site) -> None:
    jid = publish(site, "*", "test.ping")
    rows = site.returned(jid, "alpha", "beta")
    load = json.loads(site.load(jid) or "")
    assert (load["fun"], load["tgt"], load["tgt_type"], load["arg"]) == ("test.ping", "*", "glob", [])
    assert load["user"]
    assert sorted(load["Minions"]) == ["alpha", "beta"]
    assert load["missing"] == []
    for minion, row in rows.items():
        assert (row["fun"], row["return"], row["success"]) == ("test.ping", "true", "1")
        full = json.loads(row["full_ret"])
        assert (full["id"], full["jid"], full["return"], full["retcode"]) == (minion, jid, True, 0)
        assert full["fun_args"] == []
        assert full["_stamp"][:26] == row["alter_time"].isoformat()


@pytest.mark.smoke
def test_a_state_run_with_a_failing_state_is_no_success(site: Site) -> None:
    (site.states / "broken.sls").write_text(
        "good:\n  test.succeed_without_changes\nbad:\n  test.fail_without_changes\n"
    )
    jid = publish(site, "alpha", "state.apply", "broken")
    (row,) = site.returned(jid, "alpha").values()
    assert row["success"] == "0"
    results = [state["result"] for state in json.loads(row["return"]).values()]
    assert sorted(results) == [False, True]
    assert json.loads(row["full_ret"])["retcode"] != 0


@pytest.mark.smoke
def test_a_job_of_several_functions_is_one_row_a_minion(site: Site) -> None:
    jid = publish(site, "*", "test.ping,test.echo", ",", "häß 🧂")
    rows = site.returned(jid, "alpha", "beta")
    assert rows["beta"]["fun"] == "test.ping,test.echo"
    assert json.loads(rows["beta"]["return"]) == {"test.ping": True, "test.echo": "häß 🧂"}
    assert rows["beta"]["success"] == "1"


@pytest.mark.smoke
def test_a_runner_is_stored_under_the_masters_id(site: Site) -> None:
    site.master.run("test.arg", "one", "two=2")
    jid, returned, success = site.wait_for(
        "SELECT jid, `return`, success FROM salt_returns WHERE fun = 'runner.test.arg' AND id = 'lab_master'"
    )
    assert json.loads(returned)["return"] == {"args": ["one"], "kwargs": {"two": 2}}
    assert success == "1"
    load = json.loads(site.load(jid) or "")
    assert (load["fun"], load["tgt"], load["arg"]) == ("runner.test.arg", "lab_master", ["one", {"two": 2}])


def test_an_orchestration_is_stored_with_its_inner_jobs(site: Site) -> None:
    (site.states / "orch.sls").write_text("inner:\n  salt.function:\n    - name: test.kwarg\n    - tgt: '*'\n")
    site.master.run("state.orchestrate", "orch")
    _, returned = site.wait_for("SELECT jid, `return` FROM salt_returns WHERE fun = 'runner.state.orchestrate'")
    assert json.loads(returned)["success"] is True
    site.wait_for("SELECT jid FROM salt_returns WHERE fun = 'test.kwarg' GROUP BY jid HAVING COUNT(*) = 2")


WHEEL = """
import sys, salt.config, salt.wheel
opts = salt.config.master_config(sys.argv[1])
for fun in sys.argv[2:] or ["key.list_all"]:
    print(salt.wheel.WheelClient(opts).cmd(fun))
"""


def test_a_wheel_job_is_stored_under_the_masters_id_without_the_secrets_that_it_tells(site: Site) -> None:
    funs = ("minions.connected", "config.values", "key.list_all")
    subprocess.run([sys.executable, "-c", WHEEL, str(site.master.config_dir / "master"), *funs], check=True)
    for fun in funs:
        jid, returned = site.wait_for(
            "SELECT jid, `return` FROM salt_returns WHERE fun = %s AND id = 'lab_master'", f"wheel.{fun}"
        )
        value = json.loads(returned)["return"]
        assert isinstance(value, list) if fun == "minions.connected" else value == LEFT_OUT
        assert json.loads(site.load(jid) or "")["fun"] == f"wheel.{fun}"
    assert site.database.sql("SELECT COUNT(*) FROM salt_returns WHERE full_ret LIKE '%mysql.port%'") == [(0,)]


@pytest.mark.parametrize("typed", [["mysql_jobcache.nosuch"], ["mysql_jobcache.status", "nosuch=1"]], ids=" ".join)
def test_a_runner_that_never_ran_is_ignored_and_counted(site: Site, typed: list[str]) -> None:
    def never_ran() -> int:
        return int(site.status()["books"]["ignored"].get("never_ran", 0))

    before, letters = never_ran(), site.status()["books"]["dead_letters"]
    site.master.cli("salt-run", *typed)
    wait_until(lambda: never_ran() == before + 1, timeout=PATIENCE, what="the failed runner's event")
    assert site.status()["books"]["dead_letters"] == letters


@pytest.mark.smoke
def test_salt_call_has_a_job_made_of_its_return(site: Site) -> None:
    site.minions["alpha"].call("test.outputter", "here")
    jid, success = site.wait_for("SELECT jid, success FROM salt_returns WHERE fun = 'test.outputter' AND id = 'alpha'")
    assert success == "1"
    load = json.loads(site.load(jid) or "")
    assert (load["fun"], load["arg"], load["tgt"], load["tgt_type"]) == ("test.outputter", ["here"], "alpha", "glob")
    assert "return" not in load


def test_a_failing_salt_call_is_no_success(site: Site) -> None:
    site.minions["alpha"].cli("salt-call", "cmd.run", "exit 3")
    (success,) = site.wait_for("SELECT success FROM salt_returns WHERE fun = 'cmd.run' AND id = 'alpha'")
    assert success == "0"


def test_a_scheduled_job_has_a_job_made_of_its_return(site: Site) -> None:
    site.master.salt("beta", "schedule.add", "tick", "function=test.arg_repr", "seconds=1", "maxrunning=1")
    try:
        (jid,) = site.wait_for("SELECT jid FROM salt_returns WHERE fun = 'test.arg_repr' AND id = 'beta'")
    finally:
        site.master.salt("beta", "schedule.delete", "tick")
    load = json.loads(site.load(jid) or "")
    assert (load["fun"], load["tgt"]) == ("test.arg_repr", "beta")


def test_what_the_master_asks_by_itself_is_not_stored(site: Site) -> None:
    before = site.status()["books"]["ignored"].get("skipped_function", 0)
    site.master.salt("alpha", "saltutil.find_job", JID)
    site.master.run("mysql_jobcache.flush")
    assert site.status()["books"]["ignored"]["skipped_function"] >= before + 2
    assert site.database.sql("SELECT COUNT(*) FROM salt_returns WHERE fun = 'saltutil.find_job'") == [(0,)]


@pytest.mark.smoke
def test_chosen_events_and_no_others_go_to_salt_events(site: Site) -> None:
    site.minions["alpha"].call("event.send", "my/app/started", '{"version": "1.2"}')
    fire(site.master, "my/other", {"nothing": 1})
    tag, data, master = site.wait_for("SELECT tag, data, master_id FROM salt_events")
    assert (tag, master) == ("my/app/started", "lab_master")
    assert json.loads(data)["data"]["version"] == "1.2"
    assert site.database.count("salt_events") == 1


def forged(**fields: Any) -> dict[str, Any]:
    return {"cmd": "_return", "id": "beta", "jid": JID, "return": "forged", "retcode": 0, "success": True,
            "fun": "test.ping", "fun_args": [], **fields}  # fmt: skip


@pytest.mark.smoke
def test_an_event_that_is_no_return_becomes_no_row(site: Site) -> None:
    books = site.status()["books"]
    before = books["ignored"]
    tag = f"salt/job/{JID}/ret/beta"
    site.minions["alpha"].call("event.send", tag, json.dumps(forged()))  # as any minion can
    for data in (
        forged(id="alpha"),
        forged(jid=JID[:-1] + "2"),
        {key: value for key, value in forged().items() if key != "return"},
        forged(fun={"a": 1}),
        forged(cmd="_minion_event"),
    ):
        fire(site.master, tag, data)
    fire(site.master, "salt/job/../../etc/ret/beta", forged(jid="../../etc"))
    fire(site.master, "salt/job/nocache/ret/beta", forged(jid="nocache"))
    fire(site.master, f"salt/job/{JID}/new", {"jid": JID, "fun": "test.ping"})
    site.master.run("mysql_jobcache.flush")
    after = site.status()["books"]["ignored"]
    grown = {
        reason: after[reason] - before.get(reason, 0) for reason in after if after[reason] != before.get(reason, 0)
    }
    grown.pop("unconfirmed_start", None)  # of the runners that were just asked (3006, 3007)
    assert grown == {"minion_event": 2, "tag_mismatch": 2, "wrong_type": 1, "nocache": 1}
    # The two that might have been someone's wait for the job cache, in vain.
    wait_until(
        lambda: site.status()["books"]["dead_letters"] == books["dead_letters"] + 2, timeout=PATIENCE, what="letters"
    )
    assert site.database.sql("SELECT * FROM salt_returns WHERE jid = %s", JID) == []
    assert site.load(JID) is None


def output_of(mebibytes: int) -> str:
    """A command that prints so much."""
    return f"head -c {mebibytes * 1024 * 1024} /dev/zero | tr '\\0' x"


def test_a_value_that_the_master_trims_out_of_the_event_is_stored_whole_from_its_job_cache(site: Site) -> None:
    jid = publish(site, "alpha", "cmd.run", output_of(5))  # alpha may send more than the master's bus carries
    (row,) = site.returned(jid, "alpha").values()
    assert json.loads(row["return"]) == "x" * 5 * 1024 * 1024
    assert "trimmed" not in json.loads(row["full_ret"])


def test_a_value_that_the_minion_trimmed_is_stored_as_it_is_and_marked(site: Site) -> None:
    before = site.status()["books"]["trimmed"]
    jid = publish(site, "beta", "cmd.run", output_of(2))
    (row,) = site.returned(jid, "beta").values()
    assert json.loads(row["return"]) == "VALUE_TRIMMED"
    assert json.loads(row["full_ret"])["trimmed"] is True
    assert site.status()["books"]["trimmed"] == before + 1


def test_a_large_value_of_a_salt_call_is_stored_whole(site: Site) -> None:
    assert site.minions["beta"].call("cmd.run", output_of(2)) == "x" * 2 * 1024 * 1024
    row = site.wait_for("SELECT `return`, full_ret FROM salt_returns WHERE id = 'beta' AND LENGTH(`return`) > 2000000")
    assert "trimmed" not in json.loads(row[1])


@pytest.mark.smoke
def test_the_jobs_runner_reads_what_the_engine_wrote(site: Site) -> None:
    jid = publish(site, "*", "test.true")
    site.returned(jid, "alpha", "beta")
    assert site.master.run("jobs.lookup_jid", jid, "ext_source=mysql_jobcache") == {"alpha": True, "beta": True}
    job = site.master.run("jobs.list_job", jid, "ext_source=mysql_jobcache")
    assert sorted(job["Minions"]) == ["alpha", "beta"]
    assert job["Function"] == "test.true"
    assert jid in site.master.run("jobs.list_jobs", "ext_source=mysql_jobcache")
    (newest,) = site.master.run("jobs.list_jobs_filter", "1", "ext_source=mysql_jobcache")
    assert newest["JID"] >= jid
