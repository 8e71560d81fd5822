"""A journal that the disk has damaged: it goes on at once, with every row that can be read, and the books balance."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType

import hypothesis
import pytest
from hypothesis import strategies as st

from salt_mysql_engine import salvage
from salt_mysql_engine.errors import JournalError
from salt_mysql_engine.journal import Caps, DeadLetter, Entry, Journal, NewEvent, Settlement
from salt_mysql_engine.journalfile import CONFIRMED, STUB, UNCHECKED
from tests.support.oldjournals import FORMAT_2

PAGE = 4096
EVENTS, DEAD = 1400, 200
TABLES = ("events", "dead_letters")
STATES = (UNCHECKED, CONFIRMED, STUB)


def body(number: int) -> bytes:
    """300 bytes, no two alike; each 50th goes over a page."""
    return b"%08d" % number + bytes([number % 256]) * (9000 if number % 50 == 0 else 292)


def build(folder: Path) -> Journal:
    """An open journal with rows in every table, on many pages each."""
    journal = Journal(folder)
    journal.open()
    journal.caps = Caps(dead_letters=10**6)
    journal.append(
        [NewEvent(1e9 + n, f"j{n % 700}", f"m{n}", body(n), STATES[n % 3]) for n in range(EVENTS + DEAD + 100)]
    )
    seqs = [entry.seq for entry in everything(journal)]
    journal.settle(Settlement(seqs[:100], {"written": 60, "duplicates": 30, "ignored.peer": 10}, {}))
    dead = seqs[300 : 300 + DEAD]
    why = {seq: (("refused", "unconfirmed")[seq % 2], f"error {seq}") for seq in dead}
    journal.settle(Settlement(dead, {}, why, {dead[5]: b"confirmed", dead[6]: bytes(9000)}))
    journal.confirm({seq: b"confirmed %d" % seq for seq in seqs[900:1000]})
    journal.set_mark("reconciled_at", 7.0)
    journal.set_note("where", NOTE)
    return journal


NOTE = "N\N{LATIN SMALL LETTER O WITH DIAERESIS}te " * 2000
"""On pages of its own."""


def everything(journal: Journal) -> list[Entry]:
    """All that is pending; taken for no batch by this look."""
    taken_through = journal.taken_through
    try:
        return journal.read(after=0, rows=10**6, max_bytes=10**9)
    finally:
        journal._taken_through = taken_through


def holdings(journal: Journal) -> dict[str, dict[int, tuple[object, ...]]]:
    """What the journal holds, by table and ``seq``, as its readers see it."""
    return {
        "events": {entry.seq: entry[:4] for entry in everything(journal)},
        "dead_letters": {letter.seq: letter[:9] for letter in journal.dead_letters(limit=10**6)},
    }


def balance(journal: Journal) -> int:
    """Captured events that the books cannot account for: 0."""
    books = journal.books()
    accounted = sum(books[name] for name in ("written", "duplicates", "pending", "dead_letters"))
    return int(books["captured"] - accounted - sum(books["ignored"].values()) - sum(books["dropped"].values()))


def lost(journal: Journal) -> int:
    return int(journal.books()["dropped"].get("journal_corrupt", 0))


def count(held: dict[str, dict[int, tuple[object, ...]]]) -> int:
    return sum(map(len, held.values()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, tuple[object, ...]]]]:
    """The folder of a closed journal, and what it holds."""
    journal = build(tmp_path_factory.mktemp("whole") / "journal")
    held = holdings(journal)
    assert {name: len(rows) for name, rows in held.items()} == {"events": EVENTS, "dead_letters": DEAD}
    assert balance(journal) == 0
    journal.close()
    return journal.path.parent, held


Whole = tuple[Path, dict[str, dict[int, tuple[object, ...]]]]


@pytest.fixture(scope="module")
def intact(whole: Whole) -> Path:
    """The whole journal's folder."""
    return whole[0]


