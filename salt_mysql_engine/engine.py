"""The engine: wires the actors together, retunes them from the pillar, answers the runner, and stops in time.

Every task is made in :meth:`Engine.run`, has a name, and is ended there. Nothing but a signal ends the engine: a task
that meets what nobody expects says so with its traceback, is counted in ``status``, and begins again after a pause.

What to write is said by the master's own pillar. The last one that compiled is remembered in the journal, and is in
effect from the start on. Where none is, events are captured and wait until a pillar was compiled, for a bounded time.
Nothing is purged until the pillar was compiled in this run.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import concurrent.futures
import functools
import gc
import json
import logging
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from . import __version__, folders, moments, saltevent, settings, spool
from .batcher import Limits
from .bus import BusReader
from .capture import Capture, InJournal
from .clock import Clock
from .control import Argument, Control, Verb, socket_path
from .database import Database
from .decoder import Decoder
from .errors import EngineError, JournalError, SettingsError
from .intake import Intake, Taken
from .jobcache import JobCache
from .journal import Caps, Journal
from .large import LargeEvents, Setup, setup_of
from .letters import DeadLetter
from .pillar import OwnPillar
from .reconcile import Reconciler
from .records import Selection
from .retention import Retention
from .settings import Connection
from .telling import Teller
from .verify import Verifier
from .waits import is_set_within
from .writer import Writer

log = logging.getLogger(__name__)

_TEND_SECONDS, _TEND_STEP_SECONDS = 10.0, 0.2
_OPEN_AGAIN_SECONDS = 5.0
PILLAR_SECONDS = 60.0
"""How long events wait at a first start for a pillar that says what to write."""
_PAUSE_FIRST, _PAUSE_MAX = 1.0, 60.0  # seconds
_PILLAR_NOTE = "pillar"
_DAY = 86_400.0  # seconds
_MOST_LETTERS = 1_000_000
"""As many as dead_letters_max allows."""
_PAGE_LETTERS, _PIECE_BYTES, _ERROR_CHARACTERS = 200, 512 * 1024, 2000
"""What one answer holds of dead letters."""
_TAKE_SECONDS, _SELDOM_SECONDS = 0.1, 10.0
"""How often the spool is looked at: with a hand-off, and without one, for what an earlier one left."""
_STOP_SECONDS = 3.0
"""Salt kills an engine 5 s after SIGTERM (``wait_for_kill``, salt/master.py 3006-3008)."""
_CANCEL_AGAIN_SECONDS = 1.2  # the writer settles its last batch within 1


def start(opts: Mapping[str, Any], options: Any) -> None:
    """Runs the engine in this process until SIGTERM or SIGINT.

    ``opts`` are the master's, ``options`` what stands under the engine in the master config.
    """
    spare_collector()
    asyncio.run(Engine(opts, options).run())


def spare_collector() -> None:
    """Leaves Python's garbage collector little to do: rows make no circles, and Salt's modules are never garbage."""
    gc.freeze()  # what is there by now is not looked at again
    gc.set_threshold(20_000, 20, 20)


class Engine:
    """One engine of one master."""

    def __init__(self, opts: Mapping[str, Any], options: Any) -> None:
        self._opts, self._opts_problems = settings.usable_opts(opts)
        self._config, problems = settings.parse(options)
        self._config_problems = problems[: settings.MOST_PROBLEMS]
        self._own_pillar = OwnPillar(self._opts)
        self._pillar: dict[str, Any] = {}
        self._pillar_problem = ""
        self._remembered: dict[str, Any] | None = None
        """What the journal holds of the last good pillar."""
        self._known = asyncio.Event()
        """Set once it is known what to write."""
        self._confirmed = False
        """Whether the pillar was compiled in this run."""
        self._reloading = asyncio.Lock()
        self._retimed = asyncio.Event()
        self._settings = settings.combine(self._config, {})
        self._started_at, self._started = time.time(), time.monotonic()
        self._clock = Clock()
        self._faults: collections.Counter[str] = collections.Counter()
        self._stop = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "mysql_jobcache journal")
        self._cache_thread = concurrent.futures.ThreadPoolExecutor(1, "mysql_jobcache job cache")
        self._events_handed_off = settings.PILLAR_KEY in self._opts["event_return"]
        folder = folders.of_journal(str(self._opts["cachedir"]))
        self._journal = Journal(folder)
        self._intake = Intake(self._journal, folder)
        self._database = Database(
            self._login,
            connect_timeout=self._settings.connect_timeout,
            statement_timeout=self._settings.statement_timeout,
        )
        selection = self._selection(self._settings)
        self._cache = JobCache(self._opts) if JobCache.is_kept(self._opts) else None
        self._large = LargeEvents(
            self._journal,
            self._in_journal,
            Decoder(self._setup()),
            on_made=lambda events, size: self._large_writer.announce(events, size),
            on_settled=lambda: self._writer.wake(),
        )
        self._verifier = Verifier(
            self._journal,
            self._in_journal,
            self._cache,
            self._in_cache,
            selection,
            on_confirmed=lambda events, size: self._writer.announce(events, size),
            large=self._large,
        )
        self._writer = Writer(
            self._journal,
            self._in_journal,
            self._verifier,
            self._database,
            selection,
            _limits(self._settings),
            self._large,
        )
        self._large_writer = Writer(
            self._journal,
            self._in_journal,
            self._large,
            self._database,
            selection,
            _limits(self._settings),
            self._large,
            beside=self._writer,
        )
        self._writers = (self._writer, self._large_writer)
        self._capture = Capture(
            self._journal,
            self._in_journal,
            selection,
            on_append=self._writer.announce,
            on_loss=lambda: self._ask_reconcile("events that were dropped", 0.0),
        )
        self._handed_off = spool.is_used(self._opts)
        self._capture.handed_off = self._handed_off
        self._teller = Teller(
            self._journal, self._in_journal, self._intake, self._take, self._writer, handed_off=self._handed_off
        )
        self._reconciler = (
            Reconciler(
                self._journal,
                self._in_journal,
                self._cache,
                self._in_cache,
                self._writer.query,
                selection,
                keep_seconds=self._opts["keep_jobs_seconds"],
                on_append=self._writer.announce,
            )
            if self._cache
            else None
        )
        self._retention = Retention(self._database, self._clock)
        self._bus = BusReader(
            self._opts,
            on_events=self._capture.on_events,
            on_gap=self._reconciler.ask_after_gap if self._reconciler else lambda: None,
        )
        self._apply(self._settings, selection)

    async def run(self) -> None:
        """Until a signal asks to stop."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            # Salt sends SIGTERM two or three times; setting an event again does nothing new.
            loop.add_signal_handler(signum, self._stop.set)
        for problem in (*self._opts_problems, *self._config_problems):
            log.error("mysql_jobcache in the master config: %s. Its default is used.", problem)
        if not await self._open_journal():
            return
        await self._remember()
        log.info(
            "mysql_jobcache %s: journal %s, %d events pending", __version__, self._journal.path, self._journal.pending
        )
        seq = Argument(int, optional=True)
        verbs = {
            "status": Verb(self.status),
            "flush": Verb(self.flush, {"seconds": Argument(float, most=_DAY)}),
            "reload": Verb(self.reload),
            "reconcile": Verb(self.reconcile, {"since": Argument(float, most=moments.END_OF_TIME, optional=True)}),
            "reconcile_progress": Verb(self.reconcile_progress),
            "dead_letters": Verb(
                self.dead_letters,
                {
                    "after": Argument(int),
                    "before": seq,
                    "seq": seq,
                    "limit": Argument(int, most=_MOST_LETTERS),
                    "newest": Argument(bool),
                },
            ),
            "dead_letter": Verb(self.dead_letter, {"seq": Argument(int), "offset": Argument(int)}),
            "delete_dead_letters": Verb(self.delete_dead_letters, {"seq": seq}),
            "retry": Verb(self.retry, {"seq": seq, "trust": Argument(bool)}),
            "tables_changed": Verb(self.tables_changed),
            **self._teller.verbs(),
        }
        works: dict[str, Callable[[], Awaitable[Any]]] = {
            "bus": self._bus.run,
            "capture": self._capture.run,
            "writer": lambda: self._once_known(self._writer.run),
            "verifier": lambda: self._once_known(self._verifier.run),
            "large events": lambda: self._once_known(self._large.run),
            "writer of large events": lambda: self._once_known(self._large_writer.run),
            "retention": self._retention.run,
            "tend": self._tend,
            "intake": self._take_handed_over,
            "control": Control(socket_path(self._opts), verbs).run,
            "pillar": self._refresh,
            "patience": self._be_patient,
        }
        if (reconciler := self._reconciler) is not None:
            works["reconcile"] = lambda: self._once_known(reconciler.run)
        tasks = {
            name: asyncio.create_task(self._kept(name, work), name=f"mysql_jobcache {name}")
            for name, work in works.items()
        }
        await self._stop.wait()
        winding_down = asyncio.create_task(self._wind_down(tasks), name="mysql_jobcache stop")
        # Not wait_for(), which waits for what it cancels: a disk that hangs would hold us past Salt's SIGKILL.
        await asyncio.wait({winding_down}, timeout=_STOP_SECONDS)
        if not winding_down.done():
            log.error("mysql_jobcache did not stop within %g s; what is in the journal is safe", _STOP_SECONDS)
            os._exit(0)
        winding_down.result()
        if threading.active_count() > 1:
            # A name look-up or an external pillar hangs in its thread. Nothing of ours is open any
            # more, and Salt's own handler leaves the same way.
            os._exit(0)

    async def _open_journal(self) -> bool:
        """Opens the journal, as often as it takes; whether it is open before a signal asks to stop."""
        said = ""
        while not self._stop.is_set():
            try:
                await self._in_journal(self._journal.open)
            except Exception as exc:  # noqa: BLE001 (it is said, and tried again; nothing of it goes into Salt)
                if str(exc) != said:
                    expected = isinstance(exc, JournalError)
                    log.error("%s. The engine waits, and tries again", exc, exc_info=None if expected else exc)
                said = str(exc)
                await is_set_within(self._stop, _OPEN_AGAIN_SECONDS)
            else:
                return True
        return False

    async def _kept(self, name: str, work: Callable[[], Awaitable[Any]]) -> None:
        """Does ``work`` until it is cancelled. After an exception it begins again; those are for it to expect."""
        pause = _PAUSE_FIRST
        while True:
            began = time.monotonic()
            try:
                await work()
                log.error("The %s of mysql_jobcache ended by itself; it begins again", name)
            except Exception:  # whatever it is
                log.exception("The %s of mysql_jobcache met what nobody expects; it begins again", name)
            self._faults[name] += 1
            if time.monotonic() - began > _PAUSE_MAX:
                pause = _PAUSE_FIRST
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_MAX)

    async def _once_known(self, work: Callable[[], Awaitable[Any]]) -> None:
        await self._known.wait()
        await work()

    async def _be_patient(self) -> None:
        """What waits for a pillar does not wait for ever."""
        if not await is_set_within(self._known, PILLAR_SECONDS):
            log.warning(
                "The pillar of %s was not compiled within %g s, and none is remembered: rows are written by the master "
                "config alone. Nothing is purged until the pillar compiles.",
                self._opts["id"],
                PILLAR_SECONDS,
            )
            self._known.set()
        await asyncio.Event().wait()

    async def _remember(self) -> None:
        """Puts the options of the last good pillar into effect."""
        try:
            note = await self._in_journal(self._journal.note, _PILLAR_NOTE)
            given = json.loads(note) if note is not None else None
        except (sqlite3.Error, ValueError, RecursionError) as exc:
            log.error("What the journal remembers of the pillar cannot be read: %s", exc)
            return
        if not isinstance(given, dict):
            return
        values, _ = settings.parse(given)  # another version may have written it
        new = settings.combine(self._config, values)
        self._pillar = self._remembered = values
        self._apply(new, self._selection(new))
        self._known.set()

    async def _wind_down(self, tasks: Mapping[str, asyncio.Task[Any]]) -> None:
        """First no more events, then all of them on disk, then everything else ends."""
        await self._bus.finish()
        await _end(tasks["bus"])
        try:
            await self._capture.drain()
        except Exception as exc:  # noqa: BLE001 (a full disk, say)
            what = "events could not be put into the journal"
            log.error("%d %s: %s. Reconcile brings back what the job cache has", self._capture.held, what, exc)
        finally:
            await _end(*tasks.values())
            await self._in_journal(self._intake.close)
            await self._in_journal(self._journal.close)
            self._cache_thread.shutdown(wait=False)
            self._thread.shutdown(wait=False)
        log.info("mysql_jobcache stopped; %d events wait in the journal", self._journal.pending)

    async def status(self) -> dict[str, Any]:
        """Everything an operator asks: the books, lag, faults, server, settings."""
        deferred = self._verifier.deferred
        faults = sum(each.faults for each in self._writers)
        books, oldest = await self._in_journal(lambda: (self._journal.books(), self._journal.oldest(deferred)))
        writer, bus = self._writer, self._bus
        lags = sorted(writer.lags)
        return {
            "engine": {
                "version": __version__,
                "pid": os.getpid(),
                "started": moments.text(self._started_at),
                "uptime_seconds": round(time.monotonic() - self._started, 1),
                "faults": {**self._faults, **({"rows": faults} if faults else {})},
            },
            "books": {**books, "waiting": self._verifier.waiting},
            "lag_seconds": 0.0 if oldest is None else round(max(0.0, time.time() - oldest), 3),
            "last_error": {"time": moments.text(writer.fault.at), "message": writer.fault.message}
            if writer.fault
            else None,
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
                "used_bytes": self._journal.used_bytes,
                "full": self._journal.full,
                "salvaged": self._journal.salvaged or None,
                "events_in_memory": self._capture.held,
                "error": self._capture.last_error or None,
            },
            "database": {
                "host": writer.server_host or None,
                "version": writer.server_version or None,
                "failing": writer.failing,
                "retries": writer.retries,
                "conflicts": sum(each.conflicts for each in self._writers),
                "batches": dict(writer.batches),
                "commit_lag_seconds": {
                    "p50": _percentile(lags, 0.50),
                    "p99": _percentile(lags, 0.99),
                    "events": len(lags),
                },
            },
            "spool": {
                "waiting_bytes": await self._in_journal(lambda: self._intake.waiting_bytes),
                "error": self._intake.error or None,
            },
            "returns": {
                "from": "the master's processes" if self._handed_off else "the bus",
                "verified": self._verifier.enabled,
                "waiting": self._verifier.waiting,
                "corrected": self._verifier.corrected,
            },
            "reconcile": self._reconcile_status(),
            "retention": self._retention_status(),
            "pillar": {
                "confirmed": self._confirmed,
                "remembered": self._remembered is not None,
                "waited_for": not self._known.is_set(),
            },
            "settings": self._settings.report(),
            "settings_problems": [
                *self._opts_problems,
                *self._config_problems,
                *filter(None, [self._pillar_problem, self._verify_problem]),
            ],
        }

    async def flush(self, seconds: float = 30.0) -> dict[str, Any]:
        """Waits until what was pending is in MySQL or is a dead letter, ``seconds`` at most.

        Raises:
            EngineError: not all of it is, and why.
        """
        await self._capture.drain()
        await self._take(self._intake.drain)
        pending = self._journal.pending
        try:
            await asyncio.wait_for(self._writer.flush(), seconds)
        except asyncio.TimeoutError:
            fault = self._writer.fault
            why = "the database is slow"
            if not self._known.is_set():
                what = self._pillar_problem or "it is being compiled"
                why = f"they wait for the pillar of {self._opts['id']}; {what}"
            elif self._writer.failing and fault:
                why = fault.message
            elif self._verifier.waiting:
                why = self._verifier.trouble or f"{self._verifier.waiting} of them wait for the master's job cache"
            raise EngineError(f"{self._journal.pending} events are still pending after {seconds:g} s: {why}") from None
        return {"flushed": pending, "pending": self._journal.pending}

    async def reload(self) -> dict[str, Any]:
        """Compiles the pillar now; gives the settings in effect.

        Raises:
            EngineError: the pillar is wrong; the last good settings stay.
        """
        await self._reload(anew=True)
        if self._pillar_problem:
            raise EngineError(f"{self._pillar_problem}. The last good settings stay.")
        return self._settings.report()

    async def reconcile(self, since: float | None = None) -> dict[str, Any]:
        """Begins a pass over the job cache, all of it or from ``since`` on (seconds since the epoch).

        Raises:
            EngineError: the master keeps no local job cache.
        """
        if self._reconciler is None:
            raise EngineError(
                "this master keeps no local job cache to compare with (master_job_cache: local_cache, job_cache: true, "
                "no ext_job_cache)"
            )
        self._reconciler.ask("request", since or 0.0)
        return {"passes": self._reconciler.passes}

    async def reconcile_progress(self) -> dict[str, Any]:
        """The pass that runs now, and the last one."""
        return self._reconcile_status() or {}

    def _reconcile_status(self) -> dict[str, Any] | None:
        if self._reconciler is None:
            return None
        now, last = self._reconciler.now, self._reconciler.last
        return {
            "passes": self._reconciler.passes,
            "running": now.report() if now else None,
            "last": last.report() if last else None,
        }

    def _retention_status(self) -> dict[str, Any]:
        last = self._retention.last
        return {
            "last_purge": {**last, "at": moments.text(last["at"])} if last else None,
            "rows_of_others_filled_in": self._retention.filled,
            "error": self._retention.error or None,
        }

    def _ask_reconcile(self, reason: str, since: float | None = None) -> None:
        if self._reconciler is not None:
            self._reconciler.ask(reason, since)

    async def dead_letters(self, limit: int = 100, **which: Any) -> list[dict[str, Any]]:
        """A page of dead letters in the order of their ``seq``, with tag and function, without the rest of them.

        ``which``: ``after``, ``before``, ``seq`` and ``newest`` of :meth:`Journal.dead_letters`.
        """
        letters: list[DeadLetter] = await self._in_journal(
            lambda: self._journal.dead_letters(limit=min(limit, _PAGE_LETTERS), whole=False, **which)
        )
        page: list[dict[str, Any]] = []
        for letter in letters:
            # One by one: for the ends of a large one the database reads all of it, and others want the journal, too.
            tag, fun = saltevent.told(*await self._in_journal(self._journal.ends_of_dead_letter, letter.seq))
            page.append(
                {
                    "seq": letter.seq,
                    "captured_at": moments.text(letter.captured_at),
                    "failed_at": moments.text(letter.failed_at),
                    "jid": letter.jid,
                    "minion": letter.minion,
                    "fun": fun,
                    "tag": tag,
                    "bytes": letter.size,
                    "reason": letter.reason,
                    "error": letter.error[:_ERROR_CHARACTERS],
                }
            )
        return page

    async def dead_letter(self, seq: int = 0, offset: int = 0) -> str:
        """Some of what a dead letter holds, from ``offset`` on, in base64; nothing when that was all."""
        piece = await self._in_journal(self._journal.piece_of_dead_letter, seq, offset, _PIECE_BYTES)
        return base64.b64encode(piece).decode()

    async def delete_dead_letters(self, seq: int | None = None) -> dict[str, int]:
        """Drops one dead letter, or all."""
        return {"deleted": await by_portions(self._in_journal, self._journal, self._journal.delete_dead_letters, seq)}

    async def retry(self, seq: int | None = None, trust: bool = False) -> dict[str, int]:
        """Makes one dead letter, or all, pending again."""
        retry = functools.partial(self._journal.retry_dead_letters, trusted=trust)
        again = await by_portions(
            self._in_journal, self._journal, retry, seq, done=lambda again: self._writer.announce(again, 0)
        )
        return {"retried": again}

    async def tables_changed(self) -> dict[str, Any]:
        """Someone brought the tables to another shape: they are looked at before the next batch."""
        for writer in self._writers:
            writer.tables_known = False
            writer.wake()
        return {}

    async def _tend(self) -> None:
        """Keeps the journal small, and sees to it that what a corrupt one lost comes back."""
        salvaged = ""
        while True:
            await asyncio.sleep(_TEND_SECONDS)
            await self._in_journal(spool.forget_old, self._opts, self._clock.now())
            more = True
            while more:
                try:
                    more = await self._in_journal(self._journal.tend, self._clock.now())
                except sqlite3.Error as exc:
                    log.debug("The journal cannot be tended now: %s", exc)
                    more = False
                await asyncio.sleep(_TEND_STEP_SECONDS)
            if self._journal.salvaged != salvaged:
                salvaged = self._journal.salvaged
                self._ask_reconcile("a corrupt journal", 0.0)

    async def _take_handed_over(self) -> None:
        """Takes what the master's other processes hand over into the journal."""
        seconds = _TAKE_SECONDS if self._handed_off or self._events_handed_off else _SELDOM_SECONDS
        while True:
            more = False
            try:
                more = (await self._take(self._intake.step)).more
            except (sqlite3.Error, OSError, JournalError) as exc:
                log.debug("What was handed over cannot be taken now: %s", exc)
            await asyncio.sleep(0 if more else seconds)

    async def _take(self, how: Callable[[], Taken]) -> Taken:
        taken: Taken = await self._in_journal(how)
        if taken.events:
            self._writer.announce(taken.events, taken.size)
        return taken

    async def _in_cache(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._cache_thread, function, *args)

    async def _in_journal(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _login(self) -> Connection:
        return Connection.from_opts(self._opts)

    async def _refresh(self) -> None:
        while True:
            self._retimed.clear()
            await self._reload()
            await is_set_within(self._retimed, self._settings.pillar_refresh_seconds)  # a new interval counts from now

    async def _reload(self, *, anew: bool = False) -> None:
        async with self._reloading:
            new = selection = None
            try:
                values, problems = settings.parse(await self._own_pillar.options(anew=anew))
                if not problems:
                    new = settings.combine(self._config, values)
                    selection = self._selection(new)
            except SettingsError as exc:
                problems = [str(exc)]
            problem = (
                f"pillar {settings.PILLAR_KEY} of {self._opts['id']}: {'; '.join(problems[: settings.MOST_PROBLEMS])}"
                if problems
                else ""
            )
            if problem and problem != self._pillar_problem:
                log.error("%s. The last good settings stay.", problem)
            self._pillar_problem = problem
            if new is None or selection is None:
                return
            is_first, self._confirmed = not self._confirmed, True
            if is_first or values != self._pillar:
                self._pillar = values
                self._apply(new, selection)
            self._known.set()
            if values != self._remembered:
                try:
                    await self._in_journal(self._journal.set_note, _PILLAR_NOTE, json.dumps(values))
                except sqlite3.Error as exc:  # the next time then
                    log.debug("The pillar cannot be remembered now: %s", exc)
                else:
                    self._remembered = values

    def _apply(self, new: settings.Settings, selection: Selection) -> None:
        """Puts settings into effect; the actors look at them from their next step on."""
        changed = [name for name in settings.OPTIONS if getattr(new, name) != getattr(self._settings, name)]
        self._settings = new
        self._database.connect_timeout = new.connect_timeout
        self._database.statement_timeout = new.statement_timeout
        self._capture.selection = self._verifier.selection = selection
        self._journal.caps = Caps(
            new.journal_max_bytes,
            # To give up what is old is a purge, too.
            new.journal_max_age_hours * 3600 if self._confirmed or self._remembered is not None else 0.0,
            new.journal_full == "drop_oldest",
            new.dead_letters_max,
        )
        self._verifier.enabled = self._cache is not None and new.verify_returns is not False
        self._verifier.wait_seconds = new.verify_wait_seconds
        self._large.apply(self._setup())
        self._capture.max_event_bytes = new.max_event_bytes
        self._verify_problem = ""
        if new.verify_returns is True and self._cache is None:
            self._verify_problem = (
                "verify_returns: true needs the master's local job cache (master_job_cache: local_cache, job_cache: "
                "true, no ext_job_cache); returns are stored without verification"
            )
            log.error("%s", self._verify_problem)
        if self._reconciler is not None:
            self._reconciler.selection = selection
            self._reconciler.verifies = self._verifier.enabled
            self._reconciler.retention_days = new.retention_days
            self._reconciler.retime(new.reconcile_interval_seconds)
        self._retention.days, self._retention.archive = new.retention_days, new.archive
        self._retention.partitions, self._retention.confirmed = new.partitions, self._confirmed
        if {"retention_days", "archive", "partitions"}.intersection(changed):
            self._retention.retime()
        for writer in self._writers:
            writer.selection = selection
            writer.batcher.limits = _limits(new)
            writer.create_tables = new.schema == "create"
            writer.store_events = bool(new.events) or self._events_handed_off
            writer.partitions = new.partitions
            writer.tables_known = False
            writer.wake()
        if "pillar_refresh_seconds" in changed:
            self._retimed.set()
        if changed:
            log.info("New settings: %s", ", ".join(f"{name}={getattr(new, name)}" for name in changed))

    def _selection(self, chosen: settings.Settings) -> Selection:
        return Selection(chosen, master_id=self._opts["id"], peers=settings.peers(self._opts))

    def _setup(self) -> Setup:
        return setup_of(self._opts, self._settings, peers=settings.peers(self._opts), has_cache=self._cache is not None)


async def by_portions(
    in_journal: InJournal,
    journal: Journal,
    work: Callable[..., int],
    seq: int | None,
    *,
    done: Callable[[int], None] = lambda _: None,
) -> int:
    """Does something with one dead letter or all that there are now, a portion at a time; gives how many."""
    through = await in_journal(journal.newest_dead_letter)
    total = 0
    began = time.monotonic()
    while some := await in_journal(lambda: work(seq, through=through)):
        total += some
        done(some)
        if seq is not None:
            break
        await asyncio.sleep(time.monotonic() - began)  # half of the journal's time is everybody else's
        began = time.monotonic()
    return total


async def _end(*tasks: asyncio.Task[Any]) -> None:
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        # Again, because the wait_for() around a statement may swallow one (waits.py).
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


def _limits(chosen: settings.Settings) -> Limits:
    return Limits(chosen.batch_size, chosen.batch_bytes, chosen.flush_interval)


def _percentile(ordered: list[float], share: float) -> float | None:
    return round(ordered[int(share * (len(ordered) - 1))], 3) if ordered else None
