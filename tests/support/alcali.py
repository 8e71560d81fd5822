"""What Alcali, a web interface for Salt, asks of the tables: the SQL that Django issues for its models and views.

Read in latenighttales/alcali (api/models.py, api/views/salt.py and alcali.py, api/utils/__init__.py, as of 2023).
Its models fetch the columns of the documented shape by name, and nothing else; `SaltReturns` always leaves
`saltutil.find_job` out. What `Model.objects.get` demands is demanded here: exactly one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import pymysql.cursors

from tests.support.scratch import PASSWORD, Scratch

Row = dict[str, Any]

_RETURNS: Final = (
    "SELECT `salt_returns`.`fun`, `salt_returns`.`jid`, `salt_returns`.`return`, `salt_returns`.`id`, "
    "`salt_returns`.`success`, `salt_returns`.`full_ret`, `salt_returns`.`alter_time` FROM `salt_returns` "
    "WHERE NOT (`salt_returns`.`fun` = 'saltutil.find_job')"
)
_HIGHSTATES: Final = "(`salt_returns`.`fun` = 'state.apply' OR `salt_returns`.`fun` = 'state.highstate')"

OWN_TABLES: Final = {
    "salt_keys": "CREATE TABLE `salt_keys` (`id` integer AUTO_INCREMENT NOT NULL PRIMARY KEY, "
    "`minion_id` varchar(255) NOT NULL, `pub` longtext NOT NULL, `status` varchar(64) NOT NULL)",
    "salt_minions": "CREATE TABLE `salt_minions` (`id` integer AUTO_INCREMENT NOT NULL PRIMARY KEY, "
    "`minion_id` varchar(128) NOT NULL, `grain` longtext NOT NULL, `pillar` longtext NOT NULL)",
    "salt_functions": "CREATE TABLE `salt_functions` (`id` integer AUTO_INCREMENT NOT NULL PRIMARY KEY, "
    "`name` varchar(255) NOT NULL, `type` varchar(255) NOT NULL, `description` longtext NOT NULL)",
    "salt_job_template": "CREATE TABLE `salt_job_template` (`id` integer AUTO_INCREMENT NOT NULL PRIMARY KEY, "
    "`name` varchar(255) NOT NULL, `job` longtext NOT NULL)",
    "conformity": "CREATE TABLE `conformity` (`id` integer AUTO_INCREMENT NOT NULL PRIMARY KEY, "
    "`name` varchar(255) NOT NULL, `function` varchar(255) NOT NULL)",
    "user_settings": "CREATE TABLE `user_settings` (`user_id` integer NOT NULL PRIMARY KEY, `token` varchar(40) NOT "
    "NULL, `created` datetime(6) NOT NULL, `max_notifs` integer UNSIGNED NOT NULL)",
}
"""Tables of Alcali's in the same database, which are nobody else's business."""


class Alcali:
    """Alcali's questions, on a connection as Django 3 opens one."""

    def __init__(self, database: Scratch) -> None:
        self._connection = database.server.connect(
            unix_socket=None,
            host=database.server.host,
            port=database.server.port,
            user=database.name,
            password=PASSWORD,
            database=database.name,
            charset="utf8",  # of three bytes
            cursorclass=pymysql.cursors.DictCursor,
            init_command="SET SQL_AUTO_IS_NULL = 0; SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
            client_flag=pymysql.constants.CLIENT.MULTI_STATEMENTS,
        )

    def close(self) -> None:
        self._connection.close()

    def _query(self, statement: str, *args: Any) -> list[Row]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, args or None)
            return list(cursor.fetchall())

    def jobs(
        self, *, targets: tuple[str, ...] = (), dates: tuple[str, str] | None = None, limit: int = 50
    ) -> list[Row]:
        """The job list, newest first, with what each line shows beside it."""
        statement, args = _RETURNS, []
        if targets:
            statement += f" AND `salt_returns`.`id` IN ({', '.join(['%s'] * len(targets))})"
            args += targets
        if dates:
            statement += " AND DATE(`salt_returns`.`alter_time`) BETWEEN %s AND %s"
            args += dates
        rows = self._query(f"{statement} ORDER BY `salt_returns`.`alter_time` DESC LIMIT {limit}", *args)
        return [self._shown(row) for row in rows]

    def job(self, jid: str) -> list[Row]:
        """The returns of a job."""
        rows = self._query(f"{_RETURNS} AND `salt_returns`.`jid` = %s ORDER BY `salt_returns`.`alter_time` DESC", jid)
        return [self._shown(row) for row in rows]

    def one(self, jid: str, minion: str) -> Row:
        """``SaltReturns.objects.get(jid=..., id=...)``."""
        return self._get(f"{_RETURNS} AND `salt_returns`.`id` = %s AND `salt_returns`.`jid` = %s LIMIT 21", minion, jid)

    def search(self, text: str) -> list[Row]:
        """The search box, over returns."""
        like = "%" + text + "%"
        return self._query(f"{_RETURNS} AND (`salt_returns`.`jid` LIKE %s OR `salt_returns`.`fun` LIKE %s)", like, like)

    def users(self) -> set[str]:
        """The filter of users: every load there is."""
        rows = self._query("SELECT `jids`.`jid`, `jids`.`load` FROM `jids`")
        return {json.loads(row["load"]).get("user", "") for row in rows}

    def minions(self) -> set[str]:
        """The filter of minions."""
        rows = self._query(
            "SELECT DISTINCT `salt_returns`.`id` FROM `salt_returns` "
            "WHERE NOT (`salt_returns`.`fun` = 'saltutil.find_job')"
        )
        return {row["id"] for row in rows}

    def graph(self, since: str, *, fun: str = "all", minion: str = "") -> list[tuple[str, int, int]]:
        """Day, returns, errors: ``success="0"`` is an error."""
        where, args = "", [since]
        if fun == "highstate":
            where += f" AND {_HIGHSTATES}"
        elif fun == "other":
            where += f" AND NOT {_HIGHSTATES}"
        if minion:
            where += " AND `salt_returns`.`id` = %s"
            args.append(minion)
        rows = self._query(
            "SELECT (date(alter_time)) AS `day`, COUNT(`salt_returns`.`jid`) AS `count`, "
            "COUNT(CASE WHEN `salt_returns`.`success` = '0' THEN `salt_returns`.`success` ELSE NULL END) AS `error` "
            "FROM `salt_returns` WHERE NOT (`salt_returns`.`fun` = 'saltutil.find_job') "
            f"AND `salt_returns`.`alter_time` > %s{where} GROUP BY (date(alter_time)) ORDER BY `day` ASC",
            *args,
        )
        return [(str(row["day"]), row["count"], row["error"]) for row in rows]

    def last_job(self, minion: str) -> Row | None:
        """A minion's newest return."""
        rows = self._query(
            f"{_RETURNS} AND `salt_returns`.`id` = %s ORDER BY `salt_returns`.`alter_time` DESC LIMIT 1", minion
        )
        return rows[0] if rows else None

    def last_highstate(self, minion: str) -> Row | None:
        """The newest state run without arguments: needs ``fun_args`` in every ``full_ret``."""
        rows = self._query(f"{_RETURNS} AND {_HIGHSTATES} AND `salt_returns`.`id` = %s", minion)
        for row in sorted(rows, key=lambda row: row["jid"], reverse=True):
            args = json.loads(row["full_ret"])["fun_args"]
            if not args or args[0] in ({"test": True}, "test=True"):
                return row
        return None

    def conformity(self, minion: str) -> bool | None:
        """Whether every state of the last highstate is well; ``None`` without one."""
        state = self.last_highstate(minion)
        if state is None:
            return None
        returned = json.loads(state["full_ret"])["return"]
        return bool(returned) and not isinstance(returned, list) and all(its["result"] for its in returned.values())

    def events(self) -> list[Row]:
        """The page of events."""
        return self._query(
            "SELECT `salt_events`.`id`, `salt_events`.`tag`, `salt_events`.`data`, `salt_events`.`alter_time`, "
            "`salt_events`.`master_id` FROM `salt_events` ORDER BY `salt_events`.`alter_time` DESC LIMIT 50"
        )

    def stats(self) -> tuple[int, int]:
        """How many returns and events."""
        (returns,) = self._query(
            "SELECT COUNT(*) AS `__count` FROM `salt_returns` WHERE NOT (`salt_returns`.`fun` = 'saltutil.find_job')"
        )
        (events,) = self._query("SELECT COUNT(*) AS `__count` FROM `salt_events`")
        return returns["__count"], events["__count"]

    def _shown(self, row: Row) -> Row:
        """A line of the list: Alcali reads `full_ret`, and the user from the job's load, which must be there."""
        full_ret = json.loads(row["full_ret"])
        load = json.loads(
            self._get("SELECT `jids`.`jid`, `jids`.`load` FROM `jids` WHERE `jids`.`jid` = %s LIMIT 21", row["jid"])[
                "load"
            ]
        )
        args = [str(arg) for arg in full_ret.get("fun_args") or []]
        return {
            **row,
            "user": load.get("user", ""),
            "arguments": " ".join(arg for arg in args if "=" not in arg),
            "keyword_arguments": " ".join(arg for arg in args if "=" in arg),
            "success_bool": full_ret["success"],
        }

    def _get(self, statement: str, *args: Any) -> Row:
        rows = self._query(statement, *args)
        assert len(rows) == 1, f"{len(rows)} rows for {args}"  # Django: DoesNotExist, MultipleObjectsReturned
        return rows[0]


def own_rows(database: Scratch) -> Iterator[tuple[str, Any]]:
    """Alcali's own tables, their shape and their rows: to be compared before and after."""
    for table in OWN_TABLES:
        yield table, (database.sql(f"SHOW CREATE TABLE `{table}`"), database.sql(f"SELECT * FROM `{table}`"))
