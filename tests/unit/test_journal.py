"""The journal on real files: what was appended stays, once, until it is settled, and the books balance."""

from __future__ import annotations

import collections
import itertools
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from salt_mysql_engine import journal as journal_module
from salt_mysql_engine.errors import JournalError
from salt_mysql_engine.journal import Entry, Journal, NewEvent, Settlement


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "mysql_jobcache")
    opened.open()
    yield opened
    opened.close()


def events(count: int, *, body: bytes = b"body") -> list[NewEvent]:
    return [NewEvent(1000.0 + n, f"jid{n}", f"minion{n}", body) for n in range(count)]


def everything(journal: Journal) -> list[Entry]:
    return journal.read(after=0, rows=10**6, max_bytes=10**9)


def balance(journal: Journal) -> int:
    """Captured events that the books cannot account for: 0."""
    books = journal.books()
    accounted = sum(books[name] for name in ("written", "duplicates", "pending", "dead_letters"))
    return int(books["captured"] - accounted - sum(books["ignored"].values()) - sum(books["dropped"].values()))


def dead_letters(journal: Journal) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(journal.path)) as db:
        return db.execute("SELECT seq, captured_at, jid, minion, body, error FROM dead_letters ORDER BY seq").fetchall()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# In and out


def test_what_is_appended_is_read_back_oldest_first_as_it_was(journal: Journal) -> None:
    given = [NewEvent(n / 7, "j", "m", bytes([n]) * n) for n in range(256)]
    journal.append(given)
    entries = everything(journal)
    assert [entry[1:] for entry in entries] == [(event.captured_at, event.body) for event in given]
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


def test_a_read_ends_with_the_entry_that_reaches_its_bytes(journal: Journal) -> None:
    journal.append(events(10, body=bytes(100)))
    for max_bytes, rows in ((1, 1), (100, 1), (101, 2), (200, 2), (5000, 10)):
        assert len(journal.read(after=0, rows=10, max_bytes=max_bytes)) == rows


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


def test_a_settlement_is_all_or_none(journal: Journal) -> None:
    journal.append(events(2))
    first, second = (entry.seq for entry in everything(journal))
    with pytest.raises(sqlite3.IntegrityError):
        journal.settle(Settlement([first, second], {"written": 1, None: 1}, {first: "why"}))  # type: ignore[dict-item] # the point
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
    given = events(3)
    journal.append(given)
    seqs = [entry.seq for entry in everything(journal)]
    journal.settle(Settlement(seqs[:2], {"written": 1}, {seqs[1]: "Data too long"}))
    assert dead_letters(journal) == [(seqs[1], *given[1], "Data too long")]
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


# Any sequence

FATES = ("written", "duplicates", "ignored.peer", "ignored.nocache", "dead")


class JournalAgainstADict(RuleBasedStateMachine):
    """``pending`` is the model: the event under each ``seq``; ``fates`` counts what became of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.generation = 0
        self.pending: dict[int, NewEvent] = {}
        self.dead: list[tuple[object, ...]] = []
        self.fates: collections.Counter[str] = collections.Counter()
        self.captured = self.highest = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder / str(self.generation))
        self.journal.open()

    @rule(bodies=st.lists(st.binary(max_size=20), max_size=6), many=st.sampled_from([0, 0, 0, 300]))
    def append(self, bodies: list[bytes], many: int) -> None:
        given = [NewEvent(float(n), f"j{n}", "m", body) for n, body in enumerate(bodies + [b""] * many)]
        self.journal.append(given)
        self.captured += len(given)
        new = self.journal.read(after=self.highest, rows=1000, max_bytes=10**6)
        assert [entry[1:] for entry in new] == [(event.captured_at, event.body) for event in given]
        for entry, event in zip(new, given, strict=True):
            assert entry.seq > self.highest, "a seq was used again"
            self.highest = entry.seq
            self.pending[entry.seq] = event

    @rule(data=st.data(), skip=st.integers(0, 3), count=st.integers(1, 400))
    def settle(self, data: st.DataObject, skip: int, count: int) -> None:
        seqs = list(self.pending)[skip : skip + count]
        some = data.draw(st.lists(st.sampled_from(FATES), min_size=1, max_size=5))
        fates = dict(zip(seqs, itertools.cycle(some)))
        dead = {seq: f"error {seq}" for seq, fate in fates.items() if fate == "dead"}
        counts = collections.Counter(fate for fate in fates.values() if fate != "dead")
        self.journal.settle(Settlement(seqs[::-1], counts, dead))
        self.fates += counts
        self.dead += [(seq, *self.pending[seq], error) for seq, error in dead.items()]
        for seq in seqs:
            del self.pending[seq]

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
        assert [entry.seq for entry in everything(self.journal)] == list(self.pending)
        assert self.journal.pending == len(self.pending)
        assert self.journal.oldest_seq() == next(iter(self.pending), None)
        assert self.journal.newest_seq() == (list(self.pending) or [0])[-1]
        assert dead_letters(self.journal) == sorted(self.dead)

    @invariant()
    def the_books_balance(self) -> None:
        books = self.journal.books()
        assert (books["captured"], books["written"]) == (self.captured, self.fates["written"])
        assert books["ignored"].get("peer", 0) == self.fates["ignored.peer"]
        assert balance(self.journal) == 0

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)


TestJournalAgainstADict = JournalAgainstADict.TestCase
TestJournalAgainstADict.settings = hypothesis.settings(max_examples=40, stateful_step_count=25)

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
        db.execute(f"PRAGMA user_version = {journal_module.FORMAT + 1}")
    refuses(
        journal.path.parent, r"newer mysql_jobcache \(format \d+, this one knows \d+\); install that version again, or"
    )
    with closing(sqlite3.connect(journal.path)) as db:
        assert db.execute("SELECT COUNT(*) FROM events").fetchone() == (1,)
        db.execute(f"PRAGMA user_version = {journal_module.FORMAT}")
    journal.open()
    assert journal.pending == 1


def test_a_foreign_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE events (precious)")
    before = path.read_bytes()
    refuses(tmp_path, f"{re.escape(str(path))} is not a journal of mysql_jobcache; move it away")
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"precious text, not a database\n" * 100)
    refuses(tmp_path, f"cannot open the journal {re.escape(str(path))}: file is not a database")
    assert path.read_bytes() == b"precious text, not a database\n" * 100


def test_a_place_where_no_folder_can_be_is_refused_as_a_journal_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuses(tmp_path / "file" / "mysql_jobcache", "cannot open the journal")


def refuses(directory: Path, message: str) -> None:
    """In a process of its own, as the engine's is: what it opened ends with it."""
    script = "import pathlib, sys, salt_mysql_engine.journal as j; j.Journal(pathlib.Path(sys.argv[1])).open()"
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(rf"JournalError: .*{message}", done.stderr), done.stderr
