"""The engine, the database and the master are killed under load: every accepted return is in MySQL once, and right."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
import pytest

from tests.support.mariadb import MariaDB, wait_until
from tests.support.oracle import Key, Oracle
from tests.support.producer import Load, Producer
from tests.support.scratch import scratch
from tests.system.conftest import ENGINE, PATIENCE, Site, ended
from tests.system.test_faults import SERIES

pytestmark = pytest.mark.faults

LOAD: dict[str, Any] = {"minions": 12, "rate": 100.0, "twice": 0.1, "contradicted": 0.02}
SEED = 20261123


class Lab(NamedTuple):
    """A site, and the oracle over everything that was produced at it."""

    site: Site
    oracle: Oracle

    def produce(self, seed: int, **load: Any) -> Producer:
        """A load to break things under."""
        return self.oracle.producer(Load(seed=seed, **{**LOAD, **load}))


def lab_of(site: Site) -> Lab:
    """A site with its oracle."""
    return Lab(site, Oracle(site.master, site.database, site.status, site.master.directory.parent / "ledgers"))


@pytest.fixture(scope="module")
def lab(mariadb: MariaDB, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One master for all: each test leaves it running, with everything delivered."""
    with scratch(mariadb) as database:
        site = Site(tmp_path_factory.mktemp("crashes") / "site", database, {}, batch_size=100)
        with site.master:
            yield lab_of(site)


def flowing(lab: Lab, producer: Producer) -> None:
    """Wait until the load is on its way through."""
    wait_until(lambda: producer.accepted > 0, timeout=4 * PATIENCE, what="the first accepted return", interval=0.1)
    lab.site.wait_for("SELECT jid FROM salt_returns LIMIT 1")


def let_an_instant_come(lab: Lab, dice: random.Random) -> None:
    """Any instant at all, or the one after a COMMIT, when the journal may not know of it yet."""
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0.0, 1.0))
        return
    before = lab.site.database.count("salt_returns")
    deadline = time.monotonic() + 2.0  # a load that stands still has its instants, too
    while lab.site.database.count("salt_returns") == before and time.monotonic() < deadline:
        time.sleep(0.001)


def go_on(producer: Producer, returns: int) -> None:
    """Wait until the master has taken so many more returns."""
    enough = producer.accepted + returns
    wait_until(lambda: producer.accepted >= enough, timeout=60, what=f"{returns} more returns", interval=0.1)


def come_rows(lab: Lab) -> None:
    """Wait until the engine writes."""
    before = lab.site.database.count("salt_returns")
    wait_until(lambda: lab.site.database.count("salt_returns") > before, timeout=PATIENCE, what="a row", interval=0.05)


def next_engine(site: Site, *before: psutil.Process) -> psutil.Process:
    """The engine that Salt starts after the others."""
    pids = {process.pid for process in before}

    def others() -> list[psutil.Process]:
        return [process for process in site.master.engine_processes(ENGINE) if process.pid not in pids]

    # Looking at every process of the machine is dear, and Salt looks every ten seconds.
    wait_until(lambda: bool(others()), timeout=PATIENCE, what="another engine", interval=0.3)
    return others()[0]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_an_engine_that_is_killed_again_and_again_loses_no_accepted_return(lab: Lab, kills: int) -> None:
    dice = random.Random(SEED)
    engines, unseen = [lab.site.engine()], 0
    duplicates = lab.site.status()["books"]["duplicates"]
    with lab.produce(SEED + kills) as producer:
        flowing(lab, producer)
        for _ in range(kills):
            let_an_instant_come(lab, dice)
            engines[-1].kill()
            accepted = producer.accepted
            engines.append(next_engine(lab.site, *engines))
            unseen += producer.accepted - accepted
        go_on(producer, 100)
        producer.stop()
    assert len({engine.pid for engine in engines}) == kills + 1
    assert unseen > 0  # the master went on without an engine
    books = lab.oracle.check()["books"]
    assert books["duplicates"] > duplicates
    assert (books["dead_letters"], books["dropped"]) == (0, {})


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_a_database_that_is_killed_again_and_again_loses_no_accepted_return(lab: Lab, kills: int) -> None:
    dice = random.Random(SEED)
    engine, server = lab.site.engine(), lab.site.database.server
    retries = lab.site.status()["database"]["retries"]
    with lab.produce(SEED + kills) as producer:
        flowing(lab, producer)
        for _ in range(kills):
            let_an_instant_come(lab, dice)
            server.kill()
            time.sleep(dice.uniform(0.0, 2.0))
            server.start()
            come_rows(lab)
        producer.stop()
    status = lab.oracle.check()
    assert status["database"]["retries"] >= retries + kills
    assert (status["books"]["dead_letters"], status["books"]["dropped"]) == (0, {})
    assert status["engine"]["pid"] == engine.pid


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.long)])
def test_engine_and_database_that_die_together_lose_no_accepted_return(lab: Lab, rounds: int) -> None:
    dice = random.Random(SEED)
    engines, server = [lab.site.engine()], lab.site.database.server
    with lab.produce(SEED + rounds) as producer:
        flowing(lab, producer)
        for _ in range(rounds):
            let_an_instant_come(lab, dice)
            for kill in dice.sample([engines[-1].kill, server.kill], 2):
                kill()
                time.sleep(dice.uniform(0.0, 0.3))
            if dice.random() < 0.5:  # the engine comes back to a database that is there, or is not
                time.sleep(dice.uniform(0.0, 1.0))
                server.start()
                engines.append(next_engine(lab.site, *engines))
            else:
                engines.append(next_engine(lab.site, *engines))
                wait_until(lambda: lab.site.status()["database"]["retries"] > 0, timeout=PATIENCE, what="a retry")
                server.start()
        producer.stop()
    assert len({engine.pid for engine in engines}) == rounds + 1
    books = lab.oracle.check()["books"]
    assert (books["dead_letters"], books["dropped"]) == (0, {})


