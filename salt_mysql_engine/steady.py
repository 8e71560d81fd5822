"""A connection for long work: opened again when it was lost, its transactions tried again, alone under a lock's name.

The lock is the server's own (``GET_LOCK``): it is gone with the connection, so a process that is killed leaves nothing
behind. Galera knows it on each node for itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar

from .database import Database, Session
from .errors import DatabaseError, EngineError, ServerUnavailable
from .sql import quote

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_LOCK_WAIT_SECONDS = 1
"""How long a change of a table may keep everybody else waiting, while it waits for those that use it now."""
_CHANGE_SECONDS = 86_400.0
_ROW_LOCK_SECONDS = 5
_REOPEN_SECONDS = 30
"""A server may take as long to notice that the connection before this one, which holds the lock, is gone."""
_BACKOFF_FIRST, _BACKOFF_MAX = 0.1, 5.0  # seconds
_DONE_ALREADY = {
    "ALTER": {
        1060,  # ER_DUP_FIELDNAME
        1061,  # ER_DUP_KEYNAME
        1091,  # ER_CANT_DROP_FIELD_OR_KEY
        1505,  # ER_PARTITION_MGMT_ON_NONPARTITIONED
        1507,  # ER_DROP_PARTITION_NON_EXISTENT
        1517,  # ER_SAME_NAME_PARTITION
    },
    "CREATE": {1050},  # ER_TABLE_EXISTS_ERROR
    "DROP": {1051, 4092},  # ER_BAD_TABLE_ERROR, ER_UNKNOWN_VIEW (MariaDB)
    "RENAME": {1050, 1146},  # ER_NO_SUCH_TABLE
}
"""What a server says of a change that it is asked for once more, having made it: by the statement's first word."""


class Busy(EngineError):
    """Somebody else does this work now."""


def number_of(exc: BaseException) -> int:
    """The server's error number, 0 for what is not the server's word."""
    cause = exc.__cause__
    number = cause.args[0] if cause is not None and cause.args else 0
    return number if isinstance(number, int) else 0


class Steady:
    """Opened with ``async with``. ``patience``: seconds of failing in a row, after which the error is let out."""

    def __init__(self, database: Database, lock: str, *, patience: float, lock_seconds: int = 0) -> None:
        self.patience = patience
        self._database = database
        self._lock = lock
        self._lock_seconds = lock_seconds
        self._session: Session | None = None

    async def __aenter__(self) -> Steady:
        """Opens the connection.

        Raises:
            Busy: somebody else holds the lock.
            DatabaseError: no host took us.
        """
        await self._ready()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    async def transaction(self, work: Callable[[Session], Awaitable[Result]]) -> Result:
        """Does ``work`` and commits, again after a deadlock, a lost connection, or a server that went away.

        Raises:
            DatabaseError: what trying again does not mend, or did not within ``patience``.
        """
        delay, deadline = _BACKOFF_FIRST, time.monotonic() + self.patience
        while True:
            try:
                session = await self._ready()
                result = await work(session)
                await session.commit()
            except ServerUnavailable as exc:
                if time.monotonic() > deadline:
                    raise
                log.debug("Trying again: %s", exc)
            except DatabaseError:
                if self._session is not None and self._session.usable:
                    await self._session.rollback()
                raise
            else:
                return result
            await asyncio.sleep(delay)
            delay = min(2 * delay, _BACKOFF_MAX)

    async def run(self, statement: str) -> int:
        """A transaction of one statement; gives the rows affected."""
        return await self.transaction(lambda session: session.execute(statement))

    async def change(self, statement: str) -> None:
        """A change of a table, however long it takes. It waits a second at most for those that use the table now, who
        would make everybody after it wait too, and is tried again. What a try did whose answer was lost, or after whose
        answer the connection was, the next one finds done."""
        tries = 0

        async def work(session: Session) -> None:
            nonlocal tries
            tries += 1
            usual, session.statement_timeout = session.statement_timeout, _CHANGE_SECONDS
            try:
                await session.execute(statement)
            finally:
                session.statement_timeout = usual

        try:
            await self.transaction(work)
        except DatabaseError as exc:
            if tries == 1 or number_of(exc) not in _DONE_ALREADY[statement.split()[0]]:
                raise

    async def rows(self, statement: str) -> list[tuple[Any, ...]]:
        """A transaction of one query."""
        return await self.transaction(lambda session: session.query(statement))

    async def _ready(self) -> Session:
        if self._session is not None and self._session.usable:
            return self._session
        wait = _REOPEN_SECONDS if self._session is not None else self._lock_seconds
        session = await self._database.open()
        try:
            database = await session.database()
            name = f"{self._lock} {hashlib.sha256(database.encode()).hexdigest()[:16]}"  # 64 characters at most
            ((taken,),) = await session.query(f"SELECT GET_LOCK({quote(name)}, {wait})")
            if not taken:
                raise Busy  # noqa: TRY301 (the session is closed below)
            await session.execute(
                # Strict as everywhere, but rows of somebody else may hold a date of zeros, and are copied as they are.
                "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', "
                # What takes long here is asked for by a person, and a change of a table cannot be made in halves.
                "/*M!100101 SESSION max_statement_time = 0, */ "
                f"SESSION lock_wait_timeout = {_LOCK_WAIT_SECONDS}, "
                f"SESSION innodb_lock_wait_timeout = {_ROW_LOCK_SECONDS}"
            )
            await session.commit()
        except BaseException:
            session.close()
            raise
        self._session = session
        return session
