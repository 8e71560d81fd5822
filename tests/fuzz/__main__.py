"""``python -m tests.fuzz``: events of all kinds, by seed, through the engine's inside into a private MariaDB.

What must hold is said in ``legs.py``. A run that fails says the seed and the leg; ``--leg`` runs that one alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.fuzz import legs
from tests.support.mariadb import MariaDB
from tests.support.progress import Progress
from tests.support.scratch import scratch

LEG_EVENTS: Final = 20_000
STALL_SECONDS: Final = 0.25
DEAR_BYTES: Final = 8_000_000


def main() -> int:
    """Runs the legs, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--leg", type=int, help="only this one")
    parser.add_argument("--dear", type=int, default=DEAR_BYTES, help="bytes of the largest events")
    args = parser.parse_args()
    count = max(1, args.events // LEG_EVENTS)
    size = args.events // count if args.events < LEG_EVENTS else LEG_EVENTS
    numbers = range(count) if args.leg is None else [args.leg]
    print(f"fuzz: {len(numbers)} legs of {size:,} events, --seed {args.seed}", flush=True)
    began = time.monotonic()
    tally = legs.Tally()
    progress = Progress(size * len(numbers), "events")
    with (
        tempfile.TemporaryDirectory(prefix="mjc-fuzz-") as folder,
        MariaDB(Path(folder) / "server") as server,
        scratch(server) as database,
    ):
        for number in numbers:
            told = legs.story(args.seed, number, size, dear_bytes=args.dear)
            try:
                legs.run(
                    number,
                    told,
                    database,
                    Path(folder) / f"leg-{number}",
                    tally,
                    lambda events: progress.show(events, f"longest stall {tally.stall:.3f} s"),
                )
            except BaseException:
                progress.end()
                print(f"in leg {number}: python -m tests.fuzz --events {args.events} --seed {args.seed} --leg {number}")
                raise
            if not sys.stderr.isatty():
                print(f"leg {number}: {tally.events:,} events, {time.monotonic() - began:.0f} s", flush=True)
    progress.end()
    seconds = time.monotonic() - began
    books = ", ".join(f"{name} {number:,}" for name, number in tally.books.items())
    print(f"{tally.events:,} events, {tally.rows:,} rows in {seconds:.0f} s ({tally.events / seconds:,.0f}/s)")
    print(f"books: {books}")
    print(f"the loop stood still for {tally.stall:.3f} s at most (limit {STALL_SECONDS:g} s)")
    return 0 if tally.stall <= STALL_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
