"""The master and the engine while MySQL, the bus or the engine itself is in trouble."""

from __future__ import annotations

import contextlib
import importlib.metadata
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.support.mariadb import wait_until
from tests.support.salt import SaltMaster
from tests.system.conftest import ENGINE, PATIENCE, Site, ended
from tests.system.test_jobs import forged

pytestmark = pytest.mark.faults

STOP_SECONDS = 4.0
SERIES = int(importlib.metadata.version("salt").split(".")[0])

PUBLISH = """
import sys
from pathlib import Path
from tests.support.salt import Publisher
from tests.system.test_faults import tag, forged_return
with Publisher(Path(sys.argv[1])) as publisher:
    for number in range(int(sys.argv[2]), int(sys.argv[3])):
        publisher.fire(tag(number), forged_return(number))
"""


def jid(number: int) -> str:
    return f"202602{number:014d}"


def tag(number: int) -> str:
    return f"salt/job/{jid(number)}/ret/beta"


def forged_return(number: int) -> dict[str, object]:
    return forged(jid=jid(number))


def publish_returns(master: SaltMaster, first: int, last: int) -> subprocess.Popen[bytes]:
    """A process that fires the returns numbered ``first`` to ``last - 1`` at the master's bus, which the engine reads.

    No job cache holds them: what came before would be nowhere.
    """
    wait_until(lambda: logged(master, "Reading the event bus at"), timeout=PATIENCE, what="the engine on the bus")
    return subprocess.Popen([sys.executable, "-c", PUBLISH, str(master.config_dir), str(first), str(last)])


def journalled(site: Site) -> set[str]:
    """The jids that wait in the journal of an engine that is down."""
    path = site.master.directory / "cache" / ENGINE / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as journal:
        return {row[0] for row in journal.execute("SELECT jid FROM events WHERE minion = 'beta'")}


def stored(site: Site) -> set[str]:
    if not site.database.sql("SHOW TABLES LIKE 'salt_returns'"):
        return set()
    return {row[0] for row in site.database.sql("SELECT jid FROM salt_returns WHERE id = 'beta'")}


@pytest.mark.smoke
def test_with_mysql_away_jobs_go_on_and_everything_arrives_afterwards(make_site: Callable[..., Site]) -> None:
    site = make_site()
    server = site.database.server
    server.kill()
    with site.master, site.minion("alpha"):
        # At the start.
        assert site.master.salt("alpha", "test.ping") == {"alpha": True}
        wait_until(lambda: site.status()["last_error"] is not None, timeout=PATIENCE, what="an error in status")
        status = site.status()
        assert "Can't connect" in status["last_error"]["message"]
        assert status["books"]["pending"] >= 2
        assert status["lag_seconds"] > 0
        answer = site.master.run("mysql_jobcache.flush", "timeout=1")
        assert "still pending after 1 s" in answer["error"]
        assert "Can't connect" in answer["error"]
        server.start()
        site.wait_for("SELECT jid FROM salt_returns WHERE fun = 'test.ping' AND id = 'alpha'")
        # Later, under jobs.
        server.kill()
        assert site.master.salt("alpha", "test.true") == {"alpha": True}
        wait_until(lambda: site.status()["database"]["failing"], timeout=PATIENCE, what="a fault that bit")
        assert site.master.salt("alpha", "test.false") == {"alpha": False}
        server.start()
        for fun in ("test.true", "test.false"):
            site.wait_for("SELECT jid FROM salt_returns WHERE fun = %s AND id = 'alpha'", fun)
        status = site.status()
        assert status["database"]["retries"] > 0
        assert status["books"]["dead_letters"] == 0
        assert status["books"]["dropped"] == {}


@pytest.mark.smoke
def test_a_stop_takes_under_four_seconds_and_keeps_every_captured_event(make_site: Callable[..., Site]) -> None:
    site = make_site(batch_size=50, verify_returns=False)
    server = site.database.server
    with site.master:
        publishing = publish_returns(site.master, 0, 3000)
        site.wait_for("SELECT jid FROM salt_returns LIMIT 1")
        server.freeze()  # a stop must not wait for the database
        engine = site.engine()
        captured = site.status()["books"]["captured"]
        for _ in range(3):  # as Salt does
            engine.send_signal(signal.SIGTERM)
        began = time.monotonic()
        wait_until(lambda: ended(engine), timeout=PATIENCE, what="the engine's end")
        assert time.monotonic() - began < STOP_SECONDS
        waiting = journalled(site)
        assert waiting  # else the stop met nothing
        server.thaw()
        assert publishing.wait(PATIENCE) == 0
        site.engine()  # Salt starts another
        wait_until(lambda: waiting <= stored(site), timeout=PATIENCE, what="what waited in the journal")
        books = site.status()["books"]
        assert books["captured"] >= captured
        assert books["dead_letters"] == 0