@pytest.fixture
def folder(whole: Whole, tmp_path: Path) -> Path:
    """A copy of the whole journal, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "journal"))


# The file's pages (https://www.sqlite.org/fileformat.html)


def root_of(path: Path, name: str) -> int:
    with closing(sqlite3.connect(path)) as db:
        ((page,),) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,))
    return int(page)


def tree(content: bytes, page: int) -> Iterator[tuple[int, bool]]:
    """The pages of a B-tree, and whether each is a leaf."""
    at = (page - 1) * PAGE
    kind, cells = content[at], int.from_bytes(content[at + 3 : at + 5], "big")
    yield page, kind in (10, 13)
    if kind in (2, 5):
        for cell in range(cells):
            pointer = int.from_bytes(content[at + 12 + 2 * cell : at + 14 + 2 * cell], "big")
            yield from tree(content, int.from_bytes(content[at + pointer : at + pointer + 4], "big"))
        yield from tree(content, int.from_bytes(content[at + 8 : at + 12], "big"))


def varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(at, at + 9):
        value = value << 7 | content[place] & 0x7F
        if content[place] < 0x80:
            return value, place + 1
    raise AssertionError("a longer number than these files have")


def seqs_on(content: bytes, page: int) -> set[int]:
    """The rows on a leaf of a table."""
    at = (page - 1) * PAGE
    seqs = set()
    for cell in range(int.from_bytes(content[at + 3 : at + 5], "big")):
        pointer = int.from_bytes(content[at + 8 + 2 * cell : at + 10 + 2 * cell], "big")
        _, start = varint(content, at + pointer)
        seqs.add(varint(content, start)[0])
    return seqs


def pages_of(path: Path, name: str) -> tuple[list[int], list[int]]:
    """The inner pages and the leaves of a table or index."""
    found = list(tree(path.read_bytes(), root_of(path, name)))
    return [page for page, is_leaf in found if not is_leaf], [page for page, is_leaf in found if is_leaf]


def destroy(path: Path, *pages: int, with_: bytes = bytes(PAGE)) -> None:
    with path.open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * PAGE)
            file.write(with_)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """An end to what would never end."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def goes_on(journal: Journal) -> None:
    """It takes, gives and settles events, under numbers that were never used."""
    used = set().union(*holdings(journal).values())
    journal.append([NewEvent(2e9, "new", "m", b"new")])
    new = everything(journal)[-1]
    assert (new.captured_at, new.body, new.state, new.seq in used) == (2e9, b"new", UNCHECKED, False)
    assert (balance(journal), journal.known(["new"])) == (0, {("new", "m")})
    journal.settle(Settlement([new.seq], {"written": 1}, {}))
    assert balance(journal) == 0


# One kind of damage at a time


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "damage", [bytes(PAGE), b"\xff" * PAGE, b"\x0a" + b"\x5a" * (PAGE - 1)], ids=lambda it: f"{it[0]:02x}"
)
def test_a_destroyed_leaf_costs_the_rows_on_it_and_no_other(
    folder: Path, whole: Whole, caplog: pytest.LogCaptureFixture, table: str, place: float, damage: bytes
) -> None:
    journal = Journal(folder)
    _, leaves = pages_of(journal.path, table)
    assert len(leaves) > 10
    page = leaves[round(place * (len(leaves) - 1))]
    gone = seqs_on(journal.path.read_bytes(), page)
    destroy(journal.path, page, with_=damage)
    corrupt = journal.path.read_bytes()
    journal.open()
    found = holdings(journal)
    expected = {**whole[1], table: {seq: row for seq, row in whole[1][table].items() if seq not in gone}}
    assert found == expected
    assert (lost(journal), balance(journal)) == (len(gone), 0)
    assert journal.salvaged in caplog.text
    assert Path(journal.salvaged).read_bytes()[PAGE:] == corrupt[PAGE:]
    assert f"Saved from it: {len(found['events'])} events, {len(found['dead_letters'])} dead letters" in caplog.text
    assert (journal.mark("reconciled_at"), journal.note("where"), journal.books()["written"]) == (7.0, NOTE, 60)
    goes_on(journal)
    journal.close()
    journal.open()
    assert {name: rows.keys() for name, rows in holdings(journal).items()} == {
        name: rows.keys() for name, rows in expected.items()
    }
    journal.close()


