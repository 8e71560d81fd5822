"""Reading from the database: one connection a process, kept between questions, given up quickly when nobody is there.

Synchronous, through PyMySQL (aiomysql's own base), since Salt calls returners and runners from ordinary functions. A
server that does not answer costs the connect timeout once, for each host; then everything fails at once for half a
minute. A connection that the server closed while it was idle is replaced, and the statement sent again: nothing is
ever written here. A fork never uses its parent's connection.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pymysql
from pymysql.constants import CLIENT

from . import sessions, settings, tls
from .errors import DatabaseError, ServerUnavailable, SettingsError

_READ_SECONDS = 30.0
_PING_AFTER_SECONDS = 1.0
_PAUSE_SECONDS = 30.0
"""How long a server that did not answer is left alone."""

_MORE_SETTINGS = f"SET SESSION group_concat_max_len = {4 << 20}"

Row = tuple[Any, ...]

if TYPE_CHECKING:
    _DriverConnection = pymysql.connections.Connection[Any]
else:
    _DriverConnection = pymysql.connections.Connection


class _Connection(_DriverConnection):
    """PyMySQL's connection, that never says a password in the clear, nor anything where TLS was asked for."""

    _read_timeout: float | None
    _auth_plugin_name: str
    server_capabilities: int
    tls_asked_for = False

    def wait_at_most(self, seconds: float) -> None:
        """Sets the time that the server has for its next answers."""
        self._read_timeout = seconds

    def _get_server_information(self) -> None:
        super()._get_server_information()  # type: ignore[misc] # typeshed lists only what has a page
        if self.tls_asked_for and not self.server_capabilities & CLIENT.SSL:
            raise SettingsError(
                "mysql.ssl_* is set but the server offers no TLS; enable it there, or remove mysql.ssl_*"
            )
        self._refuse_clear(self._auth_plugin_name)

    def _process_auth(self, plugin_name: bytes, *rest: Any) -> Any:
        self._refuse_clear(plugin_name.decode(errors="replace"))
        return super()._process_auth(plugin_name, *rest)  # type: ignore[misc] # as above

    def _refuse_clear(self, plugin: str) -> None:
        if plugin in ("mysql_clear_password", "mysql_old_password") and not self.tls_asked_for:
            raise SettingsError(f"the server asks for the password in the clear ({plugin}); set mysql.ssl_ca")


