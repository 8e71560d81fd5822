"""A private MySQL server, beside MariaDB's: what `tools/find-mysqld` finds, or fetches."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.support.mariadb import CURRENT_USER, Server, kept_template, run_installer

_FINDER: Final = Path(__file__).parents[2] / "tools" / "find-mysqld"


@functools.cache
def find_mysqld() -> str:
    """The command of a MySQL server, 8.0 or newer."""
    done = subprocess.run([_FINDER], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise FileNotFoundError(done.stderr.strip())
    return done.stdout.strip()


class MySQL(Server):
    """A MySQL server."""

    product = "MySQL"
    is_mysql = True

    def program(self) -> list[str]:
        program = find_mysqld()
        unpacked = Path(program).parent / "tree" / "usr"
        # One that was unpacked looks for its messages and plugins where it was built for.
        return [program, f"--basedir={unpacked}"] if unpacked.exists() else [program]

    def own_options(self) -> Sequence[str]:
        return ["--mysqlx=OFF", "--secure-file-priv=", "--innodb-redo-log-capacity=64M"]

    def template(self) -> Path:
        return kept_template("mysql", [find_mysqld()], self._install)

    def _install(self, datadir: Path) -> None:
        program, *rest = self.program()
        run_installer(
            [
                program,
                "--no-defaults",  # the first, or it is none
                *rest,
                "--initialize-insecure",
                f"--user={CURRENT_USER}",
                f"--datadir={datadir}",
                "--skip-log-bin",
                "--innodb-redo-log-capacity=8M",  # the server enlarges it; the copy stays small
            ]
        )
