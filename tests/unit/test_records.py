"""Events become rows: what a stranger sends is believed only where tag and payload agree and every type is right."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from salt_mysql_engine import jobload, jsontext, moments, records, saltevent, settings, sql
from salt_mysql_engine.records import Record, Return, Selection
from salt_mysql_engine.saltevent import Ignored, Kind, Opened, Tag
from tests.unit import values

JID = "20260102030405000006"
STAMP = "2026-01-02T03:04:05.000006"
CAPTURED_AT = 1767323046.5  # 2026-01-02 03:04:06.5 UTC
MASTER = "master1"
JOB_RETURN, JOB_NEW = f"salt/job/{JID}/ret/web1", f"salt/job/{JID}/new"
RUN_NEW, RUN_RETURN = f"salt/run/{JID}/new", f"salt/run/{JID}/ret"
WHEEL_RETURN = f"salt/wheel/{JID}/ret"
FUN_OF = {"run": "runner.test.arg", "wheel": "wheel.minions.connected"}


def selection(*, peers: list[str] | None = None, **options: Any) -> Selection:
    return Selection(settings.combine(options, {}), master_id=MASTER, peers=peers)


def interpret(tag: str, data: Any, chosen: Selection | None = None) -> Record | Ignored:
    return interpret_body(tag.encode() + b"\n\n" + values.packed(data), chosen)


def interpret_body(body: bytes, chosen: Selection | None = None) -> Record | Ignored:
    event = saltevent.open_event(body)
    return event if isinstance(event, Ignored) else records.interpret(event, CAPTURED_AT, chosen or selection())


def a_return(**changes: Any) -> dict[str, Any]:
    data = {"cmd": "_return", "id": "web1", "success": True, "return": {"a": [1, "é"]}, "retcode": 0, "jid": JID}
    return changed({**data, "fun": "test.ping", "fun_args": [], "_stamp": STAMP}, changes)


def a_publish(**changes: Any) -> dict[str, Any]:
    data = {"jid": JID, "tgt_type": "list", "tgt": ["web1", "web2"], "user": "root", "fun": "test.ping", "arg": [1]}
    return changed({**data, "minions": ["web1", "web2"], "missing": [], "_stamp": STAMP}, changes)


def a_runner_return(**changes: Any) -> dict[str, Any]:
    data = {"fun": "runner.test.arg", "jid": JID, "user": "root", "fun_args": [{"x": 1}], "return": {"a": 1}}
    return changed({**data, "success": True, "_stamp": STAMP}, changes)


def changed(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With these values; ``...`` takes the key out."""
    return {key: value for key, value in {**data, **changes}.items() if value is not ...}


def returned(chosen: Selection | None = None, **changes: Any) -> Return:
    record = interpret(JOB_RETURN, a_return(**changes), chosen)
    assert isinstance(record, Record)
    assert record.ret is not None
    return record.ret


# Tags


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        (f"salt/job/{JID}/new", Tag(Kind.JOB_NEW, JID, "")),
        (f"salt/job/{JID}/ret/web1", Tag(Kind.JOB_RETURN, JID, "web1")),
        (f"salt/run/{JID}/new", Tag(Kind.RUNNER_NEW, JID, "")),
        (f"salt/run/{JID}/ret", Tag(Kind.RUNNER_RETURN, JID, "")),
        (f"salt/wheel/{JID}/new", Tag(Kind.WHEEL_NEW, JID, "")),
        (f"salt/wheel/{JID}/ret", Tag(Kind.WHEEL_RETURN, JID, "")),
        (f"salt/job/{JID}/ret", None),
        (f"salt/job/{JID}/publish", None),
        (f"salt/job/{JID}/prog/web1", None),
        (f"salt/job/{JID}/ret/web1/x", None),
        (f"salt/run/{JID}/ret/web1", None),
        (f"syndic/s1/salt/job/{JID}/new", None),
        (JID, None),
        ("", None),
    ],
)
def test_a_tag_names_a_job_or_nothing(tag: str, said: Tag | None) -> None:
    assert saltevent.parse_tag(tag) == said


# A minion's return


def test_a_return_becomes_one_row_of_its_own_values() -> None:
    ret = returned()
    assert (ret.jid, ret.id, ret.fun, ret.success) == (JID, "web1", "test.ping", True)
    assert ret.return_json == json.dumps(a_return()["return"], ensure_ascii=False)
    assert ret.altered == "2026-01-02 03:04:05.000006"


def test_full_ret_is_the_event_as_saltext_mysql_stores_it() -> None:
    assert returned().full_ret_json == json.dumps(a_return(), ensure_ascii=False)


