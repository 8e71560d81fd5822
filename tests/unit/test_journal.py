"""The journal on real files: what was appended stays, once, until it is settled, and the books balance."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hypothesis
import msgpack
import psutil
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from salt_mysql_engine import journal as journal_module
from salt_mysql_engine import journalfile, letters, saltevent
from salt_mysql_engine.errors import JournalError
from salt_mysql_engine.journal import Caps, DeadLetter, Entry, Journal, NewEvent, Settlement
from salt_mysql_engine.journalfile import CONFIRMED, STUB, UNCHECKED
from tests.support.oldjournals import FORMAT_1, FORMAT_2

STATES = (UNCHECKED, CONFIRMED, STUB)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "mysql_jobcache")
    opened.open()
    yield opened
    opened.close()


def events(count: int, *, body: bytes = b"body", state: int = UNCHECKED) -> list[NewEvent]:
    return [NewEvent(1000.0 + n, f"jid{n}", f"minion{n}", body, state) for n in range(count)]


def in_each_state(count: int) -> list[NewEvent]:
    """Events with other bytes each, in one state after the other."""
    return [NewEvent(1000.0 + n, f"jid{n}", f"minion{n}", b"body %d" % n, STATES[n % 3]) for n in range(count)]


def everything(journal: Journal, *, after: int = 0) -> list[Entry]:
    """All that is pending; taken for no batch by this look."""
    taken_through = journal.taken_through
    try:
        return journal.read(after=after, rows=10**6, max_bytes=10**9)
    finally:
        journal._taken_through = taken_through


def all_seqs(journal: Journal) -> list[int]:
    return [entry.seq for entry in everything(journal)]


def balance(journal: Journal) -> int:
    """Captured events that the books cannot account for: 0."""
    books = journal.books()
    accounted = sum(books[name] for name in ("written", "duplicates", "pending", "dead_letters"))
    return int(books["captured"] - accounted - sum(books["ignored"].values()) - sum(books["dropped"].values()))


def dead_letters(journal: Journal) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(journal.path)) as db:
        return db.execute(
            "SELECT seq, captured_at, jid, minion, body, state, reason, error FROM dead_letters ORDER BY seq"
        ).fetchall()


def tables(journal: Journal) -> dict[str, list[tuple[object, ...]]]:
    """Every row of the file, by table, but for times of death."""
    statements = {
        "events": "SELECT * FROM events ORDER BY seq",
        "dead_letters": (
            "SELECT seq, captured_at, jid, minion, state, body, error, reason FROM dead_letters ORDER BY seq"
        ),
        "counters": "SELECT * FROM counters WHERE value <> 0 ORDER BY name",
        "marks": "SELECT * FROM marks ORDER BY name",
        "notes": "SELECT * FROM notes ORDER BY name",
    }
    with closing(sqlite3.connect(journal.path)) as db:
        return {name: db.execute(statement).fetchall() for name, statement in statements.items()}


def bury(journal: Journal, seqs: list[int], reason: str = "refused") -> None:
    journal.settle(Settlement(seqs, {}, {seq: (reason, f"error {seq}") for seq in seqs}))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# In and out


def test_what_is_appended_is_read_back_oldest_first_as_it_was(journal: Journal) -> None:
    given = [NewEvent(n / 7, "j", "m", bytes([n]) * n, STATES[n % 3]) for n in range(256)]
    journal.append(given)
    entries = everything(journal)
    assert [entry[1:4] for entry in entries] == [(event.captured_at, event.body, event.state) for event in given]
    assert (journal.pending, journal.oldest(), journal.oldest_seq()) == (256, 0.0, entries[0].seq)
    assert journal.newest_seq() == entries[-1].seq


def test_an_empty_journal_says_so(journal: Journal) -> None:
    journal.append([])
    assert everything(journal) == []
    assert (journal.pending, journal.oldest(), journal.oldest_seq(), journal.newest_seq()) == (0, None, None, 0)


def test_a_read_goes_on_where_the_last_one_ended(journal: Journal) -> None:
    journal.append(events(10))
    read: list[Entry] = []
    while entries := journal.read(after=read[-1].seq if read else 0, rows=3, max_bytes=10**6):
        assert len(entries) <= 3
        read += entries
    assert read == everything(journal)


def test_what_nobody_said_a_state_of_is_unchecked(journal: Journal) -> None:
    journal.append([NewEvent(1.0, "j", "m", b"")])
    assert [entry.state for entry in everything(journal)] == [UNCHECKED]
    assert Entry(1, 1.0, b"").state == UNCHECKED


def test_a_read_ends_with_the_entry_that_reaches_its_bytes(journal: Journal) -> None:
    journal.append(events(10, body=bytes(100)))
    for max_bytes, rows in ((1, 1), (100, 1), (101, 2), (200, 2), (5000, 10)):
        assert len(journal.read(after=0, rows=10, max_bytes=max_bytes)) == rows


def test_a_look_takes_nothing_and_leaves_out_what_is_confirmed(journal: Journal) -> None:
    journal.append(in_each_state(9))
    all_of_them = everything(journal)
    looked = journal.read(after=0, rows=100, max_bytes=10**6, take=False)
    assert looked == [entry for entry in all_of_them if entry.state != CONFIRMED]
    assert len(looked) == 6
    assert journal.read(after=looked[1].seq, rows=2, max_bytes=10**6, take=False) == looked[2:4]
    assert journal.taken_through == 0
    assert journal.read(after=0, rows=5, max_bytes=10**6) == all_of_them[:5]
    assert journal.taken_through == all_of_them[4].seq


def test_entries_are_read_by_their_numbers_as_long_as_they_are_there(journal: Journal) -> None:
    journal.append(in_each_state(9))
    entries = everything(journal)
    seqs = [entry.seq for entry in entries]
    journal.settle(Settlement([seqs[2]], {"written": 1}, {}))
    bury(journal, [seqs[4]])
    assert journal.read_these([seqs[7], seqs[2], seqs[0], 10**9, seqs[4], seqs[5]], 10**6) == (
        [entries[7], entries[0], entries[5]],
        6,
    )
    assert journal.read_these([seqs[2], seqs[4]], 10**6) == ([], 2)
    assert journal.read_these([], 10**6) == ([], 0)
    assert journal.taken_through == 0, "they were taken before, or are no batch's"


def test_a_read_by_numbers_ends_with_the_entry_that_reaches_its_bytes_and_can_go_on(journal: Journal) -> None:
    journal.append(events(10, body=bytes(100)))
    entries = everything(journal)
    seqs = [entry.seq for entry in entries]
    for max_bytes, rows in ((1, 1), (100, 1), (101, 2), (200, 2), (5000, 10)):
        assert journal.read_these(seqs, max_bytes) == (entries[:rows], rows)
    journal.settle(Settlement(seqs[:4] + seqs[8:], {"written": 6}, {}))
    assert journal.read_these(seqs, 100) == (entries[4:5], 5), "those that are gone were looked at too"
    left, read = list(seqs), []
    while left:
        some, looked = journal.read_these(left, 150)
        assert looked > 0
        read += some
        left = left[looked:]
    assert read == everything(journal) == entries[4:8]


def test_what_is_confirmed_stays_in_its_place_with_other_bytes(journal: Journal) -> None:
    given = in_each_state(9)
    journal.append(given)
    before, rows = everything(journal), tables(journal)["events"]
    books = journal.books()
    new = {before[0].seq: b"", before[2].seq: bytes(20_000), before[4].seq: b"other", before[8].seq: before[8].body}
    journal.confirm(new)
    journal.confirm({})
    for _ in range(2):  # and after a restart
        assert everything(journal) == [
            entry._replace(body=new[entry.seq], state=CONFIRMED) if entry.seq in new else entry for entry in before
        ]
        assert [row[:4] for row in tables(journal)["events"]] == [row[:4] for row in rows], "seq, time, jid, minion"
        assert (journal.books(), journal.pending, balance(journal)) == (books, 9, 0)
        assert journal.known([event.jid for event in given]) == {(event.jid, event.minion) for event in given}
        assert [entry.seq for entry in journal.read(after=0, rows=100, max_bytes=10**6, take=False)] == [
            before[n].seq for n in (3, 5, 6)
        ]
        journal.close()
        journal.open()


def test_confirming_what_is_not_pending_changes_nothing(journal: Journal) -> None:
    journal.append(in_each_state(3))
    seqs = all_seqs(journal)
    bury(journal, seqs[:1])
    journal.settle(Settlement(seqs[1:2], {"written": 1}, {}))
    before = tables(journal)
    journal.confirm({seqs[0]: b"dead", seqs[1]: b"written", 10**6: b"never was"})
    assert (tables(journal), journal.pending, balance(journal)) == (before, 1, 0)


def test_a_confirmation_is_all_or_none(journal: Journal) -> None:
    journal.append(events(2))
    first, second = everything(journal)
    with pytest.raises(UnicodeEncodeError):
        journal.confirm({first.seq: b"new", second.seq: "\ud800"})  # type: ignore[dict-item] # the point
    assert everything(journal) == [first, second]


def test_notes_and_marks_are_known_after_a_restart_and_a_kill(journal: Journal, tmp_path: Path) -> None:
    assert (journal.note("a"), journal.mark("a")) == (None, None)
    long = "\N{SNOWMAN}; 'quoted' \x00 " * 5000
    journal.set_note("a", "first")
    journal.set_note("a", long)
    journal.set_note("empty", "")
    journal.set_note("b", "1.5")
    journal.set_mark("a", 2.5)
    killed = Journal(Path(shutil.copytree(journal.path.parent, tmp_path / "killed")))
    journal.close()
    journal.open()
    killed.open()
    for each in (journal, killed):
        assert (each.note("a"), each.note("empty"), each.note("b"), each.note("c")) == (long, "", "1.5", None)
        assert (each.mark("a"), each.mark("b")) == (2.5, None)
    killed.close()


def test_readers_are_told_what_waits_of_a_job_oldest_first_and_of_all_newest_first(journal: Journal) -> None:
    large = b"x" * (journal_module.WHOLE_BYTES + 1)
    for number in range(1, 7):
        body = large if number == 4 else b"body %d" % number
        journal.append([NewEvent(float(number), f"jid{number % 2}", "minion", body, STATES[number % 3])])

    def held(**which: Any) -> list[int]:
        which = {"jid": None, "at": 0, "rows": 100, "max_bytes": 10**9, **which}
        return [entry.seq for entry in journal.held(**which)]

    assert held() == [6, 5, 4, 3, 2, 1]
    assert (held(at=4), held(at=1), held(rows=2)) == ([3, 2, 1], [], [6, 5])
    assert (held(jid="jid1"), held(jid="jid0"), held(jid="jid2")) == ([1, 3, 5], [2, 4, 6], [])
    assert (held(jid="jid1", at=3), held(jid="jid1", at=1, rows=1)) == ([5], [3])
    assert (held(max_bytes=6), held(max_bytes=7), held(max_bytes=12), held(max_bytes=13)) == (
        [6],
        [6, 5],
        [6, 5],
        [6, 5, 4, 3],
    )
    whole = journal.held(jid="jid0", at=2, rows=1, max_bytes=1)[0]
    assert (whole.seq, whole.body, whole.size, whole.captured_at, whole.state) == (4, b"", len(large), 4.0, STATES[1])
    assert journal.taken_through == 0, "a look takes nothing"
    assert (journal.rows_of("jid1"), journal.rows_of("jid2")) == (3, 0)
    assert (journal.oldest_seq(), journal.newest_seq()) == (1, 6)
    assert (journal.oldest(), journal.oldest({1, 2}), journal.oldest(range(9))) == (1.0, 3.0, None)
    assert b"".join(journal.part_of(4, start, 100_000) for start in range(0, 400_000, 100_000)) == large
    assert (journal.part_of(1, 2, 3), journal.part_of(99, 0, 10)) == (b"dy ", b"")


def test_what_is_taken_comes_with_its_counts_and_its_marks_or_not_at_all(journal: Journal) -> None:
    broken = NewEvent(0.0, None, "minion", b"refused: NOT NULL")  # type: ignore[arg-type] # the point
    with pytest.raises(sqlite3.IntegrityError):
        journal.take([*events(2), broken], counts={"captured": 3, "dropped.full": 3}, marks={"spool a": 7})
    assert (journal.marks("spool "), journal.pending, journal.books()["captured"]) == ({}, 0, 0)
    journal.take(events(2), counts={"captured": 3, "dropped.full": 3}, marks={"spool a": 7, "spool b": 8})
    journal.set_mark("spoon", 9)
    journal.set_mark("a spool b", 9)
    journal.close()
    journal.open()
    assert journal.marks("spool ") == {"spool a": 7.0, "spool b": 8.0}
    assert journal.marks("spool c") == {}
    books = journal.books()
    assert (books["captured"], books["pending"], books["dropped"]) == (5, 2, {"full": 3})
    journal.forget_marks(["spool a", "spool c"])
    assert journal.marks("spool ") == {"spool b": 8.0}
    assert journal.mark("spoon") == 9.0


def test_an_append_of_many_events_is_all_or_none(journal: Journal) -> None:
    broken = NewEvent(0.0, None, "minion", b"refused: NOT NULL")  # type: ignore[arg-type] # the point
    for place in (0, 10, 300, 599):
        given = events(600)
        given[place] = broken
        with pytest.raises(sqlite3.IntegrityError):
            journal.append(given)
        assert everything(journal) == []
        assert (journal.pending, journal.books()["captured"]) == (0, 0)
    journal.append(events(600))
    assert (len(everything(journal)), journal.books()["captured"]) == (600, 600)


def test_an_open_journal_does_not_keep_in_memory_what_it_appended(journal: Journal) -> None:
    """SQLite's statements keep their last values: a group of each size once held its events for good."""
    before = psutil.Process().memory_info().rss
    for count in range(1, 191):
        group = events(count, body=bytes(10_000))
        journal.append(group)
        entries = everything(journal)
        assert [(entry.captured_at, entry.body) for entry in entries] == [
            (each.captured_at, each.body) for each in group
        ]
        journal.settle(Settlement([entry.seq for entry in entries], {"written": count}, {}))
    assert psutil.Process().memory_info().rss - before < 40 * 2**20  # of 181 MB


