"""The read side: what ``salt-run jobs.* ext_source=mysql_jobcache`` asks, answered from the tables.

Synchronous, through PyMySQL (aiomysql's own base), since Salt calls a returner from ordinary
functions. One connection a call, with timeouts; nothing is written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pymysql

from . import jsontext, settings, tls
from .errors import ServerUnavailable, SettingsError

_CONNECT_SECONDS = 5
_READ_SECONDS = 30


class Reader:
    """Answers from the database that ``mysql.*`` in ``opts`` names.

    Every method raises :class:`ServerUnavailable` when no host answers, and
    :class:`SettingsError` for a connection that cannot be tried.
    """

    def __init__(self, opts: Mapping[str, Any]) -> None:
        self._to = settings.Connection.from_opts(opts)

    def load(self, jid: str) -> dict[str, Any]:
        """The job as it was published, ``{}`` for an unknown one."""
        rows = self._query("SELECT `load` FROM `jids` WHERE `jid` = %s", jid)
        return _parsed(rows[0][0]) if rows else {}

    def returns(self, jid: str) -> dict[str, dict[str, Any]]:
        """What each minion answered, as the local cache gives it: ``{minion: {"return": ..., ...}}``."""
        answers: dict[str, dict[str, Any]] = {}
        for minion, full_ret in self._query("SELECT `id`, `full_ret` FROM `salt_returns` WHERE `jid` = %s", jid):
            ret = _parsed(full_ret)
            answers[minion] = {key: ret[key] for key in ("return", "retcode", "success", "out") if key in ret}
        return answers

    def newest_jobs(self, count: int, *, skip: str = "") -> list[tuple[str, dict[str, Any]]]:
        """The newest ``count`` jobs (all with 0) but those of the function ``skip``, oldest first."""
        limit = f" LIMIT {int(count)}" if count else ""
        skipped = '%"fun": ' + jsontext.dumps(skip) + "%" if skip else ""
        rows = self._query(
            "SELECT `jid`, `load` FROM `jids` WHERE `load` NOT LIKE %s ORDER BY `jid` DESC" + limit, skipped
        )
        return [(jid, _parsed(load)) for jid, load in reversed(rows)]

    def last_of_function(self, fun: str) -> dict[str, Any]:
        """The newest whole return of each minion for a function."""
        rows = self._query("SELECT `id`, `full_ret` FROM `salt_returns` WHERE `fun` = %s ORDER BY `jid`", fun)
        return {minion: _parsed(full_ret) for minion, full_ret in rows}

    def minions(self) -> list[str]:
        """Every minion that ever returned something."""
        return [minion for (minion,) in self._query("SELECT DISTINCT `id` FROM `salt_returns` ORDER BY `id`")]

    def _query(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        with self._connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return list(cursor.fetchall())

    @contextlib.contextmanager
    def _connection(self) -> Iterator[pymysql.Connection[Any]]:
        problems = []
        for host in self._to.hosts[:1] if self._to.unix_socket else self._to.hosts:
            try:
                connection = self._connect(host)
            except pymysql.MySQLError as exc:
                problems.append(f"{host}: {exc}")
                continue
            try:
                yield connection
            except pymysql.MySQLError as exc:
                raise ServerUnavailable(f"{host}: {exc}") from exc
            finally:
                connection.close()
            return
        raise ServerUnavailable("; ".join(problems))

    def _connect(self, host: str) -> pymysql.Connection[Any]:
        to = self._to
        context = tls.context(to)
        connection = pymysql.connect(
            host=host,
            port=to.port,
            unix_socket=to.unix_socket,
            user=to.user,
            password=to.password.encode().decode("latin-1"),  # as in database.py
            database=to.db,
            charset="utf8mb4",
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            write_timeout=_READ_SECONDS,
            ssl=context,
        )
        if context is not None and not getattr(connection, "_secure", False):
            connection.close()
            raise SettingsError(
                "mysql.ssl_* is set but the server offers no TLS; enable it there, or remove mysql.ssl_*"
            )
        return connection


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a row of someone else
        return {}
    return value if isinstance(value, dict) else {}


__all__ = ["Reader", "ServerUnavailable", "SettingsError"]
