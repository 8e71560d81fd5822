"""What the tables hold of jobs, in the words of Salt's local job cache (salt/returners/local_cache.py 3006-3008).

Nothing is written. The tables may be ours, or older ones that nobody migrated: without keys, with duplicates, without
columns that ours have.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import jobload, pool
from .errors import ServerUnavailable, SettingsError

_PAGE_ROWS = 500
_KEPT = ("return", "retcode", "success", "out")
"""What the local cache keeps of a return, in its order."""
_ADDED = frozenset({"success", "retcode", "fun_args", "trimmed"})
"""What ``records.py`` adds at the end of ``full_ret`` where the return did not say it."""
_LAST = frozenset({"_stamp", "user", "fun"})
"""With these end what it adds to: an event of the bus, a job of the master's, a return of salt-ssh."""
OF_MASTER = ("runner.", "wheel.")
"""So begin the functions of jobs that the master itself does."""

_WORTH_REMEMBERING = 4096
"""Characters of ``full_ret`` up to which what minions say alike is remembered: longer ones are seldom alike, and would
all be in memory twice."""
_TRIES = 40
"""Returns after which it is given up when hardly one was as another."""

# json.loads() and its like take half as long again around the same C function.
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined] # typeshed lists only what has a page


class Reader:
    """Answers from the database that ``mysql.*`` in ``opts`` names.

    Every method raises :class:`DatabaseError` when the database does not answer, and :class:`SettingsError` for a
    connection that cannot be tried. Jids, minions and functions are a caller's words: whatever they are, they are data.
    """

    def __init__(self, opts: Mapping[str, Any]) -> None:
        self._pool = pool.of(opts)

    def query(self, statement: str, *values: Any) -> list[pool.Row]:
        """The rows of a statement, ``%s`` in it replaced by ``values``; a list becomes one in brackets."""
        return self._pool.query(statement, [_text(value) if isinstance(value, str) else value for value in values])

    def columns(self, table: str) -> frozenset[str]:
        """The names of a table's columns; none when there is no such table."""
        rows = self.query(
            "SELECT COLUMN_NAME FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s",
            table,
        )
        return frozenset(str(name) for (name,) in rows)

    def load(self, jid: str) -> dict[str, Any]:
        """The stored load of a job, ``{}`` for an unknown one."""
        return _one_load(text for (text,) in self.query("SELECT `load` FROM `jids` WHERE `jid` = %s", jid))

    def returns(self, jid: str) -> dict[str, dict[str, Any]]:
        """What each minion answered, as the local cache gives it: ``{minion: {"return": ..., ...}}``."""
        rows = self._in_one_row(jid)
        if rows is None:
            rows = self.query("SELECT `id`, `full_ret` FROM `salt_returns` WHERE `jid` = %s", jid)
        answers = all_as_cached(rows)
        if len(answers) == len(rows):
            return answers
        # No key kept a second return of a minion out: the first one stands.
        if "alter_time" in self.columns("salt_returns"):
            rows = self.query("SELECT `id`, `full_ret`, `alter_time` FROM `salt_returns` WHERE `jid` = %s", jid)
            rows.sort(key=lambda row: (row[2] is None, row[2]))
        return {minion: as_cached(text) for minion, text, *_ in reversed(rows)}

    def _in_one_row(self, jid: str) -> list[pool.Row] | None:
        """``id`` and ``full_ret`` of a job's rows, put together by the server: PyMySQL takes most of its time for each
        row, so this takes half as long as the plain SELECT. ``None`` where it may not be the same."""
        ((count, *sizes, minions, returns),) = self.query(
            "SELECT COUNT(*), SUM(LENGTH(`id`)), SUM(LENGTH(`full_ret`)), GROUP_CONCAT(`id` SEPARATOR '\\0'), "
            "GROUP_CONCAT(`full_ret` SEPARATOR '\\0') FROM `salt_returns` WHERE `jid` = %s",
            jid,
        )
        if not count:
            return []
        columns: list[list[str]] = []
        for size, text in zip(sizes, (minions, returns), strict=True):
            # The size is another where a value is NULL or in another character set, or where all of them were cut at
            # group_concat_max_len; and the number of values where one of them has a \0.
            if not isinstance(text, str) or len(text.encode()) != size + count - 1:
                return None
            columns.append(text.split("\0"))
        return list(zip(*columns, strict=True)) if [len(column) for column in columns] == [count, count] else None

    def jobs(self, after: str = "") -> list[tuple[str, dict[str, Any]]]:
        """A page of jobs by jid, those after ``after``: jid and stored load. An empty one is the last."""
        rows = self.query(
            "SELECT `jid`, `load` FROM `jids` WHERE `jid` > %s ORDER BY `jid` LIMIT %s", after, _PAGE_ROWS
        )
        return _by_jid(_whole_jobs(rows, _PAGE_ROWS))

    def newest_jobs(self, count: int, *, skip: str = "") -> list[tuple[str, dict[str, Any]]]:
        """The newest ``count`` jobs but those of the function ``skip``, newest first."""
        found: list[tuple[str, dict[str, Any]]] = []
        before: str | None = None
        read, page = 0, min(count + 10, _PAGE_ROWS)
        while len(found) < count:
            where, values = ("`jid` IS NOT NULL", []) if before is None else ("`jid` < %s", [before])
            rows = self.query(
                f"SELECT `jid`, `load` FROM `jids` WHERE {where} ORDER BY `jid` DESC LIMIT %s", *values, page
            )
            # By the load, which every row has: `fun` is NULL in rows of other writers.
            whole = _whole_jobs(rows, page)
            found += [(jid, load) for jid, load in _by_jid(whole) if not skip or load.get("fun") != skip]
            if len(rows) < page:
                break
            before, read = whole[-1][0], read + page
            # As many as hold what is missing, if it goes on like this.
            page = min((count - len(found)) * (1 + read // max(1, len(found))) + 10, _PAGE_ROWS)
        return found[:count]

    def last_of_function(self, fun: str) -> dict[str, dict[str, Any]]:
        """The newest whole return of each minion for a function."""
        rows = self.query(
            "SELECT r.`id`, r.`full_ret` FROM `salt_returns` r JOIN (SELECT `id`, MAX(`jid`) AS `jid` "
            "FROM `salt_returns` WHERE `fun` = %s GROUP BY `id`) n ON r.`jid` = n.`jid` AND r.`id` = n.`id` "
            "WHERE r.`fun` = %s",
            fun,
            fun,
        )
        return {minion: parsed(full_ret) for minion, full_ret in reversed(rows)}

    def minions(self) -> list[str]:
        """Every minion that ever returned something."""
        return [minion for (minion,) in self.query("SELECT DISTINCT `id` FROM `salt_returns` ORDER BY `id`")]

    def endtime(self, jid: str) -> datetime.datetime | None:
        """When the last return of a job came, in UTC; ``None`` where that is not known."""
        if "alter_time" not in self.columns("salt_returns"):
            return None
        ((moment,),) = self.query("SELECT MAX(`alter_time`) FROM `salt_returns` WHERE `jid` = %s", jid)
        return moment if isinstance(moment, datetime.datetime) else None

    def endtimes(self, since: str) -> dict[str, datetime.datetime]:
        """The same of all jobs that began ``since`` this one, by jid; it reads all that they returned."""
        if "alter_time" not in self.columns("salt_returns"):
            return {}
        rows = self.query("SELECT `jid`, MAX(`alter_time`) FROM `salt_returns` WHERE `jid` >= %s GROUP BY `jid`", since)
        return {jid: moment for jid, moment in rows if isinstance(moment, datetime.datetime)}


def load_as_cached(load: dict[str, Any]) -> dict[str, Any]:
    """A stored load as ``get_load`` of the local cache gives it."""
    load = {key: value for key, value in as_listed(load).items() if key != "missing"}  # which that does not know
    minions = load.pop("Minions", None)
    if minions is None and _is_standalone(load):
        minions = [load["tgt"]]  # whom the master finds for a job that came with its return
    if isinstance(minions, list) and minions:
        load["Minions"] = sorted({minion for minion in minions if isinstance(minion, str)})
    return load


def as_listed(load: dict[str, Any]) -> dict[str, Any]:
    """A stored load with no more than what the local cache has of it to list.

    Of a runner's or wheel's job that has neither arguments nor a target's type. Whoever reads lists of jobs relies on
    it: SaltGUI takes a runner's keyword arguments from what it returned, where the list has none.
    """
    fun, id_ = load.get("fun"), load.get("id")
    if id_ is None or id_ != load.get("tgt") or not isinstance(fun, str) or not fun.startswith(OF_MASTER):
        return load
    return {key: value for key, value in load.items() if key not in ("arg", "tgt_type")}


def _is_standalone(load: Mapping[str, Any]) -> bool:
    """Whether a load was made of the return of a salt-call or a schedule."""
    fun, minion = load.get("fun"), load.get("id")
    of_master = isinstance(fun, str) and fun.startswith(OF_MASTER)
    return isinstance(minion, str) and bool(minion) and minion == load.get("tgt") and not of_master


def as_cached(full_ret: str) -> dict[str, Any]:
    """A return as ``get_jid`` of the local cache gives it: what the minion said, without what we added."""
    try:
        ret, end = _scan(full_ret, 0)
    except (StopIteration, ValueError, RecursionError):  # of another writer, and cut: better that than nothing
        return {"return": full_ret}
    if end != len(full_ret):
        return {"return": full_ret}
    if not isinstance(ret, dict) or "return" not in ret:
        return {"return": ret}
    if next(reversed(ret)) not in _ADDED:
        return {key: ret[key] for key in _KEPT if key in ret}
    return {key: ret[key] for key in _KEPT if key in ret and key not in _added(ret)}


def all_as_cached(returns: Sequence[pool.Row]) -> dict[str, dict[str, Any]]:
    """:func:`as_cached` of rows of ``id`` and ``full_ret``, by ``id``. What several minions say alike is parsed once,
    which takes a third of the time for a job that most answer with the same value."""
    answers: dict[str, dict[str, Any]] = {}
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    parsed_ones = 0
    for minion, full_ret in returns:
        shared = _shared(full_ret) if 2 * parsed_ones <= _TRIES + len(answers) else None
        answer = known.get(shared) if shared else None
        if answer is None:
            parsed_ones += 1
            answer = as_cached(full_ret)
            # Not what could be changed in one answer and so in all of them, nor a text that is no JSON: all of it, with
            # the minion's own, is the answer.
            if shared and answer["return"] is not full_ret and not any(map(_is_container, answer.values())):
                known[shared] = answer
        answers[minion] = answer.copy()
    return answers


def _shared(full_ret: str) -> tuple[str, str, str] | None:
    """A return's text around what it has of its own, the values of the first ``id`` and ``_stamp``; ``None`` where they
    cannot be told. Texts that agree in this are both JSON or both none, and say the same but for these two values."""
    if len(full_ret) > _WORTH_REMEMBERING:
        return None
    # In JSON both marks can only be (the end of) a key and the begin of its value: a quote within a text has a
    # backslash before it.
    before, _, rest = full_ret.partition('"id": "')
    minion, _, rest = rest.partition('"')
    between, found, rest = rest.partition('"_stamp": "')
    stamp, _, after = rest.partition('"')
    own = minion + stamp
    return (before, between, after) if found and "\\" not in own and own.isprintable() else None


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _added(ret: dict[str, Any]) -> set[str]:
    """The keys at the end of ``full_ret`` that the return itself did not have."""
    added: set[str] = set()
    for key in reversed(ret):
        if key not in _ADDED:
            return added if key in _LAST else set()
        added.add(key)
    return added


def parsed(text: str) -> dict[str, Any]:
    """A JSON object of the tables; ``{}`` for what another writer left that is none."""
    value = jobload.parsed(text)
    return value if isinstance(value, dict) else {}


def _whole_jobs(rows: list[pool.Row], page: int) -> list[pool.Row]:
    """The rows of a page but for its last job's, where the next page may have more of them."""
    return rows if len(rows) < page else [row for row in rows if row[0] != rows[-1][0]] or rows


def _by_jid(rows: Iterable[pool.Row]) -> list[tuple[str, dict[str, Any]]]:
    """Jobs in the order of their rows, one each: tables without a key may have several rows of one."""
    texts: dict[str, list[str]] = {}
    for jid, text in rows:
        texts.setdefault(jid, []).append(text)
    return [(jid, _one_load(loads)) for jid, loads in texts.items()]


def _one_load(texts: Iterable[str]) -> dict[str, Any]:
    """A job's load of all its rows: what was published, before what was made of a return."""
    found: dict[str, Any] = {}
    for load in map(parsed, texts):
        if not found:
            found = load
        elif jobload.is_published(load):
            found = jobload.merged_load(found, load)
    return found


def _text(value: str) -> str:
    """A caller's text, as a server can take it."""
    return value.encode("utf-8", "replace").decode()


__all__ = ["OF_MASTER", "Reader", "ServerUnavailable", "SettingsError", "as_cached", "load_as_cached", "parsed"]
