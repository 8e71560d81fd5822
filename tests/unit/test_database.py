"""What the two ways to a server say and do not say to a stranger, and what a server's errors mean."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pymysql
import pytest

from salt_mysql_engine import errors
from salt_mysql_engine.database import Database, translate
from salt_mysql_engine.pool import Pool
from salt_mysql_engine.settings import Connection
from tests.support.certificates import Authority

PASSWORD = "TOPSECRET"
_LOOPBACK = "127.0.0.1"
_CLEAR = ("mysql_clear_password", "mysql_old_password")


def greeting(plugin: str) -> bytes:
    """The first word of a server without TLS; it says by which plugin it wants the password."""
    return (
        b"\x0a5.7.0-stranger\0" + bytes(4) + b"saltsalt\0"
        b"\xff\xf7\x2d\x02\x00\x08\x00\x15" + bytes(10) + b"saltsaltsalt\0" + plugin.encode() + b"\0"
    )  # fmt: skip


def packet(number: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "little") + bytes([number]) + content


async def heard(first: bytes, switch: bytes, ask: Callable[[Connection], Awaitable[None]], **tls: str) -> bytes:
    """All that a stranger's server hears of who logs in."""
    said = bytearray()
    done = asyncio.Event()

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            writer.write(packet(0, first))
            said.extend(await reader.read(4096))
            if said and switch:
                writer.write(packet(2, switch))
                said.extend(await reader.read())
        done.set()

    async with await asyncio.start_server(stranger, _LOOPBACK, 0) as server:
        port = server.sockets[0].getsockname()[1]
        opts = {"mysql.host": _LOOPBACK, "mysql.port": port, "mysql.user": "salt", "mysql.pass": PASSWORD}
        await ask(Connection.from_opts({**opts, **tls}))
        await asyncio.wait_for(done.wait(), 10)
    return bytes(said)


async def _by_engine(to: Connection) -> None:
    with pytest.raises(errors.OperatorNeeded, match=r"in the clear|no TLS"):
        await Database(lambda: to, connect_timeout=5, statement_timeout=5).open()


async def _by_returner(to: Connection) -> None:
    with pytest.raises(errors.SettingsError, match=r"in the clear|no TLS"):
        await asyncio.to_thread(Pool(to, 5).query, "SELECT 1")


both = pytest.mark.parametrize("ask", [_by_engine, _by_returner])


@both
@pytest.mark.parametrize("plugin", _CLEAR)
async def test_nothing_is_said_to_a_server_that_wants_the_password_in_the_clear_at_once(
    ask: Callable[[Connection], Awaitable[None]], plugin: str
) -> None:
    assert await heard(greeting(plugin), b"", ask) == b""


@both
@pytest.mark.parametrize("plugin", _CLEAR)
async def test_the_password_is_not_said_to_a_server_that_comes_to_want_it_in_the_clear(
    ask: Callable[[Connection], Awaitable[None]], plugin: str
) -> None:
    said = await heard(greeting("mysql_native_password"), b"\xfe" + plugin.encode() + b"\0", ask)
    assert b"salt\0" in said
    assert PASSWORD.encode() not in said


@both
@pytest.mark.parametrize("plugin", ["mysql_native_password", "mysql_clear_password"])
async def test_nothing_is_said_to_a_server_without_tls_where_tls_is_asked_for(
    ask: Callable[[Connection], Awaitable[None]], plugin: str, tmp_path: Path
) -> None:
    ca = str(Authority(tmp_path).pair.certificate)
    assert await heard(greeting(plugin), b"", ask, **{"mysql.ssl_ca": ca}) == b""


def _meaning(number: int, text: str = "what the server says") -> errors.DatabaseError:
    return translate(pymysql.err.OperationalError(number, text), "host:1")


