"""
Look at and steer the running ``mysql_jobcache`` engine of this master.

.. versionadded:: 0.1.0

:depends: the Python package ``salt-mysql-engine`` (``salt-pip install salt-mysql-engine``)

.. code-block:: bash

    salt-run mysql_jobcache.status
    salt-run mysql_jobcache.flush
    salt-run mysql_jobcache.reload
    salt-run mysql_jobcache.test_connection
    salt-run mysql_jobcache.reconcile
    salt-run mysql_jobcache.dead_letters
    salt-run mysql_jobcache.retry all
    salt-run mysql_jobcache.schema
    salt-run mysql_jobcache.migrate dry_run=True
    salt-run mysql_jobcache.purge dry_run=True
    salt-run mysql_jobcache.jobs since=1d failed=True
    salt-run mysql_jobcache.job 20261123140005250000
    salt-run mysql_jobcache.minion web1
    salt-run mysql_jobcache.failures
"""

import functools
import sys

try:
    from salt_mysql_engine import verbs

    HAS_PACKAGE = True
except ImportError:
    HAS_PACKAGE = False

__virtualname__ = "mysql_jobcache"


def __virtual__():
    if not HAS_PACKAGE:
        return False, "the Python package salt-mysql-engine is not installed for Salt"
    return __virtualname__


def _clearly(function):
    # An error of ours is a sentence for the operator: Salt would show an exception with its traceback.
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except verbs.EngineError as exc:
            __context__["retcode"] = 1
            return {"error": str(exc), "retcode": 1}  # salt-run exits with it

    return wrapper


@_clearly
def status():
    """
    The books (every captured event and what became of it), lag, the last error, the server, and each
    setting in effect with where it came from.

    .. code-block:: bash

        salt-run mysql_jobcache.status
    """
    return verbs.status(__opts__)


@_clearly
def flush(timeout=30):
    """
    Write what is pending now, and return when it is in MySQL or is a dead letter; or say what is waited for after
    ``timeout`` seconds.

    .. code-block:: bash

        salt-run mysql_jobcache.flush timeout=60
    """
    return verbs.flush(__opts__, timeout)


@_clearly
def reload():
    """
    Compile the pillar of the master's id now, and put its ``mysql_jobcache`` options into effect.

    .. code-block:: bash

        salt-run mysql_jobcache.reload
    """
    return verbs.reload(__opts__)


@_clearly
def test_connection():
    """
    Log in to the database as the engine would, with the master config as it is now, and say what is there.
    Works without a running engine, and changes nothing.

    .. code-block:: bash

        salt-run mysql_jobcache.test_connection
    """
    return verbs.test_connection(__opts__)


@_clearly
def reconcile(since=None):
    """
    Compare the master's job cache with the database, and write what is missing there: after a restored
    backup, for instance. The engine does it by itself after a start, after a gap on the bus, and on a timer.

    since
        Only jobs of which something was stored since then: ``2h`` (or ``30m``, ``1d``) ago, a UTC date with or
        without a time, or a jid. The default is all that the job cache holds.

    .. code-block:: bash

        salt-run mysql_jobcache.reconcile
        salt-run mysql_jobcache.reconcile since=2h
    """
    return verbs.reconcile(__opts__, since, _show)


