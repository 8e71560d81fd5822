"""The hand-off's own side: what a spool file says, and what a process does that hands something over."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_mysql_engine import folders, jobload, saltevent, spool
from salt_mysql_engine.spool import HandOff, Record
from tests.support.mariadb import wait_until
from tests.support.shipping import MASTER, body, call_data, jid, master_data, return_data

KEY = b"random.\1"
DEEP: Any = []
for _ in range(3000):
    DEEP = [DEEP]
"""Nested deeper than msgpack packs."""
LOAD = {"tgt": "*", "fun": "test.ping", "arg": [], "user": "root", "tgt_type": "glob"}
RECORDS = st.lists(
    st.builds(Record, st.floats(0, 1e10), st.text(max_size=20), st.text(max_size=20), st.binary(max_size=60)),
    max_size=4,
)


def opts(cachedir: Path, **options: Any) -> dict[str, Any]:
    """A master's options whose journal is in `cachedir`."""
    return {
        "cachedir": str(cachedir),
        "sock_dir": str(cachedir),
        "id": MASTER,
        "engines": [{"mysql_jobcache": options}],
    }


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[HandOff]:
    """The way of this process."""
    made = HandOff(opts(tmp_path))
    yield made
    made.close()


def contents(cachedir: Path, pattern: str = "*.spool") -> list[bytes]:
    """The bytes of the spool files."""
    return [path.read_bytes() for path in sorted((folders.of_journal(str(cachedir)) / spool.FOLDER).glob(pattern))]


def spooled(cachedir: Path, pattern: str = "*.spool") -> list[Record]:
    """What is in the spool files."""
    found = []
    for content in contents(cachedir, pattern):
        header = spool.header_of(content)
        assert header is not None
        found += spool.parse(content[spool.HEADER.size :], header.key)[0]
    return found


def dropped(cachedir: Path) -> tuple[int, ...]:
    """What the processes say that they dropped, by `spool.REASONS`."""
    headers = [spool.header_of(content) for content in contents(cachedir)]
    return tuple(sum(counts) for counts in zip(*(header.dropped for header in headers if header), strict=True))


# What a file says


@given(RECORDS, st.data())
def test_of_a_file_that_was_cut_anywhere_the_whole_records_are_read_and_the_rest_is_known_to_be_missing(
    records: list[Record], data: st.DataObject
) -> None:
    parts = [KEY + spool.pack(record) for record in records]
    content = b"".join(parts)
    assert spool.parse(content, KEY) == (records, len(content), 0)
    cut = data.draw(st.integers(0, len(content)))
    found, end, need = spool.parse(content[:cut], KEY)
    assert found == records[: len(found)]
    assert end == sum(map(len, parts[: len(found)]))
    assert len(found) == len(records) or cut < end + len(parts[len(found)])
    if cut > end:
        head = KEY + bytes(8)
        assert need == (len(parts[len(found)]) if cut - end >= len(head) else len(head))
    else:
        assert need == 0


@given(st.binary(max_size=60), st.data())
def test_a_record_of_which_any_byte_is_another_is_not_believed(event: bytes, data: st.DataObject) -> None:
    content = KEY + spool.pack(Record(1.0, jid(1), "web1", event))
    at = data.draw(st.integers(0, len(content) - 1))
    bent = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    found, end, need = spool.parse(bent, KEY)
    assert (found, end) == ([], 0)
    assert need == spool.BROKEN or need > len(content)


def test_zeros_behind_the_records_are_nothing_and_all_else_is_broken() -> None:
    content = KEY + spool.pack(Record(1.0, jid(1), "web1", b"event"))
    for behind, need in ((bytes(5), 0), (bytes(500), 0), (bytes(500) + b"x", spool.BROKEN), (bytes(4) + b"x", 16)):
        found, end, more = spool.parse(content + behind, KEY)
        assert ([record.body for record in found], end, more) == ([b"event"], len(content), need)


def _sealed(content: bytes) -> bytes:
    return KEY + spool._HEAD.pack(b"", len(content), zlib.crc32(content))[8:] + content


