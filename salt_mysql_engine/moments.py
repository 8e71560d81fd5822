"""Moments as operators give them, as events have them, and as jids hold them: a jid begins with its job's start,
20 digits of UTC."""

from __future__ import annotations

import datetime
import functools
import re
from typing import Any

from .errors import EngineError

END_OF_TIME = 253_402_300_799.0
"""The end of the year 9999."""
_LATEST = 4_102_444_800.0
"""The year 2100: later moments cannot be told by every clock of ours."""
_LAST, _DAY = 250_000_000_000.0, 86_400.0  # the year 9892; seconds
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_JID = re.compile(r"\d{20}(_\d{1,10})?", re.ASCII)
"""salt/utils/jid.py 3008.3: 20 digits of UTC, and ``_`` + pid with ``unique_jid``."""
_STAMP = re.compile(r"(20[0-3]\d-\d\d-\d\d)T((?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)(?:\.(\d{1,6}))?(?:\+00:00)?", re.ASCII)
_TIMESTAMPS = 86_400.0, 2_145_916_799.0
"""What MySQL's TIMESTAMP has: not the first hours of 1970, and nothing from 2038 on, where a clock may be."""


def parse(text: str, now: float, *, name: str = "since") -> float:
    """A moment in seconds since the epoch: ``2h`` ago, a date with or without a time (UTC), or a jid.

    Raises:
        EngineError: it is none of these; ``name`` is the argument's.
    """
    given = text.strip()
    if ago := _AGO.fullmatch(given):
        return max(0.0, now - float(ago[1]) * _SECONDS[ago[2]])
    try:
        moment = of_jid(given) if is_jid(given) else datetime.datetime.fromisoformat(given)
        if moment is not None:
            moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)
            return min(max(0.0, moment.timestamp()), _LATEST)
    except (ValueError, OverflowError):
        pass
    raise EngineError(
        f"{name}: {text!r} must be a time ago (30m, 2h, 1d), a UTC date (2026-11-23, 2026-11-23T14:00), or a jid"
    )


def of_jid(jid: str) -> datetime.datetime | None:
    """When a job began; ``None`` where the digits are no date."""
    try:
        return datetime.datetime.strptime(jid[:20], "%Y%m%d%H%M%S%f").replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        return None


def jid_at(moment: float) -> str:
    """The digits with which jids of a moment begin."""
    return utc(moment).strftime("%Y%m%d%H%M%S%f")


def is_stamp(value: Any) -> bool:
    """Whether a value is a time as the master puts it on an event."""
    return isinstance(value, str) and _STAMP.fullmatch(value) is not None


def is_jid(text: Any) -> bool:
    """Whether a text is the id of a job."""
    return isinstance(text, str) and _JID.fullmatch(text) is not None


def altered_at(stamp: Any, captured_at: float) -> str:
    """When the master saw the event: its ``_stamp`` (UTC; aware on 3008), else when we did."""
    if isinstance(stamp, str) and (said := _STAMP.fullmatch(stamp)):
        day, time, fraction = said.groups()
        if is_day(day):
            return f"{day} {time}.{fraction or '':0<6}"
    return utc(min(max(captured_at, _TIMESTAMPS[0]), _TIMESTAMPS[1])).strftime("%Y-%m-%d %H:%M:%S.%f")


def is_ahead(jid: str, moment: float) -> bool:
    """Whether a jid says that its job began more than a day after a moment (seconds since the epoch)."""
    return jid > jid_at(min(moment, _LAST) + _DAY)


@functools.lru_cache(maxsize=16)
def is_day(text: str) -> bool:
    """Whether MySQL's TIMESTAMP, which ends in 2038, has the day. Asked for every row, and nearly always for today."""
    try:
        return datetime.date.fromisoformat(text).year < 2038
    except ValueError:  # the 31st of February
        return False


def text(moment: float) -> str:
    """Seconds since the epoch for people and programs; what a clock said that was set to anything is cut."""
    return utc(min(max(0.0, moment), END_OF_TIME)).isoformat(timespec="seconds")


def utc(moment: float) -> datetime.datetime:
    """Seconds since the epoch as a time."""
    return datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)
