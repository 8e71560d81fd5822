"""Databases as they were before us, and what `mysql.*` and the master config look like to the runner's functions."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from salt_mysql_engine import schema
from tests.support import saltext_returner
from tests.support.scratch import Scratch

NOW: Final = datetime.datetime.now(datetime.timezone.utc)
STYLE_2014: Final = (
    """CREATE TABLE `jids` (`jid` varchar(255), `load` varchar(1024)) ENGINE=MyISAM DEFAULT CHARSET=utf8""",
    """CREATE TABLE `salt_returns` (`fun` varchar(50) NOT NULL, `jid` varchar(255) NOT NULL,
    `return` mediumtext NOT NULL, `id` varchar(255) NOT NULL, `success` varchar(10), `full_ret` mediumtext NOT NULL)
    ENGINE=InnoDB DEFAULT CHARSET=utf8""",
    """CREATE TABLE `salt_events` (`id` BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY, `tag` varchar(255) NOT NULL,
    `data` varchar(1024) NOT NULL, `alter_time` TIMESTAMP DEFAULT CURRENT_TIMESTAMP, `master_id` varchar(255) NOT NULL)
    ENGINE=InnoDB DEFAULT CHARSET=utf8""",
)
"""No keys but the events' own, no times of returns, narrow columns."""


def make_2014(database: Scratch) -> None:
    """Tables in the style of 2014."""
    for statement in STYLE_2014:
        database.sql(statement)


def make_saltext(database: Scratch) -> None:
    """Tables as saltext.mysql documents them."""
    for statement in saltext_returner.documented_schema():
        database.sql(statement)


MAKERS: Final[dict[str, Callable[[Scratch], None]]] = {"2014": make_2014, "saltext": make_saltext}


def make_ours(database: Scratch) -> None:
    """Our tables, as the engine makes them."""
    for sections in schema.sections().values():
        for _, statements in sections:
            for ddl in statements:
                database.sql(ddl)
    database.sql("INSERT INTO mysql_jobcache_schema (version) VALUES (%s)", schema.newest())


def make_version_1(database: Scratch) -> None:
    """Our tables as they were first: keys that differ in trailing spaces alone are one."""
    for ddl in schema.statements().values():
        database.sql(re.sub(r"/\*M!.*0900_bin \*/", "COLLATE utf8mb4_bin", ddl))
    database.sql("INSERT INTO mysql_jobcache_schema (version) VALUES (1)")


def make_version_2(database: Scratch) -> None:
    """Our tables before they said what failed."""
    for ddl in schema.statements().values():
        database.sql(ddl)
    database.sql("ALTER TABLE salt_returns DROP COLUMN failed, ADD KEY success (success, jid)")
    database.sql("INSERT INTO mysql_jobcache_schema (version) VALUES (1), (2)")


def job(days: float, number: int = 0) -> str:
    """The jid of a job that began so many days ago."""
    return (NOW - datetime.timedelta(days=days)).strftime("%Y%m%d%H%M%S") + f"{number:06d}"


def opts_of(database: Scratch, directory: Path, **options: Any) -> dict[str, Any]:
    """A master's, with the engine's options in it; nothing listens in `directory`."""
    return {**database.mysql, "sock_dir": str(directory), "engines": [{"mysql_jobcache": options}]}


def load_of(fun: str = "test.ping", **more: Any) -> str:
    """A published load, as saltext.mysql stores it."""
    return json.dumps({"cmd": "publish", "fun": fun, "user": "root", "tgt": "*", "tgt_type": "glob", **more})


def add_job(database: Scratch, job: str, *minions: str, value: str = "true", at: str | None = None) -> None:
    """A job and its returns, as saltext.mysql writes them; `at`: the returns' `alter_time`."""
    database.sql("INSERT INTO jids (jid, `load`) VALUES (%s, %s)", job, load_of())
    for minion in minions:
        add_return(database, job, minion, value=value, at=at)


def add_return(database: Scratch, job: str, minion: str, *, value: str = "true", at: str | None = None) -> None:
    """One return."""
    columns, values = "fun, jid, `return`, id, success, full_ret", ["test.ping", job, value, minion, "1"]
    values.append(f'{{"return": {value}, "id": "{minion}"}}')
    if at is not None:
        columns += ", alter_time"
        values.append(at)
    database.sql(f"INSERT INTO salt_returns ({columns}) VALUES ({', '.join(['%s'] * len(values))})", *values)
