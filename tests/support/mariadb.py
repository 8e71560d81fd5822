"""A private database server: its own directory, its own port on loopback, started and stopped by us. Here MariaDB's;
MySQL's is in `mysql.py`.

The tests promise things about a database server, so they talk to one. Each server lives in the directory it is given
and leaves nothing behind in the system: no service, no configuration file read, no account but its own.

The few helpers that every part of the lab needs (`free_port`, `wait_until`, `accepts`, `ShortPath`, `tail`) are
here too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import psutil
import pymysql
from pymysql.connections import Connection

if TYPE_CHECKING:
    from typing_extensions import Self

LOOPBACK: Final = "127.0.0.1"
CURRENT_USER: Final = pwd.getpwuid(os.getuid()).pw_name

# The kernel hands out source ports from 32768 upwards (net.ipv4.ip_local_port_range). A server's port chosen there
# could be taken by somebody's outgoing connection while the server restarts, so ours come from below; each of two test
# processes that run side by side has its own.
_HALF: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2
_PORTS: Final = range(20000 + 6000 * _HALF, 26000 + 6000 * _HALF)
_handed_out: set[int] = set()

_OPTIONS: Final = (
    f"--bind-address={LOOPBACK}",
    "--skip-name-resolve",
    "--innodb-buffer-pool-size=128M",
    "--performance-schema=OFF",
    "--skip-log-bin",
)


def free_port(*, offset: int = 0) -> int:
    """A loopback port that nobody listens on; with an `offset`, port + offset is free as well."""
    while True:
        port = random.choice(_PORTS)
        wanted = {port, port + offset}
        if not wanted & _handed_out and all(_can_bind(each) for each in wanted):
            _handed_out.update(wanted)
            return port


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def wait_until(condition: Callable[[], bool], *, timeout: float, what: str, interval: float = 0.02) -> None:
    """Poll `condition` until it holds, or raise `TimeoutError` naming `what` was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} seconds")
        time.sleep(interval)


