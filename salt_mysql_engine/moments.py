"""Moments as operators give them, and as jids hold them: a jid begins with its job's start, 20 digits of UTC."""

from __future__ import annotations

import datetime
import re

from . import records
from .errors import EngineError

_LATEST = 4_102_444_800.0
"""The year 2100: later moments cannot be told by every clock of ours."""
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse(text: str, now: float, *, name: str = "since") -> float:
    """A moment in seconds since the epoch: ``2h`` ago, a date with or without a time (UTC), or a jid.

    Raises:
        EngineError: it is none of these; ``name`` is the argument's.
    """
    given = text.strip()
    if ago := _AGO.fullmatch(given):
        return max(0.0, now - float(ago[1]) * _SECONDS[ago[2]])
    try:
        moment = of_jid(given) if records.is_jid(given) else datetime.datetime.fromisoformat(given)
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
    return records.utc(moment).strftime("%Y%m%d%H%M%S%f")
