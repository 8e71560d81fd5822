"""The rows are those of saltext.mysql's returner, so that everything written for its tables keeps working.

Both get the same jobs: ours from the bus, the real returner from Salt's loader, as the master's job cache would call
it, into a second database with the tables of its docstring.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import saltext_returner
from tests.support.mariadb import MariaDB
from tests.support.saltext_returner import Call
from tests.support.scratch import Scratch, scratch
from tests.support.shipping import (
    MASTER,
    STAMP,
    Shipping,
    body,
    call_data,
    jid,
    master_data,
    published,
    return_data,
)

Make = Callable[..., Shipping]
Rows = list[dict[str, Any]]

HIGHSTATE = {
    f"file_|-/etc/app/{number}.conf_|-/etc/app/{number}.conf_|-managed": {
        "name": f"/etc/app/{number}.conf",
        "changes": {"diff": "--- \n+++ \n@@ -1 +1 @@\n-\"a\"\t\\n\n+'b'\n"} if number % 3 == 0 else {},
        "result": True if number % 5 else None,
        "comment": "File is in the correct state",
        "__sls__": "app",
        "__run_num__": number,
        "start_time": "01:30:00.123456",
        "duration": 12.345 * number,
        "__id__": f"/etc/app/{number}.conf",
    }
    for number in range(200)
}

ORDINARY: dict[str, dict[str, Any]] = {
    "ping": return_data(jid(1), "web1"),
    "highstate": return_data(jid(2), "web1", HIGHSTATE, fun="state.highstate", out="highstate"),
    "unicode": return_data(jid(3), "web1", {"schlüssel": ["grün", "日本語", "\u2028"]}, fun="test.arg"),
    "quotes": return_data(jid(4), "web1", 'it\'s "C:\\temp\\" \0 %s', fun="cmd.run", fun_args=["echo 'x' \\"]),
    "failure": return_data(jid(5), "web1", "Traceback ...", success=False, retcode=2, fun="cmd.run"),
    "nothing": return_data(jid(6), "web1", None, fun="test.none"),
    "numbers": return_data(jid(7), "web1", [0, -1, 1.5, 1e300, 2**63, True, False], fun="test.arg"),
    "bytes that are text": return_data(jid(8), "web1", {"a": "grün".encode()}, fun="cp.get_file_str"),
    "empty": return_data(jid(9), "web1", {"a": {}, "b": [], "c": ""}, fun="pillar.items"),
    "metadata": return_data(jid(10), "web1", metadata={"ticket": 7}, master_id="other", ts=1774747800),
    "longest jid": return_data(f"{jid(11)}_12345", "web1"),
}


@pytest.fixture
def theirs(mariadb: MariaDB) -> Iterator[Scratch]:
    """A second database, with the tables of saltext.mysql's docstring."""
    statements = saltext_returner.documented_schema()
    assert len(statements) == 3
    with scratch(mariadb) as made:
        made.sql(f"ALTER DATABASE `{made.name}` DEFAULT CHARACTER SET utf8 DEFAULT COLLATE utf8_general_ci")
        for statement in statements:
            made.sql(statement)
        yield made


@pytest.fixture
def returner(theirs: Scratch, tmp_path: Path) -> Callable[..., list[str | None]]:
    """Calls functions of saltext.mysql's returner; gives each one's error."""
    opts = {**theirs.mysql, "id": MASTER, "cachedir": str(tmp_path / "saltext")}

    def call(*calls: Call) -> list[str | None]:
        return saltext_returner.call(opts, calls)

    return call


Returner = Callable[..., list[str | None]]


def without(rows: Rows, *columns: str) -> Rows:
    """Rows without some columns."""
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def return_tag(data: dict[str, Any]) -> str:
    return f"salt/job/{data['jid']}/ret/{data['id']}"


async def test_ordinary_returns_are_equal_byte_for_byte(
    database: Scratch, theirs: Scratch, shipping: Make, returner: Returner
) -> None:
    async with shipping() as ship:
        await ship.ship(*(body(return_tag(data), data) for data in ORDINARY.values()))
    assert returner(*(("returner", [data]) for data in ORDINARY.values())) == [None] * len(ORDINARY)
    ours = without(database.rows("salt_returns"), "alter_time", "failed")
    assert len(ours) == len(ORDINARY)
    assert ours == without(theirs.rows("salt_returns"), "alter_time")
    assert list(ours[0]) == list(without(theirs.rows("salt_returns"), "alter_time")[0])  # columns in the same order


async def test_a_salt_call_is_equal_but_for_its_success(
    database: Scratch, theirs: Scratch, shipping: Make, returner: Returner
) -> None:
    # A salt-call says no `success`. saltext.mysql stores '0' then, also for one that went well; ours is derived from
    # `retcode`, and full_ret says so in a key that the other lacks.
    data = call_data(jid(1), "web1", {"a": 1}, fun="test.arg", fun_args=["x"], arg=["x"])
    async with shipping() as ship:
        await ship.ship(body(return_tag(data), data))
    assert returner(("save_load", [jid(1), data]), ("returner", [data])) == [None, None]
    ours, other = database.row("salt_returns"), theirs.row("salt_returns")
    assert (ours["success"], other["success"]) == ("1", "0")
    for column in ("fun", "jid", "id", "return"):
        assert ours[column] == other[column]
    full_ret, other_full_ret = json.loads(ours["full_ret"]), json.loads(other["full_ret"])
    assert {key: full_ret[key] for key in other_full_ret} == other_full_ret
    assert full_ret.keys() - other_full_ret.keys() == {"success"}
    load, other_load = (json.loads(each.row("jids")["load"]) for each in (database, theirs))
    assert {key: load[key] for key in ("tgt", "tgt_type", "fun", "arg", "jid")} == {
        key: other_load[key] for key in ("tgt", "tgt_type", "fun", "arg", "jid")
    }