@pytest.mark.parametrize(
    "content",
    [
        spool._FIELDS.pack(1.0, 2, 0) + b"\xff\xfeevent",
        spool._FIELDS.pack(1.0, 0, 2) + b"\xff\xfeevent",
        spool._FIELDS.pack(1.0, 20, 0) + b"short",
        spool._FIELDS.pack(1.0, 3, 3) + b"short",
        spool._FIELDS.pack(float("nan"), 0, 0) + b"event",
        spool._FIELDS.pack(float("inf"), 0, 0) + b"event",
        spool._FIELDS.pack(1.0, 0, 0)[:-1],
    ],
)
def test_a_record_whose_inside_makes_no_sense_is_broken_whatever_its_checksum_says(content: bytes) -> None:
    assert spool.parse(_sealed(content), KEY) == ([], 0, spool.BROKEN)


def test_a_record_may_be_empty_but_for_its_time() -> None:
    assert spool.parse(KEY + spool.pack(Record(1.0, "", "", b"")), KEY)[0] == [Record(1.0, "", "", b"")]
    short = spool._FIELDS.pack(1.0, 3, 2) + b"jidid"
    assert spool.parse(_sealed(short), KEY)[0] == [Record(1.0, "jid", "id", b"")]


def test_a_length_beyond_the_longest_record_is_broken_and_not_waited_for() -> None:
    for length, need in ((spool.MOST_BYTES, 16 + spool.MOST_BYTES), (spool.MOST_BYTES + 1, spool.BROKEN)):
        assert spool.parse(KEY + spool._HEAD.pack(b"", length, 0)[8:], KEY) == ([], 0, need)


def test_what_a_record_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MOST_BYTES", 2**17 + 1000)
    largest = Record(1.0, "j" * 255, "m" * 65_535, b"x" * 1000)
    assert spool.parse(KEY + spool.pack(largest), KEY)[0] == [largest]
    for more in (
        {"jid": "j" * 256},
        {"minion": "m" * 65_536},
        {"minion": "\N{SNOWMAN}" * 21_846},
        {"body": b"x" * 1001},
    ):
        with pytest.raises(ValueError, match="too large"):
            spool.pack(largest._replace(**more))


def test_a_header_is_believed_only_if_all_of_it_is_ours() -> None:
    pack = spool.HEADER.pack
    assert spool.header_of(pack(spool.MAGIC, KEY, 1, 2**48 - 1, 3) + b"more") == (KEY, (1, 2**48 - 1, 3))
    assert spool.header_of(pack(spool.MAGIC, KEY, 0, 0, 0)) == (KEY, (0, 0, 0))
    for bad in (
        b"",
        pack(spool.MAGIC, KEY, 0, 0, 0)[:-1],
        pack(b"another.", KEY, 0, 0, 0),
        pack(spool.MAGIC, bytes(8), 0, 0, 0),
        pack(spool.MAGIC, KEY, 0, 2**48, 0),
    ):
        assert spool.header_of(bad) is None


def test_spool_files_are_known_by_their_names() -> None:
    good = "01795610141163642890-17468-55a9db18-000001.spool"
    assert spool.is_name(good)
    assert all(spool.is_name(name) for name in spool.LAST)
    assert not any(map(spool.is_name, ["", "notes.txt", f"{good}x", f"x{good}", "../" + good, "08.last", "00.last.gz"]))


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"master_job_cache": "mysql_jobcache"}, True),
        ({"master_job_cache": "mysql_jobcache", "job_cache": True, "ext_job_cache": ""}, True),
        ({"master_job_cache": "mysql_jobcache", "job_cache": False}, False),
        ({"master_job_cache": "mysql_jobcache", "ext_job_cache": "redis"}, False),
        ({"master_job_cache": "local_cache"}, False),
        ({}, False),
    ],
)
def test_a_master_hands_over_where_it_stores_its_jobs_by_us(options: dict[str, Any], used: bool) -> None:
    assert spool.is_used(options) is used


# What a process hands over


