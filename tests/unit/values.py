"""What a stranger can send, as Hypothesis strategies; and JSON read as strictly as the servers read it."""

from __future__ import annotations

import datetime
import json
from typing import Any

import msgpack
from hypothesis import strategies as st


def nested(levels: int, value: Any) -> Any:
    """``value`` inside that many containers."""
    for level in range(levels):
        value = {"deeper": value} if level % 3 else [value]
    return value


any_text = st.text(st.characters(exclude_categories=()))
"""Lone surrogates too."""

numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=True, allow_infinity=True)
extensions = st.builds(msgpack.ExtType, st.sampled_from([0, 5, 78, 79, 127]), st.binary(max_size=24)) | st.binary(
    max_size=8
).map(lambda data: msgpack.ExtType(79, msgpack.packb(data)))
scalars = st.none() | st.booleans() | numbers | any_text | st.binary(max_size=16)

packable = st.recursive(
    scalars | extensions | st.builds(msgpack.Timestamp, st.integers(0, 2**33), st.integers(0, 10**9 - 1)),
    # A tuple as a key becomes an array as a key, which Python cannot have in a dict.
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(scalars | st.tuples(scalars), inner, max_size=4)
    | st.builds(nested, st.integers(0, 200), inner),
    max_leaves=12,
)
"""Anything that msgpack can carry."""

python_values = st.recursive(
    scalars
    | st.datetimes()
    | st.datetimes(timezones=st.just(datetime.timezone.utc))
    | st.dates()
    | st.times()
    | st.binary().map(bytearray)
    | st.builds(object),
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.sets(scalars, max_size=4)
    | st.dictionaries(scalars | st.dates() | st.tuples(scalars), inner, max_size=4)
    | st.builds(nested, st.integers(0, 600), inner),
    max_leaves=12,
)
"""Anything that Salt's own types can carry, and more."""


def packed(value: Any) -> bytes:
    """``value`` as msgpack, as Salt packs it, whatever the text in it."""
    return bytes(msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass"))


def strict_json(text: str) -> Any:
    """The value of a text that is JSON by the RFC, in UTF-8.

    Raises:
        ValueError: it is not.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text.encode().decode(), parse_constant=refuse)


def depth(value: Any) -> int:
    """Levels of containers."""
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)