def test_what_full_ret_must_hold_is_added_after_the_events_own_keys() -> None:
    full_ret = json.loads(returned(fun_args=..., success=..., retcode=...).full_ret_json)
    assert list(full_ret) == ["cmd", "id", "return", "jid", "fun", "_stamp", "fun_args", "success", "retcode"]
    assert (full_ret["fun_args"], full_ret["success"], full_ret["retcode"]) == ([], True, 0)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_the_place_of_return_among_the_keys_is_kept(first: bool) -> None:
    rest = a_return(**{"return": ...})
    data = {"return": "x", **rest} if first else {**rest, "return": "x"}
    record = interpret(JOB_RETURN, data)
    assert isinstance(record, Record)
    assert record.ret is not None
    assert record.ret.full_ret_json == json.dumps(data)


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("levels", [0, 20, jsontext.MAX_DEPTH - 1, jsontext.MAX_DEPTH, 200])
def test_the_return_in_full_ret_is_the_return_however_deep_or_large(levels: int, size: int) -> None:
    for tag, data in ((JOB_RETURN, a_return), (RUN_RETURN, a_runner_return)):
        record = interpret(tag, data(**{"return": values.nested(levels, "x" * size)}))
        assert isinstance(record, Record)
        assert record.ret is not None
        assert f'"return": {record.ret.return_json}' in record.ret.full_ret_json


@pytest.mark.parametrize(
    ("changes", "success"),
    [
        ({"success": True, "retcode": 2}, True),
        ({"success": False, "retcode": 0}, False),
        ({"success": ..., "retcode": 0}, True),
        ({"success": ..., "retcode": 1}, False),
        ({"success": ..., "retcode": ...}, True),
        ({"success": None, "retcode": 1}, False),
        ({"success": "no", "retcode": 1}, False),
        ({"success": 1}, True),
        ({"success": {"a.b": True, "c.d": True}}, True),
        ({"success": {"a.b": True, "c.d": False}}, False),
        ({"success": [True, False]}, False),
        ({"success": [True, True]}, True),
        ({"success": {}, "retcode": {"a.b": 0, "c.d": 1}}, False),
        ({"success": ..., "retcode": {"a.b": 0, "c.d": 0}}, True),
        ({"success": ..., "retcode": [0, 2]}, False),
    ],
    ids=repr,
)
def test_success_is_what_was_said_and_else_what_the_retcode_says(changes: dict[str, Any], success: bool) -> None:
    ret = returned(**changes)
    assert ret.success is success
    if changes.get("success") is ...:
        assert json.loads(ret.full_ret_json)["success"] is success


@pytest.mark.parametrize(
    ("value", "success", "retcode", "failed"),
    [
        ({"stdout": "", "stderr": "ssh: connect to host", "retcode": 255, "_error": "x"}, False, 255, True),
        ({"return": True, "retcode": 0, "id": "web1", "fun": "test.ping"}, True, 0, False),
        ({"return": {}, "retcode": 0, "success": False, "id": "web1"}, False, 0, True),
        ({"retcode": "x"}, True, 0, False),
        ({"retcode": True}, True, 0, False),
        ("text", True, 0, False),
    ],
)
def test_a_return_of_salt_ssh_failed_if_its_value_says_so(
    value: Any, success: bool, retcode: int, failed: bool
) -> None:
    ret = returned(**{"success": ..., "retcode": ..., "return": value})
    assert (ret.success, json.loads(ret.full_ret_json)["retcode"], ret.failed) == (success, retcode, failed)
    assert json.loads(ret.full_ret_json)["success"] is success
    assert json.loads(ret.return_json) == value
    assert returned(**{"return": {"retcode": 5}}).success, "what has words of its own is asked for no others"
    left_out = returned(selection(skip_values=["*"]), **{"success": ..., "retcode": ..., "return": value})
    if isinstance(value, dict) and type(value["retcode"]) is int:
        assert (left_out.success, left_out.failed) == (success, failed), "also where the value is left out"


def test_a_salt_call_without_success_is_stored_as_a_success_with_its_retcode() -> None:
    assert b", '1', " in sql.return_row(returned(success=...))
    assert b", '0', " in sql.return_row(returned(success=..., retcode=1))


def test_a_multi_function_job_is_one_row_with_all_its_functions() -> None:
    funs = ["test.ping", "cmd.run"]
    ret = returned(
        fun=funs,
        fun_args=[[], ["ls"]],
        **{"return": {"test.ping": True, "cmd.run": "x"}},
        retcode={"test.ping": 0, "cmd.run": 1},
        success={"test.ping": True, "cmd.run": False},
    )
    assert (ret.fun, ret.success) == ("test.ping,cmd.run", False)
    assert json.loads(ret.full_ret_json)["fun"] == funs


def test_a_list_of_functions_longer_than_the_column_is_cut_there_and_whole_in_full_ret() -> None:
    funs = [f"module{n}.function" for n in range(100)]
    ret = returned(fun=funs)
    assert ret.fun == ",".join(funs)[:255]
    assert json.loads(ret.full_ret_json)["fun"] == funs


def test_a_return_without_fun_is_stored_all_the_same() -> None:
    assert returned(fun=...).fun == ""


