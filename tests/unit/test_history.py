"""The parts of reading that need no server: what an answer looks like, and what is no question."""

from __future__ import annotations

import json
from typing import Any

import pytest

from salt_mysql_engine import history, moments, pool, reader, saltevent
from salt_mysql_engine.errors import EngineError, SettingsError
from salt_mysql_engine.history import reason
from salt_mysql_engine.reader import all_as_cached, as_cached, as_listed, load_as_cached
from salt_mysql_engine.records import Record, Selection, interpret
from salt_mysql_engine.saltevent import Opened, open_event
from salt_mysql_engine.search import _matches
from salt_mysql_engine.settings import combine
from tests.support.shipping import MASTER, body, call_data, jid, master_data, return_data

OPTS = {"id": MASTER, "cachedir": "/nowhere", "mysql.host": "127.0.0.1", "mysql.port": 1}


def stored(tag: str, data: dict[str, Any]) -> str:
    """The `full_ret` of an event."""
    event = open_event(body(tag, data))
    assert isinstance(event, Opened)
    record = interpret(event, 0.0, Selection(combine({}, {}), master_id=MASTER))
    assert isinstance(record, Record)
    assert record.ret is not None
    return record.ret.full_ret_json


def of_minion(data: dict[str, Any]) -> str:
    return stored(f"salt/job/{jid(1)}/ret/web1", data)


TRIMMED = saltevent.TRIMMED
RETURNED = return_data(jid(1), "web1", {"a": 1})
WITHOUT_STAMP = {key: value for key, value in RETURNED.items() if key != "_stamp"}
SSH = {"jid": jid(1), "id": "web1", "return": {"a": 1}, "fun": "test.arg"}


@pytest.mark.parametrize(
    ("full_ret", "kept"),
    [
        (of_minion(RETURNED), {"return": {"a": 1}, "retcode": 0, "success": True}),
        (of_minion({**RETURNED, "out": "txt"}), {"return": {"a": 1}, "retcode": 0, "success": True, "out": "txt"}),
        (of_minion({**RETURNED, "success": False, "retcode": 2}), {"return": {"a": 1}, "retcode": 2, "success": False}),
        (of_minion(WITHOUT_STAMP), {"return": {"a": 1}, "retcode": 0, "success": True}),
        (of_minion(call_data(jid(1), "web1", "x")), {"return": "x", "retcode": 0}),
        (of_minion(SSH), {"return": {"a": 1}}),
        (of_minion({**RETURNED, "return": TRIMMED}), {"return": TRIMMED, "retcode": 0, "success": True}),
        (of_minion({**call_data(jid(1), "web1"), "return": TRIMMED}), {"return": TRIMMED, "retcode": 0}),
        (
            stored(f"salt/run/{jid(1)}/ret", master_data(jid(1), "runner.x.y", 1)),
            {"return": master_data(jid(1), "runner.x.y", 1)},
        ),
        # Of other writers: whole, cut, of the format of 2014, no return at all.
        (json.dumps(RETURNED), {"return": {"a": 1}, "retcode": 0, "success": True}),
        ('{"return": true, "success": true, "retcode": 0}', {"return": True, "retcode": 0, "success": True}),
        ('{"return": {"a": 1', {"return": '{"return": {"a": 1'}),
        ('{"return": 1} and more', {"return": '{"return": 1} and more'}),
        ('["a"]', {"return": ["a"]}),
        ("", {"return": ""}),
        ("[" * 100_000, {"return": "[" * 100_000}),
    ],
)  # fmt: skip
def test_a_return_has_the_keys_that_the_local_cache_keeps(full_ret: str, kept: dict[str, Any]) -> None:
    assert as_cached(full_ret) == kept
    assert list(as_cached(full_ret)) == list(kept)