class Pool:
    """The connection of this process to one database. May be used from several threads; get it from :func:`of`.

    Every method raises :class:`DatabaseError` when the server is away or refuses the statement, and
    :class:`SettingsError` for a connection that cannot be tried.
    """

    def __init__(self, to: settings.Connection, connect_seconds: float) -> None:
        self._to = to
        self._connect_seconds = connect_seconds
        self._lock = threading.Lock()
        self._idle: _Connection | None = None
        self._idle_since = 0.0
        self._closed_until = 0.0
        self._problem: tuple[type[DatabaseError], str] = ServerUnavailable, ""

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        """The rows of a statement. ``values`` stand for its ``%s``; a list becomes one in brackets."""
        connection = self._take_idle()
        if connection is not None:
            try:
                return self._ask(connection, statement, values)
            except (pymysql.MySQLError, OSError) as exc:
                if connection.open or _is_timeout(exc):
                    raise self._failed(exc, connection) from exc
        connection = self._open()
        try:
            return self._ask(connection, statement, values)
        except (pymysql.MySQLError, OSError) as exc:
            raise self._failed(exc, connection) from exc

    def _ask(self, connection: _Connection, statement: str, values: Sequence[Any]) -> list[Row]:
        with connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            rows = list(cursor.fetchall())
        self._put_back(connection)
        return rows

    def _take_idle(self) -> _Connection | None:
        with self._lock:
            connection, self._idle = self._idle, None
            idle_seconds = time.monotonic() - self._idle_since
        if connection is None or idle_seconds < _PING_AFTER_SECONDS:
            return connection
        try:
            connection.wait_at_most(self._connect_seconds)
            connection.ping(reconnect=False)
            connection.wait_at_most(_READ_SECONDS)
        except (pymysql.MySQLError, OSError) as exc:
            if _is_timeout(exc):
                raise self._failed(exc, connection) from exc
            return None
        return connection

    def _put_back(self, connection: _Connection) -> None:
        if not connection.open:
            return
        with self._lock:
            if self._idle is None:
                self._idle, self._idle_since = connection, time.monotonic()
                return
        connection.close()

    def _failed(self, exc: Exception, connection: _Connection) -> DatabaseError:
        """The error to raise. A connection on which the server refused a statement is as good as before."""
        error = self._translated(exc, connection)
        if connection.open:
            self._put_back(connection)
        else:
            self._leave_alone(error)
        return error

    def _leave_alone(self, error: DatabaseError) -> None:
        # Not the error itself: its traceback would keep all of its callers' objects until the process ends.
        self._problem = type(error), str(error)
        self._closed_until = time.monotonic() + _PAUSE_SECONDS

    def _open(self) -> _Connection:
        if time.monotonic() < self._closed_until:
            kind, message = self._problem
            raise kind(message)
        problems: list[DatabaseError] = []
        to = self._to
        context = tls.context(to)
        for host in to.hosts[:1] if to.unix_socket else to.hosts:
            connection = _Connection(
                host=host,
                port=to.port,
                unix_socket=to.unix_socket,
                user=to.user,
                password=to.password.encode().decode("latin-1"),  # as in database.py
                database=to.db,
                charset="utf8mb4",
                autocommit=True,
                connect_timeout=self._connect_seconds,
                read_timeout=self._connect_seconds,
                write_timeout=_READ_SECONDS,
                ssl=context,
                program_name="salt_mysql_engine",
                defer_connect=True,
            )
            connection.tls_asked_for = context is not None
            try:
                connection.connect()
                with connection.cursor() as cursor:
                    for statement in (*sessions.statements(autocommit=True), _MORE_SETTINGS):
                        cursor.execute(statement)
                    cursor.execute(sessions.QUESTION)
                    sessions.check(cursor.fetchall(), self._name(connection), autocommit=True)
            except SettingsError:
                raise
            except DatabaseError as exc:
                connection.close()
                problems.append(exc)
                continue
            except Exception as exc:  # noqa: BLE001 (a server that speaks something else makes the driver raise anything)
                problems.append(self._translated(exc, connection))
                continue
            connection.wait_at_most(_READ_SECONDS)
            return connection
        error = type(problems[0])("; ".join(dict.fromkeys(map(str, problems))))
        self._leave_alone(error)
        raise error

    def _translated(self, exc: Exception, connection: _Connection) -> DatabaseError:
        from .database import translate  # knows all the numbers, and is needed when something is wrong alone

        return translate(exc, self._name(connection))

    def _name(self, connection: _Connection) -> str:
        return self._to.unix_socket or f"{connection.host}:{self._to.port}"


_pools: dict[tuple[int, settings.Connection, float], Pool] = {}


def of(opts: Mapping[str, Any]) -> Pool:
    """This process's pool for the database that ``mysql.*`` in ``opts`` names.

    Raises:
        SettingsError: it names none.
    """
    options, _ = settings.parse(settings.of_master(opts))
    seconds = float(options.get("connect_timeout", settings.OPTIONS["connect_timeout"].default))
    # By process: what a fork inherits stays where it is, unused; closing it would end the parent's session.
    key = (os.getpid(), settings.Connection.from_opts(opts), seconds)
    pool = _pools.get(key)
    return pool or _pools.setdefault(key, Pool(key[1], seconds))


def _is_timeout(exc: BaseException) -> bool:
    return isinstance(exc, TimeoutError) or isinstance(exc.__context__, TimeoutError)
