"""From an event's bytes to rows: validation, normalising, JSON. Pure functions: no I/O, no clock.

An event is ``tag + b"\\n\\n" + msgpack(data)`` (``SaltEvent.pack``, salt/utils/event.py 3006-3008). Both
parts come from strangers: any accepted minion can put any tag and payload on the master's bus, so a
row is made only when tag and payload agree on jid and id and every type is right. What a minion sent
with ``event.send`` carries ``cmd: _minion_event`` and is never a return.
"""

from __future__ import annotations

import base64
import datetime
import enum
import fnmatch
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import msgpack

from . import jsontext
from .settings import Settings

SEPARATOR = b"\n\n"
"""Between tag and payload (``TAGEND``, salt/utils/event.py)."""

PRIVATE = "mysql_jobcache/"
"""Tags that begin so are our own, and stand for what no event of Salt's says. Capture leaves such events of the bus."""
_MINIONS_TAG, _CHOSEN_TAG = f"{PRIVATE}minions/", f"{PRIVATE}event/"

MAX_TAG_BYTES = 1024
MAX_NAME_CHARACTERS = 255
"""Width of ``salt_returns.id`` and ``salt_events.tag``. A minion's id is a file's name on the master, and no longer."""
MAX_FUN_CHARACTERS = 255
"""Width of ``salt_returns.fun``; a longer list of functions is cut, and is whole in ``full_ret``."""

PLAIN_RETURN = re.compile(rb"salt/job/(\d{20})/ret/([A-Za-z0-9._-]{1,255})\n\n")
"""The beginning of nearly every event: the jid and minion of a job's return, where they are of the ordinary kind."""

TRIMMED = "VALUE_TRIMMED"
"""What Salt puts in a value's place (salt/utils/dicttrim.py)."""
_TRIMMED_BYTES = TRIMMED.encode()
LEFT_OUT = "VALUE_LEFT_OUT by skip_values"
"""What a row has in the place of a value that is not stored."""

_JID = re.compile(r"\d{20}(_\d{1,10})?", re.ASCII)
"""salt/utils/jid.py 3008.3: 20 digits of UTC, and ``_`` + pid with ``unique_jid``."""

_STAMP = re.compile(r"(20[0-3]\d-\d\d-\d\d)T((?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)(?:\.(\d{1,6}))?(?:\+00:00)?", re.ASCII)
_TIMESTAMPS = 86_400.0, 2_145_916_799.0
"""What MySQL's TIMESTAMP has: not the first hours of 1970, and nothing from 2038 on, where a clock may be."""
_WORTH_SPLICING = 512
"""Characters of JSON from which on splicing is quicker than serialising once more."""
_EXT_DATETIME, _EXT_CONSTANT = 78, 79  # salt/payload.py 3008.3


class Ignored(str, enum.Enum):
    """Why a captured event is no row."""

    UNDECODABLE = "undecodable"
    MINION_EVENT = "minion_event"
    TAG_MISMATCH = "tag_mismatch"
    BAD_JID = "bad_jid"
    NOCACHE = "nocache"
    MISSING_KEY = "missing_key"
    WRONG_TYPE = "wrong_type"
    SKIPPED_FUNCTION = "skipped_function"
    PEER = "peer"
    SWITCHED_OFF = "switched_off"
    TOO_LONG = "too_long"
    NEVER_RAN = "never_ran"
    FORGOTTEN = "forgotten"
    UNCONFIRMED_START = "unconfirmed_start"


class Kind(enum.Enum):
    """What a tag says that the event is."""

    JOB_NEW = "job new"
    JOB_RETURN = "job return"
    RUNNER_NEW = "runner new"
    RUNNER_RETURN = "runner return"
    WHEEL_NEW = "wheel new"
    WHEEL_RETURN = "wheel return"
    MINIONS = "minions"
    """Whom a syndic's part of a job is for (``save_minions``)."""


MASTER_RETURNS = frozenset({Kind.RUNNER_RETURN, Kind.WHEEL_RETURN})
"""Returns whose minion is the master itself."""

# Nearly every event is one, and looking up an Enum's member costs as much as parsing the tag.
_JOB_RETURN = Kind.JOB_RETURN