@pytest.mark.parametrize(
    ("stamp", "altered"),
    [
        ("2026-01-02T03:04:05.000006", "2026-01-02 03:04:05.000006"),
        ("2026-01-02T03:04:05.000006+00:00", "2026-01-02 03:04:05.000006"),
        ("2026-01-02T03:04:05", "2026-01-02 03:04:05.000000"),
        ("2026-01-02T03:04:05+00:00", "2026-01-02 03:04:05.000000"),
        ("2026-01-02T03:04:05.123+00:00", "2026-01-02 03:04:05.123000"),
    ],
)
def test_altered_is_the_masters_stamp_in_utc(stamp: str, altered: str) -> None:
    assert returned(_stamp=stamp).altered == altered


@pytest.mark.parametrize(
    "stamp",
    [
        ...,
        None,
        1767323045.0,
        "",
        "yesterday",
        "2026-02-31T00:00:00.000000",
        "2026-01-02T25:00:00.000000",
        "2026-01-02T03:04:05.000006+02:00",
        "2026-01-02 03:04:05.000006",
        "1969-01-01T00:00:00.000000",
        "2038-02-01T00:00:00.000000",
        "2026-01-02T03:04:05.000006'; DROP TABLE jids; --",
        "202\N{FULLWIDTH DIGIT SIX}-01-02T03:04:05.000006",
    ],
    ids=repr,
)
def test_a_stamp_that_cannot_be_used_leaves_the_time_of_capture(stamp: Any) -> None:
    assert returned(_stamp=stamp).altered == "2026-01-02 03:04:06.500000"


@given(st.datetimes().map(lambda moment: moment.isoformat()) | st.from_regex(moments._STAMP, fullmatch=True))
def test_altered_always_has_the_documented_form(stamp: str) -> None:
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", returned(_stamp=stamp).altered, re.ASCII)


# What is no row, and why


@pytest.mark.parametrize("tag_and_data", [(JOB_RETURN, a_return), (JOB_NEW, a_publish), (RUN_RETURN, a_runner_return)])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cmd": "_minion_event"}, Ignored.MINION_EVENT),
        ({"jid": "20260102030405000007"}, Ignored.TAG_MISMATCH),
        ({"jid": int(JID) % 2**60}, Ignored.TAG_MISMATCH),
        ({"jid": ...}, Ignored.TAG_MISMATCH),
        ({"fun": 5}, Ignored.WRONG_TYPE),
        ({"fun": ["a.b", None]}, Ignored.WRONG_TYPE),
        ({"fun": {"a.b": 1}}, Ignored.WRONG_TYPE),
        ({"fun": "saltutil.find_job"}, Ignored.SKIPPED_FUNCTION),
        ({"fun": ["saltutil.find_job"]}, Ignored.SKIPPED_FUNCTION),
    ],
    ids=repr,
)
def test_what_is_wrong_in_any_kind_of_event_makes_it_no_row(
    tag_and_data: Any, changes: dict[str, Any], reason: Ignored
) -> None:
    tag, data = tag_and_data
    assert interpret(tag, data(**changes)) is reason


@pytest.mark.parametrize(
    ("tag", "data", "reason"),
    [
        (JOB_RETURN, a_return(id="web2"), Ignored.TAG_MISMATCH),
        (JOB_RETURN, a_return(id=...), Ignored.TAG_MISMATCH),
        (JOB_RETURN, a_return(id=b"web1"), Ignored.TAG_MISMATCH),
        (f"salt/job/{JID}/ret/", a_return(id=""), Ignored.TAG_MISMATCH),
        (JOB_RETURN, a_return(**{"return": ...}), Ignored.MISSING_KEY),
        (RUN_RETURN, a_runner_return(**{"return": ...}), Ignored.MISSING_KEY),
        (RUN_RETURN, a_runner_return(fun=...), Ignored.MISSING_KEY),
        (RUN_NEW, a_runner_return(fun=...), Ignored.MISSING_KEY),
        # What salt-run says of a function that it does not know, or that does not take the keywords.
        (RUN_RETURN, a_runner_return(fun="mysql_jobcache.nosuch", success=False, retcode=254), Ignored.NEVER_RAN),
        (RUN_NEW, a_runner_return(fun=["runner.jobs.active"]), Ignored.NEVER_RAN),
        (WHEEL_RETURN, a_runner_return(), Ignored.NEVER_RAN),
        *[(JOB_NEW, a_publish(**{key: ...}), Ignored.MISSING_KEY) for key in ("tgt", "fun", "arg", "minions")],
        (JOB_NEW, a_publish(minions="web1"), Ignored.WRONG_TYPE),
        (JOB_NEW, a_publish(minions=["web1", 2]), Ignored.WRONG_TYPE),
        (JOB_NEW, a_publish(missing=None), Ignored.WRONG_TYPE),
        (JOB_NEW, a_publish(tgt={"web1": 1}), Ignored.WRONG_TYPE),
        ("salt/job/nocache/ret/web1", a_return(jid="nocache"), Ignored.NOCACHE),
        ("salt/auth", {"id": "web1"}, Ignored.SWITCHED_OFF),
    ],
)
def test_what_is_wrong_in_one_kind_of_event_makes_it_no_row(tag: str, data: Any, reason: Ignored) -> None:
    assert interpret(tag, data) is reason


