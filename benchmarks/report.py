"""What the suites measured, as figures, a table and a guard: pure, and knows no suite.

A figure has one value for each round. What stands in the table is the median, with the least and the most beside it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WORSE = 0.25
"""By so much may a guarded ratio be worse than the committed one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table.

    ``goal``: what the median is to reach, or with ``each`` every round: at most, or with ``more`` at least.
    ``guarded``: a ratio within one run, which ``--quick`` compares with the committed one.
    """

    name: str
    rounds: tuple[float, ...]
    unit: str = ""
    goal: float | None = None
    more: bool = False
    each: bool = False
    guarded: bool = False

    def __post_init__(self) -> None:
        """Refuses a figure that nothing was measured for."""
        if not self.rounds:
            raise ValueError(f"{self.name}: no round")

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; ``None`` without one."""
        if self.goal is None:
            return None
        if self.more:
            return (min(self.rounds) if self.each else self.median) >= self.goal
        return (max(self.rounds) if self.each else self.median) <= self.goal

    def as_json(self) -> dict[str, Any]:
        """Without what has its default."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name in ("name", "rounds") or value != default[name]
        }


def figure(saved: Mapping[str, Any]) -> Figure:
    """A figure from its JSON."""
    return Figure(**{**saved, "rounds": tuple(saved["rounds"])})


def ratio(
    name: str,
    ours: Iterable[float],
    theirs: Iterable[float],
    *,
    goal: float | None = None,
    more: bool = False,
    guarded: bool = False,
) -> Figure:
    """Round by round, what was measured side by side."""
    rounds = tuple(our / their for our, their in zip(ours, theirs, strict=True))
    return Figure(name=name, rounds=rounds, unit="x", goal=goal, more=more, guarded=guarded)


def percentile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def number(value: float) -> str:
    """Three digits that count, and no more than a reader needs."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def table(figures: Sequence[Figure]) -> str:
    """Markdown: median, least and most of each figure, and what is to be reached."""
    lines = ["| figure | median | least | most | to reach | |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for each in figures:
        values = (each.median, min(each.rounds), max(each.rounds))
        name = f"{each.name}, {each.unit}" if each.unit and each.unit != "x" else each.name
        goal = "" if each.goal is None else f"{'≥' if each.more else '≤'} {number(each.goal)}"
        if each.each and goal:
            goal += " always"
        said = {None: "", True: "reached", False: "**missed**"}[each.reached]
        lines.append(f"| {name} | {' | '.join(map(number, values))} | {goal} | {said} |")
    return "\n".join(lines)


def worse(fresh: Iterable[Figure], committed: Iterable[Figure]) -> list[str]:
    """A sentence for each guarded ratio that is worse than the committed one by more than :data:`WORSE`."""
    before = {each.name: each for each in committed}
    said = []
    for each in fresh:
        old = before.get(each.name)
        if not each.guarded or old is None:
            continue
        is_worse = each.median < old.median / (1 + WORSE) if each.more else each.median > old.median * (1 + WORSE)
        if is_worse:
            said.append(f"{each.name}: {number(each.median)}, committed {number(old.median)}")
    return said


def section(name: str, about: str, result: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """A suite's part of RESULTS.md: what it does, the command, the machine, the table."""
    lines = [f"## {name}", "", about, "", f"`{result['command']}`: {result['machine']}.", ""]
    lines += [table([figure(each) for each in result["figures"]]), ""]
    for picture in pictures:
        lines += [f"![{name}]({picture})", ""]
    return "\n".join(lines)


def load(text: str) -> dict[str, dict[str, Any]]:
    """``results.json``: by kind of run (``full``, ``quick``), then by suite. What is of another form is dropped."""
    try:
        saved = json.loads(text)
    except ValueError:
        saved = {}
    return {kind: dict(saved.get(kind) or {}) for kind in ("full", "quick")}
