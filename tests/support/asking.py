"""Asks a master's runners and returners many things in one process of Salt's, which `salt-run` asks one at a time.

Importing Salt leaves import hooks behind that warn on every later import, so pytest's process must not; and asking so
fires no event and makes no job, which `salt-run` does. Give `ask` a master's config file, or none for Salt's defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

PUBLISHED: Final = "$jid"
"""As an argument: the jid of the last `publish`."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One question; `kind` is runner, returner or publish (whose answer is the jid)."""

    kind: str
    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Answer(NamedTuple):
    """What came back, as JSON would show it (what it has no form for as Python's `repr`), or the error's own words."""

    value: Any
    error: str | None
    seconds: float


def runner(function: str, /, *args: Any, **kwargs: Any) -> Ask:
    """A runner's function, as in `jobs.list_jobs`."""
    return Ask("runner", function, args, kwargs)


def returner(function: str, /, *args: Any, **kwargs: Any) -> Ask:
    """A returner's function, as in `local_cache.get_load`."""
    return Ask("returner", function, args, kwargs)


def publish(target: str | Sequence[str], fun: str | Sequence[str], *args: Any, **kwargs: Any) -> Ask:
    """Publish a job and wait for nothing. `kwargs` are those of ``LocalClient.run_job``: `tgt_type`, `kwarg`, ..."""
    return Ask("publish", "", (target, fun, args), kwargs)


def ask(
    asks: Iterable[Ask], *, config: Path | None = None, opts: Mapping[str, Any] | None = None, timeout: float = 120.0
) -> list[Answer]:
    """Ask in a new process, one after the other; what Salt logs meanwhile goes to this process's stderr."""
    request = {
        "config": str(config) if config else None,
        "opts": dict(opts or {}),
        "asks": [dataclasses.astuple(each) for each in asks],
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    sys.stderr.writelines(line for line in done.stderr.splitlines(keepends=True) if "destroy()" not in line)
    return [Answer(*answer) for answer in json.loads(done.stdout)]


def values(answers: Iterable[Answer]) -> list[Any]:
    """The values alone, of answers without an error."""
    found = list(answers)
    assert [answer.error for answer in found if answer.error] == []
    return [answer.value for answer in found]


def _main() -> None:
    import salt.client
    import salt.config
    import salt.minion
    import salt.runner

    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    request = json.load(sys.stdin)
    if request["config"]:
        opts = salt.config.client_config(request["config"])
    else:
        opts = {**salt.config.DEFAULT_MASTER_OPTS, "grains": {}}
    opts.update(request["opts"])
    client = salt.runner.RunnerClient(opts)
    runners = client.functions
    returners = salt.minion.MasterMinion(opts).returners
    jid = ""

    def published(*args: Any, **kwargs: Any) -> str:
        nonlocal jid
        with salt.client.LocalClient(mopts=opts) as local:
            jid = local.run_job(*args, **kwargs)["jid"]
        return jid

    functions = {"runner": runners.__getitem__, "returner": returners.__getitem__, "publish": lambda _: published}
    answers: list[Answer] = []
    for kind, function, args, kwargs in request["asks"]:
        began = time.perf_counter()
        try:
            value = functions[kind](function)(*(jid if arg == PUBLISHED else arg for arg in args), **kwargs)
        except Exception as error:  # noqa: BLE001 (the caller judges it)
            answers.append(Answer(None, f"{type(error).__name__}: {error}", time.perf_counter() - began))
        else:
            answers.append(Answer(value, None, time.perf_counter() - began))
    if hasattr(client, "destroy"):  # 3008 asks for it
        client.destroy()
    with out:
        json.dump(answers, out, default=repr)


if __name__ == "__main__":
    _main()
