"""The job cache, read from folders as Salt writes them: only what the master itself accepted is confirmed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
import msgpack
import pytest
from hypothesis import strategies as st

from salt_mysql_engine import jobcache, jsontext, records, saltevent, settings
from salt_mysql_engine.jobcache import Folder, Job, JobCache, TooLarge, Unreadable
from salt_mysql_engine.records import Record
from salt_mysql_engine.saltevent import Ignored, Opened
from tests.support import shipping
from tests.unit import values

MASTER = "master1"
JID, OTHER = "20260102030405000006", "20260102030405000007"
LONG_AGO = 1767323045.25
PATIENCE = 5.0
STAMP = "2026-01-02T03:04:05.000006"
TRIMMED = saltevent.TRIMMED
SELECTION = records.Selection(settings.combine({}, {}), master_id=MASTER)


class Cache(shipping.Cache):
    """A job cache and its reader."""

    def __init__(self, cachedir: Path) -> None:
        super().__init__(cachedir, master=MASTER)
        self.reader = JobCache({"cachedir": str(cachedir), "id": MASTER, "hash_type": "sha256"})

    def read(self, jid: str) -> Job:
        """The job, as it is found."""
        found = map(self.reader.job, self.reader.folders(since=0, before=None, most=1000))
        (job,) = [job for job in found if job is not None and job.jid == jid]
        return job

    def confirm(self, tag: str, data: Any) -> Any:
        """What the cache says of one event: its payload, or why there is none."""
        (said,) = self.reader.confirm([opened(tag, data)], PATIENCE)
        return said.data if isinstance(said, Opened) else said


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def opened(tag: str, data: Any) -> Opened:
    event = saltevent.open_event(tag.encode() + b"\n\n" + values.packed(data))
    assert isinstance(event, Opened)
    return event


def load_of(jid: str = JID, **changes: Any) -> dict[str, Any]:
    """``.load.p`` of a published job."""
    load = {"cmd": "publish", "tgt": "web*", "fun": "test.arg", "arg": [1], "tgt_type": "glob", "ret": "", "jid": jid}
    return {**load, "kwargs": {"show_timeout": True, "metadata": {"a": 1}}, "user": "root", **changes}


def new_data(jid: str = JID, **changes: Any) -> dict[str, Any]:
    """The payload of the same job's ``/new``, which has no kwargs."""
    data = {"jid": jid, "tgt_type": "glob", "tgt": "web*", "user": "root", "fun": "test.arg", "arg": [1]}
    return {**data, "minions": ["web1", "web2"], "missing": [], "_stamp": STAMP, **changes}


def return_data(jid: str = JID, minion: str = "web1", value: Any = True, **changes: Any) -> dict[str, Any]:
    data = {"cmd": "_return", "id": minion, "success": True, "return": value, "retcode": 0, "jid": jid}
    data |= {"fun": "test.arg", "fun_args": [1], "user": "root", "metadata": {"a": 1}}
    if "out" in changes:
        data["out"] = changes["out"]
    return {**data, "_stamp": STAMP, **changes}


def master_data(fun: str = "runner.jobs.active", **changes: Any) -> dict[str, Any]:
    data = {"fun": fun, "jid": JID, "user": "root", "fun_args": [], "_stamp": STAMP, "return": {"a": 1}}
    return {**data, "success": True, **changes}


RETURN, NEW = f"salt/job/{JID}/ret/web1", f"salt/job/{JID}/new"


# Where there is a cache at all


@pytest.mark.parametrize(
    ("opts", "kept"),
    [
        ({}, True),
        ({"master_job_cache": "local_cache", "job_cache": True, "ext_job_cache": ""}, True),
        ({"job_cache": False}, False),
        ({"master_job_cache": "mysql"}, False),
        ({"ext_job_cache": "redis"}, False),
    ],
)
def test_a_master_keeps_a_cache_unless_it_is_told_not_to(opts: dict[str, Any], kept: bool) -> None:
    assert JobCache.is_kept(opts) is kept


@pytest.mark.parametrize("hash_type", ["md5", "sha256", "sha512"])
def test_folders_are_found_by_the_masters_own_hash(cache: Cache, hash_type: str) -> None:
    digest = hashlib.new(hash_type, JID.encode()).hexdigest()
    folder = cache.cachedir / "jobs" / digest[:2] / digest[2:] / "web1"
    folder.mkdir(parents=True)
    (folder / "return.p").write_bytes(values.packed({"return": 1}))
    reader = JobCache({"cachedir": str(cache.cachedir), "id": MASTER, "hash_type": hash_type})
    assert reader.present([(JID, "web1"), (JID, "web2")]) == [True, False]


# A minion's return


@pytest.mark.parametrize("more", [{}, {"retcode": 0}, {"retcode": 0, "success": True}])
def test_a_return_that_the_cache_holds_is_confirmed_as_it_is(cache: Cache, more: dict[str, Any]) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", {"x": 1}, **more)
    data = {
        key: value for key, value in return_data(value={"x": 1}).items() if key not in {"retcode", "success"} - {*more}
    }
    said = cache.confirm(RETURN, data)
    assert said == data
    assert list(said) == list(data), "the order of the keys is Salt's"


@pytest.mark.parametrize(
    "forged",
    [
        {"return": "forged"},
        {"return": {"x": 1, "y": 2}},
        {"retcode": 1},
        {"success": False},
        {"retcode": True},
        {"out": "forged"},
        {"fun": "cmd.run"},
        {"fun_args": ["rm -rf /"]},
        {"user": "forged"},
        {"metadata": {"a": "forged"}},
        {"master_id": "forged", "sig": "forged", "tgt": "forged", "trimmed": True, "x": 1, "cmd": "x"},
        {"ts": "forged"},
        {"ts": True},
        {"ts": -1},
        {"ts": 1.5},
        {"ts": 2**40},
        {"return": {"x": True}},
        {"return": {"x": 1.0}},
        {"retcode": 0.0},
    ],
    ids=repr,
)
def test_a_return_that_says_something_else_is_corrected_to_what_the_cache_holds(
    cache: Cache, forged: dict[str, Any]
) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", {"x": 1}, retcode=0, success=True, at=LONG_AGO)
    said = cache.confirm(RETURN, {**return_data(value={"x": 1}), **forged})
    assert values.packed(said) == values.packed(return_data(value={"x": 1})), "with its types and in its order"


