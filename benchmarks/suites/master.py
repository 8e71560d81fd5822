"""What real masters do: a job is published through the master's request server as `salt` does it, and 50 simulated
minions, each with a key of its own, answer over the real request channel; the next job follows. Masters with
different job caches take turns, five jobs each, while the database is healthy, 50 ms away, frozen and down:

* `local_cache` alone, and with the engine beside (what it costs the master that the engine listens);
* `mysql_jobcache` as `master_job_cache`, the engine shipping;
* saltext.mysql 1.1.0 as `master_job_cache`, and as `event_return` with a queue of 500 beside `local_cache`.

On two cores the simulated minions, the master, the engine and the database share what there is: the ratios say more
than the figures. The CPU of the MWorkers is given as well. A job that was not done within 20 s is given as 20 s.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.lab import ENGINE, WRITE_QUEUE, Bench, cpu_seconds, login, master_config
from benchmarks.report import Figure, ratio
from benchmarks.suites.handoff import states
from benchmarks.worker import Worker
from tests.support.proxy import Proxy
from tests.support.salt import SaltMaster

LOCAL, BESIDE, HANDED, SALTEXT, EVENTS = (
    "local_cache",
    "local_cache, engine beside",
    "mysql_jobcache",
    "saltext.mysql",
    "saltext.mysql as event_return",
)
_MINIONS = 50
_PATIENCE = 20.0
_FEW = 6
"""Answers to a job where each of them waits for the network."""

Took = dict[str, list[dict[str, float]]]


def run(bench: Bench) -> list[Figure]:
    """All masters are up all the time; those that are not asked do nothing."""
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(bench.db.host, bench.db.port))
        bench.say(f"master: keys of {_MINIONS} minions")
        keys = bench.folder / "keys"
        _make_keys(keys)
        sites: dict[str, _Site] = {}
        for number, name in enumerate((LOCAL, BESIDE, HANDED, SALTEXT, EVENTS)):
            bench.say(f"master: {name}")
            database = f"master{number}"
            bench.database(database)
            sites[name] = stack.enter_context(
                _Site(bench.folder / database, _config(name, login(proxy, database)), keys)
            )
            sites[name].jobs(1, _MINIONS)
        for state, fault in states(bench, proxy):
            bench.say(f"master: the database is {state}")
            with fault():
                figures += _figures(state, _measure(bench, sites, state))
            for site in sites.values():
                site.recover()
    return figures


def _config(name: str, mysql: dict[str, Any]) -> dict[str, Any]:
    plain = {**mysql, "pub_server_write_queue_size": WRITE_QUEUE}
    if name == BESIDE:
        return master_config(mysql)
    if name == HANDED:
        return {**master_config(mysql), "master_job_cache": ENGINE}
    if name == SALTEXT:
        return {**plain, "master_job_cache": "mysql"}
    if name == EVENTS:
        return {**plain, "event_return": "mysql", "event_return_queue": 500}
    return plain


def _make_keys(folder: Path) -> None:
    """Once for all masters; making one takes a tenth of a second and more."""
    script = (
        "import sys, pathlib, salt.crypt\n"
        "make = getattr(salt.crypt, 'write_keys', None) or salt.crypt.gen_keys  # 3008; 3006 and 3007\n"
        "for number in range(int(sys.argv[2])):\n"
        "    at = pathlib.Path(sys.argv[1], f'minion-{number:03d}.example.com', 'pki')\n"
        "    at.mkdir(parents=True)\n"
        "    make(str(at), 'minion', 2048)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), str(_MINIONS)], check=True)


class _Site:
    """A master and its simulated minions."""

    def __init__(self, folder: Path, config: dict[str, Any], keys: Path) -> None:
        self._keys = folder.with_name(f"{folder.name}-minions")
        shutil.copytree(keys, self._keys)
        self._master = SaltMaster(folder, config)
        self._stack = contextlib.ExitStack()
        self._minions: Worker | None = None

    def __enter__(self) -> _Site:
        self._stack.enter_context(self._master)
        self._connect()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._minions is not None:
            self._minions.__exit__(None, None, None)
        self._stack.__exit__(*error)

    def _connect(self) -> None:
        self._minions = Worker("minions", str(self._master.config_dir), str(self._keys), str(_MINIONS)).__enter__()
        self._minions.ask("connect", timeout=120)

    def jobs(self, count: int, returns: int) -> dict[str, float]:
        """Microseconds of a publish, and of the MWorkers' CPU a return; jobs a second."""
        if self._minions is None:
            return {"publish": _PATIENCE * 1e6, "jobs": 1 / _PATIENCE, "answer": _PATIENCE * 1e6, "cpu": 0.0}
        workers = self._master.find_processes("MWorker")
        used = sum(map(cpu_seconds, workers))
        try:
            done = self._minions.ask("jobs", count=count, kind="ping", returns=returns, timeout=_PATIENCE * count)
        except (TimeoutError, RuntimeError):
            self._minions.__exit__(None, None, None)
            self._minions = None
            return self.jobs(count, returns)
        return {
            "publish": done["publish"] * 1e6,
            "answer": done["answer"] * 1e6,
            "jobs": count * returns / _MINIONS / done["seconds"],
            "cpu": (sum(map(cpu_seconds, workers)) - used) / (count * returns) * 1e6,
        }

    def recover(self) -> None:
        """After a state in which the minions gave up: new ones, and a master that has nothing to wait for."""
        if self._minions is None:
            self._master.stop()
            self._master.start()
            self._connect()
            self.jobs(1, _MINIONS)


def _measure(bench: Bench, sites: dict[str, _Site], state: str) -> Took:
    took: Took = {name: [] for name in sites}
    for _ in range(bench.rounds):
        for name, site in sites.items():
            waits = state != "healthy" and name == SALTEXT
            os.sync()  # what the one before left to be written is not this one's
            took[name].append(site.jobs(1 if waits else bench.size(5, 2), _FEW if waits else _MINIONS))
    return took


def _figures(state: str, took: Took) -> list[Figure]:
    titles = {
        "jobs": ("jobs of 50 minions a second", ""),
        "publish": ("publish", "µs"),
        "answer": ("answer to a return", "µs"),
        "cpu": ("MWorkers' CPU a return", "µs"),
    }
    figures = []
    for what, (title, unit) in titles.items():
        if what == "cpu" and state != "healthy":
            continue
        figures += [
            Figure(name=f"{state}: {title}, {name}", rounds=tuple(one[what] for one in rounds), unit=unit)
            for name, rounds in took.items()
        ]
    figures += [
        ratio(
            f"{state}: jobs a second, {name} / {LOCAL}",
            (one["jobs"] for one in took[name]),
            (one["jobs"] for one in took[LOCAL]),
            goal=0.95 if name in (BESIDE, HANDED) else None,
            more=True,
        )
        for name in (BESIDE, HANDED, SALTEXT, EVENTS)
    ]
    return figures