def test_a_settlement_is_all_or_none(journal: Journal) -> None:
    journal.append(events(2))
    first, second = (entry.seq for entry in everything(journal))
    with pytest.raises(sqlite3.IntegrityError):
        journal.settle(Settlement([first, second], {"written": 1, None: 1}, {first: ("refused", "why")}))  # type: ignore[dict-item] # the point
    assert dead_letters(journal) == []
    assert [entry.seq for entry in everything(journal)] == [first, second]
    assert (journal.books()["written"], journal.pending, balance(journal)) == (0, 2, 0)


def test_settling_removes_just_the_events_it_names_whatever_their_order_and_gaps(journal: Journal) -> None:
    journal.append(events(12))
    seqs = [entry.seq for entry in everything(journal)]
    gone = [seqs[n] for n in (7, 0, 1, 2, 11, 9, 5)]
    journal.settle(Settlement(gone, {"written": 5, "ignored.peer": 2}, {}))
    assert [entry.seq for entry in everything(journal)] == [seq for seq in seqs if seq not in gone]
    assert (journal.pending, balance(journal)) == (5, 0)


@hypothesis.given(st.sets(st.integers(1, 60)))
def test_ranges_hold_the_same_numbers_in_the_fewest_runs(numbers: set[int]) -> None:
    ranges = journal_module._ranges(numbers)
    assert [n for first, last in ranges for n in range(first, last + 1)] == sorted(numbers)
    assert all(second[0] > first[1] + 1 for first, second in itertools.pairwise(ranges))


def test_a_dead_letter_keeps_its_event_and_gets_its_error(journal: Journal) -> None:
    given = in_each_state(3)
    journal.append(given)
    seqs = [entry.seq for entry in everything(journal)]
    journal.settle(Settlement(seqs[:2], {"written": 1}, {seqs[1]: ("refused", "Data too long")}))
    assert dead_letters(journal) == [(seqs[1], *given[1], "refused", "Data too long")]
    books = journal.books()
    assert (books["written"], books["dead_letters"], books["pending"], balance(journal)) == (1, 1, 1, 0)


def test_the_books_tell_ignored_and_dropped_by_reason(journal: Journal) -> None:
    journal.append(events(3))
    seqs = [entry.seq for entry in everything(journal)]
    journal.settle(Settlement(seqs, {"ignored.peer": 1, "ignored.nocache": 2}, {}))
    journal.append([], dropped=4)
    books = journal.books()
    assert (books["ignored"], books["dropped"]) == ({"nocache": 2, "peer": 1}, {"memory_full": 4})
    assert (books["captured"], balance(journal)) == (7, 0)


def test_event_keys_are_the_same_after_reopening_and_no_other_journals(journal: Journal, tmp_path: Path) -> None:
    other = Journal(tmp_path / "other")
    other.open()
    keys = [opened.event_key(seq) for opened in (journal, other) for seq in (1, 2, 2**62)]
    assert len(set(keys)) == 6
    assert {len(key) for key in keys} == {16}
    other.close()
    other.open()
    assert other.event_key(2) == keys[4]
    other.close()


