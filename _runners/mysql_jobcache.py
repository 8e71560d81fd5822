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
    Write what is pending now, and return when it is in MySQL; or say why it is not after ``timeout`` seconds.

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
    What did not become a row: refused by the database, or not confirmed by the master's job cache. Lists the newest
    ``limit``, oldest of them first.

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