OWN = ("web1", 'we"b', "we\\b", "\x00", "\u2028", '", "return": 2, "x": "', ': "', "")
"""Texts that may stand where one minion's row differs from another's."""
AROUND = [
    '{{"id": {0}, "return": true, "_stamp": {1}}}',
    '{{"id": {0}, "return": true, "_stamp": {1}, "success": true, "retcode": 0}}',
    '{{"id": {0}, "return": true, "stamp": {1}, "success": true, "retcode": 0}}',
    '{{"_stamp": {1}, "return": true, "id": {0}, "success": true}}',
    '{{"id": {0}, "return": {1}, "_stamp": "x"}}',
    '{{"return": {0}, "id": "x", "_stamp": {1}}}',
    '{{"return": {{"id": {0}, "_stamp": {1}}}}}',
    '{{"return": [{{"id": {0}}}], "_stamp": {1}}}',
    '{{"id": {0}, "_stamp": {1}, "return": true, "out": ["nested"]}}',
    '{{"id": {0}, "return": 1, "_stamp": {1}, "id": "x", "return": "twice"}}',
    '{{"a\\"id": {0}, "return": false, "a\\"_stamp": {1}}}',
    '{{"id": {0}, "return": true, "_stamp": {1}',
    '{{"id": {0}, "return": true, "_stamp": {1}}} and more',
    '{{"return": true}}"id": {0}, "_stamp": {1}',
    '"id": {0}, "_stamp": {1}',
    "[{0}, {1}]",
    "{0}",
]


def test_many_returns_at_once_are_what_each_of_them_is_and_share_nothing_that_can_be_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "_TRIES", 1_000_000)
    quoted = [json.dumps(own) for own in OWN] + [f'"{own}"' for own in OWN]
    texts = [around.format(one, other) for around in AROUND for one in quoted for other in quoted] + ["", "{}"]
    rows = [(str(number), text) for number, text in enumerate([*texts, *reversed(texts)])]
    answers = all_as_cached(rows)
    assert answers == {minion: as_cached(text) for minion, text in rows}
    assert [list(answer) for answer in answers.values()] == [list(as_cached(text)) for _, text in rows]
    changeable = [answers] + [
        each for answer in answers.values() for each in (answer, *answer.values()) if isinstance(each, (dict, list))
    ]
    assert len({id(each) for each in changeable}) == len(changeable) > len(rows)


def test_returns_of_other_length_stand_beside_those_that_are_alike() -> None:
    rows = [(str(number), json.dumps({**RETURNED, "return": "x" * number * 500})) for number in range(60)]
    assert all_as_cached(rows * 2) == {minion: as_cached(text) for minion, text in rows}


PUBLISHED = {"jid": jid(1), "tgt": "*", "fun": "test.ping", "arg": [], "Minions": ["b", "a", "b"], "missing": ["c"]}


@pytest.mark.parametrize("fun", ["runner.test.arg", "wheel.key.list_all"])
def test_a_job_of_the_masters_own_is_listed_without_arguments_as_by_the_local_cache(fun: str) -> None:
    load = {"jid": jid(1), "id": MASTER, "tgt": MASTER, "tgt_type": "glob", "fun": fun, "arg": [1, {"a": 2}]}
    for listed in (as_listed(load), load_as_cached(load)):
        assert listed == {"jid": jid(1), "id": MASTER, "tgt": MASTER, "fun": fun}
    for others in ({**PUBLISHED, "fun": fun}, {**load, "fun": "test.arg"}, {**load, "id": "web1"}):
        assert as_listed(others) == others


@pytest.mark.parametrize(
    ("load", "minions"),
    [
        (PUBLISHED, ["a", "b"]),
        ({**PUBLISHED, "Minions": []}, None),
        ({**PUBLISHED, "Minions": "a"}, None),
        ({"id": "web1", "tgt": "web1", "fun": "test.ping"}, ["web1"]),  # a salt-call
        ({"id": MASTER, "tgt": MASTER, "fun": "runner.jobs.active"}, None),
        ({"cmd": "publish", "tgt": "*", "fun": "test.ping"}, None),  # saltext.mysql does not know
        ({}, None),
    ],
)
def test_a_load_names_whom_it_was_for_as_the_local_cache_does(load: dict[str, Any], minions: list[str] | None) -> None:
    before = json.dumps(load)
    shown = load_as_cached(load)
    assert shown.get("Minions") == minions
    assert ("Minions" in shown) is (minions is not None)
    assert "missing" not in shown
    assert json.dumps(load) == before


def orchestrated(states: Any) -> dict[str, Any]:
    """What a runner's row holds of an orchestration."""
    shown = {"data": {MASTER: states}, "outputter": "highstate", "retcode": 1}
    return master_data(jid(1), "runner.state.orchestrate", shown)


