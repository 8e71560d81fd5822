"""What the runner's functions on the tables do: from a process of their own, with a connection of their own.

Needs nothing but the standard library until the database is asked.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from . import control, settings
from .errors import ControlError, EngineError, SettingsError

if TYPE_CHECKING:
    from .database import Database

Result = TypeVar("Result")
Show = Callable[[str], None]

_LOGIN_SECONDS = 5.0
_STATEMENT_SECONDS = 300.0
_PATIENCE_SECONDS = 60.0
_LOCK_SECONDS = 5
"""A server may take as long to notice that one who held the lock was killed; and a master's round takes no longer."""
_SHOW_SECONDS = 0.1
_BAR_CHARACTERS = 30
_DAY = 86_400.0
_BUSY = (
    "a migration or a purge of this database runs now, here or on another master (an engine's hourly one may take a "
    "while the first time); try again when it is done"
)


def schema(opts: Mapping[str, Any]) -> dict[str, Any]:
    """What the database is, and what it lacks.

    Raises:
        EngineError: it cannot be looked at.
    """
    return _in_thread(_schema(opts))


def migrate(opts: Mapping[str, Any], dry_run: Any, show: Show) -> dict[str, Any]:
    """Brings the database to our tables; ``show`` gets lines of progress. ``dry_run``: says what that would do.

    Raises:
        EngineError: it cannot be done, and what to do about it.
    """
    dry = _flag("dry_run", dry_run)
    done = _in_thread(_migrate(opts, str(_setting(opts, "partitions")), dry, show))
    if not dry:
        with contextlib.suppress(ControlError):  # an engine that does not run looks at the tables when it starts
            control.ask(opts, "tables_changed")
    return done


def purge(opts: Mapping[str, Any], retention_days: Any, dry_run: Any, show: Show) -> dict[str, Any]:
    """Deletes, or archives, what is older than ``retention_days``; ``None``: than the setting of this name.

    Raises:
        EngineError: an argument cannot be used, or it cannot be done.
    """
    dry = _flag("dry_run", dry_run)
    days = _setting(opts, "retention_days") if retention_days is None else retention_days
    try:
        days = settings.OPTIONS["retention_days"].parse("retention_days", days)
    except SettingsError as exc:
        raise EngineError(str(exc)) from None
    if not days:
        raise EngineError(
            "retention_days is 0: everything stays for ever, and nothing was deleted; say how many days of jobs are "
            "to stay, as in retention_days=90"
        )
    if retention_days is None and not dry:
        _require_confirmed(opts)
    return _in_thread(_purge(opts, days, bool(_setting(opts, "archive")), dry, show))


async def _schema(opts: Mapping[str, Any]) -> dict[str, Any]:
    from . import survey

    kind = str(_setting(opts, "partitions"))
    session = await _database(opts).open()
    try:
        return survey.report(await survey.survey(session, kind), session.host)
    finally:
        session.close()


async def _migrate(opts: Mapping[str, Any], partitions: str, dry: bool, show: Show) -> dict[str, Any]:
    from . import migrate, survey
    from .purge import LOCK
    from .steady import Busy, Steady

    if dry:
        session = await _database(opts).open()
        try:
            seen = await survey.survey(session, partitions)
            return {"dry_run": True, "is": survey.report(seen, session.host)["is"], **migrate.plan(seen)}
        finally:
            session.close()
    bar = _Bar(show)
    try:
        async with Steady(_database(opts), LOCK, patience=_PATIENCE_SECONDS, lock_seconds=_LOCK_SECONDS) as steady:
            return await migrate.migrate(steady, partitions, bar.at)
    except Busy:
        raise EngineError(_BUSY) from None
    finally:
        show("")


async def _purge(opts: Mapping[str, Any], days: float, archive: bool, dry: bool, show: Show) -> dict[str, Any]:
    from . import purge
    from .moments import utc
    from .steady import Busy, Steady

    session = await _database(opts).open()
    try:
        before = await purge.earlier_clock(session) - days * _DAY
        said = {"before": utc(before).isoformat(timespec="seconds"), "archive": archive}
        expected = await purge.count(session, before)
    finally:
        session.close()
    if dry:
        return {"dry_run": True, **said, **expected}
    bar, gone = _Bar(show), dict.fromkeys(expected, 0)

    def report(done: purge.Done) -> None:
        gone[done.table] += done.rows
        bar.at(done.table, gone[done.table], expected[done.table])

    began = time.monotonic()
    try:
        steady = Steady(_database(opts), purge.LOCK, patience=_PATIENCE_SECONDS, lock_seconds=_LOCK_SECONDS)
        async with steady:
            done = await purge.purge(steady, before, archive=archive, report=report)
    except Busy:
        raise EngineError(_BUSY) from None
    finally:
        show("")
    return {**said, **done, "seconds": round(time.monotonic() - began, 1)}


def _database(opts: Mapping[str, Any]) -> Database:
    from .database import Database
    from .settings import Connection

    return Database(
        lambda: Connection.from_opts(opts), connect_timeout=_LOGIN_SECONDS, statement_timeout=_STATEMENT_SECONDS
    )


def _setting(opts: Mapping[str, Any], name: str) -> Any:
    """A setting of the running engine, which the pillar may have changed; else that of the master config.

    Raises:
        EngineError: the engine does not run, and the master config is wrong; or it runs with another one.
    """
    values, problems = settings.parse(settings.of_master(opts))
    try:
        running = control.ask(opts, "status")["settings"][name]
    except ControlError:
        wrong = [problem for problem in problems if problem.startswith(f"{name}:")]
        if wrong:
            raise EngineError(f"the master config: {wrong[0]}") from None
        return values.get(name, settings.OPTIONS[name].default)
    of_config = running.get("source") in (settings.Source.MASTER_CONFIG.value, settings.Source.DEFAULT.value)
    if of_config and name in values and running["value"] != values[name]:
        raise EngineError(
            f"{name} is {values[name]!r} in the master config, but {running['value']!r} for the running engine, which "
            "read it before; restart salt-master first"
        )
    return running["value"]


def _require_confirmed(opts: Mapping[str, Any]) -> None:
    """Nothing is deleted by a master config that the master's own pillar may overrule.

    Raises:
        EngineError: the engine does not run, or no pillar has confirmed its settings yet.
    """
    try:
        confirmed = control.ask(opts, "status")["pillar"]["confirmed"]
    except ControlError:
        confirmed = False
    if not confirmed:
        raise EngineError(
            "no running engine has its settings confirmed by the master's own pillar, so nobody knows how long jobs "
            "are to stay; say it, as in retention_days=90"
        )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise EngineError(f"{name}: {value!r} must be True or False")
    return value


def _in_thread(work: Coroutine[Any, Any, Result]) -> Result:
    # The caller may be inside an event loop of Salt's.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


class _Bar:
    """Lines of progress, a few in a second: how far, and how much longer."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._what = ""
        self._began = self._shown = 0.0

    def at(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows (0: nobody knows)."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._shown = what, now, 0.0
        if now < self._shown + _SHOW_SECONDS:
            return
        self._shown = now
        if not total:
            self._show(f"{what}: {done:,} rows")
            return
        share = min(1.0, done / total)
        filled = round(_BAR_CHARACTERS * share)
        left = round((now - self._began) * (1 - share) / share) if done else 0
        self._show(
            f"[{'#' * filled:<{_BAR_CHARACTERS}}] {what}: {100 * share:.0f} % of about {total:,} rows, "
            f"{left // 60}:{left % 60:02} left"
        )
