"""`mysql_jobcache.migrate` in a process of its own, for tests that kill it. Its argument: the master's opts as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

SMALL_CHUNK: Final = 10
"""Rows: so that a few thousand are copied in many steps."""


def start(opts: Mapping[str, Any]) -> subprocess.Popen[str]:
    """Begin, or go on with, a migration in small steps."""
    command = [sys.executable, "-m", __name__, json.dumps(opts)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def small_steps() -> None:
    """Chunks of this process's migrations stay small."""
    from salt_mysql_engine import shadow

    shadow._CHUNK_FIRST = shadow._CHUNK_LEAST = shadow._CHUNK_MOST = SMALL_CHUNK


def _main() -> None:
    from salt_mysql_engine import upkeep

    small_steps()
    print(json.dumps(upkeep.migrate(json.loads(sys.argv[1]), False, [].append)))


if __name__ == "__main__":
    _main()
