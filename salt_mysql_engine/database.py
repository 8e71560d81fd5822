"""The only module that knows aiomysql: connecting, session settings, timeouts, and what errors mean.

A :class:`Session` is one logged-in connection whose settings are known (``sessions.py``). Every failure comes out as a
:class:`~salt_mysql_engine.errors.DatabaseError` with a verdict. A session that failed in any way but a
refused row is closed; the next one starts from nothing.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiomysql
import pymysql
from pymysql.constants import CLIENT, CR, ER, SERVER_STATUS

from . import sessions, tls
from .errors import (
    AnswerTimeout,
    ConnectionLost,
    DatabaseError,
    OperatorNeeded,
    RowsRejected,
    RowTooLarge,
    ServerUnavailable,
    SettingsError,
    TooManySessions,
    TooMuch,
    TransactionAborted,
    UnknownRefusal,
)
from .settings import Connection
from .waits import within

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_ROW_ERRORS = frozenset(
    {
        ER.DATA_TOO_LONG,  # 1406
        ER.TRUNCATED_WRONG_VALUE_FOR_FIELD,  # 1366: invalid text for the column's charset
        ER.WARN_DATA_OUT_OF_RANGE,  # 1264
        ER.WARN_DATA_TRUNCATED,  # 1265
        ER.TRUNCATED_WRONG_VALUE,  # 1292
        ER.BAD_NULL_ERROR,  # 1048
        ER.DUP_ENTRY,  # 1062: on a unique key that is not ours
        ER.INVALID_CHARACTER_STRING,  # 1300
        ER.NET_PACKET_TOO_LARGE,  # 1153
        ER.TOO_BIG_ROWSIZE,  # 1118
        ER.NO_REFERENCED_ROW_2,  # 1452
        # What a generated column or an index over an expression makes of a value:
        1365,  # ER_DIVISION_BY_ZERO
        1690,  # ER_DATA_OUT_OF_RANGE
        3141,  # ER_INVALID_JSON_TEXT_IN_PARAM (MySQL)
        3156,  # ER_INVALID_JSON_VALUE_FOR_CAST (MySQL)
        3157,  # ER_JSON_DOCUMENT_TOO_DEEP (MySQL)
        3751,  # ER_DATA_TRUNCATED_FUNCTIONAL_INDEX (MySQL)
        3752,  # ER_DATA_OUT_OF_RANGE_FUNCTIONAL_INDEX (MySQL)
        3903,  # ER_INVALID_JSON_VALUE_FOR_FUNC_INDEX (MySQL)
        3904,  # ER_JSON_VALUE_OUT_OF_RANGE_FOR_FUNC_INDEX (MySQL)
        1644,  # ER_SIGNAL_EXCEPTION: a trigger of the user's refuses the row
        3140,  # ER_INVALID_JSON_TEXT (MySQL)
        3819,  # ER_CHECK_CONSTRAINT_VIOLATED (MySQL)
        3988,  # ER_CANNOT_CONVERT_STRING (MySQL)
        4025,  # ER_CONSTRAINT_FAILED (MariaDB; a JSON column's JSON_VALID too)
    }
)
"""The server is well and some row is not. Names: MySQL 8.0 and MariaDB 10.11 error references."""

_GRANT = "grant the user SELECT, INSERT, UPDATE (and CREATE with schema: create) on the database"
_OUR_TABLES = frozenset({"jids", "salt_returns", "salt_events", "mysql_jobcache_schema"})
_REMEDIES = {
    ER.ACCESS_DENIED_ERROR: "check mysql.user and mysql.pass in the master config, and whether the account "
    "is for this address, or demands TLS",
    ER.DBACCESS_DENIED_ERROR: _GRANT,
    ER.BAD_DB_ERROR: "create the database, or correct mysql.db in the master config",
    ER.TABLEACCESS_DENIED_ERROR: _GRANT,
    ER.COLUMNACCESS_DENIED_ERROR: "grant the user SELECT, INSERT, UPDATE on the tables",
    ER.SPECIFIC_ACCESS_DENIED_ERROR: "grant the user the privilege named",
    ER.NO_SUCH_TABLE: "use schema: create, or create the tables from the package's schema folder",
    1184: "the server's init_connect fails for the user; correct it there",  # ER_NEW_ABORTING_CONNECTION
    1356: "drop the view, or make what it names",  # ER_VIEW_INVALID
    1449: "a trigger or a view was defined by a user that is gone; drop it, or make it again",  # ER_NO_SUCH_USER
    # ER_INDEX_COLUMN_TOO_LONG, ER_TOO_LONG_KEY
    1709: "keys of 3,072 bytes need InnoDB's row format DYNAMIC and pages of 16 KiB: innodb_large_prefix and "
    "innodb_file_format=Barracuda on servers that still have them",
    1071: "keys of 3,072 bytes need InnoDB with pages of 16 KiB (innodb_page_size)",
    3159: "the server takes encrypted connections alone; set mysql.ssl_ca",  # ER_SECURE_TRANSPORT_REQUIRED
    ER.BAD_FIELD_ERROR: "the table is not of the documented shape; compare it with the package's schema folder",
    ER.NO_DEFAULT_FOR_FIELD: "give the added column a default, so that rows without it can be inserted",
    ER.HOST_NOT_PRIVILEGED: "allow the master's address for the user in the database server",
    ER.HOST_IS_BLOCKED: "run FLUSH HOSTS on the database server",
    1862: "set a new password for the user",  # ER_MUST_CHANGE_PASSWORD_LOGIN
    1820: "set a new password for the user",  # ER_MUST_CHANGE_PASSWORD
    1665: "set the server's binlog_format to MIXED or ROW",  # ER_BINLOG_STMT_MODE_AND_ROW_ENGINE
    1698: "the user logs in by unix_socket or another plugin; give it a password",  # ER_ACCESS_DENIED_NO_PASSWORD
    2059: "give the user a login plugin that aiomysql knows: mysql_native_password or caching_sha2_password",
    3118: "unlock the user's account",  # ER_ACCOUNT_HAS_BEEN_LOCKED
    4151: "unlock the user's account",  # ER_ACCOUNT_HAS_BEEN_LOCKED (MariaDB)
}
"""A person must act; what to do, by error number."""

_LIMITS = {
    1197: "raise max_binlog_cache_size",  # ER_TRANS_CACHE_FULL
    1206: "raise innodb_buffer_pool_size",  # ER_LOCK_TABLE_FULL
    1969: "raise max_statement_time for the user",  # ER_STATEMENT_TIMEOUT (MariaDB)
    3024: "raise max_execution_time",  # ER_QUERY_TIMEOUT (MySQL)
}
"""The server is well, and what was sent is over a limit of its; what to do when a single row is."""

_ABORTED = frozenset(
    {
        ER.LOCK_WAIT_TIMEOUT,  # 1205
        ER.LOCK_DEADLOCK,  # 1213
        ER.QUERY_INTERRUPTED,  # 1317
        3101,  # ER_TRANSACTION_ROLLBACK_DURING_COMMIT (Group Replication)
        1020,  # ER_CHECKREAD: changed since the last read (MariaDB's innodb_snapshot_isolation)
        1412,  # ER_TABLE_DEF_CHANGED
        1615,  # ER_NEED_REPREPARE
        8002,
        8005,
        8022,
        8028,
        9007,  # TiDB: write conflicts, and tables that were changed meanwhile
    }
)
_LOST = frozenset(
    {
        CR.CR_SERVER_GONE_ERROR,  # 2006
        CR.CR_SERVER_LOST,  # 2013
        1927,  # ER_CONNECTION_KILLED (MariaDB)
        4031,  # ER_CLIENT_INTERACTION_TIMEOUT (MySQL)
    }
)
_TOO_MANY_SESSIONS = frozenset({ER.TOO_MANY_USER_CONNECTIONS, ER.USER_LIMIT_REACHED})  # 1203, 1226

_MISSING_TABLE = re.compile(r"[Tt]able '([^']+)' doesn't exist")

_DENIED = re.compile(r"([A-Z][A-Z, ]*) command denied")
"""How a server names the privilege that is missing."""

_BUSY = frozenset(
    {
        ER.CON_COUNT_ERROR,  # 1040
        ER.SERVER_SHUTDOWN,  # 1053
        ER.UNKNOWN_COM_ERROR,  # 1047: a Galera node that is not ready (WSREP)
        ER.OPTION_PREVENTS_STATEMENT,  # 1290: --read-only
        ER.DISK_FULL,  # 1021
        ER.RECORD_FILE_FULL,  # 1114
        1026,  # ER_ERROR_ON_WRITE
        1030,  # ER_GET_ERRNO: the storage engine's, a full disk say
        1037,
        1038,
        1041,  # ER_OUTOFMEMORY, ER_OUT_OF_SORTMEMORY, ER_OUT_OF_RESOURCES
        1637,  # ER_TOO_MANY_CONCURRENT_TRXS
        9001,
        9002,
        9003,
        9004,
        9005,  # TiDB: its stores do not answer
        ER.ERROR_DURING_COMMIT,  # 1180
        1792,  # ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION
        1836,  # ER_READ_ONLY_MODE
    }
)
"""The server will take the batch another time."""

_DUPLICATES = re.compile(rb"Duplicates: (\d+)")
_CHANGED = 2
"""What a row that stands and was changed counts among the affected ones."""


class _Cursor(aiomysql.Cursor):  # type: ignore[misc] # aiomysql is untyped
    """aiomysql's cursor, that does not ask for warnings: nobody reads them, and each asking is a round trip.

    ``message``: what the server said of the last statement in words.
    """

    message: bytes | None = None

    async def _do_get_result(self) -> None:
        await super()._do_get_result()
        self.message = self._result.message

    async def _show_warnings(self, conn: Any) -> None:
        pass


class _DriverConnection(aiomysql.Connection):  # type: ignore[misc] # aiomysql is untyped
    """aiomysql's connection, that never goes on in the clear where TLS was asked for."""

    async def _get_server_information(self) -> None:
        await super()._get_server_information()
        if self._ssl_context and not self.server_capabilities & CLIENT.SSL:
            raise OperatorNeeded(
                "mysql.ssl_* is set but the server offers no TLS; enable it there, or remove mysql.ssl_*"
            )
        self._refuse_clear(self._server_auth_plugin)

    async def _process_auth(self, plugin_name: bytes, auth_packet: Any) -> Any:
        self._refuse_clear(plugin_name.decode(errors="replace"))
        return await super()._process_auth(plugin_name, auth_packet)

    def _refuse_clear(self, plugin: str) -> None:
        """MySQL's own client asks for a flag before it does this; aiomysql would do what any server says."""
        if plugin in ("mysql_clear_password", "mysql_old_password") and not self._ssl_context:
            raise OperatorNeeded(f"the server asks for the password in the clear ({plugin}); set mysql.ssl_ca")


