"""The control socket, over a real one: only its owner gets in, and whatever comes in, an answer goes out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_mysql_engine import control
from salt_mysql_engine.control import Argument, Control, Verb
from salt_mysql_engine.errors import ControlError, EngineError


async def echo(**arguments: Any) -> dict[str, Any]:
    return arguments


async def refuse() -> None:
    raise EngineError("the pillar is wrong: batch_size")


async def fail() -> None:
    raise ZeroDivisionError("a fault of ours")


VERBS = {
    "echo": Verb(
        echo,
        {
            "seconds": Argument(float, most=60),
            "number": Argument(int, least=1, optional=True),
            "what": Argument(str, most=10),
            "sure": Argument(bool),
        },
    ),
    "refuse": Verb(refuse),
    "fail": Verb(fail),
}


@pytest.fixture
def opts(tmp_path: Path) -> dict[str, Any]:
    return {"sock_dir": str(tmp_path)}


@pytest.fixture
async def engine(opts: dict[str, Any]) -> AsyncIterator[asyncio.Task[None]]:
    """The engine's end, listening."""
    path = control.socket_path(opts)
    task = asyncio.create_task(Control(path, VERBS).run())
    await asyncio.wait_for(listening(path), 10)
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def listening(path: Path) -> None:
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(0)  # the server's turn
        else:
            writer.close()
            return await writer.wait_closed()


async def ask(opts: dict[str, Any], verb: str, **arguments: Any) -> Any:
    """As the runner does: blocking, from outside the engine's loop."""
    return await asyncio.to_thread(control.ask, opts, verb, **arguments)


async def send(opts: dict[str, Any], line: bytes) -> dict[str, Any]:
    reader, writer = await asyncio.open_unix_connection(control.socket_path(opts))
    writer.write(line)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await writer.wait_closed()
    return dict(json.loads(answer))


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
        assert os.umask(mask) == mask, "the process's umask was changed"
    finally:
        os.umask(before)


async def test_the_socket_is_for_its_owner_only_whatever_the_umask(opts: dict[str, Any]) -> None:
    path = control.socket_path(opts)
    with umask(0):
        task = asyncio.create_task(Control(path, {}).run())
        await asyncio.wait_for(listening(path), 10)
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("is_full", [False, True])
async def test_the_socket_of_another_masters_engine_is_left_alone_until_nobody_listens_there(
    opts: dict[str, Any], is_full: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_BIND_AGAIN_SECONDS", 0.01)
    path = control.socket_path(opts)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(str(path))
        other.listen(0)
        with contextlib.suppress(BlockingIOError):
            while is_full:  # until its queue takes no more
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        inode = path.stat().st_ino
        task = asyncio.create_task(Control(path, VERBS).run())
        deadline = time.monotonic() + 10
        while "give each master a sock_dir of its own" not in caplog.text:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert path.stat().st_ino == inode
    await asyncio.wait_for(listening(path), 10)
    assert caplog.text.count("cannot be listened on") == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not path.exists()


@pytest.mark.usefixtures("engine")
async def test_a_verb_gets_its_arguments_and_its_result_comes_back(opts: dict[str, Any]) -> None:
    arguments = {"seconds": 1.5, "what": "é", "number": None, "sure": True}
    assert await ask(opts, "echo", **arguments) == arguments
    least = {"seconds": 0, "what": "", "number": 1, "sure": False}
    assert await ask(opts, "echo", **least) == least
    most = {"seconds": 60.0, "what": "ten letter", "number": 2**63 - 1}
    assert await ask(opts, "echo", **most) == most


@pytest.mark.usefixtures("engine")
async def test_many_can_ask_at_once(opts: dict[str, Any]) -> None:
    answers = await asyncio.gather(*(ask(opts, "echo", number=number) for number in range(1, 31)))
    assert answers == [{"number": number} for number in range(1, 31)]


@pytest.mark.usefixtures("engine")
async def test_an_unknown_verb_is_answered_with_those_that_are_known(opts: dict[str, Any]) -> None:
    with pytest.raises(ControlError, match="no such request; known are echo, refuse, fail"):
        await ask(opts, "drop_everything")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    "line",
    [
        *(b"\n", b"\xff\xfe\n", b"status\n", b"null\n", b"7\n", b"[]\n", b"{}\n"),
        *(b'"echo"\n', b'{"verb": ["echo"]}\n', b'{"verb": "echo"\n', b"[" * 100_000 + b"\n"),
    ],
    ids=lambda line: repr(line[:20]),
)
async def test_a_line_that_is_no_request_is_answered_and_the_next_one_served(opts: dict[str, Any], line: bytes) -> None:
    assert (await send(opts, line))["error"].startswith("no such request")
    assert await ask(opts, "echo", what="there") == {"what": "there"}


