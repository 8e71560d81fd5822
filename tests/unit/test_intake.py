"""The engine's side of the hand-off: what stands in spool files comes into the journal once, and the files go."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import folders, intake, moments, spool
from salt_mysql_engine.intake import Intake
from salt_mysql_engine.journal import Caps, Entry, Journal
from salt_mysql_engine.journalfile import CONFIRMED
from salt_mysql_engine.spool import Record
from tests.support.mariadb import wait_until
from tests.support.shipping import jid


class File:
    """A spool file as a process writes it; it is alive until it ends."""

    def __init__(
        self, folder: Path, process: int = 1, number: int = 1, *, dropped: tuple[int, ...] = (0, 0, 0)
    ) -> None:
        self.path = folder / spool.FOLDER / f"{process:020d}-{process}-55a9db18-{number:06d}.spool"
        self.key = bytes([process, number]) * 3 + b"k\1"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.end = spool.HEADER.size
        self.drop(*dropped)

    def drop(self, *counts: int) -> None:
        """The process says what it has dropped."""
        os.pwrite(self.file, spool.HEADER.pack(spool.MAGIC, self.key, *counts), 0)

    def raw(self, data: bytes) -> None:
        """Some bytes behind what there is."""
        self.end += os.pwrite(self.file, data, self.end)

    def record(self, number: int, *, at: float = 1.0, size: int = 10) -> bytes:
        """A record's bytes."""
        return self.key + spool.pack(Record(at, jid(number), f"minion{number}", b"x" * size))

    def write(self, *numbers: int, at: float = 1.0, size: int = 10) -> None:
        """Some records."""
        for number in numbers:
            self.raw(self.record(number, at=at, size=size))

    def close(self) -> None:
        """The process ends."""
        os.close(self.file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the journal is, with a spool."""
    path = tmp_path / "mysql_jobcache"
    os.close(folders.open_folder(path))
    (path / spool.FOLDER).mkdir(mode=0o700)
    return path


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    made = Journal(folder)
    made.open()
    yield made
    made.close()


@pytest.fixture
def taking(journal: Journal, folder: Path) -> Iterator[Intake]:
    made = Intake(journal, folder)
    yield made
    made.close()


def entries(journal: Journal) -> list[Entry]:
    return journal.read(after=0, rows=10_000, max_bytes=10**9, take=True)


def taken(journal: Journal) -> list[str]:
    """The jids of what is in the journal, in its order."""
    return [row[0] for row in journal._db.execute("SELECT jid FROM events ORDER BY seq")]


def dropped(journal: Journal) -> dict[str, int]:
    """What the books say that was dropped; they balance."""
    books = journal.books()
    assert books["captured"] == books["pending"] + sum(books["dropped"].values())
    lost: dict[str, int] = books["dropped"]
    return lost


def steps(taking: Intake, count: int = 4) -> None:
    for _ in range(count):
        taking.step()


def test_a_record_is_an_event_that_needs_no_confirmation_with_the_time_of_its_handing_over(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    file = File(folder)
    file.raw(file.key + spool.pack(Record(12.5, jid(1), "web1", b"tag\n\nbody")))
    step = taking.step()
    assert (step.events, step.size, step.more) == (1, 9, False)
    (entry,) = entries(journal)
    assert (entry.captured_at, entry.body, entry.state) == (12.5, b"tag\n\nbody", CONFIRMED)
    assert journal._db.execute("SELECT jid, minion FROM events").fetchall() == [(jid(1), "web1")]
    assert file.path.exists(), "its process may write more"
    file.close()
    steps(taking)
    assert not file.path.exists()
    assert taken(journal) == [jid(1)]


def test_of_several_processes_records_are_taken_by_their_time_and_of_each_in_its_order(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    one, other = File(folder, 1), File(folder, 2)
    for number, file in enumerate([one, other, other, one, other, one]):
        file.write(number, at=100.0 + number)
    taking.step()
    assert taken(journal) == [jid(number) for number in range(6)]
    one.write(10, at=50.0)  # its clock was set back
    one.write(11, at=200.0)
    other.write(12, at=100.0)
    taking.step()
    assert taken(journal)[6:] == [jid(10), jid(12), jid(11)]


def test_a_process_that_goes_on_in_another_file_is_taken_in_order(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    first, second = File(folder, number=1), File(folder, number=2)
    second.write(2, at=1.0)
    first.write(1, at=2.0)
    steps(taking)
    assert taken(journal) == [jid(1)], "the first may not be at its end"
    first.write(3, at=3.0)
    first.close()
    steps(taking)
    assert taken(journal) == [jid(1), jid(3), jid(2)]
    assert (first.path.exists(), second.path.exists()) == (False, True)
    second.write(4)
    steps(taking, 1)
    assert taken(journal)[-1] == jid(4)


def test_a_file_that_ended_is_said_to_have_more_behind_it(folder: Path, taking: Intake) -> None:
    first, second = File(folder, number=1), File(folder, number=2)
    first.write(1)
    second.write(2)
    first.close()
    assert taking.drain().events == 2, "in one call"


def test_how_far_a_file_was_taken_is_known_after_a_restart(folder: Path, journal: Journal) -> None:
    file = File(folder, dropped=(1, 0, 2))
    for number in range(5):
        file.write(number)
        file.drop(1 + number, 0, 2)
        taking = Intake(journal, folder)
        steps(taking, 2)
        taking.close()
        journal.close()
        journal.open()
    assert taken(journal) == [jid(number) for number in range(5)]
    assert dropped(journal) == {"journal_full": 5, "unpackable": 2}


def test_what_a_process_dropped_is_counted_without_a_record_beside_it_and_once(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    file = File(folder, dropped=(0, 3, 0))
    steps(taking)
    assert dropped(journal) == {"memory_full": 3}
    file.drop(0, 4, 1)
    file.close()
    steps(taking)
    assert dropped(journal) == {"memory_full": 4, "unpackable": 1}
    assert not file.path.exists()


@pytest.mark.parametrize("behind", [bytes(1), bytes(5000)])
def test_zeros_behind_what_a_living_process_wrote_are_written_over_and_nothing_is_lost(
    folder: Path, journal: Journal, taking: Intake, behind: bytes
) -> None:
    file = File(folder)
    file.write(1)
    os.pwrite(file.file, behind, file.end)
    steps(taking)
    file.write(2)
    steps(taking)
    assert (taken(journal), dropped(journal)) == ([jid(1), jid(2)], {})
    os.pwrite(file.file, behind, file.end)
    file.close()
    steps(taking)
    assert (dropped(journal), file.path.exists()) == ({}, False)


def test_a_record_that_is_written_just_now_is_taken_once_it_is_whole(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    file = File(folder)
    whole = file.record(2, size=1000)
    for cut in (1, 8, 15, 16, 17, 500, len(whole) - 1):
        file.write(1)
        os.pwrite(file.file, whole[:cut], file.end)
        steps(taking)
        file.raw(whole)
        steps(taking, 1)
    assert (taken(journal), dropped(journal)) == ([jid(1), jid(2)] * 7, {})


def test_a_record_that_its_process_left_half_written_is_counted_as_lost_once(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    file = File(folder)
    file.write(1)
    file.raw(file.record(2, size=1000)[:600])
    steps(taking)
    assert dropped(journal) == {}, "it may be written on"
    file.close()
    steps(taking)
    assert (taken(journal), dropped(journal), file.path.exists()) == ([jid(1)], {"spool_torn": 1}, False)


def test_what_stands_behind_a_damaged_record_is_taken_also_while_its_process_lives(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    file = File(folder)
    file.write(1)
    file.raw(b"?" * 100)
    file.write(2, 3)
    steps(taking)
    assert (taken(journal), dropped(journal)) == ([jid(1), jid(2), jid(3)], {"spool_torn": 1})
    file.raw(b"?" * 100)
    file.write(4)
    steps(taking)
    assert (taken(journal)[3:], dropped(journal)) == ([jid(4)], {"spool_torn": 2})


def test_a_file_without_a_header_is_one_loss(folder: Path, journal: Journal, taking: Intake) -> None:
    file = File(folder)
    os.pwrite(file.file, b"?" * 200, 0)
    file.close()
    steps(taking)
    assert (taken(journal), dropped(journal), file.path.exists()) == ([], {"spool_torn": 1}, False)


def test_a_record_larger_than_a_files_share_of_a_step_is_taken_whole(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_STEP_BYTES", 1000)
    files = [File(folder, process) for process in range(1, 4)]
    for number, file in enumerate(files):
        file.write(number, size=5000, at=float(number))
        file.write(number + 10, size=5000, at=10.0)
    assert taking.step().events == 3, "of each its share"
    assert taking.step().events == 3
    assert sorted(taken(journal)) == sorted(jid(number) for number in (0, 1, 2, 10, 11, 12))
    assert dropped(journal) == {}


def test_a_step_takes_some_of_many_files_and_says_that_there_is_more(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_STEP_FILES", 4)
    files = [File(folder, process) for process in range(1, 11)]
    for number, file in enumerate(files):
        file.write(number, number)
    found = [taking.step() for _ in range(4)]
    assert [step.events for step in found[:3]] == [8, 8, 4]
    assert [step.more for step in found] == [True, True, False, False]
    assert len(taken(journal)) == 20
    for _ in range(5):  # those that were read longest ago come first
        for file in files:
            file.write(7)
        for _ in range(3):
            taking.step()
    assert len(taken(journal)) == 70


def test_a_step_takes_some_mib_and_says_that_there_is_more(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_STEP_BYTES", 1000)
    file = File(folder)
    file.write(*range(100), size=100)
    first = taking.step()
    assert (first.events < 10, first.more) == (True, True)
    assert taking.waiting_bytes == file.end - spool.HEADER.size - first.events * len(file.record(0, size=100))
    assert taking.drain().more is False
    assert taken(journal) == [jid(number) for number in range(100)]
    assert taking.waiting_bytes == 0


def test_names_that_are_no_spool_files_are_left_alone(folder: Path, journal: Journal, taking: Intake) -> None:
    for name in ("notes.txt", "00000000000000000001-1-55a9db18-000001.spool.bak", "99.last"):
        (folder / spool.FOLDER / name).write_text("mine")
    steps(taking)
    assert (taken(journal), dropped(journal), taking.error) == ([], {}, "")
    assert len([path for path in (folder / spool.FOLDER).iterdir() if path.name not in spool.LAST]) == 3


def test_a_folder_that_cannot_be_read_is_told_and_taken_up_again(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    file = File(folder)
    file.write(1)
    hidden = folder / "hidden"
    (folder / spool.FOLDER).rename(hidden)
    (folder / spool.FOLDER).write_text("in the way")
    assert taking.step() == (0, 0, False)
    assert "cannot be read" in taking.error
    (folder / spool.FOLDER).unlink()
    hidden.rename(folder / spool.FOLDER)
    taking.step()
    assert (taken(journal), taking.error) == ([jid(1)], "")


def test_a_file_that_its_process_copies_just_now_into_a_new_one_is_not_taken(
    folder: Path, journal: Journal, taking: Intake
) -> None:
    file = File(folder)
    file.write(1)
    assert folders.claim(file.file, alone=True)
    steps(taking)
    assert taken(journal) == []
    file.close()
    steps(taking)
    assert taken(journal) == [jid(1)]


def test_the_processes_are_told_what_the_journal_takes_beside_their_files(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_SAY_SECONDS", 0.0)
    file = File(folder)
    file.write(*range(50), size=1000)
    steps(taking, 2)
    assert int((folder / spool.USED).read_text()) == journal.measured() - file.end
    file.close()
    steps(taking)
    assert int((folder / spool.USED).read_text()) == journal.measured()
    (folder / spool.USED).unlink()
    steps(taking)
    assert not (folder / spool.USED).exists(), "it is not written again for nothing"


def test_marks_of_files_that_are_gone_are_forgotten_and_no_others(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_TIDY_SECONDS", 0.0)
    ended, living = File(folder, 1), File(folder, 2)
    for file in (ended, living):
        file.write(1)
    ended.close()
    steps(taking)
    assert {mark.split(" ")[1] for mark in journal.marks("spool ")} == {living.path.name}
    assert journal.marks("spool ")[f"spool {living.path.name}"] == living.end


@pytest.mark.parametrize("free", [spool.DISK_BYTES - 1, spool.DISK_BYTES])
def test_what_was_written_on_a_full_disk_is_taken_once_there_is_room_to_make_its_place_again(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(intake, "_LAST_SECONDS", 0.0)
    taking.step()
    last = folder / spool.FOLDER / spool.LAST[3]
    content = last.read_bytes()
    header = spool.header_of(content)
    assert header is not None
    record = header.key + spool.pack(Record(1.0, jid(1), "", b"publish"))
    last.write_bytes(content[: spool.HEADER.size] + record + content[spool.HEADER.size + len(record) :])
    monkeypatch.setattr(spool, "free_bytes", lambda _: free)
    steps(taking)
    assert taken(journal) == ([jid(1)] if free >= spool.DISK_BYTES else [])
    assert last.exists() is (free < spool.DISK_BYTES), "with a byte more it is made again"
    monkeypatch.undo()
    taking._last_at = 0.0
    steps(taking)
    assert (taken(journal), dropped(journal)) == ([jid(1)], {})
    assert [path.name for path in sorted((folder / spool.FOLDER).iterdir())] == [*spool.LAST]
    assert last.read_bytes()[spool.HEADER.size :].strip(b"\0") == b""


def test_a_job_is_held_whole_while_every_event_that_ever_came_of_it_is_here(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_MOST_JOBS", 2)
    new = [moments.jid_at(time.time() + 60 + number) for number in range(4)]
    file = File(folder)

    def write(job: str) -> None:
        file.raw(file.key + spool.pack(Record(1.0, job, "web1", b"x")))
        taking.step()

    for job in (jid(1), new[1], new[1], new[2]):
        write(job)
    assert [taking.holds_whole(job) for job in (jid(1), *new)] == [False, False, True, True, False]
    (seq,) = [entry.seq for entry in entries(journal)][1:2]
    journal._db.execute("DELETE FROM events WHERE seq = ?", (seq,))
    assert not taking.holds_whole(new[1]), "some of it is in MySQL"
    write(new[3])  # the oldest is given up
    assert [taking.holds_whole(job) for job in new] == [False, False, True, True]
    write(new[1])
    write(new[0])
    assert [taking.holds_whole(job) for job in new[:2]] == [False, False], "it was there before"


def test_the_oldest_make_room_where_that_is_asked_for(folder: Path, journal: Journal, taking: Intake) -> None:
    journal.caps = Caps(max_bytes=2**20, drop_oldest=True)
    file = File(folder)
    for number in range(200):
        file.write(number, size=10_000)
        taking.step()
    lost = dropped(journal)["journal_full"]
    assert 90 < lost < 130
    assert taken(journal) == [jid(number) for number in range(lost, 200)]


def test_files_are_closed_with_the_intake(folder: Path, journal: Journal) -> None:
    files: list[Any] = [File(folder, process) for process in range(1, 6)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        taking = Intake(journal, folder)
        taking.step()
        taking.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    for file in files:
        file.close()


def test_a_link_is_not_taken_and_named_once_after_a_moment(
    folder: Path, journal: Journal, taking: Intake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(intake, "_FOREIGN_SECONDS", 0.5)
    monkeypatch.setattr(intake, "_TIDY_SECONDS", 0.0)
    file = File(folder)
    file.write(1)
    file.path.rename(folder / "elsewhere")
    file.path.symlink_to(folder / "elsewhere")
    steps(taking)
    assert "is not taken" not in caplog.text, "root gives away a moment later what it makes"
    wait_until(lambda: taking.step().events > 0 or "is not taken" in caplog.text, timeout=10, what="a word")
    steps(taking, 20)
    assert caplog.text.count("is not taken") == 1
    assert (taken(journal), file.path.is_symlink()) == ([], True)
