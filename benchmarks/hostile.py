"""Events that cost far more than their bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from tests.support.shipping import returned


def _text(data: bytes) -> bytes:
    return b"\xdb" + len(data).to_bytes(4, "big") + data


VALUES: Final[dict[str, Callable[[], bytes]]] = {
    "6.3 MB that are no UTF-8": lambda: _text(random.Random(1).randbytes(6_300_000)),
    "1.2 MB that are no UTF-8": lambda: _text(random.Random(1).randbytes(1_200_000)),
    "7 MB of text": lambda: _text(b"0123456789abcde\n" * 437_500),
    "12 MB of empty maps": lambda: b"\xdd" + (12_000_000).to_bytes(4, "big") + b"\x80" * 12_000_000,
    "40 MB": lambda: _text(b"x" * 40_000_000),
    "lists in lists": lambda: b"\xdd" + (1000).to_bytes(4, "big") + (b"\x91" * 400 + b"\x90") * 1000,
    "240,000 keys": lambda: b"\xdf"
    + (240_000).to_bytes(4, "big")
    + b"".join(b"\xa8%08d\xc0" % n for n in range(240_000)),
    "8 MB of control characters": lambda: _text(b"\x01" * 8_000_000),
}
"""A return's value, in msgpack."""


def event(what: str, job: str) -> bytes:
    """The return of ``web1`` for a job."""
    return returned(job, "web1", []).replace(b"\xa6return\x90", b"\xa6return" + VALUES[what]())


def letter(job: str) -> bytes:
    """An event of 10 MB."""
    return returned(job, "web1", "0123456789abcde\n" * 625_000)