@pytest.mark.usefixtures("engine")
async def test_an_argument_that_a_verb_does_not_take_is_an_answer(opts: dict[str, Any]) -> None:
    with pytest.raises(ControlError, match="no such argument: 'force'; known are: none"):
        await ask(opts, "refuse", force=True)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ('"seconds": "x"', "seconds: 'x' must be a number from 0 to 60"),
        ('"seconds": 1e20', "seconds: '1e+20' must be a number from 0 to 60"),
        ('"seconds": 1e999', "seconds: 'inf' must be a number from 0 to 60"),
        ('"seconds": NaN', "no such request"),
        ('"seconds": -Infinity', "no such request"),
        ('"seconds": true', "seconds: 'True' must be a number from 0 to 60"),
        ('"seconds": null', "seconds: 'None' must be a number from 0 to 60"),
        ('"seconds": 1' + "0" * 4000, "seconds: '1000000"),
        ('"number": 1.5', "number: '1.5' must be a whole number from 1 to 9,223,372,036,854,775,807, or null"),
        ('"number": 9223372036854775808', "number: '9223372036854775808' must be"),
        ('"what": "eleven char"', "what: 'eleven char' must be a text of 0 to 10 characters"),
        ('"what": ["x"]', "what: \"['x']\" must be a text"),
        ('"sure": 1', "sure: '1' must be true or false"),
        ('"self": 1', "no such argument: 'self'; known are: seconds, number, what, sure"),
    ],
)
async def test_an_argument_of_the_wrong_type_or_size_is_answered_with_what_it_must_be(
    opts: dict[str, Any], arguments: str, answer: str
) -> None:
    said = await send(opts, f'{{"verb": "echo", {arguments}}}\n'.encode())
    assert said["error"].startswith(answer)
    assert len(said["error"]) < 250
    assert await ask(opts, "echo", number=1) == {"number": 1}


@pytest.mark.usefixtures("engine")
async def test_what_a_verb_refuses_reaches_the_asker_in_its_own_words(opts: dict[str, Any]) -> None:
    with pytest.raises(ControlError, match=r"^the pillar is wrong: batch_size$"):
        await ask(opts, "refuse")


@pytest.mark.usefixtures("engine")
async def test_a_fault_of_ours_is_logged_and_named_and_does_not_end_the_server(
    opts: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ControlError, match="ZeroDivisionError: a fault of ours; the master's log has more"):
        await ask(opts, "fail")
    assert "The control verb failed" in caplog.text
    assert await ask(opts, "echo") == {}


def test_an_engine_that_was_never_started_is_said_to_be_not_running(opts: dict[str, Any]) -> None:
    with pytest.raises(ControlError, match=r"the engine is not running: .*mysql_jobcache\.ipc"):
        control.ask(opts, "status")


def test_an_engine_that_was_killed_is_said_to_be_not_running(opts: dict[str, Any]) -> None:
    leave_a_socket(opts)
    with pytest.raises(ControlError, match="the engine is not running"):
        control.ask(opts, "status")


def test_who_is_not_allowed_to_use_the_socket_is_told_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ControlError, match=r"not allowed to use .*\.ipc; run this as the master's user"):
        control.ask({"sock_dir": str(tmp_path)}, "status")


