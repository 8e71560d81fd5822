"""By which time things are too old: a clock that jumps must not make them so."""

from __future__ import annotations

import pytest

from salt_mysql_engine import clock
from salt_mysql_engine.clock import Clock

DAY = 86_400.0


class Time:
    """The machine's two clocks."""

    def __init__(self) -> None:
        self.wall, self.passed = 1_800_000_000.0, 500.0

    def goes_on(self, seconds: float) -> None:
        self.wall += seconds
        self.passed += seconds

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.passed


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(clock, "time", made)
    return made


def test_a_clock_that_runs_on_is_the_wall_clock(time: Time) -> None:
    its = Clock()
    for seconds in (0.0, 1.0, 3 * DAY):
        time.goes_on(seconds)
        time.wall += 30.0  # as it is set right, a little at a time
        assert its.now() == time.wall


def test_a_clock_that_is_set_forward_is_believed_after_a_day(time: Time, caplog: pytest.LogCaptureFixture) -> None:
    its = Clock()
    for _ in range(2):
        was = time.wall
        time.wall += 300 * DAY
        assert its.now() == was
        time.goes_on(DAY - 1)
        assert its.now() == was + DAY - 1
        time.goes_on(1.0)
        assert its.now() == time.wall
    assert caplog.text.count("was set forward by 25920000 s") == 2


def test_a_clock_that_is_set_right_again_is_believed_at_once(time: Time) -> None:
    its = Clock()
    time.wall += 300 * DAY
    its.now()
    time.wall -= 300 * DAY
    time.goes_on(10.0)
    assert its.now() == time.wall
    time.wall -= 5 * DAY
    assert its.now() == time.wall
    was = time.wall
    time.wall += 300 * DAY
    time.goes_on(DAY - 1)
    assert its.now() == was + DAY - 1, "a day counts from when it was set forward"
