"""The demo's site: MariaDB, a salt-master with the engine and two minions, in one folder and on loopback only."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from tests.support.mariadb import MariaDB, tail
from tests.support.salt import SaltMaster, SaltMinion

ENGINE: Final = "mysql_jobcache"
MASTER_ID: Final = "demo_master"
PASSWORD: Final = "salt_pass"
TUNING: Final = {"batch_size": 200, "flush_interval": 0.5}
STATES: Final = """\
good:
  test.succeed_without_changes
bad:
  test.fail_without_changes
"""


class Job(NamedTuple):
    """A command to run, and whether Salt is to say that it failed."""

    program: str
    args: tuple[str, ...]
    fails: bool = False


JOBS: Final = (
    Job("salt", ("*", "test.ping")),
    Job("salt", ("alpha", "state.apply", "broken"), fails=True),  # one of its two states does
    Job("salt", ("*", "test.ping,test.echo", ",", "hello")),
    Job("salt-run", ("test.arg", "one", "two=2")),
    Job("salt-call", ("test.outputter", "from beta")),
)


class Lab:
    """The site in `folder`. Objects of the same folder mean the same site, also in different processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mariadb = MariaDB(folder / "mariadb", options=["--default-time-zone=+00:00"])
        config = {
            "engines": [ENGINE],
            "mysql.host": self.mariadb.host,
            "mysql.port": self.mariadb.port,
            "mysql.user": "salt",
            "mysql.pass": PASSWORD,
            "mysql.db": "salt",
        }
        self.master = SaltMaster(folder / "salt", config, id=MASTER_ID)
        self.minions = [SaltMinion(self.master, name) for name in ("alpha", "beta")]
        self.states = Path(self.master.config["file_roots"]["base"][0])
        self.pillar = Path(self.master.config["pillar_roots"]["base"][0])

    @classmethod
    def fresh(cls, folder: Path) -> Lab:
        """A lab in an emptied folder, which may hold what an earlier lab left, and nothing else.

        Raises:
            RuntimeError: it holds something else.
        """
        strangers = {path.name for path in folder.glob("*")} - {"mariadb", "salt"}
        if strangers:
            raise RuntimeError(f"{folder} holds {', '.join(sorted(strangers))}: the demo needs a folder of its own")
        if folder.exists():
            shutil.rmtree(folder)
        return cls(folder)

    @property
    def running(self) -> bool:
        """Whether any of the lab's processes lives, whoever started it."""
        return any(part.processes() for part in self._parts())

    def start_database(self) -> None:
        """MariaDB, and in it the database and the account that the master's configuration names."""
        self.mariadb.start()
        self.mariadb.create_database("salt", "salt", PASSWORD)

    def start_master(self) -> None:
        """The master, with the states of its minions."""
        self.master.start()
        (self.states / "broken.sls").write_text(STATES)

    def start_minions(self) -> None:
        """Both at once; each is ready when it has answered a ping."""
        for minion in self.minions:
            minion.launch()
        for minion in self.minions:
            minion.wait_ready()

    def tune(self) -> None:
        """Write the pillar of the master's own id, and make the running engine read it."""
        (self.pillar / "top.sls").write_text(yaml.safe_dump({"base": {MASTER_ID: ["tuning"]}}))
        (self.pillar / "tuning.sls").write_text(yaml.safe_dump({ENGINE: TUNING}))
        self.run("salt-run", f"{ENGINE}.reload")

    def run(self, program: str, *args: str, fails: bool = False) -> str:
        """Run one of Salt's programs, on beta if it is salt-call, and return what it printed.

        Raises:
            RuntimeError: it did not end as expected; with its output and the tail of the log.
        """
        where = self.minions[-1] if program == "salt-call" else self.master
        done = where.cli(program, *args)
        if (done.returncode != 0) != fails:
            raise RuntimeError(
                f"{program} {' '.join(args)} ended with {done.returncode}:\n{done.stdout}{done.stderr}\n"
                f"The end of {where.log_file}:\n{tail(where.log_file, lines=15)}"
            )
        return done.stdout

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """The rows that a statement gives."""
        return self.mariadb.sql(statement, db="salt")

    def stop(self) -> None:
        """Stop minions, master and database in this order, whoever started them, and remove their links in /tmp."""
        with contextlib.ExitStack() as stopping:  # the last one first, and each even if another cannot be stopped
            for part in self._parts():
                stopping.push(part)

    def _parts(self) -> list[MariaDB | SaltMaster | SaltMinion]:
        return [self.mariadb, self.master, *self.minions]
