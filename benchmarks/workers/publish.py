"""Fires job returns at a master's bus with Salt's own client, as fast as the bus takes them, or at a rate.

``python -m benchmarks.workers.publish CONFIG_DIR FIRST COUNT [KIND [RATE]]``: the returns numbered from FIRST on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import payloads
from tests.support.salt import Publisher


def paced(events: Iterator[tuple[str, dict[str, Any]]], rate: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many a second."""
    began = time.monotonic()
    for number, event in enumerate(events):
        if rate:
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
        yield event


def main(config_dir: str, first: str, count: str, kind: str = "ping", rate: str = "0") -> None:
    """Fires them."""
    with Publisher(Path(config_dir)) as publisher:
        publisher.fire_all(paced(payloads.returns(int(first), int(count), kind), float(rate)))


if __name__ == "__main__":
    main(*sys.argv[1:])
