"""Rows into the tables, inside one transaction: ``jids``, then ``salt_returns``, then ``salt_events``.

Rows go in the order of their keys, so that two masters on one database wait for each other instead of deadlocking. What
stands, stands: the tables' unique keys make a row that is written again a duplicate.

Tables of an older shape have no such keys. There the rows that are there already are looked for first, while a lock of
the server's (``GET_LOCK``) keeps other engines out; texts are written so that columns without four-byte characters take
them, and functions are cut to their column.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from . import jobload, jsontext, records, saltevent, sql
from .database import Session
from .errors import RowsRejected, RowTooLarge, ServerUnavailable
from .items import Item, Large, Plain
from .records import Load, Record, Return
from .schema import Shape
from .sql import digest_of
from .waits import Breath

log = logging.getLogger(__name__)

Of = TypeVar("Of")
Made = TypeVar("Made")

_AT_A_TIME_SECONDS = 0.01
_LOCK_SECONDS = 10
_PAGE_CHARACTERS = 1 << 20
"""Characters of values that stand, which are looked at in one go."""


class Written(NamedTuple):
    """What became of a batch's rows. ``trimmed`` counts the new rows with a value that Salt had trimmed."""

    written: int
    conflicts: int
    trimmed: int


class _Said(NamedTuple):
    """A return beside what stands: by its ``digest``, whole or as its row."""

    key: tuple[str, str]
    length: int
    digest: str
    trimmed: bool
    whole: Return | None
    row: bytes