async def test_an_engine_that_ends_without_an_answer_is_said_not_to_have_answered(opts: dict[str, Any]) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    async with await asyncio.start_unix_server(hang_up, control.socket_path(opts)):
        with pytest.raises(ControlError, match="the engine did not answer"):
            await ask(opts, "status")


async def test_the_socket_of_a_killed_engine_is_taken_over(opts: dict[str, Any]) -> None:
    path = leave_a_socket(opts)
    task = asyncio.create_task(Control(path, VERBS).run())
    await asyncio.wait_for(listening(path), 10)
    assert await ask(opts, "echo", number=1) == {"number": 1}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("engine")
async def test_a_second_master_with_the_same_sock_dir_takes_nobodys_socket_away(
    opts: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_BIND_AGAIN_SECONDS", 0.01)
    second = asyncio.create_task(Control(control.socket_path(opts), {"second": Verb(echo)}).run())
    await asyncio.sleep(0.1)
    assert not second.done()
    assert caplog.text.count("the engine of another master answers there; give each master a sock_dir of its own") == 1
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert await ask(opts, "echo", number=1) == {"number": 1}


async def test_a_place_that_cannot_be_listened_on_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_BIND_AGAIN_SECONDS", 0.01)
    opts = {"sock_dir": str(tmp_path / "later")}
    task = asyncio.create_task(Control(control.socket_path(opts), VERBS).run())
    await asyncio.sleep(0.05)
    assert not task.done()
    (tmp_path / "later").mkdir()
    await asyncio.wait_for(listening(control.socket_path(opts)), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_stops_takes_its_socket_away(engine: asyncio.Task[None], opts: dict[str, Any]) -> None:
    assert control.socket_path(opts).exists()
    engine.cancel()
    await asyncio.gather(engine, return_exceptions=True)
    assert not control.socket_path(opts).exists()


async def test_an_engine_that_stops_does_not_wait_for_those_who_wait_for_it(opts: dict[str, Any]) -> None:
    asked = asyncio.Event()

    async def never() -> None:
        asked.set()
        await asyncio.Event().wait()

    path = control.socket_path(opts)
    task = asyncio.create_task(Control(path, {"never": Verb(never)}).run())
    await asyncio.wait_for(listening(path), 10)
    waiting = asyncio.create_task(ask(opts, "never"))
    await asyncio.wait_for(asked.wait(), 10)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=1)
    assert done
    with pytest.raises(ControlError, match="the engine did not answer"):
        await waiting


def leave_a_socket(opts: dict[str, Any]) -> Path:
    """A socket that nobody listens on any more, as ``kill -9`` leaves it."""
    path = control.socket_path(opts)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return path


async def test_who_does_not_read_an_answer_is_hung_up_on_and_holds_nobody_up(
    opts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def much() -> str:
        return "x" * 4_000_000

    monkeypatch.setattr(control, "_ANSWER_SECONDS", 0.2)
    path = control.socket_path(opts)
    served = Control(path, {"much": Verb(much), "echo": Verb(echo, {"x": Argument(int)})})
    task = asyncio.create_task(served.run())
    await asyncio.wait_for(listening(path), 10)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b'{"verb": "much"}\n')
        assert await ask(opts, "echo", x=1) == {"x": 1}
        deadline = asyncio.get_running_loop().time() + 10
        while served._serving:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)
        sock.settimeout(10)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := await asyncio.to_thread(sock.recv, 65536):
                received += len(piece)
        assert received < 4_000_000
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("engine")
async def test_more_connections_than_are_served_are_closed_and_the_others_answered(
    opts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_MOST_CONNECTIONS", 3)
    idle = [await asyncio.open_unix_connection(control.socket_path(opts)) for _ in range(3)]
    reader, writer = await asyncio.open_unix_connection(control.socket_path(opts))
    assert await asyncio.wait_for(reader.read(), 10) == b""
    idle[0][1].write(b'{"verb": "echo"}\n')
    assert json.loads(await asyncio.wait_for(idle[0][0].read(), 10)) == {"result": {}}
    for _, each in [*idle, (reader, writer)]:
        each.close()