def test_what_is_handed_over_stands_in_a_file_when_the_call_returns(tmp_path: Path, hand: HandOff) -> None:
    before = time.time()
    runner = master_data(jid(3), "runner.jobs.list_jobs", {"x": 1})
    hand.published(jid(1), LOAD, ["web1", 7, "web2"])  # type: ignore[list-item] # whatever a caller gives
    hand.minions(jid(1), ["web3"])
    hand.returned(return_data(jid(1), "web1"))
    hand.returned({"id": MASTER, "jid": jid(3), "return": runner})
    hand.returned({"id": "web1", "jid": jid(3), "return": runner})
    hand.events([{"tag": "my/tag", "data": {"a": 1}}, {"tag": 7, "data": {}}, {"tag": "my/tag", "data": []}])
    found = spooled(tmp_path)
    assert [(record.jid, record.minion) for record in found] == [
        (jid(1), ""), (jid(1), ""), (jid(1), "web1"), (jid(3), MASTER), (jid(3), "web1"), ("", ""),
    ]  # fmt: skip
    assert all(before <= record.captured_at <= time.time() for record in found)
    assert found[0].body == jobload.publish_event(jid(1), LOAD, ["web1", "web2"])
    assert found[1].body == saltevent.minions_event(jid(1), ["web3"])
    assert found[2].body == body(f"salt/job/{jid(1)}/ret/web1", return_data(jid(1), "web1"))
    assert found[3].body == body(f"salt/run/{jid(3)}/ret", runner)
    assert found[4].body.startswith(f"salt/job/{jid(3)}/ret/web1".encode())
    event = saltevent.open_event(found[5].body)
    assert isinstance(event, saltevent.Opened)
    assert (event.tag, event.data, event.job, event.chosen) == ("my/tag", {"a": 1}, None, True)
    assert dropped(tmp_path) == (0, 0, 0)


def test_what_belongs_to_no_job_is_not_handed_over(tmp_path: Path, hand: HandOff) -> None:
    hand.published("../../evil", LOAD, ["web1"])
    hand.published(jid(1), {**call_data(jid(1), "web1"), "tgt": "web1"}, None)  # of a job that nobody published
    hand.minions("../../evil", ["web1"])
    hand.returned({"jid": "../../evil", "id": "web1", "return": 1})
    hand.keep_out(jid(2))
    hand.returned(return_data(jid(2), "web1"))
    hand.keep_out("../../evil")
    assert contents(tmp_path) == []
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    "load",
    [
        {},
        {"jid": jid(1)},
        {"jid": jid(1), "id": "web1"},
        {"id": "web1", "return": 1},
        {"jid": jid(1), "id": 7, "return": 1},
        {"jid": 7, "id": "web1", "return": 1},
    ],
)
def test_a_return_that_names_no_job_no_minion_or_no_value_is_none(tmp_path: Path, hand: HandOff, load: Any) -> None:
    hand.returned(load)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_packed_is_dropped_and_counted(
    tmp_path: Path, hand: HandOff, caplog: pytest.LogCaptureFixture
) -> None:
    hand.returned(return_data(jid(1), "web1", DEEP))
    hand.events([{"tag": "my/tag", "data": {"a": DEEP}}])
    hand.returned(return_data(jid(2), "m" * 65_536))
    hand.returned(return_data(jid(3), "web1"))
    assert dropped(tmp_path) == (0, 0, 3)
    assert [record.jid for record in spooled(tmp_path)] == [jid(3)]
    assert [record.levelno for record in caplog.records if "cannot be packed" in record.message] == [logging.ERROR] * 3


def test_what_a_process_dropped_is_said_by_each_of_its_files_once(tmp_path: Path) -> None:
    hand = HandOff(opts(tmp_path, journal_max_bytes=4 * 2**20))  # files of 64 KiB
    for number in range(4):
        hand.returned(return_data(jid(number), "web1", DEEP))
        hand.returned(return_data(jid(number), "web1", "x" * 70_000))
    hand.close()
    assert [spool.header_of(content) for content in contents(tmp_path)] == [
        (content[8:16], (0, 0, 1)) for content in contents(tmp_path)
    ]
    assert len({content[8:16] for content in contents(tmp_path)}) == 4, "a key is of one file"