class Rows:
    """Writes rows into tables of one shape.

    ``known_jobs`` are jids that have their row in ``jids``. ``on_sending`` is called when most of a batch is about to
    be sent, and the server will be busy for a while; ``uncertain_through``: events up to this ``seq`` may have been
    written before, by a COMMIT whose answer was lost.
    """

    def __init__(
        self,
        session: Session,
        shape: Shape,
        *,
        master_id: str,
        known_jobs: Container[str],
        uncertain_through: int,
        on_sending: Callable[[], None],
    ) -> None:
        self._session = session
        self._shape = shape
        self._master_id = master_id
        self._known_jobs = known_jobs
        self._on_sending = on_sending
        self._uncertain_through = uncertain_through
        self.jobs: set[str] = set()
        """The jids that have their row in ``jids`` once what was written is committed."""
        self._as_ever = shape.utf8mb4 and shape.alter_time and shape.fun_characters >= saltevent.MAX_FUN_CHARACTERS
        """Whether a return's prepared row fits."""

    @property
    def _needs_lock(self) -> bool:
        return not self._shape.unique >= {"jids", "salt_returns"}

    async def begin(self) -> None:
        """Before the transaction.

        Raises:
            ServerUnavailable: another engine is writing to these tables, which have no unique keys.
        """
        if self._needs_lock:
            ((mine,),) = await self._session.query(sql.get_lock("write", await self._session.database(), _LOCK_SECONDS))
            if not mine:
                raise ServerUnavailable(
                    f"{self._session.host}: another engine writes to the tables, which need migrate"
                )

    async def end(self) -> None:
        """After the COMMIT, or the ROLLBACK."""
        if self._needs_lock and self._session.usable:
            await self._session.query(sql.release_lock("write", await self._session.database()))

    async def write(self, items: list[Item]) -> Written:
        """Everything between BEGIN (implied by the first statement) and COMMIT."""
        firsts: dict[tuple[str, str], Item] = {}
        of_jobs: dict[str, Item] = {}
        repeated: list[Item] = []
        loads: list[Load] = []
        events: list[Item] = []
        extra_events: list[Item] = []  # of events whose fate is that of their return
        of_loads: list[str] = []
        any_trimmed = False
        for item in items:
            outcome = item.outcome
            key: tuple[str, str] | None
            if isinstance(outcome, Plain):
                key = outcome.key
            else:
                assert isinstance(outcome, (Record, Large))
                if isinstance(outcome, Large) and outcome.refused:
                    raise RowTooLarge(f"{self._session.host}: {outcome.refused}")
                key = _key(item)
                if outcome.load is not None:
                    loads.append(outcome.load)
                if outcome.event is not None:
                    (events if key is None else extra_events).append(item)
                elif key is None and outcome.load is not None:
                    of_loads.append(outcome.load.jid)
                if key is None:
                    continue
                any_trimmed = any_trimmed or self._said(item).trimmed
            if firsts.setdefault(key, item) is item:
                of_jobs.setdefault(key[0], item)
            else:
                repeated.append(item)
        new_trimmed = await self._new_trimmed([*firsts.values(), *repeated]) if any_trimmed else 0
        changed = await self._write_loads(loads, of_jobs)
        # The other parts of a batch job's load are its duplicates.
        written = len(changed.intersection(of_loads))
        conflicts = 0
        self._on_sending()
        inserted = await self._write_returns(firsts)
        if inserted < len(firsts) or repeated:
            mended, conflicts = await self._compare(await _made(self._said, [*firsts.values(), *repeated]))
            written += mended
        await self._write_events(extra_events)
        inserted += await self._write_events(events)
        return Written(written + inserted, conflicts, new_trimmed)

    async def write_job_of(self, item: Item) -> None:
        """The row of ``jids`` that a return makes where none stands, and not the return."""
        key = _key(item)
        if key is not None:
            await self._write_loads([], {key[0]: item})

    def _said(self, item: Item) -> _Said:
        """What an item's return is compared by."""
        if isinstance(item.outcome, Large):
            large = item.outcome
            assert large.key is not None
            return _Said(large.key, large.length, large.digest, large.trimmed, None, item.return_row)
        ret = self._fitted(self._return(item))
        text = ret.return_json
        return _Said((ret.jid, ret.id), len(text), digest_of(text), ret.trimmed, ret, b"")

    def _return(self, item: Item) -> Return:
        """An item's return, whole."""
        record = item.outcome
        if isinstance(record, Plain):
            return record.whole(item.captured_at)
        assert isinstance(record, Record)
        assert record.ret is not None
        return record.ret

    def _load_of_return(self, item: Item) -> dict[str, Any]:
        if isinstance(item.outcome, (Plain, Large)) and item.outcome.data is not None:
            assert item.outcome.key is not None
            return jobload.load_of_return(item.outcome.key[1], item.outcome.data)
        return records.synthesised_load(self._return(item))

    def _update(self, ret: _Said) -> bytes:
        timed, failed = self._shape.alter_time, self._shape.failed
        if ret.whole is None:
            return sql.update_return_by_row(*ret.key, ret.row, timed=timed, failed=failed)
        return sql.update_return(ret.whole, failed=failed)

    async def _write_returns(self, firsts: dict[tuple[str, str], Item]) -> int:
        keys = sorted(firsts)
        if "salt_returns" not in self._shape.unique:
            there = await self._returned(keys)
            keys = [key for key in keys if key not in there]
        head = sql.insert_returns(timed=self._shape.alter_time, failed=self._shape.failed)
        items = [firsts[key] for key in keys]
        if not self._as_ever:
            rows = await _made(self._fitted_row, items)
        elif self._shape.failed:
            rows = [item.return_row for item in items]
        else:
            rows = [
                item.return_row if isinstance(item.outcome, Large) else sql.without_failed(item.return_row)
                for item in items
            ]
        return await self._insert(head, rows, sql.KEEP_RETURNS)

    def _fitted_row(self, item: Item) -> bytes:
        if isinstance(item.outcome, Large):
            return item.return_row
        ret = self._fitted(self._return(item))
        return sql.return_row(ret, timed=self._shape.alter_time, failed=self._shape.failed)

    def _fitted(self, ret: Return) -> Return:
        """A return as the columns take it."""
        if self._as_ever:
            return ret
        return ret._replace(
            fun=ret.fun[: self._shape.fun_characters],
            return_json=self._text(ret.return_json),
            full_ret_json=self._text(ret.full_ret_json),
        )

    def _text(self, text: str) -> str:
        return text if self._shape.utf8mb4 else jsontext.ascii_only(text)

    async def _returned(self, keys: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = set()
        for statement in sql.select_returned(keys):
            found.update(await self._session.query(statement))
        return found

    async def _new_trimmed(self, items: list[Item]) -> int:
        """How many returns with a trimmed value, and no whole one beside it, have no row yet."""
        rets = await _made(self._said, items)
        keys = {ret.key for ret in rets if ret.trimmed} - {ret.key for ret in rets if not ret.trimmed}
        return len(keys) - len(await self._returned(sorted(keys)))

    async def _write_loads(self, loads: list[Load], of_jobs: dict[str, Item]) -> set[str]:
        """Writes ``jids``: loads that were published, and for each job the one that its first return (``of_jobs``)
        makes, where no better one stands. Gives the jids whose row came into being or changed."""
        published: dict[str, dict[str, Any]] = {}
        for jid, load in loads:
            published[jid] = jobload.merged_load(published.get(jid), load)
        alone = {jid for jid, load in published.items() if jobload.is_minions_alone(load)}
        jids = [jid for jid in of_jobs if jid not in self._known_jobs and (jid not in published or jid in alone)]
        made = await _made(self._load_of_return, [of_jobs[jid] for jid in jids])
        new = dict(zip(jids, made, strict=True))
        looked_for = sorted({**published, **new} if "jids" not in self._shape.unique else published)
        stored = await self._stored_loads(looked_for)
        changed = await self._merge(published, stored)
        for jid in published.keys() - stored.keys():
            if jid not in alone:
                new[jid] = published[jid]
                changed.add(jid)
            elif jid in of_jobs:
                new[jid] = jobload.merged_load(new.get(jid) or self._load_of_return(of_jobs[jid]), published[jid])
        head = sql.INSERT_LOADS_WITH_COLUMNS if self._shape.job_columns else sql.INSERT_LOADS
        rows = await _made(lambda jid: self._load_row(jid, new[jid]), sorted(new.keys() - stored.keys()))
        if await self._insert(head, rows, sql.KEEP_LOADS) < len(rows):  # one came since the look; now it is locked
            changed |= await self._merge(published, await self._stored_loads(sorted(published.keys() - stored.keys())))
        self.jobs = {*of_jobs, *published} - (alone - of_jobs.keys())
        return changed

    async def _stored_loads(self, jids: Sequence[str]) -> dict[str, str]:
        stored: dict[str, str] = {}
        for start in range(0, len(jids), sql.MAX_KEYS):
            found = await self._session.query(sql.select_loads(jids[start : start + sql.MAX_KEYS]))
            stored.update(reversed(found))  # of several, the first stands
        return stored

    async def _merge(self, published: dict[str, dict[str, Any]], stored: dict[str, str]) -> set[str]:
        """Merges what was published into what stands; gives the jids whose row changed."""
        changed: set[str] = set()
        for jid in sorted(published.keys() & stored.keys()):
            better = jobload.merged_load(jobload.parsed(stored[jid]), published[jid])
            text = self._text(jsontext.dumps(better))
            if text != stored[jid]:
                await self._session.execute(sql.update_load(jid, text, self._columns(better)))
                changed.add(jid)
        return changed

    def _load_row(self, jid: str, load: dict[str, Any]) -> bytes:
        return sql.load_row(jid, self._text(jsontext.dumps(load)), self._columns(load))

    def _columns(self, load: dict[str, Any]) -> tuple[str, str, str] | None:
        return jobload.job_columns(load) if self._shape.job_columns else None

    async def _write_events(self, items: list[Item]) -> int:
        if self._shape.event_key:
            return await self._insert(sql.INSERT_EVENTS, [item.event_row for item in items], sql.KEEP_EVENTS)
        rows = []
        for item in items:
            assert isinstance(item.outcome, (Record, Large))
            assert item.outcome.event is not None
            event = item.outcome.event._replace(data_json=self._text(item.outcome.event.data_json))
            if item.seq > self._uncertain_through or not await self._is_stored(event):
                rows.append(sql.event_row(event, self._master_id, None))
        return await self._insert(sql.INSERT_EVENTS_WITHOUT_KEY, rows, b"")

    async def _is_stored(self, event: records.Event) -> bool:
        return bool(await self._session.query(sql.select_event(event, self._master_id)))

    async def _insert(self, head: bytes, rows: Iterable[bytes], tail: bytes) -> int:
        """Inserts rows; gives the number of those that were not there."""
        new = 0
        for statement, _ in sql.statements(head, rows, tail, max_bytes=self._session.max_packet):
            new += await self._session.insert(statement)
        return new

    async def _compare(self, returns: list[_Said]) -> tuple[int, int]:
        """Returns beside what stands for their jid and minion: how many whole ones took a trimmed one's place, and
        how many others differ."""
        stands: dict[tuple[str, str], tuple[int, bool]] = {}
        for statement in sql.select_return_lengths(sorted({ret.key for ret in returns})):
            found = await self._session.query(statement)
            stands.update(
                ((jid, id_), (int(length or 0), bool(is_cut))) for jid, id_, length, is_cut in reversed(found)
            )
        for ret in returns:
            key = ret.key
            if key not in stands:
                raise RowsRejected(
                    f"{self._session.host}: the return of {key[1]!r} for jid {key[0]} is kept out by another row, "
                    "through a unique key that is not (jid, id) or a collation that takes both ids for one"
                )
        same = await self._same([ret for ret in returns if stands[ret.key][0] == ret.length])
        mended: set[tuple[str, str]] = set()
        differing: list[_Said] = []
        for ret in returns:
            key = ret.key
            if (*key, ret.digest) in same:
                continue
            _, trimmed = stands[key]
            if trimmed and not ret.trimmed and key not in mended:
                await self._session.execute(self._update(ret))
                mended.add(key)
            elif not ret.trimmed:
                differing.append(ret)
        if differing:
            log.warning(
                "%d returns differ from the one already stored, which stands; the first: jid %s, minion %s",
                len(differing),
                *differing[0].key,
            )
        return len(mended), len(differing)

    async def _same(self, returns: list[_Said]) -> set[tuple[str, str, str]]:
        """Those whose value is the one that stands: jid, minion, digest. Only values of the same length are fetched, no
        more at a time than a batch may hold."""
        same: set[tuple[str, str, str]] = set()
        page: set[tuple[str, str]] = set()
        size = 0
        for number, ret in enumerate(returns, 1):
            page.add(ret.key)
            size += ret.length
            if size < _PAGE_CHARACTERS and number < len(returns):
                continue
            for statement in sql.select_values(sorted(page)):
                for jid, id_, value in await self._session.query(statement):
                    text = value if isinstance(value, str) else bytes(value or b"").decode(errors="replace")
                    same.add((jid, id_, digest_of(text)))
            page, size = set(), 0
        return same


async def _made(make: Callable[[Of], Made], each_of: Iterable[Of]) -> list[Made]:
    """What is made of each, one after the other: what a batch holds must not hold up the loop in one piece."""
    breath = Breath(_AT_A_TIME_SECONDS)
    made: list[Made] = []
    for each in each_of:
        made.append(make(each))
        await breath.taken()
    return made


def _key(item: Item) -> tuple[str, str] | None:
    """Whose return it is."""
    outcome = item.outcome
    if isinstance(outcome, Record):
        return None if outcome.ret is None else (outcome.ret.jid, outcome.ret.id)
    return outcome.key if isinstance(outcome, (Plain, Large)) else None
