"""A master's worker process as far as its job cache goes: ``store_job`` per return, and what a publish stores.

``python -m benchmarks.workers.storing OPTS``: the master's options as JSON, over Salt's defaults.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import salt.config
import salt.minion
import salt.utils.jid
import salt.utils.job

from benchmarks import payloads
from benchmarks.worker import cpu, serve
from salt_mysql_engine import spool

OPTS: dict[str, Any] = {**salt.config.DEFAULT_MASTER_OPTS, "grains": {}, **json.loads(sys.argv[1])}
for _name in ("cachedir", "sock_dir"):
    Path(OPTS[_name]).mkdir(parents=True, exist_ok=True)
logging.disable(logging.CRITICAL)  # a cache whose database is away says so for every return
MMINION = salt.minion.MasterMinion(OPTS, states=False, rend=False)
CACHE = MMINION.returners
_newest = 0


def _publish(minions: list[str], fun: str, arguments: list[Any]) -> str:
    """What ``ClearFuncs.publish`` does with the job cache (salt/master.py 3006-3008)."""
    name = OPTS["master_job_cache"]
    jid = str(CACHE[f"{name}.prep_jid"](nocache=False, passed_jid=None))
    load = {
        "cmd": "publish",
        "tgt": "*",
        "fun": fun,
        "arg": arguments,
        "tgt_type": "glob",
        "jid": jid,
        "ret": "",
        "user": "root",
        "kwargs": {"delimiter": ":", "show_timeout": True, "show_jid": False},
    }
    with contextlib.suppress(Exception):  # Salt logs it and goes on
        CACHE[f"{name}.save_load"](jid, load, minions=minions)
    return jid


def job(kind: str, returns: int) -> dict[str, Any]:
    """One job and so many returns of it: seconds of the publish, wall and CPU seconds of the returns."""
    fun, arguments, value = payloads.answer(kind)
    minions = [f"minion-{number:04d}.example.com" for number in range(returns)]
    began = time.perf_counter()
    jid = _publish(minions, fun, arguments)
    publish = time.perf_counter() - began
    loads = [
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
            "_stamp": "2026-01-01T01:30:00.123456",
        }
        for minion in minions
    ]
    slowest, used, began = 0.0, cpu(), time.perf_counter()
    for load in loads:
        one = time.perf_counter()
        salt.utils.job.store_job(OPTS, load, event=None, mminion=MMINION)
        slowest = max(slowest, time.perf_counter() - one)
    return {
        "publish": publish,
        "seconds": time.perf_counter() - began,
        "cpu": cpu() - used,
        "slowest": slowest,
    }


def ours(returns: int) -> dict[str, float]:
    """What ``mysql_jobcache`` itself does for a ping, without Salt's ``store_job`` and loader: CPU seconds a return."""
    hand = spool.of(OPTS)
    jid = salt.utils.jid.gen_jid(OPTS)
    loads = [
        {
            "cmd": "_return", "id": f"minion-{number:04d}.example.com", "success": True, "return": True, "retcode": 0,
            "jid": jid, "fun": "test.ping", "fun_args": [], "user": "root", "_stamp": "2026-01-01T01:30:00.123456",
        }
        for number in range(returns)
    ]  # fmt: skip
    began = time.thread_time()
    for load in loads:
        hand.returned(load)
    return {"cpu": (time.thread_time() - began) / returns}


if __name__ == "__main__":
    serve({"job": job, "ours": ours})
