"""The runner's lists in a terminal: columns, and nothing that steers it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "_output" / "mysql_jobcache.py"

# In a process of its own: importing Salt leaves import hooks behind that warn on every later import.
SCRIPT = """
import json, runpy, sys
loaded = runpy.run_path(sys.argv[1], init_globals={"__opts__": {"color": False, "extension_modules": ""}})
print(json.dumps([loaded["output"](data) for data in json.load(sys.stdin)]))
"""


def shown(*data: Any) -> list[str]:
    """What the outputter makes of each."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(FILE)], input=json.dumps(data), capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


def test_lists_are_tables_and_everything_else_is_as_salt_shows_it() -> None:
    line = {"fun": "test.ping", "target": "*", "targeted": None, "answered": 12, "good": True}
    jobs, failures, hostile, wide, *others = shown(
        {"1": line, "20": {**line, "answered": 3, "good": False, "target": "web*"}},
        {"1": {"web1": {"retcode": 1, "reason": "no"}, "web22": {"retcode": 22, "reason": "x" * 100}}},
        {"1": {"fun": "\x1b[2J\nroot", "user": "a\tb"}},
        {"1": {"target": "w" * 300, "fun": "f"}},
        {"error": "it did not work", "retcode": 1},
        {},
        ["a"],
    )
    assert jobs.splitlines() == [
        "jid  fun        target  targeted  answered  good",
        "1    test.ping  *              -        12  yes",
        "20   test.ping  web*           -         3  no",
    ]
    assert failures.splitlines() == [
        "jid  minion  retcode  reason",
        "1    web1          1  no",
        "1    web22        22  " + "x" * 100,
    ]
    assert hostile.splitlines()[1:] == ["1    ?[2J?root  a?b"]
    assert wide.splitlines()[1] == "1    " + "w" * 37 + "...  f"
    assert "it did not work" in others[0]
    assert others[1:] == ["", "- a"]
