"""Events of all kinds, by seed, through everything from capture to a real server; `make fuzz` does many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import legs
from tests.support.scratch import Scratch

pytestmark = pytest.mark.faults

EVENTS = 20_000
SEED = 1
DEAR_BYTES = 2_000_000
SLACK_SECONDS = 2.0
"""The machine may be busy with other tests: what a stall may be is held by `make fuzz` and the benchmarks."""


@pytest.mark.parametrize("leg", range(len(legs.CONFIGS)))
def test_whatever_comes_the_books_balance_and_just_what_was_accepted_is_written(
    database: Scratch, tmp_path: Path, leg: int
) -> None:
    tally = legs.Tally()
    story = legs.story(SEED, leg, EVENTS // len(legs.CONFIGS), dear_bytes=DEAR_BYTES)
    legs.run(leg, story, database, tmp_path / "leg", tally)
    print(f"{tally.events} events, {tally.rows} rows; the loop stood still for {tally.stall:.3f} s at most")
    assert tally.rows > 1000
    assert tally.stall < SLACK_SECONDS
