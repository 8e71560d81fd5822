"""The runner, the pillar and the control socket of a running engine."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator

import pytest

from salt_mysql_engine import schema
from tests.support.mariadb import wait_until
from tests.support.salt import fire
from tests.system.conftest import PATIENCE, Site


@pytest.fixture
def tuned(site: Site) -> Iterator[Site]:
    """The site, whose pillar is as before after the test."""
    yield site
    site.set_pillar()
    site.master.run("mysql_jobcache.reload")


@pytest.mark.smoke
def test_status_shows_the_books_the_lag_the_server_and_where_each_setting_came_from(site: Site) -> None:
    site.master.salt("alpha", "test.ping")
    site.master.run("mysql_jobcache.flush")
    status = site.status()
    assert status["books"]["written"] > 0
    assert status["lag_seconds"] < PATIENCE
    assert status["bus"]["connected"] is True
    assert "MariaDB" in status["database"]["version"]
    assert status["database"]["host"] == f"127.0.0.1:{site.database.server.port}"
    assert status["settings"]["flush_interval"] == {"value": 0.2, "source": "master config"}
    assert status["settings"]["batch_size"] == {"value": 500, "source": "default"}
    assert status["settings_problems"] == []


@pytest.mark.smoke
def test_the_pillar_retunes_the_running_engine(tuned: Site) -> None:
    pid = tuned.engine().pid
    tuned.set_pillar(batch_size=7, flush_interval=0.1)
    settings = tuned.master.run("mysql_jobcache.reload")
    assert settings["batch_size"] == {"value": 7, "source": "pillar"}
    assert settings["flush_interval"] == {"value": 0.1, "source": "pillar"}
    assert tuned.status()["settings"] == settings
    assert tuned.engine().pid == pid


def test_a_pillar_that_uses_grains_compiles(tuned: Site) -> None:
    tuned.set_pillar()
    (tuned.pillar / "engine.sls").write_text("mysql_jobcache:\n  batch_size: {{ 11 if grains['kernel'] else 12 }}\n")
    assert tuned.master.run("mysql_jobcache.reload")["batch_size"] == {"value": 11, "source": "pillar"}


def test_the_pillar_is_looked_at_on_a_timer_too(tuned: Site) -> None:
    tuned.set_pillar(pillar_refresh_seconds=1)
    tuned.master.run("mysql_jobcache.reload")
    tuned.set_pillar(pillar_refresh_seconds=1, batch_size=8)
    wait_until(
        lambda: tuned.status()["settings"]["batch_size"] == {"value": 8, "source": "pillar"},
        timeout=PATIENCE,
        what="the new batch size",
    )


@pytest.mark.smoke
def test_a_wrong_pillar_keeps_the_last_good_settings_and_says_so(tuned: Site) -> None:
    tuned.set_pillar(batch_size=9)
    tuned.master.run("mysql_jobcache.reload")
    for wrong, hint in (
        ({"batch_size": 0}, "batch_size: 0 is not allowed; it must be a whole number from 1 to 50,000 rows"),
        ({"batchsize": 5}, "batchsize: no such option; did you mean batch_size?"),
        ({"host": "db"}, "host: the connection is set by mysql.* in the master config"),
    ):
        tuned.set_pillar(**wrong)
        answer = tuned.master.run("mysql_jobcache.reload")
        assert hint in answer["error"]
        status = tuned.status()
        assert status["settings"]["batch_size"] == {"value": 9, "source": "pillar"}
        assert hint in status["settings_problems"][0]
    (tuned.pillar / "engine.sls").write_text("mysql_jobcache: {% this is no jinja\n")
    assert "does not compile" in tuned.master.run("mysql_jobcache.reload")["error"]
    assert tuned.status()["settings"]["batch_size"] == {"value": 9, "source": "pillar"}


@pytest.mark.smoke
def test_flush_returns_when_what_was_pending_is_in_the_table(tuned: Site) -> None:
    tuned.set_pillar(flush_interval=300.0)
    tuned.master.run("mysql_jobcache.reload")
    tuned.master.salt("alpha", "test.fib", "3")
    assert tuned.database.sql("SELECT * FROM salt_returns WHERE fun = 'test.fib'") == []
    answer = tuned.master.run("mysql_jobcache.flush")
    assert answer["flushed"] >= 2
    assert len(tuned.database.sql("SELECT * FROM salt_returns WHERE fun = 'test.fib'")) == 1


def test_flush_waits_for_what_waits_for_its_confirmation_and_else_says_so_and_fails(tuned: Site) -> None:
    site = tuned
    site.set_pillar(verify_wait_seconds=600.0)
    site.master.run("mysql_jobcache.reload")
    site.master.run("mysql_jobcache.flush")
    letters = site.status()["books"]["dead_letters"]
    jid = "20260101000000000077"
    fire(site.master, f"salt/job/{jid}/ret/beta", {"id": "beta", "jid": jid, "return": 1, "fun": "test.ping"})
    done = site.master.cli("salt-run", "--out=json", "mysql_jobcache.flush", "timeout=0.2")
    assert done.returncode == 1
    assert "wait for the master's job cache" in json.loads(done.stdout)["error"]
    site.set_pillar(verify_wait_seconds=0.5)
    site.master.run("mysql_jobcache.reload")
    site.master.run("mysql_jobcache.flush")
    assert site.status()["books"]["dead_letters"] == letters + 1
    site.master.run("mysql_jobcache.dead_letters", "delete=all")


def test_test_connection_says_what_is_there(site: Site) -> None:
    answer = site.master.run("mysql_jobcache.test_connection")
    assert "MariaDB" in answer["version"]
    assert answer["tables"] == f"ours at version {schema.newest()}"


def test_a_wrong_argument_is_answered_with_a_sentence_and_an_exit_code(site: Site) -> None:
    done = site.master.cli("salt-run", "mysql_jobcache.flush", "timeout=soon")
    assert done.returncode == 1
    assert "timeout: 'soon' must be a number of seconds" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_only_the_masters_user_reaches_the_engine_and_its_journal(site: Site) -> None:
    socket = site.master.sock_dir / "mysql_jobcache.ipc"
    folder = site.master.directory / "cache" / "mysql_jobcache"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
