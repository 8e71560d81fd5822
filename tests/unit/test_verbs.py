"""What the runner's functions take: every argument is checked before the engine is asked, and told by its name."""

from __future__ import annotations

import base64
import datetime
import json
import math
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from salt_mysql_engine import control, verbs
from salt_mysql_engine.errors import EngineError
from salt_mysql_engine.moments import parse as parse_since
from salt_mysql_engine.reconcile import Pass

NOW = 1_700_000_000.0
OPTS: dict[str, Any] = {"sock_dir": "/nowhere"}


def utc(*moment: int) -> float:
    return datetime.datetime(*moment, tzinfo=datetime.timezone.utc).timestamp()  # type: ignore[misc, arg-type] # year and so on


# Since when


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("30s", NOW - 30),
        ("5m", NOW - 300),
        ("2h", NOW - 7200),
        ("1.5 h", NOW - 5400),
        ("1d", NOW - 86_400),
        (" 0s ", NOW),
        ("2026-11-23", utc(2026, 11, 23)),
        ("2026-11-23T14:00", utc(2026, 11, 23, 14)),
        ("2026-11-23 14:00:05", utc(2026, 11, 23, 14, 0, 5)),
        ("2026-11-23T14:00:05.250000", utc(2026, 11, 23, 14, 0, 5) + 0.25),
        ("2026-11-23T14:00:00+02:00", utc(2026, 11, 23, 12)),
        ("20261123140005250000", utc(2026, 11, 23, 14, 0, 5) + 0.25),
        ("20261123140005250000_4711", utc(2026, 11, 23, 14, 0, 5) + 0.25),
    ],
)
def test_since_is_a_time_ago_a_utc_date_or_a_jid(text: str, moment: float) -> None:
    assert parse_since(text, NOW) == pytest.approx(moment, abs=1e-3)


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2", "h", "-2h", "2w", "2h ago", "2026-02-31", "99999999999999999999", "nan", "infs", "²h"],
)
def test_a_since_that_is_none_is_answered_with_what_is_allowed(text: str) -> None:
    with pytest.raises(EngineError, match=r"must be a time ago \(30m, 2h, 1d\), a UTC date .* or a jid"):
        parse_since(text, NOW)


