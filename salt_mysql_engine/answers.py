"""What Salt asks its job cache, answered from MySQL and the journal together, as the local job cache would.

With MySQL away, what the journal holds is all there is, and a warning says why. Nothing here raises for that.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from . import jobload, saltevent, settings
from .errors import EngineError, ServerUnavailable
from .pending import Pending, warn
from .reader import Reader, as_cached, as_listed, load_as_cached, parsed

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Jobs = Iterator[tuple[str, dict[str, Any]]]


class Answers:
    """Answers for the master of ``opts``. What is pending is always asked for before MySQL; ``pending.py`` says why."""

    def __init__(self, opts: Mapping[str, Any]) -> None:
        self._opts = opts
        self._pending = Pending(opts)

    def load(self, jid: str) -> dict[str, Any]:
        """The job as it was published, and for whom; ``{}`` for an unknown one."""
        pending = self._pending.job(jid)
        # The question of every `salt` command, which waits for no database then.
        if pending.whole or _is_whole(pending.load):
            return load_as_cached(pending.load_over({}))
        return load_as_cached(pending.load_over(self._ask(lambda db: db.load(jid)) or {}))

    def returns(self, jid: str) -> dict[str, dict[str, Any]]:
        """What each minion answered: ``{minion: {"return": ..., ...}}``."""
        pending = self._pending.job(jid)
        answers = {} if pending.whole else self._ask(lambda db: db.returns(jid)) or {}
        for minion, ret in pending.returns.items():
            if minion not in answers or (not ret.trimmed and saltevent.is_trimmed(answers[minion]["return"])):
                answers[minion] = as_cached(ret.full_ret_json)
        return answers

    def jobs(self) -> Jobs:
        """All jobs: those in MySQL, then those that the journal alone knows. With ``list_jobs_max`` the newest ones."""
        options, _ = settings.parse(settings.of_master(self._opts))
        if most := settings.combine(options, {}).list_jobs_max:
            newest = self.newest_jobs(most + 1)
            if len(newest) > most:
                warn(f"There are more jobs than list_jobs_max: the newest {most:,} are listed")
            return ((jid, load_as_cached(load)) for jid, load in newest[-most:])
        return self._all_jobs()

    def _all_jobs(self) -> Jobs:
        pending = self._pending.jobs()
        last = ""
        while page := self._page(last):
            for jid, load in page:
                waiting = pending.pop(jid, None)
                yield jid, load_as_cached(waiting.load_over(load) if waiting else load)
            last = page[-1][0]
        for jid, job in pending.items():
            if load := job.load_over({}):
                yield jid, load_as_cached(load)

    def _page(self, after: str) -> list[tuple[str, dict[str, Any]]]:
        return self._ask(lambda db: db.jobs(after)) or []

    def newest_jobs(self, count: int, *, skip: str = "") -> list[tuple[str, dict[str, Any]]]:
        """The newest ``count`` jobs but those of the function ``skip``, oldest first."""
        pending = self._pending.jobs()
        jobs = dict(self._ask(lambda db: db.newest_jobs(count, skip=skip)) or [])
        for jid, job in pending.items():
            load = job.load_over(jobs.get(jid, {}))
            if load and (not skip or load.get("fun") != skip):
                jobs[jid] = load
        return [(jid, as_listed(jobs[jid])) for jid in sorted(jobs)[-count:]] if count > 0 else []

    def last_of_function(self, fun: str) -> dict[str, dict[str, Any]]:
        """The newest whole return of each minion for a function."""
        pending = self._pending.jobs()
        last = self._ask(lambda db: db.last_of_function(fun)) or {}
        for jid, job in pending.items():
            for minion, ret in job.returns.items():
                if ret.fun == fun and (minion not in last or str(last[minion].get("jid", "")) < jid):
                    last[minion] = parsed(ret.full_ret_json)
        return last

    def minions(self) -> list[str]:
        """Every minion that ever returned something."""
        pending = self._pending.jobs()
        stored = self._ask(lambda db: db.minions()) or []
        return sorted({*stored, *(minion for job in pending.values() for minion in job.returns)})

    def endtime(self, jid: str) -> datetime.datetime | None:
        """When the last return of a job came, in UTC."""
        pending = self._pending.job(jid)
        moments = [datetime.datetime.fromisoformat(ret.altered) for ret in pending.returns.values()]
        stored = self._ask(lambda db: db.endtime(jid))
        return max([*moments, *([stored] if stored else [])], default=None)

    def endtimes(self, since: str) -> dict[str, datetime.datetime]:
        """The same of all jobs in MySQL that began ``since`` this one, by jid."""
        return self._ask(lambda db: db.endtimes(since)) or {}

    def _ask(self, question: Callable[[Reader], Answer]) -> Answer | None:
        """What the database says; ``None`` where it does not answer, or has not answered others a moment ago."""
        missing = "The database does not answer, and what it holds is missing here"
        if self._pending.away:
            warn(f"{missing}: {self._pending.away}")
            return None
        began = time.monotonic()
        try:
            return question(Reader(self._opts))
        except EngineError as exc:
            warn(f"{missing}: {exc}")
            if isinstance(exc, ServerUnavailable):
                self._pending.say_away(str(exc), time.monotonic() - began)
            return None


def _is_whole(load: Mapping[str, Any]) -> bool:
    """Whether a publish in the journal is all of its job's. The parts of a batch (3008) are lists, and add up."""
    return bool(load.get("Minions")) and jobload.is_published(load) and load.get("tgt_type") != "list"