def test_a_folder_that_cannot_be_written_costs_nothing_that_memory_can_hold(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.02)
    before = threading.enumerate()
    folder = folders.of_journal(str(tmp_path))
    folder.write_text("in the way")
    for number in range(3):
        hand.returned(return_data(jid(number), "web1"))
    hand.returned(return_data(jid(3), "web1", DEEP))
    assert [record.levelno for record in caplog.records if "holding returns in memory" in record.message] == [40]
    (thread,) = [each for each in threading.enumerate() if each not in before]
    assert thread.name == "mysql_jobcache hand-off"
    assert thread.daemon, "a worker that ends does not wait for it"
    folder.unlink()
    thread.join(10)
    assert not thread.is_alive()
    hand.returned(return_data(jid(4), "web1"))
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in (0, 1, 2, 4)]
    assert dropped(tmp_path) == (0, 0, 1)
    assert (hand._held, hand._held_bytes) == ([], 0)
    assert caplog.text.count("takes returns again") == 1


def test_what_could_not_even_be_counted_is_counted_as_soon_as_it_can_be(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.02)
    folder = folders.of_journal(str(tmp_path))
    folder.write_text("in the way")
    for number in range(3):
        hand.returned(return_data(jid(number), "web1", DEEP))
    folder.unlink()
    wait_until(lambda: hand._thread is None, timeout=10, what="the count")
    assert (spooled(tmp_path), dropped(tmp_path)) == ([], (0, 0, 3))


def test_what_is_held_goes_before_what_comes_and_a_second_disturbance_is_answered_like_the_first(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.05)
    free = spool.free_bytes
    for start in (0, 10):
        monkeypatch.setattr(spool, "free_bytes", lambda _: spool.DISK_BYTES - 1)
        hand._look_at = 0.0
        hand.returned(return_data(jid(start), "web1"))
        monkeypatch.setattr(spool, "free_bytes", free)
        hand._look_at = 0.0
        hand.returned(return_data(jid(start + 1), "web1"))
        assert len(hand._held) == 2
        wait_until(lambda: hand._thread is None, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in (0, 1, 10, 11)]


def test_a_disk_with_just_enough_room_takes_returns(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "free_bytes", lambda _: spool.DISK_BYTES)
    hand.returned(return_data(jid(1), "web1"))
    assert [record.jid for record in spooled(tmp_path)] == [jid(1)]


@pytest.mark.parametrize("spare", [0, -1])
def test_the_files_for_a_full_disk_are_made_while_it_has_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    monkeypatch.setattr(spool, "free_bytes", lambda _: spool.DISK_BYTES + spool._LAST_BYTES + spare)
    folder = os.open(tmp_path, os.O_RDONLY)
    spool.make_last(folder)
    os.close(folder)
    made = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert made == (dict.fromkeys(spool.LAST, spool._LAST_BYTES) if spare == 0 else {})


