"""From an event to rows: validation, normalising, JSON. Pure functions: no I/O, no clock.

A row is made only when tag and payload agree on jid and id and every type is right. What a minion sent
with ``event.send`` carries ``cmd: _minion_event`` and is never a return.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from . import jobload, jsontext, moments
from .saltevent import LEFT_OUT, MASTER_RETURNS, Ignored, Kind, Opened, Tag, fun_text, is_function
from .settings import Settings

_JOB_RETURN = Kind.JOB_RETURN  # looked up once: nearly every event is one

MAX_NAME_CHARACTERS = 255
"""Width of ``salt_returns.id`` and ``salt_events.tag``. A minion's id is a file's name on the master, and no longer."""
_WORTH_SPLICING = 512
"""Characters of JSON from which on splicing is quicker than serialising once more."""


class Load(NamedTuple):
    """A row of ``jids`` before it meets the one that may stand there."""

    jid: str
    load: dict[str, Any]


class Return(NamedTuple):
    """A row of ``salt_returns``; ``altered`` is UTC, ``YYYY-MM-DD HH:MM:SS.ffffff``.

    ``data`` is what :func:`synthesised_load` makes a ``jids`` row of, when no better one is known.
    ``trimmed``: Salt replaced some of the value, and ``full_ret`` says so. ``failed`` is for our own verbs: ``success``
    is false, or ``retcode`` is not 0.
    """

    jid: str
    id: str
    fun: str
    return_json: str
    full_ret_json: str
    success: bool
    altered: str
    data: dict[str, Any]
    trimmed: bool = False
    failed: bool = False


class Event(NamedTuple):
    """A row of ``salt_events``. ``key``: by what it is known when it comes again, where it brings that along."""

    tag: str
    data_json: str
    altered: str
    key: bytes = b""


class Record(NamedTuple):
    """The rows of one event: any of them may be missing, not all."""

    load: Load | None = None
    ret: Return | None = None
    event: Event | None = None


class Selection:
    """What the settings ask for, ready for use on every event.

    ``peers`` are the ids of the master's cluster peers, ``None`` without a cluster: then a
    ``__peer_id`` in a payload means nothing, since any minion can write it.
    """

    def __init__(self, settings: Settings, *, master_id: str, peers: Iterable[str] | None = None) -> None:
        self.master_id = master_id
        self.peers = None if peers is None else frozenset(peers)
        self._runner_jobs = settings.runner_jobs
        self._wheel_jobs = settings.wheel_jobs
        skip = _any_glob(settings.skip_functions)
        # Remembered: a fleet runs few functions, and this is asked for every event.
        self._skips = functools.lru_cache(maxsize=256)(lambda fun: skip is not None and skip.match(fun) is not None)
        valueless = _any_glob(settings.skip_values)
        self._leaves_out = functools.lru_cache(maxsize=256)(
            lambda fun: valueless is not None and valueless.match(fun) is not None
        )
        self._events = _any_glob(settings.events)

    def is_of_peer(self, data: Mapping[str, Any]) -> bool:
        """Whether the event belongs to another master of the cluster."""
        peer = data.get("__peer_id")
        return self.peers is not None and isinstance(peer, str) and peer in self.peers

    @property
    def wants_events(self) -> bool:
        """Whether ``salt_events`` gets any."""
        return self._events is not None

    def wants_event(self, tag: str) -> bool:
        """Whether ``salt_events`` gets this event."""
        return self._events is not None and self._events.match(tag) is not None

    def wants_job(self, tag: Tag) -> bool:
        """Whether the job tables get this event."""
        kind = tag.kind
        if kind in (_JOB_RETURN, Kind.JOB_NEW, Kind.MINIONS):
            return True
        return self._runner_jobs if kind in (Kind.RUNNER_NEW, Kind.RUNNER_RETURN) else self._wheel_jobs

    def skips(self, fun: str | list[str]) -> bool:
        """Whether a job of this function (of all of these) is not stored."""
        if isinstance(fun, str):
            return self._skips(fun)
        return bool(fun) and all(self._skips(name) for name in fun)

    def leaves_out(self, fun: Any) -> bool:
        """Whether what this function (one of these) returns is not stored."""
        if isinstance(fun, str):
            return self._leaves_out(fun)
        return is_function(fun) and any(self._leaves_out(name) for name in fun)


def interpret(event: Opened, captured_at: float, selection: Selection) -> Record | Ignored:
    """The rows that an event becomes, or why it becomes none.

    ``captured_at`` (seconds since the epoch) is the row's time when the event has no ``_stamp``.
    """
    tag, job_tag, data, trimmed, chosen, key = event
    if selection.is_of_peer(data):
        return Ignored.PEER
    if "return" in data and selection.leaves_out(data.get("fun")):
        outcome = _outcome(data)
        told = {key: outcome[key] for key in ("success", "retcode") if key in outcome}
        data, trimmed = {**data, **told, "return": LEFT_OUT}, False
    chosen = chosen or selection.wants_event(tag)
    altered = moments.altered_at(data.get("_stamp"), captured_at)
    # A long tag is cut, as a long function is: the row of an event must not take the job's along.
    stored = Event(tag[:MAX_NAME_CHARACTERS], jsontext.dumps(data), altered, key) if chosen else None
    job = _job_rows(job_tag, data, altered, selection, trimmed)
    if isinstance(job, Record):
        return job if stored is None else job._replace(event=stored)
    return job if stored is None else Record(event=stored)


def refusal(tag: Tag | None, data: Mapping[str, Any], selection: Selection) -> Ignored | None:
    """Why an event is no row of a job; ``None`` when :func:`interpret` makes it one."""
    if tag is None or not selection.wants_job(tag):
        return Ignored.SWITCHED_OFF
    if data.get("cmd") == "_minion_event":
        return Ignored.MINION_EVENT
    if tag.jid == "nocache":
        return Ignored.NOCACHE
    if not moments.is_jid(tag.jid):
        return Ignored.BAD_JID
    if data.get("jid") != tag.jid:
        return Ignored.TAG_MISMATCH
    if not is_function(data.get("fun", "")):
        return Ignored.WRONG_TYPE
    if selection.skips(data.get("fun", "")):
        return Ignored.SKIPPED_FUNCTION
    if tag.kind is _JOB_RETURN:
        if data.get("id") != tag.minion or not tag.minion:
            return Ignored.TAG_MISMATCH
        if len(tag.minion) > MAX_NAME_CHARACTERS:
            return Ignored.TOO_LONG
        return None if "return" in data else Ignored.MISSING_KEY
    if not data.keys() >= _NEEDED[tag.kind]:
        return Ignored.MISSING_KEY
    if tag.kind is Kind.JOB_NEW and jobload.published_load(data) is None:
        return Ignored.WRONG_TYPE
    if tag.kind in _PREFIXES and not str(data.get("fun", "")).startswith(_PREFIXES[tag.kind]):
        # `salt-run` says so of a function that is not there, or does not take the keywords (Runner.run, salt/runner.py
        # 3006-3008), and nothing of it goes into the job cache.
        return Ignored.NEVER_RAN
    return None


_PREFIXES = {
    Kind.RUNNER_NEW: "runner.",
    Kind.RUNNER_RETURN: "runner.",
    Kind.WHEEL_NEW: "wheel.",
    Kind.WHEEL_RETURN: "wheel.",
}
"""So begins ``fun`` of what the master ran (``SyncClientMixin.low``, salt/client/mixins.py 3006-3008)."""
_NEEDED = {
    Kind.JOB_NEW: {"tgt", "fun", "arg", "minions"},
    Kind.RUNNER_NEW: {"fun"},
    Kind.RUNNER_RETURN: {"fun", "return"},
    Kind.WHEEL_NEW: {"fun"},
    Kind.WHEEL_RETURN: {"fun", "return"},
    Kind.MINIONS: set[str](),
}


def _job_rows(
    tag: Tag | None, data: dict[str, Any], altered: str, selection: Selection, trimmed: bool
) -> Record | Ignored:
    refused = refusal(tag, data, selection)
    if refused is not None or tag is None:
        return refused or Ignored.SWITCHED_OFF
    if tag.kind is _JOB_RETURN:
        return _minion_return(tag, data, altered, trimmed)
    if tag.kind in MASTER_RETURNS:
        return _master_return(tag, data, altered, selection.master_id)
    if tag.kind is Kind.JOB_NEW:
        load = jobload.published_load(data)
        assert load is not None
    elif tag.kind is Kind.MINIONS:
        load = {"jid": tag.jid, "Minions": data.get("minions")}
    else:
        load = _master_job(tag, data, selection.master_id)
    return Record(load=Load(tag.jid, load))


def _minion_return(tag: Tag, data: dict[str, Any], altered: str, trimmed: bool) -> Record:
    outcome = _outcome(data)
    success = _success(outcome)
    retcode = outcome.get("retcode", 0 if success else 1)
    return_json = jsontext.dumps(data["return"])
    full_ret = dict(data)  # what is added goes last, after what saltext.mysql would store
    for key, value in (("fun_args", []), ("success", success), ("retcode", retcode)):
        full_ret.setdefault(key, value)
    if "trimmed" in data:  # a minion's own word must not look like ours, which stands last
        full_ret["retcode"] = full_ret.pop("retcode")
    if trimmed:
        full_ret.pop("trimmed", None)
        full_ret["trimmed"] = True
    return Record(
        ret=Return(
            tag.jid,
            tag.minion,
            fun_text(data.get("fun", "")),
            return_json,
            _dumps_around("return", return_json, full_ret),
            success,
            altered,
            data,
            trimmed,
            not success or is_bad(retcode),
        )
    )


def _master_job(tag: Tag, data: Mapping[str, Any], master_id: str) -> dict[str, Any]:
    return {
        "jid": tag.jid,
        "id": master_id,
        "tgt": master_id,
        "tgt_type": "glob",
        "fun": data["fun"],
        "arg": data.get("fun_args", []),
        "user": data.get("user", ""),
    }


def _master_return(tag: Tag, data: dict[str, Any], altered: str, master_id: str) -> Record:
    """A runner's or wheel's return: ``return`` is the whole of ``data``, as the master's cache has it."""
    success = _success(data)
    retcode = data.get("retcode", 0 if success else 1)
    return_json = jsontext.dumps(data)
    full_ret = {
        "id": master_id,
        "tgt": master_id,
        "jid": tag.jid,
        "return": data,
        "fun": data["fun"],
        "user": data.get("user", ""),
        "fun_args": data.get("fun_args", []),
        "success": success,
        "retcode": retcode,
    }
    return Record(
        ret=Return(
            tag.jid,
            master_id,
            fun_text(data["fun"]),
            return_json,
            _dumps_around("return", return_json, full_ret),
            success,
            altered,
            _master_job(tag, data, master_id),
            failed=not success or is_bad(retcode),
        )
    )