def test_numbers_that_a_power_cut_took_are_not_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their events are in MySQL: others under the same key would be taken for these, and be nowhere."""
    journal = Journal(tmp_path / "journal")
    journal.open()
    journal.append(events(3))
    shutil.copytree(tmp_path / "journal", tmp_path / "on disk")
    journal.append(events(3))
    gone = {journal.event_key(entry.seq) for entry in everything(journal)[3:]}
    journal.close()
    monkeypatch.setattr(journalfile, "boot", lambda: "another run")
    journal = Journal(tmp_path / "on disk")
    journal.open()
    journal.append(events(3))
    assert [entry.seq for entry in everything(journal)[:3]] == [1, 2, 3]
    assert gone.isdisjoint(journal.event_key(entry.seq) for entry in everything(journal))
    last = journal.newest_seq()
    journal.close()
    journal.open()  # in the same run of the system nothing is lost
    journal.append(events(1))
    assert journal.newest_seq() == last + 1
    journal.close()


def test_a_power_cut_that_left_a_new_journal_empty_gives_no_number_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    shutil.copytree(tmp_path / "journal", tmp_path / "on disk")
    journal.append(events(3))
    gone = {journal.event_key(entry.seq) for entry in everything(journal)}
    journal.close()
    monkeypatch.setattr(journalfile, "boot", lambda: "another run")
    journal = Journal(tmp_path / "on disk")
    journal.open()
    journal.append(events(3))
    assert gone.isdisjoint(journal.event_key(entry.seq) for entry in everything(journal))
    journal.close()


def test_another_journal_in_the_place_of_the_one_in_use_is_taken_along_with_large_events(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path / "journal"), Journal(tmp_path / "disk")
    for each, bodies in ((other, LARGE[:2]), (journal, LARGE[2:])):
        each.open()
        each.append([NewEvent(1.5, "j", "m", body) for body in bodies])
        bury(each, [1])
    other.close()
    shutil.rmtree(tmp_path / "journal")
    (tmp_path / "disk").rename(tmp_path / "journal")
    journal.append([NewEvent(1.5, "new", "m", b"new")])
    waiting = [journal.read_whole(seq, 10**6) for seq in all_seqs(journal)]
    assert [entry and entry.body for entry in waiting] == [LARGE[3], LARGE[1], b"new"]
    assert sorted(letter.body for letter in journal.dead_letters()) == [LARGE[0], LARGE[2]]
    assert balance(journal) == 0
    journal.close()


def test_another_journal_that_takes_the_place_of_the_one_in_use_is_taken_along(tmp_path: Path) -> None:
    """A disk that is mounted late over the folder in which the engine has begun, with what waits since an outage."""
    journal, other = Journal(tmp_path / "journal"), Journal(tmp_path / "disk")
    for each, text in ((other, "o"), (journal, "j")):
        each.open()
        each.append([NewEvent(1.5, f"{text}{n}", "m", text.encode(), CONFIRMED) for n in range(4)])
        bury(each, [1], "refused")
        each.settle(Settlement([2], {"written": 1}, {}))
    other.take([], counts={}, marks={"spool x": 7.0})
    other.close()
    before = everything(journal)
    (tmp_path / "journal").rename(tmp_path / "beneath")
    (tmp_path / "disk").rename(tmp_path / "journal")
    journal.append([NewEvent(1.5, "new", "m", b"new")])
    assert everything(journal)[:2] == before, "those that wait keep their numbers"
    assert [entry.body for entry in everything(journal)] == [b"j", b"j", b"o", b"o", b"new"]
    assert len({entry.seq for entry in everything(journal)} | {letter.seq for letter in journal.dead_letters()}) == 7
    assert sorted(letter.body for letter in journal.dead_letters()) == [b"j", b"o"]
    assert (journal.books()["captured"], journal.books()["written"], balance(journal)) == (9, 2, 0)
    assert (journal.pending, journal.marks("spool"), journal.salvaged) == (5, {"spool x": 7.0}, "")
    # An earlier state of the same journal has nothing that this one has not, or has done with.
    shutil.copytree(tmp_path / "journal", tmp_path / "earlier")
    journal.settle(Settlement([entry.seq for entry in everything(journal)], {"written": 5}, {}))
    shutil.rmtree(tmp_path / "journal")
    (tmp_path / "earlier").rename(tmp_path / "journal")
    journal.append([NewEvent(1.5, "last", "m", b"last")])
    assert [entry.body for entry in everything(journal)] == [b"last"]
    assert (balance(journal), len(journal.dead_letters())) == (0, 2)
    # Nor is one lost that cannot be read.
    (tmp_path / "journal" / "journal.sqlite").unlink()
    (tmp_path / "journal" / "journal.sqlite").write_bytes(b"no journal" * 1000)
    journal.append([NewEvent(1.5, "last", "m", b"last")])
    assert len(everything(journal)) == 2
    aside = max((tmp_path / "journal").glob("*.corrupt-*.sqlite"))
    assert aside.read_bytes().startswith(b"no journal")
    journal.close()


# Any sequence

REASONS = ("refused", "fault", "unconfirmed")
FATES = ("written", "duplicates", "ignored.peer", "ignored.nocache", *REASONS)


class JournalAgainstADict(RuleBasedStateMachine):
    """``pending`` and ``dead`` are the model: what is under each ``seq``; ``fates`` counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.generation = 0
        self.pending: dict[int, NewEvent] = {}
        self.dead: dict[int, tuple[NewEvent, str, str]] = {}
        self.fates: collections.Counter[str] = collections.Counter()
        self.marks: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.captured = self.highest = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder / str(self.generation))
        self.journal.open()

    def came(self, given: list[NewEvent]) -> None:
        """These are new in the line, behind all others, under numbers never used before."""
        new = everything(self.journal, after=self.highest)
        assert [entry[1:4] for entry in new] == [(event.captured_at, event.body, event.state) for event in given]
        for entry, event in zip(new, given, strict=True):
            assert entry.seq > self.highest, "a seq was used again"
            self.highest = entry.seq
            self.pending[entry.seq] = event

    @rule(
        bodies=st.lists(st.binary(max_size=20), max_size=6),
        many=st.sampled_from([0, 0, 0, 300]),
        states=st.lists(st.sampled_from(STATES), min_size=1, max_size=4),
    )
    def append(self, bodies: list[bytes], many: int, states: list[int]) -> None:
        given = [
            NewEvent(float(n), f"j{n}", "m", body, state)
            for n, (body, state) in enumerate(zip(bodies + [b""] * many, itertools.cycle(states)))
        ]
        assert self.journal.append(given) == len(given)
        self.captured += len(given)
        self.came(given)

    @rule(
        data=st.data(),
        skip=st.integers(0, 3),
        count=st.integers(1, 400),
        trimmed=st.integers(0, 2),
        gap=st.integers(1, 3),
    )
    def settle(self, data: st.DataObject, skip: int, count: int, trimmed: int, gap: int) -> None:
        seqs = list(self.pending)[skip : skip + count]
        some = data.draw(st.lists(st.sampled_from(FATES), min_size=1, max_size=5))
        fates = dict(zip(seqs, itertools.cycle(some)))
        dead = {seq: (fate, f"error {seq}") for seq, fate in fates.items() if fate in REASONS}
        counts = collections.Counter(fate for fate in fates.values() if fate not in REASONS)
        confirmed = {seq: b"confirmed " + self.pending[seq].body for seq in list(dead)[gap - 1 :: gap]}
        self.journal.settle(Settlement(seqs[::-1], {**counts, "trimmed": trimmed}, dead, confirmed))
        self.were_confirmed(confirmed)
        self.fates += counts
        self.fates["trimmed"] += trimmed
        self.dead.update({seq: (self.pending[seq], *why) for seq, why in dead.items()})
        for seq in seqs:
            del self.pending[seq]

    @rule(skip=st.integers(0, 3), count=st.integers(1, 400), gap=st.integers(1, 3))
    def confirm(self, skip: int, count: int, gap: int) -> None:
        """Some that are pending, and some that are not."""
        bodies = {seq: b"confirmed " + self.pending[seq].body for seq in list(self.pending)[skip : skip + count : gap]}
        self.journal.confirm({**bodies, **dict.fromkeys([*self.dead, self.highest + 7], b"nobody's")})
        self.were_confirmed(bodies)

    def were_confirmed(self, bodies: dict[int, bytes]) -> None:
        for seq, body in bodies.items():
            self.pending[seq] = self.pending[seq]._replace(body=body, state=CONFIRMED)

    @rule(seqs=st.lists(st.integers(1, 700), max_size=30), max_bytes=st.integers(1, 400))
    def read_these(self, seqs: list[int], max_bytes: int) -> None:
        entries, looked = self.journal.read_these(seqs, max_bytes)
        assert [entry.seq for entry in entries] == [seq for seq in seqs[:looked] if seq in self.pending]
        assert all(entry == self.entry(entry.seq) for entry in entries)
        sizes = [len(entry.body) for entry in entries]
        assert looked == len(seqs) or sum(sizes) >= max_bytes
        assert sum(sizes[:-1]) < max_bytes

    def entry(self, seq: int) -> Entry:
        event = self.pending[seq]
        return Entry(seq, event.captured_at, event.body, event.state)

    @rule(which=st.integers(0, 5), every=st.booleans(), trusted=st.booleans())
    def retry(self, which: int, every: bool, trusted: bool) -> None:
        seqs = sorted(self.dead) if every else sorted(self.dead)[which : which + 1]
        seq = None if every else seqs[0] if seqs else self.highest + 7
        assert self.journal.retry_dead_letters(seq, trusted=trusted) == len(seqs)
        again = [self.dead.pop(seq)[0] for seq in seqs]
        self.came([event._replace(state=CONFIRMED) if trusted and event.state != STUB else event for event in again])

    @rule(which=st.integers(0, 5), every=st.booleans())
    def delete(self, which: int, every: bool) -> None:
        seqs = sorted(self.dead) if every else sorted(self.dead)[which : which + 1]
        seq = None if every else seqs[0] if seqs else self.highest + 7
        assert self.journal.delete_dead_letters(seq) == len(seqs)
        self.fates["dropped.dead_letter_deleted"] += len(seqs)
        for seq in seqs:
            del self.dead[seq]

    @rule(name=st.sampled_from(["a", "b"]), value=st.floats(0, 10**10))
    def mark(self, name: str, value: float) -> None:
        self.journal.set_mark(name, value)
        self.marks[name] = value

    @rule(name=st.sampled_from(["a", "b"]), value=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    def note(self, name: str, value: str) -> None:
        self.journal.set_note(name, value)
        self.notes[name] = value

    @rule()
    def grow_too_old(self) -> None:
        """Everything that nobody holds, but for what is dead."""
        self.journal.caps = Caps(max_age_seconds=60.0)
        assert not self.journal.tend(10.0**6)
        self.journal.caps = Caps()
        self.fates["dropped.too_old"] += len(self.pending)
        self.pending.clear()

    @rule(count=st.integers(0, 9))
    def drop(self, count: int) -> None:
        self.journal.append([], dropped=count)
        self.captured += count
        self.fates["dropped.memory_full"] += count

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.open()

    @rule()
    def die(self) -> None:
        """The files as a ``kill -9`` leaves them: nothing closed, nothing moved from the WAL."""
        dead = self.journal
        self.generation += 1
        shutil.copytree(dead.path.parent, self.folder / str(self.generation))
        assert Path(f"{self.journal.path}-wal").exists()
        self.open()
        dead.close()

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert everything(self.journal) == [self.entry(seq) for seq in self.pending]
        looked = self.journal.read(after=0, rows=10**6, max_bytes=10**9, take=False)
        assert looked == [self.entry(seq) for seq, event in self.pending.items() if event.state != CONFIRMED]
        assert self.journal.pending == len(self.pending)
        assert self.journal.oldest_seq() == next(iter(self.pending), None)
        assert self.journal.newest_seq() == (list(self.pending) or [0])[-1]
        assert dead_letters(self.journal) == [
            (seq, *event, reason, error) for seq, (event, reason, error) in sorted(self.dead.items())
        ]
        assert {name: self.journal.mark(name) for name in ("a", "b")} == {"a": None, "b": None} | self.marks
        assert {name: self.journal.note(name) for name in ("a", "b")} == {"a": None, "b": None} | self.notes

    @invariant()
    def it_knows_whose_events_it_holds(self) -> None:
        refused = [event for event, reason, _ in self.dead.values() if reason != "unconfirmed"]
        here = {event.jid for event in (*self.pending.values(), *refused)}
        assert self.journal.known([f"j{n}" for n in range(310)]) == {(jid, "m") for jid in here}

    @invariant()
    def the_books_balance(self) -> None:
        books = self.journal.books()
        assert (books["captured"], books["written"]) == (self.captured, self.fates["written"])
        assert (books["pending"], books["dead_letters"]) == (len(self.pending), len(self.dead))
        assert books["trimmed"] == self.fates["trimmed"]
        for name, counted in (("ignored", books["ignored"]), ("dropped", books["dropped"])):
            expected = {key.partition(".")[2]: n for key, n in self.fates.items() if key.startswith(name) and n}
            assert counted == expected
        assert balance(self.journal) == 0

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)


