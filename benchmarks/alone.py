"""``python -m benchmarks.alone KIND COUNT [TIMES]``: a journal of so many returns becomes rows, in this process and
without peers. Something to put a profiler on:

``py-spy record --gil --rate 500 --format raw --output profile.txt -- python -m benchmarks.alone ping 100000 6``
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.lab import Bench, empty, forget
from benchmarks.suites.drain import fill
from benchmarks.workers import ship
from salt_mysql_engine.engine import spare_collector


def main(kind: str, count: int, times: int = 3) -> None:
    """Prints rows a second and the CPU of a row, for each time."""
    spare_collector()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mjc-alone-")))
        bench = Bench(folder, stack, quick=True)
        mysql = bench.database("alone")
        fill(folder / "full", count, kind)
        for _ in range(times):
            empty(bench.db, "alone")
            shutil.copytree(folder / "full", folder / "journal")
            done = ship.drain(str(folder / "journal"), mysql, {})
            forget(folder / "journal")
            assert done["books"]["written"] == count, done["books"]
            rows, cpu = count / done["seconds"], done["cpu"] / count * 1e6
            print(f"{kind}: {rows:,.0f} rows a second, {cpu:.1f} µs of CPU a row, {done['peak_mb']:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:]))
