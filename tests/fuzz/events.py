"""What a bus may bring, by chance and by seed: genuine events, the same bent, trees, raw bytes, tags of all kinds.

Speed counts, since a million is made: `random.Random` and msgpack, no Hypothesis. What a stranger says has the word
FORGED in most of its texts, and nothing genuine has it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgpack

from benchmarks import payloads
from tests.support.shipping import MASTER, STAMP, call_data, jid, master_data, return_data

FORGED: Final = "FORGED"

_TEXTS: Final = (
    "",
    FORGED,
    f"{FORGED}'; DROP TABLE `jids`; -- ",
    f'{FORGED}" \\',
    f"{FORGED}\0\x1a\n\r\t",
    f"{FORGED} \ud800",
    f"\udc80{FORGED}",
    f"{FORGED} ü 😀 \u202e",
    f"{FORGED} " * 40,
    "VALUE_LEFT_OUT by skip_values",
    "test.ping",
    "runner.jobs.list_jobs",
    "wheel.key.list_all",
    "root",
    STAMP,
    "2026-02-31T25:61:00",
    "nocache",
    "../../etc/passwd",
    "%s {0} ${x}",
    "-1",
    "\ufeff",
)
_SCALARS: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    255,
    2**31,
    2**63,
    2**64 - 1,
    -(2**63),
    0.0,
    -0.0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    b"",
    b"\xff\xfe",
    b"FORGED",
    b"\xed\xa0\x80",
    [],
    {},
    msgpack.ExtType(78, b"20260329T01:30:00.123456"),
    msgpack.ExtType(78, b"yesterday"),
    msgpack.ExtType(79, b"\x92\x00\xa6FORGED"),
    msgpack.ExtType(79, b"\xc1"),
    msgpack.ExtType(5, b"FORGED"),
    msgpack.Timestamp(1, 999_999_999),
)
_KEYS: Final = (
    "return",
    "fun",
    "fun_args",
    "jid",
    "id",
    "success",
    "retcode",
    "user",
    "cmd",
    "_stamp",
    "ts",
    "out",
    "trimmed",
    "metadata",
    "tgt",
    "tgt_type",
    "arg",
    "kwargs",
    "minions",
    "missing",
    "__peer_id",
    "token",
    "schedule",
    "Minions",
    "load",
)
_IDS: Final = (
    "web1",
    "web1 ",
    "Web1",
    "WÉB1",
    "w'eb\\1",
    "-- ",
    "`; DROP",
    "new",
    "ret",
    ".",
    "..",
    ".hidden",
    "\x00",
    "a\nb",
    "ü😀",
    "x" * 220,
    "x" * 255,
    "x" * 256,
    "jid",
    "endtime",
    "return.p",
    MASTER,
    "*",
    "%",
)
_JIDS: Final = (
    "nocache",
    "req",
    "",
    "0",
    "2026032900000000000",
    "202603290000000000000",
    "20260329000000000001_12",
    "20260329000000000001_12345678901",
    "99999999999999999999",
    "00000000000000000000",
    "".join(chr(0xFF10 + int(digit)) for digit in "20260329000000000001"),  # digits, and none of ASCII
    "20260329000000000001'",
    "../../../etc",
    "-1",
)
_TAGS: Final = (
    "",
    "salt",
    "salt/",
    "salt/auth",
    "salt/presence/present",
    "salt/beacon/web1/load/",
    "salt/stats/lab_master",
    "minion_start",
    "custom/event",
    "custom/" + "x" * 250,
    "custom/" + "é" * 600,
    "salt/job",
    "salt/job//new",
    "salt/job/{jid}",
    "salt/job/{jid}/",
    "salt/job/{jid}/new/",
    "salt/job/{jid}/ret",
    "salt/job/{jid}/ret/",
    "salt/job/{jid}/ret/a/b",
    "salt/job/{jid}/prog/web1/1",
    "salt/job/{jid}/publish",
    "salt/run/{jid}",
    "salt/run/{jid}/args",
    "salt/run/{jid}/progress",
    "salt/wheel/{jid}/new/x",
    "SALT/JOB/{jid}/NEW",
    "\n\n",
    "mysql_jobcache/minions/{jid}",
    "mysql_jobcache/event/salt/auth",
    "mysql_jobcache/",
    "syndic/other/{jid}",
    "20260329000000000001",
)
_JOB_TAGS: Final = (
    "salt/job/{jid}/new",
    "salt/job/{jid}/ret/{id}",
    "salt/job/{jid}/ret/{id}",
    "salt/job/{jid}/ret/{id}",
    "salt/run/{jid}/new",
    "salt/run/{jid}/ret",
    "salt/wheel/{jid}/new",
    "salt/wheel/{jid}/ret",
)
_FUNCTIONS: Final = ("test.ping", "cmd.run", "pkg.install", "grains.items", "secret.show")
_COMPACT: Final = 3
"""Levels of a tree, most of the time."""


class Genuine(NamedTuple):
    """What the master stored of a job before, or a moment after, it was on the bus."""

    body: bytes
    key: tuple[str, str]
    """Jid and minion, ``""`` for a publish."""
    data: dict[str, Any]


class Story(NamedTuple):
    """A leg's events in their order, and what the master's job cache gets."""

    bodies: list[bytes]
    early: list[Genuine]
    """What is there before the first event."""
    late: dict[int, list[Genuine]]
    """What comes once the event of this place was on the bus."""
    sent: set[tuple[str, str]]
    """Keys of which the genuine event was on the bus."""


def packed(data: Any) -> bytes:
    """A payload, whatever the text in it."""
    return bytes(msgpack.packb(data, use_bin_type=True, unicode_errors="surrogatepass"))


def event(tag: str, data: Any) -> bytes:
    """An event's bytes."""
    return tag.encode("utf-8", "surrogatepass") + b"\n\n" + packed(data)