@pytest.mark.parametrize("jid", ["", "req", JID[:-1], f"{JID}1", f"{JID}_", f"{JID}_x", f"{JID}\n", f"{JID[:-1]}²"])
def test_a_jid_that_salt_does_not_make_is_no_row(jid: str) -> None:
    assert interpret(f"salt/job/{jid}/ret/web1", a_return(jid=jid)) is Ignored.BAD_JID


def test_a_jid_with_a_process_id_is_a_jid() -> None:
    record = interpret(f"salt/job/{JID}_4711/ret/web1", a_return(jid=f"{JID}_4711"))
    assert isinstance(record, Record)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n\n",
        JOB_RETURN.encode(),
        JOB_RETURN.encode() + b"\n\n",
        JOB_RETURN.encode() + b"\n\n" + values.packed(a_return())[:-1],
        JOB_RETURN.encode() + b"\n\n" + values.packed(a_return()) + b"\x00",
        JOB_RETURN.encode() + b"\n\n" + values.packed([a_return()]),
        JOB_RETURN.encode() + b"\n\n\xc1",
        JOB_RETURN.encode() + b"\n\n" + b"\x91" * 5000 + b"\x00",
        JOB_RETURN.encode() + b"\n\n\xdf\xff\xff\xff\xff",
        b"salt/job/\xff/new\n\n" + values.packed(a_publish()),
    ],
)
def test_bytes_that_are_no_event_are_undecodable(body: bytes) -> None:
    assert interpret_body(body) is Ignored.UNDECODABLE


@pytest.mark.parametrize("characters", [255, 256])
def test_a_minion_whose_id_no_column_takes_is_refused(characters: int) -> None:
    tag, minion = JOB_RETURN.rpartition("/")[0], "ü" * characters
    outcome = interpret(f"{tag}/{minion}", a_return(id=minion))
    assert isinstance(outcome, Record) if characters == 255 else outcome is Ignored.TOO_LONG


@pytest.mark.parametrize(
    "hostile",
    [
        {(1, 2): "an array as a key"},
        {(("a", 1),): "a deeper one"},
        *[msgpack.ExtType(79, msgpack.packb(inner)) for inner in (7, [], ["x"], {}, None)],
        msgpack.ExtType(79, b""),
        msgpack.ExtType(78, b"\xff"),
        msgpack.ExtType(78, b"not a time"),
    ],
    ids=repr,
)
def test_a_value_that_python_cannot_hold_makes_the_event_undecodable_and_raises_nothing(hostile: Any) -> None:
    assert interpret(JOB_RETURN, a_return(**{"return": hostile})) is Ignored.UNDECODABLE


def test_salts_own_extension_types_become_their_text() -> None:
    moment = msgpack.ExtType(78, b"20260102T03:04:05.000006")
    constant = msgpack.ExtType(79, msgpack.packb(["_OPT", "text"]))
    ret = returned(**{"return": [moment, constant]})
    assert ret.return_json == '["2026-01-02T03:04:05.000006", "text"]'


# Whose event it is


def test_on_a_cluster_an_event_of_a_known_peer_belongs_to_that_peer() -> None:
    chosen = selection(peers=["master2"])
    assert interpret(JOB_RETURN, a_return(__peer_id="master2"), chosen) is Ignored.PEER
    assert interpret(JOB_NEW, a_publish(__peer_id="master2"), chosen) is Ignored.PEER


def test_a_peers_event_is_that_peers_in_salt_events_too() -> None:
    chosen = selection(peers=["master2"], events=["*"])
    assert interpret(JOB_RETURN, a_return(__peer_id="master2"), chosen) is Ignored.PEER
    assert interpret("salt/auth", {"__peer_id": "master2"}, chosen) is Ignored.PEER


@pytest.mark.parametrize("peer", ["master9", "", None, 5, ["master2"], {"master2": 1}], ids=repr)
def test_on_a_cluster_an_unknown_peer_hides_nothing(peer: Any) -> None:
    assert returned(selection(peers=["master2"]), __peer_id=peer).id == "web1"


def test_without_a_cluster_a_peer_id_means_nothing() -> None:
    assert returned(__peer_id="master2").id == "web1"


# What the settings ask for


def test_functions_are_skipped_by_glob_and_a_job_of_several_only_when_all_are() -> None:
    chosen = selection(skip_functions=["saltutil.*", "mine.update"])
    skipped, kept = ["mine.update", "saltutil.find_job"], ["mine.update", "test.ping"]
    assert interpret(JOB_RETURN, a_return(fun=skipped), chosen) is Ignored.SKIPPED_FUNCTION
    assert returned(chosen, fun=kept).fun == ",".join(kept)
    assert returned(chosen, fun=[]).fun == ""


