"""The engine as a whole, in a process of its own with a real database and a real pillar, without a master."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from salt_mysql_engine import control, folders
from salt_mysql_engine.errors import ControlError
from salt_mysql_engine.journal import Journal, NewEvent
from tests.support.mariadb import CURRENT_USER, ShortPath, wait_until
from tests.support.oldtables import job, make_ours
from tests.support.scratch import Scratch
from tests.support.shipping import jid, returned

PATIENCE = 30.0


class Host:
    """An engine and what it reads: master config, pillar, journal."""

    def __init__(self, folder: Path, database: Scratch) -> None:
        self.folder = folder
        self._short = ShortPath(folder, limit=60)
        self._short.make()
        root = self._short.path
        self.opts: dict[str, Any] = {
            "user": CURRENT_USER,
            "root_dir": str(root),
            "cachedir": str(root / "cache"),
            "sock_dir": str(root / "run"),
            "pki_dir": str(root / "pki"),
            "log_file": str(root / "log"),
            "pillar_roots": {"base": [str(folder / "pillar")]},
            "file_roots": {"base": [str(folder / "states")]},
            "id": "lab_master",
            "enable_gpu_grains": False,
            "enable_fqdns_grains": False,
            "grains_cache": True,
            "lab_pillar_seconds": 60.0,
            "lab_options": {"flush_interval": 0.05, "verify_returns": False, "pillar_refresh_seconds": 1},
            **database.mysql,
        }
        for name in ("cache", "run", "pillar", "states"):
            (folder / name).mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []

    def pillar(self, text: str) -> None:
        (self.folder / "pillar" / "top.sls").write_text("base: {lab_master: [engine]}\n")
        (self.folder / "pillar" / "engine.sls").write_text(text)

    def start(self) -> subprocess.Popen[bytes]:
        (self.folder / "master").write_text(yaml.safe_dump(self.opts))
        with (self.folder / f"stderr{len(self.processes)}").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.enginehost", str(self.folder)], stdout=output, stderr=output
            )
        self.processes.append(process)
        return process

    def log(self, number: int = -1) -> str:
        """What the last (or another) engine said."""
        return (self.folder / f"stderr{number % len(self.processes)}").read_text(errors="replace")

    def ask(self, verb: str, **arguments: Any) -> Any:
        return control.ask({"sock_dir": self.opts["sock_dir"]}, verb, **arguments)

    def status(self) -> dict[str, Any]:
        """Of the running engine, once it answers."""
        found: dict[str, Any] = {}

        def answers() -> bool:
            try:
                found.update(self.ask("status"))
            except ControlError:
                return False
            return True

        wait_until(answers, timeout=PATIENCE, what=f"an answer\n{self.log()}")
        return found

    def until(self, what: str, **state: Any) -> dict[str, Any]:
        """The status, once its part of that name says so."""
        wait_until(lambda: self.status()[what].items() >= state.items(), timeout=PATIENCE, what=f"{what} {state}")
        return self.status()

    def said(self, words: str, number: int = -1) -> None:
        wait_until(lambda: words in self.log(number), timeout=PATIENCE, what=f"{words!r} in the log")

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0

    def journal(self, *bodies: bytes, minion: str = "web1") -> None:
        """What an engine that is not running now had captured."""
        journal = Journal(folders.of_journal(self.opts["cachedir"]))
        journal.open()
        journal.append([NewEvent(1.75e9, jid(1), minion, body) for body in bodies])
        journal.close()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._short.remove()


@pytest.fixture
def host(database: Scratch, tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path, database)
    yield made
    made.close()


ENGINES = Path(__file__).parents[2] / "_engines"
BROKEN = "mysql_jobcache: {% this is no jinja\n"


def functions(database: Scratch) -> set[str]:
    return {row["fun"] for row in database.rows("salt_returns")} if database.sql("SHOW TABLES") else set()


def test_what_the_pillar_said_last_is_in_effect_from_the_start_on(host: Host, database: Scratch) -> None:
    host.pillar("mysql_jobcache: {skip_functions: ['secret.*']}\n")
    first = host.start()
    host.until("pillar", confirmed=True, remembered=True)
    host.stop(first)
    host.pillar(BROKEN)
    host.journal(returned(jid(1), "web1", "SECRET-1", fun="secret.get"), returned(jid(2), "web1"))
    host.start()
    books = host.until("books", pending=0)["books"]
    assert (books["written"], books["ignored"]) == (1, {"skipped_function": 1})
    status = host.status()
    assert status["pillar"] == {"confirmed": False, "remembered": True, "waited_for": False}
    assert status["settings"]["skip_functions"] == {"value": ["secret.*"], "source": "pillar"}
    assert functions(database) == {"test.ping"}


def test_until_a_pillar_says_what_to_write_events_are_captured_only_for_a_bounded_time(
    host: Host, database: Scratch
) -> None:
    host.pillar(BROKEN)
    host.opts["lab_pillar_seconds"] = 4.0
    host.opts["lab_options"]["retention_days"] = 30
    make_ours(database)
    database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, '{}')", job(400))
    host.journal(returned(jid(1), "web1"))
    host.start()
    status = host.status()
    assert status["pillar"]["waited_for"]
    assert status["books"]["pending"] == 1
    with pytest.raises(ControlError, match="they wait for the pillar of lab_master"):
        host.ask("flush", seconds=0.1)
    host.said("rows are written by the master config alone. Nothing is purged until the pillar compiles.")
    host.until("books", pending=0, written=1)
    assert host.status()["retention"]["last_purge"] is None
    assert {job(400)} <= {row["jid"] for row in database.rows("jids")}
    host.pillar("mysql_jobcache: {retention_days: 3650}\n")
    host.until("pillar", confirmed=True)
    wait_until(lambda: host.status()["retention"]["last_purge"] is not None, timeout=PATIENCE, what="a purge")
    assert {job(400)} <= {row["jid"] for row in database.rows("jids")}


def test_a_pillar_that_compiles_confirms_the_settings_also_where_it_says_nothing(host: Host) -> None:
    host.start()
    host.until("pillar", confirmed=True, remembered=True, waited_for=False)


def test_nothing_that_is_asked_on_the_control_socket_ends_the_engine_or_fools_it(host: Host) -> None:
    process = host.start()
    host.status()
    for request in (
        b'{"verb": "reconcile", "since": "x"}',
        b'{"verb": "reconcile", "since": 1e20}',
        b'{"verb": "flush", "seconds": NaN}',
        b'{"verb": "flush", "seconds": 1e999}',
        b'{"verb": "dead_letters", "limit": -1}',
        b'{"verb": "retry", "seq": "all"}',
        b'{"verb": "dead_letters", "seq": 1e999, "after": []}',
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(control.socket_path(host.opts)))
            sock.sendall(request + b"\n")
            assert "error" in json.loads(sock.makefile("rb").readline())
    assert host.ask("reconcile", since=0.0) == {"passes": 0}
    status = host.status()
    assert (status["engine"]["pid"], status["engine"]["faults"]) == (process.pid, {})
    host.stop(process)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep_jobs_seconds": None}, "keep_jobs_seconds: None is not allowed; it must be a whole number, 0 or more."),
        ({"lab_options": ["batch_size: 5"]}, "write options as `name: value`, one on each line. Its default is used."),
        ({"lab_options": "batch_size 5"}, "mysql_jobcache: 'batch_size 5' is no mapping;"),
        ({"lab_options": {"skip_functions": "a.b"}}, "it must be a list of 1,000 texts at most. Its default is used."),
        ({"event_return": {"a": 1}}, "event_return: {'a': 1} is not allowed; it must be a text or a list of texts."),
        ({"cluster_id": "c", "cluster_peers": 7}, "cluster_peers: 7 is not allowed;"),
        ({"tcp_master_pub_port": "x"}, "tcp_master_pub_port: 'x' is not allowed;"),
    ],
)
def test_a_setting_of_the_wrong_type_is_said_and_its_default_is_used(
    host: Host, wrong: dict[str, Any], said: str
) -> None:
    host.opts |= wrong
    host.start()
    assert host.status()["settings"]["batch_size"]["value"] == 500
    assert said in host.log()
    assert host.status()["settings_problems"]


def test_a_second_engine_of_the_same_master_waits_quietly_and_takes_over(host: Host, database: Scratch) -> None:
    first = host.start()
    assert host.status()["engine"]["pid"] == first.pid
    second = host.start()
    host.said(
        f"process {first.pid}. List it once under engines, and give each master a cachedir of its own. "
        "The engine waits, and tries again"
    )
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_until(lambda: host.status()["engine"]["pid"] == second.pid, timeout=PATIENCE, what="the second engine")
    assert host.log().count("List it once") == 1
    host.stop(second)
    assert database.sql("SELECT 1") == [(1,)]


def test_a_journal_that_cannot_be_opened_is_said_once_and_tried_again(host: Host) -> None:
    folder = folders.of_journal(host.opts["cachedir"])
    folder.write_text("in the way")
    process = host.start()
    host.said("the journal's folder")
    folder.unlink()
    assert host.status()["engine"]["pid"] == process.pid
    assert host.log().count("the journal's folder") == 1


@pytest.mark.parametrize(("options", "kind"), [([{"batch_size": 5}], "list"), ("batch_size 5", "text")])
def test_options_that_salt_cannot_pass_on_are_said_once_with_what_to_write(host: Host, options: Any, kind: str) -> None:
    host.opts |= {"lab_options": options, "lab_salt": True, "engines_dirs": [str(ENGINES)]}
    process = host.start()
    host.said(f"its options under engines in the master config are a {kind}, and must be a mapping")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert host.log().count("must be a mapping") == 1