class Chance:
    """Makes events. The same seed makes the same ones."""

    def __init__(self, seed: str, *, first_job: int, dear_bytes: int) -> None:
        self._random = random.Random(seed)
        self._job = first_job
        self._dear_bytes = dear_bytes
        self._pool: list[tuple[str, dict[str, Any]]] = []
        """Genuine events of this leg that others are made of."""
        self._bodies: list[bytes] = []
        self._early: list[Genuine] = []
        self._late: dict[int, list[Genuine]] = {}
        self._sent: set[tuple[str, str]] = set()
        self._strangers: tuple[tuple[int, Callable[[], bytes]], ...] = (
            (40, self._bent),
            (22, self._tree_of_a_job),
            (10, self._tagged),
            (10, self._damaged),
            (5, self._raw),
            (3, self._odd),
        )

    def story(self, events: int) -> Story:
        """A leg of about so many events."""
        weights = [weight for weight, _ in self._strangers]
        makers = [maker for _, maker in self._strangers]
        while len(self._bodies) < events:
            if not self._pool or self._random.random() < 0.25:
                self._genuine_job()
            elif self._random.random() < 0.12:
                self._bodies.append(self._random.choice(self._bodies[-3000:]))
            else:
                (maker,) = self._random.choices(makers, weights)
                self._bodies.append(maker())
        return Story(self._bodies, self._early, self._late, self._sent)

    # Genuine

    def _genuine_job(self) -> None:
        self._job += 1
        job = jid(self._job)
        random_ = self._random
        kind = random_.choices(("publish", "batch", "call", "runner", "wheel"), (8, 1, 2, 2, 1))[0]
        # The load of a job is there before any of its returns: a return that came first would be taken for a salt-call.
        is_early = random_.random() < 0.5
        if kind in ("publish", "batch"):
            self._published(job, kind == "batch", is_early=is_early)
        elif kind == "call":
            minion = f"call-{random_.randrange(50)}"
            data = call_data(job, minion, self._value(), fun=random_.choice(_FUNCTIONS))
            self._add(f"salt/job/{job}/ret/{minion}", data, (job, minion), is_early=is_early)
        else:
            area = "run" if kind == "runner" else "wheel"
            fun = f"{kind}.{random_.choice(('state.orchestrate', 'jobs.active', 'key.list_all', 'doc.execution'))}"
            data = master_data(job, fun, self._value(), success=random_.random() < 0.9)
            start = {key: data[key] for key in ("fun", "jid", "user", "fun_args", "_stamp")}
            self._bodies.append(event(f"salt/{area}/{job}/new", start))
            self._add(f"salt/{area}/{job}/ret", data, (job, MASTER), is_early=is_early)

    def _published(self, job: str, in_parts: bool, *, is_early: bool) -> None:
        random_ = self._random
        several = random_.random() < 0.1
        fun: Any = ["test.ping", "cmd.run"] if several else random_.choice(_FUNCTIONS)
        minions = [f"minion-{random_.randrange(300)}.example.com" for _ in range(random_.randrange(1, 7))]
        minions = list(dict.fromkeys([*minions, random_.choice(("web1", "web1 ", "Web1", "ü😀", "x" * 220))]))
        parts = [minions[:2], minions[2:]] if in_parts and len(minions) > 2 else [minions]
        for part in parts:
            data = {
                "jid": job,
                "tgt_type": "glob",
                "tgt": "*",
                "user": "root",
                "fun": fun,
                "arg": [[], ["uptime"]] if several else [],
                "minions": part,
                "missing": [],
                "_stamp": STAMP,
            }
            self._add(f"salt/job/{job}/new", data, (job, ""), is_early=is_early)
        for minion in minions:
            if random_.random() < 0.05:
                continue
            changes: dict[str, Any] = {"fun": fun, "fun_args": [[], ["uptime"]] if several else []}
            if several:
                value: Any = {name: self._value() for name in fun}
                changes |= {"retcode": dict.fromkeys(fun, 0), "success": dict.fromkeys(fun, True)}
            elif random_.random() < 0.1:
                value = payloads.highstate_of(self._job % 5000)
                changes |= {"out": "highstate"}
            else:
                value = self._value()
                failed = random_.random() < 0.1
                changes |= {"retcode": int(failed), "success": not failed}
            data = return_data(job, minion, value, **changes)
            self._add(f"salt/job/{job}/ret/{minion}", data, (job, minion), is_early=is_early)

    def _add(self, tag: str, data: dict[str, Any], key: tuple[str, str], *, is_early: bool) -> None:
        """A genuine event: most come as they are, some bent or after what a stranger says, some are never heard."""
        body = event(tag, data)
        genuine = Genuine(body, key, data)
        self._pool.append((tag, data))
        del self._pool[:-400]
        fate = self._random.random()
        if fate < 0.15:
            self._bodies += [self._bend(tag, data) for _ in range(self._random.randrange(1, 4))]
        if fate > 0.06:
            self._bodies.append(body)
            self._sent.add(key)
        if is_early:
            self._early.append(genuine)
        else:
            self._late.setdefault(max(0, len(self._bodies) - 1), []).append(genuine)

    def _value(self) -> Any:
        """What a minion may return: mostly what JSON has."""
        random_ = self._random
        kind = random_.randrange(12)
        if kind < 5:
            return True
        if kind < 7:
            return f"line {random_.randrange(10**6)}\n" * random_.randrange(1, 30)
        if kind == 7:
            return {"kernel": "Linux", "cpus": random_.randrange(64), "load": random_.random(), "ips": ["::1", None]}
        if kind == 8:
            return [random_.randrange(-(2**63), 2**63) for _ in range(random_.randrange(6))]
        if kind == 9:
            return {"it's": 'a "quote" \\ and \0', "": "ü😀"}
        if kind == 10:
            return random_.choice(([], {}, "", None, False, 0, 1.0, -0.0, "VALUE", 2**64 - 1))
        return random_.choice((b"\xff\x00", float("nan"), {1: b"text", None: 2, 1.5: 3}, nested(40, "bottom")))

    # Strangers

    def _bent(self) -> bytes:
        return self._bend(*self._random.choice(self._pool))

    def _bend(self, tag: str, data: dict[str, Any]) -> bytes:
        """A genuine event with some of it changed."""
        random_ = self._random
        bent = dict(data)
        for _ in range(random_.choice((1, 1, 1, 2, 4))):
            key = random_.choice((*bent, *_KEYS)) if bent else random_.choice(_KEYS)
            what = random_.randrange(8)
            if what < 2:
                bent.pop(key, None)
            elif what < 5:
                bent[key] = self._tree()
            elif what == 5:
                bent[random_.choice(_KEYS)] = bent.get(key)
            elif what == 6:
                bent["return"] = f"{FORGED} {random_.randrange(10**9)}"
            else:
                tag = self._bend_tag(tag, bent)
        if random_.random() < 0.03:
            bent["cmd"] = "_minion_event"
        return event(tag, bent)

    def _bend_tag(self, tag: str, data: dict[str, Any]) -> str:
        """Another jid, minion or kind; half the time the payload says the same."""
        random_ = self._random
        job, minion = data.get("jid"), data.get("id")
        job, minion = random_.choice(((self._any_jid(), minion), (job, self._any_id()), (job, minion)))
        if random_.random() < 0.5:
            data |= {"jid": job, "id": minion}
        if job == data.get("jid") and minion == data.get("id") and random_.random() < 0.3:
            return tag.replace("/ret/", "/new/", 1)
        return random_.choice(_JOB_TAGS).format(jid=job, id=minion)

    def _any_jid(self) -> str:
        random_ = self._random
        if random_.random() < 0.6:
            return jid(random_.randrange(max(1, self._job - 400), self._job + 20))
        return random_.choice(_JIDS) if random_.random() < 0.4 else jid(10**9 + random_.randrange(10**9))

    def _any_id(self) -> str:
        random_ = self._random
        return random_.choice(_IDS) if random_.random() < 0.6 else f"minion-{random_.randrange(300)}.example.com"

    def _tree_of_a_job(self) -> bytes:
        """Any map under the tag of a job, with jid and id as they should be."""
        random_ = self._random
        job, minion = self._any_jid(), self._any_id()
        data = {random_.choice(_KEYS): self._tree() for _ in range(random_.randrange(6))}
        data |= {"jid": job, "id": minion}
        if random_.random() < 0.7:
            data |= {"return": self._tree(), "fun": random_.choice(("test.ping", "runner.x.y", "wheel.x.y", FORGED))}
        if random_.random() < 0.3:
            data |= {"tgt": "*", "arg": self._tree(), "minions": [self._any_id(), FORGED]}
        return event(random_.choice(_JOB_TAGS).format(jid=job, id=minion), data)

    def _tagged(self) -> bytes:
        """Any payload under tags of all kinds."""
        data = self._tree() if self._random.random() < 0.3 else {"data": self._tree(), "_stamp": STAMP}
        return event(self._random.choice(_TAGS).format(jid=self._any_jid()), data)

    def _damaged(self) -> bytes:
        """Bytes of a genuine event, some flipped, cut out, put in, or cut off."""
        random_ = self._random
        body = bytearray(event(*random_.choice(self._pool)))
        for _ in range(random_.choice((1, 1, 2, 8))):
            place = random_.randrange(len(body) or 1)
            what = random_.randrange(5)
            if what == 0:
                del body[place:]
            elif what == 1:
                del body[place : place + random_.randrange(1, 9)]
            elif what == 2:
                body[place:place] = random_.randbytes(random_.randrange(1, 9))
            elif body:
                body[place] = random_.randrange(256)
        return bytes(body)

    def _raw(self) -> bytes:
        """Bytes that nobody packed, with and without a tag before them."""
        random_ = self._random
        raw = random_.randbytes(random_.randrange(200))
        if random_.random() < 0.3:
            return raw
        return random_.choice(_JOB_TAGS).format(jid=self._any_jid(), id=self._any_id()).encode() + b"\n\n" + raw

    def _odd(self) -> bytes:
        """What only a hostile hand packs, and now and then much of it."""
        random_ = self._random
        # Of a job, so that its dead letter can be told from others, if it is one.
        job, minion = jid(random_.randrange(10**9)), f"odd-{random_.randrange(10**9)}"
        what = random_.random()
        if what < 0.4:
            value = random_.choice(_ODD)
        elif what < 0.8:
            most = self._dear_bytes if what < 0.45 else 4096
            value = random_.choice(_MUCH)(random_.randrange(1, most))
        else:  # such as Salt leaves of what was too large; each a return of its own
            value = packed({"a": "VALUE_TRIMMED", "b": [FORGED]})
        head = packed({"id": minion, "jid": job, "fun": "test.ping", "cmd": "_return", "success": True})
        count = head[0] & 0x0F
        payload = bytes([0x80 | (count + 1)]) + head[1:] + packed("return") + value
        return f"salt/job/{job}/ret/{minion}".encode() + b"\n\n" + payload

    def _tree(self, depth: int = _COMPACT) -> Any:
        """Any value that msgpack carries."""
        random_ = self._random
        kind = random_.random()
        if depth == 0 or kind < 0.35:
            return random_.choice(_SCALARS)
        if kind < 0.65:
            text = random_.choice(_TEXTS)
            return text if kind < 0.6 else f"{FORGED}{random_.randrange(10**6)}"
        if kind < 0.66:
            return nested(random_.randrange(1, 300), FORGED)
        if kind < 0.8:
            return [self._tree(depth - 1) for _ in range(random_.randrange(4))]
        return {self._key(): self._tree(depth - 1) for _ in range(random_.randrange(5))}

    def _key(self) -> Any:
        random_ = self._random
        if random_.random() < 0.7:
            return random_.choice(_KEYS)
        return random_.choice((random_.choice(_TEXTS), 1, 1.0, True, None, b"\xff", 0.5, -1, float("nan")))


