"""The parts of the benchmarks that only count: statistics, the table, the guard; and what is loaded and fired."""

from __future__ import annotations

import datetime
import json
import random
import types

import pytest

from benchmarks import __main__ as program
from benchmarks import loader, payloads, report, suites
from benchmarks.report import Figure, figure, ratio
from salt_mysql_engine import settings
from salt_mysql_engine.records import Selection


def test_a_ratio_is_made_round_by_round_and_not_of_medians() -> None:
    made = ratio("ours / theirs", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert made.rounds == (1.0, 2.0, 3.0)
    assert made.median == 2.0


def test_rounds_that_have_no_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio("ours / theirs", [1.0, 2.0], [1.0])


def test_a_figure_that_nothing_was_measured_for_is_refused() -> None:
    with pytest.raises(ValueError, match="no round"):
        Figure(name="lag", rounds=())


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({"goal": 2.0}, True),
        ({"goal": 1.9}, False),
        ({"goal": 2.0, "more": True}, True),
        ({"goal": 2.1, "more": True}, False),
        ({"goal": 2.0, "each": True}, False),
        ({"goal": 2.0, "each": True, "more": True}, False),
        ({"goal": 3.0, "each": True}, True),
        ({}, None),
    ],
)
def test_a_goal_is_for_the_median_or_for_every_round(changes: dict[str, float], reached: bool | None) -> None:
    assert Figure(name="x", rounds=(1.0, 2.0, 3.0), **changes).reached is reached  # type: ignore[arg-type]


def test_the_percentile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert report.percentile(values, 0.95) == 96.0
    assert report.percentile(values, 1.0) == 100.0
    assert report.percentile([7.0], 0.5) == 7.0


def test_the_table_gives_the_spread_and_says_what_was_missed() -> None:
    text = report.table([Figure(name="lag", rounds=(0.5, 0.7, 2.0), unit="s", goal=0.6)])
    assert "| lag, s | 0.70 | 0.50 | 2.00 | ≤ 0.60 | **missed** |" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567.8, "1,234,568"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")],
)
def test_numbers_have_the_digits_that_count(value: float, text: str) -> None:
    assert report.number(value) == text


def test_the_guard_tells_of_a_guarded_ratio_that_is_worse_by_more_than_a_quarter() -> None:
    def made(cpu: float, speed: float) -> list[Figure]:
        return [
            Figure(name="cpu", rounds=(cpu,), guarded=True),
            Figure(name="speed", rounds=(speed,), more=True, guarded=True),
            Figure(name="seconds", rounds=(cpu,)),
        ]

    assert report.worse(made(1.25, 0.8), made(1.0, 1.0)) == []
    assert report.worse(made(1.26, 1.0), made(1.0, 1.0)) == ["cpu: 1.26, committed 1.00"]
    assert report.worse(made(1.0, 0.79), made(1.0, 1.0)) == ["speed: 0.79, committed 1.00"]
    assert report.worse(made(9.0, 9.0), []) == []


class NoBench:
    """Starts nothing."""

    def __init__(self, *_: object, quick: bool) -> None:
        self.quick = quick
        self.said: list[str] = []

    def machine(self) -> str:
        return "none"

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(
    ("measured", "failed"),
    [
        ([1.2], []),
        ([1.3, 1.2], []),
        ([1.3, 1.4], ["bus, cpu: 1.40, committed 1.00"]),
    ],
)
def test_a_run_fails_only_for_what_is_worse_twice(
    monkeypatch: pytest.MonkeyPatch, measured: list[float], failed: list[str]
) -> None:
    left = list(measured)
    suite = types.SimpleNamespace(run=lambda _: [Figure(name="cpu", rounds=(left.pop(0),), guarded=True)])
    monkeypatch.setattr(program, "Bench", NoBench)
    monkeypatch.setattr(suites, "suite", lambda _: suite)
    committed = {"full": {}, "quick": {"bus": {"figures": [{"name": "cpu", "rounds": [1.0], "guarded": True}]}}}
    results, said = program._measure(["bus"], committed, quick=True, compare=True)
    assert said == failed
    assert left == []
    assert results["bus"]["figures"][0]["rounds"] == (measured[-1],)


def test_a_figure_comes_back_from_its_json_as_it_was() -> None:
    made = ratio("ours / theirs", [1.0, 2.0], [1.0, 1.0], goal=1.3, guarded=True)
    assert figure(json.loads(json.dumps(made.as_json()))) == made


def test_results_of_another_form_are_no_results() -> None:
    assert report.load("") == report.load("{") == report.load('{"bus": [1]}') == {"full": {}, "quick": {}}


def test_a_section_says_the_command_and_the_machine_beside_the_figures() -> None:
    result = {
        "command": "python -m benchmarks --suite bus",
        "machine": "2 cores",
        "figures": [{"name": "a", "rounds": [1]}],
    }
    text = report.section("bus", "What it does.", result, ["plots/bus.svg"])
    assert "`python -m benchmarks --suite bus`: 2 cores." in text
    assert "![bus](plots/bus.svg)" in text


def test_what_is_guarded_are_suites() -> None:
    assert set(suites.GUARDED) <= set(suites.NAMES)


@pytest.mark.parametrize(("returns", "jobs"), [(1_000_000, 20_000), (60_000, 1_000)])
def test_the_loaded_jobs_are_as_many_and_as_large_as_promised(returns: int, jobs: int) -> None:
    planned = loader._plan(random.Random(1), returns, jobs)
    assert len(planned) == jobs == len({job.jid for job in planned})
    assert sum(job.size for job in planned) == returns
    assert min(job.size for job in planned) == 1
    assert loader.BIG in [job.size for job in planned]
    assert max(job.size for job in planned) == max(loader.BIG, returns // 100)
    assert [job.jid for job in planned] == sorted(job.jid for job in planned)
    assert [job.fun for job in planned].count(loader.RARE) == 5


def test_the_loaded_texts_are_those_that_the_engine_would_write() -> None:
    selection = Selection(settings.combine({}, {}), master_id="master")
    moment = datetime.datetime(2026, 11, 22, 21, 42, 27, 130648)  # noqa: DTZ001 (as the loader has it: UTC)
    job = loader._Job(moment, "20261122214227130648", 2, 0, "cmd.run", "root", "*")
    ok = next(loader._returns([job], selection, random.Random(1)))
    failed = loader._text(job, selection, failed=True)
    fun, jid, value, minion, success, full, bad, altered = ok.rstrip("\n").split("\t")
    assert (fun, jid, minion, success, bad) == ("cmd.run", job.jid, loader.minion(0), "1", "0")
    assert json.loads(full)["return"] == json.loads(value)
    assert json.loads(full)["id"] == minion
    assert altered.startswith("2026-11-22 21:42:27")
    assert (failed.split("\t")[4], failed.split("\t")[6]) == ("0", "1")


def test_events_have_the_sizes_that_the_suites_name() -> None:
    sizes = {kind: len(next(payloads.bodies(0, 1, kind))[2]) for kind in payloads.KINDS}
    assert 200 < sizes["ping"] < 400
    assert 5_000 < sizes["highstate"] < 8_000
    assert 490_000 < sizes["output"] < 510_000
    assert len(payloads.highstate()) == 20


def test_neighbouring_rounds_share_no_job() -> None:
    first, second = payloads.between(0, 1_500), payloads.between(1_500, 1_500)
    assert first.split("'")[3] < second.split("'")[1]
