"""A scratch database: one test's own database and account on a private server."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Final

import pymysql.cursors

from tests.support.mariadb import Server

PASSWORD: Final = "pass 'word' \" \\"
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A database, empty at first, and the account that owns it; both are called `name`."""

    server: Server
    name: str

    @property
    def mysql(self) -> dict[str, Any]:
        """The master config's `mysql.*` for it."""
        return {
            "mysql.host": self.server.host,
            "mysql.port": self.server.port,
            "mysql.user": self.name,
            "mysql.pass": PASSWORD,
            "mysql.db": self.name,
        }

    def sql(self, statement: str, *args: Any) -> list[tuple[Any, ...]]:
        """Run a statement in the database as the server's root."""
        return self.server.sql(statement, args or None, db=self.name)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """A table's rows in the order of its primary key, times in UTC."""
        connection = self.server.connect(database=self.name, init_command="SET time_zone = '+00:00'")
        with connection, connection.cursor(pymysql.cursors.DictCursor) as cursor:
            cursor.execute(f"SELECT * FROM `{table}` ORDER BY {_ORDER[table]}")
            return list(cursor.fetchall())

    def row(self, table: str) -> dict[str, Any]:
        """A table's only row."""
        (row,) = self.rows(table)
        return row

    def count(self, table: str) -> int:
        """How many rows a table has."""
        ((count,),) = self.sql(f"SELECT COUNT(*) FROM `{table}`")
        return int(count)

    @contextlib.contextmanager
    def globally(self, **variables: Any) -> Iterator[None]:
        """The server with other options, for connections made from now on; put back at the end."""
        if self.server.is_mysql:
            variables = {name.replace("tx_", "transaction_"): value for name, value in variables.items()}
        before = {name: self.server.sql(f"SELECT @@GLOBAL.{name}")[0][0] for name in variables}
        try:
            for name, value in variables.items():
                self.server.sql(f"SET GLOBAL {name} = %s", (value,))
            yield
        finally:
            for name, value in before.items():
                self.server.sql(f"SET GLOBAL {name} = %s", (value,))


def sequence(first: int, last: int) -> str:
    """A table expression of the numbers `first` to `last`, as `seq`."""
    zeros = f"CONCAT('[', REPEAT('0,', {last - first}), '0]')"
    numbered = f"JSON_TABLE({zeros}, '$[*]' COLUMNS (n FOR ORDINALITY)) AS zeros"
    return f"(SELECT {first - 1} + n AS seq FROM {numbered}) AS numbers"


_ORDER: Final = {"jids": "jid", "salt_returns": "jid, id", "salt_events": "id"}


@contextlib.contextmanager
def scratch(server: Server) -> Iterator[Scratch]:
    """A scratch database; the server may be down or frozen when it ends, and runs afterwards."""
    made = Scratch(server, f"salt_{next(_numbers)}")
    server.create_database(made.name, made.name, PASSWORD)
    try:
        yield made
    finally:
        if server.running:
            server.thaw()
        else:
            server.start()
        server.sql(f"DROP DATABASE IF EXISTS `{made.name}`")
        server.sql(f"DROP USER IF EXISTS `{made.name}`")
