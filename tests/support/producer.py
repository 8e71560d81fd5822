"""A seeded producer of job returns: the load under which the tests break things, in a process of its own.

Two ways, mixed by the seed:

- *requests*: simulated minions, each with a key and a channel of its own, send ``_return`` to the master's request
  server, to jobs that were published through it. Everything behind that is the master's own doing: it fires the event,
  then it writes its job cache.
- *bus*: the master's own code for a return runs in this process instead: the event on the master's bus, then the job
  cache on its disk (or not, for a master whose cache nobody reads). Many times quicker.

What was sent stands in a ledger, a file of JSON lines that survives any crash: ``offered`` before a return is sent,
``accepted`` once the master has answered the request (on the bus: once event and cache have it). Every accepted return
must reach the tables; nothing may be there that was not offered.

In the tests' process this module is the handle, `Producer`; Salt is imported only in the process that it starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

from tests.support.mariadb import LOOPBACK, tail
from tests.support.salt import SaltMaster

_REPOSITORY: Final = Path(__file__).parents[2]
_ANSWER_SECONDS: Final = 5.0  # a request that is not answered by then is sent again
_READY_SECONDS = 30.0
_GIVE_UP_SECONDS: Final = 60.0  # after the end was asked for
_WORKERS: Final = 3  # threads that send requests; the lab's masters have as many workers
_FIRE_TIMEOUT_MS: Final = 5000
_ECHO: Final = "grüße 🧂 'quoted\" \\ \u2028"

_Answer = tuple[Any, int, bool]  # return, retcode, success
_Answers = Callable[[random.Random, str], _Answer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is produced. The same seed gives the same jobs, targets and values; jids and times are of now."""

    seed: int
    name: str = "sim"
    """The minions' ids begin with it. Two producers at one master need two."""
    minions: int = 8
    jobs_of: int = 8
    """Minions in a job at most."""
    returns: int = 0
    """End after so many; 0 is until told to."""
    rate: float = 0.0
    """Returns a second; 0 is as fast as they are taken."""
    bus: float = 0.5
    """The share of jobs whose returns go over the bus."""
    cache: bool = True
    """Whether the returns on the bus are written into the master's job cache, too."""
    twice: float = 0.02
    """The share of returns that come a second time, as from a minion that missed the answer."""
    contradicted: float = 0.0
    """The share of returns after which the same minion sends another value; the first stands."""
    large: float = 0.005
    """The share of jobs whose output is about 100 KB."""


class Return(NamedTuple):
    """What a minion answers to a job."""

    jid: str
    id: str
    fun: str
    fun_args: list[Any]
    value: Any
    retcode: int
    success: bool

    def event(self) -> dict[str, Any]:
        """As a minion sends it and as it stands on the bus."""
        return {
            "cmd": "_return",
            "id": self.id,
            "success": self.success,
            "return": self.value,
            "retcode": self.retcode,
            "jid": self.jid,
            "fun": self.fun,
            "fun_args": self.fun_args,
            "user": "root",
        }

    def entry(self) -> dict[str, Any]:
        """As it stands in the ledger."""
        entry = self._asdict()
        del entry["fun_args"]
        entry["return"] = entry.pop("value")
        return entry


class Producer:
    """The process that produces ``load`` at ``master`` and writes ``ledger``; entered, it runs.

    It ends by itself after ``returns`` of them, or when `stop` closes its standard input, or when this process dies.
    """

    def __init__(self, master: SaltMaster, ledger: Path, load: Load) -> None:
        self.ledger = ledger
        self._log = ledger.with_suffix(".log")
        self._command = [
            *(sys.executable, "-m", __spec__.name, str(master.config_dir), str(ledger)),
            json.dumps(dataclasses.asdict(load)),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._position = self._accepted = 0

    def __enter__(self) -> Producer:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        if error is not None:  # whoever failed says what; this one need not finish its work
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GIVE_UP_SECONDS + 20)
        self._process.kill()
        self._process.wait()

    @property
    def accepted(self) -> int:
        """How many returns the master has taken so far; raises when the process has failed."""
        if self._process is not None and self._process.poll() not in (None, 0):
            raise RuntimeError(f"the producer has failed ({self._process.returncode}):\n{tail(self._log)}")
        if not self.ledger.exists():
            return 0
        with self.ledger.open("rb") as ledger:
            ledger.seek(self._position)
            new = ledger.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._position += len(whole)
        self._accepted += sum(line.startswith(b'{"accepted"') for line in whole.splitlines())
        return self._accepted

    def stop(self) -> int:
        """Let it finish the job at hand and end; gives the number of accepted returns."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        return self.wait(_GIVE_UP_SECONDS + 20)

    def wait(self, timeout: float) -> int:
        """Until it has ended by itself; gives the number of accepted returns."""
        assert self._process is not None
        self._process.wait(timeout)
        return self.accepted


class _Ledger:
    """Appends lines, each flushed to the kernel before the next step is taken."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self.accepted = 0

    def offer(self, ret: Return) -> None:
        self._write({"offered": ret.entry()})

    def accept(self, ret: Return) -> None:
        self._write({"accepted": [ret.jid, ret.id]})
        self.accepted += 1

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        with self._lock:
            self._file.write(text)
            self._file.flush()