class Tag(NamedTuple):
    """A tag that names a job: its kind, jid and minion id (``""`` but for a job's return)."""

    kind: Kind
    jid: str
    minion: str


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
    """A row of ``salt_events``."""

    tag: str
    data_json: str
    altered: str


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


_SECRETS = ("token", "password", "key", "auth_list")
"""What eauth may leave in a load or its ``kwargs`` (``publish``, salt/master.py: only ``auth_list`` is taken out)."""


def without_secrets(load: Mapping[str, Any]) -> dict[str, Any]:
    """A load without what authenticated it."""
    clean = {key: value for key, value in load.items() if key not in _SECRETS}
    if isinstance(clean.get("kwargs"), dict):
        clean["kwargs"] = {key: value for key, value in clean["kwargs"].items() if key not in _SECRETS}
    return clean


def parse_tag(tag: str) -> Tag | None:
    """What a tag says; ``None`` for one that no job table is interested in.

    ``salt/job/<jid>/new``, ``salt/job/<jid>/ret/<id>``, ``salt/run/<jid>/new|ret``,
    ``salt/wheel/<jid>/new|ret``.
    """
    parts = tag.split("/")
    if parts[0] != "salt" or not 4 <= len(parts) <= 5:
        return None
    if len(parts) == 5:
        if parts[1] == "job" and parts[3] == "ret":
            return Tag(_JOB_RETURN, parts[2], parts[4])
        return None
    kind = _FOUR_PARTS.get((parts[1], parts[3]))
    return None if kind is None else Tag(kind, parts[2], "")


_FOUR_PARTS = {
    ("job", "new"): Kind.JOB_NEW,
    ("run", "new"): Kind.RUNNER_NEW,
    ("run", "ret"): Kind.RUNNER_RETURN,
    ("wheel", "new"): Kind.WHEEL_NEW,
    ("wheel", "ret"): Kind.WHEEL_RETURN,
}


class Opened(NamedTuple):
    """An event's parts: its tag, what that says (``None``: no job of anybody's), its payload.

    ``trimmed``: the payload has a value that Salt replaced, being larger than ``max_event_size``. ``chosen``: it is
    for ``salt_events`` whatever the settings say, and for nothing else.
    """

    tag: str
    job: Tag | None
    data: dict[str, Any]
    trimmed: bool
    chosen: bool = False


def open_event(body: bytes) -> Opened | Ignored:
    """Takes an event's bytes apart."""
    raw_tag, _, payload = body.partition(SEPARATOR)
    try:
        tag = raw_tag.decode()
        data = unpack(payload)
    except (ValueError, TypeError, LookupError, RecursionError):  # msgpack's own are ValueErrors
        return Ignored.UNDECODABLE
    if not isinstance(data, dict):
        return Ignored.UNDECODABLE
    if tag.startswith(PRIVATE):
        if tag.startswith(_CHOSEN_TAG):
            return Opened(tag[len(_CHOSEN_TAG) :], None, data, trimmed=False, chosen=True)
        return Opened(tag, Tag(Kind.MINIONS, tag[len(_MINIONS_TAG) :], ""), data, trimmed=False)
    job = parse_tag(tag)
    # Of a publish it is the list of minions, where they are a hundred thousand.
    value = data if job is not None and job.kind is Kind.JOB_NEW else data.get("return")
    return Opened(tag, job, data, _TRIMMED_BYTES in payload and is_trimmed(value))


def opened(tag: str, data: dict[str, Any]) -> Opened:
    """An event that was made here, of a value that nobody trimmed."""
    return Opened(tag, parse_tag(tag), data, trimmed=False)


def try_pack(tag: str, data: Mapping[str, Any]) -> bytes | None:
    """The bytes of an event, as :func:`open_event` takes them apart; ``None``: nested deeper than msgpack packs."""
    try:
        payload = msgpack.packb(data, use_bin_type=True, unicode_errors="surrogateescape", default=_pack_default)
        return tag.encode() + SEPARATOR + bytes(payload)
    except (ValueError, TypeError, OverflowError):  # or a name that is not UTF-8
        return None


def is_publish(load: Mapping[str, Any]) -> bool:
    """Whether a load that the master stored is a publish's, and not made of a return."""
    return load.keys() >= {"tgt", "fun"} and "return" not in load


