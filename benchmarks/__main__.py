"""``python -m benchmarks``: the suites, in one run on a private MariaDB and private masters.

Prints each suite's table. With ``--save`` what was measured takes its place in ``results.json``, and ``RESULTS.md``
and the plots are made anew from that: a suite's figures all come from the one run whose command stands beside them.
With ``--quick`` everything is small, and ratios are compared with the committed ones of such a run: one that is worse
by a quarter twice in a row is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, suites
from benchmarks.lab import Bench
from benchmarks.report import figure

HERE = Path(__file__).parent
RESULTS, TABLE, PLOTS = HERE / "results.json", HERE / "RESULTS.md", HERE / "plots"
NOTES = HERE / "NOT_REACHED.md"
"""Ends RESULTS.md: written by people."""
_ALL = (*suites.NAMES, *suites.ASKED_FOR)


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", action="append", choices=_ALL, help="only this one; may be given again")
    parser.add_argument("--quick", action="store_true", help="small, and compared with the committed ratios")
    parser.add_argument("--save", action="store_true", help="write results.json, RESULTS.md and the plots")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever was started is ended
    kind = "quick" if args.quick else "full"
    saved = report.load(RESULTS.read_text() if RESULTS.exists() else "")
    names = args.suite or (suites.GUARDED if args.quick else suites.NAMES)
    results, failed = _measure(names, saved, quick=args.quick, compare=not args.save)
    if args.save:
        saved[kind].update(results)
        save(saved)
    for each in failed:
        print(f"worse by more than {report.WORSE:.0%}: {each}", file=sys.stderr)
    return 1 if failed else 0


def _measure(
    names: Sequence[str], saved: dict[str, dict[str, Any]], *, quick: bool, compare: bool
) -> tuple[dict[str, Any], list[str]]:
    """Each suite's result, and what failed."""
    results: dict[str, Any] = {}
    failed: list[str] = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mjc-bench-")))
        bench = Bench(folder, stack, quick=quick)
        machine = bench.machine()
        for name in [name for name in _ALL if name in names]:
            result = _run(bench, name, machine)
            if quick and compare and name in saved["quick"]:
                # A busy moment of the machine spoils a round; what is slower is slower twice.
                if _worse(result, saved["quick"][name]):
                    bench.say(f"{name} once more: {'; '.join(_worse(result, saved['quick'][name]))}")
                    result = _run(bench, name, machine)
                failed += [f"{name}, {each}" for each in _worse(result, saved["quick"][name])]
            results[name] = result
    print(f"» {len(results)} suites in {time.monotonic() - began:.0f} s")
    return results, failed


def _run(bench: Bench, name: str, machine: str) -> dict[str, Any]:
    bench.say(f"{name}")
    began = time.monotonic()
    figures = suites.suite(name).run(bench)
    seconds = time.monotonic() - began
    print(f"\n{name}, {seconds:.0f} s\n\n{report.table(figures)}\n", flush=True)
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "machine": machine,
        "seconds": round(seconds, 1),
        "figures": [each.as_json() for each in figures],
    }


def _worse(result: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    return report.worse(map(figure, result["figures"]), map(figure, committed["figures"]))


def save(saved: dict[str, dict[str, Any]]) -> None:
    """Writes the three files."""
    from benchmarks import plots  # needs matplotlib

    RESULTS.write_text(json.dumps(saved, indent=1) + "\n")
    parts = [f"# Results\n\n{_INTRODUCTION}\n"]
    for name in _ALL:
        result = saved["full"].get(name) or saved["quick"].get(name)
        if result is not None:
            about = (suites.suite(name).__doc__ or "").strip()
            parts.append(report.section(name, about, result, plots.draw(name, result, PLOTS)))
    parts.append(NOTES.read_text())
    TABLE.write_text("\n".join(parts))


_INTRODUCTION = """Made by `make bench`. Each table is one run of one suite: its command and the machine stand above it.
A figure is measured in rounds, those that are compared taking turns; the median, the least and the most of the rounds
are given. A ratio is made round by round. CPU is user and system time of the one process, all its threads."""


if __name__ == "__main__":
    sys.exit(main())
