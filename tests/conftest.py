"""Fixtures of the tests against a real database server: one server for the session, a database for each test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import pool
from tests.support.mariadb import MariaDB, Server
from tests.support.mysql import MySQL
from tests.support.scratch import Scratch, scratch
from tests.support.shipping import Cache, Shipping


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long``: the whole fault suite."""
    parser.addoption("--long", action="store_true", help="also run the tests marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that are marked long run only when asked for."""
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def product() -> type[Server]:
    """The database server that the tests run against: MariaDB, or what the variable SERVER says (mysql)."""
    return {"mariadb": MariaDB, "mysql": MySQL}[os.environ.get("SERVER", "mariadb")]


@pytest.fixture(scope="session")
def mariadb(product: type[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The session's server. A test may stop, kill or freeze it: its `database` mends that afterwards."""
    with product(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def database(mariadb: Server) -> Iterator[Scratch]:
    """An empty database and its account on the session's server, both gone after the test."""
    with scratch(mariadb) as made:
        yield made


@pytest.fixture
def shipping(database: Scratch, tmp_path: Path) -> Callable[..., Shipping]:
    """Makes a `Shipping` to the test's database. `journal` names its journal, `mysql` changes the connection."""

    def make(journal: str = "journal", *, mysql: Mapping[str, Any] | None = None, **options: Any) -> Shipping:
        return Shipping(tmp_path / journal, {**database.mysql, **(mysql or {})}, **options)

    return make


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """The test's job cache."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def verifying(shipping: Callable[..., Shipping], cache: Cache) -> Callable[..., Shipping]:
    """Makes a `Shipping` that verifies with the test's job cache."""

    def make(journal: str = "journal", **options: Any) -> Shipping:
        return shipping(journal, cachedir=cache.cachedir, **{"flush_interval": 0.05, **options})

    return make


@pytest.fixture
def own_connections() -> Iterator[None]:
    """The test has its own reading connections."""
    pool._pools.clear()
    yield
    for each in pool._pools.values():
        if each._idle is not None:
            each._idle.close()
    pool._pools.clear()
