"""What a master's worker pays for the job cache: `salt.utils.job.store_job` per return (`event=None`), in jobs of 50
minions, and `prep_jid` with `save_load` for a publish. Salt's `local_cache`, saltext.mysql 1.1.0 and
`mysql_jobcache` as `master_job_cache`, each in its own process of Salt's, take turns, a job each, while the
database is healthy, 50 ms away, frozen (SIGSTOP) and down. What `local_cache` pays is mostly its two syncs to the
disk; the CPU alone is given for disks that are quicker. `mysql_jobcache` comes twice: with nobody beside, and with
an engine that ships meanwhile. Most of what it takes is Salt's own `store_job` and loader; what is ours of that is
given by itself.

A return that did not come within 10 s is given as 10 s; saltext.mysql has no time limit of its own.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.lab import ENGINE, Bench, login
from benchmarks.report import Figure, ratio
from benchmarks.worker import Worker
from tests.support.proxy import Proxy

LOCAL, OURS, SHIPPED, SALTEXT = "local_cache", ENGINE, f"{ENGINE}, engine beside", "saltext.mysql"
_FEW = 3
"""Returns in a job of a cache that waits for the network."""
_PATIENCE = 10.0

Took = dict[str, list[dict[str, float]]]


def run(bench: Bench) -> list[Figure]:
    """Measures the four states, one after the other."""
    bench.database("handoff")
    figures: list[Figure] = []
    with Proxy(bench.db.host, bench.db.port) as proxy:
        mysql = login(proxy, "handoff")
        for state, fault in states(bench, proxy):
            bench.say(f"handoff: the database is {state}")
            with _Caches(bench, state, mysql) as caches, fault():
                took = _measure(bench, caches, far=state != "healthy")
            figures += _figures(state, took)
        figures.append(_ours(bench, mysql))
    return figures


def _ours(bench: Bench, mysql: dict[str, Any]) -> Figure:
    with _Caches(bench, "ours", mysql) as caches:
        worker = caches.workers[OURS]
        took = [worker.ask("ours", returns=bench.size(20_000, 2_000))["cpu"] * 1e6 for _ in range(bench.rounds)]
    return Figure(name="CPU per return that is our own", rounds=tuple(took), unit="µs", goal=15.0)


def states(bench: Bench, proxy: Proxy) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What happens to the database, and how."""

    @contextlib.contextmanager
    def far() -> Iterator[None]:
        proxy.delay(0.05)
        yield
        proxy.heal()

    @contextlib.contextmanager
    def frozen() -> Iterator[None]:
        bench.db.freeze()
        yield
        bench.db.thaw()

    @contextlib.contextmanager
    def down() -> Iterator[None]:
        proxy.refuse()
        proxy.reset()
        yield
        proxy.heal()

    yield "healthy", contextlib.nullcontext
    yield "50 ms away", far
    yield "frozen", frozen
    yield "down", down


class _Caches:
    """A process for each cache, and the engine beside one; all warm when entered."""

    def __init__(self, bench: Bench, state: str, mysql: dict[str, Any]) -> None:
        self.workers: dict[str, Worker] = {}
        self._bench = bench
        self._folder = bench.folder / f"handoff-{state.replace(' ', '-')}"
        self._mysql = mysql
        self._stack = contextlib.ExitStack()
        self._beside: Worker | None = None

    def __enter__(self) -> _Caches:
        for name in (LOCAL, OURS, SHIPPED, SALTEXT):
            self.start(name)
        self._beside = self._stack.enter_context(Worker("ship"))
        journal = self._folder / SHIPPED.replace(", ", "-") / "cache" / ENGINE
        self._beside.ask("begin", journal=str(journal), mysql=self._mysql, options={})
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def start(self, name: str) -> None:
        """A process of its own, which has stored one job already."""
        root = self._folder / name.replace(", ", "-")
        opts = {
            **self._mysql,
            "id": "master",
            "root_dir": str(root),
            "cachedir": str(root / "cache"),
            "sock_dir": str(root / "run"),
            "master_job_cache": {LOCAL: "local_cache", SALTEXT: "mysql"}.get(name, ENGINE),
            "engines": [{ENGINE: {}}],
        }
        worker = self.workers[name] = self._stack.enter_context(Worker("storing", json.dumps(opts)))
        worker.ask("job", kind="ping", returns=_FEW)


def _measure(bench: Bench, caches: _Caches, *, far: bool) -> Took:
    took: Took = {name: [] for name in caches.workers}
    given_up: set[str] = set()
    for _ in range(bench.rounds):
        for name, worker in caches.workers.items():
            jobs, returns = (1, _FEW) if far and name == SALTEXT else (bench.size(8, 3), 50)
            if name in given_up:
                took[name].append(took[name][-1])
                continue
            try:
                done = [worker.ask("job", kind="ping", returns=returns, timeout=_PATIENCE) for _ in range(jobs)]
            except TimeoutError:
                given_up.add(name)
                took[name].append({"publish": _PATIENCE, "return": _PATIENCE, "cpu": 0.0, "slowest": _PATIENCE})
                continue
            took[name].append(
                {
                    "publish": statistics.mean(job["publish"] for job in done),
                    "return": sum(job["seconds"] for job in done) / (jobs * returns),
                    "cpu": sum(job["cpu"] for job in done) / (jobs * returns),
                    "slowest": max(job["slowest"] for job in done),
                }
            )
    return took


def _figures(state: str, took: Took) -> list[Figure]:
    figures = []
    titles = {"return": "store_job per return", "cpu": "CPU of store_job per return", "publish": "publish"}
    for what, title in titles.items():
        if what == "cpu" and state != "healthy":
            continue
        for name, rounds in took.items():
            figures.append(
                Figure(name=f"{state}: {title}, {name}", rounds=tuple(one[what] * 1e6 for one in rounds), unit="µs")
            )
        figures += [
            ratio(
                f"{state}: {title}, {name} / local_cache",
                (one[what] for one in took[name]),
                (one[what] for one in took[LOCAL]),
                goal=0.15 if what == "return" else None,
                guarded=what == "return" and name == OURS,
            )
            for name in (OURS, SHIPPED)
        ]
    figures.append(
        Figure(
            name=f"{state}: the slowest return of a round, {OURS}",
            rounds=tuple(one["slowest"] * 1e3 for one in took[OURS]),
            unit="ms",
        )
    )
    return figures