class Session:
    """One logged-in connection. ``max_packet`` is the server's ``max_allowed_packet``, in bytes."""

    def __init__(self, connection: aiomysql.Connection, host: str, statement_timeout: float) -> None:
        self.host = host
        self.server_version = ""
        self.max_packet = 0
        self.tls_cipher = ""
        self.statement_timeout = statement_timeout
        self.worked = False
        """Whether a transaction was committed on it."""
        self._connection = connection
        self._database = ""
        self._used_at = 0.0

    @property
    def idle_seconds(self) -> float:
        """How long nothing was said on the connection."""
        return asyncio.get_running_loop().time() - self._used_at

    @property
    def usable(self) -> bool:
        """Whether the connection is still there."""
        return not self._connection.closed

    async def execute(self, statement: bytes | str) -> int:
        """Runs a statement that returns no rows; gives the number of affected ones.

        Raises:
            RowsRejected: the server refused a row, and the transaction goes on.
            DatabaseError: anything else; the session is closed.
        """
        self._check_size(statement)
        return int(await self._timed(self._run(statement)))

    async def insert(self, statement: bytes | str) -> int:
        """Runs an ``INSERT ... ON DUPLICATE KEY UPDATE`` that changes nothing; gives the number of rows that are new.

        A trigger of the user's may change a row that stands, which then counts twice among the affected ones; how many
        are such the server says in words, for more than one row.
        """
        self._check_size(statement)
        return int(await self._timed(self._run_insert(statement)))

    async def database(self) -> str:
        """The database's name."""
        if not self._database:
            ((name,),) = await self.query("SELECT DATABASE()")
            self._database = str(name)
        return self._database

    async def query(self, statement: bytes | str) -> list[tuple[Any, ...]]:
        """Runs a statement that returns rows. Raises as :meth:`execute` does."""
        self._check_size(statement)
        rows: list[tuple[Any, ...]] = list(await self._timed(self._fetch(statement)))
        return rows

    def _check_size(self, statement: bytes | str) -> None:
        # The server would answer a larger packet by ending the connection, which looks like an outage.
        if 0 < self.max_packet <= len(statement):
            raise RowTooLarge(
                f"{self.host}: a statement of {len(statement)} bytes for a row is larger than max_allowed_packet "
                f"({self.max_packet} bytes); raise that"
            )

    async def takes_more(self) -> bool:
        """Whether the server takes larger packets on connections that are opened now."""
        ((most,),) = await self.query("SELECT @@GLOBAL.max_allowed_packet")
        return int(most) > self.max_packet

    async def ping(self) -> None:
        """Asks whether the server is still there; a session that it closed is closed then."""
        await self._timed(self._connection.ping(reconnect=False))

    async def commit(self) -> None:
        """Makes the transaction's changes last. After an error they may last or not.

        Raises:
            TooMuch: the server took all rows and yet not the transaction, for a reason that nobody knows.
            DatabaseError: anything else.
        """
        try:
            await self._timed(self._connection.commit())
        except UnknownRefusal as exc:
            raise TooMuch(str(exc)) from exc.__cause__
        self.worked = True

    async def rollback(self) -> None:
        """Takes the transaction's changes back."""
        await self._timed(self._connection.rollback())

    def check_escapes(self) -> None:
        """Makes sure, from the server's last answer, that the backslash still escapes.

        Raises:
            ServerUnavailable: something between us (a proxy) lost our sql_mode; the session is closed.
        """
        if self._connection.server_status & SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES:
            self.close()
            raise ServerUnavailable("the connection lost its sql_mode (NO_BACKSLASH_ESCAPES came on)")

    def close(self) -> None:
        """Ends the connection at once, without a word to the server."""
        self._connection.close()

    async def _run(self, statement: bytes | str) -> int:
        async with self._connection.cursor() as cursor:
            return int(await cursor.execute(statement))

    async def _run_insert(self, statement: bytes | str) -> int:
        async with self._connection.cursor() as cursor:
            affected = int(await cursor.execute(statement))
            told = _DUPLICATES.search(cursor.message or b"")
        if told is None:  # a single row: 1 is new, 0 stands, 2 stands and was changed
            return affected if affected != _CHANGED else 0
        return affected - _CHANGED * int(told[1])

    async def _fetch(self, statement: bytes | str) -> Any:
        async with self._connection.cursor() as cursor:
            await cursor.execute(statement)
            return await cursor.fetchall()

    async def _timed(self, work: Awaitable[Result]) -> Result:
        try:
            result = await within(work, self.statement_timeout)
        except asyncio.TimeoutError:
            self.close()
            raise AnswerTimeout(f"{self.host}: no answer within {self.statement_timeout:g} s") from None
        except Exception as exc:  # of any kind: a server that answers nonsense makes the driver raise anything
            error = translate(exc, self.host)
            if not isinstance(error, RowsRejected) or not self.usable:
                self.close()
            raise error from exc
        except BaseException:  # cancelled: the connection is in the middle of something
            self.close()
            raise
        self._used_at = asyncio.get_running_loop().time()
        return result