def test_an_empty_list_of_skipped_functions_skips_nothing() -> None:
    assert returned(selection(skip_functions=[]), fun="saltutil.find_job").fun == "saltutil.find_job"


@pytest.mark.parametrize(("kind", "option"), [("run", "runner_jobs"), ("wheel", "wheel_jobs")])
@pytest.mark.parametrize("end", ["new", "ret"])
def test_runner_and_wheel_jobs_are_stored_unless_switched_off(kind: str, option: str, end: str) -> None:
    tag = f"salt/{kind}/{JID}/{end}"
    assert isinstance(interpret(tag, a_runner_return(fun=FUN_OF[kind])), Record)
    assert interpret(tag, a_runner_return(), selection(**{option: False})) is Ignored.SWITCHED_OFF


SECRET = "mysql.pass: SECRET-1"


@pytest.mark.parametrize(
    ("tag", "data"),
    [
        (RUN_RETURN, a_runner_return(fun="runner.jobs.list_jobs", **{"return": {"a": [SECRET]}})),
        (RUN_RETURN, a_runner_return(fun="runner.mysql_jobcache.dead_letters", **{"return": SECRET})),
        (WHEEL_RETURN, a_runner_return(fun="wheel.config.values", **{"return": {"mysql.pass": SECRET}})),
        (WHEEL_RETURN, a_runner_return(fun="wheel.key.gen_accept", **{"return": {"data": {"return": SECRET}}})),
        (JOB_RETURN, a_return(fun="my.secret", **{"return": SECRET, "tgt": "web1", "arg": []})),
        (JOB_RETURN, a_return(fun=["test.ping", "my.secret"], **{"return": {"my.secret": SECRET}})),
    ],
)  # fmt: skip
def test_a_value_that_skip_values_names_is_in_no_row_and_the_row_says_so(tag: str, data: dict[str, Any]) -> None:
    skip = [*settings.OPTIONS["skip_values"].default, "my.*"]
    record = interpret(tag, data, selection(skip_values=skip, events=["salt/*"]))
    assert isinstance(record, Record)
    assert record.ret is not None and record.event is not None
    said = {**data, "return": saltevent.LEFT_OUT}
    full_ret = json.loads(record.ret.full_ret_json)
    if tag == JOB_RETURN:
        assert json.loads(record.ret.return_json) == full_ret["return"] == saltevent.LEFT_OUT
    else:
        assert json.loads(record.ret.return_json) == full_ret["return"] == said
    assert {key: full_ret[key] for key in ("fun", "fun_args", "success")} == {
        key: data[key] for key in ("fun", "fun_args", "success")
    }
    assert json.loads(record.event.data_json) == said
    assert "SECRET" not in repr(record) + repr(records.synthesised_load(record.ret))


@pytest.mark.parametrize("cut", [saltevent.TRIMMED, {"a": saltevent.TRIMMED}])
def test_a_value_that_is_left_out_is_not_a_trimmed_one(cut: Any) -> None:
    ret = returned(selection(skip_values=["test.*"]), fun="test.echo", **{"return": cut})
    assert not ret.trimmed and "trimmed" not in json.loads(ret.full_ret_json)


@pytest.mark.parametrize("fun", [None, 5, [1], {"wheel.key.x": 1}, b"wheel.key.x"], ids=repr)
def test_an_event_that_is_stored_may_hold_anything_as_its_function(fun: Any) -> None:
    record = interpret("my/app", {"fun": fun, "return": 1}, selection(events=["my/*"]))
    assert isinstance(record, Record) and record.event is not None
    assert json.loads(record.event.data_json)["return"] == 1


def test_an_event_that_is_asked_for_is_stored_whatever_its_job_part_is_worth() -> None:
    chosen = selection(events=["salt/auth", "salt/job/*"])
    data = {"id": "web1", "act": b"accept", "_stamp": STAMP}
    record = interpret("salt/auth", data, chosen)
    assert isinstance(record, Record)
    assert record.load is record.ret is None
    assert record.event == records.Event(
        "salt/auth", f'{{"id": "web1", "act": "accept", "_stamp": "{STAMP}"}}', "2026-01-02 03:04:05.000006"
    )
    forged = interpret(JOB_RETURN, a_return(cmd="_minion_event"), chosen)
    assert isinstance(forged, Record)
    assert forged.ret is None
    assert forged.event is not None


def test_a_return_whose_tag_is_asked_for_is_both_a_return_and_an_event() -> None:
    record = interpret(JOB_RETURN, a_return(), selection(events=["salt/job/*/ret/*"]))
    assert isinstance(record, Record)
    assert record.ret == returned()
    assert record.event is not None
    assert json.loads(record.event.data_json) == a_return()


