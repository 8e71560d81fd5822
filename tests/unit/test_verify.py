"""The verifier by itself, beside a real journal and a real job cache: no database is asked for anything."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import verify
from salt_mysql_engine.journalfile import CONFIRMED
from tests.support.shipping import Cache, Shipping, jid, published, returned

OLD = 3600.0
"""Seconds since an event was captured with which the writer is far behind."""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def verifying(cache: Cache, tmp_path: Path, **options: Any) -> Shipping:
    """Without a writer: events wait in the journal."""
    return Shipping(tmp_path / "journal", {}, paused=True, cachedir=cache.cachedir, **options)


def confirmed(ship: Shipping) -> int:
    """How many events are confirmed in the journal."""
    ((count,),) = ship._read(f"SELECT COUNT(*) FROM events WHERE state = {CONFIRMED}")
    return int(count)


async def test_while_the_writer_is_behind_it_looks_ahead_step_by_step_without_a_pause(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_AHEAD_ROWS", 10)
    monkeypatch.setattr(verify, "_AHEAD_SECONDS", 0.5)
    monkeypatch.setattr(verify, "_LOOK_SECONDS", 0.01)
    bodies = [published(jid(1), ["web1"]), *(returned(jid(1), f"web{number}") for number in range(199))]
    cache.accept(*bodies)
    async with verifying(cache, tmp_path) as ship:
        await ship.take_at(time.time() - OLD, *bodies)
        await ship.until(lambda: confirmed(ship) > 0)
        began = time.monotonic()
        await ship.until(lambda: confirmed(ship) == 200)
        assert time.monotonic() - began < 4.0, "20 steps"
