"""Simulated minions of one master, each with a key of its own, that answer jobs over the real request channel.

``python -m benchmarks.workers.minions CONFIG_DIR FOLDER COUNT``: keys are in FOLDER.
"""

from __future__ import annotations

import queue
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import salt.channel.client
import salt.client
import salt.config

from benchmarks import payloads
from benchmarks.worker import serve
from tests.support.producer import minion_opts

_THREADS = 4
_ANSWER_SECONDS = 60

OPTS = salt.config.master_config(str(Path(sys.argv[1]) / "master"))
FOLDER, COUNT = Path(sys.argv[2]), int(sys.argv[3])
IDS = [f"minion-{number:03d}.example.com" for number in range(COUNT)]
_tasks: list[queue.Queue[dict[str, Any] | None]] = [queue.Queue() for _ in range(_THREADS)]
_done: queue.Queue[float | BaseException] = queue.Queue()
_client: salt.client.LocalClient | None = None


def connect() -> int:
    """Every minion logs in."""
    opts = {minion: minion_opts(minion, OPTS, FOLDER) for minion in IDS}
    for place in range(_THREADS):
        mine = {minion: opts[minion] for minion in IDS[place::_THREADS]}
        threading.Thread(target=_work, args=(place, mine), daemon=True).start()
    for _ in range(_THREADS):
        _taken()
    return COUNT


def _work(place: int, opts: dict[str, dict[str, Any]]) -> None:
    try:
        channels = {}
        for minion, its in opts.items():
            channel = channels[minion] = salt.channel.client.ReqChannel.factory(its, crypt="aes")
            load = {"cmd": "_minion_event", "id": minion, "tag": f"salt/minion/{minion}/start", "data": "started"}
            channel.send(load, timeout=_ANSWER_SECONDS, tries=3)
        _done.put(0.0)
        while (load := _tasks[place].get()) is not None:
            began = time.perf_counter()
            answer = channels[load["id"]].send(load, timeout=_ANSWER_SECONDS, tries=1)
            assert answer is None or answer is True, answer
            _done.put(time.perf_counter() - began)
    except BaseException as exc:  # noqa: BLE001 (told where it is waited for)
        _done.put(exc)


def _taken() -> float:
    got = _done.get()
    if isinstance(got, BaseException):
        raise got
    return got


def jobs(count: int, kind: str, returns: int) -> dict[str, Any]:
    """Publishes jobs as ``salt`` does and answers each from so many minions: seconds of each publish, of all, of each
    return until the master had answered."""
    global _client
    fun, arguments, value = payloads.answer(kind)
    publishes, answered = [], []
    began = time.perf_counter()
    for _ in range(count):
        one = time.perf_counter()
        _client = _client or salt.client.LocalClient(mopts=OPTS)
        jid = _client.run_job(IDS, fun, arguments, tgt_type="list", timeout=_ANSWER_SECONDS)["jid"]
        publishes.append(time.perf_counter() - one)
        for number, minion in enumerate(IDS[:returns]):
            _tasks[number % _THREADS].put(
                {
                    "cmd": "_return",
                    "id": minion,
                    "success": True,
                    "return": value,
                    "retcode": 0,
                    "jid": jid,
                    "fun": fun,
                    "fun_args": arguments,
                    "user": "root",
                }
            )
        answered += [_taken() for _ in range(returns)]
    return {
        "publish": statistics.mean(publishes),
        "seconds": time.perf_counter() - began,
        "answer": statistics.mean(answered),
    }


if __name__ == "__main__":
    serve({"connect": connect, "jobs": jobs})