def nested(levels: int, value: Any) -> Any:
    """``value`` inside that many containers."""
    for level in range(levels):
        value = {"deeper": value} if level % 3 else [value]
    return value


def _array(count: int, item: bytes) -> bytes:
    return b"\xdd" + struct.pack(">I", count) + item * count


def _text(content: bytes) -> bytes:
    return b"\xdb" + struct.pack(">I", len(content)) + content


_ODD: Final = (
    b"\xdd\xff\xff\xff\xff",  # says that four billion come
    b"\xdb\xff\xff\xff\xffFORGED",
    b"\x82\xa1a\x01\xa1a\xa6FORGED",  # a key twice
    b"\x81\x91\x01\x01",  # a list as a key
    b"\x81\x80\x01",
    b"\xc1",
    b"\xd4\x4e\x00",  # a datetime of one byte
    b"\xc7\x0c\xff" + b"\xff" * 12,  # a time far ahead
)
_MUCH: Final[tuple[Callable[[int], bytes], ...]] = (
    lambda size: _text(b"\xff" * size),  # no UTF-8
    lambda size: _text(b"\xed\xa0\x80" * (size // 3)),  # first halves of pairs
    lambda size: _text(b"\xed\xa0\xbd\xed\xb8\x80" * (size // 6)),  # whole pairs
    lambda size: _text(b"'\\" * (size // 2)),
    lambda size: _text(b"\0" * size),
    lambda size: _array(size, b"\x80"),  # empty maps
    lambda size: _array(size, b"\x90"),
    lambda size: _array(size, b"\xc0"),
    lambda size: b"\x91" * min(size, 2000) + b"\xc0",  # deep
    lambda size: b"\x81\xa1a" * min(size // 3, 2000) + b"\xc0",
    lambda size: b"\xdf\xff\xff\xff\xff" + b"\x01\x01" * (size // 2),
    lambda size: b"\xdf" + struct.pack(">I", size // 6) + b"".join(packed(n) + b"\xc0" for n in range(size // 6)),
)