def test_what_lies_behind_a_destroyed_leaf_is_saved_in_bounded_memory(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    size = 100_000
    for many, body_size in ((5000, 10), (300, size)):
        journal.append([NewEvent(1e9, "j", "m", bytes(body_size)) for _ in range(many)])
    journal.close()
    _, leaves = pages_of(journal.path, "events")
    destroy(journal.path, leaves[0])
    tracemalloc.start()
    journal.open()
    held = journal.read(after=0, rows=10, max_bytes=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert journal.salvaged
    assert held
    assert journal.books()["pending"] == 5300 - lost(journal)
    assert lost(journal) < 200
    assert peak < 20 * size
    journal.close()


@pytest.mark.parametrize("index", ["events_by_job", "dead_letters_by_job"])
def test_a_destroyed_index_costs_nothing(folder: Path, whole: Whole, index: str) -> None:
    journal = Journal(folder)
    inner, leaves = pages_of(journal.path, index)
    destroy(journal.path, *inner, *leaves)
    journal.open()
    known = journal.known([f"j{n}" for n in range(700)])
    assert len(known) == EVENTS + DEAD // 2  # without the unconfirmed
    assert journal.salvaged
    assert holdings(journal) == whole[1]
    assert (lost(journal), balance(journal)) == (0, 0)
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("table", TABLES)
def test_a_destroyed_root_costs_its_table_and_no_other(folder: Path, whole: Whole, table: str) -> None:
    journal = Journal(folder)
    destroy(journal.path, root_of(journal.path, table))
    journal.open()
    assert holdings(journal) == {**whole[1], table: {}}
    assert (lost(journal), balance(journal)) == (len(whole[1][table]), 0)
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("damage", ["root", "chain", "missing", "table"])
def test_of_large_events_those_are_lost_whose_bytes_are_broken_and_no_other(folder: Path, damage: str) -> None:
    journal = Journal(folder)
    journal.open()
    journal.append([NewEvent(1.0, f"large{n}", "m", b"%d" % n + b"\xaa\xbb" * 200_000) for n in range(6)])
    seqs = [entry.seq for entry in everything(journal) if entry.size]
    journal.settle(Settlement(seqs[3:], {}, dict.fromkeys(seqs[3:], ("refused", "why"))))
    held = holdings(journal)
    whole = {seq: entry for seq in seqs[:3] if (entry := journal.read_whole(seq, 10**6))}
    journal.close()
    if damage == "root":
        destroy(journal.path, root_of(journal.path, "bodies"))
        gone = set(seqs)
    elif damage == "chain":
        pages = journal.path.read_bytes()
        first = next(at for at in range(PAGE, len(pages), PAGE) if pages[at + 4 : at + 4 + 500] in whole[seqs[0]].body)
        with journal.path.open("r+b") as file:  # an overflow page begins with the number of the next
            file.seek(first)
            file.write(b"\xff" * 4)
        gone = set()
    else:
        statement = "DROP TABLE bodies" if damage == "table" else "DELETE FROM bodies WHERE id IN (2, 5)"
        with closing(sqlite3.connect(journal.path, isolation_level=None)) as db:
            db.execute(statement)
        gone = set(seqs) if damage == "table" else {seqs[1], seqs[4]}
    journal.open()
    found = {seq: journal.read_whole(seq, 10**6) for seq in seqs[:3]}
    letters = {letter.seq: letter.body for letter in journal.dead_letters(limit=10**6)}
    if damage == "chain":
        gone = {seq for seq in seqs if found.get(seq) is None and seq not in letters}
        assert len(gone) == 1
    assert journal.salvaged
    assert found == {seq: None if seq in gone else whole[seq] for seq in seqs[:3]}
    assert letters == {seq: row[8] for seq, row in held["dead_letters"].items() if seq not in gone}
    assert holdings(journal)["events"] == {seq: row for seq, row in held["events"].items() if seq not in gone}
    assert (lost(journal), balance(journal)) == (len(gone), 0)
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("table", ["counters", "marks", "notes", "identity", "sqlite_sequence"])
def test_a_destroyed_small_table_costs_no_event(folder: Path, whole: Whole, table: str) -> None:
    journal = Journal(folder)
    destroy(journal.path, root_of(journal.path, table))
    journal.open()
    journal.append([NewEvent(2e9, "new", "m", b"new")])
    assert journal.salvaged or table in ("marks", "notes")
    found = holdings(journal)
    found["events"].popitem()
    assert found == whole[1]
    assert balance(journal) == 0
    known = (journal.mark("reconciled_at"), journal.note("where"))
    assert journal.salvaged
    assert known == {"marks": (None, NOTE), "notes": (7.0, None), "sqlite_sequence": (None, None)}.get(
        table, (7.0, NOTE)
    )
    journal.set_mark("reconciled_at", 8.0)
    journal.set_note("where", "there")
    assert (journal.mark("reconciled_at"), journal.note("where")) == (8.0, "there")
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("table", TABLES)
def test_a_state_that_is_none_is_damage_and_costs_its_row(folder: Path, whole: Whole, table: str) -> None:
    journal = Journal(folder)
    seq = list(whole[1][table])[17]
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute(f"UPDATE {table} SET state = 'text' WHERE seq = ?", (seq,))
        db.commit()
    journal.open()
    found = holdings(journal)
    assert journal.salvaged
    assert found == {**whole[1], table: {each: row for each, row in whole[1][table].items() if each != seq}}
    assert (lost(journal), balance(journal)) == (1, 0)
    goes_on(journal)
    journal.close()


def test_a_note_that_is_no_text_costs_no_other(folder: Path) -> None:
    journal = Journal(folder)
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute("INSERT INTO notes VALUES ('what', X'FF00'), ('why', 'so')")
        db.commit()
    destroy(journal.path, pages_of(journal.path, "events")[1][3])
    journal.open()
    everything(journal)
    assert journal.salvaged
    assert [journal.note(name) for name in ("what", "where", "why")] == [None, NOTE, "so"]
    journal.close()


def test_a_destroyed_header_costs_everything_but_the_next_event(folder: Path) -> None:
    journal = Journal(folder)
    destroy(journal.path, 1)
    journal.open()
    assert journal.salvaged
    assert (count(holdings(journal)), balance(journal)) == (0, 0)
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("table", ["identity", "marks", "notes", "events", "dead_letters"])
def test_damage_of_which_sqlite_speaks_in_no_utf_8_costs_that_table_at_most(
    folder: Path, whole: Whole, table: str
) -> None:
    journal = Journal(folder)
    content = journal.path.read_bytes()
    at = content.index(f"CREATE TABLE {table}".encode())
    assert at < PAGE
    journal.path.write_bytes(content[: at + 5] + b"\x80" + content[at + 6 :])
    with closing(sqlite3.connect(journal.path)) as db, pytest.raises(UnicodeDecodeError):
        db.execute("SELECT * FROM counters")
    journal.open()
    assert journal.salvaged
    found = holdings(journal)
    assert found == {name: {} if name == table else rows for name, rows in whole[1].items()}
    assert (lost(journal), balance(journal)) == (len(whole[1].get(table, {})), 0)
    goes_on(journal)
    journal.close()


def test_new_numbers_and_keys_are_never_those_of_before_whatever_was_lost(tmp_path: Path) -> None:
    """A key that was used already would make a new event in ``salt_events`` a duplicate of an old one."""
    journal = Journal(tmp_path)
    journal.open()
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute("INSERT INTO sqlite_sequence VALUES ('events', 5000000)")
        db.commit()
    journal.append([NewEvent(1e9, "j", "m", b"old")] * 100)
    old = everything(journal)
    assert old[0].seq > 5_000_000
    keys = {journal.event_key(entry.seq) for entry in old}
    journal.confirm({entry.seq: entry.body for entry in old})
    journal.set_mark("through", old[-1].seq)
    journal.set_note("through", str(old[-1].seq))
    journal.settle(Settlement([entry.seq for entry in old], {"written": 100}, {}))
    journal.close()
    destroy(journal.path, root_of(journal.path, "sqlite_sequence"))
    journal.open()
    journal.append([NewEvent(1e9, "j", "m", b"new")] * 100)
    assert journal.salvaged
    new = everything(journal)
    assert {entry.state for entry in new} == {UNCHECKED}, "they would become rows without a look into the job cache"
    assert (journal.mark("through"), journal.note("through")) == (None, None), "they may name numbers"
    assert keys.isdisjoint(journal.event_key(entry.seq) for entry in new)
    # The old numbers come round 4,000,000 events later at the latest.
    same_journal = journal.event_key(0)[:8] == min(keys)[:8]
    assert not same_journal or new[0].seq > old[-1].seq
    journal.close()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_of_a_file_that_was_cut_off_what_is_left_is_saved(folder: Path, whole: Whole, share: float) -> None:
    journal = Journal(folder)
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[: int(share * len(content) / PAGE) * PAGE])
    journal.open()
    found = holdings(journal)
    assert all(rows.items() <= whole[1][name].items() for name, rows in found.items())
    if share > 0.95:
        assert count(found) > 0.9 * count(whole[1])
    assert balance(journal) == 0
    goes_on(journal)
    journal.close()


def test_garbage_at_the_end_of_the_file_costs_nothing(folder: Path, whole: Whole) -> None:
    journal = Journal(folder)
    with journal.path.open("ab") as file:
        file.write(b"\x5a" * (3 * PAGE + 77))
    journal.open()
    assert holdings(journal) == whole[1]
    assert balance(journal) == 0
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.9])
def test_a_damaged_log_costs_what_was_committed_after_the_damage(tmp_path: Path, place: float) -> None:
    journal = build(tmp_path / "journal")
    left = Path(shutil.copytree(tmp_path / "journal", tmp_path / "left"))  # as a kill leaves it
    held = holdings(journal)
    journal.close()
    wal = left / "journal.sqlite-wal"
    content = bytearray(wal.read_bytes())
    at = int(place * len(content))
    assert at < len(content) > 100 * PAGE
    content[at : at + 100] = bytes(100)
    wal.write_bytes(content)
    journal = Journal(left)
    journal.open()
    found = holdings(journal)
    all_rows = {seq for rows in held.values() for seq in rows}
    assert all(seq in all_rows or seq <= 100 for rows in found.values() for seq in rows)
    assert balance(journal) == 0
    goes_on(journal)
    journal.close()


