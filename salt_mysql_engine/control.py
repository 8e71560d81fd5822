"""The control socket: how ``salt-run mysql_jobcache.<verb>`` reaches the running engine.

``<sock_dir>/mysql_jobcache.ipc``, mode 0600: only the master's user gets in. Never the event bus,
where any minion can put any tag. One request a connection: a line of JSON ``{"verb": ..., ...}``, and
a line of JSON back, ``{"result": ...}`` or ``{"error": "..."}``.

Arguments are checked once, here: what a verb's function gets is of the type and within the bounds that its
:class:`Verb` says. There is no ``NaN`` and no ``Infinity``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ControlError, EngineError

log = logging.getLogger(__name__)

_MAX_LINE_BYTES = 1024 * 1024
_MOST_CONNECTIONS = 64
_REQUEST_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
"""For so long an answer waits for who does not read it."""
_MARGIN_SECONDS = 5.0
_BIND_AGAIN_SECONDS = 10.0
_MOST_NAMED = 100
"""Characters of what was given that an answer says again."""


class Argument(NamedTuple):
    """What an argument of a verb must be. Of a text ``most`` is how many characters it may have."""

    kind: type[bool] | type[int] | type[float] | type[str]
    least: float = 0
    most: float = 2**63 - 1
    optional: bool = False
    """Whether it may be null."""

    def takes(self, value: Any) -> bool:
        """Whether ``value`` is one."""
        if value is None:
            return self.optional
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and self.least <= len(value) <= self.most
        return isinstance(value, int if self.kind is int else (int, float)) and self.least <= value <= self.most

    def __str__(self) -> str:
        """For people."""
        if self.kind is bool:
            what = "true or false"
        elif self.kind is str:
            what = f"a text of {self.least:,} to {self.most:,} characters"
        else:
            what = f"a {'whole ' * (self.kind is int)}number from {self.least:,} to {self.most:,}"
        return f"{what}, or null" if self.optional else what


class Verb(NamedTuple):
    """What answers a verb, and the arguments that it takes, all of which may be left out."""

    function: Callable[..., Awaitable[Any]]
    arguments: Mapping[str, Argument] = {}

    def check(self, given: Mapping[str, Any]) -> None:
        """Lets good arguments pass.

        Raises:
            ControlError: naming the first that is not, and what it must be.
        """
        for name, value in given.items():
            if name not in self.arguments:
                known = ", ".join(self.arguments) or "none"
                raise ControlError(f"no such argument: {name[:_MOST_NAMED]!r}; known are: {known}")
            if not self.arguments[name].takes(value):
                raise ControlError(f"{name}: {str(value)[:_MOST_NAMED]!r} must be {self.arguments[name]}")


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
        """Serves until cancelled. A place that cannot be listened on is tried again."""
        sock = await self._bound()
        inode = self._path.stat().st_ino
        server = await asyncio.start_unix_server(self._serve, sock=sock, limit=_MAX_LINE_BYTES)
        try:
            await asyncio.Event().wait()
        finally:
            # Not wait_closed(): since Python 3.12 that waits for every connection, and a flush can take minutes.
            server.close()
            for task in self._serving:
                task.cancel()
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == inode:  # not another's, who found ours gone
                    self._path.unlink()

    async def _bound(self) -> socket.socket:
        said = ""
        while True:
            try:
                return self._bind()
            except OSError as exc:
                if str(exc) != said:
                    said = str(exc)
                    log.error("Nobody can ask the engine: %s cannot be listened on: %s. Trying on", self._path, exc)
            await asyncio.sleep(_BIND_AGAIN_SECONDS)

    def _bind(self) -> socket.socket:
        if self._is_answered():
            raise OSError("the engine of another master answers there; give each master a sock_dir of its own")
        self._path.unlink(missing_ok=True)  # of an engine that was killed
        sock = socket.socket(socket.AF_UNIX)
        umask = os.umask(0o177)  # the socket must never exist with a wider mode, however briefly
        try:
            sock.bind(str(self._path))
        except BaseException:
            sock.close()
            raise
        finally:
            os.umask(umask)
        return sock

    def _is_answered(self) -> bool:
        """Whether somebody listens there: the journal's lock says that it is no other engine of this master."""
        try:
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                return False
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                sock.connect(str(self._path))
        except BlockingIOError:  # its queue is full
            return True
        except OSError:
            return False
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._serving) >= _MOST_CONNECTIONS:
            writer.close()
            return
        self._serving.add(task)
        try:
            line = await asyncio.wait_for(reader.readline(), _REQUEST_SECONDS)
            answer = await self._answer(line)
            writer.transport.set_write_buffer_limits(0)
            writer.write(json.dumps(answer).encode() + b"\n")
            del answer
            await asyncio.wait_for(writer.drain(), _ANSWER_SECONDS)
        except (OSError, ValueError, asyncio.TimeoutError) as exc:  # ValueError: a line without an end
            log.debug("A control connection ended early: %r", exc)
        except asyncio.CancelledError:  # the engine stops; asyncio would report a cancelled handler as a fault
            return
        finally:
            self._serving.discard(task)
            # What was not read within its time is nobody's any more.
            (writer.transport.abort if writer.transport.get_write_buffer_size() else writer.close)()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line, parse_constant=_no_number)
            verb = self._verbs[request.pop("verb")]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {"error": f"no such request; known are {', '.join(self._verbs)}"}
        try:
            verb.check(request)
            return {"result": await verb.function(**request)}
        except EngineError as exc:
            return {"error": str(exc)}
        except Exception as exc:  # a fault of one verb must not end the connection, nor the engine
            log.exception("The control verb failed")
            return {"error": f"{type(exc).__name__}: {exc}; the master's log has more"}


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def ask(
    opts: Mapping[str, Any], verb: str, *, timeout: float = 5.0, margin: float = _MARGIN_SECONDS, **arguments: Any
) -> Any:
    """The runner's end: asks the engine, and waits ``timeout`` seconds and a margin.

    Raises:
        ControlError: the engine is not running, did not answer in time, or says no.
    """
    path = socket_path(opts)
    request = json.dumps({"verb": verb, **arguments}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout + margin)
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