FAILED = {"result": False, "comment": "No such file\nat all", "__id__": "/etc/app"}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("ERROR: no\nsecond", "ERROR: no"),
        ("\n  \n  spaces  \t between \n", "spaces between"),
        ("It went wrong: Traceback (most recent call last):\n  File x\nKeyError: 'a'\n", "KeyError: 'a'"),
        ({"s1": {"result": True}, "s2": FAILED, "s3": FAILED}, "2 of 3 states failed: /etc/app: No such file"),
        (["Rendering SLS failed", "and more"], "Rendering SLS failed; and more"),
        (orchestrated({"s1": {"result": True}, "s2": FAILED}), "1 of 2 states failed: /etc/app: No such file"),
        (orchestrated(["No matching sls found for 'x'"]), "No matching sls found for 'x'"),
        ({"outputter": "nested", "data": {"a": 1, "b": 2}}, '{"a": 1, "b": 2}'),
        ({"test.ping": "'x' is not available.", "test.arg": "ok"}, "test.ping: 'x' is not available.; test.arg: ok"),
        ({"pid": 1, "retcode": 3}, '{"pid": 1, "retcode": 3}'),
        (False, "false"), (None, "null"), ("", ""), ({}, "{}"), ([], "[]"), ([1, "a"], '[1, "a"]'),
        ("\x1b[31mred\x07", "[31mred"),
        ("x" * 1000, "x" * 157 + "..."),
    ],
)  # fmt: skip
def test_why_a_return_failed_is_one_short_line(value: Any, line: str) -> None:
    assert reason(value) == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": -1}, "limit: '-1' must be a whole number from 1 to 1,000"),
        ({"limit": 0}, "limit: '0' must be"),
        ({"limit": 1001}, "limit: '1001' must be"),
        ({"limit": True}, "limit: 'True' must be"),
        ({"limit": "9" * 5000}, "limit: '9"),
        ({"limit": "1; DROP TABLE jids"}, "limit: '1; DROP TABLE jids' must be"),
        ({"since": "yesterday"}, r"since: 'yesterday' must be a time ago \(30m, 2h, 1d\), a UTC date .* or a jid"),
        ({"until": "2026-02-31"}, "until: '2026-02-31' must be a time ago"),
        ({"since": ["a"]}, "since: "),
        ({"after": "../../etc"}, "after: '../../etc' must be a jid: 20 digits"),
        ({"after": "2026"}, "after: '2026' must be a jid"),
        ({"failed": "yes"}, "failed: 'yes' must be True or False"),
        ({"fun": ["a"]}, "fun: .* must be a text of 1 to 255 characters"),
        ({"user": ""}, "user: '' must be a text"),
        ({"target": {"a": 1}}, "target: "),
        ({"minion": "x" * 256}, "minion: 'x"),
    ],
)
def test_a_question_that_is_none_is_answered_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=f"^{message}") as refused:
        history.jobs(OPTS, **arguments)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("jid_", ["", "x", "2026", "../passwd", None, "2026112314000525000a", jid(1) + "_", ["a"]])
def test_what_is_no_jid_is_no_job(jid_: Any) -> None:
    with pytest.raises(EngineError, match=r"must be a jid: 20 digits"):
        history.job(OPTS, jid_)


@pytest.mark.parametrize("minion", ["", None, ["a"], {}, "x" * 256])
def test_what_is_no_minion_has_no_jobs(minion: Any) -> None:
    with pytest.raises(EngineError, match=r"the minion: .* must be a text of 1 to 255 characters"):
        history.minion(OPTS, minion)


@pytest.mark.parametrize(
    ("glob", "sql", "value"),
    [
        ("test.ping", "f = %s", "test.ping"),
        ("100%_a|b\\'", "f = %s", "100%_a|b\\'"),
        ("test.*", "f LIKE %s ESCAPE '|'", "test.%"),
        ("web?1", "f LIKE %s ESCAPE '|'", "web_1"),
        ("*%_|\\'[a]", "f LIKE %s ESCAPE '|'", "%|%|_||\\'[a]"),
    ],
)
def test_only_the_star_and_the_question_mark_of_a_glob_stand_for_others(glob: str, sql: str, value: str) -> None:
    assert tuple(_matches("f", glob)) == (sql, [value])


def test_the_beginning_of_a_jid_is_the_moment_it_was_made_at() -> None:
    moment = moments.parse("2026-11-23T14:00:05.25", 0.0)
    assert moments.jid_at(moment) == "20261123140005250000"
    assert moments.of_jid("20261123140005250000_12") == moments.of_jid("20261123140005250000")
    assert moments.of_jid("20269923140005250000") is None


def test_a_connection_that_cannot_be_used_is_told(tmp_path: Any) -> None:
    with pytest.raises(SettingsError, match=r"mysql\.port"):
        pool.of({**OPTS, "mysql.port": "x"})
