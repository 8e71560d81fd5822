"""What the journal holds is told to those who read, as it will be stored, and nothing that will not be."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import journalfile, pending, saltevent
from salt_mysql_engine.journal import Journal
from salt_mysql_engine.journalfile import CONFIRMED, STUB, UNCHECKED, NewEvent
from salt_mysql_engine.pending import Pending
from tests.support.shipping import MASTER, Cache, body, call_data, jid, master_data, published, returned

Put = Callable[..., None]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """The journal of the master whose `cachedir` is the test's directory."""
    made = Journal(tmp_path / "mysql_jobcache")
    made.open()
    yield made
    made.close()


@pytest.fixture
def put(journal: Journal) -> Put:
    """Puts events into the journal, as the hand-off does, or as capture does (`trusted=False`)."""

    def append(*bodies: bytes, trusted: bool = True) -> None:
        events = []
        for each in bodies:
            event = saltevent.open_event(each)
            assert isinstance(event, saltevent.Opened)
            assert event.job is not None
            events.append(
                NewEvent(time.time(), event.job.jid, event.job.minion, each, CONFIRMED if trusted else UNCHECKED)
            )
        journal.append(events)

    return append


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    pending._said.clear()


def master(tmp_path: Path, **options: Any) -> dict[str, Any]:
    """The master's opts; it keeps a local job cache unless they say otherwise."""
    return {"cachedir": str(tmp_path), "sock_dir": str(tmp_path), "id": MASTER, **options}


def test_a_job_is_told_with_its_load_and_its_returns(tmp_path: Path, put: Put) -> None:
    put(published(jid(1), ["web1", "web2"]), returned(jid(1), "web1", "done"), published(jid(2), ["web1"]))
    found = Pending(master(tmp_path)).job(jid(1))
    assert found.load["Minions"] == ["web1", "web2"]
    assert {minion: ret.return_json for minion, ret in found.returns.items()} == {"web1": '"done"'}
    assert sorted(Pending(master(tmp_path)).jobs()) == [jid(1), jid(2)]


def test_parts_of_a_job_add_up_and_the_first_return_stands(tmp_path: Path, put: Put) -> None:
    put(
        published(jid(1), ["web1"]),
        saltevent.minions_event(jid(1), ["of a syndic"]) or b"",
        published(jid(1), ["web2"]),
        returned(jid(1), "web1", "first"),
        returned(jid(1), "web1", "second"),
        returned(jid(1), "web2", "VALUE_TRIMMED"),
        returned(jid(1), "web2", "whole"),
        returned(jid(1), "web2", "late"),
    )
    found = Pending(master(tmp_path)).job(jid(1))
    assert sorted(found.load["Minions"]) == ["of a syndic", "web1", "web2"]
    assert {minion: ret.return_json for minion, ret in found.returns.items()} == {"web1": '"first"', "web2": '"whole"'}


def test_a_load_is_laid_over_what_is_stored_as_the_writer_does_it(tmp_path: Path, put: Put) -> None:
    call = call_data(jid(2), "web1")
    put(published(jid(1), ["web2"]), body(f"salt/job/{jid(2)}/ret/web1", call))
    jobs = Pending(master(tmp_path)).jobs()
    stored = {"jid": jid(1), "tgt": "*", "fun": "test.ping", "Minions": ["web1"]}
    assert jobs[jid(1)].load_over(stored)["Minions"] == ["web1", "web2"]
    assert jobs[jid(1)].load_over({"id": "web1", "tgt": "web1"})["Minions"] == ["web2"]
    assert jobs[jid(2)].load_over({})["tgt"] == "web1"
    assert jobs[jid(2)].load_over(stored) == stored


def test_a_runners_return_is_the_masters(tmp_path: Path, put: Put) -> None:
    put(body(f"salt/run/{jid(1)}/ret", master_data(jid(1), "runner.manage.up", {"a": 1})))
    (ret,) = Pending(master(tmp_path)).job(jid(1)).returns.values()
    assert (ret.id, json.loads(ret.return_json)["return"]) == (MASTER, {"a": 1})


def test_what_came_over_the_bus_is_told_once_the_job_cache_has_it(tmp_path: Path, put: Put) -> None:
    genuine = returned(jid(1), "web1", "genuine")
    put(genuine, returned(jid(1), "web2", "forged"), returned(jid(1), "web3", "another value"), trusted=False)
    cache = Cache(tmp_path)
    cache.accept(published(jid(1), ["web1", "web2", "web3"]), genuine, returned(jid(1), "web3", "the value"))
    found = Pending(master(tmp_path)).job(jid(1))
    assert {minion: ret.return_json for minion, ret in found.returns.items()} == {
        "web1": '"genuine"',
        "web3": '"the value"',
    }


def test_what_was_confirmed_before_needs_no_job_cache(tmp_path: Path, journal: Journal, put: Put) -> None:
    put(returned(jid(1), "web1"), returned(jid(1), "web2"), trusted=False)
    assert Pending(master(tmp_path)).job(jid(1)).returns == {}
    journal.confirm({journal.newest_seq() - 1: returned(jid(1), "web1", "as the cache had it")})
    told = Pending(master(tmp_path)).job(jid(1)).returns
    assert {minion: ret.return_json for minion, ret in told.items()} == {"web1": '"as the cache had it"'}


