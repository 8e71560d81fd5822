"""Processes that measure: each does what it is asked on its standard input, one JSON line at a time.

What is measured runs in a process of its own, so that its CPU time and memory are its own, and Salt's import hooks
and event loops stay out of the one that asks.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_REPOSITORY = Path(__file__).parents[1]


class Worker:
    """The process of ``python -m MODULE``; entered, it runs."""

    def __init__(self, module: str, *args: str) -> None:
        self._command = [sys.executable, "-m", f"benchmarks.workers.{module}", *args]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        self._process = subprocess.Popen(
            self._command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    def tell(self, function: str, /, **values: Any) -> None:
        """Ask without waiting; :meth:`answer` gives what comes back."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps([function, values]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, *, timeout: float = 600.0) -> Any:
        """The answer to the oldest question that has none yet.

        Raises:
            TimeoutError: it did not come; the process is killed, since it would answer the next one with it.
        """
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + timeout
        out = self._process.stdout.fileno()
        text = b""
        while not text.endswith(b"\n"):
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                raise TimeoutError(f"{' '.join(self._command[2:])}: no answer within {timeout:g} s")
            more = os.read(out, 1 << 20)
            if not more:
                raise RuntimeError(f"{' '.join(self._command[2:])} has ended ({self._process.wait()})")
            text += more
        value, error = json.loads(text)
        if error:
            raise RuntimeError(f"{' '.join(self._command[2:])}:\n{error}")
        return value

    def ask(self, function: str, /, *, timeout: float = 600.0, **values: Any) -> Any:
        """Call a function of the process; its answer."""
        self.tell(function, **values)
        return self.answer(timeout=timeout)


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """In the process: answers until its input ends. What is printed meanwhile goes to stderr."""
    out, sys.stdout = os.fdopen(os.dup(1), "wb", buffering=0), sys.stderr
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        name, values = json.loads(line)
        try:
            answer = [functions[name](**values), None]
        except Exception:  # noqa: BLE001 (the asker judges it)
            answer = [None, traceback.format_exc()]
        out.write(json.dumps(answer, default=str).encode() + b"\n")
    os._exit(0)  # Salt's clients and threads that hang have no clean end


def cpu() -> float:
    """User and system seconds of this process, all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mb() -> float:
    """The most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