@pytest.mark.parametrize("left_out", ["fun", "fun_args", "user", "metadata", "return", "retcode", "success", "cmd"])
def test_what_an_event_leaves_out_is_not_left_out_of_the_return(cache: Cache, left_out: str) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", {"x": 1}, retcode=0, success=True, at=LONG_AGO)
    data = return_data(value={"x": 1})
    del data[left_out]
    assert list(cache.confirm(RETURN, data).items()) == list(return_data(value={"x": 1}).items())


@pytest.mark.parametrize("stamp", [None, 5, "yesterday", "2026-01-02", STAMP + "Z", ["x"]])
def test_a_time_that_is_none_is_not_taken_from_an_event(cache: Cache, stamp: Any) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", {"x": 1}, retcode=0, success=True, at=LONG_AGO)
    said = cache.confirm(RETURN, return_data(value={"x": 1}, _stamp=stamp, ts=1767323045))
    assert said == {key: its for key, its in return_data(value={"x": 1}, ts=1767323045).items() if key != "_stamp"}


def test_a_jid_that_a_minion_made_up_of_the_future_is_none(cache: Cache) -> None:
    """No retention would ever reach its row, and a list of the newest jobs would have nothing else."""
    made_up = "20990102030405000006"
    its = {**return_data(made_up), "fun": "test.ping"}
    cache.job(made_up, its, [])
    cache.returned(made_up, "web1", True, at=LONG_AGO)
    assert cache.confirm(f"salt/job/{made_up}/ret/web1", its) is Ignored.BAD_JID
    cache.returned(made_up, "web2", True, at=LONG_AGO)
    its = {**return_data(made_up, "web2"), "fun": "test.ping"}
    assert cache.confirm(f"salt/job/{made_up}/ret/web2", its) is Ignored.BAD_JID


@pytest.mark.parametrize("seconds", [-86_300, 0, 86_400 * 3650])
def test_a_jid_of_its_time_stands_whatever_the_clock_is_by_now(cache: Cache, seconds: float) -> None:
    """As long as a clock is not set right in between, which only a job of the master's own survives."""
    its = return_data()
    cache.job(JID, its, [])
    cache.returned(JID, "web1", True, retcode=0, success=True, at=LONG_AGO + seconds)
    assert cache.confirm(RETURN, its) == its
    cache.job(OTHER, load_of(OTHER), ["web1"])
    cache.returned(OTHER, "web1", True, retcode=0, success=True, at=LONG_AGO - 10 * 86_400)
    assert cache.confirm(f"salt/job/{OTHER}/ret/web1", return_data(OTHER)) == return_data(OTHER)


def test_a_return_without_a_value_publishes_no_job_and_hides_no_runner(cache: Cache) -> None:
    """The master stores it as the load of any jid that has none yet (``store_job``, salt/utils/job.py 3006-3008)."""
    made_up = {"cmd": "_return", "id": "mallory", "jid": JID, "tgt": "*", "tgt_type": "glob", "fun": "cmd.run",
               "arg": ["x"], "user": "root"}  # fmt: skip
    cache.job(JID, made_up, ["web1"])
    assert cache.confirm(NEW, new_data()) is None
    assert not cache.read(JID).is_publish
    assert cache.reader.publish(JID) is None
    data = master_data()
    cache.returned(JID, MASTER, data, at=LONG_AGO)
    assert cache.confirm(f"salt/run/{JID}/ret", data) == data


@pytest.mark.parametrize("kind", ["run", "wheel"])
def test_a_copy_of_a_runners_return_is_the_same_return_whenever_it_comes(cache: Cache, kind: str) -> None:
    data = master_data("runner.jobs.active" if kind == "run" else "wheel.key.list_all")
    cache.job(JID, {"id": MASTER, "tgt": MASTER, "jid": JID, "return": data}, [])
    cache.returned(JID, MASTER, data, at=LONG_AGO)
    tag = f"salt/{kind}/{JID}/ret"
    assert cache.confirm(tag, {**data, "_stamp": "2026-01-02T03:04:09.000006"}) == data