TestJournalAgainstADict = JournalAgainstADict.TestCase
TestJournalAgainstADict.settings = hypothesis.settings(max_examples=30, stateful_step_count=25)

_SHIPPER = """
import itertools, sys
from pathlib import Path
from salt_mysql_engine.journal import Journal, NewEvent, Settlement

journal = Journal(Path(sys.argv[1]))
journal.open()
for start in itertools.count(0, 7):
    journal.append([NewEvent(0.0, "j", "m", b"%d" % n) for n in range(start, start + 7)])
    print(start + 7, flush=True)
    oldest = journal.read(after=0, rows=3, max_bytes=10**6)
    journal.settle(Settlement([entry.seq for entry in oldest], {"written": len(oldest)}, {}))
"""


@pytest.mark.parametrize("appends", [1, 40, 333])
def test_a_kill_at_any_moment_takes_no_event_whose_append_returned(tmp_path: Path, appends: int) -> None:
    shipper = subprocess.Popen([sys.executable, "-c", _SHIPPER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert shipper.stdout is not None
    with shipper, shipper.stdout as said:
        numbers = [int(said.readline()) for _ in range(appends)]
        shipper.kill()
        numbers += [int(line) for line in said if line.endswith("\n")]
    assert shipper.returncode == -signal.SIGKILL
    journal = Journal(tmp_path)
    journal.open()
    books = journal.books()
    assert numbers[-1] <= books["captured"] <= numbers[-1] + 7
    assert books["written"] > 0 or appends == 1
    assert [int(entry.body) for entry in everything(journal)] == list(range(books["written"], books["captured"]))
    assert balance(journal) == 0
    journal.close()


# The file


def test_the_journal_is_for_its_owner_only(journal: Journal) -> None:
    journal.append(events(1))
    files = {path.name: mode(path) for path in journal.path.parent.iterdir()}
    assert mode(journal.path.parent) == 0o700
    assert files == dict.fromkeys(("journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm", "lock"), 0o600)


def test_a_folder_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    journal = Journal(tmp_path)
    journal.open()
    assert mode(tmp_path) == 0o700
    journal.close()


def test_a_second_engine_is_refused_until_the_first_has_closed(journal: Journal) -> None:
    second = Journal(journal.path.parent)
    with pytest.raises(JournalError, match="another mysql_jobcache engine is using the journal"):
        second.open()
    journal.append(events(1))
    journal.close()
    second.open()
    assert second.pending == 1
    second.close()
    journal.open()


def test_a_journal_of_a_newer_format_is_refused_with_what_to_do_and_left_as_it_is(journal: Journal) -> None:
    journal.append(events(1))
    journal.close()
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute(f"PRAGMA user_version = {journalfile.FORMAT + 1}")
    refuses(
        journal.path.parent, r"newer mysql_jobcache \(format \d+, this one knows \d+\); install that version again, or"
    )
    with closing(sqlite3.connect(journal.path)) as db:
        assert db.execute("SELECT COUNT(*) FROM events").fetchone() == (1,)
        db.execute(f"PRAGMA user_version = {journalfile.FORMAT}")
    journal.open()
    assert journal.pending == 1


def test_a_foreign_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE events (precious)")
    before = path.read_bytes()
    refuses(tmp_path, f"{re.escape(str(path))} is not a journal of mysql_jobcache; move it away")
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_set_aside_as_it_is_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"precious text, not a database\n" * 100)
    journal = Journal(tmp_path)
    journal.open()
    journal.append(events(1))
    assert (len(everything(journal)), balance(journal)) == (1, 0)
    aside = Path(journal.salvaged)
    assert aside.parent == tmp_path
    assert aside.read_bytes() == b"precious text, not a database\n" * 100
    assert journal.salvaged in caplog.text
    journal.close()


def test_a_place_where_no_folder_can_be_is_refused_as_a_journal_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuses(tmp_path / "file" / "mysql_jobcache", r"the journal's folder .*mysql_jobcache cannot be used: ")


def refuses(directory: Path, message: str) -> None:
    """In a process of its own, as the engine's is: what it opened ends with it."""
    script = "import pathlib, sys, salt_mysql_engine.journal as j; j.Journal(pathlib.Path(sys.argv[1])).open()"
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(rf"JournalError: .*{message}", done.stderr), done.stderr


# Caps

MIB = 1024 * 1024


def dropped(journal: Journal) -> dict[str, int]:
    return dict(journal.books()["dropped"])


def fill(journal: Journal, *, groups: int = 10) -> int:
    """Groups of 100 events of 4 KiB, 400 KiB each; how many were taken."""
    return sum(journal.append(events(100, body=bytes(4000))) for _ in range(groups))


@pytest.mark.parametrize("size", [10, 700, 2500, 4000, 50_000])
def test_a_full_journal_keeps_to_its_bytes_and_counts_what_it_gave_up(journal: Journal, size: int) -> None:
    journal.caps = Caps(max_bytes=2 * MIB)
    given = [events(64, body=bytes(size)) for _ in range(6 * MIB // (64 * (size + 150)))]
    taken = sum(journal.append(group) for group in given)
    books = journal.books()
    assert 0 < taken < 64 * len(given)
    assert (books["captured"], books["pending"]) == (64 * len(given), taken)
    assert (books["dropped"], balance(journal)) == ({"journal_full": 64 * len(given) - taken}, 0)
    one_group = 64 * 2 * (size + 150)  # how full pages get is known after the fact
    assert 2 * MIB - one_group <= journal.used_bytes <= 2 * MIB + one_group
    assert journal.full


def test_a_full_journal_drops_the_newest_and_says_so_once(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    journal.caps = Caps(max_bytes=MIB)
    first = events(100, body=bytes(4000))
    journal.append(first)
    caplog.clear()
    for _ in range(5):
        fill(journal, groups=1)
    assert [entry.captured_at for entry in everything(journal)][:100] == [event.captured_at for event in first]
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert f"holds journal_max_bytes ({MIB}): events that come are dropped" in errors[0]


def test_a_full_journal_that_drops_the_oldest_holds_the_newest(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.caps = Caps(max_bytes=MIB, drop_oldest=True)
    for number in range(20):
        assert journal.append([NewEvent(float(number), f"j{number}", "m", bytes(100_000))]) == 1
    left = [entry.captured_at for entry in everything(journal)]
    assert left == [float(number) for number in range(20 - len(left), 20)]
    assert len(left) > 5
    assert (dropped(journal), balance(journal)) == ({"journal_full": 20 - len(left)}, 0)
    assert journal.used_bytes <= MIB
    assert "the oldest events are dropped" in caplog.text


def test_what_a_batch_holds_is_never_dropped_for_what_comes(journal: Journal) -> None:
    journal.caps = Caps(max_bytes=MIB, max_age_seconds=1.0, drop_oldest=True)
    journal.append(events(150, body=bytes(4000)))
    batch = journal.read(after=0, rows=120, max_bytes=10 * MIB)
    journal.read(after=0, rows=10**6, max_bytes=10 * MIB, take=False)  # holds none of the others
    journal.read_these(all_seqs(journal), 10 * MIB)
    journal.confirm({batch[0].seq: batch[0].body, batch[1].seq: b"confirmed"})  # and lets go of none
    batch[:2] = [batch[0]._replace(state=CONFIRMED), batch[1]._replace(body=b"confirmed", state=CONFIRMED)]
    fill(journal)
    journal.tend(10.0**6)
    assert [entry for entry in everything(journal) if entry.seq <= batch[-1].seq] == batch
    assert journal.taken_through == batch[-1].seq
    journal.settle(Settlement([entry.seq for entry in batch], {"written": len(batch)}, {}))
    assert (journal.books()["written"], balance(journal)) == (120, 0)


def test_a_group_larger_than_the_whole_cap_loses_just_what_does_not_fit(journal: Journal) -> None:
    journal.caps = Caps(max_bytes=MIB, drop_oldest=True)
    journal.append(events(10))
    taken = journal.append(events(100, body=bytes(50_000)))
    assert 10 < taken < 22
    left = [len(entry.body) for entry in everything(journal)]
    assert left[-taken:] == [50_000] * taken
    assert (dropped(journal), balance(journal)) == ({"journal_full": 110 - len(left)}, 0)


@pytest.mark.parametrize("size", [2 * MIB, MIB - 10_000], ids=["above the cap", "as large as the cap"])
def test_an_event_that_cannot_fit_takes_no_other_along(journal: Journal, size: int) -> None:
    journal.caps = Caps(max_bytes=MIB, drop_oldest=True)
    journal.append(events(150, body=bytes(4000)))
    assert journal.append([*events(1), NewEvent(0.0, "huge", "m", bytes(size)), *events(1)]) == 2
    assert len(everything(journal)) == 152
    assert (dropped(journal), balance(journal)) == ({"journal_full": 1}, 0)


def test_the_write_ahead_log_counts_for_the_cap(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.caps = Caps(max_bytes=8 * MIB, drop_oldest=True)
    assert journal.append(events(10)) == 10
    monkeypatch.setattr(journalfile, "wal_bytes", lambda _: 25 * MIB)  # somebody reads, and it cannot be emptied
    assert journal.append(events(10)) == 0
    monkeypatch.undo()
    assert journal.append(events(10)) == 10
    assert (dropped(journal), balance(journal)) == ({"journal_full": 10}, 0)


def test_it_warns_at_80_percent_once_and_again_only_after_it_had_room(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.caps = Caps(max_bytes=4 * MIB)

    def said() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        caplog.clear()
        return found

    fill(journal, groups=7)
    assert said() == []
    fill(journal, groups=3)
    (warning,) = said()
    assert re.search(r"journal\.sqlite is at 8\d % of journal_max_bytes \(4194304\)", warning)
    assert not journal.full
    journal.settle(Settlement(all_seqs(journal)[:100], {"written": 100}, {}))
    journal.tend(0.0)
    fill(journal, groups=1)
    assert said() == []
    journal.settle(Settlement(all_seqs(journal), {"written": journal.pending}, {}))
    journal.tend(0.0)
    (calm,) = said()
    assert "has room again" in calm
    fill(journal)
    assert len(said()) == 1


def test_a_full_journal_takes_events_again_once_it_has_room(journal: Journal) -> None:
    journal.caps = Caps(max_bytes=MIB)
    fill(journal)
    assert journal.full
    journal.settle(Settlement(all_seqs(journal), {"written": journal.pending}, {}))
    journal.tend(0.0)
    assert not journal.full
    assert fill(journal, groups=1) == 100
    assert balance(journal) == 0


def test_events_that_waited_too_long_are_dropped_and_counted(journal: Journal) -> None:
    journal.append([NewEvent(float(second), "j", "m", b"") for second in range(1000)])
    journal.caps = Caps(max_age_seconds=400.0)
    journal.tend(1000.0)
    assert [entry.captured_at for entry in everything(journal)] == [float(second) for second in range(600, 1000)]
    assert (dropped(journal), journal.pending, balance(journal)) == ({"too_old": 600}, 400, 0)


def test_without_an_age_nothing_is_too_old(journal: Journal) -> None:
    journal.append(events(10))
    journal.tend(10.0**12)
    assert journal.pending == 10


def test_the_file_gives_an_outages_room_back(journal: Journal) -> None:
    for _ in range(10):
        journal.append(events(1000, body=bytes(4000)))
    assert journal.size_on_disk > 39 * MIB
    journal.settle(Settlement(all_seqs(journal), {"written": 10_000}, {}))
    steps = 0
    while journal.tend(0.0):
        steps += 1
        assert journal.append(events(1)) == 1, "it can be used meanwhile"
    assert steps >= 2
    assert journal.size_on_disk < 30 * MIB
    assert (balance(journal), len(everything(journal))) == (0, steps)


# Dead letters


def test_dead_letters_are_told_in_order_from_either_end_or_one_alone(journal: Journal) -> None:
    given = events(6)
    journal.append(given)
    seqs = all_seqs(journal)
    bury(journal, seqs[:5])
    everyone = journal.dead_letters()
    assert [(letter.seq, letter.jid, letter.minion, letter.body) for letter in everyone] == [
        (seq, event.jid, event.minion, event.body) for seq, event in zip(seqs[:5], given[:5], strict=True)
    ]
    assert {(letter.reason, letter.error.split()[0]) for letter in everyone} == {("refused", "error")}
    assert journal.dead_letters(limit=2) == everyone[:2]
    assert journal.dead_letters(limit=2, after=seqs[1]) == everyone[2:4]
    assert journal.dead_letters(limit=2, newest=True) == everyone[-2:]
    assert journal.dead_letters(seq=seqs[3]) == [everyone[3]]
    assert journal.dead_letters(seq=seqs[5]) == journal.dead_letters(seq=-1) == []
    assert isinstance(everyone[0], DeadLetter)


def test_above_their_number_the_dead_letters_that_died_first_are_dropped_and_counted(journal: Journal) -> None:
    journal.caps = Caps(dead_letters=5)
    journal.append(events(12))
    seqs = all_seqs(journal)
    bury(journal, seqs[8:12])
    bury(journal, seqs[:3])
    assert [letter.seq for letter in journal.dead_letters()] == [*seqs[:3], *seqs[10:12]]
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 2}, 0)
    bury(journal, seqs[3:8])
    assert len(journal.dead_letters()) == 5
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 7}, 0)


def test_dead_letters_take_a_quarter_of_the_journal_at_most(journal: Journal) -> None:
    journal.caps = Caps(max_bytes=4 * MIB)
    journal.append(events(30, body=bytes(100_000)))
    seqs = all_seqs(journal)
    for seq in seqs:
        bury(journal, [seq])
    assert [letter.seq for letter in journal.dead_letters()] == seqs[-10:]
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 20}, 0)


def test_no_dead_letters_are_kept_where_none_are_wanted(journal: Journal) -> None:
    journal.caps = Caps(dead_letters=0)
    journal.append(events(3))
    bury(journal, all_seqs(journal))
    assert journal.dead_letters() == []
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 3}, 0)


