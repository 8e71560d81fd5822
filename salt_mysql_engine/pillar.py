"""The master's own pillar, compiled for the engine's options. The only module that asks Salt for something."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Mapping
from typing import Any

from .errors import SettingsError
from .settings import PILLAR_KEY

COMPILE_SECONDS = 120.0
_MOST_SAID = 2000
"""Characters of somebody else's words that an error says again."""


class OwnPillar:
    """The pillar of the master's own id. Its grains are worked out once: they take longer than the pillar.

    So does making a compiler, some ten times: it is kept while it works, and reads the files anew each time.
    """

    def __init__(self, opts: Mapping[str, Any]) -> None:
        self._opts = dict(opts)
        self._grains: dict[str, Any] | None = None
        self._compiler: Any = None
        self._compiling: asyncio.Task[Any] | None = None

    async def options(self, *, anew: bool = False) -> dict[str, Any]:
        """The engine's options; ``{}`` when the pillar has none. ``anew``: by a new compiler, with new modules.

        Raises:
            SettingsError: the pillar does not compile, not within two minutes, or the key holds no mapping.
        """
        if self._compiling is None:
            self._compiling = asyncio.ensure_future(_in_daemon_thread(lambda: self._compile(anew=anew)))
        await asyncio.wait({self._compiling}, timeout=COMPILE_SECONDS)
        if not self._compiling.done():  # one at a time: an external pillar that hangs gets no second thread to hang in
            raise SettingsError(f"the pillar of {self._opts['id']} is still being compiled after {COMPILE_SECONDS:g} s")
        compiling, self._compiling = self._compiling, None
        return dict(compiling.result())

    def _compile(self, *, anew: bool) -> dict[str, Any]:
        master = self._opts["id"]
        try:
            if anew:
                self._forget()
            compiled = self._compiled(master)
            errors = compiled.get("_errors")
            given = compiled.get(PILLAR_KEY)
        except (Exception, SystemExit) as exc:  # any renderer and any external pillar can raise anything
            self._forget()
            raise SettingsError(
                f"the pillar of {master} does not compile: {type(exc).__name__}: {str(exc)[:_MOST_SAID]}"
            ) from exc
        if errors:
            self._forget()
            said = "; ".join(map(str, errors)) if isinstance(errors, (list, tuple)) else str(errors)
            raise SettingsError(f"the pillar of {master} does not compile: {said[:_MOST_SAID]}")
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise SettingsError(
                f"the pillar key {PILLAR_KEY} of {master} must be a mapping, not {repr(given)[:_MOST_SAID]}"
            )
        return dict(given)

    def _compiled(self, master: str) -> dict[str, Any]:
        import salt.loader
        import salt.pillar

        if self._grains is None:
            self._grains = {**salt.loader.grains(copy.deepcopy(self._opts)), "id": master}
        if self._compiler is None:
            # Pillar() writes into its opts, and get_pillar() would give 3008's cache instead of the compiler.
            self._compiler = salt.pillar.Pillar(copy.deepcopy(self._opts), copy.deepcopy(self._grains), master, "base")
        return dict(self._compiler.compile_pillar())

    def _forget(self) -> None:
        compiler, self._compiler = self._compiler, None
        destroy = getattr(compiler, "destroy", None)
        if destroy is not None:
            destroy()


async def _in_daemon_thread(function: Any) -> Any:
    """Runs ``function`` in a thread that does not keep the process alive.

    An executor's threads are waited for at exit, and an external pillar can hang for longer than the
    five seconds that Salt gives a stopping engine.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as exc:  # noqa: BLE001 (it is raised again where it is awaited)
            error = exc
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
            return

    threading.Thread(target=work, name="mysql_jobcache pillar", daemon=True).start()
    return await future
