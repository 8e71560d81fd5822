"""The events that suites fire and journal: a ping, a highstate, and much output, as a 3008 master has them on its bus.

The highstate (``data/highstate.json``) is the return of a real ``state.apply`` of 20 states. Each minion's has its own
``start_time`` and ``duration`` of every state; in an ``unlike`` one a comment, too, is no other's.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgpack

MINIONS_PER_JOB: Final = 500
KINDS: Final = ("ping", "highstate", "unlike", "output")
_OUTPUT_BYTES: Final = 500_000


@functools.cache
def highstate() -> dict[str, Any]:
    """What ``state.apply`` returned."""
    states: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "highstate.json").read_text())
    return states


@functools.cache
def output() -> str:
    """What a talkative command printed."""
    line = '2026-11-22 21:42:27 web-0001 app[4711]: GET /orders/%06d?page=2 "200" 1532 bytes in 12.8 ms\n'
    lines = "".join(line % number for number in range(_OUTPUT_BYTES // len(line)))
    return lines[:_OUTPUT_BYTES]


def highstate_of(number: int, *, unlike: bool = False) -> dict[str, Any]:
    """What the minion of this number returned."""
    at = 36_000_000_000 + number % 1000 * 7_001_003  # microseconds of the day
    states = {}
    for place, (name, state) in enumerate(highstate().items()):
        took = round(state["duration"] * (1 + (number * 31 + place) % 97 / 100), 3)
        at += int(took * 1000) + 211
        seconds, micros = divmod(at, 1_000_000)
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{micros:06d}"
        states[name] = {**state, "start_time": clock, "duration": took}
    if unlike:
        states[name]["comment"] = f"{state['comment']} (#{number})"
    return states


def answer(kind: str, number: int = 0) -> tuple[str, list[Any], Any]:
    """Function, arguments and value."""
    if kind == "ping":
        return "test.ping", [], True
    if kind in ("highstate", "unlike"):
        return "state.apply", ["web"], highstate_of(number, unlike=kind == "unlike")
    return "cmd.run", ["cat /var/log/app.log"], output()


def jid(number: int) -> str:
    """The jid of the return of this number."""
    return f"20260101{number // MINIONS_PER_JOB:012d}"


def between(first: int, count: int) -> str:
    """The SQL condition that the returns from ``first`` on, and no others, meet; whole jobs."""
    return f"jid BETWEEN '{jid(first)}' AND '{jid(first + count - 1)}'"


def returns(first: int, count: int, kind: str = "ping") -> Iterator[tuple[str, dict[str, Any]]]:
    """Tag and payload of the returns numbered from ``first`` on, 500 minions to a job."""
    for number in range(first, first + count):
        fun, arguments, value = answer(kind, number)
        minion = f"minion-{number % MINIONS_PER_JOB:04d}.example.com"
        yield (
            f"salt/job/{jid(number)}/ret/{minion}",
            {
                "cmd": "_return",
                "id": minion,
                "success": True,
                "return": value,
                "retcode": 0,
                "jid": jid(number),
                "fun": fun,
                "fun_args": arguments,
                "user": "root",
                "ts": int(time.time()),
            },
        )


def bodies(first: int, count: int, kind: str = "ping") -> Iterator[tuple[str, str, bytes]]:
    """Jid, minion and the bytes on the bus; ``_stamp`` as Salt puts it in."""
    for tag, data in returns(first, count, kind):
        packed = msgpack.packb({**data, "_stamp": "2026-01-01T01:30:00.123456"}, use_bin_type=True)
        yield data["jid"], data["id"], tag.encode() + b"\n\n" + packed