# The master's own jobs


@pytest.mark.parametrize("kind", ["run", "wheel"])
def test_a_masters_job_is_stored_under_the_masters_id_with_the_whole_event_as_its_return(kind: str) -> None:
    record = interpret(f"salt/{kind}/{JID}/ret", a_runner_return(fun=FUN_OF[kind], success=False))
    assert isinstance(record, Record)
    ret = record.ret
    assert ret is not None
    assert (ret.id, ret.fun, ret.success) == (MASTER, FUN_OF[kind], False)
    assert json.loads(ret.return_json) == a_runner_return(fun=FUN_OF[kind], success=False)
    full_ret = json.loads(ret.full_ret_json)
    assert full_ret["return"] == a_runner_return(fun=FUN_OF[kind], success=False)
    assert (full_ret["id"], full_ret["success"], full_ret["retcode"]) == (MASTER, False, 1)
    assert full_ret["fun_args"] == [{"x": 1}]


def test_a_masters_job_has_the_same_load_from_its_start_and_from_its_return() -> None:
    start, end = interpret(RUN_NEW, a_runner_return(**{"return": ...})), interpret(RUN_RETURN, a_runner_return())
    assert isinstance(start, Record)
    assert isinstance(end, Record)
    assert start.load is not None
    assert end.ret is not None
    assert start.load.load == records.synthesised_load(end.ret)


# Loads


def load(**changes: Any) -> dict[str, Any]:
    record = interpret(JOB_NEW, a_publish(**changes))
    assert isinstance(record, Record)
    assert record.load is not None
    return record.load.load


def test_a_published_load_holds_what_was_published_with_minions_and_missing() -> None:
    expected = a_publish(_stamp=...)
    expected["Minions"] = expected.pop("minions")
    assert load() == expected
    assert jobload.is_published(load())


def test_a_load_is_synthesised_from_a_return_without_its_value() -> None:
    made = records.synthesised_load(returned())
    assert "return" not in made
    assert (made["jid"], made["fun"], made["tgt"], made["tgt_type"], made["arg"]) == (
        JID, "test.ping", "web1", "glob", [],
    )  # fmt: skip
    assert not jobload.is_published(made)


@pytest.mark.parametrize(
    "claim", [{"Minions": []}, {"cmd": "publish"}, {b"Minions": []}, {b"cmd": b"publish"}], ids=repr
)
def test_no_minion_can_pass_its_return_off_as_a_published_load(claim: Any) -> None:
    record = interpret(JOB_RETURN, {**a_return(cmd=...), **claim})
    assert isinstance(record, Record)
    assert record.ret is not None
    stored = json.loads(jsontext.dumps(records.synthesised_load(record.ret)))
    assert not jobload.is_published(stored)
    assert jobload.merged_load(stored, load()) == load()


@pytest.mark.parametrize("stored", [None, [], "x", {}, {"fun": "x"}, a_return()], ids=repr)
def test_a_published_load_beats_what_is_not_one(stored: Any) -> None:
    assert jobload.merged_load(stored, load()) == load()


def test_the_parts_of_a_batch_job_add_up() -> None:
    first = load(tgt=["web1"], minions=["web1"], missing=["db1"])
    second = load(tgt=["web2"], minions=["web2"], missing=[])
    merged = jobload.merged_load(first, second)
    assert merged == {**first, "tgt": ["web1", "web2"], "Minions": ["web1", "web2"], "missing": ["db1"]}


def test_a_load_that_saltext_mysql_stored_keeps_its_keys_and_gains_the_minions() -> None:
    stored = {"cmd": "publish", "jid": JID, "kwargs": {"delimiter": ":"}, "tgt": "*", "fun": "test.ping"}
    merged = jobload.merged_load(stored, load())
    assert {**merged, **stored} == merged
    assert merged["Minions"] == ["web1", "web2"]


names = st.lists(values.any_text, max_size=4)
published = st.builds(load, minions=names, missing=names, tgt=values.any_text | st.lists(values.scalars, max_size=4))


@given(published | st.none() | st.just({"cmd": "publish"}), published)
def test_merging_a_load_again_changes_nothing(stored: Any, new: dict[str, Any]) -> None:
    once = jobload.merged_load(stored, new)
    assert jobload.merged_load(once, new) == once


@given(published, published)
@example(load(minions=["\udc80"]), load(minions=["\udc80"]))
def test_merging_a_load_into_what_was_read_back_from_the_database_changes_nothing(
    first: dict[str, Any], new: dict[str, Any]
) -> None:
    stored = jsontext.dumps(jobload.merged_load(json.loads(jsontext.dumps(first)), new))
    again = jsontext.dumps(jobload.merged_load(json.loads(stored), new))
    assert again == stored


# Whatever comes