def test_an_engine_that_is_killed_while_the_database_hangs_loses_no_accepted_return(lab: Lab) -> None:
    engine, server = lab.site.engine(), lab.site.database.server
    with lab.produce(SEED + 30) as producer:
        flowing(lab, producer)
        server.freeze()
        go_on(producer, 200)
        engine.kill()
        another = next_engine(lab.site, engine)
        go_on(producer, 100)
        server.thaw()
        producer.stop()
    status = lab.oracle.check()
    assert status["engine"]["pid"] == another.pid
    assert (status["books"]["dead_letters"], status["books"]["dropped"]) == (0, {})


def test_an_engine_that_is_told_to_stop_under_load_loses_no_accepted_return(lab: Lab) -> None:
    engine = lab.site.engine()
    with lab.produce(SEED + 40) as producer:
        flowing(lab, producer)
        for _ in range(3):  # as Salt does
            engine.send_signal(signal.SIGTERM)
        wait_until(lambda: ended(engine), timeout=5.0, what="the engine's end")
        accepted = producer.accepted
        another = next_engine(lab.site, engine)
        assert producer.accepted > accepted  # the master went on without an engine
        producer.stop()
    status = lab.oracle.check()
    assert status["engine"]["pid"] == another.pid
    assert (status["books"]["dead_letters"], status["books"]["dropped"]) == (0, {})


@pytest.mark.parametrize("way", ["kill", pytest.param("stop", marks=pytest.mark.long)])
def test_a_master_that_goes_down_under_load_and_comes_back_has_lost_no_accepted_return(
    make_site: Callable[..., Site], way: str
) -> None:
    """But for what Salt's own cache refuses: then the return is a dead letter.

    A worker that dies between making the minion's folder and renaming ``return.p`` into it (salt/returners/
    local_cache.py 3006-3008) leaves a folder that keeps the minion's second attempt out of the cache for good. One that
    dies while it writes the ``jid`` file anew leaves that empty, until the job's next return: hence another pass.
    """
    site = make_site()
    with site.master:
        lab = lab_of(site)
        engine = site.engine()
        with lab.produce(SEED, bus=0.0) as producer:
            flowing(lab, producer)
            getattr(site.master, way)()
            site.master.start()
            go_on(producer, 100)
            producer.stop()
        torn = lab.oracle.torn()
        status = lab.oracle.check(but=torn)
        assert status["engine"]["pid"] != engine.pid
        assert status["books"]["dropped"] == {}

        def accounted_for() -> bool:
            letters = site.master.run(f"{ENGINE}.dead_letters")
            return torn <= lab.oracle.stored() | {Key(letter["jid"], letter["minion"]) for letter in letters}

        wait_until(accounted_for, timeout=PATIENCE, what=f"rows or dead letters of {torn}", interval=1.0)


@pytest.mark.skipif(SERIES >= 3008, reason="salt-master 3008.3 cannot start a second EventPublisher")
def test_a_bus_that_dies_under_load_costs_no_accepted_return(make_site: Callable[..., Site]) -> None:
    """The first events that 3006's workers fire at a new bus are lost without a gap that anybody could see."""
    site = make_site()
    with site.master:
        lab = lab_of(site)
        with lab.produce(SEED, bus=0.0) as producer:
            flowing(lab, producer)
            (publisher,) = site.master.find_processes("EventPublisher")
            publisher.kill()
            wait_until(lambda: site.status()["bus"]["connects"] > 1, timeout=PATIENCE, what="a new bus")
            go_on(producer, 100)
            producer.stop()
        books = lab.oracle.check()["books"]
        assert (books["dead_letters"], books["dropped"]) == (0, {})
