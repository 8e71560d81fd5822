"""Whole sites: a real salt-master with the engine, real minions, a database of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.mariadb import MariaDB, wait_until
from tests.support.salt import SaltMaster, SaltMinion
from tests.support.scratch import Scratch, scratch

ENGINE = "mysql_jobcache"
PATIENCE = 30.0  # seconds until what should happen at once is taken as not happening


class Site:
    """A master with the engine and its minions, and the database that it ships to."""

    def __init__(self, folder: Path, database: Scratch, config: Mapping[str, Any], **options: Any) -> None:
        engine = {ENGINE: {"flush_interval": 0.2, **options}}
        self.database = database
        self.master = SaltMaster(folder, {"engines": [engine], **database.mysql, **config})
        self.minions: dict[str, SaltMinion] = {}
        self.states = Path(self.master.config["file_roots"]["base"][0])
        self.pillar = Path(self.master.config["pillar_roots"]["base"][0])
        self.states.mkdir(parents=True)
        self.pillar.mkdir(parents=True)

    def minion(self, name: str, config: Mapping[str, Any] | None = None) -> SaltMinion:
        """Another minion, not started yet."""
        self.minions[name] = SaltMinion(self.master, name, config)
        return self.minions[name]

    def set_pillar(self, **options: Any) -> None:
        """What the master's own pillar says to the engine from its next compilation on."""
        (self.pillar / "top.sls").write_text(yaml.safe_dump({"base": {self.master.config["id"]: ["engine"]}}))
        (self.pillar / "engine.sls").write_text(yaml.safe_dump({ENGINE: options}))

    def status(self) -> dict[str, Any]:
        """``salt-run mysql_jobcache.status``, its books balanced."""
        status = self.master.run(f"{ENGINE}.status")
        books = status["books"]
        settled = ("written", "duplicates", "pending", "dead_letters")
        reasons = sum(books["ignored"].values()) + sum(books["dropped"].values())
        assert books["captured"] == sum(books[name] for name in settled) + reasons, books
        return dict(status)

    def engine(self) -> psutil.Process:
        """The engine's process; waits for Salt to start one."""
        wait_until(lambda: len(self.master.engine_processes(ENGINE)) == 1, timeout=PATIENCE, what="the engine")
        return self.master.engine_processes(ENGINE)[0]

    def load(self, jid: str) -> str | None:
        """The stored load of a job."""
        rows = self.database.sql("SELECT `load` FROM jids WHERE jid = %s", jid)
        return rows[0][0] if rows else None

    def returned(self, jid: str, *minions: str) -> dict[str, dict[str, Any]]:
        """The rows of a job, once all ``minions`` are among them."""

        def rows() -> dict[str, dict[str, Any]]:
            return {row["id"]: row for row in self.database.rows("salt_returns") if row["jid"] == jid}

        wait_until(lambda: rows().keys() >= set(minions), timeout=PATIENCE, what=f"returns of {minions} to {jid}")
        return rows()

    def wait_for(self, statement: str, *args: Any) -> tuple[Any, ...]:
        """The first row that a query gives, once it gives one."""
        wait_until(
            lambda: bool(self._tables() and self.database.sql(statement, *args)), timeout=PATIENCE, what=statement
        )
        return self.database.sql(statement, *args)[0]

    def _tables(self) -> bool:
        return len(self.database.sql("SHOW TABLES")) >= 2


def ended(process: psutil.Process) -> bool:
    """Whether a process is gone; its parent may not have noticed yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


MakeSite = Callable[..., contextlib.AbstractContextManager[Site]]


@pytest.fixture(scope="session")
def site(mariadb: MariaDB, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The session's site: two minions, events ``my/app/*`` stored. Tests leave it as they found it.

    Alpha sends values that are larger than what the master's bus carries.
    """
    with scratch(mariadb) as database:
        here = Site(tmp_path_factory.mktemp("site"), database, {}, events=["my/app/*"], verify_wait_seconds=2.0)
        with contextlib.ExitStack() as running:
            running.enter_context(here.master)
            for name, config in (("alpha", {"max_event_size": 50_000_000}), ("beta", {})):
                here.minion(name, config).launch()
                running.callback(here.minions[name].stop)
            for minion in here.minions.values():
                minion.wait_ready()
            yield here


@pytest.fixture
def make_site(mariadb: MariaDB, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes sites of a test's own, not started yet; each with a database of its own."""
    with _site_maker(mariadb, tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def make_module_site(mariadb: MariaDB, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """The same for sites that the tests of a file share."""
    with _site_maker(mariadb, tmp_path_factory.mktemp("module")) as make:
        yield make


@contextlib.contextmanager
def _site_maker(mariadb: MariaDB, folder: Path) -> Iterator[Callable[..., Site]]:
    with contextlib.ExitStack() as made:
        number = 0

        def make(config: Mapping[str, Any] | None = None, **options: Any) -> Site:
            nonlocal number
            number += 1
            database = made.enter_context(scratch(mariadb))
            return Site(folder / f"site{number}", database, config or {}, **options)

        yield make