class _Job(NamedTuple):
    """A job before it has a jid."""

    minions: list[str]
    on_bus: bool
    fun: str
    arg: list[Any]
    answers: dict[str, _Answer]
    twice: set[str]
    contradicted: set[str]

    def returned(self, jid: str, minion: str) -> Return:
        value, retcode, success = self.answers[minion]
        return Return(jid, minion, self.fun, self.arg, value, retcode, success)


def _jobs(load: Load) -> Iterator[_Job]:
    """The jobs of a seed."""
    dice = random.Random(load.seed)
    ids = _ids(load)
    while True:
        fun, arg, make = _function(dice, load)
        minions = dice.sample(ids, dice.randint(1, min(load.jobs_of, len(ids))))
        yield _Job(
            minions,
            dice.random() < load.bus,
            fun,
            arg,
            {minion: make(dice, minion) for minion in minions},
            {minion for minion in minions if dice.random() < load.twice},
            {minion for minion in minions if dice.random() < load.contradicted},
        )


def _ids(load: Load) -> list[str]:
    return [f"{load.name}-{number:03d}.example.com" for number in range(load.minions)]


def _function(dice: random.Random, load: Load) -> tuple[str, list[Any], _Answers]:
    """A function, its arguments, and what makes a minion's value, retcode and success."""
    if dice.random() < load.large:
        return "cmd.run", ["cat big.log"], _output
    kinds: list[tuple[str, list[Any], _Answers]] = [
        ("test.ping", [], _ping),
        ("test.echo", [_ECHO], _echo),
        ("grains.items", [], _grains),
        ("state.apply", ["web"], _highstate),
        ("cmd.run_all", ["false"], _failure),
    ]
    return dice.choices(kinds, [8, 3, 3, 1, 2])[0]


def _ping(_dice: random.Random, _minion: str) -> _Answer:
    return True, 0, True


def _echo(_dice: random.Random, _minion: str) -> _Answer:
    return _ECHO, 0, True


def _output(dice: random.Random, minion: str) -> _Answer:
    return f"{minion} {dice.random()} ein Wort, das häufig wiederkommt\n" * dice.randint(1200, 1800), 0, True


def _grains(dice: random.Random, minion: str) -> _Answer:
    value = {
        "id": minion,
        "ip4_interfaces": {f"eth{n}": [f"10.{dice.randrange(256)}.{n}.1"] for n in range(dice.randrange(1, 5))},
        "nested": {"a": [1, 2.5, None, {"deep": [[], {}, ""]}], "big": dice.getrandbits(60), "neg": -1, "truth": False},
        "größe": "\u0000\u0007\t\r\n\x7f",
    }
    return value, 0, True


def _highstate(dice: random.Random, minion: str) -> _Answer:
    states = {
        f"file_|-/etc/app/{n}.conf_|-/etc/app/{n}.conf_|-managed": {
            "name": f"/etc/app/{n}.conf",
            "changes": {"diff": f"--- \n+++ \n@@ -{n} +{n} @@\n-old {dice.random()}\n+new"} if n % 3 else {},
            "result": n != 7,
            "comment": f"File /etc/app/{n}.conf is in the correct state",
            "duration": round(dice.random() * 100, 3),
            "start_time": f"12:00:{n:02d}.000000",
            "__run_num__": n,
            "__sls__": "app",
        }
        for n in range(dice.randint(15, 25))
    }
    return states, 2, False


def _failure(dice: random.Random, minion: str) -> _Answer:
    retcode = dice.choice([1, 2, 127, 255])
    return {"pid": dice.randrange(1, 65536), "retcode": retcode, "stdout": "", "stderr": "no"}, retcode, False