@pytest.mark.smoke
def test_an_engine_that_is_killed_ships_all_that_it_had_journalled_when_salt_starts_it_again(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(batch_size=50, verify_returns=False)
    server = site.database.server
    with site.master:
        publishing = publish_returns(site.master, 0, 3000)
        site.wait_for("SELECT jid FROM salt_returns LIMIT 1")
        server.freeze()
        engine = site.engine()
        wait_until(lambda: len(journalled(site)) > 200, timeout=PATIENCE, what="a queue")
        engine.kill()
        wait_until(lambda: ended(engine), timeout=PATIENCE, what="the engine's end")
        waiting = journalled(site)
        assert len(waiting) > 200
        server.thaw()
        assert publishing.wait(PATIENCE) == 0
        wait_until(lambda: waiting <= stored(site), timeout=PATIENCE, what="what waited in the journal")
        books = site.status()["books"]
        assert (books["dead_letters"], books["dropped"]) == (0, {})
        assert site.engine().pid != engine.pid


def test_a_stop_of_the_master_leaves_every_return_in_mysql_or_in_the_journal(make_site: Callable[..., Site]) -> None:
    site = make_site(flush_interval=60.0, verify_returns=False)
    with site.master:
        assert publish_returns(site.master, 0, 500).wait(PATIENCE) == 0
        wait_until(lambda: site.status()["books"]["captured"] >= 500, timeout=PATIENCE, what="500 events captured")
        engine = site.engine()
    assert ended(engine)
    assert journalled(site) | stored(site) >= {jid(number) for number in range(500)}


@pytest.mark.skipif(
    SERIES >= 3008, reason="salt-master 3008.3 cannot start a second EventPublisher: 'event loop is already running'"
)
@pytest.mark.smoke
def test_the_engine_finds_the_bus_again_after_the_publisher_died(make_site: Callable[..., Site]) -> None:
    site = make_site()
    with site.master, site.minion("alpha"):
        (publisher,) = site.master.find_processes("EventPublisher")
        wait_until(lambda: site.status()["bus"]["connected"], timeout=PATIENCE, what="the bus")
        publisher.kill()
        wait_until(lambda: site.status()["bus"]["connects"] == 2, timeout=PATIENCE, what="a second connection")

        def arrives() -> bool:
            site.master.cli("salt", "alpha", "test.ping")  # 3006's workers fail once to find the new publisher
            site.master.run("mysql_jobcache.flush")
            return site.database.count("salt_returns") > 0

        wait_until(arrives, timeout=PATIENCE, what="a job after the restart")


def logged(master: SaltMaster, sentence: str) -> bool:
    return sentence in master.log


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mysql.pass": "wrong"}, "check mysql.user and mysql.pass in the master config"),
        ({"mysql.db": "nowhere"}, "The database needs a person"),
        ({"mysql.port": "many"}, "mysql.port: 'many' must be a whole number from 1 to 65535"),
        ({"mysql.ssl_ca": "/nowhere/ca.pem"}, "mysql.ssl_*: the TLS files cannot be used"),
    ],
    ids=["password", "database", "port", "tls"],
)
def test_what_only_a_person_can_mend_is_said_once_and_loses_nothing(
    make_site: Callable[..., Site], config: dict[str, str], sentence: str
) -> None:
    site = make_site(config, verify_returns=False)
    with site.master:
        assert publish_returns(site.master, 0, 10).wait(PATIENCE) == 0
        wait_until(lambda: logged(site.master, sentence), timeout=PATIENCE, what=sentence)
        site.master.run("mysql_jobcache.flush", "timeout=1")
        site.master.run("mysql_jobcache.flush", "timeout=1")
        assert site.master.log.count(sentence) == 1
        assert "Traceback" not in site.master.log
        books = site.status()["books"]
        assert (books["pending"] >= 10, books["dead_letters"]) == (True, 0)