def publish_data(jid: str, load: Mapping[str, Any], own: list[str], minions: list[str] | None = None) -> dict[str, Any]:
    """The payload of a job's publish, from the load that the master stored of it and whom it was for.

    The parts of a batch job (3008) share a jid; the stored load is one part's, and a list target names its minions.
    ``minions`` are those of syndics, too, which any minion can say that it is: in the target is whom the master itself
    (``own``) sent the job to.
    """
    tgt = load["tgt"]
    missing: list[str] = []
    if load.get("tgt_type") == "list":
        aimed_at = tgt.split(",") if isinstance(tgt, str) else tgt if _is_texts(tgt) else []
        there = frozenset(own)
        missing = [name for name in aimed_at if name not in there]
        if _is_texts(tgt):
            named = frozenset(tgt)
            tgt = tgt + [name for name in own if name not in named]
    return {
        "jid": jid,
        "tgt_type": load.get("tgt_type", "glob"),
        "tgt": tgt,
        "user": load.get("user", ""),
        "fun": load["fun"],
        "arg": load.get("arg", []),
        "minions": own if minions is None else minions,
        "missing": missing,
        **{key: load[key] for key in ("kwargs", "ret") if key in load},
    }


def publish_event(jid: str, load: Mapping[str, Any], minions: list[str]) -> bytes | None:
    """The event of a job's publish, from the load that the master stores of it; ``None`` where that is no publish's."""
    if not is_publish(load):
        return None
    return try_pack(f"salt/job/{jid}/new", publish_data(jid, without_secrets(load), minions))


