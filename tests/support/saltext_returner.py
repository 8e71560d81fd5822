"""Calls saltext.mysql's returner through Salt's own loader, in a process of its own.

Importing Salt leaves import hooks behind that warn on every later import, so pytest's process must not.
On stdin a msgpack map: `opts` laid over the master's defaults, and `calls`, a list of (function, arguments). On stdout
a list with each call's error, null where there was none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

Call = tuple[str, Sequence[Any]]


def documented_schema() -> list[str]:
    """The CREATE TABLE statements of the returner's docstring."""
    spec = importlib.util.find_spec("saltext.mysql")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = (Path(next(iter(spec.submodule_search_locations))) / "returners" / "mysql.py").read_text()
    return re.findall(r"^ *(CREATE TABLE .*?);$", source, flags=re.MULTILINE | re.DOTALL)


def call(opts: Mapping[str, Any], calls: Iterable[Call]) -> list[str | None]:
    """Run the calls in a new process; gives the error of each."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=msgpack.packb({"opts": opts, "calls": list(calls)}),
        capture_output=True,
        check=False,
        timeout=60,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode())
    return list(msgpack.unpackb(done.stdout))


def _main() -> None:
    import salt.config
    import salt.loader

    out, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    request = msgpack.unpackb(sys.stdin.buffer.read(), strict_map_key=False)
    opts = salt.config.DEFAULT_MASTER_OPTS.copy() | {"grains": {}} | request["opts"]
    returners = salt.loader.returners(opts, salt.loader.minion_mods(opts))
    errors: list[str | None] = []
    for function, arguments in request["calls"]:
        try:
            returners[f"mysql.{function}"](*arguments)
        except Exception as error:  # noqa: BLE001 (the caller judges it)
            errors.append("".join(traceback.format_exception_only(error)).strip())
        else:
            errors.append(None)
    with out:
        out.write(msgpack.packb(errors))


if __name__ == "__main__":
    _main()
