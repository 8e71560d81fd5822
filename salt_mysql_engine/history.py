"""The jobs for people: which ran, who answered, what failed, and what ran on one minion.

Lists are plain data, newest first, at most ``limit`` long; they are what MySQL holds. One job is what MySQL and the
journal hold together. Everything that an operator gives is checked here, and is data to the database.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import jobload, jsontext, moments, records, search
from .errors import DatabaseError, EngineError
from .pending import Pending, PendingJob
from .reader import OF_MASTER, Reader, load_as_cached, parsed

MOST_ROWS = 1000
MOST_MINIONS = 100
"""So many names each list of a job's minions has at most."""
_REASON_CHARACTERS = 160
_VALUE_BYTES = 256 * 1024
"""A larger value is not fetched to say in a line why it failed."""
_ARGUMENT_CHARACTERS = 2000
_SAID_CHARACTERS = 60
_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)
_RETCODE = "JSON_UNQUOTE(JSON_EXTRACT(IF(JSON_VALID(`full_ret`), `full_ret`, '{}'), '$.retcode'))"
_VALUE = f"IF(LENGTH(`return`) <= {_VALUE_BYTES}, `return`, CONCAT('\"a value of ', LENGTH(`return`), ' bytes\"'))"

Table = dict[str, dict[str, Any]]


def jobs(
    opts: Mapping[str, Any],
    *,
    since: Any = None,
    until: Any = None,
    fun: Any = None,
    user: Any = None,
    target: Any = None,
    minion: Any = None,
    failed: Any = False,
    limit: Any = 50,
    after: Any = None,
) -> Table:
    """The newest jobs that all given filters leave, by jid; ``after`` a jid: those older than it.

    ``fun``, ``user``, ``target`` and ``minion`` (one that answered) are names or globs.

    Raises:
        EngineError: an argument cannot be used, or the database does not answer.
    """
    if not isinstance(failed, bool):
        raise EngineError(f"failed: {_said(failed)} must be True or False")
    before = [_jid("after", after)] if after is not None else []
    if until is not None:
        before.append(moments.jid_at(_moment("until", until) + 1e-6))  # the moment itself is in it
    wanted = search.Wanted(
        limit=_limit(limit),
        fun=_glob("fun", fun),
        user=_glob("user", user),
        tgt=_glob("target", target),
        minion=_glob("minion", minion),
        failed=failed,
        since="" if since is None else moments.jid_at(_moment("since", since)),
    )
    if before:
        wanted = wanted._replace(before=min(before))
    reader = Reader(opts)
    jids = search.newest(reader, wanted)
    if not jids:
        return {}
    loads = {
        jid: parsed(load) for jid, load in reader.query("SELECT `jid`, `load` FROM `jids` WHERE `jid` IN %s", jids)
    }
    counts = search.counts(reader, jids)
    return {jid: _line(jid, loads.get(jid, {}), *counts.get(jid, (0, 0))) for jid in jids}


def _line(jid: str, load: dict[str, Any], answered: int, failed: int) -> dict[str, Any]:
    fun, user, target = jobload.job_columns(load)
    targeted = len(_minions(load_as_cached(load))) or None
    return {
        "started": _started(jid),
        "fun": fun,
        "target": target,
        "user": user,
        "targeted": targeted,
        "answered": answered,
        "failed": failed,
        "missing": None if targeted is None else max(0, targeted - answered),
    }


class _Stored(NamedTuple):
    """What MySQL holds of a job."""

    load: dict[str, Any]
    answers: dict[str, _Answer]
    failures: Table
    """Of the first minions that failed: ``retcode`` and ``reason``."""
    retcodes: Counter[str]
    """Of all that failed."""


class _Answer(NamedTuple):
    failed: bool
    at: datetime.datetime | None


def job(opts: Mapping[str, Any], jid: Any) -> dict[str, Any]:
    """One job: what it was, who answered, failed and is missing, and how long that took.

    With MySQL away: what the journal holds of it, and the ``error``.

    Raises:
        EngineError: there is no such job, it is no jid, or the database does not answer.
    """
    jid = _jid("the job", jid)
    pending = Pending(opts).job(jid)
    try:
        found = _job(jid, pending, _stored(Reader(opts), jid))
    except DatabaseError as exc:
        found = _job(jid, pending, _Stored({}, {}, {}, Counter()))
        if found:
            return {**found, "error": f"this is what the journal holds; the database does not answer: {exc}"}
        raise
    if not found:
        raise EngineError(f"there is no job {jid}")
    return found