def return_data(jid: str, minion: str, cached: Mapping[str, Any], load: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a minion's return, in the order of Salt's own (``_return_pub``, salt/minion.py 3006-3008).

    Args:
        cached: ``return`` and, where the minion said them, ``retcode``, ``success`` and ``out``.
        load: the job's, as the master stored it. That of a salt-call or a schedule is the return itself.
    """
    if "return" in load and load.get("id") == minion:
        return {**load, **cached, "jid": jid}
    data: dict[str, Any] = {
        "cmd": "_return",
        "id": minion,
        **{key: cached[key] for key in ("success", "return", "retcode") if key in cached},
        "jid": jid,
        "fun": load.get("fun", ""),
        "fun_args": load.get("arg", load.get("fun_args", [])),
        **{key: load[key] for key in ("user",) if key in load},
    }
    kwargs = load.get("kwargs")
    if isinstance(kwargs, dict) and "metadata" in kwargs:
        data["metadata"] = kwargs["metadata"]
    if "out" in cached:
        data["out"] = cached["out"]
    return data


def stub(jid: str, minion: str, stored_at: float) -> bytes:
    """The event of what the job cache holds of a minion's return, or (``""``) of a job's publish: who, and when."""
    tag = f"salt/job/{jid}/ret/{minion}" if minion else f"salt/job/{jid}/new"
    data = {"jid": jid, "_stamp": utc(stored_at).isoformat()}
    packed = try_pack(tag, {**data, "id": minion} if minion else data)
    assert packed is not None
    return packed


TOO_LARGE = "too_large"
"""In a stub: the size of the event that it stands for, which was more than ``max_event_bytes``."""


def cut(body: bytes, captured_at: float) -> bytes:
    """A stub of an event that is too large to be kept: what its tag says, and how large it was."""
    tag = body[: max(0, body.find(SEPARATOR, 0, MAX_TAG_BYTES))].decode(errors="replace")
    job = parse_tag(tag)
    data: dict[str, Any] = {"_stamp": utc(captured_at).isoformat(), TOO_LARGE: len(body)}
    if job is not None:
        data |= {"jid": job.jid, "id": job.minion}
    packed = try_pack(tag, data)
    assert packed is not None
    return packed


def minions_event(jid: str, minions: list[str]) -> bytes | None:
    """The event that adds minions to a job."""
    return try_pack(f"{_MINIONS_TAG}{jid}", {"jid": jid, "minions": minions})


def chosen_event(body: bytes) -> bytes:
    """An event's bytes as one that is for ``salt_events`` alone."""
    return _CHOSEN_TAG.encode() + body


def master_return_kind(value: Any, jid: str) -> str | None:
    """``run`` or ``wheel``, when a return of the master's own is the payload of a runner's or wheel's event."""
    if not isinstance(value, dict) or value.get("jid") != jid:
        return None
    kind = master_kind(value.get("fun"))
    return None if kind is None else "run" if kind is Kind.RUNNER_RETURN else "wheel"


def master_kind(fun: Any) -> Kind | None:
    """The kind of the return of a function that only the master itself does; ``None`` for any other."""
    if not isinstance(fun, str):
        return None
    return {"runner": Kind.RUNNER_RETURN, "wheel": Kind.WHEEL_RETURN}.get(fun.partition(".")[0])


def told(head: bytes, tail: bytes) -> tuple[str, str]:
    """An event's tag, and its function where it is found, by how its bytes begin and end: without opening it."""
    tag = head.partition(SEPARATOR)[0][:MAX_TAG_BYTES].decode(errors="backslashreplace")
    for text in (tail, head):  # in a return the function comes after the value
        at = text.rfind(_FUN)
        if at < 0:
            continue
        unpacker = msgpack.Unpacker(unicode_errors="backslashreplace", strict_map_key=False)
        unpacker.feed(text[at + len(_FUN) :])
        try:
            fun = unpacker.unpack()
        except (ValueError, TypeError, LookupError, RecursionError, msgpack.exceptions.UnpackException):
            continue
        if is_function(fun):
            return tag, _fun_text(fun)
    return tag, ""


_FUN = b"\xa3fun"


def describe(body: bytes) -> dict[str, Any]:
    """An event for people and programs: ``tag`` and ``data``, in JSON's own types; else its ``bytes`` in base64."""
    try:
        event = open_event(body)
    except TooManyObjects:
        event = Ignored.UNDECODABLE
    if isinstance(event, Opened):
        return {"tag": event.tag, "data": json.loads(jsontext.dumps(event.data))}
    return {"bytes": base64.b64encode(body).decode()}


class TooManyObjects(Exception):
    """What was to be unpacked has more objects than :func:`limit_objects` lets pass."""


_most_objects = 0


def limit_objects(most: int) -> None:
    """From now on this process unpacks nothing of more objects. Up to twice as many are made until that is known."""
    global _most_objects
    _most_objects = most


def unpack(payload: bytes) -> Any:
    """What Salt packed (``salt.payload.dumps``).

    Raises:
        ValueError, TypeError, LookupError, RecursionError: it was not Salt.
        TooManyObjects: see :func:`limit_objects`.
    """
    if _most_objects:
        return _unpack_some(payload, _most_objects)
    return msgpack.unpackb(payload, strict_map_key=False, unicode_errors="surrogateescape", ext_hook=_extension)


def outline_of_master_return(file: BinaryIO, leaves_out: Callable[[Any], bool]) -> dict[str, Any] | None:
    """What a file of the job cache holds of a runner's or wheel's return, with :data:`LEFT_OUT` for its value, which is
    passed over and not read; ``None`` where it is to be stored.

    Raises:
        ValueError, TypeError, LookupError, RecursionError: it was not Salt.
    """
    try:
        return _outline(file, leaves_out)
    except msgpack.UnpackException as exc:  # it ends too early
        raise ValueError(str(exc)) from exc


def _outline(file: BinaryIO, leaves_out: Callable[[Any], bool]) -> dict[str, Any] | None:
    unpacker = msgpack.Unpacker(file, strict_map_key=False, unicode_errors="surrogateescape", ext_hook=_extension)
    for _ in range(unpacker.read_map_header()):
        if unpacker.unpack() != "return":
            unpacker.skip()
            continue
        said: dict[str, Any] = {}
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            if key != "return":
                said[key] = unpacker.unpack()
                continue
            if not leaves_out(said.get("fun")):  # which stands first (SyncClientMixin.low, salt/client/mixins.py)
                return None
            said[key] = LEFT_OUT
            unpacker.skip()
        return said
    return None


def _unpack_some(payload: bytes, most: int) -> Any:
    left = most

    def count(container: Any) -> Any:
        nonlocal left
        left -= len(container) * (2 if isinstance(container, dict) else 1)
        if left < 0:
            raise TooManyObjects
        return container

    try:
        return msgpack.unpackb(
            payload, strict_map_key=False, unicode_errors="surrogateescape", ext_hook=_extension, object_hook=count,
            list_hook=count, max_array_len=most, max_map_len=most // 2,
        )  # fmt: skip
    except ValueError as exc:
        if "exceeds max_array_len" in str(exc) or "exceeds max_map_len" in str(exc):
            raise TooManyObjects from exc
        raise


def is_trimmed(value: Any) -> bool:
    """Whether Salt replaced the value or a part of it (``trim_dict``, salt/utils/dicttrim.py: leaves of mappings)."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo += item.values()
        elif item == TRIMMED and isinstance(item, str):
            return True
    return False


def may_be_trimmed(body: bytes) -> bool:
    """Whether an event's bytes may hold a value that Salt replaced: a look without unpacking."""
    return _TRIMMED_BYTES in body


def is_stamp(value: Any) -> bool:
    """Whether a value is a time as the master puts it on an event."""
    return isinstance(value, str) and _STAMP.fullmatch(value) is not None


def is_jid(text: Any) -> bool:
    """Whether a text is the id of a job."""
    return isinstance(text, str) and _JID.fullmatch(text) is not None


def interpret(event: Opened, captured_at: float, selection: Selection) -> Record | Ignored:
    """The rows that an event becomes, or why it becomes none.

    ``captured_at`` (seconds since the epoch) is the row's time when the event has no ``_stamp``.
    """
    tag, job_tag, data, trimmed, chosen = event
    if selection.is_of_peer(data):
        return Ignored.PEER
    if "return" in data and selection.leaves_out(data.get("fun")):
        data, trimmed = {**data, "return": LEFT_OUT}, False
    chosen = chosen or selection.wants_event(tag)
    altered = _altered(data.get("_stamp"), captured_at)
    # A long tag is cut, as a long function is: the row of an event must not take the job's along.
    stored = Event(tag[:MAX_NAME_CHARACTERS], jsontext.dumps(data), altered) if chosen else None
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
    if not is_jid(tag.jid):
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
    if tag.kind is Kind.JOB_NEW and published_load(data) is None:
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
        load = published_load(data)
        assert load is not None
    elif tag.kind is Kind.MINIONS:
        load = {"jid": tag.jid, "Minions": data.get("minions")}
    else:
        load = _master_job(tag, data, selection.master_id)
    return Record(load=Load(tag.jid, load))


def published_load(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``jids`` gets of a publish, ``None`` where a type is wrong.

    ``kwargs`` and ``ret`` are known to the job cache alone. Names that Salt trimmed are no names.
    """
    minions, missing = ([] if names == TRIMMED else names for names in (data["minions"], data.get("missing", [])))
    if not _is_texts(minions) or not _is_texts(missing) or not isinstance(data["tgt"], (str, list)):
        return None
    load = {
        "jid": data["jid"],
        "tgt": data["tgt"],
        "tgt_type": data.get("tgt_type", "glob"),
        "fun": data["fun"],
        "arg": data["arg"],
        "user": data.get("user", ""),
        "Minions": minions,
        "missing": missing,
    }
    load.update({key: data[key] for key in ("kwargs", "ret") if key in data})
    return load


def _minion_return(tag: Tag, data: dict[str, Any], altered: str, trimmed: bool) -> Record:
    success = _success(data)
    retcode = data.get("retcode", 0 if success else 1)
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
            _fun_text(data.get("fun", "")),
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
            _fun_text(data["fun"]),
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
    return load_of_return(ret.id, ret.data)


def load_of_return(minion: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The same, from a minion's id and what it said, with or without the value."""
    load = {key: value for key, value in data.items() if isinstance(key, str) and key not in ("return", "Minions")}
    if load.get("cmd") != "_return":
        load.pop("cmd", None)
    load.setdefault("arg", load.get("fun_args", []))
    load.setdefault("tgt", minion)
    load.setdefault("tgt_type", "glob")
    return load


def job_columns(load: Any) -> tuple[str, str, str]:
    """``fun``, ``user`` and ``tgt`` of a stored load as the columns of ``jids`` have them: cut, lists joined."""
    if not isinstance(load, Mapping):
        return "", "", ""
    return _column(load.get("fun")), _column(load.get("user")), _column(load.get("tgt"))


def _column(value: Any) -> str:
    if isinstance(value, list):
        value = ",".join(item for item in value if isinstance(item, str))
    if not isinstance(value, str):
        return ""
    return _fun_text(value)


def is_published(load: Mapping[str, Any]) -> bool:
    """Whether a stored load came from the publish itself, ours or saltext.mysql's."""
    return ("Minions" in load and "tgt" in load and "id" not in load) or load.get("cmd") == "publish"


def is_minions_alone(load: Mapping[str, Any]) -> bool:
    """Whether a load says no more than whom a syndic's part of a job is for: no row until the job itself is known.

    Salt lets any minion say that of any jid (``_handle_minion_event``, salt/master.py 3006-3008).
    """
    return "tgt" not in load


def merged_load(stored: Any, new: dict[str, Any]) -> dict[str, Any]:
    """What ``jids`` should hold once ``new``, a published load, arrives and ``stored`` stands there.

    A published load beats a synthesised one. Two published loads are one job's parts (3008 publishes
    a batch job once per sub-batch under one jid): their minions add up. Merging again changes nothing.
    """
    if not isinstance(stored, dict):
        return new
    if is_minions_alone(new):
        return {**stored, "Minions": _union(stored.get("Minions"), new["Minions"])}
    if not is_published(new):  # the start of a runner, which says no more than its return
        return stored
    merged = {**new, **stored} if is_published(stored) else dict(new)
    for key in ("Minions", "missing"):
        if isinstance(new.get(key), list):
            merged[key] = _union(stored.get(key), new[key])
    if isinstance(merged.get("tgt"), list) and isinstance(new.get("tgt"), list):
        merged["tgt"] = _union(merged["tgt"], new["tgt"])
    return merged


def _union(first: Any, second: list[Any]) -> list[Any]:
    known: list[Any] = first if isinstance(first, list) else []
    if all(isinstance(item, str) and item.isascii() for item in (*known, *second)):  # a hundred thousand minions
        there = set(known)
        return known + [item for item in second if item not in there]
    have = {jsontext.dumps(item) for item in known}
    return known + [item for item in second if jsontext.dumps(item) not in have]


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


def is_function(fun: Any) -> bool:
    """Whether a value names a function, or several."""
    return isinstance(fun, str) or _is_texts(fun)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _fun_text(fun: str | list[str]) -> str:
    text = fun if isinstance(fun, str) else ",".join(fun)
    return (
        text[:MAX_FUN_CHARACTERS]
        if text.isascii()
        else text.encode("utf-8", "backslashreplace").decode()[:MAX_FUN_CHARACTERS]
    )


def _altered(stamp: Any, captured_at: float) -> str:
    """When the master saw the event: its ``_stamp`` (UTC; aware on 3008), else when we did."""
    if isinstance(stamp, str) and (said := _STAMP.fullmatch(stamp)):
        day, time, fraction = said.groups()
        if is_day(day):
            return f"{day} {time}.{fraction or '':0<6}"
    return utc(min(max(captured_at, _TIMESTAMPS[0]), _TIMESTAMPS[1])).strftime("%Y-%m-%d %H:%M:%S.%f")


@functools.lru_cache(maxsize=16)
def is_day(text: str) -> bool:
    """Whether MySQL's TIMESTAMP, which ends in 2038, has the day. Asked for every row, and nearly always for today."""
    try:
        return datetime.date.fromisoformat(text).year < 2038
    except ValueError:  # the 31st of February
        return False


def utc(moment: float) -> datetime.datetime:
    """Seconds since the epoch as a time."""
    return datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)


def _pack_default(value: Any) -> Any:
    """What msgpack does not know and :func:`unpack` gave: a datetime, as Salt packs it."""
    if isinstance(value, datetime.datetime):
        return msgpack.ExtType(_EXT_DATETIME, value.strftime("%Y%m%dT%H:%M:%S.%f").encode())
    return str(value)


def _extension(code: int, data: bytes) -> Any:
    """Salt's own msgpack extension types (salt/payload.py 3008.3)."""
    if code == _EXT_DATETIME:
        return datetime.datetime.strptime(data.decode(), "%Y%m%dT%H:%M:%S.%f")  # noqa: DTZ007 (naive, as sent)
    if code == _EXT_CONSTANT:
        return str(msgpack.unpackb(data)[1])
    return msgpack.ExtType(code, data)


def _any_glob(globs: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs)) if globs else None