def test_without_a_local_job_cache_everything_is_told(tmp_path: Path, put: Put) -> None:
    put(returned(jid(1), "web1"), trusted=False)
    assert list(Pending(master(tmp_path, master_job_cache="mysql_jobcache")).job(jid(1)).returns) == ["web1"]


def test_what_waits_for_the_job_cache_is_not_told(tmp_path: Path, journal: Journal, put: Put) -> None:
    put(returned(jid(1), "web1"), trusted=False)
    stub = saltevent.stub(jid(1), "web2", time.time())  # nothing can be told of it without the job cache
    journal.append([NewEvent(time.time(), jid(1), "web2", stub, STUB)])
    assert Pending(master(tmp_path)).job(jid(1)).returns == {}
    assert Pending(master(tmp_path)).jobs() == {}
    without = Pending(master(tmp_path, master_job_cache="mysql_jobcache"))
    assert list(without.job(jid(1)).returns) == ["web1"]
    Cache(tmp_path).accept(published(jid(1), ["web1", "web2"]), returned(jid(1), "web1"), returned(jid(1), "web2", "v"))
    told = Pending(master(tmp_path)).job(jid(1)).returns
    assert sorted(told) == ["web1", "web2"]
    assert told["web2"].return_json == '"v"'


def test_what_becomes_no_row_is_not_told(tmp_path: Path, put: Put) -> None:
    put(
        returned(jid(1), "web1", fun="saltutil.find_job"),
        returned(jid(1), "web2", cmd="_minion_event"),
        returned(jid(1), "web3", id="web4"),
        body(f"salt/job/{jid(1)}/ret/web5", {"jid": jid(1), "id": "web5"}),
    )
    assert Pending(master(tmp_path)).job(jid(1)) == pending.PendingJob({}, {})
    assert Pending(master(tmp_path)).jobs() == {}


def test_of_a_long_outage_the_newest_are_told_and_a_warning_says_so_once(
    tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pending, "MOST_EVENTS", 3)
    put(*(returned(jid(number), "web1") for number in range(5)))
    for _ in range(3):
        assert sorted(Pending(master(tmp_path)).jobs()) == [jid(2), jid(3), jid(4)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert list(Pending(master(tmp_path)).job(jid(0)).returns) == ["web1"]  # a job that is asked for is found


def test_reading_changes_nothing_and_holds_nobody_up(tmp_path: Path, journal: Journal, put: Put) -> None:
    put(published(jid(1), ["web1"]))
    before = journal.books()
    asked = Pending(master(tmp_path))
    for number in range(2, 50):
        put(published(jid(number), ["web1"]))
        assert asked.job(jid(number)).load["jid"] == jid(number)  # at once
    assert journal.books()["captured"] == before["captured"] + 48


def test_what_a_killed_process_left_is_told(tmp_path: Path, journal: Journal, put: Put) -> None:
    put(published(jid(1), ["web1"]))
    copied = tmp_path / "copy" / "mysql_jobcache"
    copied.mkdir(parents=True)
    for file in (tmp_path / "mysql_jobcache").iterdir():  # the file and its log, as kill -9 leaves them
        (copied / file.name).write_bytes(file.read_bytes())
    assert list(Pending(master(tmp_path / "copy")).jobs()) == [jid(1)]


def corrupt(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100:] = b"\xa5" * (len(content) - 100)
    file.write_bytes(bytes(content))


def locked(file: Path) -> sqlite3.Connection:
    """Held as SQLite holds it while it recovers the log: nobody else can read."""
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("BEGIN EXCLUSIVE")
    return db


def test_a_journal_that_cannot_be_read_holds_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    asked = Pending(master(tmp_path))
    assert asked.jobs() == {}  # there is none
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    journal = Journal(tmp_path / "mysql_jobcache")
    journal.open()
    journal.append([NewEvent(time.time(), jid(1), "", published(jid(1), ["web1"]), CONFIRMED)])
    journal.close()
    file = tmp_path / "mysql_jobcache" / "journal.sqlite"
    assert list(asked.jobs()) == [jid(1)]
    monkeypatch.setattr(pending, "_LOCK_SECONDS", 0.05)
    db = locked(file)
    assert (asked.jobs(), asked.job(jid(1)).load) == ({}, {})
    db.execute("ROLLBACK")
    assert list(asked.jobs()) == [jid(1)]
    db.execute("PRAGMA user_version = 99")
    assert asked.jobs() == {}
    db.execute(f"PRAGMA user_version = {journalfile.FORMAT}")
    db.close()
    corrupt(file)
    assert asked.jobs() == {}
    file.unlink()
    file.mkdir()
    assert asked.jobs() == {}
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [any(word in line for line in said) for word in ("locked", "malformed", "disk I/O")] == [True] * 3
    assert any("another format" in record.message for record in caplog.records)


def test_rows_that_hold_nonsense_hide_no_other(tmp_path: Path, journal: Journal, put: Put) -> None:
    put(published(jid(1), ["web1"]))
    with sqlite3.connect(journal.path) as db:
        for captured_at, event in ((0.0, b"\xff"), (0.0, "text"), ("when", published(jid(2), ["web1"]))):
            db.execute(
                "INSERT INTO events (captured_at, jid, minion, body, state) VALUES (?, ?, '', ?, 1)",
                (captured_at, jid(2), event),
            )
    db.close()
    assert jid(1) in Pending(master(tmp_path)).jobs()