@given(st.text() | st.from_regex(r"\d{1,400}(\.\d{1,9})?\s*[smhd]", fullmatch=True) | st.datetimes().map(str))
@example("9" * 400 + "s")
@example("999999999999d")
@example("0001-01-01")
@example("0001-01-01T00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
def test_any_since_is_a_moment_that_can_be_told_or_an_answer(text: str) -> None:
    try:
        moment = parse_since(text, NOW)
    except EngineError:
        return
    assert math.isfinite(moment)
    assert json.dumps(Pass("request", moment, NOW).report(), allow_nan=False)


# Arguments


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the engine, which has no dead letters and nothing to retry."""
    requests: list[dict[str, Any]] = []

    def ask(opts: Any, verb: str, *, timeout: float = 0.0, **arguments: Any) -> Any:
        requests.append({"verb": verb, **arguments})
        return {"dead_letters": [], "retry": {"retried": 0}, "delete_dead_letters": {"deleted": 0}}.get(verb, {})

    monkeypatch.setattr(control, "ask", ask)
    return requests


def letters(**given_: Any) -> Any:
    return verbs.dead_letters(OPTS, **{"show": None, "delete": None, "export": None, "limit": 20, **given_})


@pytest.mark.parametrize("timeout", [0, -1, True, "5", None, math.nan, math.inf, 86_401, [5]], ids=repr)
def test_a_timeout_that_is_none_never_reaches_the_engine(asked: list[dict[str, Any]], timeout: Any) -> None:
    with pytest.raises(EngineError, match=r"timeout: .* must be a number of seconds from 0 to 86,400"):
        verbs.flush(OPTS, timeout)
    assert asked == []


@pytest.mark.parametrize("timeout", [0.1, 5, 86_400])
def test_a_timeout_is_asked_for(asked: list[dict[str, Any]], timeout: Any) -> None:
    verbs.flush(OPTS, timeout)
    assert asked == [{"verb": "flush", "seconds": timeout}]


NO_NUMBERS = ["x", "-1", "1.5", 1.5, True, False, "", [], {}, "²", "1 OR 1=1"]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["show", "limit"])
def test_a_number_that_is_none_never_reaches_the_engine(asked: list[dict[str, Any]], name: str, value: Any) -> None:
    with pytest.raises(EngineError, match=f"{name}: .* must be a number"):
        letters(**{name: value})
    assert asked == []


@pytest.mark.parametrize("value", [*NO_NUMBERS, "ALL", "all "], ids=repr)
def test_what_is_deleted_or_retried_is_one_letter_or_all_and_nothing_by_mistake(
    asked: list[dict[str, Any]], value: Any
) -> None:
    with pytest.raises(EngineError, match=r"delete: .* must be the seq of a dead letter, or all"):
        letters(delete=value)
    with pytest.raises(EngineError, match=r"the first argument: .* must be the seq of a dead letter, or all"):
        verbs.retry(OPTS, value, False)
    assert asked == []


@pytest.mark.parametrize("trust", ["True", 1, 0, None, "yes"], ids=repr)
def test_trust_is_never_given_by_mistake(asked: list[dict[str, Any]], trust: Any) -> None:
    with pytest.raises(EngineError, match=r"trust: .* must be True or False"):
        verbs.retry(OPTS, "all", trust)
    assert asked == []


def test_numbers_may_come_as_texts_as_the_command_line_gives_them(asked: list[dict[str, Any]]) -> None:
    letters(limit="5")
    letters(delete="7")
    letters(delete="all")
    verbs.retry(OPTS, "all", True)
    assert asked == [
        {"verb": "dead_letters", "limit": 5, "newest": True, "before": None},
        {"verb": "delete_dead_letters", "seq": 7},
        {"verb": "delete_dead_letters", "seq": None},
        {"verb": "retry", "seq": None, "trust": True},
    ]


@pytest.mark.usefixtures("asked")
def test_a_letter_that_is_not_there_is_said_so() -> None:
    with pytest.raises(EngineError, match="there is no dead letter 7"):
        letters(show=7)
    with pytest.raises(EngineError, match="there is no dead letter 7"):
        verbs.retry(OPTS, 7, False)
    assert verbs.retry(OPTS, "all", False) == {"retried": 0}


def test_a_since_that_is_none_never_reaches_the_engine(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(EngineError, match="since: 'yesterday' must be"):
        verbs.reconcile(OPTS, "yesterday", print)
    assert asked == []


# Export


def test_all_letters_are_exported_page_by_page_into_a_file_for_the_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = [{"seq": seq, "tag": f"salt/job/{seq}/ret/ü", "data": {"return": "\u2028\n"}} for seq in range(1, 106)]
    bodies = [str(letter["tag"]).encode() + b"\n\n" + msgpack.packb(letter["data"]) for letter in stored]

    def ask(opts: Any, verb: str, *, timeout: float, after: int = 0, seq: int = 0, offset: int = 0) -> Any:
        if verb == "dead_letter":
            return base64.b64encode(bodies[seq - 1][offset : offset + 16]).decode()
        last = min(after + 20, len(stored))
        return [{"seq": seq, "bytes": len(bodies[seq - 1])} for seq in range(after + 1, last + 1)]

    monkeypatch.setattr(control, "ask", ask)
    path = tmp_path / "letters.jsonl"
    assert letters(export=str(path)) == {"exported": 105, "path": str(path)}
    assert path.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in path.read_text().removesuffix("\n").split("\n")]
    assert [{key: line[key] for key in line if key != "bytes"} for line in lines] == stored
    with pytest.raises(EngineError, match="cannot be created: File exists"):
        letters(export=str(path))
    with pytest.raises(EngineError, match="cannot be created: No such file"):
        letters(export=str(tmp_path / "none" / "letters"))


def test_a_list_is_put_together_from_pages_newest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(opts: Any, verb: str, *, timeout: float, limit: int, newest: bool, before: int | None) -> Any:
        last = 50 if before is None else before - 1
        return [{"seq": seq} for seq in range(max(1, last - min(limit, 20) + 1), last + 1)]

    monkeypatch.setattr(control, "ask", ask)
    assert [letter["seq"] for letter in letters(limit=45)] == list(range(6, 51))
    assert [letter["seq"] for letter in letters(limit=1000)] == list(range(1, 51))


# Progress


@pytest.mark.parametrize(
    ("running", "line"),
    [
        ({"jobs": 0, "total_jobs": 7}, "[" + " " * 30 + "] 0 of 7 jobs, 0 rows missing"),
        ({"jobs": 500, "total_jobs": 1000, "loads_added": 3, "returns_added": 4},
         "[" + "#" * 15 + " " * 15 + "] 500 of 1,000 jobs, 7 rows missing"),
        ({"jobs": 1200, "total_jobs": 1000}, "[" + "#" * 30 + "] 1,200 of 1,000 jobs, 0 rows missing"),
        ({"error": "the database is away"}, "waiting: the database is away"),
    ],
)  # fmt: skip
def test_progress_is_told_in_one_line(running: dict[str, Any], line: str) -> None:
    state = {"jobs": 0, "total_jobs": 0, "loads_added": 0, "returns_added": 0, "error": "", **running}
    assert verbs._progress_line(state) == line


def test_a_pass_is_asked_for_and_waited_for_with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(
        [
            {"passes": 3, "running": None, "last": None},
            {"passes": 3, "running": Pass("timer", 0.0, NOW, jobs=1, total_jobs=2).report(), "last": None},
            {"passes": 4, "running": None, "last": {"reason": "timer"}},
            {"passes": 4, "running": Pass("request", 0.0, NOW, error="away").report(), "last": {"reason": "timer"}},
            {"passes": 5, "running": None, "last": {"reason": "request, a gap on the bus", "returns_added": 7}},
        ]
    )
    requests: list[Any] = []

    def ask(opts: Any, verb: str, **arguments: Any) -> Any:
        requests.append((verb, arguments.get("since")))
        return {"passes": 3} if verb == "reconcile" else next(states)

    monkeypatch.setattr(control, "ask", ask)
    monkeypatch.setattr(verbs, "_POLL_SECONDS", 0.001)
    shown: list[str] = []
    assert verbs.reconcile(OPTS, None, shown.append)["returns_added"] == 7
    assert requests[0] == ("reconcile", None)
    assert [line.split(":")[0][-20:] for line in shown] == ["jobs, 0 rows missing", "waiting", ""]


def test_a_letter_that_is_deleted_while_it_is_read_is_left_out_and_no_half_of_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b"salt/job/1/ret/web1\n\n" + msgpack.packb({"return": "x" * 100})

    def ask(opts: Any, verb: str, *, timeout: float, after: int = 0, seq: int = 0, offset: int = 0) -> Any:
        if verb == "dead_letter":
            return base64.b64encode(b"" if seq == 2 and offset else body[offset : offset + 16]).decode()
        return [{"seq": number, "bytes": len(body)} for number in ([seq] if seq else range(1, 4)) if number > after]

    monkeypatch.setattr(control, "ask", ask)
    path = tmp_path / "letters.jsonl"
    assert letters(export=str(path))["exported"] == 2
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [1, 3]
    with pytest.raises(EngineError, match="there is no dead letter 2 any more"):
        letters(show=2)