def test_each_reason_has_room_for_as_many_dead_letters_and_pushes_out_none_of_another(journal: Journal) -> None:
    journal.caps = Caps(dead_letters=5)
    journal.append(events(40))
    seqs = all_seqs(journal)
    bury(journal, seqs[:3], "refused")
    bury(journal, seqs[3:8], "fault")
    for start in range(8, 38, 3):
        bury(journal, seqs[start : start + 3], "unconfirmed")
    assert [letter.seq for letter in journal.dead_letters()] == [*seqs[:8], *seqs[33:38]]
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 25}, 0)
    why = {seqs[38]: ("fault", "x"), seqs[39]: ("unconfirmed", "x")}
    journal.settle(Settlement(seqs[38:], {}, why))  # two reasons over it at once
    assert [letter.seq for letter in journal.dead_letters()] == [*seqs[:3], *seqs[4:8], *seqs[34:40]]
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 27}, 0)


def test_a_flood_of_large_dead_letters_pushes_out_none_of_a_reason_that_takes_less_room(journal: Journal) -> None:
    journal.caps = Caps(max_bytes=4 * MIB)
    journal.append(events(30, body=bytes(100_000)))
    seqs = all_seqs(journal)
    bury(journal, seqs[:3], "refused")
    for seq in seqs[3:27]:
        bury(journal, [seq], "unconfirmed")
    assert [letter.seq for letter in journal.dead_letters()] == [*seqs[:3], *seqs[20:27]]
    for seq in seqs[27:]:  # it has its share though the flood was there first
        bury(journal, [seq], "fault")
    assert [letter.seq for letter in journal.dead_letters()] == [*seqs[:3], *seqs[23:]]
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 20}, 0)


