"""Any value that a minion can send, as JSON text that every MySQL and MariaDB JSON function accepts.

Ordinary values become byte for byte what Salt's own returners store (``salt.utils.json.dumps``:
UTF-8 text, ``", "`` and ``": "`` between items), so queries that people have keep working. What JSON
or the servers cannot hold has one form each:

=====================================  ============================================================
value                                  form
=====================================  ============================================================
bytes that are UTF-8                   the text
other bytes                            ``{"__base64__": "..."}`` (as a key: the base64 text)
datetime, date, time                   ISO 8601 text
NaN, Infinity, -Infinity               the texts ``"NaN"``, ``"Infinity"``, ``"-Infinity"``
lone surrogates in text                ``\\udXXX`` spelled out, as Python's ``backslashreplace`` does
keys that are not text                 as ``json.dumps`` spells them (``1``, ``true``, ``null``)
containers nested deeper than 28       the JSON of the deeper part, as one text
sets, tuples                           lists
anything else                          its ``str()``
=====================================  ============================================================

Integers beyond 64 bits do not come here: msgpack has none, and Salt sends them as text (``verylong_encoder``,
salt/payload.py 3008.3).

Source of the depth: MariaDB 10.11 refuses JSON of 32 levels and more (measured), MySQL 8 of more
than 100 (ER_JSON_DOCUMENT_TOO_DEEP); a return stands one level down in ``full_ret``, and
multi-function returns and runners add one or two.
"""

from __future__ import annotations

import base64
import datetime
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

MAX_DEPTH = 28


def _refuse(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} has no JSON form of its own")


# json.dumps() with any option makes an encoder and an iterator for every call, which for a ping takes
# longer than the encoding. The arguments: no check for circles (msgpack makes none; RecursionError
# would tell), default, text encoder, no indent, separators, no sorting, no skipped keys, no NaN.
_encoder = json.encoder.c_make_encoder(  # type: ignore[attr-defined] # typeshed lists only what has a page
    None, _refuse, json.encoder.encode_basestring, None, ": ", ", ", False, False, False
)


def _encode(value: Any) -> str:
    return "".join(_encoder(value, 0))


def dumps(value: Any) -> str:
    """The JSON text of ``value``: encodable as UTF-8, whatever msgpack brought."""
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return _encode(_plain(value, MAX_DEPTH))
    # Only text with that many brackets can nest too deep: most returns never pay for the check.
    if text.count("{") + text.count("[") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        return _encode(_plain(value, MAX_DEPTH))
    return text


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether containers nest deeper than ``limit``; level by level, so that it is quick for wide trees."""
    # By exact type, since msgpack makes no others that get here: with isinstance() this took half as long as encoding.
    level = [value] if type(value) in _CONTAINERS else []
    while level:
        if limit == 0:
            return True
        limit -= 1
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) in _CONTAINERS
        ]
    return False


_CONTAINERS = frozenset({dict, list, tuple})


def _plain(value: Any, depth: int) -> Any:
    """``value`` in JSON's own types, with ``depth`` levels of containers at most."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _nonfinite(value)
    if isinstance(value, (bytes, bytearray)):
        text = _bytes_text(value)
        return {"__base64__": base64.b64encode(value).decode()} if text is None else text
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        if depth == 0:
            return _deep_text(value)
        if isinstance(value, dict):
            return {_key(key): _plain(item, depth - 1) for key, item in value.items()}
        return [item if type(item) in _AS_THEY_ARE else _plain(item, depth - 1) for item in value]
    return _scalar(value)


_AS_THEY_ARE = frozenset({int, bool, type(None)})
"""Of these a byte is one: so many are in an event of which everything else costs several bytes."""


def _is_as_it_is(value: Any) -> bool:
    return type(value) in _AS_THEY_ARE


class _Piece(str):
    """JSON text that is already written."""


def _deep_text(value: Any) -> str:
    """The JSON of a part of any depth; by a stack of its own, since Python's has a bottom."""
    written: list[str] = []
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _Piece):
            written.append(item)
        elif isinstance(item, dict):
            stack.append(_Piece("}"))
            for n, (key, child) in reversed(list(enumerate(item.items()))):
                stack += (child, _Piece(", " * bool(n) + _encode(_key(key)) + ": "))
            stack.append(_Piece("{"))
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.append(_Piece("]"))
            for n, child in reversed(list(enumerate(_in_runs(item)))):
                stack += (child, _Piece(", " * bool(n)))
            stack.append(_Piece("["))
        else:
            written.append(_encode(_plain(item, 1)))
    return "".join(written)


def _in_runs(items: Iterable[Any]) -> Iterator[Any]:
    """The items, those that are written as they are in one piece."""
    for as_they_are, run in itertools.groupby(items, _is_as_it_is):
        if as_they_are:
            yield _Piece(_encode(list(run))[1:-1])
        else:
            yield from run


def _key(key: Any) -> str:
    if isinstance(key, str):
        return _text(key)
    if isinstance(key, (bytes, bytearray)):
        text = _bytes_text(key)
        return base64.b64encode(key).decode() if text is None else text
    if key is None or isinstance(key, bool):
        return "null" if key is None else str(key).lower()
    if isinstance(key, int):
        return int.__repr__(key)
    if isinstance(key, float):
        return float.__repr__(key) if math.isfinite(key) else _nonfinite(key)
    return _scalar(key)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        if _FIRST_OF_PAIR.search(value):  # a surrogate pair is one character that some encoder took apart
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return value.encode("utf-8", "backslashreplace").decode()
    return str(value)


_FIRST_OF_PAIR = re.compile("[\ud800-\udbff]")
"""Bytes that are no UTF-8 come as seconds alone: putting pairs together takes ten times as long as all else here."""


def _bytes_text(value: bytes | bytearray) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _nonfinite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _scalar(value: Any) -> str:
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return _text(str(value))


def ascii_only(text: str) -> str:
    """The same JSON without a character beyond ASCII, for columns of an older charset."""
    return text if text.isascii() else _BEYOND_ASCII.sub(_spelled_out, text)


def _spelled_out(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
