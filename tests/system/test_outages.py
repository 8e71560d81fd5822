"""Whole outages: of the database for ten minutes, of the engine for an hour, of a reader that the bus throws off."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.mariadb import wait_until
from tests.support.producer import Load
from tests.system.conftest import ENGINE, Site
from tests.system.test_crashes import lab_of
from tests.system.test_faults import SERIES

pytestmark = pytest.mark.faults

MEBIBYTE = 1024 * 1024


def peak_rss(process: psutil.Process) -> int:
    """The most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def journal_count(site: Site, statement: str) -> int:
    """A number from the journal, read beside the engine."""
    path = site.master.directory / "cache" / ENGINE / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as journal:
        ((number,),) = journal.execute(statement).fetchall()
    return int(number or 0)


@pytest.mark.long
def test_an_outage_of_a_hundred_thousand_returns_costs_none_of_them_and_little_memory(
    make_site: Callable[..., Site],
) -> None:
    """What a fleet of 10,000 returns in ten minutes, while the database is down."""
    returns, producers = 100_000, 2
    # Two producers at full speed are a burst that 3008 may throw its readers off for.
    site = make_site({"pub_server_write_queue_size": 100_000}, flush_interval=1.0)
    server = site.database.server
    with site.master, contextlib.ExitStack() as running:
        lab = lab_of(site)
        engine = site.engine()
        (publisher,) = site.master.find_processes("EventPublisher")

        def bulk(number: int, count: int) -> Load:
            return Load(
                seed=number, name=f"bulk{number}", minions=500, jobs_of=500, bus=1.0, returns=count, large=0.0001
            )

        with lab.oracle.producer(bulk(0, 2000)) as warm_up:
            assert warm_up.wait(60) == 2000
        lab.oracle.arrived(60)
        warm = publisher.memory_info().rss
        server.kill()
        began = time.monotonic()
        load = [
            running.enter_context(lab.oracle.producer(bulk(number, returns // producers)))
            for number in range(1, producers + 1)
        ]
        assert sum(producer.wait(400) for producer in load) == returns
        produced = time.monotonic() - began

        def pending() -> int:
            return journal_count(site, "SELECT COUNT(*) FROM events")

        wait_until(lambda: pending() >= returns, timeout=60, what="all of them in the journal", interval=0.5)
        status = site.status()
        assert status["database"]["failing"] and status["database"]["retries"] > 0
        assert status["bus"]["connects"] == 1
        grown = publisher.memory_info().rss - warm
        size = status["journal"]["bytes"]
        server.start()
        began = time.monotonic()
        wait_until(lambda: pending() < 100, timeout=300, what="an empty journal", interval=0.2)
        caught_up = time.monotonic() - began
        status = lab.oracle.check(120)
        books = status["books"]
        print(
            f"\n{returns:,} returns in {produced:.0f} s ({returns / produced:,.0f}/s), journal {size / 1e6:.0f} MB; "
            f"caught up in {caught_up:.1f} s ({returns / caught_up:,.0f} rows/s); engine's peak RSS "
            f"{peak_rss(engine) / 1e6:.0f} MB; EventPublisher {warm / 1e6:.0f} MB and {grown / 1e6:+.1f} MB; {books}"
        )
        assert status["engine"]["pid"] == engine.pid
        assert peak_rss(engine) < 150 * MEBIBYTE
        assert grown < 20 * MEBIBYTE
        assert (books["dead_letters"], books["dropped"]) == (0, {})
    shutil.rmtree(site.master.directory / "cache" / "jobs")  # a gigabyte that nobody wants to keep


def test_what_came_while_there_was_no_engine_is_in_mysql_within_a_minute_of_its_start(
    make_site: Callable[..., Site],
) -> None:
    site = make_site()
    engines, site.master.config["engines"] = site.master.config["engines"], []
    lab = lab_of(site)
    with site.master, lab.produce(1, minions=20, jobs_of=20, bus=0.0, rate=0.0, returns=2000) as producer:
        assert producer.wait(120) == 2000
    assert len(lab.oracle.missing()) == 2000
    site.master.config["engines"] = engines
    with site.master:
        site.engine()
        seconds = lab.oracle.arrived(60)
        print(f"\n2,000 returns reconciled in {seconds:.1f} s after the start")
        status = lab.oracle.check()
        assert status["reconcile"]["last"]["returns_added"] == 2000
        assert (status["books"]["dead_letters"], status["books"]["dropped"]) == (0, {})


@pytest.mark.long
def test_a_reader_that_the_bus_throws_off_misses_nothing(make_site: Callable[..., Site]) -> None:
    """An engine that does not get a CPU for long: 3007 and 3008 close its connection, 3006 waits."""
    site = make_site({"pub_server_write_queue_size": 100, "publish_drain_timeout": 1.0})
    with site.master:
        lab = lab_of(site)
        engine = site.engine()
        with lab.produce(2, bus=0.5, rate=0.0) as producer:
            site.wait_for("SELECT jid FROM salt_returns LIMIT 1")
            engine.send_signal(signal.SIGSTOP)
            accepted = producer.accepted
            try:
                wait_until(lambda: producer.accepted > accepted + 1500, timeout=60, what="a burst", interval=0.2)
            finally:
                engine.send_signal(signal.SIGCONT)
            producer.stop()
        status = lab.oracle.check()
        assert status["engine"]["pid"] == engine.pid
        assert (status["books"]["dead_letters"], status["books"]["dropped"]) == (0, {})
        if SERIES >= 3007:
            assert status["bus"]["connects"] > 1  # else nobody was thrown off