def synthesised_load(ret: Return) -> dict[str, Any]:
    """The ``jids`` row of a job whose ``/new`` was never seen: salt-call, schedules, salt-ssh, syndics.

    Everything that the return says but its value, and a target, as the master itself would add for a
    jid of ``req`` (salt/utils/job.py 3008.3).
    """
    return jobload.load_of_return(ret.id, ret.data)


def _outcome(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What tells of a return whether it is a success: itself, or its value, where salt-ssh stored it (``cache_job``,
    salt/client/ssh/__init__.py 3006-3008)."""
    value = data.get("return")
    if "success" in data or "retcode" in data or not isinstance(value, dict) or type(value.get("retcode")) is not int:
        return data
    return value


def _success(data: Mapping[str, Any]) -> bool:
    """``success`` as given; where it is missing (salt-call), what ``retcode`` says.

    Multi-function jobs give a dict by function or a list for either.
    """
    success = data.get("success")
    if success is True or success is False:
        return success
    for key, is_good in (("success", bool), ("retcode", _is_zero)):
        value = data.get(key)
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list) and value:
            return all(is_good(item) for item in value)
        if isinstance(value, (bool, int)):
            return is_good(value)
    return True


def is_bad(retcode: Any) -> bool:
    """Whether a retcode (of several functions a dict or list of them) is not 0; ``sql.failed`` is the same in SQL."""
    if type(retcode) is int:
        return retcode != 0
    if isinstance(retcode, dict) and retcode:
        retcode = list(retcode.values())
    text = retcode if isinstance(retcode, str) else jsontext.dumps(retcode)
    for nothing in NO_FAULT:
        text = text.replace(nothing, "")
    return text != ""


NO_FAULT = ("null", "false", "0", ".", ",", " ", "[", "]", "{", "}")
"""What the JSON of a retcode may consist of that tells of no fault."""


def _is_zero(retcode: Any) -> bool:
    return bool(retcode == 0)


def _dumps_around(key: str, value_json: str, data: dict[str, Any]) -> str:
    """The JSON of ``data`` whose ``key`` is already JSON: a highstate is then serialised once, not twice."""
    if len(value_json) < _WORTH_SPLICING and value_json.count("{") + value_json.count("[") < jsontext.MAX_DEPTH:
        return jsontext.dumps(data)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    part = before
    for name, value in data.items():
        if name == key:
            part = after
        else:
            part[name] = value
    start = jsontext.dumps(before)[:-1] + ", " if before else "{"
    end = ", " + jsontext.dumps(after)[1:] if after else "}"
    return f'{start}"{key}": {value_json}{end}'


def _any_glob(globs: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs)) if globs else None
