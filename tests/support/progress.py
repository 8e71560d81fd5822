"""A progress bar, on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Final

_WIDTH: Final = 30
_AGAIN_SECONDS: Final = 0.1


class Progress:
    """Shows how far of `total` something is, on the terminal's standard error; elsewhere it is silent."""

    def __init__(self, total: int, what: str) -> None:
        self._total = max(1, total)
        self._what = what
        self._began = time.monotonic()
        self._next = 0.0
        self._is_on = sys.stderr.isatty()

    def show(self, done: int, more: str = "") -> None:
        """So many are done."""
        now = time.monotonic()
        if not self._is_on or (now < self._next and done < self._total):
            return
        self._next = now + _AGAIN_SECONDS
        share = min(1.0, done / self._total)
        bar = "#" * round(share * _WIDTH)
        seconds = now - self._began
        left = f", {seconds / done * (self._total - done):.0f} s left" if done else ""
        line = f"[{bar:<{_WIDTH}}] {share:4.0%} {done:,} of {self._total:,} {self._what}{left} {more}"
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The line is left as it is."""
        if self._is_on:
            print(file=sys.stderr)