def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A disk on which no file grows; gives what frees it."""
    real = os.pwrite

    def pwrite(file: int, data: bytes, at: int) -> int:
        if at + len(data) > os.fstat(file).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return lambda: monkeypatch.setattr(os, "pwrite", real)


def test_on_a_full_disk_publishes_go_where_blocks_are_kept_for_them_and_returns_to_memory(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.05)
    hand.returned(return_data(jid(0), "web1"))
    assert [len(content) for content in contents(tmp_path, "*.last")] == [128 * 1024] * 8
    keys = {content[8:16] for content in contents(tmp_path, "*")}
    assert (len(keys), {key[-1] for key in keys}) == (9, {1}), "no key is like another, nor like zeros"
    free = full_disk(monkeypatch)
    hand.returned(return_data(jid(1), "web1"))
    large = {**LOAD, "arg": ["x" * 50_000]}
    for number in range(2, 20):
        hand.published(jid(number), large, ["web1"])
    hand.returned(return_data(jid(20), "web1"))
    found = spooled(tmp_path, "*.last")
    assert sorted(record.jid for record in found) == [jid(number) for number in range(2, 18)], "two in each file"
    assert [len(content) for content in contents(tmp_path, "*.last")] == [128 * 1024] * 8
    assert len(hand._held) == 4
    hand.published(jid(21), LOAD, ["web1"])
    assert len(spooled(tmp_path, "*.last")) == 17, "a small one has room where a large one had none"
    free()
    wait_until(lambda: not hand._held, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in (0, 1, 18, 19, 20)]


def test_what_is_held_stays_held_through_every_try_that_fails(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.01)
    folder = folders.of_journal(str(tmp_path))
    folder.write_text("in the way")
    tries = []
    real = HandOff._catch_up

    def counted(hand: HandOff) -> None:
        tries.append(len(hand._held))
        real(hand)

    monkeypatch.setattr(HandOff, "_catch_up", counted)
    for number in range(3):
        hand.returned(return_data(jid(number), "web1"))
    wait_until(lambda: tries.count(3) > 2, timeout=10, what="some tries")
    folder.unlink()
    wait_until(lambda: hand._thread is None, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in range(3)]


def test_that_memory_is_full_is_said_once_and_what_it_cannot_hold_is_counted(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "_MEMORY_BYTES", 5000)
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.02)
    for times in (1, 1, 2):
        hand.returned(return_data(jid(0), "web1"))
        free = full_disk(monkeypatch)
        for number in range(10):
            hand.returned(return_data(jid(number), "web1", "x" * 1000))
        assert hand._held_bytes >= 5000
        assert len(hand._held) < 6
        free()
        wait_until(lambda: hand._thread is None, timeout=10, what="what is held")
        assert caplog.text.count("Memory for returns is full") == min(times, 1)
    assert len(spooled(tmp_path)) + sum(dropped(tmp_path)) == 33
    assert dropped(tmp_path)[1] > 12


@pytest.mark.parametrize("short", [1, 12, 200])
def test_a_record_of_which_only_a_part_was_written_is_written_over(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.02)
    hand.returned(return_data(jid(0), "web1", "x" * 1000))
    end = hand._end
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:short], at))
    hand.returned(return_data(jid(1), "web1", "x" * 1000))
    assert len(hand._held) == 1
    assert [len(content) for content in contents(tmp_path)] == [end], "a reader sees nothing of it"
    monkeypatch.setattr(os, "pwrite", real)
    wait_until(lambda: not hand._held, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(0), jid(1)]


def test_a_header_of_which_only_a_part_was_written_is_none(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:20], at))
    hand.returned(return_data(jid(0), "web1"))
    assert contents(tmp_path) == []
    monkeypatch.setattr(os, "pwrite", real)
    wait_until(lambda: not hand._held, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(0)]


@pytest.mark.parametrize("times", [1, 4, 5])
def test_a_file_that_the_engine_takes_for_a_dead_processs_is_not_written_to(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """It was quicker: the new file was not locked yet."""
    real = folders.create
    engines: list[int] = []

    def create(folder: int, name: str) -> int:
        file = real(folder, name)
        if name.endswith(".spool") and len(engines) < times:
            engine = os.open(name, os.O_RDWR, dir_fd=folder)
            fcntl.flock(engine, fcntl.LOCK_SH)
            os.unlink(name, dir_fd=folder)
            engines.append(engine)
        return file

    monkeypatch.setattr(folders, "create", create)
    hand.keep_out(jid(9))
    before = descriptors()
    hand.returned(return_data(jid(0), "web1"))
    for engine in engines:
        os.close(engine)
    assert len(hand._held) == (times == 5), "it gives up for now"
    assert descriptors() - before == 2 + (times < 5), "two folders and the file"
    wait_until(lambda: not hand._held, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(0)]


def test_a_file_that_cannot_be_begun_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.02)
    hand = HandOff(opts(tmp_path))
    free = full_disk(monkeypatch)
    hand.returned(return_data(jid(0), "web1"))
    before = descriptors()
    for number in range(1, 6):
        hand.returned(return_data(jid(number), "web1", DEEP))
    assert descriptors() == before
    assert contents(tmp_path) == []
    free()
    wait_until(lambda: hand._thread is None, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(0)]
    assert dropped(tmp_path) == (0, 0, 5)
    hand.close()


def test_what_stood_in_a_deleted_file_is_written_again_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.02)
    hand = HandOff(opts(tmp_path))
    for number in range(3):
        hand.returned(return_data(jid(number), "web1", "x" * 1000))
    before = descriptors()
    for path in (folders.of_journal(str(tmp_path)) / spool.FOLDER).glob("*.spool"):
        path.unlink()
    real = os.pwrite

    def pwrite(file: int, data: bytes, at: int) -> int:
        if at >= spool.HEADER.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    hand.returned(return_data(jid(3), "web1"))
    wait_until(lambda: hand._number > 4, timeout=10, what="some tries")
    assert len(contents(tmp_path)) < 2, "they leave no files behind"
    monkeypatch.setattr(os, "pwrite", real)
    wait_until(lambda: hand._thread is None, timeout=10, what="what is held")
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in range(4)]
    assert descriptors() == before
    hand.close()


def test_what_another_process_wrote_into_the_kept_blocks_is_not_written_over(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = HandOff(opts(tmp_path))
    for each in (hand, other):
        each.returned(return_data(jid(0), "web1"))
    full_disk(monkeypatch)
    for number in range(1, 11):
        (hand, other)[number % 2].published(jid(number), LOAD, ["web1"])
    assert [record.jid for record in spooled(tmp_path, "*.last")] == [jid(number) for number in range(1, 11)]
    other.close()


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_folder_that_stays_in_the_way_takes_no_descriptor_each_time_it_is_tried(tmp_path: Path) -> None:
    folder = folders.of_journal(str(tmp_path))
    folder.mkdir(mode=0o700)
    (folder / spool.FOLDER).write_text("in the way")
    place = spool.Place(folder)
    before = descriptors()
    for _ in range(10):
        with pytest.raises(NotADirectoryError):
            place.enter()
    assert descriptors() == before


def test_what_is_closed_keeps_no_descriptor(tmp_path: Path) -> None:
    before = descriptors()
    hand = HandOff(opts(tmp_path, journal_max_bytes=4 * 2**20))
    for number in range(10):  # each in a file of its own
        hand.keep_out(jid(100))
        hand.returned(return_data(jid(number), "web1", "x" * 70_000))
    spool.forget_old(opts(tmp_path), time.time())
    hand.close()
    hand.close()
    assert descriptors() == before
    assert len(contents(tmp_path)) == 10


def test_a_child_hands_over_by_a_file_of_its_own_and_its_parent_goes_on_in_the_one_that_it_had(tmp_path: Path) -> None:
    mine = spool.of(opts(tmp_path))
    assert spool.of(opts(tmp_path)) is mine is spool.current()
    mine.returned(return_data(jid(1), "parent"))
    child = os.fork()
    if child == 0:
        is_fresh = spool.current() is None and mine._file == -1
        spool.of(opts(tmp_path)).returned(return_data(jid(2), "child"))
        os._exit(0 if is_fresh else 1)
    assert os.waitpid(child, 0)[1] == 0
    mine.returned(return_data(jid(3), "parent"))
    assert [(record.jid, record.minion) for record in spooled(tmp_path)] == [
        (jid(1), "parent"),
        (jid(3), "parent"),
        (jid(2), "child"),
    ]
    mine.close()
    spool._of_process.clear()


# How much


def test_the_folder_is_looked_at_now_and_then_and_not_for_each_return(
    tmp_path: Path, hand: HandOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_LOOK_SECONDS", 60.0)
    looks: list[int] = []
    real = os.scandir

    def scandir(folder: int) -> Any:
        looks.append(folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    for number in range(100):
        hand.returned(return_data(jid(number), "web1"))
    assert len(looks) == 1
    for number in range(6):
        hand.returned(return_data(jid(number), "web1", "x" * 100_000))
    assert len(looks) == 2, "much was written since"


def said_used(cachedir: Path, text: str) -> None:
    """What the engine says that the journal takes of the cap."""
    (folders.of_journal(str(cachedir)) / spool.USED).write_text(text)


def test_the_cap_counts_what_the_journal_takes_and_a_publish_has_room_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "_LOOK_BYTES", 0)
    monkeypatch.setattr(spool, "_RESERVE_BYTES", 10_000)
    hand = HandOff(opts(tmp_path, journal_max_bytes=2**20))
    hand.returned(return_data(jid(0), "web1"))
    there = sum(map(len, contents(tmp_path)))
    size = len(spool.pack(spooled(tmp_path)[0]))
    said_used(tmp_path, f"{2**20 - there - size}\n")
    hand.returned(return_data(jid(1), "web1"))  # fits to the byte
    hand.returned(return_data(jid(2), "web1"))
    hand.published(jid(3), LOAD, ["web1"])
    hand.minions(jid(3), ["web2"])
    said_used(tmp_path, f"{2**20 + 10_000}\n")
    hand.published(jid(4), LOAD, ["web1"])
    hand.minions(jid(4), ["web2"])
    assert [record.jid for record in spooled(tmp_path)] == [jid(0), jid(1), jid(3), jid(3)]
    assert dropped(tmp_path) == (3, 0, 0)
    assert caplog.text.count("journal_max_bytes (1048576)") == 1
    said_used(tmp_path, "0\n")
    hand.returned(return_data(jid(5), "web1"))
    said_used(tmp_path, f"{2**20}\n")
    hand.returned(return_data(jid(6), "web1"))
    assert dropped(tmp_path) == (4, 0, 0)
    assert caplog.text.count("journal_max_bytes (1048576)") == 2, "it had room again between"
    hand.close()


def test_where_the_engine_said_nothing_the_journals_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_LOOK_BYTES", 0)
    hand = HandOff(opts(tmp_path, journal_max_bytes=2**20))
    hand.returned(return_data(jid(0), "web1"))
    for text in (None, "no number"):
        if text is not None:
            said_used(tmp_path, text)
        (folders.of_journal(str(tmp_path)) / "journal.sqlite").write_bytes(bytes(2**20))
        hand.returned(return_data(jid(1), "web1"))
        (folders.of_journal(str(tmp_path)) / "journal.sqlite").unlink()
        hand.returned(return_data(jid(2), "web1"))
    assert dropped(tmp_path) == (2, 0, 0)
    hand.close()


def test_what_other_processes_wrote_counts_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(spool, "_LOOK_SHARE", 0)
    one, other = (HandOff(opts(tmp_path, journal_max_bytes=2**20)) for _ in range(2))
    for number in range(100):
        one.returned(return_data(jid(number), "web1", "x" * 10_000))
        other.returned(return_data(jid(number), "web2", "x" * 10_000))
    assert 2**20 - 25_000 < sum(map(len, contents(tmp_path))) <= 2**20 + 1000
    assert dropped(tmp_path)[0] == 200 - len(spooled(tmp_path))
    one.close()
    other.close()


def test_between_two_looks_what_this_process_wrote_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_LOOK_BYTES", 10**9)
    monkeypatch.setattr(spool, "_LOOK_SECONDS", 60.0)
    hand = HandOff(opts(tmp_path, journal_max_bytes=2**20))
    hand.keep_out(jid(100))  # which makes the folder
    said_used(tmp_path, f"{2**20 - 100_000}\n")
    for number in range(50):
        hand.returned(return_data(jid(number), "web1", "x" * 10_000))
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in range(9)]
    assert dropped(tmp_path) == (41, 0, 0)
    hand.close()


def test_while_the_folder_cannot_be_looked_at_what_this_process_wrote_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_LOOK_BYTES", 0)
    hand = HandOff(opts(tmp_path, journal_max_bytes=2**20))
    hand.returned(return_data(jid(0), "web1"))

    def scandir(_: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "scandir", scandir)
    for number in range(200):
        hand.returned(return_data(jid(number), "web1", "x" * 10_000))
    monkeypatch.undo()
    assert 90 < len(spooled(tmp_path)) < 110
    assert dropped(tmp_path) == (201 - len(spooled(tmp_path)), 0, 0)
    hand.close()


def test_that_it_is_full_is_said_again_only_after_an_eighth_of_it_was_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "_LOOK_BYTES", 0)
    hand = HandOff(opts(tmp_path, journal_max_bytes=2**20))
    hand.returned(return_data(jid(0), "web1"))
    for used, times in ((2**20, 1), (2**20 * 15 // 16, 1), (2**20, 1), (2**20 * 13 // 16, 1), (2**20, 2)):
        said_used(tmp_path, f"{used}\n")
        hand.returned(return_data(jid(1), "web1"))
        assert caplog.text.count("journal_max_bytes (1048576)") == times
    hand.close()


# A folder that goes away


@pytest.mark.parametrize("way", ["deleted", "moved away", "its spool moved away", "its file deleted"])
def test_what_stood_in_a_folder_that_is_gone_is_written_again_with_what_was_dropped(tmp_path: Path, way: str) -> None:
    hand = HandOff(opts(tmp_path))
    folder = folders.of_journal(str(tmp_path))
    for number in range(3):
        hand.returned(return_data(jid(number), "web1"))
        hand.returned(return_data(jid(number), "web1", DEEP))
    hand._uncounted = [5, 0, 0]  # what could not be counted while the disk was full
    if way == "deleted":
        shutil.rmtree(folder)
    elif way == "moved away":
        folder.rename(tmp_path / "elsewhere")
        hand._look_at = 0.0
    elif way == "its spool moved away":
        (folder / spool.FOLDER).rename(tmp_path / "elsewhere")
        hand._look_at = 0.0
    else:
        for path in (folder / spool.FOLDER).glob("*.spool"):
            path.unlink()
    for number in range(3, 6):
        hand.returned(return_data(jid(number), "web1"))
    assert [record.jid for record in spooled(tmp_path)] == [jid(number) for number in range(6)]
    assert dropped(tmp_path) == (5, 0, 3)
    hand.returned(return_data(jid(6), "web1", DEEP))
    assert dropped(tmp_path) == (5, 0, 4)
    assert len(contents(tmp_path)) == 1
    hand.close()


def test_what_an_engine_reads_to_its_end_is_not_written_again(tmp_path: Path) -> None:
    """It has the deleted file open, and takes what is in it."""
    hand = HandOff(opts(tmp_path))
    hand.returned(return_data(jid(0), "web1"))
    (path,) = (folders.of_journal(str(tmp_path)) / spool.FOLDER).glob("*.spool")
    with path.open("rb+") as reader:
        assert folders.claim(reader.fileno(), alone=False)
        path.unlink()
        for number in (1, 2):
            hand.returned(return_data(jid(number), "web1"))
        assert [record.jid for record in spooled(tmp_path)] == [jid(1), jid(2)]
        assert len(contents(tmp_path)) == 1
    hand.close()


# Whether anyone ships


def test_that_nobody_ships_is_said_once_a_minute_by_all_processes_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hand = HandOff(opts(tmp_path))
    for _ in range(2):
        hand._check_engine_at = 0.0
        hand.returned(return_data(jid(1), "web1"))
    assert caplog.text.count("No mysql_jobcache engine runs") == 1
    said = folders.of_journal(str(tmp_path)) / "said"
    os.utime(said, (time.time() - 61, time.time() - 61))
    hand.returned(return_data(jid(1), "web1"))
    assert caplog.text.count("No mysql_jobcache engine runs") == 1, "each process asks once a minute"
    hand._check_engine_at = 0.0
    hand.returned(return_data(jid(1), "web1"))
    assert caplog.text.count("No mysql_jobcache engine runs") == 2
    hand.close()


@pytest.mark.parametrize("busy", [False, True])
def test_an_engine_that_listens_is_known_also_while_it_is_busy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, busy: bool
) -> None:
    hand = HandOff(opts(tmp_path))
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as caller:
        listening.bind(hand._socket)
        listening.listen(0)
        if busy:
            caller.connect(hand._socket)
        hand.returned(return_data(jid(1), "web1"))
    assert "No mysql_jobcache engine runs" not in caplog.text
    hand.close()
