"""The parts of purging that need no server."""

from __future__ import annotations

import pytest

from salt_mysql_engine import purge


@pytest.mark.parametrize(
    ("rows", "batches"),
    [
        ([], []),
        ([0], ["0"]),
        ([0, 0, 0], ["012"]),
        ([4, 6, 1], ["01", "2"]),
        ([11, 0, 12, 3], ["0", "1", "2", "3"]),
        ([5, 11, 5, 5], ["0", "1", "23"]),
    ],
)
def test_partitions_are_counted_together_up_to_a_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, rows: list[int], batches: list[str]
) -> None:
    monkeypatch.setattr(purge, "_COUNT_ROWS", 10)
    parts = {str(number): about for number, about in enumerate(rows)}
    assert ["".join(batch) for batch in purge._batches(parts)] == batches
