"""The suites' plots, each as PNG and SVG: medians as bars, from the least round to the most as whiskers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib

matplotlib.use("svg")  # no display
matplotlib.rcParams["svg.hashsalt"] = "mysql_jobcache"  # the same figures make the same file

import matplotlib.pyplot as plt  # noqa: E402 (after the choice above)

from benchmarks.report import Figure, figure, number  # noqa: E402 (as above)

_OURS, _THEIRS = "#2a6fbb", "#b5b5b5"


class Plot(NamedTuple):
    """Which figures of a suite stand in a plot; ``pattern`` takes their names, its first group is the bar's label."""

    title: str
    pattern: str
    unit: str
    log: bool = False


PLOTS: Final[Mapping[str, Sequence[Plot]]] = {
    "reading": [
        Plot(
            "A question to the tables",
            r"(get_.*, (?:ours|saltext.mysql)|lookup_jid of .*|SELECT .* rows)",
            "ms",
            log=True,
        )
    ],
    "handoff": [Plot("What a return costs a worker of the master", r"(.*: store_job per return, .*)", "µs", log=True)],
    "drain": [
        Plot("Pings from the journal to rows", r"ping: (.*), rows a second", "rows a second"),
        Plot("Highstates from the journal to rows", r"highstate: (.*), rows a second", "rows a second"),
    ],
    "sizes": [Plot("What batch_size is worth", r"(batch_size .*): rows a second", "rows a second", log=True)],
    "bus": [Plot("CPU of an event", r"(.*), CPU an event", "µs")],
    "master": [Plot("Jobs of 50 minions a second", r"(.*: jobs of 50 minions a second, .*)", "jobs a second")],
}


def draw(suite: str, result: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes a suite's plots; gives their paths as RESULTS.md names them."""
    figures = [figure(each) for each in result["figures"]]
    paths = []
    for place, plot in enumerate(PLOTS.get(suite, ())):
        bars = [
            (found[1].replace(": jobs of 50 minions a second, ", ": ").replace(": store_job per return, ", ": "), each)
            for each in figures
            if each.unit != "x" and (found := re.fullmatch(plot.pattern, each.name))
        ]
        if bars:
            name = f"{suite}-{place + 1}" if place else suite
            _draw(plot, bars, folder, name)
            paths.append(f"{folder.name}/{name}.svg")
    return paths


def _draw(plot: Plot, bars: Sequence[tuple[str, Figure]], folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    shown, axes = plt.subplots(figsize=(8, 0.9 + 0.32 * len(bars)))
    medians = [each.median for _, each in bars]
    whiskers = (
        [each.median - min(each.rounds) for _, each in bars],
        [max(each.rounds) - each.median for _, each in bars],
    )
    colours = [_OURS if re.search(r"engine|ours|mysql_jobcache|lookup_jid", label) else _THEIRS for label, _ in bars]
    axes.barh([label for label, _ in bars], medians, color=colours, xerr=whiskers, ecolor="#444444", capsize=2)
    axes.invert_yaxis()
    if plot.log:
        axes.set_xscale("log")
    for place, (_, each) in enumerate(bars):
        axes.annotate(number(each.median), (max(each.rounds), place), (4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)
    axes.set_xlabel(plot.unit + (", logarithmic" if plot.log else ""))
    axes.set_title(plot.title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {}
        shown.savefig(folder / f"{name}.{kind}", bbox_inches="tight", dpi=120, metadata=metadata)
    plt.close(shown)