def test_only_the_last_three_corrupt_files_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    names = []
    for number in range(5):
        journal.path.write_bytes(b"%d is no database" % number * 1000)
        journal.open()
        names.append(journal.salvaged)
        journal.close()
    assert sorted(map(str, tmp_path.glob("*corrupt*"))) == names[-3:]
    assert Path(names[-1]).read_bytes().startswith(b"4 is no database")


def test_the_corrupt_file_is_for_its_owner_only_too(folder: Path) -> None:
    journal = Journal(folder)
    destroy(journal.path, *pages_of(journal.path, "events")[1])
    journal.open()
    everything(journal)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    journal.close()


# While it is open


def damage_while_open(journal: Journal, table: str, *, leaf: int) -> set[int]:
    """Destroys a leaf under the open journal, which has nothing of it in memory; gives the rows on it."""
    journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    _, leaves = pages_of(journal.path, table)
    gone = seqs_on(journal.path.read_bytes(), leaves[leaf])
    destroy(journal.path, leaves[leaf])
    journal._db.execute("PRAGMA shrink_memory").fetchall()
    return gone


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Journal]:
    journal = build(tmp_path / "journal")
    yield journal
    journal.close()


@pytest.mark.parametrize("table", TABLES)
def test_damage_while_it_is_open_is_mended_in_the_call_that_meets_it(
    opened: Journal, caplog: pytest.LogCaptureFixture, table: str
) -> None:
    held = holdings(opened)
    gone = damage_while_open(opened, table, leaf=4)
    found = holdings(opened)
    assert found == {**held, table: {seq: row for seq, row in held[table].items() if seq not in gone}}
    assert (lost(opened), balance(opened)) == (len(gone), 0)
    assert caplog.text.count("The corrupt journal was set aside as") == 1
    goes_on(opened)


