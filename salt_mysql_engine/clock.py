"""The time by which things are too old: nobody gets that back."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

_STEP_SECONDS = 60.0
_BELIEVED_SECONDS = 86_400.0


class Clock:
    """The wall clock. One that is set forward is believed a day later, and one that is set back at once."""

    def __init__(self) -> None:
        self._wall, self._monotonic = time.time(), time.monotonic()
        self._ahead_since: float | None = None

    def now(self) -> float:
        """Seconds since the epoch, never more than the wall clock has."""
        wall, monotonic = time.time(), time.monotonic()
        expected = self._wall + monotonic - self._monotonic
        if wall > expected + _STEP_SECONDS:
            if self._ahead_since is None:
                self._ahead_since = monotonic
                log.warning(
                    "The clock was set forward by %d s, or the machine slept: nothing is too old by that for %g hours",
                    wall - expected,
                    _BELIEVED_SECONDS / 3600,
                )
            if monotonic < self._ahead_since + _BELIEVED_SECONDS:
                return expected
        self._ahead_since = None
        self._wall, self._monotonic = wall, monotonic
        return wall