def accepts(address: str | tuple[str, int]) -> bool:
    """Whether somebody takes connections at a unix socket's path or a (host, port)."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address)
        except OSError:
            return False
    return True


class ShortPath:
    """A path of `directory` that is short enough for unix sockets in it (107 bytes, the kernel's limit).

    `path` is the directory's own or, if that is longer than `limit`, a link in /tmp, the same one for every program.
    The link is there from `make` to `remove`.
    """

    def __init__(self, directory: Path, *, limit: int) -> None:
        self._directory = directory
        digest = hashlib.sha256(os.fsencode(directory)).hexdigest()
        self.path = directory if len(os.fsencode(directory)) <= limit else Path("/tmp", f"sme-{digest[:16]}")

    def make(self) -> None:
        """Make the directory, and the link to it where one is needed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if self.path != self._directory:
            with contextlib.suppress(FileExistsError):
                self.path.symlink_to(self._directory)
            if self.path.readlink() != self._directory:  # /tmp is everybody's
                raise RuntimeError(f"{self.path} is in the way")

    def remove(self) -> None:
        """Remove the link."""
        if self.path != self._directory:
            self.path.unlink(missing_ok=True)


def tail(path: Path, *, lines: int = 40) -> str:
    """The last lines of a log, for error messages."""
    if not path.exists():
        return f"({path} does not exist)"
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def find_program(name: str) -> str:
    """The path of a server's program; Debian keeps such programs in directories that users do not have on PATH."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")
    if found is None:
        raise FileNotFoundError(
            f"{name} not found: run 'make mariadb', or 'apt-get install mariadb-server-core mariadb-client-core'"
        )
    return found


class Server:
    """A database server in `directory`; `options` are server options such as `--max-allowed-packet=1M`.

    The port stays the same for the life of the object, so a stop and a start look like an outage to clients.
    `options` is a list that may be changed while the server is down.
    """

    host: Final = LOOPBACK
    product: ClassVar[str]
    is_mysql: ClassVar[bool] = False

    def __init__(self, directory: Path, *, options: Sequence[str] = ()) -> None:
        self.directory = directory
        self.options = list(options)
        self.port = free_port()
        self.datadir = directory / "data"
        self.error_log = directory / "error.log"
        self._short = ShortPath(directory, limit=80)
        self.socket = self._short.path / "server.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._short.remove()

    def program(self) -> list[str]:
        """The server's command."""
        raise NotImplementedError

    def template(self) -> Path:
        """An empty data directory to copy."""
        raise NotImplementedError

    def own_options(self) -> Sequence[str]:
        """What this product alone takes."""
        return ()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The server's process id; raises when it is not running."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"this {self.product} server is not running")
        return self._process.pid

    def processes(self) -> list[psutil.Process]:
        """The server's living process, also when it was started by another object or program."""
        ours = f"--datadir={self.datadir}"
        return [process for process in psutil.process_iter(["cmdline"]) if ours in (process.info["cmdline"] or ())]

    def start(self, *, timeout: float = 60.0) -> None:
        """Start the server and return once it answers; on failure raise with the tail of its error log."""
        if self.running:
            raise RuntimeError(f"this {self.product} server is already running")
        tmpdir = self.directory / "tmp"
        tmpdir.mkdir(parents=True, exist_ok=True)
        self._short.make()
        if not self.datadir.exists():
            shutil.copytree(self.template(), self.datadir)
        program, *rest = self.program()
        command = [
            program,
            "--no-defaults",  # the first, or it is none
            *rest,
            f"--user={CURRENT_USER}",
            f"--datadir={self.datadir}",
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'server.pid'}",
            f"--port={self.port}",
            # Not the machine's own, where a server that starts clears the temporary tables of others away.
            f"--tmpdir={tmpdir}",
            *_OPTIONS,
            *self.own_options(),
            *self.options,
        ]
        with self.error_log.open("ab") as log:
            # A session of its own: a Ctrl-C at the terminal reaches the tests, which then stop the server in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until(self._answers, timeout=timeout, what=f"{self.product}'s first answer")
        except (RuntimeError, TimeoutError) as error:
            self.kill()
            raise RuntimeError(f"{self.product} did not start: {error}\n{tail(self.error_log)}") from error

    def _answers(self) -> bool:
        if not self.running:
            raise RuntimeError("the server's process has ended")
        if not accepts(str(self.socket)):  # PyMySQL leaks its socket when it finds nobody
            return False
        try:
            self.connect(connect_timeout=1).close()
        except pymysql.err.OperationalError:
            return False
        return True

    def stop(self, *, timeout: float = 30.0) -> None:
        """Shut down in order, so that the next start needs no recovery; a frozen server is thawed first."""
        if self._process is None:
            self._stop_from_outside(timeout)
            return
        if self.running:
            self.thaw()
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._process = None

    def _stop_from_outside(self, timeout: float) -> None:
        """Stop the server of this directory that another object or program started."""
        processes = self.processes()
        for process in processes:
            process.terminate()
        _, remaining = psutil.wait_procs(processes, timeout)
        for process in remaining:
            process.kill()

    def restart(self) -> None:
        """Stop and start on the same port."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL: a crash. Committed transactions survive it, as they would anywhere."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, the outage that only timeouts can see."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(self._is_stopped, timeout=10, what="the server's threads to stop")

    def _is_stopped(self) -> bool:
        threads = (each.read_text() for each in Path(f"/proc/{self.pid}/task").glob("*/stat"))
        return all(text.rpartition(") ")[2].startswith("T") for text in threads)

    def thaw(self) -> None:
        """SIGCONT: undo `freeze`."""
        os.kill(self.pid, signal.SIGCONT)

    def connect(self, **options: Any) -> Connection[Any]:
        """A PyMySQL connection as root through the unix socket; `options` go to `pymysql.connect` and win."""
        settings: dict[str, Any] = {
            "unix_socket": str(self.socket),
            "user": "root",
            "password": "",
            "autocommit": True,
            "charset": "utf8mb4",
        }
        return pymysql.connect(**(settings | options))

    def create_database(self, name: str, user: str, password: str) -> None:
        """A database and an account that may do everything in it, from any address, and nothing elsewhere."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE `{name}` DEFAULT CHARACTER SET utf8mb4")
            cursor.execute("CREATE USER IF NOT EXISTS %s@'%%' IDENTIFIED BY %s", (user, password))
            cursor.execute(f"GRANT ALL ON `{name}`.* TO %s@'%%'", (user,))

    def sql(self, statement: str, args: Sequence[Any] | None = None, db: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as root on a connection of its own and return its rows."""
        with self.connect(database=db) as connection, connection.cursor() as cursor:
            cursor.execute(statement, args)
            return list(cursor.fetchall())


class MariaDB(Server):
    """A MariaDB server."""

    product = "MariaDB"

    def program(self) -> list[str]:
        return [find_program("mariadbd")]

    def own_options(self) -> Sequence[str]:
        return ["--innodb-log-file-size=64M"]

    def template(self) -> Path:
        return kept_template("mariadb", self.program(), _install)


def kept_template(product: str, program: Sequence[str], install: Callable[[Path], None]) -> Path:
    """An empty data directory to copy: made once for each version of the server, because making one takes seconds."""
    version = subprocess.run([program[0], "--no-defaults", "--version"], check=True, capture_output=True).stdout
    name = f"{product}-{hashlib.sha256(version).hexdigest()[:12]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "salt-mysql-engine"
    template = cache / name
    if template.exists():
        return template
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=cache) as scratch:
        datadir = Path(scratch) / "data"
        install(datadir)
        try:
            datadir.rename(template)
        except OSError:  # another test run made the same template meanwhile, and moved it in first
            if not template.exists():
                raise
    return template


def run_installer(command: Sequence[str]) -> None:
    """Run what makes a data directory; raises with what it said."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")


def _install(datadir: Path) -> None:
    run_installer(
        [
            find_program("mariadb-install-db"),
            "--no-defaults",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
            f"--user={CURRENT_USER}",
            f"--datadir={datadir}",
            "--innodb-log-file-size=4M",  # the server enlarges it; the copy stays small
        ]
    )