@pytest.mark.parametrize(
    ("numbers", "meaning"),
    [
        (
            (
                1406,
                1366,
                1264,
                1265,
                1292,
                1048,
                1062,
                1300,
                1153,
                1118,
                1452,
                1644,
                1365,
                1690,
                3141,
                3157,
                3751,
                3903,
            ),
            errors.RowsRejected,
        ),
        ((3140, 3819, 3988, 4025), errors.RowsRejected),
        ((1197, 1206, 1969, 3024), errors.TooMuch),
        ((1205, 1213, 1317, 3101, 1020, 1412, 1615, 8002, 8005, 8022, 8028, 9007), errors.TransactionAborted),
        ((2006, 2013, 1927, 4031), errors.ConnectionLost),
        ((1203, 1226), errors.TooManySessions),
        ((1040, 1053, 1047, 1290, 1021, 1114, 1180, 1792, 1836, 2000, 2001, 2002, 2003), errors.ServerUnavailable),
        ((1026, 1030, 1037, 1038, 1041, 1637, 9001, 9002, 9003, 9004, 9005), errors.ServerUnavailable),
        ((1045, 1044, 1049, 1142, 1143, 1227, 1146, 1184, 1356, 1449, 1709, 1071, 3159, 1054), errors.OperatorNeeded),
        ((1364, 1130, 1129, 1862, 1820, 1665, 1698, 2059, 3118, 4151), errors.OperatorNeeded),
        ((1242, 9999), errors.UnknownRefusal),
    ],
)
def test_an_error_of_the_server_means_what_is_done_about_it(numbers: tuple[int, ...], meaning: type) -> None:
    for number in numbers:
        error = _meaning(number)
        assert type(error) is meaning, number
        assert str(error).startswith(f"host:1: what the server says ({number})")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (1045, "check mysql.user and mysql.pass"),
        (1049, "create the database"),
        (1146, "create the tables"),
        (1184, "init_connect"),
        (1709, "ROW_FORMAT=DYNAMIC|DYNAMIC"),
        (3159, "mysql.ssl_ca"),
        (1197, "max_binlog_cache_size"),
        (1969, "max_statement_time"),
        (1203, "MAX_USER_CONNECTIONS"),
        (9999, "look this number up"),
    ],
)
def test_an_error_that_a_person_can_mend_says_how(number: int, remedy: str) -> None:
    assert any(words in str(_meaning(number)) for words in remedy.split("|"))


def test_a_privilege_that_is_missing_is_named() -> None:
    for number in (1142, 1143):
        said = str(_meaning(number, "SELECT, INSERT command denied to user 'salt'@'%' for table `salt`.`jids`"))
        assert "GRANT SELECT, INSERT on the database" in said
    assert "grant the user" in str(_meaning(1142, "denied in words that nobody knows"))


@pytest.mark.parametrize("name", ["jids", "salt_returns", "salt_events", "salt_returns_archive"])
def test_a_missing_table_of_ours_is_answered_with_how_to_make_it(name: str) -> None:
    assert "create the tables" in str(_meaning(1146, f"Table 'salt.{name}' doesn't exist"))


@pytest.mark.parametrize("name", ["audit", "jids_audit", "archive"])
def test_a_missing_table_of_somebody_elses_is_named(name: str) -> None:
    said = str(_meaning(1146, f"Table 'salt.{name}' doesn't exist"))
    assert f"{name} is no table of Salt's" in said
    assert "create the tables" not in said


def test_what_a_driver_raises_is_never_a_verdict_on_rows() -> None:
    for exc in (RuntimeError("Packet sequence number wrong"), pymysql.err.InternalError("no number"), KeyError(3)):
        assert type(translate(exc, "host:1")) is errors.ConnectionLost
    missing = RuntimeError("'cryptography' package is required for sha256_password")
    assert type(translate(missing, "host:1")) is errors.OperatorNeeded


def test_tls_that_fails_is_named_wherever_the_driver_keeps_it() -> None:
    broken = ssl.SSLError("certificate verify failed")
    beside = pymysql.err.OperationalError(2003, "no connection")
    beside.original_exception = broken  # type: ignore[attr-defined]
    behind = pymysql.err.OperationalError(2003, "no connection")
    behind.__cause__ = broken
    for exc in (broken, beside, behind):
        error = translate(exc, "host:1")
        assert type(error) is errors.OperatorNeeded
        assert "TLS failed" in str(error)
