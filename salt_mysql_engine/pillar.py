"""What the engine asks of Salt itself: the master's own pillar, and secrets from sdb."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Mapping
from typing import Any

from .errors import SettingsError
from .settings import PILLAR_KEY


async def options(opts: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's options from the pillar of the master's own id; ``{}`` when there are none.

    Raises:
        SettingsError: the pillar does not compile, or the key holds no mapping.
    """
    return dict(await _in_daemon_thread(_compile, opts))


def _compile(opts: Mapping[str, Any]) -> dict[str, Any]:
    import salt.pillar

    # Pillar() writes into its opts, and get_pillar() would give 3008's cache instead of the compiler.
    compiler = salt.pillar.Pillar(copy.deepcopy(dict(opts)), {"id": opts["id"]}, opts["id"], "base")
    try:
        compiled = compiler.compile_pillar()
    except Exception as exc:
        raise SettingsError(f"the pillar of {opts['id']} does not compile: {type(exc).__name__}: {exc}") from exc
    finally:
        destroy = getattr(compiler, "destroy", None)
        if destroy is not None:
            destroy()
    if compiled.get("_errors"):
        raise SettingsError(f"the pillar of {opts['id']} does not compile: {'; '.join(map(str, compiled['_errors']))}")
    given = compiled.get(PILLAR_KEY) or {}
    if not isinstance(given, Mapping):
        raise SettingsError(f"the pillar key {PILLAR_KEY} of {opts['id']} must be a mapping, not {given!r}")
    return dict(given)


async def resolve_sdb(opts: Mapping[str, Any]) -> dict[str, Any]:
    """``opts`` with ``mysql.*`` values like ``sdb://vault/salt/pass`` looked up.

    Raises:
        SettingsError: one of them gives nothing.
    """
    return dict(await _in_daemon_thread(_resolve, opts))


def _resolve(opts: Mapping[str, Any]) -> dict[str, Any]:
    import salt.utils.sdb

    def resolved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("sdb://"):
            found = salt.utils.sdb.sdb_get(value, dict(opts))
            if found is None or found == value:
                raise SettingsError(f"{value} gave nothing; check the sdb profile in the master config")
            return found
        return value

    result = {key: resolved(value) if str(key).startswith("mysql.") else value for key, value in opts.items()}
    if isinstance(opts.get("mysql"), Mapping):
        result["mysql"] = {key: resolved(value) for key, value in opts["mysql"].items()}
    return result


async def _in_daemon_thread(function: Any, *args: Any) -> Any:
    """Runs ``function`` in a thread that does not keep the process alive.

    An executor's threads are waited for at exit, and an external pillar can hang for longer than the
    five seconds that Salt gives a stopping engine.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*args)
        except Exception as exc:  # noqa: BLE001 (it is raised again where it is awaited)
            error = exc
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
            return

    threading.Thread(target=work, name="mysql_jobcache pillar", daemon=True).start()
    return await future