def test_damage_that_an_append_meets_costs_none_of_the_new_events(opened: Journal) -> None:
    held = holdings(opened)
    gone = damage_while_open(opened, "events", leaf=-1)
    new = [NewEvent(2e9 + n, "new", f"m{n}", b"new") for n in range(300)]
    assert opened.append(new) == 300
    entries = everything(opened)
    assert [(entry.captured_at, entry.body) for entry in entries[-300:]] == [
        (each.captured_at, each.body) for each in new
    ]
    assert [entry.seq for entry in entries[:-300]] == [seq for seq in held["events"] if seq not in gone]
    assert (lost(opened), balance(opened)) == (len(gone), 0)


@pytest.mark.parametrize("fate", ["written", "written one by one", "dead"])
def test_settling_what_the_salvage_lost_puts_the_books_right(opened: Journal, fate: str) -> None:
    """A batch is in the writer's memory, and reaches the database, whatever became of the journal meanwhile."""
    before = opened.books()
    batch = opened.read(after=0, rows=400, max_bytes=10**9)
    gone = damage_while_open(opened, "events", leaf=3) | damage_while_open(opened, "events", leaf=-2)
    assert opened.pending == before["pending"]
    everything(opened)
    in_batch = gone & {entry.seq for entry in batch}
    assert in_batch
    assert in_batch != gone
    assert lost(opened) == len(gone)
    seqs = [entry.seq for entry in batch]
    if fate != "dead":
        for some in [seqs] if fate == "written" else [[seq] for seq in seqs]:
            opened.settle(Settlement(some, {"written": len(some)}, {}))
        assert lost(opened) == len(gone - in_batch)
        assert opened.books()["written"] == before["written"] + len(seqs)
    else:  # what is gone cannot be kept as a dead letter
        confirmed = dict.fromkeys(seqs, b"confirmed")
        opened.settle(Settlement(seqs, {}, dict.fromkeys(seqs, ("refused", "error")), confirmed))
        assert lost(opened) == len(gone)
        assert opened.books()["dead_letters"] == DEAD + len(seqs) - len(in_batch)
    assert balance(opened) == 0
    assert opened.pending == before["pending"] - len(seqs) - len(gone - in_batch)
    assert not {entry.seq for entry in everything(opened)} & {*seqs, *gone}


def test_confirming_what_the_salvage_lost_puts_nothing_wrong(opened: Journal) -> None:
    held = holdings(opened)["events"]
    gone = damage_while_open(opened, "events", leaf=2)
    opened.confirm(dict.fromkeys(held, b"x"))
    assert everything(opened) == [Entry(seq, row[1], b"x", CONFIRMED) for seq, row in held.items() if seq not in gone]  # type: ignore[arg-type] # a time
    assert (lost(opened), balance(opened)) == (len(gone), 0)
    assert opened.pending == EVENTS - len(gone)