def _stored(reader: Reader, jid: str) -> _Stored:
    columns = reader.columns("salt_returns")
    at = "`alter_time`" if "alter_time" in columns else "NULL"
    failed_column = search.failed_column("", "failed" in columns)
    answers: dict[str, _Answer] = {}
    rows = reader.query(f"SELECT `id`, {failed_column}, {at} FROM `salt_returns` WHERE `jid` = %s", jid)
    for minion, failed, moment in rows:
        answers.setdefault(minion, _Answer(bool(failed), moment))
    bad = sorted(minion for minion, answer in answers.items() if answer.failed)[:MOST_MINIONS]
    failures: Table = {}
    retcodes: Counter[str] = Counter()
    if bad:
        for minion, retcode, value in reader.query(
            f"SELECT `id`, {_RETCODE}, {_VALUE} FROM `salt_returns` WHERE `jid` = %s AND `id` IN %s", jid, bad
        ):
            failures.setdefault(minion, {"retcode": _number(retcode), "reason": reason(_value(value))})
        for retcode, count in reader.query(
            f"SELECT {_RETCODE} AS `retcode`, COUNT(*) FROM `salt_returns` WHERE `jid` = %s AND {failed_column} "
            "GROUP BY `retcode`",
            jid,
        ):
            retcodes[str(_number(retcode))] += count
    return _Stored(reader.load(jid), answers, failures, retcodes)


def _job(jid: str, pending: PendingJob, stored: _Stored) -> dict[str, Any]:
    """The report; ``{}`` for a job of which there is nothing."""
    answers, failures, retcodes = dict(stored.answers), dict(stored.failures), stored.retcodes.copy()
    for minion, ret in pending.returns.items():
        if minion in answers:
            continue
        answers[minion] = _Answer(ret.failed, datetime.datetime.fromisoformat(ret.altered))
        if ret.failed:
            full_ret = parsed(ret.full_ret_json)
            failures[minion] = {"retcode": full_ret.get("retcode"), "reason": reason(full_ret.get("return"))}
            retcodes[str(full_ret.get("retcode"))] += 1
    load = pending.load_over(stored.load)
    if not load and not answers:
        return {}
    fun, user, target = jobload.job_columns(load)
    minions = _minions(load_as_cached(load))
    missing = sorted(set(minions) - answers.keys())
    bad = sorted(minion for minion, answer in answers.items() if answer.failed)
    return {
        "jid": jid,
        "started": _started(jid),
        "fun": fun,
        "arguments": _short(load.get("arg", [])),
        "target": target,
        "target_type": load.get("tgt_type"),
        "user": user,
        "targeted": len(minions) or None,
        "answered": len(answers),
        "failed": len(bad),
        "missing": len(missing) if minions else None,
        "not_in_mysql_yet": len(answers) - len(stored.answers),
        **_durations(jid, [answer.at for answer in answers.values()]),
        "retcodes_of_failed": dict(retcodes),
        "failed_minions": {minion: failures.get(minion, {}) for minion in bad[:MOST_MINIONS]},
        "missing_minions": missing[:MOST_MINIONS],
        "answered_minions": sorted(answers)[:MOST_MINIONS],
    }


def minion(opts: Mapping[str, Any], minion_id: Any, *, limit: Any = 20) -> Table:
    """The newest jobs that a minion answered, by jid.

    Raises:
        EngineError: an argument cannot be used, or the database does not answer.
    """
    name, most = _name("the minion", minion_id), _limit(limit)
    reader = Reader(opts)
    failed_column = search.failed_column("", "failed" in reader.columns("salt_returns"))
    rows = reader.query(
        f"SELECT `jid`, `fun`, {failed_column}, {_RETCODE} FROM `salt_returns` WHERE `id` = %s AND `jid` < %s "
        "ORDER BY `jid` DESC LIMIT %s",
        name,
        search.LAST_JID,
        most,
    )
    found: Table = {}
    for jid, fun, failed, retcode in rows:
        line = {"started": _started(jid), "fun": fun, "success": not failed, "retcode": _number(retcode)}
        found.setdefault(jid, line)
    return found


def failures(opts: Mapping[str, Any], *, since: Any = "24h", limit: Any = 50) -> dict[str, Table]:
    """The newest returns that failed, by jid and minion, of jobs that began ``since`` then.

    Raises:
        EngineError: an argument cannot be used, or the database does not answer.
    """
    first, most = moments.jid_at(_moment("since", since)), _limit(limit)
    reader = Reader(opts)
    ranges = search.failed_ranges("failed" in reader.columns("salt_returns"))
    newest = " ORDER BY `jid` DESC, `id` DESC LIMIT %s"
    statement = " UNION ALL ".join(
        f"(SELECT `jid`, `id`, `fun`, {_RETCODE} AS `retcode`, {_VALUE} AS `value` FROM `salt_returns` "
        f"WHERE {each} AND `jid` >= %s AND `jid` < %s{newest})"
        for each in ranges
    )
    values = [first, search.LAST_JID, most] * len(ranges)
    if len(ranges) > 1:
        statement, values = statement + newest, [*values, most]
    rows = reader.query(statement, *values)
    found: dict[str, Table] = {}
    for jid, minion_id, fun, retcode, value in rows:
        found.setdefault(jid, {})[minion_id] = {
            "started": _started(jid),
            "fun": fun,
            "retcode": _number(retcode),
            "reason": reason(_value(value)),
        }
    return found


