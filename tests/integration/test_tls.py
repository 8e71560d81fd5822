"""Ways to log in: TLS with and without certificates, the unix socket, passwords."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine.errors import OperatorNeeded, ServerUnavailable, SettingsError
from salt_mysql_engine.reader import Reader
from tests.support.certificates import Authority, Pair
from tests.support.mariadb import LOOPBACK, Server
from tests.support.scratch import Scratch, scratch
from tests.support.shipping import Shipping, returns


@dataclasses.dataclass(frozen=True)
class Secure:
    """A server with TLS, the authority behind its certificate, and a certificate for a client."""

    server: Server
    authority: Authority
    client: Pair

    @property
    def ca(self) -> dict[str, str]:
        return {"mysql.ssl_ca": str(self.authority.pair.certificate)}

    @property
    def certificate(self) -> dict[str, str]:
        return {"mysql.ssl_cert": str(self.client.certificate), "mysql.ssl_key": str(self.client.key)}


@pytest.fixture(scope="module")
def secure(product: type[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    directory = tmp_path_factory.mktemp("certificates")
    authority = Authority(directory)
    server = authority.sign("server", address=LOOPBACK)
    options = [
        f"--ssl-ca={authority.pair.certificate}",
        f"--ssl-cert={server.certificate}",
        f"--ssl-key={server.key}",
    ]
    with product(tmp_path_factory.mktemp("secure"), options=options) as running:
        yield Secure(running, authority, authority.sign("client"))


@pytest.fixture
def guarded(secure: Secure) -> Iterator[Scratch]:
    """An empty database on the server with TLS."""
    with scratch(secure.server) as made:
        yield made


async def cipher(directory: Path, database: Scratch, mysql: Mapping[str, Any]) -> str:
    """Log in, ship a batch, and say by which cipher; the session's own word and the server's must agree."""
    async with Shipping(directory, {**database.mysql, **mysql}) as ship:
        await ship.take(*returns(20, value="x" * 50_000))
        await ship.drain(timeout=10)
        session = await ship.open_session()
        try:
            ((_, on_server),) = await session.query("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
        finally:
            session.close()
    assert database.count("salt_returns") == 20
    assert session.tls_cipher == on_server
    return str(on_server)


async def refusal(directory: Path, database: Scratch, mysql: Mapping[str, Any]) -> str:
    """What the log tells the person when nobody takes us; the events wait."""
    async with Shipping(directory, {**database.mysql, **mysql}) as ship:
        await ship.take(*returns(3))
        await ship.fail(2)
        assert (await ship.books())["pending"] == 3
        with pytest.raises(OperatorNeeded) as caught:
            await ship.open_session()
        assert str(caught.value) == ship.fault
    assert database.sql("SHOW TABLES") == []
    return ship.fault


async def test_with_an_authority_the_connection_is_encrypted(secure: Secure, guarded: Scratch, tmp_path: Path) -> None:
    guarded.sql(f"ALTER USER `{guarded.name}` REQUIRE SSL")
    assert await cipher(tmp_path, guarded, secure.ca)


async def test_the_returner_reads_over_tls_too(secure: Secure, guarded: Scratch, tmp_path: Path) -> None:
    guarded.sql(f"ALTER USER `{guarded.name}` REQUIRE SSL")
    await cipher(tmp_path, guarded, secure.ca)
    reader = Reader({**guarded.mysql, **secure.ca})
    assert len(await asyncio.to_thread(reader.minions)) == 20


async def test_the_returner_does_not_read_in_the_clear_when_tls_is_asked_for(secure: Secure, database: Scratch) -> None:
    if database.server.is_mysql:
        pytest.skip("MySQL always has a certificate")
    reader = Reader({**database.mysql, **secure.ca})
    with pytest.raises((ServerUnavailable, SettingsError)):
        await asyncio.to_thread(reader.minions)


async def test_a_certificate_that_expires_while_it_runs_is_named_and_its_renewal_is_enough(
    secure: Secure, guarded: Scratch, tmp_path: Path
) -> None:
    async with Shipping(tmp_path, {**guarded.mysql, **secure.ca}) as ship:
        await ship.ship(*returns(2))
        secure.authority.sign("server", address=LOOPBACK, hours=-1)
        await asyncio.to_thread(secure.server.restart)
        try:
            await ship.take(*returns(4))
            await ship.until(lambda: "TLS failed" in ship.fault)
            assert "certificate has expired" in ship.fault
            with pytest.raises(OperatorNeeded, match="certificate has expired"):
                await asyncio.to_thread(Reader({**guarded.mysql, **secure.ca}).minions)
        finally:
            secure.authority.sign("server", address=LOOPBACK)
            await asyncio.to_thread(secure.server.restart)
        await ship.drain()
    assert guarded.count("salt_returns") == 4


GREETING = (
    b"\x0a5.7.0-stranger\0" + bytes(4) + b"saltsalt\0"
    b"\x00\xa2\x2d\x02\x00\x08\x00\x15" + bytes(10) + b"saltsaltsalt\0mysql_native_password\0"
)  # fmt: skip


async def test_a_server_that_asks_for_the_password_in_the_clear_does_not_get_it(tmp_path: Path) -> None:
    heard = b""

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        with contextlib.closing(writer):
            writer.write(len(GREETING).to_bytes(3, "little") + b"\0" + GREETING)
            size = int.from_bytes((await reader.readexactly(4))[:3], "little")
            await reader.readexactly(size)
            switch = b"\xfemysql_clear_password\0"
            writer.write(len(switch).to_bytes(3, "little") + b"\2" + switch)
            heard = await reader.read()

    async with await asyncio.start_server(stranger, LOOPBACK, 0) as server:
        port = server.sockets[0].getsockname()[1]
        login = {"mysql.host": LOOPBACK, "mysql.port": port, "mysql.user": "salt", "mysql.pass": "TOPSECRET"}
        async with Shipping(tmp_path / "journal", login) as ship:
            await ship.take(*returns(1))
            await ship.fail(1)
            assert "in the clear" in ship.fault
    assert heard == b""


async def test_without_tls_settings_the_connection_is_in_the_clear(guarded: Scratch, tmp_path: Path) -> None:
    assert await cipher(tmp_path, guarded, {}) == ""


async def test_a_server_without_tls_is_refused_when_tls_is_asked_for(
    secure: Secure, database: Scratch, tmp_path: Path
) -> None:
    if database.server.is_mysql:
        pytest.skip("MySQL always has a certificate")
    assert "the server offers no TLS; enable it there, or remove mysql.ssl_*" in await refusal(
        tmp_path, database, secure.ca
    )


async def test_a_server_of_another_authority_is_refused(guarded: Scratch, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    fault = await refusal(tmp_path / "journal", guarded, {"mysql.ssl_ca": str(stranger.pair.certificate)})
    assert "certificate verify failed" in fault
    assert "check mysql.ssl_ca" in fault


async def test_a_certificate_for_another_address_is_refused(secure: Secure, guarded: Scratch, tmp_path: Path) -> None:
    fault = await refusal(tmp_path, guarded, {**secure.ca, "mysql.host": "localhost"})
    assert "certificate verify failed" in fault
    assert "localhost" in fault


async def test_a_client_certificate_logs_in_where_one_is_required(
    secure: Secure, guarded: Scratch, tmp_path: Path
) -> None:
    guarded.sql(f"ALTER USER `{guarded.name}` REQUIRE X509")
    assert "check mysql.user and mysql.pass" in await refusal(tmp_path / "without", guarded, secure.ca)
    assert await cipher(tmp_path / "with", guarded, {**secure.ca, **secure.certificate})


async def test_a_client_certificate_of_a_stranger_lets_nobody_in(
    secure: Secure, guarded: Scratch, tmp_path: Path
) -> None:
    guarded.sql(f"ALTER USER `{guarded.name}` REQUIRE X509")
    pair = Authority(tmp_path, "stranger").sign("client")
    strange = {"mysql.ssl_cert": str(pair.certificate), "mysql.ssl_key": str(pair.key)}
    async with Shipping(tmp_path / "journal", {**guarded.mysql, **secure.ca, **strange}) as ship:
        await ship.take(*returns(3))
        await ship.fail(3)
        # TLS 1.3: the server looks at the certificate after our side is done, and its alert may come after its reset.
        assert "TLS failed" in ship.fault or "Lost connection" in ship.fault
        assert (await ship.books())["pending"] == 3
        ship.mysql |= secure.certificate
        assert (await ship.drain())["written"] == 3


async def test_a_client_certificate_without_an_authority_encrypts(
    secure: Secure, guarded: Scratch, tmp_path: Path
) -> None:
    guarded.sql(f"ALTER USER `{guarded.name}` REQUIRE X509")
    assert await cipher(tmp_path, guarded, secure.certificate)


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_a_tls_file_that_cannot_be_used_is_named_as_the_trouble(
    guarded: Scratch, tmp_path: Path, content: str | None
) -> None:
    ca = tmp_path / "ca.pem"
    if content is not None:
        ca.write_text(content)
    fault = await refusal(tmp_path / "journal", guarded, {"mysql.ssl_ca": str(ca)})
    assert "mysql.ssl_*: the TLS files cannot be used" in fault


async def test_the_unix_socket_logs_in(database: Scratch, tmp_path: Path) -> None:
    database.sql(f"RENAME USER `{database.name}` TO `{database.name}`@localhost")
    try:
        nowhere = {"mysql.unix_socket": str(database.server.socket), "mysql.host": "no.such.host", "mysql.port": 1}
        assert await cipher(tmp_path, database, nowhere) == ""
    finally:
        database.sql(f"DROP USER `{database.name}`@localhost")


@pytest.mark.parametrize("password", ["", "grün 😀 'x' \" \\"])
async def test_any_password_logs_in(database: Scratch, tmp_path: Path, password: str) -> None:
    database.sql(f"ALTER USER `{database.name}` IDENTIFIED BY %s", password)
    assert await cipher(tmp_path, database, {"mysql.pass": password}) == ""