likely = st.fixed_dictionaries(
    {},
    optional={
        "jid": st.just(JID) | values.packable,
        "id": st.just("web1") | values.packable,
        "fun": st.just("test.ping") | names | values.packable,
        "cmd": st.sampled_from(["_return", "_minion_event", "publish"]) | values.packable,
        "tgt": st.just("*") | names | values.packable,
        "minions": names | values.packable,
        "_stamp": st.just(STAMP) | values.packable,
        "__peer_id": st.just("master2") | values.packable,
        **dict.fromkeys(("return", "retcode", "success", "fun_args", "arg", "missing", "user"), values.packable),
    },
)
chosen_selections = st.builds(selection, peers=st.none() | st.just(["master2"]), events=st.sampled_from([[], ["*"]]))
tags = st.sampled_from([JOB_RETURN, JOB_NEW, RUN_NEW, RUN_RETURN, f"salt/wheel/{JID}/ret", "salt/auth"])
payloads = st.tuples(likely, st.dictionaries(values.scalars, values.packable, max_size=3)).map(
    lambda parts: values.packed({**parts[1], **parts[0]})
)


def check(outcome: Record | Ignored) -> None:
    if isinstance(outcome, Ignored):
        return
    texts = []
    if outcome.load is not None:
        texts.append(jsontext.dumps(outcome.load.load))
        assert sql.load_row(outcome.load.jid, texts[-1])
    if outcome.ret is not None:
        texts += [outcome.ret.return_json, outcome.ret.full_ret_json]
        texts.append(jsontext.dumps(records.synthesised_load(outcome.ret)))
        assert sql.return_row(outcome.ret)
        full_ret = values.strict_json(outcome.ret.full_ret_json)
        assert full_ret.keys() >= {"fun_args", "return", "success", "retcode"}
        assert full_ret["return"] == values.strict_json(outcome.ret.return_json)
    if outcome.event is not None:
        texts.append(outcome.event.data_json)
        assert sql.event_row(outcome.event, MASTER, bytes(16))
    assert texts, "a record without rows"
    for text in texts:
        assert values.depth(values.strict_json(text)) <= 31


@given(tags, payloads, chosen_selections)
def test_any_payload_becomes_strict_json_or_a_reason(tag: str, payload: bytes, chosen: Selection) -> None:
    check(interpret_body(tag.encode() + b"\n\n" + payload, chosen))


@given(tags.map(str.encode) | st.binary(), st.binary(), chosen_selections)
def test_any_bytes_become_strict_json_or_a_reason(tag: bytes, payload: bytes, chosen: Selection) -> None:
    check(interpret_body(tag + b"\n\n" + payload, chosen))
    check(interpret_body(payload, chosen))


@given(values.packable)
def test_any_return_value_of_a_genuine_return_is_stored_as_its_json(value: Any) -> None:
    record = interpret(JOB_RETURN, a_return(**{"return": value}))
    if record is not Ignored.UNDECODABLE:
        assert isinstance(record, Record)
        check(record)


# Values that Salt trimmed

TRIMMED = saltevent.TRIMMED