def test_a_read_by_numbers_that_meets_damage_gives_what_the_salvage_saved(opened: Journal) -> None:
    held = holdings(opened)["events"]
    gone = damage_while_open(opened, "events", leaf=2)
    entries, looked = opened.read_these(list(held), 10**9)
    assert looked == EVENTS
    assert [entry[:4] for entry in entries] == [row for seq, row in held.items() if seq not in gone]
    assert (lost(opened), balance(opened)) == (len(gone), 0)
    assert opened.taken_through == 0


def test_a_salvage_for_which_there_is_no_room_is_tried_again_and_loses_nothing_meanwhile(
    opened: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = holdings(opened)
    gone = damage_while_open(opened, "events", leaf=5)
    real = salvage.copy

    def full(source: Path, into: sqlite3.Connection) -> salvage.Report:
        into.execute("PRAGMA max_page_count = 50")
        return real(source, into)

    monkeypatch.setattr(salvage, "copy", full)
    for _ in range(3):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            everything(opened)
    monkeypatch.undo()
    assert [entry.seq for entry in everything(opened)] == [seq for seq in held["events"] if seq not in gone]
    assert (lost(opened), balance(opened)) == (len(gone), 0)
    goes_on(opened)


# Older formats


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a closed journal of format 2, and what it holds: of each 5 numbers one waits and one is dead."""
    folder = tmp_path_factory.mktemp("old") / "journal"
    folder.mkdir()
    held: dict[str, dict[int, tuple[object, ...]]] = {"events": {}, "waiting": {}, "dead_letters": {}}
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        db.executescript(FORMAT_2)
        db.execute("INSERT INTO marks VALUES ('verified_through', 900.0), ('reconciled_at', 7.0)")
        for seq in range(1, 1001):
            row = (seq, 1e9 + seq, f"j{seq % 100}", f"m{seq}", body(seq))
            if seq % 5 == 1:
                db.execute("INSERT INTO waiting VALUES (?, ?, ?, ?, ?, 5.0)", row)
                held["waiting"][seq] = (seq, 1e9 + seq, body(seq), UNCHECKED)
            elif seq % 5 == 2:
                db.execute("INSERT INTO dead_letters VALUES (?, ?, ?, ?, ?, 'error', 2e9, 'unconfirmed')", row)
                held["dead_letters"][seq] = (seq, 1e9 + seq, 2e9, *row[2:4], "unconfirmed", "error", UNCHECKED, row[4])
            else:
                db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (*row, seq % 3 == 0))
                held["events"][seq] = (seq, 1e9 + seq, body(seq), CONFIRMED if seq % 3 == 0 else UNCHECKED)
        db.execute("INSERT INTO counters VALUES ('captured', 1300), ('written', 300), ('trimmed', 5)")
        db.commit()
    return folder, held


def upgraded(held: dict[str, dict[int, tuple[object, ...]]], *without: int) -> dict[str, dict[int, tuple[object, ...]]]:
    """The same in this format."""
    pending = held["events"] | held["waiting"]
    return {
        "events": {seq: pending[seq] for seq in sorted(pending) if seq not in without},
        "dead_letters": {seq: row for seq, row in held["dead_letters"].items() if seq not in without},
    }


def user_version(path: str | Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        ((version,),) = db.execute("PRAGMA user_version")
    return int(version)


def test_a_large_journal_of_format_2_is_upgraded_without_a_salvage(old: Whole, tmp_path: Path) -> None:
    journal = Journal(Path(shutil.copytree(old[0], tmp_path / "journal")))
    journal.open()
    found = holdings(journal)
    assert found == upgraded(old[1])
    assert list(found["events"]) == sorted(found["events"])
    assert (journal.salvaged, lost(journal), balance(journal)) == ("", 0, 0)
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("table", ["events", "waiting", "dead_letters"])
@pytest.mark.parametrize("damage", [bytes(PAGE), b"\xff" * PAGE], ids=["00", "ff"])
def test_a_corrupt_journal_of_format_2_costs_the_rows_of_the_broken_pages_and_no_other(
    old: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture, table: str, damage: bytes
) -> None:
    journal = Journal(Path(shutil.copytree(old[0], tmp_path / "journal")))
    # The upgrade meets the one for sure, and gives up.
    broken = [pages_of(journal.path, "waiting")[1][5], pages_of(journal.path, table)[1][8]]
    gone = set().union(*(seqs_on(journal.path.read_bytes(), page) for page in broken))
    destroy(journal.path, *broken, with_=damage)
    journal.open()
    found = holdings(journal)
    assert found == upgraded(old[1], *gone)
    assert {row[3] for row in found["events"].values()} == {UNCHECKED, CONFIRMED}
    assert (lost(journal), balance(journal)) == (len(gone), 0)
    assert f"Saved from it: {len(found['events'])} events, {len(found['dead_letters'])} dead letters" in caplog.text
    assert (user_version(journal.salvaged), user_version(journal.path)) == (2, 3)
    assert (journal.mark("reconciled_at"), journal.note("where")) == (7.0, None)
    assert journal.event_key(0)[:8] == bytes.fromhex("0102030405060708")
    known = journal.known([f"j{n}" for n in range(100)])
    assert known == {(f"j{seq % 100}", f"m{seq}") for seq in found["events"]}
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("table", ["events", "waiting", "dead_letters"])
def test_a_destroyed_root_in_a_journal_of_format_2_costs_its_table_and_no_other(
    old: Whole, tmp_path: Path, table: str
) -> None:
    journal = Journal(Path(shutil.copytree(old[0], tmp_path / "journal")))
    destroy(journal.path, root_of(journal.path, table))
    journal.open()
    assert holdings(journal) == upgraded(old[1], *old[1][table])
    assert (lost(journal), balance(journal)) == (len(old[1][table]), 0)
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("version", [2, 3])
def test_a_disk_that_gets_full_anywhere_in_a_salvage_costs_nothing(
    old: Whole, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    source, held = old if version == 2 else whole
    folder = Path(shutil.copytree(source, tmp_path / "journal"))
    path = folder / "journal.sqlite"
    if version == 2:
        destroy(path, *pages_of(path, "waiting_by_job")[1])
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("INSERT INTO counters VALUES ('x', 'no number')")
            db.commit()
    expected = upgraded(held) if version == 2 else held
    real, most = salvage.copy, [10**6]

    def limited(source: Path, into: sqlite3.Connection) -> salvage.Report:
        into.execute(f"PRAGMA max_page_count = {most[-1]}")
        return real(source, into)

    monkeypatch.setattr(salvage, "copy", limited)
    done = Path(shutil.copytree(folder, tmp_path / "done"))
    journal = Journal(done)
    journal.open()
    ((needed,),) = journal._db.execute("PRAGMA page_count")
    assert (holdings(journal), balance(journal)) == (expected, 0)
    assert journal.salvaged
    journal.close()
    journal = Journal(folder)
    for pages in (20, *range(needed // 8, needed, needed // 8), *range(needed - 20, needed)):
        most.append(pages)
        with pytest.raises(JournalError, match="database or disk is full"):
            journal.open()
    most.append(needed)
    journal.open()
    assert (holdings(journal), lost(journal), balance(journal)) == (expected, 0, 0)
    assert (journal.mark("reconciled_at"), journal.note("where")) == (7.0, NOTE if version == 3 else None)
    goes_on(journal)
    journal.close()


# Killed in the middle of it

_KILLED = """
import os, sys
from pathlib import Path
from salt_mysql_engine.journal import Journal

moment, when = int(sys.argv[2]), sys.argv[3]
rename = Path.rename

def killed(self, target):
    global moment
    moment -= 1
    if moment == 0 and when == "before":
        os._exit(9)
    try:
        return rename(self, target)
    finally:
        if moment == 0:
            os._exit(9)

Path.rename = killed
journal = Journal(Path(sys.argv[1]))
journal.open()
journal.read(after=0, rows=10**6, max_bytes=10**9)
"""


def kill_at(folder: Path, rename: int, when: str) -> int:
    return subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(rename), when], check=False).returncode


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rename", [1, 2, 3, 4, 5])
def test_a_kill_at_any_rename_of_a_salvage_costs_nothing_more(
    folder: Path, whole: Whole, rename: int, when: str
) -> None:
    journal = Journal(folder)
    _, leaves = pages_of(journal.path, "events")
    gone = seqs_on(journal.path.read_bytes(), leaves[7])
    destroy(journal.path, leaves[7])
    assert kill_at(folder, rename, when) == 9
    journal.open()
    found = holdings(journal)
    assert found == {**whole[1], "events": {seq: row for seq, row in whole[1]["events"].items() if seq not in gone}}
    assert (lost(journal), balance(journal)) == (len(gone), 0)
    goes_on(journal)
    journal.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rename", [1, 2, 3, 4, 5])
def test_the_log_of_a_corrupt_file_is_never_taken_for_the_new_ones(
    opened: Journal, tmp_path: Path, rename: int, when: str
) -> None:
    """Killed before the old log was moved too, it lies beside a file that it does not belong to."""
    opened._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    opened.set_mark("reconciled_at", 1e9)
    left = Path(shutil.copytree(opened.path.parent, tmp_path / "left"))  # as a kill leaves it, log and all
    assert 0 < (left / "journal.sqlite-wal").stat().st_size < 4 * PAGE
    destroy(left / "journal.sqlite", 1)
    assert kill_at(left, rename, when) == 9
    journal = Journal(left)
    journal.open()
    goes_on(journal)
    assert journal._db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert (journal.mark("reconciled_at"), count(holdings(journal))) == (None, 0), "it has pages of the old one"
    journal.close()


# Any damage

spots = st.tuples(st.floats(0, 1), st.integers(0, PAGE - 1), st.binary(min_size=1, max_size=12))
damages = st.one_of(
    st.tuples(st.just("bytes"), st.lists(spots, min_size=1, max_size=20)),
    st.tuples(st.just("zeros"), st.lists(spots, min_size=1, max_size=4)),
    st.tuples(st.just("cut"), st.lists(spots, min_size=1, max_size=1)),
    st.tuples(st.just("small tables"), st.lists(spots, min_size=1, max_size=20)),
)


def damage(content: bytearray, small: list[int], how: str, where: list[tuple[float, int, bytes]]) -> None:
    pages = len(content) // PAGE
    at = [round(share * (pages - 1)) * PAGE for share, _, _ in where]
    if how == "cut":
        del content[at[0] + where[0][1] :]
    for start, (share, offset, changed) in zip(at, where, strict=True):
        if how == "zeros":
            content[start : start + PAGE] = bytes(PAGE)
        elif how == "small tables":  # near the end of their pages, where the values are
            place = small[round(share * (len(small) - 1))] * PAGE - 1 - offset % 200 - len(changed)
            content[place : place + len(changed)] = changed
        elif how == "bytes":
            content[start + offset : start + offset + len(changed)] = changed


@hypothesis.settings(max_examples=60)
@hypothesis.given(damages)
def test_no_damage_keeps_the_journal_from_going_on(
    intact: Path, tmp_path_factory: pytest.TempPathFactory, how: tuple[str, list[tuple[float, int, bytes]]]
) -> None:
    folder = tmp_path_factory.mktemp("any") / "journal"
    shutil.copytree(intact, folder)
    journal = Journal(folder)
    small = [root_of(journal.path, name) for name in ("counters", "marks", "notes", "sqlite_sequence", "identity")]
    content = bytearray(journal.path.read_bytes())
    # The header of a database that is someone else's, or newer, is refused, and that is right.
    header = bytes(content[:100])
    damage(content, small, *how)
    content[:100] = header[: len(content)]
    journal.path.write_bytes(content)
    with within(20):
        journal.open()
        try:
            found = holdings(journal)
            for row in found["events"].values():
                assert tuple(map(type, row)) == (int, float, bytes, int)
            for letter in journal.dead_letters(limit=10**6):
                sound = DeadLetter(1, 1.0, 1.0, "j", "m", "r", "e", UNCHECKED, b"")
                assert tuple(map(type, letter)) == tuple(map(type, sound))
            journal.append([NewEvent(2e9, "new", "m", b"new")] * 3)
            assert [entry.body for entry in everything(journal)][-3:] == [b"new"] * 3
            new = everything(journal)[-3:]
            assert {entry.state for entry in new} == {UNCHECKED}
            assert journal.read_these([entry.seq for entry in new], 10**6) == (new, 3)
            journal.confirm({entry.seq: entry.body for entry in new[:1]})
            assert everything(journal)[-3:] == [new[0]._replace(state=CONFIRMED), *new[1:]]
            assert len(journal.event_key(new[-1].seq)) == 16
            journal.mark("reconciled_at")
            assert isinstance(journal.note("where"), str | None)
            journal.known(["new"])
            journal.tend(3e9)
            journal.settle(Settlement([entry.seq for entry in new], {"written": 3}, {}))
            if journal.salvaged:
                journal.close()
                journal.open()
                assert balance(journal) == 0
        finally:
            journal.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", [b"captured_at REAL", b"seq INTEGER PRIMARY", b"state INTEGER NOT", b"body BLOB"])
def test_a_damaged_name_of_a_column_costs_no_row(intact: Path, tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / "journal"
    shutil.copytree(intact, folder)
    journal = Journal(folder)
    journal.open()
    whole = holdings(journal)["events"]
    journal.close()
    content = bytearray(journal.path.read_bytes())
    at = content.index(name, content.index(b"CREATE TABLE events"))
    content[at] ^= 0x04
    journal.path.write_bytes(content)
    journal.open()
    assert holdings(journal)["events"] == whole
    journal.append([NewEvent(2e9, "new", "m", b"new")])
    assert journal.salvaged
    assert balance(journal) == 0
    journal.close()
