"""An accepted minion that forges: what it says in another one's name never becomes a row, and holds nothing up.

Salt's master fires what a minion puts into the ``events`` list of a ``_minion_event`` as it is, unmarked
(``RemoteFuncs._minion_event``, salt/daemons/masterapi.py 3006-3008). The attacker here does so with a key of its own
over the real request channel; nothing on the bus tells its events from the master's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.support.mariadb import wait_until
from tests.support.salt import SaltMaster, fire_raw
from tests.system.conftest import ENGINE, PATIENCE, Site
from tests.system.test_crashes import go_on, lab_of
from tests.system.test_jobs import publish

pytestmark = pytest.mark.faults

VICTIM = "alpha"
AT_ONCE = 3.0  # seconds; less than the engine waits for the job cache here
WAIT = 6.0

ATTACK = """
import json, sys
from pathlib import Path
import salt.channel.client, salt.config
from tests.support.producer import minion_opts

config_dir = Path(sys.argv[1])
master = salt.config.master_config(str(config_dir / "master"))
opts = minion_opts("mallory", master, config_dir.parent / "simulated")
with salt.channel.client.ReqChannel.factory(opts, crypt="aes") as channel:
    for line in sys.stdin:
        channel.send({"cmd": "_minion_event", "id": "mallory", **json.loads(line)}, timeout=30)
        print("sent", flush=True)
