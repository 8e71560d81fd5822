"""The engine: wires the actors together, retunes them from the pillar, answers the runner, and stops in time.

Every task is made in :meth:`Engine.run`, has a name, and is ended there. One that dies takes the
engine down with its own error; Salt starts a new one within ten seconds. A database that is away and a
wrong setting never end the engine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import __version__, settings
from .batcher import Limits
from .bus import BusReader
from .capture import Capture
from .control import Control, socket_path
from .database import Database
from .errors import EngineError, SettingsError
from .journal import Journal
from .pillar import OwnPillar
from .records import Selection
from .settings import Connection
from .writer import Writer

log = logging.getLogger(__name__)

_STOP_SECONDS = 3.0
"""Salt kills an engine 5 s after SIGTERM (``wait_for_kill``, salt/master.py 3006-3008)."""


def start(opts: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Runs the engine in this process until SIGTERM or SIGINT.

    ``opts`` are the master's, ``options`` what stands under the engine in the master config.

    Raises:
        JournalError: the journal cannot be used.
    """
    # Salt's modules are never garbage: without this every full collection looks at all of them again.
    gc.freeze()
    asyncio.run(Engine(opts, options).run())


class Engine:
    """One engine of one master."""

    def __init__(self, opts: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._opts = dict(opts)
        self._config, self._config_problems = settings.parse(options)
        self._own_pillar = OwnPillar(self._opts)
        self._pillar: dict[str, Any] = {}
        self._pillar_problem = ""
        self._reloading = asyncio.Lock()
        self._retimed = asyncio.Event()
        self._settings = settings.combine(self._config, {})
        self._started_at = time.time()
        self._stop = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "mysql_jobcache journal")
        self._journal = Journal(Path(self._opts["cachedir"]) / "mysql_jobcache")
        self._database = Database(
            self._login,
            connect_timeout=self._settings.connect_timeout,
            statement_timeout=self._settings.statement_timeout,
        )
        selection = self._selection()
        self._writer = Writer(self._journal, self._in_journal, self._database, selection, _limits(self._settings))
        self._capture = Capture(self._journal, self._in_journal, selection, on_append=self._writer.announce)
        self._bus = BusReader(self._opts, on_event=self._capture.on_event, on_gap=lambda: None)
        self._apply(self._settings)

    async def run(self) -> None:
        """Until a signal asks to stop, or a task dies."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            # Salt sends SIGTERM two or three times; setting an event again does nothing new.
            loop.add_signal_handler(signum, self._stop.set)
        for problem in self._config_problems:
            log.error("mysql_jobcache in the master config: %s. Its default is used.", problem)
        await self._in_journal(self._journal.open)
        log.info(
            "mysql_jobcache %s: journal %s, %d events pending", __version__, self._journal.path, self._journal.pending
        )
        verbs = {"status": self.status, "flush": self.flush, "reload": self.reload}
        tasks = {
            name: asyncio.create_task(work, name=f"mysql_jobcache {name}")
            for name, work in {
                "bus": self._bus.run(),
                "capture": self._capture.run(),
                "writer": self._writer.run(),
                "control": Control(socket_path(self._opts), verbs).run(),
                "pillar": self._refresh(),
                "stop": self._stop.wait(),
            }.items()
        }
        done, _ = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        winding_down = asyncio.create_task(self._wind_down(tasks), name="mysql_jobcache stop")
        # Not wait_for(), which waits for what it cancels: a disk that hangs would hold us past Salt's SIGKILL.
        await asyncio.wait({winding_down}, timeout=_STOP_SECONDS)
        if not winding_down.done():
            log.error("mysql_jobcache did not stop within %g s; what is in the journal is safe", _STOP_SECONDS)
            os._exit(0)
        winding_down.result()
        for task in done:
            task.result()  # a task that died says why
        if self._stop.is_set() and threading.active_count() > 1:
            # A name look-up or an external pillar hangs in its thread. Nothing of ours is open any
            # more, and Salt's own handler leaves the same way.
            os._exit(0)

    async def _wind_down(self, tasks: Mapping[str, asyncio.Task[Any]]) -> None:
        """First no more events, then all of them on disk, then everything else ends."""
        await self._bus.finish()
        await _end(tasks["bus"])
        try:
            await self._capture.drain()
        finally:
            await _end(*tasks.values())
            await self._in_journal(self._journal.close)
            self._thread.shutdown(wait=False)
        log.info("mysql_jobcache stopped; %d events wait in the journal", self._journal.pending)

    async def status(self) -> dict[str, Any]:
        """Everything an operator asks: the books, lag, faults, server, settings."""
        books, oldest = await self._in_journal(lambda: (self._journal.books(), self._journal.oldest()))
        writer, bus = self._writer, self._bus
        lags = sorted(writer.lags)
        return {
            "engine": {
                "version": __version__,
                "pid": os.getpid(),
                "started": _moment(self._started_at),
                "uptime_seconds": round(time.time() - self._started_at, 1),
            },
            "books": books,
            "lag_seconds": 0.0 if oldest is None else round(max(0.0, time.time() - oldest), 3),
            "last_error": {"time": _moment(writer.fault.at), "message": writer.fault.message} if writer.fault else None,
            "bus": {
                "address": bus.address,
                "connected": bus.connected,
                "connects": bus.connects,
                "events_seen": bus.events_seen,
                "garbage": bus.garbage,
            },
            "journal": {
                "path": str(self._journal.path),
                "bytes": self._journal.size_on_disk,
                "events_in_memory": self._capture.held,
                "error": self._capture.last_error or None,
            },
            "database": {
                "host": writer.server_host or None,
                "version": writer.server_version or None,
                "failing": writer.failing,
                "retries": writer.retries,
                "conflicts": writer.conflicts,
                "batches": dict(writer.batches),
                "commit_lag_seconds": {
                    "p50": _percentile(lags, 0.50),
                    "p99": _percentile(lags, 0.99),
                    "events": len(lags),
                },
            },
            "settings": self._settings.report(),
            "settings_problems": [*self._config_problems, *filter(None, [self._pillar_problem])],
        }

    async def flush(self, seconds: float = 30.0) -> dict[str, Any]:
        """Waits until what was pending is in MySQL, ``seconds`` at most.

        Raises:
            EngineError: not all of it is, and why.
        """
        await self._capture.drain()
        pending = self._journal.pending
        try:
            await asyncio.wait_for(self._writer.flush(), seconds)
        except asyncio.TimeoutError:
            fault = self._writer.fault
            why = fault.message if self._writer.failing and fault else "the database is slow"
            raise EngineError(f"{self._journal.pending} events are still pending after {seconds:g} s: {why}") from None
        return {"flushed": pending, "pending": self._journal.pending}

    async def reload(self) -> dict[str, Any]:
        """Compiles the pillar now; gives the settings in effect.

        Raises:
            EngineError: the pillar is wrong; the last good settings stay.
        """
        await self._reload()
        if self._pillar_problem:
            raise EngineError(f"{self._pillar_problem}. The last good settings stay.")
        return self._settings.report()

    async def _in_journal(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _login(self) -> Connection:
        return Connection.from_opts(self._opts)

    async def _refresh(self) -> None:
        while True:
            self._retimed.clear()
            await self._reload()
            with contextlib.suppress(asyncio.TimeoutError):  # a new interval counts from now
                await asyncio.wait_for(self._retimed.wait(), self._settings.pillar_refresh_seconds)

    async def _reload(self) -> None:
        async with self._reloading:
            try:
                values, problems = settings.parse(await self._own_pillar.options())
            except SettingsError as exc:
                values, problems = {}, [str(exc)]
            problem = f"pillar {settings.PILLAR_KEY} of {self._opts['id']}: {'; '.join(problems)}" if problems else ""
            if problem and problem != self._pillar_problem:
                log.error("%s. The last good settings stay.", problem)
            self._pillar_problem = problem
            if not problem and values != self._pillar:
                self._pillar = values
                self._apply(settings.combine(self._config, values))

    def _apply(self, new: settings.Settings) -> None:
        """Puts settings into effect; the actors look at them from their next step on."""
        changed = [name for name in settings.OPTIONS if getattr(new, name) != getattr(self._settings, name)]
        self._settings = new
        self._database.connect_timeout = new.connect_timeout
        self._database.statement_timeout = new.statement_timeout
        self._capture.selection = self._writer.selection = self._selection()
        self._writer.batcher.limits = _limits(new)
        self._writer.create_tables = new.schema == "create"
        self._writer.store_events = bool(new.events)
        self._writer.tables_known = False
        self._writer.wake()
        if "pillar_refresh_seconds" in changed:
            self._retimed.set()
        if changed:
            log.info("New settings: %s", ", ".join(f"{name}={getattr(new, name)}" for name in changed))

    def _selection(self) -> Selection:
        peers = self._opts.get("cluster_peers") or [] if self._opts.get("cluster_id") else None
        return Selection(self._settings, master_id=self._opts["id"], peers=peers)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _limits(chosen: settings.Settings) -> Limits:
    return Limits(chosen.batch_size, chosen.batch_bytes, chosen.flush_interval)


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


def _percentile(ordered: list[float], share: float) -> float | None:
    return round(ordered[int(share * (len(ordered) - 1))], 3) if ordered else None