@pytest.mark.parametrize("reasons", [("refused", "unconfirmed"), ("unconfirmed", "refused")])
def test_a_reason_that_takes_all_the_room_gives_another_as_much_as_it_keeps(
    journal: Journal, reasons: tuple[str, str]
) -> None:
    journal.caps = Caps(max_bytes=4 * MIB)
    journal.append(events(30, body=bytes(100_000)))
    seqs = all_seqs(journal)
    for number, seq in enumerate(seqs):
        bury(journal, [seq], reasons[number >= 15])
    left = [(letter.seq, letter.reason) for letter in journal.dead_letters()]
    assert left == [(seq, reasons[0]) for seq in seqs[10:15]] + [(seq, reasons[1]) for seq in seqs[25:]]
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 20}, 0)


def test_the_room_of_dead_letters_goes_by_their_bytes_and_not_by_their_number(journal: Journal) -> None:
    journal.caps = Caps(max_bytes=4 * MIB)
    journal.append(events(50))
    journal.append(events(12, body=bytes(100_000)))
    seqs = all_seqs(journal)
    bury(journal, seqs[:50], "refused")
    bury(journal, seqs[50:], "unconfirmed")
    assert [letter.seq for letter in journal.dead_letters()] == [*seqs[:50], *seqs[52:]]
    assert (dropped(journal), balance(journal)) == ({"dead_letters_full": 2}, 0)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_a_dead_letter_that_is_retried_has_the_state_that_it_had_unless_it_is_trusted(
    journal: Journal, trusted: bool, every: bool
) -> None:
    given = in_each_state(6)
    journal.append(given)
    seqs = all_seqs(journal)
    bury(journal, seqs, "unconfirmed")
    assert [letter.state for letter in journal.dead_letters()] == [event.state for event in given]
    journal.close()
    journal.open()
    if every:
        assert journal.retry_dead_letters(None, trusted=trusted) == 6
    else:
        assert [journal.retry_dead_letters(seq, trusted=trusted) for seq in seqs] == [1] * 6
    assert [entry[1:4] for entry in everything(journal)] == [
        (event.captured_at, event.body, CONFIRMED if trusted and event.state != STUB else event.state)
        for event in given
    ]
    assert min(all_seqs(journal)) > seqs[-1]
    assert (journal.dead_letters(), journal.pending, balance(journal)) == ([], 6, 0)
    again = all_seqs(journal)
    bury(journal, again)  # and dead a second time
    assert [letter.state for letter in journal.dead_letters()] == [
        CONFIRMED if trusted and event.state != STUB else event.state for event in given
    ]


def test_a_dead_letter_that_was_confirmed_need_not_be_looked_for_once_more(journal: Journal) -> None:
    journal.append(in_each_state(4))
    seqs = all_seqs(journal)
    dead = dict.fromkeys(seqs[:3], ("refused", "Data too long"))
    journal.settle(Settlement(seqs, {"written": 1}, dead, {seqs[0]: b"as the cache has it", seqs[2]: bytes(10_000)}))
    assert [(letter.seq, letter.state, letter.body) for letter in journal.dead_letters()] == [
        (seqs[0], CONFIRMED, b"as the cache has it"),
        (seqs[1], CONFIRMED, b"body 1"),
        (seqs[2], CONFIRMED, bytes(10_000)),
    ]
    assert journal.retry_dead_letters(seqs[0], trusted=False) == 1
    assert [entry[2:4] for entry in everything(journal)] == [(b"as the cache has it", CONFIRMED)]
    assert (journal.books()["written"], journal.pending, balance(journal)) == (1, 1, 0)


def test_what_is_pending_or_was_refused_is_known_and_what_nobody_confirmed_is_not(journal: Journal) -> None:
    given = in_each_state(9)
    journal.append(given)
    seqs = all_seqs(journal)
    for start, reason in ((3, "refused"), (6, "unconfirmed")):
        bury(journal, seqs[start : start + 3], reason)
    jids = [event.jid for event in given]
    assert journal.known(jids) == {(event.jid, event.minion) for event in given[:6]}
    journal.retry_dead_letters(None, trusted=False)
    assert journal.known(jids) == {(event.jid, event.minion) for event in given}
    assert journal.known([]) == set()


# A full disk

_LARGE = bytes(200_000)

Call = Callable[[Journal, list[int]], object]
CALLS: dict[str, Call] = {
    "append": lambda journal, _: journal.append(events(3, body=_LARGE), dropped=2),
    "settle": lambda journal, seqs: journal.settle(
        Settlement(seqs[4:7], {"written": 1, "ignored.peer": 1}, {seqs[4]: ("refused", "x" * 200_000)})
    ),
    "settle what was confirmed": lambda journal, seqs: journal.settle(
        Settlement(seqs[4:7], {"written": 1}, dict.fromkeys(seqs[4:6], ("refused", "x")), {seqs[5]: _LARGE * 4})
    ),
    "confirm": lambda journal, seqs: journal.confirm({seqs[0]: b"", seqs[1]: _LARGE * 4, seqs[4]: b"x"}),
    "unconfirmed": lambda journal, seqs: journal.settle(
        Settlement(seqs[:2], {}, {seqs[0]: ("unconfirmed", "x" * 300_000), seqs[1]: ("unconfirmed", "x")})
    ),
    "retry": lambda journal, _: journal.retry_dead_letters(None, trusted=False),
    "retry trusted": lambda journal, _: journal.retry_dead_letters(None, trusted=True),
    "note": lambda journal, _: journal.set_note("name", "x" * 300_000),
}


def allow(journal: Journal, pages: int) -> None:
    """The disk's room: SQLite says SQLITE_FULL for a page beyond it."""
    journal._db.execute(f"PRAGMA max_page_count = {pages}")


@pytest.mark.parametrize("call", CALLS)
def test_on_a_full_disk_nothing_is_half_done_and_the_same_call_works_later(journal: Journal, call: str) -> None:
    journal.append(events(8, body=_LARGE))
    seqs = all_seqs(journal)
    bury(journal, seqs[2:4])
    (used,) = journal._db.execute("PRAGMA page_count").fetchone()
    (free,) = journal._db.execute("PRAGMA freelist_count").fetchone()
    journal.append(events(1, body=bytes(4000 * free)))  # no page is left unused
    before, pending = tables(journal), journal.pending
    allow(journal, used)
    for _ in range(3):
        with pytest.raises(sqlite3.OperationalError, match="database or disk is full"):
            CALLS[call](journal, seqs)
        assert (tables(journal), journal.pending, balance(journal)) == (before, pending, 0)
    allow(journal, 10**6)
    CALLS[call](journal, seqs)
    assert tables(journal) != before
    assert balance(journal) == 0
    assert journal.pending == len(tables(journal)["events"])


