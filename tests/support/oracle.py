"""The oracle: what must be in the tables, and whether it is.

It reads the producers' ledgers and, as root through the server's own socket, the tables; neither is ever broken. After
a fault it says: every accepted return has its row, no row was not offered, values are equal, every job has its row in
``jids``. The books are read through the runner, and at last a fresh job must get through: a way that is stuck after all
it had was delivered is not mended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pymysql.cursors

from tests.support.producer import Load, Producer
from tests.support.salt import SaltMaster
from tests.support.scratch import Scratch

_SHOWN: Final = 5
_FRESH_SECONDS: Final = 30.0


class Key(NamedTuple):
    """Whose answer to which job."""

    jid: str
    id: str


@dataclasses.dataclass
class Ledgers:
    """What the producers' ledgers say so far."""

    paths: list[Path] = dataclasses.field(default_factory=list)
    offered: dict[Key, bytes] = dataclasses.field(default_factory=dict)
    """A digest of each return that was sent, answered or not."""
    accepted: set[Key] = dataclasses.field(default_factory=set)
    _read: dict[Path, int] = dataclasses.field(default_factory=dict)

    def read(self) -> None:
        """Take in what the files have now; a line that is still being written is left for later."""
        for path in self.paths:
            for line in self._new_lines(path):
                entry = json.loads(line)
                if "offered" in entry:
                    ret = entry["offered"]
                    self.offered[Key(ret["jid"], ret["id"])] = _digest(**ret)
                else:
                    self.accepted.add(Key(*entry["accepted"]))

    def _new_lines(self, path: Path) -> Iterator[bytes]:
        if not path.exists():
            return
        with path.open("rb") as ledger:
            ledger.seek(self._read.get(path, 0))
            for line in ledger:
                if not line.endswith(b"\n"):
                    return
                self._read[path] = self._read.get(path, 0) + len(line)
                yield line


def _digest(*, jid: str, id: str, fun: str, retcode: int, success: bool, **value: Any) -> bytes:
    text = json.dumps([jid, id, fun, retcode, success, value["return"]], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


class Oracle:
    """Compares a master's tables with what was produced at it.

    ``status`` gives the engine's status with its books checked.
    """

    def __init__(self, master: SaltMaster, database: Scratch, status: Callable[[], dict[str, Any]], folder: Path):
        self.ledgers = Ledgers()
        self._master = master
        self._database = database
        self._status = status
        self._folder = folder
        self._numbers = itertools.count(1)
        folder.mkdir(parents=True, exist_ok=True)

    def producer(self, load: Load) -> Producer:
        """A producer, not started, whose ledger counts here."""
        path = self._folder / f"{next(self._numbers)}-{load.name}.jsonl"
        self.ledgers.paths.append(path)
        return Producer(self._master, path, load)

    def missing(self) -> set[Key]:
        """The accepted returns that have no row yet."""
        self.ledgers.read()
        return self.ledgers.accepted - self.stored()

    def torn(self) -> set[Key]:
        """The accepted returns that the master's own job cache has begun to write and never will have.

        For use once the producers are done. ``jid_dir`` (salt/utils/jid.py 3006-3008) says where to look.
        """
        self.ledgers.read()
        jobs = self._master.directory / "cache" / "jobs"
        torn = set()
        for key in self.ledgers.accepted:
            name = hashlib.sha256(key.jid.encode()).hexdigest()
            folder = jobs / name[:2] / name[2:] / key.id
            if folder.exists() and not (folder / "return.p").exists():
                torn.add(key)
        return torn

    def arrived(self, timeout: float, *, but: Collection[Key] = ()) -> float:
        """Wait until no accepted return is missing, ``but`` these; gives the seconds that took."""
        began = time.monotonic()
        while missing := self.missing().difference(but):
            if time.monotonic() > began + timeout:
                raise AssertionError(
                    f"{len(missing)} of {len(self.ledgers.accepted)} accepted returns have no row after {timeout:g} s: "
                    f"{_some(missing)}; status: {self._told()}"
                )
            time.sleep(0.3)
        return time.monotonic() - began

    def check(self, timeout: float = 60.0, *, but: Collection[Key] = ()) -> dict[str, Any]:
        """Wait until everything has arrived, ``but`` these, then assert the rest; gives the engine's status."""
        self.arrived(timeout, but=but)
        self._compare()
        status = self._status()
        with self.producer(Load(seed=random.getrandbits(32), name="fresh", minions=1, bus=0, returns=1)) as fresh:
            assert fresh.wait(_FRESH_SECONDS) == 1
        self.arrived(_FRESH_SECONDS, but=but)
        return status

    def _compare(self) -> None:
        """Everything but what is missing: rows that nobody offered, values that differ, returns without a job."""
        self.ledgers.read()
        offered, seen = self.ledgers.offered, 0
        spurious, wrong = [], []
        for row in self._rows():
            key = Key(row["jid"], row["id"])
            seen += 1
            if key not in offered:
                spurious.append(key)
            elif _digest_of(row) != offered[key]:
                wrong.append((key, row["return"][:200], row["full_ret"][:300]))
        assert not spurious, f"{len(spurious)} of {seen} rows were never offered: {_some(spurious)}"
        assert not wrong, f"{len(wrong)} of {seen} rows do not hold what was offered: {_some(wrong)}"
        jobless = self._database.sql(
            "SELECT DISTINCT jid FROM salt_returns LEFT JOIN jids USING (jid) WHERE jids.jid IS NULL"
        )
        assert not jobless, f"{len(jobless)} jobs have returns and no row in jids: {_some(jobless)}"

    def stored(self) -> set[Key]:
        """The returns that have a row."""
        if not self._database.sql("SHOW TABLES LIKE 'salt_returns'"):
            return set()
        return {Key(*row) for row in self._database.sql("SELECT jid, id FROM salt_returns")}

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The returns of minions; those of runners, under the master's id, are the tests' own doing."""
        connection = self._database.server.connect(database=self._database.name)
        with connection, connection.cursor(pymysql.cursors.SSDictCursor) as cursor:
            cursor.execute("SELECT * FROM salt_returns WHERE id <> %s", (self._master.config["id"],))
            yield from cursor

    def _told(self) -> Any:
        try:
            status = self._status()
        except (RuntimeError, AssertionError) as error:
            return error
        return {key: status.get(key) for key in ("books", "last_error", "lag_seconds", "bus", "reconcile")}


def _digest_of(row: dict[str, Any]) -> bytes | None:
    """The digest of what a row holds; ``None`` if its columns contradict one another."""
    full = json.loads(row["full_ret"])
    value = json.loads(row["return"])
    same = (full["jid"], full["id"], full["fun"], full["return"]) == (row["jid"], row["id"], row["fun"], value)
    if not same or row["success"] != str(int(full["success"])):
        return None
    fields = {name: full[name] for name in ("jid", "id", "fun", "retcode", "success")}
    return _digest(**fields, **{"return": value})


def _some(things: Iterable[Any]) -> str:
    return ", ".join(str(tuple(thing)) for thing in itertools.islice(sorted(things), _SHOWN)) + " ..."