@pytest.mark.parametrize(
    "job",
    [
        {"tgt": "*", "tgt_type": "glob", "fun": "test.ping", "arg": []},
        {"tgt": ["web1", "web2"], "tgt_type": "list", "fun": "test.arg", "arg": ["grün", {"a": 1, "__kwarg__": True}]},
        {"tgt": "G@os:Debian and 'x'", "tgt_type": "compound", "fun": ["a.b", "c.d"], "arg": [[], ["\\"]]},
    ],
)
async def test_a_published_load_is_equal_in_what_the_job_was(
    database: Scratch, theirs: Scratch, shipping: Make, returner: Returner, job: dict[str, Any]
) -> None:
    same = {"jid": jid(1), "user": "sudo_alice", **job}
    async with shipping() as ship:
        await ship.ship(published(jid(1), ["web1", "web2"], **same))
    # As `ClearFuncs.publish` has it when it asks the job cache to save it.
    clear_load = {"cmd": "publish", "ret": "", "kwargs": {"delimiter": ":", "show_timeout": True}, **same}
    assert returner(("save_load", [jid(1), clear_load, ["web1", "web2"]])) == [None]
    ours, other = (json.loads(each.row("jids")["load"]) for each in (database, theirs))
    assert {key: ours[key] for key in same} == {key: other[key] for key in same} == same


@pytest.mark.parametrize(("prefix", "fun"), [("run", "runner.jobs.active"), ("wheel", "wheel.key.list_all")])
async def test_a_job_of_the_master_is_equal_on_all_that_the_other_stores(
    database: Scratch, theirs: Scratch, shipping: Make, returner: Returner, prefix: str, fun: str
) -> None:
    data = master_data(jid(1), fun, {"web1": {"up": True}})
    # As `SyncClientMixin.low` hands it to `salt.utils.job.store_job`, which adds the last two.
    cached = {"id": MASTER, "tgt": MASTER, "jid": jid(1), "return": data, "fun": fun, "user": "root"}
    async with shipping() as ship:
        await ship.ship(body(f"salt/{prefix}/{jid(1)}/ret", data))
    assert returner(("save_load", [jid(1), cached]), ("returner", [cached])) == [None, None]
    ours, other = database.row("salt_returns"), theirs.row("salt_returns")
    for column in ("fun", "jid", "id", "return"):
        assert ours[column] == other[column]
    full_ret, other_full_ret = json.loads(ours["full_ret"]), json.loads(other["full_ret"])
    assert {key: full_ret[key] for key in other_full_ret} == other_full_ret
    assert (ours["success"], other["success"]) == ("1", "0")  # the cached load says nothing about success
    load, other_load = (json.loads(each.row("jids")["load"]) for each in (database, theirs))
    assert {key: load[key] for key in ("id", "tgt", "jid", "fun", "user")} == {
        key: other_load[key] for key in ("id", "tgt", "jid", "fun", "user")
    }


async def test_a_multi_function_job_is_stored_where_the_other_raises(
    database: Scratch, theirs: Scratch, shipping: Make, returner: Returner
) -> None:
    funs = ["test.ping", "test.arg"]
    data = return_data(
        jid(1),
        "web1",
        dict.fromkeys(funs, True),
        fun=funs,
        fun_args=[[], ["x"]],
        success=dict.fromkeys(funs, True),
        retcode=dict.fromkeys(funs, 0),
    )
    async with shipping() as ship:
        await ship.ship(body(return_tag(data), data))
    (error,) = returner(("returner", [copy.deepcopy(data)]))
    assert error is not None
    assert theirs.rows("salt_returns") == []
    row = database.row("salt_returns")
    assert (row["fun"], row["success"], json.loads(row["full_ret"])) == ("test.ping,test.arg", "1", data)


async def test_events_are_equal_to_those_of_event_return(
    database: Scratch, theirs: Scratch, shipping: Make, returner: Returner
) -> None:
    events = {
        "salt/auth": {"id": "web1", "act": "accept", "result": True, "_stamp": STAMP},
        "salt/beacon/web1/load/": {"id": "web1", "1m": 0.25, "text": "it's \\ grün", "_stamp": STAMP},
        return_tag(ORDINARY["highstate"]): ORDINARY["highstate"],
    }
    async with shipping(events=["salt/*"]) as ship:
        await ship.ship(*(body(tag, data) for tag, data in events.items()))
    assert returner(("event_return", [[{"tag": tag, "data": data} for tag, data in events.items()]])) == [None]
    ours, other = (without(each.rows("salt_events"), "id", "alter_time", "event_key") for each in (database, theirs))
    assert len(ours) == len(events)
    assert sorted(ours, key=lambda row: row["tag"]) == sorted(other, key=lambda row: row["tag"])
