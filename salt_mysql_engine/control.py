"""The control socket: how ``salt-run mysql_jobcache.<verb>`` reaches the running engine.

``<sock_dir>/mysql_jobcache.ipc``, mode 0600: only the master's user gets in. Never the event bus,
where any minion can put any tag. One request a connection: a line of JSON ``{"verb": ..., ...}``, and
a line of JSON back, ``{"result": ...}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import ControlError, EngineError

log = logging.getLogger(__name__)

Verb = Callable[..., Awaitable[Any]]

_MAX_LINE_BYTES = 16 * 1024 * 1024
_REQUEST_SECONDS = 5.0
_MARGIN_SECONDS = 5.0


def socket_path(opts: Mapping[str, Any]) -> Path:
    """Where the engine of this master listens."""
    return Path(opts["sock_dir"]) / "mysql_jobcache.ipc"


class Control:
    """The engine's end: answers each verb with what its function returns."""

    def __init__(self, path: Path, verbs: Mapping[str, Verb]) -> None:
        self._path = path
        self._verbs = verbs
        self._serving: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Serves until cancelled."""
        server = await asyncio.start_unix_server(self._serve, sock=self._bind(), limit=_MAX_LINE_BYTES)
        try:
            await asyncio.Event().wait()
        finally:
            # Not wait_closed(): since Python 3.12 that waits for every connection, and a flush can take minutes.
            server.close()
            for task in self._serving:
                task.cancel()
            self._path.unlink(missing_ok=True)

    def _bind(self) -> socket.socket:
        self._path.unlink(missing_ok=True)  # of an engine that was killed; the journal's lock says we are alone
        sock = socket.socket(socket.AF_UNIX)
        umask = os.umask(0o177)  # the socket must never exist with a wider mode, however briefly
        try:
            sock.bind(str(self._path))
        finally:
            os.umask(umask)
        return sock

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            line = await asyncio.wait_for(reader.readline(), _REQUEST_SECONDS)
            writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
            await writer.drain()
        except (OSError, ValueError, asyncio.TimeoutError) as exc:  # ValueError: a line without an end
            log.debug("A control connection ended early: %r", exc)
        except asyncio.CancelledError:  # the engine stops; asyncio would report a cancelled handler as a fault
            return
        finally:
            self._serving.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            verb = self._verbs[request.pop("verb")]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {"error": f"no such request; known are {', '.join(self._verbs)}"}
        try:
            return {"result": await verb(**request)}
        except (EngineError, TypeError) as exc:
            return {"error": str(exc)}
        except Exception as exc:
            log.exception("The control verb failed")
            return {"error": f"{type(exc).__name__}: {exc}; the master's log has more"}


def ask(opts: Mapping[str, Any], verb: str, *, timeout: float = 5.0, **arguments: Any) -> Any:
    """The runner's end: asks the engine, and waits ``timeout`` seconds and a margin.

    Raises:
        ControlError: the engine is not running, did not answer in time, or says no.
    """
    path = socket_path(opts)
    request = json.dumps({"verb": verb, **arguments}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout + _MARGIN_SECONDS)
            sock.connect(str(path))
            sock.sendall(request)
            with sock.makefile("rb") as stream:
                answer = json.loads(stream.readline())
    except (FileNotFoundError, ConnectionRefusedError):
        raise ControlError(
            f"the engine is not running: nothing listens on {path}. Is `mysql_jobcache` under `engines:` in the "
            "master config, and was salt-master restarted since? Its log says why an engine did not start."
        ) from None
    except PermissionError:
        raise ControlError(f"not allowed to use {path}; run this as the master's user") from None
    except (OSError, ValueError) as exc:
        raise ControlError(f"the engine did not answer on {path}: {exc}") from exc
    if "error" in answer:
        raise ControlError(answer["error"])
    return answer["result"]