"""


class Attacker:
    """An accepted minion, ``mallory``, that sends what it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def fire(self, tag: str, data: Mapping[str, Any], **load: Any) -> None:
        """Have the master fire this event; returns when the master has answered."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"events": [{"tag": tag, "data": data}], **load}) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "sent\n"


@contextlib.contextmanager
def attacker(master: SaltMaster) -> Iterator[Attacker]:
    command = [sys.executable, "-c", ATTACK, str(master.config_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        mallory = Attacker(process)
        mallory.fire("mallory/is/here", {})  # connected, and its key accepted
        yield mallory


def forged(jid: str, minion: str = VICTIM) -> dict[str, Any]:
    """A return that its minion never sent, as like a genuine one as can be."""
    return {"cmd": "_return", "id": minion, "jid": jid, "return": "forged", "retcode": 0, "success": True,
            "fun": "test.sleep", "fun_args": ["forged"], "user": "root"}  # fmt: skip


def ret(jid: str, minion: str = VICTIM) -> str:
    return f"salt/job/{jid}/ret/{minion}"


def unknown_jid(number: int = 0) -> str:
    """A jid of a minute ago that no master gave."""
    moment = datetime.now(timezone.utc) - timedelta(minutes=1)
    return f"{moment:%Y%m%d%H%M%S}{number:06d}"


def cached(site: Site, jid: str) -> Path:
    """Where the master's job cache has the victim's return to a job (``jid_dir``, salt/utils/jid.py 3006-3008)."""
    name = hashlib.sha256(jid.encode()).hexdigest()
    return site.master.directory / "cache" / "jobs" / name[:2] / name[2:] / VICTIM / "return.p"


def dead_letters(site: Site) -> list[dict[str, Any]]:
    return list(site.master.run(f"{ENGINE}.dead_letters", "limit=10000"))


@pytest.mark.smoke
def test_what_one_minion_forges_in_the_name_of_another_is_never_a_row(make_site: Callable[..., Site]) -> None:
    site = make_site(verify_wait_seconds=WAIT)
    with site.master, site.minion(VICTIM), attacker(site.master) as mallory:
        unknown, invented = unknown_jid(1), unknown_jid(2)
        before = site.status()["books"]
        # Of a job that does not exist, and the job itself: "new" passes Salt's blacklist, and "pretag" makes it whole.
        mallory.fire(ret(unknown), forged(unknown))
        load = {"tgt": VICTIM, "tgt_type": "glob", "fun": "forged", "arg": [], "user": "root", "minions": [VICTIM]}
        mallory.fire("new", {"jid": invented, **load}, pretag=f"salt/job/{invented}")
        # Of a job that does, before the genuine return; and of a minion that the job was not for.
        jid = publish(site, VICTIM, "test.sleep", "3")
        mallory.fire(ret(jid), forged(jid))
        mallory.fire(ret(jid, "nobody"), forged(jid, "nobody"))
        mallory.fire("new", {"jid": jid, **load}, pretag=f"salt/job/{jid}")
        # The same as somebody's runner, and with nothing in it that the genuine one has.
        for kind in ("run", "wheel"):
            of_master = {"fun": f"{kind}ner.forged" if kind == "run" else "wheel.forged", "user": "forged"}
            mallory.fire("new", {"jid": jid, "fun_args": ["forged"], **of_master}, pretag=f"salt/{kind}/{jid}")
        mallory.fire(ret(jid), {"id": VICTIM, "jid": jid, "return": True})
        assert not site.database.sql("SELECT * FROM salt_returns WHERE jid = %s", jid)  # else the attack came too late
        wait_until(cached(site, jid).exists, timeout=PATIENCE, what="the genuine return")
        began = time.monotonic()
        row = site.returned(jid, VICTIM)[VICTIM]
        assert time.monotonic() - began < AT_ONCE
        # And after it.
        mallory.fire(ret(jid), forged(jid))
        wait_until(lambda: site.status()["books"]["dead_letters"] >= 3, timeout=PATIENCE, what="dead letters")
        assert site.master.salt(VICTIM, "test.true") == {VICTIM: True}
        site.wait_for("SELECT jid FROM salt_returns WHERE fun = 'test.true' AND id = %s", VICTIM)

        assert (row["return"], row["success"], row["fun"]) == ("true", "1", "test.sleep")
        assert site.returned(jid, VICTIM) == {VICTIM: row}
        assert json.loads(row["full_ret"])["fun_args"] == [3]
        assert json.loads(row["full_ret"])["user"]
        assert json.loads(site.load(jid) or "")["fun"] == "test.sleep"
        for table, column in (("salt_returns", "full_ret"), ("jids", "load")):
            assert site.database.sql(f"SELECT * FROM {table} WHERE `{column}` LIKE '%forged%'") == []
        assert site.load(unknown) is None and site.load(invented) is None
        letters = dead_letters(site)
        assert sorted((letter["jid"], letter["minion"]) for letter in letters) == sorted(
            [(unknown, VICTIM), (invented, ""), (jid, "nobody")]
        )
        assert {letter["error"] for letter in letters} == {f"not in the master's job cache within {WAIT:g} s"}
        books = site.status()["books"]
        assert books["ignored"]["unconfirmed_start"] >= 2
        assert books["duplicates"] >= before["duplicates"] + 3  # of the genuine return: before it and after it
        assert books["dropped"] == {}


def test_thousands_of_forged_returns_delay_no_genuine_one(make_site: Callable[..., Site]) -> None:
    site = make_site(verify_wait_seconds=WAIT)
    count = 2000
    with site.master:
        lab = lab_of(site)
        jids = [unknown_jid(number) for number in range(count)]
        bodies = [f"{ret(jid)}\n\n".encode() + msgpack.packb(forged(jid), use_bin_type=True) for jid in jids]
        with lab.produce(1, bus=0.0, contradicted=0.0) as producer:
            site.wait_for("SELECT jid FROM salt_returns LIMIT 1")
            for start in range(0, count, 500):
                fire_raw(site.master, *bodies[start : start + 500])
                go_on(producer, 20)
            producer.stop()
        assert lab.oracle.arrived(AT_ONCE) < AT_ONCE
        lags = site.status()["database"]["commit_lag_seconds"]
        assert lags["p99"] < AT_ONCE
        wait_until(lambda: site.status()["books"]["dead_letters"] >= count, timeout=PATIENCE, what="dead letters")
        status = lab.oracle.check()
        assert (status["books"]["dead_letters"], status["books"]["dropped"]) == (count, {})
        assert {letter["jid"] for letter in dead_letters(site)} == set(jids)


@pytest.mark.long
def test_a_flood_of_forged_returns_is_counted_to_the_last_one(make_site: Callable[..., Site]) -> None:
    """More than there is room for among the dead letters: what is given up is counted, with its reason."""
    site = make_site(verify_wait_seconds=1.0, dead_letters_max=100)
    count = 2000
    with site.master:
        lab = lab_of(site)
        wait_until(lambda: site.status()["bus"]["connected"], timeout=PATIENCE, what="the bus")
        jids = [unknown_jid(number) for number in range(count)]
        fire_raw(
            site.master,
            *(f"{ret(jid)}\n\n".encode() + msgpack.packb(forged(jid), use_bin_type=True) for jid in jids),
        )

        def given_up() -> int:
            books = site.status()["books"]
            return int(books["dead_letters"] + sum(books["dropped"].values()))

        wait_until(lambda: given_up() >= count, timeout=PATIENCE, what="the last of them", interval=0.5)
        books = lab.oracle.check()["books"]
        assert (books["dead_letters"], sum(books["dropped"].values())) == (100, count - 100)