def reason(value: Any) -> str:
    """A line that says why a return failed: the states that did, the last line of a traceback, else the first line."""
    if isinstance(value, dict) and "return" in value and str(value.get("fun")).startswith(OF_MASTER):
        return reason(value["return"])  # a runner's or wheel's row holds its whole event
    if isinstance(value, dict) and "outputter" in value and "data" in value:  # an orchestration: states by master
        shown = value["data"]
        return reason(next(iter(shown.values())) if isinstance(shown, dict) and len(shown) == 1 else shown)
    if isinstance(value, dict) and value:
        states = [(name, its) for name, its in value.items() if isinstance(its, dict) and "result" in its]
        bad = [(name, its) for name, its in states if its["result"] is False]
        if bad:
            name, state = bad[0]
            what = str(state.get("__id__") or name)
            return _line_of(f"{len(bad)} of {len(states)} states failed: {what}: {state.get('comment', '')}")
        parts = [f"{name}: {reason(its)}" for name, its in value.items() if isinstance(its, str)]
        return _line_of("; ".join(parts) or jsontext.dumps(value))
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return _line_of("; ".join(value))
    return _line_of(value if isinstance(value, str) else jsontext.dumps(value))


def _line_of(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    is_traceback = any("Traceback (most recent call last)" in line for line in lines)
    line = " ".join(("".join(c if c.isprintable() else " " for c in lines[-1 if is_traceback else 0])).split())
    return line if len(line) <= _REASON_CHARACTERS else line[: _REASON_CHARACTERS - 3] + "..."


def _after(start: datetime.datetime, at: datetime.datetime) -> float:
    """Seconds; tables of an older shape keep whole ones, so that an answer can seem to come before its job."""
    return max(0.0, (at.replace(tzinfo=datetime.timezone.utc) - start).total_seconds())


def _durations(jid: str, answers: Sequence[datetime.datetime | None]) -> dict[str, float | None]:
    """Seconds from a job's start to its first and to its last answer."""
    start = moments.of_jid(jid)
    seconds = [_after(start, at) for at in answers if at and start]
    return {
        "first_answer_after_seconds": round(min(seconds), 3) if seconds else None,
        "last_answer_after_seconds": round(max(seconds), 3) if seconds else None,
    }


def _started(jid: str) -> str | None:
    start = moments.of_jid(jid)
    return start.isoformat(timespec="seconds") if start else None


def _minions(load: Mapping[str, Any]) -> list[str]:
    minions = load.get("Minions")
    return [name for name in minions if isinstance(name, str)] if isinstance(minions, list) else []


def _short(value: Any) -> Any:
    text = jsontext.dumps(value)
    return value if len(text) <= _ARGUMENT_CHARACTERS else text[:_ARGUMENT_CHARACTERS] + "..."


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of another writer
        return text


def _number(retcode: str | None) -> Any:
    """A retcode as it was: of several functions it is not one number."""
    return int(retcode) if retcode is not None and _INTEGER.fullmatch(retcode) else retcode


def _jid(name: str, value: Any) -> str:
    jid = str(value)
    if not moments.is_jid(jid):
        raise EngineError(f"{name}: {_said(value)} must be a jid: 20 digits, as in 20261123140005250000")
    return jid


def _limit(value: Any) -> int:
    if isinstance(value, bool) or not _INTEGER.fullmatch(str(value)) or not 1 <= int(value) <= MOST_ROWS:
        raise EngineError(f"limit: {_said(value)} must be a whole number from 1 to {MOST_ROWS:,}")
    return int(value)


def _moment(name: str, value: Any) -> float:
    return moments.parse(str(value)[:_SAID_CHARACTERS], time.time(), name=name)


def _glob(name: str, value: Any) -> str | None:
    return None if value is None else _name(name, value)


def _name(name: str, value: Any) -> str:
    text = str(value) if isinstance(value, (str, int, float)) else ""
    if not 0 < len(text) <= records.MAX_NAME_CHARACTERS:
        raise EngineError(f"{name}: {_said(value)} must be a text of 1 to {records.MAX_NAME_CHARACTERS} characters")
    return text


def _said(value: Any) -> str:
    """What was given, as a message can hold it."""
    return repr(str(value)[:_SAID_CHARACTERS])