def test_a_full_disk_does_not_keep_events_from_being_settled(journal: Journal) -> None:
    journal.append(events(2000, body=bytes(1000)))
    (used,) = journal._db.execute("PRAGMA page_count").fetchone()
    allow(journal, used)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        journal.append(events(2000, body=bytes(1000)))
    journal.settle(Settlement(all_seqs(journal)[:1500], {"written": 1500}, {}))
    assert journal.append(events(1000, body=bytes(1000))) == 1000
    assert (journal.pending, balance(journal)) == (1500, 0)


# Older formats

_FORMAT_2 = f"""{FORMAT_2}
INSERT INTO events (seq, captured_at, jid, minion, body) VALUES (9, 9.5, 'gone', 'm', X'00');
DELETE FROM events;
INSERT INTO events VALUES
    (5, 5.5, 'j5', 'm5', X'6235', 1), (6, 6.5, 'j6', 'm6', X'6236', 0), (8, 8.5, 'j8', '', X'', 1);
INSERT INTO waiting VALUES (7, 7.5, 'j7', 'm7', X'6237', 99.5), (2, 2.5, 'j2', 'm2', X'6232', 98.5);
INSERT INTO dead_letters VALUES
    (1, 1.5, 'j1', 'm1', X'6231', 'Data too long', 10.5, 'refused'),
    (3, 3.5, 'j3', 'm3', X'6233', 'not in the job cache', 11.5, 'unconfirmed');
INSERT INTO counters VALUES
    ('captured', 30), ('written', 13), ('duplicates', 3), ('ignored.peer', 4), ('dropped.journal_full', 3),
    ('trimmed', 2);
INSERT INTO marks VALUES ('verified_through', 7.0), ('reconciled_at', 42.5);
"""


def older(folder: Path, statements: str) -> Path:
    """The file of an older version, as its process left it."""
    path = folder / "journal.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(statements)
    return path


def test_a_journal_of_format_1_is_upgraded_and_keeps_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = older(tmp_path, FORMAT_1)
    journal = Journal(tmp_path)
    journal.open()
    for _ in range(2):  # and once more after the upgrade
        assert everything(journal) == [Entry(2, 2.5, b"b2", UNCHECKED), Entry(3, 3.5, b"b3", UNCHECKED)]
        assert journal.dead_letters() == [
            DeadLetter(1, 1.5, 9.5, "j1", "m1", "refused", "Data too long", UNCHECKED, b"b1")
        ]
        assert journal.books() == {
            "captured": 20,
            "written": 9,
            "duplicates": 3,
            "pending": 2,
            "dead_letters": 1,
            "ignored": {"peer": 4},
            "dropped": {"memory_full": 1},
            "trimmed": 0,
        }
        assert journal.event_key(2) == bytes.fromhex("01020304050607080000000000000002")
        assert journal.known(["j1", "j2", "j3", "gone"]) == {("j1", "m1"), ("j2", "m2"), ("j3", "")}
        journal.close()
        journal.open()
    assert caplog.text.count("was upgraded from format 1 to 2") == 1
    assert caplog.text.count("was upgraded from format 2 to 3") == 1
    next_ = journalfile.NEVER_USED + 4  # in which run of the system the older one gave numbers, nobody knows
    works_on(journal, [(2, UNCHECKED), (3, UNCHECKED), (next_, STUB), (next_ + 1, UNCHECKED)])
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (journalfile.FORMAT,)
    journal.close()


def works_on(journal: Journal, then: list[tuple[int, int]]) -> None:
    """An upgraded journal does all that a new one does. ``then``: the numbers and states, dead letters again."""
    journal.append(events(1, state=STUB))
    assert journal.retry_dead_letters(None, trusted=False) > 0
    assert [(entry.seq, entry.state) for entry in everything(journal)] == then
    seqs = [seq for seq, _ in then]
    journal.confirm({seqs[0]: b"confirmed"})
    assert journal.read_these(seqs[:1], 1) == ([everything(journal)[0]], 1)
    assert everything(journal)[0][2:4] == (b"confirmed", CONFIRMED)
    journal.set_note("name", "value")
    journal.set_mark("name", 1.5)
    assert (journal.note("name"), journal.mark("name")) == ("value", 1.5)
    bury(journal, seqs[:1], "unconfirmed")
    assert [(letter.seq, letter.state) for letter in journal.dead_letters()] == [(seqs[0], CONFIRMED)]
    journal.settle(Settlement(seqs[1:], {"written": len(seqs) - 1}, {}))
    assert (everything(journal), journal.pending, balance(journal)) == ([], 0, 0)
    assert journal._db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_journal_of_format_2_is_upgraded_and_what_waited_is_in_its_place_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older(tmp_path, _FORMAT_2)
    journal = Journal(tmp_path)
    journal.open()
    for _ in range(2):  # and once more after the upgrade
        # The mark said of events up to 7 that they were verified: it is not believed.
        assert everything(journal) == [
            Entry(2, 2.5, b"b2", UNCHECKED),
            Entry(5, 5.5, b"b5", CONFIRMED),
            Entry(6, 6.5, b"b6", UNCHECKED),
            Entry(7, 7.5, b"b7", UNCHECKED),
            Entry(8, 8.5, b"", CONFIRMED),
        ]
        assert [entry.seq for entry in journal.read(after=0, rows=9, max_bytes=99, take=False)] == [2, 6, 7]
        assert journal.dead_letters() == [
            DeadLetter(1, 1.5, 10.5, "j1", "m1", "refused", "Data too long", UNCHECKED, b"b1"),
            DeadLetter(3, 3.5, 11.5, "j3", "m3", "unconfirmed", "not in the job cache", UNCHECKED, b"b3"),
        ]
        assert journal.books() == {
            "captured": 30,
            "written": 13,
            "duplicates": 3,
            "pending": 5,
            "dead_letters": 2,
            "ignored": {"peer": 4},
            "dropped": {"journal_full": 3},
            "trimmed": 2,
        }
        assert (journal.pending, balance(journal), journal.oldest()) == (5, 0, 2.5)
        assert (journal.mark("verified_through"), journal.mark("reconciled_at")) == (None, 42.5)
        assert journal.event_key(2) == bytes.fromhex("01020304050607080000000000000002")
        assert journal.known([f"j{n}" for n in range(10)] + ["gone"]) == {
            *((f"j{n}", f"m{n}") for n in (1, 2, 5, 6, 7)),
            ("j8", ""),
        }
        assert list(tables(journal)) == ["events", "dead_letters", "counters", "marks", "notes"]
        journal.close()
        journal.open()
    assert caplog.text.count("was upgraded from format 2 to 3") == 1
    assert "format 1" not in caplog.text
    assert journal.salvaged == ""
    before = [(2, UNCHECKED), (5, CONFIRMED), (6, UNCHECKED), (7, UNCHECKED), (8, CONFIRMED)]
    next_ = journalfile.NEVER_USED + 10
    works_on(journal, [*before, (next_, STUB), (next_ + 1, UNCHECKED), (next_ + 2, UNCHECKED)])
    journal.close()


@pytest.mark.parametrize("old", [FORMAT_1, _FORMAT_2], ids=["format 1", "format 2"])
def test_an_upgraded_journal_has_the_tables_of_a_new_one(tmp_path: Path, old: str) -> None:
    older(tmp_path, old)
    shapes: list[Any] = []
    for folder in (tmp_path, tmp_path / "new"):
        journal = Journal(folder)
        journal.open()
        journal.close()
        with closing(sqlite3.connect(journal.path)) as db:
            names = [name for (name,) in db.execute("SELECT name FROM sqlite_master ORDER BY name")]
            shapes.append(
                {
                    name: set(
                        db.execute(f"SELECT name, type, \"notnull\", pk, dflt_value FROM pragma_table_info('{name}')")
                    )
                    for name in names
                }
            )
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("old", "version", "in_the_way"), [(FORMAT_1, 1, "marks"), (FORMAT_1, 1, "notes"), (_FORMAT_2, 2, "notes")]
)
def test_an_upgrade_that_fails_leaves_the_old_file_as_it_was(
    tmp_path: Path, old: str, version: int, in_the_way: str
) -> None:
    path = older(tmp_path, f"{old}; CREATE TABLE {in_the_way} (in_the_way)")
    with closing(sqlite3.connect(path)) as db:
        before = list(db.iterdump())
    refuses(tmp_path, f"cannot be opened: table {in_the_way} already exists")
    with closing(sqlite3.connect(path)) as db:
        assert list(db.iterdump()) == before
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        db.execute(f"DROP TABLE {in_the_way}")
    journal = Journal(tmp_path)
    journal.open()
    assert (journal.pending, balance(journal)) == (len(everything(journal)), 0)
    journal.close()


