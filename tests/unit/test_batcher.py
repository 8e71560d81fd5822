"""The batcher against a list, under a clock that only the test moves."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from salt_mysql_engine.batcher import Batcher, Limits, Reason

LIMITS = st.builds(Limits, st.integers(1, 6), st.integers(1, 1000), st.floats(0.01, 300))


class BatcherAgainstAList(RuleBasedStateMachine):
    """``held`` is the model: (number, size, since) of each row, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher: Batcher[int] = Batcher(Limits(3, 100, 1.0))
        self.held: list[tuple[int, int, float]] = []
        self.added = 0
        self.now = 1000.0

    @rule(size=st.integers(0, 100) | st.integers(0, 2000))
    def add(self, size: int) -> None:
        self.batcher.add(self.added, size=size, since=self.now)
        self.held.append((self.added, size, self.now))
        self.added += 1

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(limits=LIMITS)
    def retune(self, limits: Limits) -> None:
        self.batcher.limits = limits

    @rule()
    def take(self) -> None:
        batch = self.batcher.take()
        oldest, self.held = self.held[: len(batch)], self.held[len(batch) :]
        assert batch == [number for number, _, _ in oldest], "rows lost, repeated or out of order"
        limits, size = self.batcher.limits, sum(size for _, size, _ in oldest)
        assert len(batch) <= limits.batch_size
        assert size <= limits.batch_bytes or len(batch) == 1
        if self.held:
            assert batch, "rows are held, but the batch is empty"
            assert len(batch) == limits.batch_size or size + self.held[0][1] > limits.batch_bytes, "room was left"

    @precondition(lambda self: self.held)
    @rule()
    def the_deadline_comes(self) -> None:
        deadline = self.batcher.deadline
        assert deadline is not None
        self.now = max(self.now, deadline)
        assert self.batcher.due(self.now) is not None

    @invariant()
    def it_is_due_exactly_when_a_limit_is_reached(self) -> None:
        limits = self.batcher.limits
        reached = {
            Reason.SIZE: len(self.held) >= limits.batch_size,
            Reason.BYTES: sum(size for _, size, _ in self.held) >= limits.batch_bytes,
            Reason.AGE: bool(self.held) and self.now >= self.held[0][2] + limits.flush_interval,
        }
        first = next((reason for reason, is_reached in reached.items() if is_reached and self.held), None)
        assert self.batcher.due(self.now) is first
        if first in (None, Reason.AGE):
            assert self.batcher.due(self.now, asked=True) is (Reason.ASKED if self.held else None)

    @invariant()
    def room_and_deadline_are_those_of_what_is_held(self) -> None:
        limits = self.batcher.limits
        assert len(self.batcher) == len(self.held)
        assert self.batcher.deadline == (self.held[0][2] + limits.flush_interval if self.held else None)
        assert self.batcher.room == Limits(
            limits.batch_size - len(self.held),
            limits.batch_bytes - sum(size for _, size, _ in self.held),
            limits.flush_interval,
        )


TestBatcherAgainstAList = BatcherAgainstAList.TestCase