@pytest.mark.parametrize(
    ("value", "trimmed"),
    [
        (TRIMMED, True),
        ({"a": {"b": TRIMMED}}, True),
        ({"a": 1, "b": {}}, False),
        (f"not {TRIMMED}", False),
        (TRIMMED.encode(), False),
        ([TRIMMED], False),
        ({TRIMMED: 1}, False),
        (values.nested(900, TRIMMED), False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_value_is_trimmed_where_salt_could_have_trimmed_it(value: Any, trimmed: bool) -> None:
    assert saltevent.is_trimmed(value) is trimmed
    if not isinstance(value, list) or len(repr(value)) < 1000:
        assert returned(**{"return": value}).trimmed is trimmed


def test_a_trimmed_return_says_so_at_the_end_of_full_ret_whatever_it_says_itself() -> None:
    ret = returned(**{"return": {"a": TRIMMED}}, trimmed="by the minion")
    assert ret.trimmed
    assert ret.full_ret_json.endswith(', "trimmed": true}')
    assert json.loads(ret.full_ret_json)["trimmed"] is True
    assert "trimmed" not in json.loads(returned().full_ret_json)


def test_only_a_trimmed_return_can_have_the_mark_at_the_end() -> None:
    for data in (a_return(trimmed=True), {**a_return(), "x": {"y": 1, "trimmed": True}}):
        record = interpret(JOB_RETURN, data)
        assert isinstance(record, Record)
        assert record.ret is not None
        assert not record.ret.trimmed
        assert not record.ret.full_ret_json.endswith(', "trimmed": true}')


# There and back


@given(values.packable, tags)
def test_what_was_opened_can_be_packed_again_and_means_the_same(value: Any, tag: str) -> None:
    event = saltevent.open_event(tag.encode() + b"\n\n" + values.packed(a_return(**{"return": value})))
    if isinstance(event, Ignored):
        return
    body = saltevent.try_pack(event.tag, event.data)
    assert body is not None
    again = saltevent.open_event(body)
    assert isinstance(again, saltevent.Opened)
    assert (again.tag, again.job, again.trimmed) == (event.tag, event.job, event.trimmed)
    assert jsontext.dumps(again.data) == jsontext.dumps(event.data)
    assert saltevent.try_pack(again.tag, again.data) == body


@pytest.mark.parametrize("tag", ["salt/job/\udcff/new", JOB_RETURN])
def test_what_cannot_be_packed_is_none_and_never_an_exception(tag: str) -> None:
    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    assert saltevent.try_pack(tag, a_return(**{"return": deep})) is None


@given(values.packable)
def test_any_event_can_be_described_in_json(value: Any) -> None:
    body = JOB_RETURN.encode() + b"\n\n" + values.packed(a_return(**{"return": value}))
    described = saltevent.describe(body)
    assert values.strict_json(json.dumps(described, allow_nan=False)) == described
    assert described.keys() in ({"tag", "data"}, {"bytes"})


# Refusals before anything else is looked at


@given(tags, payloads, chosen_selections)
def test_what_is_refused_is_no_row_of_a_job_and_all_else_is(tag: str, payload: bytes, chosen: Selection) -> None:
    event = saltevent.open_event(tag.encode() + b"\n\n" + payload)
    if not isinstance(event, saltevent.Opened) or chosen.is_of_peer(event.data):
        return
    outcome = records.interpret(event, CAPTURED_AT, chosen)
    is_row = isinstance(outcome, Record) and (outcome.load is not None or outcome.ret is not None)
    assert is_row == (records.refusal(event.job, event.data, chosen) is None)


@pytest.mark.parametrize("length", [221, 222, 255])
def test_a_long_id_keeps_its_return_where_events_are_stored_too(length: int) -> None:
    minion = "m" * length
    tag = f"salt/job/{JID}/ret/{minion}"
    record = interpret(tag, a_return(id=minion), selection(events=["salt/job/*"]))
    assert isinstance(record, Record)
    assert record.ret is not None
    assert record.event is not None
    assert (record.ret.id, record.event.tag) == (minion, tag[:255])


@pytest.mark.parametrize(("clock", "altered"), [(0.0, "1970-01-02"), (4e9, "2037-12-31"), (1e300, "2037-12-31")])
def test_a_clock_that_no_timestamp_has_is_stored_as_the_nearest(clock: float, altered: str) -> None:
    event = saltevent.open_event(JOB_RETURN.encode() + b"\n\n" + values.packed(a_return(_stamp=...)))
    assert isinstance(event, saltevent.Opened)
    record = records.interpret(event, clock, selection())
    assert isinstance(record, Record)
    assert record.ret is not None
    assert record.ret.altered.startswith(altered)


def test_what_msgpack_has_no_form_for_is_packed_as_its_text() -> None:
    body = saltevent.try_pack("tag", {"a": {1}, "b": datetime.datetime(2026, 3, 29, 1, 30)})  # noqa: DTZ001 (as Salt's)
    assert body is not None
    event = saltevent.open_event(body)
    assert isinstance(event, Opened)
    assert event.data == {"a": "{1}", "b": datetime.datetime(2026, 3, 29, 1, 30)}  # noqa: DTZ001


@pytest.mark.parametrize(
    ("retcode", "bad"),
    [
        (0, False), (1, True), (-1, True), (False, False), (True, True), (None, False), (0.0, False), (0.5, True),
        ("", False), ("0", False), ("1", True), ("oops", True), ([], False), ([0, 0], False), ([0, 1], True),
        ({}, False), ({"test.ping": 0, "test.10": 0}, False), ({"test.ping": 0, "test.10": 10}, True),
        ({"1": None, "2": False}, False), ({"1": [0, 0]}, False), ({"a": {"0": 0, "1": 2}}, True),
    ],
)  # fmt: skip
def test_a_return_failed_if_its_retcode_or_that_of_one_of_its_functions_is_not_0(retcode: Any, bad: bool) -> None:
    assert records.is_bad(retcode) is bad


def test_more_minions_of_a_job_and_its_stubs_are_opened_as_what_they_are() -> None:
    job = "20260329000000000001"
    more = saltevent.open_event(saltevent.minions_event(job, ["far-1", "far-2"]) or b"")
    assert isinstance(more, Opened)
    assert (more.job, more.data["minions"]) == (Tag(Kind.MINIONS, job, ""), ["far-1", "far-2"])
    assert (more.trimmed, more.chosen) == (False, False)
    stored_at = 1_774_742_400.25
    for minion, kind in (("web1", Kind.JOB_RETURN), ("", Kind.JOB_NEW)):
        stub = saltevent.open_event(saltevent.stub(job, minion, stored_at))
        assert isinstance(stub, Opened)
        assert stub.job == Tag(kind, job, minion)
        assert (stub.data["jid"], stub.data["_stamp"]) == (job, moments.utc(stored_at).isoformat())
        assert stub.data.get("id", "") == minion
