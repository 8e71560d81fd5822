"""Dead letters and reconcile by the commands that an operator has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mariadb import wait_until
from tests.support.salt import fire
from tests.system.conftest import ENGINE, PATIENCE, Site
from tests.system.test_jobs import forged, publish

JID = "20260201000000000001"
pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def own(make_module_site: Callable[..., Site]) -> Iterator[Site]:
    """A master of this file's own with a minion, whose returns wait a second for the job cache."""
    site = make_module_site(verify_wait_seconds=1.0)
    with site.master, site.minion("alpha"):
        yield site


def letters(site: Site, *args: str) -> Any:
    return site.master.run(f"{ENGINE}.dead_letters", *args)


def forge(site: Site, count: int) -> None:
    """Returns for a job that nobody published become dead letters."""
    before = len(letters(site))
    for number in range(count):
        fire(site.master, f"salt/job/{JID}/ret/m{number}", forged(jid=JID, id=f"m{number}"))
    wait_until(lambda: len(letters(site)) == before + count, timeout=PATIENCE, what="dead letters")


def test_dead_letters_are_listed_shown_exported_tried_again_and_deleted(own: Site, tmp_path: Path) -> None:
    forge(own, 3)
    listed = letters(own)
    assert [(letter["minion"], letter["fun"], letter["reason"]) for letter in listed] == [
        (f"m{n}", "test.ping", "unconfirmed") for n in range(3)
    ]
    assert "not in the master's job cache within 1 s" in listed[0]["error"]
    assert "data" not in listed[0]
    assert [letter["minion"] for letter in letters(own, "limit=1")] == ["m2"]
    shown = letters(own, f"show={listed[0]['seq']}")
    assert (shown["tag"], shown["data"]["return"]) == (f"salt/job/{JID}/ret/m0", forged()["return"])
    target = tmp_path / "letters.jsonl"
    assert letters(own, f"export={target}") == {"exported": 3, "path": str(target)}
    assert [json.loads(line)["minion"] for line in target.read_text().splitlines()] == ["m0", "m1", "m2"]
    assert target.stat().st_mode & 0o777 == 0o600
    assert "cannot be created" in letters(own, f"export={target}")["error"]

    assert own.master.run(f"{ENGINE}.retry", "all") == {"retried": 3}
    wait_until(lambda: len(letters(own)) == 3, timeout=PATIENCE, what="the same dead letters")
    assert own.database.sql("SELECT id FROM salt_returns WHERE jid = %s", JID) == []

    trusted, deleted, _ = letters(own)
    assert own.master.run(f"{ENGINE}.retry", str(trusted["seq"]), "trust=True") == {"retried": 1}
    own.returned(JID, trusted["minion"])
    assert letters(own, f"delete={deleted['seq']}") == {"deleted": 1}
    assert letters(own, "delete=all") == {"deleted": 1}
    assert letters(own) == []
    books = own.status()["books"]
    assert (books["dead_letters"], books["dropped"]) == (0, {"dead_letter_deleted": 2})
    assert own.master.log.count(f"for jid {JID}: forged") == 1


@pytest.mark.parametrize(
    ("verb", "args", "answer"),
    [
        ("dead_letters", ["show=999999"], "there is no dead letter 999999"),
        ("dead_letters", ["show=../etc"], "show: '../etc' must be a number"),
        ("dead_letters", ["limit=-1"], "limit: -1 must be a number"),
        ("dead_letters", ["delete=some"], "delete: 'some' must be the seq of a dead letter, or all"),
        ("retry", ["999999"], "there is no dead letter 999999"),
        ("retry", ["all", "trust=maybe"], "trust: 'maybe' must be True or False"),
        ("reconcile", ["since=yesterday"], "since: 'yesterday' must be a time ago"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(own: Site, verb: str, args: list[str], answer: str) -> None:
    done = own.master.cli("salt-run", "--out=json", f"{ENGINE}.{verb}", *args)
    assert answer in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 1


@pytest.mark.smoke
def test_what_the_tables_lost_is_found_in_the_job_cache(own: Site) -> None:
    jids = [publish(own, "alpha", "test.arg", f"number {n}", f"key={n}") for n in range(3)]
    before = {jid: (own.returned(jid, "alpha")["alpha"], json.loads(own.load(jid) or "")) for jid in jids}
    own.master.run(f"{ENGINE}.flush")
    own.database.sql("DELETE FROM salt_returns")
    own.database.sql("DELETE FROM jids")
    summary = own.master.run(f"{ENGINE}.reconcile", "since=1h")
    assert summary["returns_added"] >= 3
    assert summary["loads_added"] >= 3
    for jid, (row, load) in before.items():
        again = own.returned(jid, "alpha")["alpha"]
        assert {key: again[key] for key in ("fun", "return", "success")} == {
            key: row[key] for key in ("fun", "return", "success")
        }
        full, was = json.loads(again["full_ret"]), json.loads(row["full_ret"])
        assert {key: full[key] for key in ("fun_args", "retcode", "user")} == {
            key: was[key] for key in ("fun_args", "retcode", "user")
        }
        assert json.loads(own.load(jid) or "") == load
        assert "kwargs" in load
    own.master.run(f"{ENGINE}.flush")
    assert own.master.run(f"{ENGINE}.reconcile", f"since={jids[0]}")["returns_added"] == 0
