"""
Look at and steer the running ``mysql_jobcache`` engine of this master.

.. versionadded:: 0.1.0

:depends: the Python package ``salt-mysql-engine`` (``salt-pip install salt-mysql-engine``)

.. code-block:: bash

    salt-run mysql_jobcache.status
    salt-run mysql_jobcache.flush
    salt-run mysql_jobcache.reload
    salt-run mysql_jobcache.test_connection
"""

import functools

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
