"""An event's bytes and what they say: tag, payload, the events that are made here. Pure functions: no I/O, no clock.

An event is ``tag + b"\\n\\n" + msgpack(data)`` (``SaltEvent.pack``, salt/utils/event.py 3006-3008). Both
parts come from strangers: any accepted minion can put any tag and payload on the master's bus.
"""

from __future__ import annotations

import base64
import datetime
import enum
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import msgpack

from . import jsontext, moments

SEPARATOR = b"\n\n"
"""Between tag and payload (``TAGEND``, salt/utils/event.py)."""

PRIVATE = "mysql_jobcache/"
"""Tags that begin so are our own, and stand for what no event of Salt's says. Capture leaves such events of the bus."""
_MINIONS_TAG, _CHOSEN_TAG = f"{PRIVATE}minions/", f"{PRIVATE}event/"
_KEYED = re.compile(rf"{PRIVATE}keyed/([0-9a-f]{{32}})/(.*)", re.DOTALL)
EVENT_KEY_BYTES = 16

MAX_TAG_BYTES = 1024
MAX_FUN_CHARACTERS = 255
"""Width of ``salt_returns.fun``; a longer list of functions is cut, and is whole in ``full_ret``."""

PLAIN_RETURN = re.compile(rb"salt/job/(\d{20})/ret/([A-Za-z0-9._-]{1,255})\n\n")
"""The beginning of nearly every event: the jid and minion of a job's return, where they are of the ordinary kind."""

TRIMMED = "VALUE_TRIMMED"
"""What Salt puts in a value's place (salt/utils/dicttrim.py)."""
_TRIMMED_BYTES = TRIMMED.encode()
LEFT_OUT = "VALUE_LEFT_OUT by skip_values"
"""What a row has in the place of a value that is not stored."""
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
    for ``salt_events`` whatever the settings say, and for nothing else, under this ``key`` if it has one.
    """

    tag: str
    job: Tag | None
    data: dict[str, Any]
    trimmed: bool
    chosen: bool = False
    key: bytes = b""


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
        if keyed := _KEYED.fullmatch(tag):
            return Opened(keyed[2], None, data, trimmed=False, chosen=True, key=bytes.fromhex(keyed[1]))
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


def stub(jid: str, minion: str, stored_at: float) -> bytes:
    """The event of what the job cache holds of a minion's return, or (``""``) of a job's publish: who, and when."""
    tag = f"salt/job/{jid}/ret/{minion}" if minion else f"salt/job/{jid}/new"
    data = {"jid": jid, "_stamp": moments.utc(stored_at).isoformat()}
    packed = try_pack(tag, {**data, "id": minion} if minion else data)
    assert packed is not None
    return packed


TOO_LARGE = "too_large"
"""In a stub: the size of the event that it stands for, which was more than ``max_event_bytes``."""


def cut(body: bytes, captured_at: float) -> bytes:
    """A stub of an event that is too large to be kept: what its tag says, and how large it was."""
    tag = body[: max(0, body.find(SEPARATOR, 0, MAX_TAG_BYTES))].decode(errors="replace")
    job = parse_tag(tag)
    data: dict[str, Any] = {"_stamp": moments.utc(captured_at).isoformat(), TOO_LARGE: len(body)}
    if job is not None:
        data |= {"jid": job.jid, "id": job.minion}
    packed = try_pack(tag, data)
    assert packed is not None
    return packed


def minions_event(jid: str, minions: list[str]) -> bytes | None:
    """The event that adds minions to a job."""
    return try_pack(f"{_MINIONS_TAG}{jid}", {"jid": jid, "minions": minions})


def keyed_event(body: bytes, key: bytes) -> bytes:
    """An event's bytes as one that is for ``salt_events`` alone, and is there once under its key however often it
    comes: one that is handed over may be taken twice, by a journal that lost how far it came."""
    return f"{PRIVATE}keyed/{key.hex()}/".encode() + body


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
            return tag, fun_text(fun)
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


def is_function(fun: Any) -> bool:
    """Whether a value names a function, or several."""
    return isinstance(fun, str) or is_texts(fun)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def fun_text(fun: str | list[str]) -> str:
    """A function's name, or several, as a column has it: cut, and valid Unicode."""
    text = fun if isinstance(fun, str) else ",".join(fun)
    return (
        text[:MAX_FUN_CHARACTERS]
        if text.isascii()
        else text.encode("utf-8", "backslashreplace").decode()[:MAX_FUN_CHARACTERS]
    )


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
