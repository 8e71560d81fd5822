"""When a batch is due and what it holds. Pure state: no I/O, no clock; time is passed in, in seconds.

A batch is due when it has ``batch_size`` rows, or its rows' SQL reaches ``batch_bytes``, or its oldest
row is ``flush_interval`` old, whichever is first. The limits may change between any two calls.
"""

from __future__ import annotations

import collections
import enum
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class Reason(str, enum.Enum):
    """Why a batch was due."""

    SIZE = "size"
    BYTES = "bytes"
    AGE = "age"
    ASKED = "asked"


class Limits(NamedTuple):
    """``batch_size`` in rows, ``batch_bytes`` of SQL, ``flush_interval`` in seconds."""

    batch_size: int
    batch_bytes: int
    flush_interval: float


class Batcher(Generic[Item]):
    """Holds rows, oldest first, until a batch of them is due."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._held: collections.deque[tuple[Item, int, float]] = collections.deque()
        """Each with its size and since when it waits."""
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def oldest(self) -> Item | None:
        """The row that has waited longest."""
        return self._held[0][0] if self._held else None

    @property
    def room(self) -> Limits:
        """How many more rows and bytes the batch can use; zero or less when it is full."""
        return self.limits._replace(
            batch_size=self.limits.batch_size - len(self._held), batch_bytes=self.limits.batch_bytes - self._bytes
        )

    @property
    def deadline(self) -> float | None:
        """When the oldest row will have waited long enough; ``None`` when there is none."""
        return self._held[0][2] + self.limits.flush_interval if self._held else None

    def add(self, item: Item, *, size: int, since: float) -> None:
        """One more row: ``size`` bytes of SQL, captured at ``since``."""
        self._held.append((item, size, since))
        self._bytes += size

    def due(self, now: float, *, asked: bool = False) -> Reason | None:
        """Why a batch must be written now, or ``None``; ``asked`` when someone asked for a flush."""
        if not self._held:
            return None
        if len(self._held) >= self.limits.batch_size:
            return Reason.SIZE
        if self._bytes >= self.limits.batch_bytes:
            return Reason.BYTES
        if asked:
            return Reason.ASKED
        return Reason.AGE if now >= self._held[0][2] + self.limits.flush_interval else None

    def take(self) -> list[Item]:
        """The next batch: as many of the oldest rows as the limits allow, at least one if there is any."""
        if len(self._held) <= self.limits.batch_size and self._bytes <= self.limits.batch_bytes:
            everything = [item for item, _, _ in self._held]
            self._held.clear()
            self._bytes = 0
            return everything
        taken: list[Item] = []
        room = self.limits.batch_bytes
        while self._held and len(taken) < self.limits.batch_size:
            size = self._held[0][1]
            room -= size
            if room < 0 and taken:
                break
            self._bytes -= size
            taken.append(self._held.popleft()[0])
        return taken
