"""
Store job returns in MySQL or MariaDB, without the master ever waiting for the database.

The engine reads the master's event bus, keeps every job, return, runner and wheel job in a local
journal, and ships them from there in batches to the tables ``jids``, ``salt_returns`` and
``salt_events``, of the names and meaning that the ``mysql`` returner has.

.. versionadded:: 0.1.0

:depends: the Python package ``salt-mysql-engine`` (``salt-pip install salt-mysql-engine``)

:configuration: Minimal, in the master config:

    .. code-block:: yaml

        mysql.host: db.example.com
        mysql.user: salt
        mysql.pass: salt_pass
        mysql.db: salt
        engines:
          - mysql_jobcache

    With options:

    .. code-block:: yaml

        engines:
          - mysql_jobcache:
              batch_size: 500        # rows
              flush_interval: 1.0    # seconds
              events: ['salt/auth', 'my/deploy/*']

    The options can also stand under ``mysql_jobcache`` in the pillar of the master's own id; they then
    take effect while the engine runs.
"""

import logging

try:
    import salt_mysql_engine

    HAS_PACKAGE = bool(salt_mysql_engine.__version__)
except ImportError:
    HAS_PACKAGE = False

log = logging.getLogger(__name__)

__virtualname__ = "mysql_jobcache"


def __virtual__():
    # Always: Salt says nothing at all about an engine that does not load.
    _wait_for_options()
    return __virtualname__


def start(**options):
    """
    Run the engine until the master stops. ``options`` are described in the package's docs/options.md.
    """
    if not HAS_PACKAGE:
        _wait_for_package()
        return
    from salt_mysql_engine import engine

    engine.start(__opts__, options)


def _wait_for_package():
    # An engine that returns is started again every ten seconds; waiting says it once.
    import threading

    log.error(
        "The engine mysql_jobcache does nothing: the Python package salt-mysql-engine is not installed for Salt. "
        "Run `salt-pip install salt-mysql-engine` (or pip, beside a pip-installed Salt) and restart salt-master."
    )
    threading.Event().wait()


def _wait_for_options():
    # Salt calls start(**options): where these are no mapping it fails before anything of ours runs, every ten seconds
    # and without a reason (Engine.run, salt/engines/__init__.py 3006-3008). This runs a step earlier, in that process.
    import multiprocessing
    import threading

    process = multiprocessing.current_process()
    options = getattr(process, "config", None)
    if not options or isinstance(options, dict) or getattr(process, "fun", "") != f"{__virtualname__}.start":
        return
    log.error(
        "The engine mysql_jobcache does nothing: its options under engines in the master config are a %s, and must be "
        "a mapping: write `name: value`, one on each line, two more spaces to the right than mysql_jobcache. Then "
        "restart salt-master.",
        "text" if isinstance(options, str) else "list",
    )
    threading.Event().wait()
