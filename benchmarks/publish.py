"""Fires job returns at a master's bus with Salt's own client, as fast as the bus takes them.

``python -m benchmarks.publish CONFIG_DIR FIRST COUNT``: the events numbered from FIRST on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.salt import Publisher

MINIONS_PER_JOB = 500


def returns(first: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Returns of ``test.ping``, 500 minions to a job, as a 3008 minion's look on the bus."""
    for number in range(first, first + count):
        jid = f"20260101{number // MINIONS_PER_JOB:012d}"
        minion = f"minion-{number % MINIONS_PER_JOB:04d}.example.com"
        yield (
            f"salt/job/{jid}/ret/{minion}",
            {
                "cmd": "_return",
                "id": minion,
                "success": True,
                "return": True,
                "retcode": 0,
                "jid": jid,
                "fun": "test.ping",
                "fun_args": [],
                "user": "root",
                "ts": int(time.time()),
            },
        )


if __name__ == "__main__":
    with Publisher(Path(sys.argv[1])) as publisher:
        publisher.fire_all(returns(int(sys.argv[2]), int(sys.argv[3])))