def test_what_is_deferred_is_not_what_the_writer_is_behind_with(journal: Journal) -> None:
    journal.append([NewEvent(float(n), f"j{n}", "m", b"x") for n in range(1, 6)])
    assert journal.oldest() == 1.0
    assert journal.oldest({1, 2, 4}) == 3.0
    assert journal.oldest(range(1, 6)) is None


def test_a_list_of_dead_letters_has_no_bodies_and_all_of_them_are_retried_in_portions(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "many")
    journal.open()
    body = b"salt/job/20260329000000000001/ret/web1\n\n" + b"x" * 3_000_000 + b"\xa3fun\xa9test.ping"
    for _ in range(5):
        journal.append([NewEvent(1.0, "20260329000000000001", "web1", body)])
        (seq,) = [entry.seq for entry in journal.read(after=0, rows=9, max_bytes=9)]
        journal.settle(Settlement([seq], {}, {seq: ("refused", "too long")}))
    listed = journal.dead_letters(whole=False)
    assert [(letter.body, letter.size) for letter in listed] == [(b"", len(body))] * 5
    assert saltevent.told(*journal.ends_of_dead_letter(listed[0].seq)) == (
        "salt/job/20260329000000000001/ret/web1",
        "test.ping",
    )
    assert journal.piece_of_dead_letter(listed[0].seq, len(body) - 4, 100) == b"ping"
    assert journal.piece_of_dead_letter(listed[0].seq, len(body), 100) == b""
    small = [NewEvent(1.0, "j", "m", bytes(200_000)) for _ in range(45)]
    journal.append(small)
    bury(journal, all_seqs(journal))
    assert portions(journal, functools.partial(journal.retry_dead_letters, trusted=False)) == [25, 20, 5]
    assert journal.pending == 50
    bury(journal, all_seqs(journal))
    assert portions(journal, journal.delete_dead_letters) == [1, 1, 1, 1, 6, 20, 20]
    assert (journal.pending, balance(journal)) == (0, 0)
    journal.close()


def portions(journal: Journal, work: Callable[..., int]) -> list[int]:
    """How many at a time, until all there are now are done with."""
    through = journal.newest_dead_letter()
    done: list[int] = []
    while some := work(None, through=through):
        done.append(some)
    return done


LARGE = [b"%d" % n + b"\xff" * 300_000 for n in range(4)]


def large_bodies(journal: Journal) -> int:
    """How many stand in the file."""
    with closing(sqlite3.connect(journal.path)) as db:
        ((count,),) = db.execute("SELECT COUNT(*) FROM bodies").fetchall()
    return int(count)


def test_a_large_event_dies_and_is_retried_without_its_bytes_being_written_again(journal: Journal) -> None:
    body = bytes(10_000_000)
    journal.append([NewEvent(1.0, "j", "m", body, CONFIRMED)])
    journal._empty_log()
    for _ in range(3):
        bury(journal, all_seqs(journal))
        assert [(letter.body, letter.state) for letter in journal.dead_letters()] == [(body, CONFIRMED)]
        assert journal.retry_dead_letters(None, trusted=False) == 1
    assert journalfile.wal_bytes(journal.path) < 1_000_000
    (entry,) = everything(journal)
    assert (entry.body, entry.size, entry.state) == (b"", len(body), CONFIRMED)
    assert journal.read_whole(entry.seq, len(body)) == entry._replace(body=body, size=0)
    assert journal.read_whole(entry.seq, len(body) - 1) == entry
    assert journal.part_of(entry.seq, len(body) - 3, 10) == bytes(3)


@pytest.mark.parametrize(
    "ends", ["written", "letter", "letters", "letters_full", "small", "large", "oldest", "too_old", "gone"]
)
def test_the_bytes_of_a_large_event_go_with_it(journal: Journal, ends: str) -> None:
    journal.append([NewEvent(float(n), f"j{n}", "m", body) for n, body in enumerate(LARGE)])
    first, *others = all_seqs(journal)
    if ends == "written":
        journal.settle(Settlement([first], {"written": 1}, {}))
    elif ends in ("letter", "letters", "letters_full"):
        bury(journal, [first])
        assert large_bodies(journal) == len(LARGE)
        if ends == "letters_full":
            journal.caps = Caps(dead_letters=1)
            bury(journal, others)
            assert [letter.body for letter in journal.dead_letters()] == LARGE[-1:]
            assert large_bodies(journal) == 1
            return
        assert journal.delete_dead_letters(first if ends == "letter" else None) == 1
    elif ends == "oldest":
        journal.caps = Caps(max_bytes=journal.measured() + 100_000, drop_oldest=True)
        journal.append([NewEvent(9.0, "new", "m", bytes(200_000))])
    elif ends == "too_old":
        journal.caps = Caps(max_age_seconds=100.0)
        journal.tend(100.5)
    elif ends == "gone":
        journal.settle(Settlement([first], {"written": 1}, {}, {first: LARGE[0]}))
        journal.confirm({first: LARGE[0]})
    else:
        better = b"small" if ends == "small" else b"better" * 50_000
        journal.confirm({first: better})
        assert journal.read_whole(first, 10**6) == Entry(first, 0.0, better, CONFIRMED)
        assert large_bodies(journal) == len(LARGE) - (ends == "small")
        return
    assert large_bodies(journal) == len(LARGE) - 1
    assert [journal.read_whole(seq, 10**6) for seq in others] == [
        Entry(seq, float(n), LARGE[n], UNCHECKED) for n, seq in enumerate(others, 1)
    ]
    assert balance(journal) == 0


def test_a_stub_that_turns_out_large_is_put_away_too(journal: Journal) -> None:
    journal.append([NewEvent(1.0, "j", "m", b"stub", STUB)])
    (seq,) = all_seqs(journal)
    journal.confirm({seq: LARGE[0]})
    assert (journal.read_whole(seq, 10**6), large_bodies(journal)) == (Entry(seq, 1.0, LARGE[0], CONFIRMED), 1)


@pytest.mark.parametrize("size", [0, 5, 31, 32, 255])
def test_the_function_of_an_event_is_told_by_its_ends(size: int) -> None:
    event = b"tag\n\n" + msgpack.packb({"return": "x" * 9000, "fun": "f" * size, "id": "a"})
    assert saltevent.told(event[:4096], event[-4096:]) == ("tag", "f" * size)
    assert saltevent.told(event[:50], event[-10:]) == ("tag", "")
    several = b"tag\n\n" + msgpack.packb({"return": "x" * 9000, "fun": ["a.b", "c.d"]})
    assert saltevent.told(several[:4096], several[-4096:]) == ("tag", "a.b,c.d")
    assert saltevent.told(b"\xff", b"") == ("\\xff", "")


def test_dead_letters_over_their_bytes_go_in_one_step(journal: Journal) -> None:
    """A letter at a time, with a look at all of them for each, took minutes while nobody else got at the journal."""
    journal.caps = Caps(max_bytes=2**40)
    journal.append([NewEvent(float(n), f"j{n}", "m", bytes(2_000)) for n in range(6_000)])
    bury(journal, all_seqs(journal), "unconfirmed")
    journal.append([NewEvent(1.0, "large", "m", bytes(1_000_000))])
    journal.caps = Caps(max_bytes=4 * 8_000_000)
    began = time.process_time()
    bury(journal, all_seqs(journal), "refused")
    assert time.process_time() - began < 2
    letters = journal.dead_letters(limit=10**5)
    assert sum(len(letter.body) for letter in letters) <= 8_000_000
    assert (len(letters), letters[-1].jid, letters[0].seq > 1) == (3501, "large", True)
    assert balance(journal) == 0


@pytest.mark.parametrize("how", ["retried", "deleted"])
def test_a_dead_letter_that_is_larger_than_a_portion_is_one(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(letters, "_PORTION_BYTES", 1000)
    journal.append(events(8, body=b"x" * 450))
    journal._db.execute("UPDATE events SET body = zeroblob(1001) WHERE seq IN (3, 5)")
    dead = dict.fromkeys(range(3, 9), ("refused", "why"))
    journal.settle(Settlement([1, 2], {"written": 2}, dead))
    portions = []
    for _ in range(6):
        if how == "retried":
            portions.append(journal.retry_dead_letters(None, trusted=False, through=7))
        else:
            portions.append(journal.delete_dead_letters(None, through=7))
    assert portions[0] == 1
    assert (sum(portions), portions[-1]) == (5, 0)
    assert max(portions) == 2
    assert [letter.seq for letter in journal.dead_letters()] == [8]
    books = journal.books()
    assert (books["pending"], books["dropped"]) == ((5, {}) if how == "retried" else (0, {"dead_letter_deleted": 5}))