def _show(line):
    # For people alone: a program reads what the function returns.
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{line}\033[K")
        sys.stderr.flush()


@_clearly
def dead_letters(show=None, delete=None, export=None, limit=50):
    """
    What did not become a row: refused by the database, not confirmed by the master's job cache, or too large. Lists
    the newest ``limit``, oldest of them first.

    show
        The ``seq`` of one, to see it whole.
    delete
        The ``seq`` of one, or ``all``. The books count it as dropped.
    export
        A file to create, with all of them as JSON lines.

    .. code-block:: bash

        salt-run mysql_jobcache.dead_letters
        salt-run mysql_jobcache.dead_letters show=1042
        salt-run mysql_jobcache.dead_letters export=/root/letters.jsonl
        salt-run mysql_jobcache.dead_letters delete=all
    """
    return verbs.dead_letters(__opts__, show=show, delete=delete, export=export, limit=limit)


@_clearly
def retry(which, trust=False):
    """
    Try dead letters again: one by its ``seq``, or ``all``.

    trust
        Store what the master's job cache does not confirm: you have looked at it.

    .. code-block:: bash

        salt-run mysql_jobcache.retry all
        salt-run mysql_jobcache.retry 1042 trust=True
    """
    return verbs.retry(__opts__, which, trust)


def _upkeep():
    from salt_mysql_engine import upkeep

    return upkeep


@_clearly
def schema():
    """
    The server, whose tables the database has (none, those of 2014, saltext.mysql's, ours with their version, or
    another tool's), what is missing in them, how large they are, and what to do. Works without a running engine, and
    changes nothing.

    .. code-block:: bash

        salt-run mysql_jobcache.schema
    """
    return _upkeep().schema(__opts__)


@_clearly
def migrate(dry_run=False):
    """
    Upgrade the tables in place, whatever they are now: keys, four-byte text, wide columns, and the partitions that
    the settings ask for. Of rows that are there twice the first stands. Columns, keys and rows of others stay. The
    engine and other writers keep running. The database's disk needs room for about twice the largest table. A run that
    was interrupted continues where it stopped when it is started again.

    dry_run
        ``True``: say what would be done, how much room and about how long it takes; change nothing.

    .. code-block:: bash

        salt-run mysql_jobcache.migrate dry_run=True
        salt-run mysql_jobcache.migrate
    """
    return _upkeep().migrate(__opts__, dry_run, _show)


@_clearly
def purge(retention_days=None, dry_run=False):
    """
    Delete jobs that began longer ago than so many days, with their returns, and events of that age, now. With
    ``archive: true`` in the settings they are moved into the archive tables. The engine does it by itself every hour
    where ``retention_days`` is set.

    retention_days
        The default is the setting of this name. At 0, for ever, nothing is deleted.
    dry_run
        ``True``: say how many rows would go, and which partitions; change nothing.

    .. code-block:: bash

        salt-run mysql_jobcache.purge dry_run=True
        salt-run mysql_jobcache.purge retention_days=90
    """
    return _upkeep().purge(__opts__, retention_days, dry_run, _show)


def _history():
    # PyMySQL and all that reads is for those alone who ask.
    from salt_mysql_engine import history

    return history


def _table(rows):
    # Salt's table outputter would sort the columns. Programs get `rows` alone: --out=json wins.
    return {"outputter": "mysql_jobcache", "data": rows} if rows else rows


@_clearly
def jobs(since=None, until=None, fun=None, user=None, target=None, minion=None, failed=False, limit=50, after=None):
    """
    The newest jobs, newest first, as MySQL has them. Jobs must pass all filters that are given.

    since, until
        When the job began: ``2h`` (or ``30m``, ``1d``) ago, a UTC date with or without a time, or a jid.
    fun, user, target
        What the job ran, who published it, and its target, as a name or a glob of ``*`` and ``?``.
    minion
        A minion that answered, as an id or a glob.
    failed
        ``True``: only jobs that failed on some minion; with ``minion``, on that one.
    limit
        How many, from 1 to 1,000.
    after
        A jid: only older jobs. With the last one of a page, this is the next page.

    .. code-block:: bash

        salt-run mysql_jobcache.jobs
        salt-run mysql_jobcache.jobs since=1d fun='state.*' failed=True
        salt-run mysql_jobcache.jobs minion=web1 limit=10 after=20261123140005250000
        salt-run mysql_jobcache.jobs user=sudo_alice --out=json
    """
    return _table(
        _history().jobs(
            __opts__,
            since=since,
            until=until,
            fun=fun,
            user=user,
            target=target,
            minion=minion,
            failed=failed,
            limit=limit,
            after=after,
        )
    )


@_clearly
def job(jid):
    """
    One job: what it was, how many minions answered, failed and are missing, how long that took, and what the
    failed ones said. Of each kind at most 100 minions are named. What waits in the journal counts too; with MySQL away
    it is all there is.

    .. code-block:: bash

        salt-run mysql_jobcache.job 20261123140005250000
    """
    found = _history().job(__opts__, jid)
    if "error" in found:
        __context__["retcode"] = 1
        return {**found, "retcode": 1}
    return found


@_clearly
def minion(id, limit=20):
    """
    The newest jobs that a minion answered, newest first: the function, whether it went well, and its retcode.

    .. code-block:: bash

        salt-run mysql_jobcache.minion web1
        salt-run mysql_jobcache.minion web1 limit=100
    """
    return _table(_history().minion(__opts__, id, limit=limit))


@_clearly
def failures(since="24h", limit=50):
    """
    The newest returns that failed, newest first, with a line that says why.

    since
        Of jobs that began since then: ``2h`` (or ``30m``, ``1d``) ago, a UTC date with or without a time, or a jid.

    .. code-block:: bash

        salt-run mysql_jobcache.failures
        salt-run mysql_jobcache.failures since=2026-11-23 limit=500
    """
    return _table(_history().failures(__opts__, since=since, limit=limit))
