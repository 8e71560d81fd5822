"""What suites share: one private MariaDB for the whole run, masters, the million rows, and how to look at a process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks import loader
from salt_mysql_engine import schema
from salt_mysql_engine.database import Database
from salt_mysql_engine.settings import Connection
from tests.support.mariadb import MariaDB, find_program
from tests.support.salt import SaltMaster

ENGINE: Final = "mysql_jobcache"
WRITE_QUEUE: Final = 100_000
"""At full speed the publisher of 3008 does not get round to counting what was sent: with its default of 10,000 it
throws off all its readers, its own among them, about once a round."""

_SERVER_OPTIONS: Final = ("--innodb-buffer-pool-size=2G", "--innodb-log-file-size=512M", "--local-infile=ON")
"""Room for a million rows; what is durable stays as it is: a sync for each COMMIT."""


class Bench:
    """One run. Suites get it, and leave on it what later ones use too."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, *, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self._stack = stack
        self._fired = 0

    def size(self, full: int, quick: int) -> int:
        """How much of something this run takes."""
        return quick if self.quick else full

    @property
    def rounds(self) -> int:
        """Of each kind, interleaved."""
        return self.size(5, 3)

    def fresh(self) -> int:
        """The first of 100,000 numbers of returns that the site's bus has not seen (`payloads.py`)."""
        self._fired += 100_000
        return self._fired

    def say(self, text: str) -> None:
        """Progress, for who waits."""
        print(f"» {text}", flush=True)

    @functools.cached_property
    def db(self) -> MariaDB:
        """The private server, started when first used."""
        self.say("a private MariaDB")
        # Its own, since a server that starts removes what it takes for leftovers of its temporary tables there.
        temporary = self.folder / "tmp"
        temporary.mkdir()
        options = [*_SERVER_OPTIONS, f"--tmpdir={temporary}"]
        return self._stack.enter_context(MariaDB(self.folder / "db", options=options))

    def database(self, name: str) -> dict[str, Any]:
        """An empty database with the engine's tables; ``mysql.*`` options of its account."""
        self.db.sql(f"DROP DATABASE IF EXISTS `{name}`")
        self.db.create_database(name, "salt", "salt")
        mysql = login(self.db, name)
        asyncio.run(_create(mysql))
        return mysql

    @functools.cached_property
    def million(self) -> loader.Loaded:
        """The loaded tables, in the database ``million``."""
        returns, jobs = self.size(1_000_000, 60_000), self.size(20_000, 1_000)
        self.say(f"loading {returns:,} returns of {jobs:,} jobs")
        self.database("million")
        loaded = loader.load(self.db, "million", self.folder, returns=returns, jobs=jobs)
        self.say(f"loaded in {loaded.seconds:.0f} s")
        return loaded

    @functools.cached_property
    def site(self) -> SaltMaster:
        """A salt-master with the engine, on the database ``site``, whose returns know when they were inserted."""
        mysql = self.database("site")
        self.db.sql("ALTER TABLE salt_returns ADD inserted_at TIMESTAMP(6) DEFAULT CURRENT_TIMESTAMP(6)", db="site")
        self.say("a salt-master with the engine")
        return self._stack.enter_context(SaltMaster(self.folder / "site", master_config(mysql)))

    def machine(self) -> str:
        """Where the figures were taken, without a name."""
        import salt.version

        memory = psutil.virtual_memory().total / 2**30
        server = subprocess.run([find_program("mariadbd"), "--version"], check=True, capture_output=True, text=True)
        return (
            f"{psutil.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}, "
            f"Salt {salt.version.__saltstack_version__}, Python {platform.python_version()}, "
            f"MariaDB {server.stdout.split('Ver ')[1].split('-')[0]}"
        )


def master_config(mysql: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """A master's with the engine, which believes the bus unless told otherwise."""
    engine = {
        "flush_interval": 1.0,
        "verify_returns": False,
        # A pass would find what the job cache holds before it is fired.
        "reconcile_interval_seconds": 0,
        **options,
    }
    return {**mysql, "engines": [{ENGINE: engine}], "pub_server_write_queue_size": WRITE_QUEUE}


async def _create(mysql: Mapping[str, Any]) -> None:
    session = await Database(lambda: Connection.from_opts(mysql), connect_timeout=10, statement_timeout=60).open()
    await schema.ensure(session, create=True, events=True)
    await session.commit()
    session.close()


def login(server: Any, database: str = "salt") -> dict[str, Any]:
    """``mysql.*`` options for a server, or for a proxy before it."""
    return {
        "mysql.host": server.host,
        "mysql.port": server.port,
        "mysql.user": "salt",
        "mysql.pass": "salt",
        "mysql.db": database,
    }


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


class PeakRss:
    """The most memory that a process had while this was open, in bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.bytes = 0
        self._process = process
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakRss:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def mb(self) -> float:
        """In megabytes."""
        return self.bytes / 1e6

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.bytes = max(self.bytes, self._process.memory_info().rss)


def python(module: str, *args: str) -> subprocess.Popen[bytes]:
    """A process of this package's."""
    return subprocess.Popen([sys.executable, "-m", module, *args])


def set_pillar(master: SaltMaster, **options: Any) -> None:
    """The engine's options, in effect on return."""
    folder = Path(master.config["pillar_roots"]["base"][0])
    (folder / "top.sls").write_text(json.dumps({"base": {master.config["id"]: ["engine"]}}))
    (folder / "engine.sls").write_text(json.dumps({ENGINE: options}))
    in_effect = master.run("mysql_jobcache.reload")
    assert all(in_effect[name]["value"] == value for name, value in options.items()), in_effect


def settled(db: MariaDB, where: str, expected: int, *, database: str = "salt", idle: float = 5.0) -> int:
    """The returns that match, once all are there or none came for a while."""
    rows, changed = -1, time.monotonic()
    while rows < expected and time.monotonic() < changed + idle:
        time.sleep(0.2)
        ((count,),) = db.sql(f"SELECT COUNT(*) FROM salt_returns WHERE {where}", db=database)
        if count != rows:
            rows, changed = count, time.monotonic()
    return rows


def empty(db: MariaDB, database: str) -> None:
    """No rows, and pages that are as new."""
    for table in ("jids", "salt_returns", "salt_events"):
        db.sql(f"TRUNCATE TABLE {table}", db=database)


def forget(path: Path) -> None:
    """Removes a folder that a round made."""
    shutil.rmtree(path, ignore_errors=True)
