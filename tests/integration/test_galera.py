"""A Galera node that is not ready (1047): it takes our login and none of our statements, and is waited for or left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_outages import all_arrive, catches_up, numbered
from tests.support.galera import PACKAGE, GaleraNode, find_library
from tests.support.mariadb import MariaDB, free_port
from tests.support.proxy import Proxy
from tests.support.scratch import PASSWORD, Scratch, scratch
from tests.support.shipping import Shipping

LIBRARY = find_library()

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(LIBRARY is None, reason=f"needs Galera's library: apt-get install {PACKAGE}"),
]

Make = Callable[..., Shipping]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GaleraNode]:
    """A Galera node. A test that makes it not ready makes it ready again."""
    assert LIBRARY is not None
    with GaleraNode(tmp_path_factory.mktemp("galera"), LIBRARY) as made:
        yield made


@pytest.fixture
def database(node: GaleraNode) -> Iterator[Scratch]:
    """The test's database, on the node: `shipping` ships there."""
    with scratch(node) as made:
        yield made
        node.mend()


def leaves(node: GaleraNode) -> Callable[[], None]:
    node.leave()
    return node.come_back


def rejects(node: GaleraNode) -> Callable[[], None]:
    node.reject()
    return node.accept


Fault = Callable[[GaleraNode], Callable[[], None]]
NOT_READY = pytest.mark.parametrize("fault", [leaves, rejects])


@NOT_READY
async def test_returns_wait_for_a_galera_node_that_is_not_ready(
    node: GaleraNode, database: Scratch, shipping: Make, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    async with shipping() as ship:
        await ship.ship(*numbered(1, 5))
        mend = await asyncio.to_thread(fault, node)
        await ship.take(*numbered(6, 10))
        await ship.fail(3)
        assert "(1047)" in ship.fault
        assert (await ship.books())["pending"] == 5
        await asyncio.to_thread(mend)
        await catches_up(ship, database, count=10)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_transaction_that_a_galera_node_breaks_off_is_sent_again_as_a_whole(
    node: GaleraNode, database: Scratch, shipping: Make
) -> None:
    with Proxy(node.host, node.port) as proxy:
        async with shipping(mysql={"mysql.port": proxy.port}) as ship:
            await ship.ship(*numbered(1, 5))
            proxy.delay(0.2)  # so that the node stops between two statements of a batch
            await ship.take(*numbered(6, 10))
            delayed = proxy.delayed
            await ship.until(lambda: proxy.delayed > delayed)
            node.reject()
            proxy.heal()
            await ship.fail(1)
            assert "(1047)" in ship.fault
            node.accept()
            books = await catches_up(ship, database, count=10)
            assert books["duplicates"] == 0


@pytest.fixture
def other(database: Scratch, tmp_path: Path) -> Iterator[Scratch]:
    """A server that is well, with an empty database and an account of the same name. It is no node of the cluster."""
    with MariaDB(tmp_path / "other") as server:
        server.create_database(database.name, database.name, PASSWORD)
        yield Scratch(server, database.name)


@NOT_READY
async def test_the_next_host_takes_over_from_a_galera_node_that_is_not_ready(
    node: GaleraNode,
    database: Scratch,
    other: Scratch,
    shipping: Make,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("salt_mysql_engine.writer.HOME_PROBE_SECONDS", 0.1, raising=False)
    port = free_port()
    with (
        Proxy(node.host, node.port, host="127.0.0.2", port=port) as first,
        Proxy(other.server.host, other.server.port, host="127.0.0.3", port=port) as second,
    ):
        mysql: dict[str, Any] = {"mysql.host": [first.host, second.host], "mysql.port": port}
        async with shipping(mysql=mysql) as ship:
            await ship.ship(*numbered(1, 5))
            assert ship.writer.server_host == f"{first.host}:{port}"
            mend = await asyncio.to_thread(fault, node)
            tried = first.connections
            for number in range(6, 16):  # batches, between which the writer could go back
                await ship.ship(*numbered(number, number))
                assert ship.writer.server_host == f"{second.host}:{port}"
                await asyncio.sleep(0.03)
            assert first.connections > tried
            await asyncio.to_thread(mend)
            assert database.count("salt_returns") == 5
            await all_arrive(ship, database, other, count=15)