class Database:
    """Opens sessions on the first host that takes one."""

    def __init__(
        self,
        login: Callable[[], Connection],
        *,
        connect_timeout: float,
        statement_timeout: float,
    ) -> None:
        self.connect_timeout = connect_timeout
        self.statement_timeout = statement_timeout
        self._login = login
        self._failed = ""

    async def open(self) -> Session:
        """A new session.

        Raises:
            DatabaseError: no host took us; the error of the last one, with those of the others.
        """
        to, context = self._how()
        problems: list[DatabaseError] = []
        hosts = to.hosts[:1] if to.unix_socket else to.hosts
        for host in sorted(hosts, key=lambda host: _name(to, host) == self._failed):
            try:
                return await self._open(to, host, context)
            except DatabaseError as exc:
                problems.append(exc)
        # If any host needs a person, say that: waiting does not mend it.
        worst = next((problem for problem in problems if isinstance(problem, OperatorNeeded)), problems[-1])
        raise type(worst)("; ".join(dict.fromkeys(str(problem) for problem in problems))) from worst

    def is_first(self, host: str) -> bool:
        """Whether ``host`` (a session's) is the one that ``mysql.host`` names first."""
        to, _ = self._how()
        return host == _name(to, to.hosts[0])

    async def open_first(self) -> Session:
        """A new session on the first host alone, when that takes rows.

        Raises:
            DatabaseError: it did not take us, or can only be read.
        """
        to, context = self._how()
        session = await self._open(to, to.hosts[0], context)
        try:
            ((read_only,),) = await session.query("SELECT @@GLOBAL.read_only")
            await session.rollback()
        except BaseException:
            session.close()
            raise
        if read_only:
            session.close()
            raise ServerUnavailable(f"{session.host} is read-only")
        self._failed = ""
        return session

    def _how(self) -> tuple[Connection, ssl.SSLContext | None]:
        try:
            to = self._login()
            return to, tls.context(to)
        except SettingsError as exc:
            raise OperatorNeeded(str(exc)) from exc

    def failed(self, host: str) -> None:
        """``host`` (a session's) took our login but not our rows, like a demoted primary: try it last."""
        self._failed = host

    async def _open(self, to: Connection, host: str, context: ssl.SSLContext | None) -> Session:
        name = _name(to, host)
        connection = _DriverConnection(
            host=host,
            port=to.port,
            unix_socket=to.unix_socket,
            user=to.user,
            # aiomysql sends the password as latin-1; the server compares UTF-8.
            password=to.password.encode().decode("latin-1"),
            db=to.db,
            charset="utf8mb4",
            cursorclass=_Cursor,
            ssl=context,
            connect_timeout=self.connect_timeout,
            program_name="salt_mysql_engine",
        )
        connection.client_flag &= ~CLIENT.MULTI_STATEMENTS
        try:
            # ping() connects; the documented connect() gives no chance to clear the flag above.
            await within(connection.ping(reconnect=True), self.connect_timeout)
        except asyncio.TimeoutError:
            connection.close()
            raise ServerUnavailable(f"{name}: no login within {self.connect_timeout:g} s") from None
        except (DatabaseError, asyncio.CancelledError):  # aiomysql itself closes after neither
            connection.close()
            raise
        except Exception as exc:  # a server that speaks something else makes the driver raise anything
            connection.close()
            raise translate(exc, name) from exc
        session = Session(connection, name, self.statement_timeout)
        for statement in sessions.statements(autocommit=False):
            await session.execute(statement)
        # The server gives up a lock first (1205), so that no statement of ours outlives its connection there.
        patience = max(1, int(self.statement_timeout) - 1)
        await session.execute(
            f"SET SESSION innodb_lock_wait_timeout = {patience}, SESSION lock_wait_timeout = {patience}"
        )
        answer = await session.query(sessions.QUESTION)
        try:
            about = sessions.check(answer, name, autocommit=False)
        except OperatorNeeded:
            session.close()
            raise
        session.server_version = f"{about['version']} ({about['version_comment']})"
        session.max_packet = int(about["max_allowed_packet"])
        if context is not None:
            ((_, session.tls_cipher),) = await session.query("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
        session.check_escapes()
        await session.rollback()
        return session


def _name(to: Connection, host: str) -> str:
    return to.unix_socket or f"{host}:{to.port}"


def translate(exc: Exception, host: str) -> DatabaseError:
    """The engine's error for a driver's: what it means, and what a person can do."""
    number, text = (*exc.args, 0, "")[:2] if isinstance(exc, pymysql.MySQLError) else (0, str(exc))
    if not isinstance(number, int):
        number, text = 0, str(number)
    # PyMySQL keeps it beside, aiomysql behind.
    causes = exc, exc.__cause__, getattr(exc, "original_exception", None)
    if broken := next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None):
        return OperatorNeeded(f"{host}: TLS failed: {broken}; check mysql.ssl_ca, mysql.ssl_cert and mysql.ssl_key")
    message = f"{host}: {text} ({number})" if number else f"{host}: {text or type(exc).__name__}"
    if number in _ROW_ERRORS:
        return RowsRejected(message)
    if number in (ER.TABLEACCESS_DENIED_ERROR, ER.COLUMNACCESS_DENIED_ERROR) and (denied := _DENIED.search(text)):
        return OperatorNeeded(
            f"{message}; GRANT {denied[1].strip()} on the database to the user (docs/operations.md has what is needed)"
        )
    if number == ER.NO_SUCH_TABLE and (missing := _MISSING_TABLE.search(text)):
        name = missing[1].rsplit(".", 1)[-1]
        if name.removesuffix("_archive") not in _OUR_TABLES:
            return OperatorNeeded(
                f"{message}; {name} is no table of Salt's: a trigger or a view on these tables names it. "
                f"Drop that, or make {name}"
            )
    if number in _REMEDIES:
        return OperatorNeeded(f"{message}; {_REMEDIES[number]}")
    if number in _LIMITS:
        return TooMuch(f"{message}; where a single row is too much, {_LIMITS[number]}")
    if number in _ABORTED:
        return TransactionAborted(message)
    if number in _TOO_MANY_SESSIONS:
        return TooManySessions(f"{message}; let the user have more connections (MAX_USER_CONNECTIONS)")
    if number in _LOST:
        return ConnectionLost(f"{message}{_because(exc)}")
    if number in _BUSY or CR.CR_ERROR_FIRST <= number <= CR.CR_ERROR_LAST:
        return ServerUnavailable(f"{message}{_because(exc)}")
    if isinstance(exc, RuntimeError) and "cryptography" in text:
        return OperatorNeeded(message)
    if not number:  # not the server's word: a broken connection, or one that talks nonsense
        return ConnectionLost(f"{message}{_because(exc)}")
    # Unknown: not the rows' fault as far as we can tell, so nothing is given up.
    return UnknownRefusal(f"{message}; look this number up in the server's error reference")


def _because(exc: BaseException) -> str:
    cause = exc.__cause__
    return f": {cause or type(cause).__name__}" if cause is not None else ""
