"""What the runner's functions do. Needs nothing but the standard library until the database is asked."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import control
from .errors import EngineError, OperatorNeeded

__all__ = ["EngineError", "dead_letters", "flush", "reconcile", "reload", "retry", "status", "test_connection"]

_RELOAD_SECONDS = 60.0
_LOGIN_SECONDS = 5.0
_STATEMENT_SECONDS = 30.0
_POLL_SECONDS = 0.2
_BAR_CHARACTERS = 30
_ALL_SECONDS = 600.0
_MOST_OBJECTS = 1_000_000
"""A dead letter of more is shown as its bytes."""


def status(opts: Mapping[str, Any]) -> dict[str, Any]:
    """The running engine's status."""
    return dict(control.ask(opts, "status", timeout=30.0))


def flush(opts: Mapping[str, Any], timeout: Any) -> dict[str, Any]:
    """Waits up to ``timeout`` seconds until what is pending now is in MySQL or is a dead letter.

    Raises:
        EngineError: it is not, or ``timeout`` is no number of seconds.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 86_400:
        raise EngineError(f"timeout: {timeout!r} must be a number of seconds from 0 to 86,400")
    return dict(control.ask(opts, "flush", timeout=timeout, seconds=timeout))


def reload(opts: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the running engine compile its pillar; gives the settings in effect."""
    return dict(control.ask(opts, "reload", timeout=_RELOAD_SECONDS))


def reconcile(opts: Mapping[str, Any], since: Any, show: Callable[[str], None]) -> dict[str, Any]:
    """Has the engine compare the job cache with the database, and waits for it; ``show`` gets lines of progress.

    ``since``: ``2h`` ago, a UTC date, or a jid; ``None`` for all that the cache holds.

    Raises:
        EngineError: ``since`` is none of these, or the engine does not do it.
    """
    from .moments import parse as parse_since

    moment = None if since is None else parse_since(str(since), time.time())
    before = control.ask(opts, "reconcile", since=moment)["passes"]
    while True:
        time.sleep(_POLL_SECONDS)
        state = control.ask(opts, "reconcile_progress", timeout=30.0)
        if state["passes"] > before and "request" in state["last"]["reason"]:
            show("")
            return dict(state["last"])
        running = state["running"]
        if running:
            show(_progress_line(running))


def _progress_line(running: Mapping[str, Any]) -> str:
    if running["error"]:
        return f"waiting: {running['error']}"
    done, total = running["jobs"], max(1, running["total_jobs"])
    filled = round(_BAR_CHARACTERS * min(done, total) / total)
    added = running["loads_added"] + running["returns_added"]
    return f"[{'#' * filled:<{_BAR_CHARACTERS}}] {done:,} of {total:,} jobs, {added:,} rows missing"


def dead_letters(
    opts: Mapping[str, Any], *, show: Any, delete: Any, export: Any, limit: Any
) -> list[dict[str, Any]] | dict[str, Any]:
    """Lists the newest dead letters; or shows one whole, exports all as JSON lines into a file, or deletes.

    Raises:
        EngineError: an argument cannot be used, or there is no such letter.
    """
    if show is not None:
        found = control.ask(opts, "dead_letters", timeout=30.0, seq=_number("show", show))
        if not found:
            raise EngineError(f"there is no dead letter {show}")
        whole = _whole(opts, found[0])
        if whole is None:
            raise EngineError(f"there is no dead letter {show} any more")
        return whole
    if delete is not None:
        return dict(
            control.ask(opts, "delete_dead_letters", timeout=_ALL_SECONDS, seq=_number_or_all("delete", delete))
        )
    if export is not None:
        return _export(opts, Path(str(export)))
    count = _number("limit", limit)
    letters: list[dict[str, Any]] = []
    while len(letters) < count:
        before = letters[0]["seq"] if letters else None
        left = count - len(letters)
        page = control.ask(opts, "dead_letters", timeout=30.0, limit=left, newest=True, before=before)
        if not page:
            break
        letters = [*page, *letters]
    return letters


def _whole(opts: Mapping[str, Any], letter: Mapping[str, Any]) -> dict[str, Any] | None:
    """A dead letter with what it holds; ``None`` when it is gone. It is opened here, and not in the engine."""
    from . import saltevent

    body = b""
    while piece := base64.b64decode(
        control.ask(opts, "dead_letter", timeout=30.0, seq=letter["seq"], offset=len(body))
    ):
        body += piece
    if len(body) != letter["bytes"]:
        return None
    saltevent.limit_objects(_MOST_OBJECTS)
    return {**letter, **saltevent.describe(body)}


def _export(opts: Mapping[str, Any], path: Path) -> dict[str, Any]:
    count, last = 0, 0
    try:
        # A new file, for nobody else's eyes: returns hold secrets.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as exc:
        raise EngineError(f"export: {path} cannot be created: {exc.strerror}") from exc
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        while letters := control.ask(opts, "dead_letters", timeout=30.0, after=last):
            for letter in letters:
                if (whole := _whole(opts, letter)) is not None:
                    file.write(json.dumps(whole, ensure_ascii=False) + "\n")
                    count += 1
            last = letters[-1]["seq"]
    return {"exported": count, "path": str(path)}


def retry(opts: Mapping[str, Any], which: Any, trust: Any) -> dict[str, Any]:
    """Makes one dead letter, or all, pending again; with ``trust`` without the job cache's confirmation.

    Raises:
        EngineError: an argument cannot be used, or there is no such letter.
    """
    if not isinstance(trust, bool):
        raise EngineError(f"trust: {trust!r} must be True or False")
    seq = _number_or_all("the first argument", which)
    done = dict(control.ask(opts, "retry", timeout=_ALL_SECONDS, seq=seq, trust=trust))
    if seq is not None and not done["retried"]:
        raise EngineError(f"there is no dead letter {which}")
    return done


def _number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise EngineError(f"{name}: {value!r} must be a number")
    return int(value)


def _number_or_all(name: str, value: Any) -> int | None:
    if value == "all":
        return None
    if isinstance(value, bool) or not str(value).isdecimal():
        raise EngineError(f"{name}: {value!r} must be the seq of a dead letter, or all")
    return int(value)


def test_connection(opts: Mapping[str, Any]) -> dict[str, Any]:
    """Logs in from this process, without the engine; changes nothing.

    Raises:
        DatabaseError: nobody took us.
    """
    # In a thread: the caller may be inside an event loop of Salt's.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(_test_connection(opts))).result()


async def _test_connection(opts: Mapping[str, Any]) -> dict[str, Any]:
    from . import schema, survey
    from .database import Database
    from .settings import Connection

    began = time.perf_counter()
    session = await Database(
        lambda: Connection.from_opts(opts), connect_timeout=_LOGIN_SECONDS, statement_timeout=_STATEMENT_SECONDS
    ).open()
    try:
        login_seconds = time.perf_counter() - began
        try:
            await schema.ensure(session, create=False, events=False)
            tables = survey.report(await survey.survey(session), session.host)["is"]
        except OperatorNeeded as exc:
            tables = str(exc)
        return {
            "host": session.host,
            "version": session.server_version,
            "login_seconds": round(login_seconds, 3),
            "max_allowed_packet": session.max_packet,
            "tls": session.tls_cipher or None,
            "tables": tables,
        }
    finally:
        session.close()