class _Pace:
    """Holds the main thread back to the rate that was asked for."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._due = time.monotonic()

    def wait(self, returns: int, stop: threading.Event) -> None:
        if self._rate:
            self._due = max(self._due + returns / self._rate, time.monotonic() - 1.0)
            stop.wait(max(0.0, self._due - time.monotonic()))


class _Requests:
    """The simulated minions: a few threads, each sending for its own share of them."""

    def __init__(self, load: Load, master: Mapping[str, Any], directory: Path, ledger: _Ledger) -> None:
        self._load = load
        self._ledger = ledger
        self._queues: list[queue.Queue[tuple[Return, ...] | None]] = [queue.Queue(20) for _ in range(_WORKERS)]
        self._gone = threading.Event()
        self._places = {minion: number % _WORKERS for number, minion in enumerate(_ids(load))}
        ready = threading.Barrier(_WORKERS + 1)
        self._opts = {minion: minion_opts(minion, master, directory) for minion in self._places}
        self._threads = [
            threading.Thread(target=self._work, args=(place, ready), daemon=True) for place in range(_WORKERS)
        ]
        import salt.channel.client  # here, and not by several threads at a time

        assert salt.channel.client
        for thread in self._threads:
            thread.start()
        try:
            ready.wait(_READY_SECONDS)
        except threading.BrokenBarrierError:
            # A file of Salt's client that an earlier process left half written would keep it from ever getting through.
            print("not ready; beginning anew", file=sys.stderr, flush=True)
            os.execv(sys.executable, [sys.executable, "-m", "tests.support.producer", *sys.argv[1:]])

    def send(self, ret: Return, *after: Return) -> None:
        """Hand a return, and what its minion sends after it, to that minion; waits while it is busy."""
        self._queues[self._places[ret.id]].put((ret, *after))

    def finish(self) -> None:
        """Until everything was accepted, or the time is up."""
        for each in self._queues:
            each.put(None)
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._gone.set()

    def _work(self, place: int, ready: threading.Barrier) -> None:
        import salt.channel.client

        with contextlib.ExitStack() as stack:
            channels = {}
            for minion in (minion for minion, at in self._places.items() if at == place):
                channels[minion] = stack.enter_context(
                    salt.channel.client.ReqChannel.factory(self._opts[minion], crypt="aes")
                )
                tag = f"salt/minion/{minion}/start"
                self._ask(channels[minion], {"cmd": "_minion_event", "id": minion, "tag": tag, "data": "started"})
            with contextlib.suppress(threading.BrokenBarrierError):
                ready.wait()
            while (task := self._queues[place].get()) is not None:
                ret, *after = task
                if self._ask(channels[ret.id], ret.event()):
                    self._ledger.accept(ret)
                for again in after:
                    self._ask(channels[ret.id], again.event())

    def _ask(self, channel: Any, load: dict[str, Any]) -> bool:
        """Send until the master has answered. It answers a return with ``None``; ``""`` is a fault of its own."""
        while not self._gone.is_set():
            try:
                answer = channel.send(dict(load), timeout=_ANSWER_SECONDS, tries=1)
            except Exception as exc:  # noqa: BLE001 (whatever ails Salt's client, there was no answer)
                print(f"{load['id']}: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
            else:
                if answer is None or answer is True:
                    return True
                print(f"{load['id']}: {answer!r}", file=sys.stderr, flush=True)
            self._gone.wait(0.2)
        return False


def minion_opts(minion: str, master: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Options of a minion of ``master`` (its options) that only ever sends; its key and files are in ``directory``.

    For a process that may import Salt.
    """
    import salt.config

    root = directory / minion
    for name in ("pki", "run"):
        (root / name).mkdir(parents=True, exist_ok=True)
    # What an earlier process of this minion was killed over, half written: "Invalid master key", for good.
    (root / "pki" / "minion_master.pub").unlink(missing_ok=True)
    overrides = {
        "root_dir": str(root),
        "pki_dir": str(root / "pki"),
        "cachedir": str(root / "cache"),
        "sock_dir": str(root / "run"),
        "id": minion,
        "user": master["user"],
        "transport": master["transport"],
        "master_ip": LOOPBACK,
        "master_port": master["ret_port"],
        "auth_timeout": _ANSWER_SECONDS,
        "auth_safemode": False,
        "auth_tries": 1,
        "acceptance_wait_time": 1,
    }
    opts: dict[str, Any] = salt.config.apply_minion_config(overrides, minion_id=minion)
    opts["master_uri"] = f"tcp://{LOOPBACK}:{master['ret_port']}"
    return opts