def test_what_the_cache_does_not_say_of_a_return_is_not_taken_from_the_event(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", 1, at=LONG_AGO)
    said = cache.confirm(RETURN, return_data(value=1, out="forged", retcode=5, success=False))
    assert not {"out", "retcode", "success"} & said.keys()


def test_a_return_whose_outputter_may_be_on_its_way_is_waited_for(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"])
    file = cache.returned(JID, "web1", 1, retcode=0, success=True)  # Salt writes out.p after it
    assert cache.confirm(RETURN, return_data(value=1, out="highstate")) is None
    assert cache.confirm(RETURN, return_data(value=1)) == return_data(value=1)
    assert cache.confirm(RETURN, return_data(value=2)) is None, "a forged one may leave the outputter away"
    os.utime(file, (LONG_AGO, LONG_AGO))  # it was synced for long before it was renamed (salt/utils/atomicfile.py 3008)
    assert cache.confirm(RETURN, return_data(value=1, out="highstate")) is None


@pytest.mark.parametrize(("seconds_ago", "waited_for"), [(PATIENCE - 1, True), (PATIENCE + 1, False)])
def test_an_outputter_that_is_being_synced_is_waited_for_as_long_as_patience_lasts(
    cache: Cache, seconds_ago: float, waited_for: bool
) -> None:
    cache.job(JID, load_of(), ["web1"])
    folder = cache.returned(JID, "web1", 1, retcode=0, success=True).parent
    ago = time.time() - seconds_ago
    os.utime(folder, (ago, ago))
    event = return_data(value=1, retcode=0, success=True, out="highstate")
    assert cache.confirm(RETURN, event) == return_data(value=1, retcode=0, success=True)
    (folder / ".___atomic_writeh4lf").write_bytes(b"")
    os.utime(folder, (ago, ago))
    if waited_for:
        assert cache.confirm(RETURN, event) is None
        (folder / ".___atomic_writeh4lf").write_bytes(msgpack.packb("highstate"))
        (folder / ".___atomic_writeh4lf").rename(folder / "out.p")
        assert cache.confirm(RETURN, event) == event
    else:  # whoever wrote it died
        assert cache.confirm(RETURN, event) == return_data(value=1, retcode=0, success=True)


def test_the_outputter_comes_from_its_own_file(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", 1, retcode=0, success=True, out="highstate")
    assert cache.confirm(RETURN, return_data(value=1, out="forged"))["out"] == "highstate"
    assert cache.confirm(RETURN, return_data(value=1, out="highstate")) == return_data(value=1, out="highstate")
    assert cache.confirm(RETURN, return_data(value=1))["out"] == "highstate", "a stranger cannot leave it out"


def test_a_trimmed_return_gets_its_whole_value_from_the_cache(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", {"a": "x" * 100_000}, retcode=0, success=True, at=LONG_AGO)
    said = cache.confirm(RETURN, return_data(value={"a": TRIMMED}))
    assert said == return_data(value={"a": "x" * 100_000})


def test_a_file_that_is_larger_than_asked_for_is_not_read(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", "x" * 100_000, retcode=0, success=True)
    event = opened(RETURN, return_data(value=TRIMMED))
    (said,) = cache.reader.confirm([event], PATIENCE, max_bytes=70_000)
    assert isinstance(said, TooLarge)
    assert said.size > 100_000


def test_what_is_not_there_yet_is_not_confirmed(cache: Cache) -> None:
    assert cache.confirm(RETURN, return_data()) is None
    cache.job(JID, load_of(), ["web1"])
    assert cache.confirm(RETURN, return_data()) is None
    cache.returned(JID, "web2", True)
    assert cache.confirm(RETURN, return_data()) is None
    assert cache.confirm(f"salt/job/{OTHER}/new", new_data(jid=OTHER)) is None


def test_a_return_without_a_load_is_not_confirmed(cache: Cache) -> None:
    """Nobody can say which function it was, and so whether it is to be stored."""
    cache.returned(JID, "web1", True, retcode=0, success=True)
    assert cache.confirm(RETURN, return_data()) is None


def test_a_job_that_asked_not_to_be_kept_is_told_apart(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"], nocache=True)
    assert cache.confirm(RETURN, return_data()) is Ignored.NOCACHE
    assert cache.confirm(f"salt/run/{JID}/ret", master_data()) is Ignored.NOCACHE


@pytest.mark.parametrize("name", ["nocache", "endtime"])
def test_a_minion_that_is_called_as_a_file_of_salts_hides_no_return(cache: Cache, name: str) -> None:
    cache.job(JID, load_of(), ["web1"])
    for minion in (name, "web1"):
        cache.returned(JID, minion, True, retcode=0, success=True, at=LONG_AGO)
    assert cache.confirm(RETURN, return_data()) == return_data()
    assert cache.confirm(f"salt/job/{JID}/ret/{name}", return_data(minion=name)) == return_data(minion=name)
    assert cache.confirm(f"salt/job/{JID}/ret/web2", return_data(minion="web2")) is None, "a dead letter, and kept"
    assert sorted(cache.read(JID).returned) == sorted([name, "web1"])


def test_a_file_of_salts_is_no_minions_return(cache: Cache) -> None:
    (cache.job(JID, load_of(), ["web1"]) / "endtime").touch()
    assert cache.read(JID).returned == []


NOT_RETURNS = [b"", b"\x81", b"\xc1", values.packed({"return": 1})[:-1], values.packed({"return": 1}) + b"\0"]
NOT_RETURNS += [values.packed(other) for other in (None, True, "return", ["return"], {"retcode": 0}, {b"x": 1}, 7)]
NOT_RETURNS += [b"\x81\x91\x01\x01", b"\x91" * 100_000, b"\xdf\xff\xff\xff\xff", bytes(range(255, -1, -1)) * 300]


@pytest.mark.parametrize("content", NOT_RETURNS, ids=lambda content: content[:12].hex())
def test_a_file_that_is_no_return_is_as_good_as_none(cache: Cache, content: bytes) -> None:
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", 1).write_bytes(content)
    assert cache.confirm(RETURN, return_data()) is None
    if len(content) < 65_536:  # a larger one is left to whoever makes a row of it
        assert cache.reader.stored_at(JID, "web1") is None


@pytest.mark.parametrize("content", [*NOT_RETURNS[:9], b"\x91" * 100_000], ids=lambda content: content[:12].hex())
def test_a_load_that_is_none_confirms_nothing(cache: Cache, content: bytes) -> None:
    folder = cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", True, retcode=0, success=True)
    (folder / ".load.p").write_bytes(content)
    assert cache.confirm(NEW, new_data(tgt="forged")) is None
    assert cache.reader.publish(JID) is None
    if content[:1] != b"\x81":  # a map is a load, if of nothing
        assert cache.confirm(RETURN, return_data()) is None


def test_a_return_in_the_place_of_which_is_a_folder_or_a_pipe_holds_nobody_up(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"])
    (cache.folder(JID) / "web1" / "return.p").mkdir(parents=True)
    (cache.folder(JID) / "web2").mkdir()
    os.mkfifo(cache.folder(JID) / "web2" / "return.p")
    for minion in ("web1", "web2"):
        assert cache.confirm(f"salt/job/{JID}/ret/{minion}", return_data(minion=minion)) is None


def test_a_return_larger_than_any_row_is_as_good_as_none(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobcache, "MAX_FILE_BYTES", 200_000)
    cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", "x" * 300_000)
    assert cache.confirm(RETURN, return_data(value=TRIMMED)) is None


# Ids that are no names

ODD_IDS = [
    "..",
    ".",
    "",
    "../web1",
    "web1/../../x",
    "/etc/passwd",
    "a\0b",
    "\udcff\udc00",
    "x" * 300,
    "é" * 200,
    "😀" * 255,
]
ODD_IDS += [".minions.p", ".load.p", "jid", "nocache", "endtime", "web1/", "web1\n", "~", "-rf"]


@pytest.mark.parametrize("minion", ODD_IDS, ids=lambda minion: repr(minion)[:20])
def test_an_id_that_is_no_name_leads_nowhere_and_raises_nothing(cache: Cache, minion: str) -> None:
    folder = cache.job(JID, load_of(), ["web1"])
    cache.returned(JID, "web1", "the genuine", retcode=0, success=True)
    for above in (folder, folder.parent, folder.parent.parent, cache.cachedir):
        (above / "return.p").write_bytes(values.packed({"return": "planted"}))
    event = Opened("", saltevent.Tag(saltevent.Kind.JOB_RETURN, JID, minion), return_data(minion=minion), False)
    assert cache.reader.confirm([event], PATIENCE) == [None]
    assert cache.reader.present([(JID, minion), (JID, "web1")]) == [minion == "", True], "no id at all asks for the job"
    assert cache.reader.stored_at(JID, minion) is None


@pytest.mark.parametrize("jid", ["..", "", "nocache", "req", "../" + JID, JID + "\0", "x" * 5000, "\udcff", JID[:-1]])
def test_a_jid_that_is_none_leads_nowhere_and_raises_nothing(cache: Cache, jid: str) -> None:
    event = Opened("", saltevent.Tag(saltevent.Kind.JOB_RETURN, jid, "web1"), return_data(jid=jid), False)
    assert cache.reader.confirm([event], PATIENCE) == [None]
    assert cache.reader.present([(jid, "web1"), (jid, "")]) == [False, False]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("call", ["open", "stat", "scandir", "read"])
def test_an_error_that_says_nothing_about_a_file_is_no_answer(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    cache.job(JID, load_of(), ["web1"])
    if call != "scandir":
        cache.returned(JID, "web1", True)
    else:  # only then the folder is looked through
        (cache.folder(JID) / "web1").mkdir()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    said = cache.confirm(RETURN, return_data(value="another"))
    present = cache.reader.present([(JID, "web1")])
    monkeypatch.undo()
    assert isinstance(said, Unreadable) or (call == "stat" and said is None)
    assert os.strerror(number) in said.error if isinstance(said, Unreadable) else True
    assert present == [True] or call != "stat", "it is looked at, and so waits"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("name", [".load.p", "return.p", "out.p", ".minions.p"])
def test_a_single_file_that_cannot_be_opened_leaves_its_event_without_an_answer_and_no_other(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    for jid in (JID, OTHER):
        cache.job(jid, load_of(jid=jid), ["web1"])
        cache.returned(jid, "web1", True, out="nested", retcode=0, success=True)
    tag, data = (f"salt/job/{JID}/new", new_data()) if name == ".minions.p" else (RETURN, return_data())
    events = [opened(tag, data), opened(f"salt/job/{OTHER}/ret/web1", return_data(jid=OTHER))]
    real, other = os.open, str(cache.folder(OTHER))
    folder: list[str] = []

    def fails(path: Any, *args: Any, **kwargs: Any) -> int:
        if "/jobs/" in str(path):
            folder.append(str(path))
        elif str(path).endswith(name) and folder[-1] != other:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    said, others = cache.reader.confirm(events, PATIENCE)
    assert isinstance(said, Unreadable)
    assert os.strerror(number) in said.error
    assert isinstance(others, Opened)


# A publish


def test_a_publish_is_confirmed_with_the_keywords_that_only_the_cache_knows(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1", "web2"])
    said = cache.confirm(NEW, new_data())
    assert said == {**new_data(), "kwargs": {"show_timeout": True, "metadata": {"a": 1}}, "ret": ""}


def test_what_a_forger_says_of_a_publish_is_replaced(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1", "web2"])
    forged = new_data(
        tgt="*", fun="cmd.run", arg=["x"], user="nobody", minions=["db1"], missing=["db2"], kwargs={"x": 1}
    )
    said = cache.confirm(NEW, {**forged, "tgt_type": "compound"})
    assert said == {**new_data(), "kwargs": load_of()["kwargs"], "ret": ""}


@pytest.mark.parametrize(
    "changes",
    [
        {"minions": [["web1"]]},
        {"minions": [{}]},
        {"minions": "web1"},
        {"minions": None},
        {"minions": [1, None, b"web1"]},
        {"missing": [["web1"], {}, 5]},
        {"missing": {"web1": 1}},
        {"tgt": [["web1"], {}]},
        {"tgt": {"a": 1}},
        {"tgt": None, "fun": None, "arg": None, "user": []},
    ],
    ids=repr,
)
def test_a_forged_publish_of_any_types_raises_nothing(cache: Cache, changes: dict[str, Any]) -> None:
    cache.job(JID, load_of(), ["web1", "web2"])
    said = cache.confirm(NEW, new_data(**changes))
    assert (said["tgt"], said["fun"], said["minions"]) == ("web*", "test.arg", ["web1", "web2"])
    assert said["missing"] == []


def test_the_load_of_a_salt_call_is_nobodys_publish(cache: Cache) -> None:
    """A forged one would give the job another user, target and arguments."""
    cache.job(JID, {**return_data(), "arg": [1], "tgt": "web1", "tgt_type": "glob"})
    assert cache.confirm(NEW, new_data()) is None
    assert cache.reader.publish(JID) is None


@hypothesis.given(
    st.dictionaries(
        st.sampled_from(["tgt", "tgt_type", "fun", "arg", "user", "kwargs", "ret", "return", "id"]), values.packable
    ),
    values.packable | st.just(["web1"]),
    st.dictionaries(
        st.sampled_from(["tgt", "fun", "arg", "user", "minions", "missing", "return", "id"]), values.packable
    ),
)
@hypothesis.settings(max_examples=60)
def test_whatever_stands_in_the_cache_and_in_the_event_raises_nothing(
    tmp_path_factory: pytest.TempPathFactory, load: dict[str, Any], minions: Any, data: dict[str, Any]
) -> None:
    """Any accepted minion can have the master store any load, by ``_syndic_return``."""
    cache = Cache(tmp_path_factory.mktemp("cache"))
    cache.job(JID, load, minions)
    cache.returned(JID, "web1", load.get("return"), retcode=data.get("fun"))
    cache.returned(JID, MASTER, data.get("return"))
    for tag in (RETURN, NEW, f"salt/run/{JID}/new", f"salt/run/{JID}/ret", f"salt/wheel/{JID}/ret"):
        event = saltevent.open_event(tag.encode() + b"\n\n" + values.packed({"jid": JID, **data}))
        if isinstance(event, Opened):
            (said,) = cache.reader.confirm([event], PATIENCE)
            assert said is None or isinstance(said, (Opened, Ignored))
            if isinstance(said, Opened):
                records.refusal(said.job, said.data, SELECTION)
    job = cache.read(JID)
    cache.reader.publish(JID)
    for minion in job.returned:
        cache.reader.stored_at(JID, minion)


@pytest.mark.parametrize("place", ["load", "kwargs"])
def test_credentials_of_eauth_are_taken_out(cache: Cache, place: str) -> None:
    secrets: dict[str, Any] = {"token": "s3cret", "password": "s3cret", "key": "s3cret", "auth_list": ["s3cret"]}
    load = load_of(**secrets) if place == "load" else load_of(kwargs={"a": 1, **secrets})
    cache.job(JID, load, ["web1"])
    cache.returned(JID, "web1", True)
    returned = cache.confirm(RETURN, return_data())
    said = cache.confirm(NEW, new_data())
    assert said["kwargs"]["metadata" if place == "load" else "a"]
    for text in (repr(said), repr(returned), repr(cache.reader.publish(JID))):
        assert "s3cret" not in text


def test_the_parts_of_a_batch_job_are_one_job(cache: Cache) -> None:
    """3008 publishes a batch job part by part under one jid: the load is one part's, and the folder has all minions."""
    cache.job(JID, load_of(tgt=["web3"], tgt_type="list"), ["web1", "web2", "web3"])
    for part in (["web1", "web2"], ["web3"], ["web1", "db1"]):
        said = cache.confirm(NEW, new_data(tgt=part, tgt_type="list", minions=part))
        assert (said["minions"], said["tgt"]) == (["web1", "web2", "web3"], ["web3", "web1", "web2"])


def test_the_minions_of_syndics_are_of_the_job_too(cache: Cache) -> None:
    folder = cache.job(JID, load_of(), ["web1"])
    (folder / ".minions.syndic1.p").write_bytes(values.packed(["db1", "db2"]))
    (folder / ".minions.syndic2.p").write_bytes(values.packed(["db2", 7]))
    assert cache.confirm(NEW, new_data(minions=[]))["minions"] == ["db1", "db2", "web1"]


def test_the_minions_that_a_stranger_adds_to_a_job_are_neither_its_target_nor_not_missing(cache: Cache) -> None:
    """Any accepted minion can add them, under its own id."""
    folder = cache.job(JID, load_of(tgt=["web1", "db1"], tgt_type="list"), ["web1"])
    (folder / ".minions.mallory.p").write_bytes(values.packed(["db1", "evil"]))
    said = cache.confirm(NEW, new_data())
    assert (said["tgt"], said["missing"], said["minions"]) == (["web1", "db1"], ["db1"], ["db1", "evil", "web1"])


def test_a_publish_waits_for_its_minions_which_are_written_a_moment_later(cache: Cache) -> None:
    cache.job(JID, load_of())
    assert cache.confirm(NEW, new_data()) is None
    cache.job(JID, load_of(), [])
    assert cache.confirm(NEW, new_data())["minions"] == []


def test_a_minion_is_missing_only_if_the_job_was_aimed_at_it(cache: Cache) -> None:
    cache.job(JID, load_of(tgt=["web1", "db1"], tgt_type="list"), ["web1"])
    for missing in ([], ["db1"], ["web1", "db1", "xy"]):
        said = cache.confirm(NEW, new_data(tgt=["web1", "db1"], tgt_type="list", minions=["web1"], missing=missing))
        assert said["missing"] == ["db1"]


def test_a_job_for_a_hundred_thousand_minions_costs_no_square_of_them(cache: Cache) -> None:
    names = [f"web{n:06d}" for n in range(100_000)]
    cache.job(JID, load_of(tgt=names[::-1], tgt_type="list"), names[::2])
    began = time.process_time()
    said = cache.confirm(NEW, new_data())
    assert time.process_time() - began < 5
    assert (len(said["minions"]), len(said["missing"]), len(said["tgt"])) == (50_000, 50_000, 100_000)


def test_the_names_that_a_stranger_adds_to_a_job_take_bounded_memory(cache: Cache) -> None:
    folder = cache.job(JID, load_of(), ["web1"])
    (folder / ".minions.syndic.p").write_bytes(values.packed(["db1"]))
    for n in range(20):
        (folder / f".minions.mallory{n}.p").write_bytes(values.packed([f"{n}x{m:040d}" for m in range(50_000)]))
    said = cache.confirm(NEW, new_data())
    assert {"web1", "db1"} <= {*said["minions"]}
    assert len(said["minions"]) < 300_000


@pytest.mark.parametrize("minion", [".web1", "..web1", ".hidden.example.com"])
def test_a_minion_whose_name_begins_with_a_dot_is_one(cache: Cache, minion: str) -> None:
    """``valid_id`` (salt/utils/verify.py 3006-3008) takes it."""
    cache.job(JID, load_of(), [minion])
    cache.returned(JID, minion, True, retcode=0, success=True)
    assert cache.confirm(f"salt/job/{JID}/ret/{minion}", return_data(minion=minion)) == return_data(minion=minion)
    assert cache.read(JID).returned == [minion]


# The master's own jobs


@pytest.mark.parametrize("kind", ["run", "wheel"])
def test_a_masters_job_is_confirmed_by_its_return_under_the_masters_id(cache: Cache, kind: str) -> None:
    data = master_data(f"{kind}ner.jobs.active" if kind == "run" else "wheel.key.list_all")
    cached = {key: value for key, value in data.items() if key != "_stamp"}
    cache.job(JID, {"id": MASTER, "tgt": MASTER, "jid": JID, "return": cached, "fun": data["fun"], "user": "root"})
    assert cache.confirm(f"salt/{kind}/{JID}/ret", data) is None
    cache.returned(JID, MASTER, cached)
    assert cache.confirm(f"salt/{kind}/{JID}/ret", data) == data
    assert cache.confirm(f"salt/{kind}/{JID}/ret", {**data, "return": "forged", "user": "x"}) == data
    cache.returned(OTHER, MASTER, "not a runner's")
    assert cache.confirm(f"salt/{kind}/{OTHER}/ret", {**data, "jid": OTHER}) is None


def test_a_large_value_that_nobody_wants_is_left_out_unread_and_a_disk_that_fails_meanwhile_gives_no_answer(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = master_data("runner.jobs.list_jobs", **{"return": "x" * 100_000})
    cache.job(JID, {"id": MASTER, "tgt": MASTER, "jid": JID, "return": data, "fun": data["fun"], "user": "root"})
    cache.returned(JID, MASTER, data)
    event = opened(f"salt/run/{JID}/ret", master_data("runner.jobs.list_jobs"))

    def confirm(*, wanted: bool) -> Any:
        (said,) = cache.reader.confirm([event], PATIENCE, max_bytes=70_000, leaves_out=lambda _: not wanted)
        return said

    said = confirm(wanted=False)
    assert isinstance(said, Opened)
    assert said.data["fun"] == "runner.jobs.list_jobs"
    assert len(str(said.data)) < 1000
    assert isinstance(confirm(wanted=True), TooLarge)
    real, opens = os.open, []

    def fails(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("return.p"):
            opens.append(path)
            if len(opens) == 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    assert isinstance(confirm(wanted=False), Unreadable)


@pytest.mark.parametrize("kind", ["run", "wheel"])
def test_the_start_of_a_masters_job_is_told_by_its_process_and_then_by_its_return(cache: Cache, kind: str) -> None:
    fun = "runner.jobs.active" if kind == "run" else "wheel.key.list_all"
    genuine = {"fun": fun, "jid": JID, "user": "root", "fun_args": [1]}
    tag, forged = f"salt/{kind}/{JID}/new", master_data("runner.x", user="forged", fun_args=["forged"], x=1)
    assert cache.confirm(tag, forged) is None
    assert cache.reader.present([(JID, "")]) == [False]
    cache.job(OTHER, load_of(), ["web1", MASTER])
    cache.returned(OTHER, "web1", True)
    cache.returned(OTHER, MASTER, {**genuine, "jid": OTHER, "return": 1})
    somebodys = f"salt/{kind}/{OTHER}/new", {**forged, "jid": OTHER}
    assert cache.confirm(*somebodys) is None, "somebody's job is nobody's runner, whatever its minions return"
    (cache.cachedir / "proc").mkdir()
    (cache.cachedir / "proc" / JID).write_bytes(values.packed({**genuine, "pid": 4711}))
    assert cache.confirm(tag, forged) == {**genuine, "_stamp": STAMP}
    assert cache.reader.present([(JID, "")]) == [True]
    (cache.cachedir / "proc" / JID).write_bytes(values.packed({**genuine, "jid": OTHER}))
    assert cache.confirm(tag, forged) is None
    (cache.cachedir / "proc" / JID).unlink()
    cache.returned(JID, MASTER, {**genuine, "return": 1})
    assert cache.confirm(tag, forged) == {**genuine, "_stamp": STAMP}
    other = "wheel" if kind == "run" else "run"
    assert cache.confirm(f"salt/{other}/{JID}/new", forged) is None


def test_a_runners_return_in_a_minions_tag_is_the_runners(cache: Cache) -> None:
    cached = {key: value for key, value in master_data().items() if key != "_stamp"}
    cache.job(JID, {"id": MASTER, "tgt": MASTER, "jid": JID, "return": cached, "fun": "runner.jobs.active"})
    cache.returned(JID, MASTER, cached)
    (said,) = cache.reader.confirm([opened(f"salt/job/{JID}/ret/{MASTER}", return_data(minion=MASTER))], PATIENCE)
    assert isinstance(said, Opened)
    assert (said.tag, said.data) == (f"salt/run/{JID}/ret", {**cached, "_stamp": STAMP})


def test_a_time_that_no_minion_sent_is_not_taken_from_an_event(cache: Cache) -> None:
    cached = master_data()
    cache.job(JID, {"id": MASTER, "tgt": MASTER, "jid": JID, "return": cached, "fun": "runner.jobs.active"})
    cache.returned(JID, MASTER, cached)
    for tag, data in (
        (f"salt/run/{JID}/ret", master_data(ts=1767323045)),
        (f"salt/job/{JID}/ret/{MASTER}", return_data(minion=MASTER, ts=1767323045)),
    ):
        assert "ts" not in cache.confirm(tag, data)


# Many at once


def test_each_event_gets_its_own_answer_and_each_load_is_read_once(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.job(JID, load_of(), ["web0"])
    for n in range(0, 50, 2):
        cache.returned(JID, f"web{n}", n, retcode=0, success=True)
    read: list[str] = []
    real = jobcache._content

    def counted(path: str, *more: Any) -> Any:
        read.append(path)
        return real(path, *more)

    monkeypatch.setattr(jobcache, "_content", counted)
    events = [opened(f"salt/job/{JID}/ret/web{n}", return_data(minion=f"web{n}", value=n)) for n in range(50)]
    said = cache.reader.confirm(
        [*events, opened(f"salt/job/{OTHER}/ret/a", return_data(jid=OTHER, minion="a"))], PATIENCE
    )
    assert [each.data if isinstance(each, Opened) else each for each in said] == [
        *(event.data if n % 2 == 0 else None for n, event in enumerate(events)),
        None,
    ]
    assert sum(path.endswith(".load.p") for path in read) <= 2


def test_a_step_of_many_jobs_takes_few_descriptors(cache: Cache) -> None:
    jids = [f"202601020304050{n:05d}" for n in range(600)]
    for jid in jids:
        cache.job(jid, load_of(jid), ["web1"])
        cache.returned(jid, "web1", True, retcode=0, success=True)
    events = [opened(f"salt/job/{jid}/ret/web1", return_data(jid=jid)) for jid in jids]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 100, before[1]))
    try:
        said = cache.reader.confirm(events, PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [each.data for each in said if isinstance(each, Opened)] == [event.data for event in events]


# What is to be compared


def test_folders_come_newest_first_in_rounds_and_each_once(cache: Cache) -> None:
    jids = [f"202601020304050{n:05d}" for n in range(100)]
    for n, jid in enumerate(jids):
        cache.job(jid, load_of(jid), [], at=1e9 + n // 3)
    found: list[Folder] = []
    while some := cache.reader.folders(since=1e9 + 10, before=found[-1] if found else None, most=7):
        assert len(some) <= 7
        found += some
    assert [folder.changed_at for folder in found] == sorted((folder.changed_at for folder in found), reverse=True)
    read = [cache.reader.job(folder) for folder in found]
    assert sorted(job.jid for job in read if job) == jids[30:]


def test_a_job_says_who_returned_and_what_it_was(cache: Cache) -> None:
    folder = cache.job(JID, load_of(), ["web1", "web2"])
    (folder / "endtime").write_text("2026, Jan 02 03:04:05.000006")
    cache.returned(JID, "web2", True)
    cache.returned(JID, "web1", True, out="txt")
    job = cache.read(JID)
    assert job._replace(returned=sorted(job.returned)) == Job(JID, "test.arg", True, True, ["web1", "web2"])


@pytest.mark.parametrize("left", [b"", b"2026"])
def test_a_job_whose_jid_file_a_dying_master_left_torn_is_known_by_its_load(cache: Cache, left: bytes) -> None:
    (cache.job(JID, load_of(), ["web1"]) / "jid").write_bytes(left)
    cache.returned(JID, "web1", True)
    assert cache.read(JID).returned == ["web1"]


def test_a_return_that_a_dying_master_had_not_renamed_yet_is_found(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web1"])
    file = cache.returned(JID, "web1", True, retcode=0, success=True)
    whole = file.read_bytes()
    unfinished = file.rename(file.with_name(".___atomic_write5x3k"))
    assert cache.confirm(RETURN, return_data()) == return_data()
    assert cache.reader.stored_at(JID, "web1") is not None
    unfinished.write_bytes(whole[:-1])
    assert cache.confirm(RETURN, return_data()) is None


def test_what_is_no_jobs_folder_is_passed_over(cache: Cache) -> None:
    cache.job(JID, load_of(), [], nocache=True)
    wrong = cache.job(OTHER, load_of(), [])
    (wrong / "jid").write_text(JID)
    jobs = cache.cachedir / "jobs"
    (jobs / "a file").touch()
    (jobs / "aa").mkdir()
    (jobs / "aa" / "empty").mkdir()
    (jobs / "aa" / "file").touch()
    (jobs / "aa" / "loop").symlink_to(jobs / "aa")
    (jobs / "bb" / "binary").mkdir(parents=True)
    (jobs / "bb" / "binary" / "jid").write_bytes(b"\xff" * 5000)
    (jobs / "bb" / "pipe").mkdir()
    (jobs / "bb" / "folder" / "jid").mkdir(parents=True)
    folders = cache.reader.folders(since=0, before=None, most=100)
    assert len(folders) >= 6
    assert [cache.reader.job(folder) for folder in folders] == [None] * len(folders)
    assert cache.reader.job(Folder(1.0, "gone/meanwhile")) is None
    assert Cache(cache.cachedir / "none").reader.folders(since=0, before=None, most=5) == []


def test_a_jobs_publish_is_told_as_the_bus_would_have(cache: Cache) -> None:
    cache.job(JID, load_of(), ["web2", "web1"])
    (said,) = cache.reader.confirm([opened(NEW, {"jid": JID})], PATIENCE)
    assert isinstance(said, Opened)
    assert (said.tag, said.data) == (NEW, cache.reader.publish(JID))
    record = records.interpret(said, 0.0, SELECTION)
    genuine = records.interpret(opened(NEW, {**new_data(), "kwargs": load_of()["kwargs"], "ret": ""}), 0.0, SELECTION)
    assert isinstance(record, Record)
    assert record == genuine


@pytest.mark.parametrize(
    "load",
    [{}, {"fun": "x"}, {"tgt": "*"}, return_data(), {"id": MASTER, "tgt": MASTER, "fun": "runner.x", "return": {}}],
    ids=repr,
)
def test_a_load_that_is_no_publishs_makes_no_publish(cache: Cache, load: dict[str, Any]) -> None:
    cache.job(JID, load, ["web1"])
    assert cache.reader.publish(JID) is None
    assert cache.confirm(NEW, new_data()) is None


def test_names_in_a_jobs_folder_that_are_no_text_hinder_nothing(cache: Cache) -> None:
    folder = os.fsencode(cache.job(JID, load_of(), ["web1"])) + b"/we\xffb"
    os.mkdir(folder)  # noqa: PTH102 (a name in bytes)
    with open(folder + b"/return.p", "wb") as file:  # noqa: PTH123
        file.write(values.packed({"return": 1}))
    cache.returned(JID, "web1", 1)
    job = cache.read(JID)
    stored = [cache.reader.stored_at(JID, minion) for minion in sorted(job.returned)]
    assert sum(at is not None for at in stored) == 1


def row(body: bytes | Opened) -> dict[str, Any]:
    """The row of an event, but for what differs by nature: when it was seen."""
    event = body if isinstance(body, Opened) else saltevent.open_event(body)
    assert isinstance(event, Opened)
    record = records.interpret(event, 0.0, SELECTION)
    assert isinstance(record, Record)
    assert record.ret is not None
    ret, full = record.ret, json.loads(record.ret.full_ret_json)
    value = json.loads(ret.return_json)
    if event.job is not None and event.job.kind is not saltevent.Kind.JOB_RETURN:  # the whole event
        assert value.pop("_stamp")
        assert full["return"].pop("_stamp")
    said = {name: full[name] for name in ("return", "fun_args", "success", "retcode", "jid", "id")}
    return {
        **said,
        "row": (
            ret.jid,
            ret.id,
            ret.fun,
            list(value) if isinstance(value, dict) else 0,
            value,
            ret.success,
            ret.trimmed,
        ),
    }


@hypothesis.settings(max_examples=80)
@hypothesis.given(
    value=values.packable,
    retcode=st.sampled_from([0, 1, 255, None, {"a.b": 0, "c.d": 1}, [0, 1]]),
    success=st.sampled_from([True, False, {"a.b": True}, [True, False]]),
    fun=st.sampled_from(["test.ping", "state.apply", ["a.b", "c.d"]]),
    args=st.lists(values.scalars, max_size=3),
    out=st.sampled_from([None, "highstate"]),
    how=st.sampled_from(["published", "called", "run", "wheel"]),
)
def test_a_return_from_the_cache_is_the_row_of_the_genuine_event(
    tmp_path_factory: pytest.TempPathFactory,
    value: Any, retcode: Any, success: Any, fun: Any, args: list[Any], out: Any, how: str,
) -> None:  # fmt: skip
    cache = Cache(tmp_path_factory.mktemp("cache"))
    if how in ("run", "wheel"):
        data = master_data(
            "runner.a" if how == "run" else "wheel.a", success=success, fun_args=args, **{"return": value}
        )
        cached = {key: its for key, its in data.items() if key != "_stamp"}
        tag, minion = f"salt/{how}/{JID}/ret", MASTER
        cache.job(JID, {"id": MASTER, "tgt": MASTER, "jid": JID, "return": cached, "fun": data["fun"], "user": "root"})
        cache.returned(JID, MASTER, cached)
    else:
        tag, minion = RETURN, "web1"
        data = return_data(value=value, retcode=retcode, success=success, fun=fun, fun_args=args)
        if out:
            data = {**{key: its for key, its in data.items() if key != "_stamp"}, "out": out, "_stamp": STAMP}
        if how == "called":  # the master adds what its load of a publish would have
            del data["success"], data["user"]
            cache.job(JID, {**data, "arg": args, "tgt": "web1", "tgt_type": "glob"})
        else:
            cache.job(JID, load_of(fun=fun, arg=args), ["web1"])
        kept = {key: data[key] for key in ("retcode", "success") if key in data}
        cache.returned(JID, "web1", value, out=out, at=1767323045.25, **kept)
    event = saltevent.open_event(tag.encode() + b"\n\n" + values.packed(data))
    if not isinstance(event, Opened):  # Python cannot hold it
        return
    stored_at = cache.reader.stored_at(JID, minion)
    assert stored_at is not None
    stub = saltevent.open_event(saltevent.stub(JID, minion, stored_at))
    assert isinstance(stub, Opened)
    (made,) = cache.reader.confirm([stub], 0.0)
    assert isinstance(made, Opened)
    assert row(made) == row(event)
    (said,) = cache.reader.confirm([event], 0.0)
    assert isinstance(said, Opened)
    assert row(said) == row(event)
    if how == "published":
        assert jsontext.dumps(said.data) == jsontext.dumps(event.data)
        assert made.data["_stamp"] == "2026-01-02T03:04:05.250000+00:00"


# As Salt writes it

_SALT = """
import sys, json
import salt.config
from salt.returners import local_cache

opts = salt.config.master_config(None)
opts.update(json.loads(sys.argv[1]))
local_cache.__opts__ = opts
jid, other, load, data = json.loads(sys.argv[2])
local_cache.prep_jid(passed_jid=jid)
local_cache.save_load(jid, load, minions=["web1", "web2"])
local_cache.returner(data)
local_cache.returner({**data, "id": "web2", "return": None, "retcode": 2, "success": False, "out": "highstate"})
local_cache.returner({**data, "return": "a second one, which is ignored"})
local_cache.prep_jid(nocache=True, passed_jid=other)
"""


@pytest.mark.parametrize("hash_type", ["sha256", "md5"])
def test_what_salts_own_local_cache_wrote_is_read(tmp_path: Path, hash_type: str) -> None:
    opts = {"cachedir": str(tmp_path), "hash_type": hash_type, "id": MASTER}
    load, data = load_of(), return_data(value={"ü": ["x", 1.5, None]})
    arguments = [json.dumps(opts), json.dumps([JID, OTHER, load, data])]
    subprocess.run([sys.executable, "-c", _SALT, *arguments], check=True, capture_output=True)
    reader = JobCache(opts)
    second = return_data(minion="web2", value=None, retcode=2, success=False, out="highstate")
    said = reader.confirm(
        [
            opened(RETURN, data),
            opened(f"salt/job/{JID}/ret/web2", second),
            opened(NEW, new_data()),
            opened(f"salt/job/{OTHER}/ret/web1", return_data(jid=OTHER)),
        ],
        PATIENCE,
    )
    assert [each.data for each in said if isinstance(each, Opened)] == [
        data,
        second,
        {**new_data(), "kwargs": load["kwargs"], "ret": ""},
    ]
    assert said[3] is Ignored.NOCACHE
    folders = reader.folders(since=0, before=None, most=10)
    assert len(folders) == 2
    (job,) = [job for job in map(reader.job, folders) if job]
    assert (job.jid, sorted(job.returned)) == (JID, ["web1", "web2"])
    assert all(reader.stored_at(JID, minion) is not None for minion in job.returned)


def test_the_files_of_these_tests_are_msgpack_as_salts() -> None:
    assert msgpack.unpackb(values.packed(load_of())) == load_of()
