"""The bus parsers give back exactly the bodies that were framed, however the bytes come, and trust nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgpack
import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from salt_mysql_engine import bus
from salt_mysql_engine.bus import BareParser, Parser, PrefixedParser
from salt_mysql_engine.errors import GarbageError

Framing = Callable[[bytes], bytes]
MIB = 1024 * 1024


def bare(body: bytes) -> bytes:
    return bytes(msgpack.packb({"head": {}, "body": body}))


def bare_old(body: bytes) -> bytes:
    """As peers before ``use_bin_type``: the body is a msgpack str of any bytes."""
    return bytes(msgpack.packb({"head": {}, "body": body}, use_bin_type=False))


def prefixed(body: bytes) -> bytes:
    frame = bare(body)
    return len(frame).to_bytes(4, "big") + frame


def prefixed_old(body: bytes) -> bytes:
    frame = bare_old(body)
    return len(frame).to_bytes(4, "big") + frame


FRAMINGS = (bare, bare_old, prefixed, prefixed_old)
every_framing = pytest.mark.parametrize("frame", FRAMINGS)
BODIES = [b"salt/auth\n\n\x80", b"", b"\x82\xff" * 40, bytes(300)]


def parsed(*chunks: bytes) -> list[bytes]:
    parser = bus.parser_for(chunks[0])
    return [body for chunk in chunks for body in parser.feed(chunk)]


@every_framing
def test_several_frames_in_one_read_give_all_their_bodies_in_order(frame: Framing) -> None:
    assert parsed(b"".join(map(frame, BODIES))) == BODIES


@every_framing
def test_a_stream_cut_in_two_anywhere_gives_the_same_bodies(frame: Framing) -> None:
    stream = b"".join(map(frame, BODIES))
    for cut in range(1, len(stream)):
        assert parsed(stream[:cut], stream[cut:]) == BODIES


@every_framing
def test_a_stream_that_comes_byte_by_byte_gives_the_same_bodies(frame: Framing) -> None:
    stream = b"".join(map(frame, BODIES))
    assert parsed(*(stream[n : n + 1] for n in range(len(stream)))) == BODIES


@pytest.mark.parametrize("anew", [0, 100])
@every_framing
def test_a_parser_that_gives_back_its_memory_gives_the_same_bodies(
    frame: Framing, anew: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "_ANEW_BYTES", anew)
    stream = b"".join(map(frame, BODIES * 2))
    assert parsed(*(stream[n : n + 1] for n in range(len(stream)))) == BODIES * 2
    for size in range(2, len(stream)):
        assert parsed(*(stream[n : n + size] for n in range(0, len(stream), size))) == BODIES * 2


def test_a_huge_frame_takes_no_memory_when_it_is_through() -> None:
    parser = bus.parser_for(b"\x82")
    stream = bare(bytes(48 * MIB))
    chunks = [stream[n : n + MIB] for n in range(0, len(stream), MIB)]
    del stream
    before = psutil.Process().memory_info().rss
    assert sum(len(parser.feed(chunk)) for chunk in chunks) == 1
    assert psutil.Process().memory_info().rss - before < 16 * MIB


@given(st.sampled_from(FRAMINGS), st.lists(st.binary(max_size=400), min_size=1), st.data())
def test_any_bodies_come_back_whatever_the_cuts(frame: Framing, bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(frame, bodies))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    assert parsed(*(stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)]))) == bodies


@every_framing
def test_a_body_is_given_as_soon_as_its_last_byte_is_there(frame: Framing) -> None:
    first, second = frame(b"one"), frame(b"two")
    parser = bus.parser_for(first)
    assert parser.feed(first[:-1]) == []
    assert parser.feed(first[-1:] + second[:-1]) == [b"one"]
    assert parser.feed(second[-1:]) == [b"two"]


@pytest.mark.parametrize(("frame", "kind"), [(bare, BareParser), (prefixed, PrefixedParser)])
def test_the_first_byte_alone_tells_the_formats_apart(frame: Framing, kind: type) -> None:
    assert isinstance(bus.parser_for(frame(b"x" * 70_000)[:1]), kind)


@pytest.mark.parametrize("frame", [bare, prefixed])
def test_a_frame_of_exactly_the_limit_passes_and_so_does_the_one_after(frame: Framing) -> None:
    overhead = len(bare(bytes(70_000))) - 70_000
    body = bytes(bus.MAX_FRAME_BYTES - overhead)
    stream = memoryview(frame(body) + frame(b"next"))
    parser = bus.parser_for(bytes(stream[:1]))
    bodies = [body for n in range(0, len(stream), MIB) for body in parser.feed(bytes(stream[n : n + MIB]))]
    assert bodies == [body, b"next"]


def test_a_prefixed_frame_over_the_limit_is_refused_by_its_length_alone() -> None:
    with pytest.raises(GarbageError, match=f"a frame of {bus.MAX_FRAME_BYTES + 1} bytes"):
        PrefixedParser().feed((bus.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


@pytest.mark.parametrize("kind_and_length", [b"\xc6\xff\xff\xff\xff", b"\xdb\x04\x00\x00\x01"], ids=["bin", "str"])
def test_a_bare_frame_over_the_limit_is_refused_when_the_limit_has_come(kind_and_length: bytes) -> None:
    start = b"\x82\xa4head\x80\xa4body" + kind_and_length
    parser = BareParser()
    assert parser.feed(start) == []
    fed = len(start)
    with pytest.raises(GarbageError):
        while fed <= 2 * bus.MAX_FRAME_BYTES:
            fed += MIB
            assert parser.feed(bytes(MIB)) == []
    assert fed <= bus.MAX_FRAME_BYTES + MIB


@given(st.sampled_from([BareParser, PrefixedParser]), st.lists(st.binary(), min_size=1))
@example(BareParser, [b"\x82" * 2000])
@example(BareParser, [b"\x82\x90\x01"])
@example(BareParser, [b"\x81\xa4body\xd4\xff\x00"])
@example(PrefixedParser, [bytes(4)])
@example(PrefixedParser, [b"\x00\x00\x00\x01\x82"])
def test_any_bytes_are_bodies_or_garbage_and_nothing_else(kind: type[Parser], reads: list[bytes]) -> None:
    parser = kind()
    try:
        bodies = [body for read in reads for body in parser.feed(read)]
    except GarbageError:
        return
    assert all(isinstance(body, bytes) for body in bodies)


@pytest.mark.parametrize(
    "frame", [{"head": {}}, {"head": {}, "body": None}, {"head": {}, "body": [b"x"]}, {b"head": {}, 7: b"x"}]
)
def test_a_frame_without_a_body_of_bytes_is_garbage(frame: object) -> None:
    data = msgpack.packb(frame)
    with pytest.raises(GarbageError):
        BareParser().feed(data)
    with pytest.raises(GarbageError):
        PrefixedParser().feed(len(data).to_bytes(4, "big") + data)


def test_a_stream_of_the_other_format_is_garbage() -> None:
    with pytest.raises(GarbageError):
        BareParser().feed(prefixed(b"x"))
    with pytest.raises(GarbageError):
        PrefixedParser().feed(bare(b"x"))
