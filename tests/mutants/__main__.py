"""``python -m tests.mutants``: changes the core in one place after the other, and asks its tests whether they notice.

Each worker has a copy of the tree. What lives is shown as a table; a mutant that runs into the time limit is killed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.mutants.mutations import Mutant, difference, mutants, mutated
from tests.mutants.plan import PLAN
from tests.support.progress import Progress

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = "salt_mysql_engine"
_LEFT_BEHIND: Final = shutil.ignore_patterns(".git", ".local", ".hypothesis", "__pycache__", ".*_cache")
_UNIT_TESTS: Final = ("unit",)
_moments = itertools.count(1_000_000_000)


class Copy:
    """A copy of the tree in which one module at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, symlinks=True, ignore=_LEFT_BEHIND)

    def lives(self, mutant: Mutant, source: str, seconds: float, *, quick: bool) -> bool:
        """Whether no test notices the change."""
        self._write(mutant.module, mutated(mutant, source))
        try:
            plan = PLAN[mutant.module]
            asked = [plan.quick, _UNIT_TESTS] if quick else [plan.quick, _UNIT_TESTS, plan.then]
            return all(self.passes(files, seconds) for files in asked)
        finally:
            self._write(mutant.module, source)

    def _write(self, module: str, source: str) -> None:
        path = self.folder / PACKAGE / f"{module}.py"
        path.write_text(source)
        moment = next(_moments)  # bytecode is known by its source's size and time in seconds
        os.utime(path, (moment, moment))

    def passes(self, files: Iterable[str], seconds: float) -> bool:
        """Whether the tests in some files, those that there are, pass."""
        there = [f"tests/{name}" for name in files if (self.folder / "tests" / name).exists()]
        if not there:
            return True
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *there]
        env = {**os.environ, "PYTHONPATH": str(self.folder)}
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # so that its servers end with it
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def main() -> int:
    """Runs a sample, prints what lives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="so many of all; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--module", action="append", choices=sorted(PLAN), help="only this one; may be given again")
    parser.add_argument("--line", type=int, action="append", help="only mutants of this line; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=300.0, help="after which a mutant is killed")
    parser.add_argument("--quick", action="store_true", help="ask the unit tests alone")
    parser.add_argument("--unchecked", action="store_true", help="take it that the tests pass as it is")
    parser.add_argument("--out", choices=("table", "json"), default="table")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    modules = [name for name in args.module or PLAN if (ROOT / PACKAGE / f"{name}.py").exists()]
    sources = {name: (ROOT / PACKAGE / f"{name}.py").read_text() for name in modules}
    every = [mutant for name in modules for mutant in mutants(name, sources[name])]
    if args.line:
        every = [mutant for mutant in every if mutant.line in args.line]
    sample = random.Random(args.seed).sample(every, min(args.sample or len(every), len(every)))
    print(f"{len(sample)} of {len(every)} mutants of {len(modules)} modules, seed {args.seed}", file=sys.stderr)
    began = time.monotonic()
    if not args.unchecked:
        _check({mutant.module for mutant in sample}, args.seconds, quick=args.quick)
    living = _run(sample, sources, jobs=args.jobs, seconds=args.seconds, quick=args.quick)
    seconds = time.monotonic() - began
    killed = len(sample) - len(living)
    lines: list[dict[str, Any]] = [
        {"module": each.module, "line": each.line, "what": each.what, "diff": difference(each, sources[each.module])}
        for each in sorted(living, key=lambda each: (each.module, each.line))
    ]
    if args.out == "json":
        print(json.dumps({"mutants": len(sample), "killed": killed, "seconds": round(seconds), "living": lines}))
    else:
        for line in lines:
            print(f"{line['module']}.py:{line['line']:<5} {line['what']:<20} {line['diff']}")
        print(f"{killed} of {len(sample)} killed ({killed / max(1, len(sample)):.0%}) in {seconds:.0f} s")
    return 0


def _check(modules: Iterable[str], seconds: float, *, quick: bool) -> None:
    """Makes sure that the tests pass where nothing is changed."""
    with tempfile.TemporaryDirectory(prefix="mjc-mutants-") as folder:
        copy = Copy(Path(folder) / "copy")
        files = {name for module in modules for names in PLAN[module][: 1 if quick else 2] for name in names}
        for name in sorted(files):
            if not copy.passes([name], seconds):
                raise RuntimeError(f"tests/{name} fails as it is, or takes more than {seconds:g} s")


def _run(sample: Sequence[Mutant], sources: dict[str, str], *, jobs: int, seconds: float, quick: bool) -> list[Mutant]:
    """The mutants that no test notices."""
    living: list[Mutant] = []
    progress = Progress(len(sample), "mutants")
    with tempfile.TemporaryDirectory(prefix="mjc-mutants-") as folder:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(Path(folder) / str(number)))

        def ask(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return copy.lives(mutant, sources[mutant.module], seconds, quick=quick)
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            asked = {pool.submit(ask, mutant): mutant for mutant in sample}
            for done, future in enumerate(concurrent.futures.as_completed(asked), 1):
                if future.result():
                    living.append(asked[future])
                    print(f"\n{done} of {len(sample)}: {asked[future]} lives", file=sys.stderr)
                progress.show(done, f"{len(living)} live")
    progress.end()
    return living


if __name__ == "__main__":
    sys.exit(main())
