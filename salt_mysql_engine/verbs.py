"""What the runner's functions do. Needs nothing but the standard library until the database is asked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Mapping
from typing import Any

from . import control
from .errors import EngineError, OperatorNeeded

__all__ = ["EngineError", "flush", "reload", "status", "test_connection"]

_RELOAD_SECONDS = 60.0
_LOGIN_SECONDS = 5.0
_STATEMENT_SECONDS = 30.0


def status(opts: Mapping[str, Any]) -> dict[str, Any]:
    """The running engine's status."""
    return dict(control.ask(opts, "status", timeout=30.0))


def flush(opts: Mapping[str, Any], timeout: Any) -> dict[str, Any]:
    """Waits up to ``timeout`` seconds until what is pending now is in MySQL.

    Raises:
        EngineError: it is not, or ``timeout`` is no number of seconds.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 86_400:
        raise EngineError(f"timeout: {timeout!r} must be a number of seconds from 0 to 86,400")
    return dict(control.ask(opts, "flush", timeout=timeout, seconds=timeout))


def reload(opts: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the running engine compile its pillar; gives the settings in effect."""
    return dict(control.ask(opts, "reload", timeout=_RELOAD_SECONDS))


def test_connection(opts: Mapping[str, Any]) -> dict[str, Any]:
    """Logs in from this process, without the engine; changes nothing.

    Raises:
        DatabaseError: nobody took us.
    """
    # In a thread: the caller may be inside an event loop of Salt's.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(_test_connection(opts))).result()


async def _test_connection(opts: Mapping[str, Any]) -> dict[str, Any]:
    from . import schema
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
            tables = "as they should be"
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