class _Bus:
    """What the master does with a job and with a return, done here."""

    def __init__(self, load: Load, opts: dict[str, Any], ledger: _Ledger) -> None:
        import salt.loader
        import salt.utils.event
        import salt.utils.jid

        self._load = load
        self._opts = opts
        self._ledger = ledger
        self._event = salt.utils.event.get_event("master", sock_dir=opts["sock_dir"], opts=opts, listen=False)
        self._gen_jid = salt.utils.jid.gen_jid
        self._cache = salt.loader.returners(opts, {})
        self._newest = ""
        os.fsync = _ignore  # type: ignore[assignment]  # half of the time for a return; nobody pulls a plug here

    def publish(self, job: _Job) -> str:
        """A job as ``ClearFuncs.publish`` prepares it (salt/master.py 3006-3008)."""
        jid = self._cache["local_cache.prep_jid"]() if self._load.cache else self._new_jid()
        load = {"jid": jid, "tgt": job.minions, "tgt_type": "list", "fun": job.fun, "arg": job.arg, "user": "root"}
        self._fire({**load, "minions": job.minions, "missing": []}, f"salt/job/{jid}/new")
        if self._load.cache:
            saved = {"cmd": "publish", "ret": "", "kwargs": {"delimiter": ":", "show_timeout": True}, **load}
            self._cache["local_cache.save_load"](jid, saved, minions=job.minions)
        return str(jid)

    def send(self, ret: Return, *after: Return) -> None:
        """Returns as ``store_job`` handles each (salt/utils/job.py 3006-3008): event first, then cache."""
        self._store(ret)
        self._ledger.accept(ret)
        for again in after:
            self._store(again)

    def _store(self, ret: Return) -> None:
        self._fire(ret.event(), f"salt/job/{ret.jid}/ret/{ret.id}")
        if self._load.cache:
            self._cache["local_cache.returner"](ret.event())

    def finish(self) -> None:
        """Close the connection to the bus."""
        self._event.destroy()

    def _new_jid(self) -> str:
        while (jid := self._gen_jid(self._opts)) <= self._newest:
            time.sleep(1e-6)
        self._newest = jid
        return str(jid)

    def _fire(self, data: dict[str, Any], tag: str) -> None:
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while not self._fired(data, tag):
            if time.monotonic() > deadline:
                raise ConnectionError(f"the master's event bus did not take {tag}")
            time.sleep(0.1)

    def _fired(self, data: dict[str, Any], tag: str) -> bool:
        try:
            return bool(self._event.fire_event(data, tag, timeout=_FIRE_TIMEOUT_MS))
        except Exception as exc:  # noqa: BLE001 (whatever ails Salt's client, there was no answer)
            print(f"bus: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
            return False


def _ignore(_fd: object) -> None:
    """A disk that need not be waited for."""


class _Publishing:
    """Publishes jobs through the master's request server, as ``salt`` does."""

    def __init__(self, opts: dict[str, Any]) -> None:
        self._opts = opts
        self._client: Any = None

    def publish(self, job: _Job, stop: threading.Event) -> str | None:
        """The jid that the master gave the job; ``None`` when it was too late."""
        import salt.client

        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while not (stop.is_set() and time.monotonic() > deadline):
            try:
                self._client = self._client or salt.client.LocalClient(mopts=self._opts)
                published = self._client.run_job(job.minions, job.fun, job.arg, tgt_type="list", timeout=5)
                if published:
                    return str(published["jid"])
            except Exception as exc:  # noqa: BLE001 (whatever ails Salt's client, there was no answer)
                print(f"publish: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
                self._client = None  # a master that was restarted has another key
            time.sleep(0.2)
        return None


def _wait_for_the_end(stop: threading.Event) -> None:
    os.read(sys.stdin.fileno(), 1)  # until whoever started this process closes it, or dies
    stop.set()


def _produce(config_dir: Path, ledger: _Ledger, load: Load) -> None:
    import salt.config

    stop = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(stop,), daemon=True).start()
    opts = salt.config.master_config(str(config_dir / "master"))
    bus = _Bus(load, opts, ledger) if load.bus > 0 else None
    requests = publishing = None
    if load.bus < 1:
        requests = _Requests(load, opts, config_dir.parent / "simulated", ledger)
        publishing = _Publishing(opts)
    pace = _Pace(load.rate)
    left = load.returns or None
    for job in _jobs(load):
        if stop.is_set() or left == 0:
            break
        way = bus if job.on_bus else requests
        assert way is not None
        if job.on_bus:
            assert bus is not None
            jid: str | None = bus.publish(job)
        else:
            assert publishing is not None
            jid = publishing.publish(job, stop)
        if jid is None:
            break
        for minion in itertools.islice(job.minions, left):
            ret = job.returned(jid, minion)
            ledger.offer(ret)
            after = [ret] if minion in job.twice else []
            if minion in job.contradicted:
                after.append(ret._replace(value="another answer"))
            way.send(ret, *after)
            left = left and left - 1
        pace.wait(len(job.minions), stop)
    for each in (requests, bus):
        if each is not None:
            each.finish()


if __name__ == "__main__":
    _produce(Path(sys.argv[1]), _Ledger(Path(sys.argv[2])), Load(**json.loads(sys.argv[3])))
