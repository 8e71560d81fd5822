"""A private salt-master and its minions: the real programs, on loopback, each under its own directory.

The programs are those beside the running interpreter, so the series of Salt under test is the one whose environment
runs pytest. Nearly every process of a daemon carries `-c <configuration directory>` in its title (Salt appends to
titles; the EventPublisher of 3007 and 3008 alone replaces its own) and nearly every one stays in the session of the
main process (runners started through the master detach themselves). A process that does both is not known, so the
two signs together find whatever a stop must not leave behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import msgpack
import psutil
import yaml
import zmq

from tests.support.mariadb import CURRENT_USER, LOOPBACK, ShortPath, accepts, free_port, tail, wait_until

BIN: Final = Path(sys.executable).parent

# Salt 3008 puts the workers of a pool on `tcp_master_workers` plus a hash of the pool's name (transport/zeromq.py),
# 3006 and 3007 on `tcp_master_workers` itself; the lab reserves both.
_POOL_OFFSET: Final = zlib.adler32(b"default") % 1000

_D = TypeVar("_D", bound="_Daemon")


class _Daemon:
    """What a master and a minion have in common: a directory, a configuration, a process group."""

    role: str
    patience: float  # seconds between SIGTERM and SIGKILL

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory = directory
        self.config_dir = directory / "etc"
        self.log_file = directory / "log"
        # All of Salt's paths begin like this: it puts `root_dir` before any that begins otherwise (config/__init__.py).
        self._short = ShortPath(directory, limit=60)
        root = self._short.path
        self.sock_dir = root / "run"
        self._stdout = directory / "stdout"
        self._process: subprocess.Popen[bytes] | None = None
        self.config: dict[str, Any] = {
            "user": CURRENT_USER,
            "root_dir": str(root),
            "pki_dir": str(root / "pki"),
            "cachedir": str(root / "cache"),
            "sock_dir": str(self.sock_dir),
            "log_file": str(root / "log"),
            "pidfile": str(root / "pid"),
            "file_roots": {"base": [str(directory / "srv" / "salt")]},
            "pillar_roots": {"base": [str(directory / "srv" / "pillar")]},
            "log_level_logfile": "info",
            "grains_cache": True,  # else each worker works them out: 1.5 s more to start on 3006, two cores
            "enable_gpu_grains": False,  # runs lspci
            "enable_fqdns_grains": False,  # asks DNS for every address of the machine
            **config,
        }

    def __enter__(self: _D) -> _D:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._short.remove()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The main process's id; raises when it is not running."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"this salt-{self.role} is not running")
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything the daemon has logged, over all its starts."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def launch(self) -> None:
        """Write the configuration as it is now and start the program, without waiting for it."""
        if self.running:
            raise RuntimeError(f"this salt-{self.role} is already running")
        self._short.make()
        for roots in (self.config["file_roots"], self.config["pillar_roots"]):
            for path in roots["base"]:
                Path(path).mkdir(parents=True, exist_ok=True)
        self.config_dir.mkdir(parents=True, exist_ok=True)
        self._config_file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        with self._stdout.open("ab") as output:
            self._process = subprocess.Popen(
                [str(BIN / f"salt-{self.role}"), "-c", str(self.config_dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that the whole group can be killed, and Ctrl-C reaches the tests alone
            )

    @property
    def _config_file(self) -> Path:
        return self.config_dir / self.role

    def start(self, *, timeout: float = 120.0) -> None:
        """Launch and return once the daemon does its work; on failure raise with the tail of its log."""
        self.launch()
        self.wait_ready(timeout=timeout)

    def wait_ready(self, *, timeout: float = 120.0) -> None:
        """Wait for a launched daemon."""
        try:
            wait_until(self._still_running_and_ready, timeout=timeout, what=f"salt-{self.role}", interval=0.05)
        except (RuntimeError, TimeoutError) as error:
            self.kill()
            logs = f"{tail(self._stdout)}\n{tail(self.log_file)}"
            raise RuntimeError(f"salt-{self.role} did not start: {error}\n{logs}") from error

    def _still_running_and_ready(self) -> bool:
        if not self.running:
            raise RuntimeError("its process has ended")
        return self._ready()

    def _ready(self) -> bool:
        """Whether the daemon does its work; each kind knows how to tell."""
        raise NotImplementedError

    def stop(self) -> None:
        """SIGTERM to the main process as systemd's `KillMode=process` would, then SIGKILL to all that remains."""
        if self.running:
            assert self._process is not None
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.patience)
        elif self._process is None:
            self._terminate_from_outside()
        self.kill()

    def _terminate_from_outside(self) -> None:
        """SIGTERM to the main process that another object or program launched, as the file of its id tells."""
        try:
            pid = int((self.directory / "pid").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        main = [process for process in self.processes() if process.pid == pid]  # the number may be another's by now
        for process in main:
            process.terminate()
        psutil.wait_procs(main, self.patience)

    def kill(self) -> None:
        """SIGKILL to every process of this daemon, and wait until they are gone."""
        wait_until(self._kill_once, timeout=10, what=f"the end of salt-{self.role}'s processes")
        self._process = None

    def _kill_once(self) -> bool:
        """One round of killing; true when there was nothing left to kill. A process may fork while we look."""
        remaining = self.processes()
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.poll()  # reap our own child: a zombie is a process too
        return not remaining

    def processes(self) -> list[psutil.Process]:
        """Every living process of this daemon, also when it was launched by another object or program."""
        ours = re.compile(rf"-c {re.escape(str(self.config_dir))}( |$)")
        sessions = {self._process.pid} if self._process is not None else set()
        seen: list[tuple[psutil.Process, int, bool]] = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                session = os.getsid(process.pid)
                titled = ours.search(" ".join(process.cmdline())) is not None
            except (psutil.Error, ProcessLookupError):
                continue
            if titled and session == process.pid:
                sessions.add(session)
            seen.append((process, session, titled))
        return [process for process, session, titled in seen if titled or session in sessions]

    def find_processes(self, pattern: str) -> list[psutil.Process]:
        """The processes whose title matches: `MWorker`, `EventPublisher`, or see `SaltMaster.engine_processes`."""
        found = []
        for process in self.processes():
            try:
                title = " ".join(process.cmdline()).rstrip()
            except psutil.Error:
                continue
            if re.search(pattern, title):
                found.append(process)
        return found

    def cli(self, name: str, *args: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run one of Salt's programs with this daemon's configuration; the exit code is the caller's to judge."""
        command = [str(BIN / name), "-c", str(self.config_dir), *args]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout
        )

    def _cli_json(self, name: str, *args: str) -> Any:
        done = self.cli(name, *args)
        try:
            return _last_json(done.stdout)
        except ValueError as error:
            raise RuntimeError(f"{name} {args} ({done.returncode}):\n{done.stdout}\n{done.stderr}") from error


def _last_json(text: str) -> Any:
    """The last JSON document of a program's output; runners print their progress as documents before it."""
    decoder = json.JSONDecoder()
    document, position = None, 0
    if not text.strip():
        raise ValueError("no output")
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        document, position = decoder.raw_decode(text, position)
    return document


class SaltMaster(_Daemon):
    """A salt-master on free ports of 127.0.0.1; `config` is merged over the lab's own settings.

    `config` (the attribute) may be changed while the master is down: it is written anew at each start.
    """

    role = "master"
    patience = 15.0  # Salt itself gives its children 5 seconds, and then a few more to theirs

    def __init__(self, directory: Path, config: Mapping[str, Any] | None = None, *, id: str = "lab_master") -> None:
        ports = {
            "publish_port": free_port(),
            "ret_port": free_port(),
            "tcp_master_pub_port": free_port(),
            "tcp_master_pull_port": free_port(),
            "tcp_master_publish_pull": free_port(),
            "tcp_master_workers": free_port(offset=_POOL_OFFSET),
        }
        lab = {
            "id": id,
            "interface": LOOPBACK,
            "auto_accept": True,
            "worker_threads": 3,
            **ports,
        }
        super().__init__(directory, lab | dict(config or {}))

    def _ready(self) -> bool:
        return self._bus_accepts() and self._answers_a_request()

    def _bus_accepts(self) -> bool:
        """Connect to both ends of the event bus: the file of a socket also exists after a crash."""
        if self.config.get("ipc_mode") == "tcp":
            ports = (self.config["tcp_master_pub_port"], self.config["tcp_master_pull_port"])
            return all(accepts((LOOPBACK, port)) for port in ports)
        return all(accepts(str(self.sock_dir / f"master_event_{end}.ipc")) for end in ("pub", "pull"))

    def _answers_a_request(self) -> bool:
        """Ask a worker to say our own words back (ClearFuncs.ping): the port listens before the workers do."""
        address = (LOOPBACK, self.config["ret_port"])
        if not accepts(address):
            return False
        if self.config.get("transport", "zeromq") != "zeromq":
            return True
        with zmq.Context() as context, context.socket(zmq.REQ) as request:
            request.setsockopt(zmq.LINGER, 0)
            request.connect("tcp://{}:{}".format(*address))
            request.send(msgpack.packb({"enc": "clear", "load": {"cmd": "ping"}}))
            return bool(request.poll(2000))

    def engine_processes(self, name: str) -> list[psutil.Process]:
        """The engine's process. Its title loses the name when Salt restarts it: then any nameless engine counts."""
        return self.find_processes(rf"Engine\(\S*\b{re.escape(name)}\)$|\bEngine$")

    def run(self, *args: str) -> Any:
        """`salt-run`: the runner's return value."""
        return self._cli_json("salt-run", "--out=json", *args)

    def salt(self, *args: str) -> Any:
        """`salt`: a dictionary from minion id to return value."""
        return self._cli_json("salt", "--out=json", "--static", *args)


class SaltMinion(_Daemon):
    """A minion of `master`, in the directory `minions/<id>` of the master's own."""

    role = "minion"
    # A minion always sleeps 5 seconds after SIGTERM (minion.py, MinionManager.stop). It has nothing to save.
    patience = 0.5

    def __init__(self, master: SaltMaster, id: str, config: Mapping[str, Any] | None = None) -> None:
        self.master = master
        self.id = id
        lab = {
            "id": id,
            "master": LOOPBACK,
            "master_port": master.config["ret_port"],
            "publish_port": master.config["publish_port"],
            "tcp_pub_port": free_port(),
            "tcp_pull_port": free_port(),
            "ipc_mode": master.config.get("ipc_mode", "ipc"),
            "transport": master.config.get("transport", "zeromq"),
            "acceptance_wait_time": 1,
            "random_reauth_delay": 1,
            "recon_default": 100,
            "recon_max": 1000,
            "recon_randomize": False,
            "return_retry_timer": 1,
            "return_retry_timer_max": 3,
            "mine_enabled": False,
        }
        super().__init__(master.directory / "minions" / id, lab | dict(config or {}))
        self._log_start = 0

    def launch(self) -> None:
        self._log_start = len(self.log)
        super().launch()

    def _ready(self) -> bool:
        """The minion says so in its log, then proves it; pings before that would only fill the job cache."""
        if "Minion is ready to receive requests!" not in self.log[self._log_start :]:
            return False
        ping = self.master.cli("salt", "--out=json", "--static", "--timeout=5", self.id, "test.ping")
        return ping.returncode == 0 and _last_json(ping.stdout) == {self.id: True}

    def call(self, *args: str) -> Any:
        """`salt-call`: the function's return value."""
        return self._cli_json("salt-call", "--out=json", *args)["local"]


def fire(master: SaltMaster, tag: str, data: Mapping[str, Any]) -> None:
    """Put one event on the bus of `master`, stamped as Salt would."""
    stamp = datetime.now(timezone.utc).replace(tzinfo=None).isoformat()
    payload = msgpack.packb({"_stamp": stamp, **data}, use_bin_type=True)
    fire_raw(master, tag.encode() + b"\n\n" + payload)


def fire_raw(master: SaltMaster, *bodies: bytes) -> None:
    """Put bodies (`tag`, two newlines, msgpack, or anything a stranger might send) on the bus of `master`.

    Written by hand and not with Salt's client: importing Salt into pytest's process leaves import hooks behind that
    warn on every later import, and its client does not work inside a running event loop.
    """
    if master.config.get("ipc_mode") == "tcp":
        bus = socket.create_connection((LOOPBACK, master.config["tcp_master_pull_port"]), timeout=10)
    else:
        bus = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bus.settimeout(10)
        bus.connect(str(master.sock_dir / "master_event_pull.ipc"))
    with bus:
        for body in bodies:
            frame = msgpack.packb({"head": {}, "body": body}, use_bin_type=True)
            bus.sendall(struct.pack(">I", len(frame)) + frame)


class Publisher:
    """Puts events on a master's bus with Salt's own client: for benchmarks, in a process of its own.

    `config_dir` is the master's, the only thing that process needs to know. In a test, use `fire`.
    """

    def __init__(self, config_dir: Path) -> None:
        import salt.config
        import salt.utils.event

        opts = salt.config.master_config(str(config_dir / "master"))
        self._event = salt.utils.event.get_event("master", sock_dir=opts["sock_dir"], opts=opts, listen=False)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._event.destroy()

    def fire(self, tag: str, data: Mapping[str, Any]) -> None:
        """Hand one event to the EventPublisher; `ConnectionError` if it is not there to take it."""
        if not self._event.fire_event(dict(data), tag):
            raise ConnectionError(f"the master's event bus did not take {tag}")

    def fire_all(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
        """Fire the events as fast as the bus takes them; returns how many."""
        count = 0
        for tag, data in events:
            self.fire(tag, data)
            count += 1
        return count
