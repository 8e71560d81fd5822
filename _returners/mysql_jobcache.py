"""
Read the jobs that the ``mysql_jobcache`` engine stored, for ``salt-run jobs.*``.

.. versionadded:: 0.1.0

:depends: the Python package ``salt-mysql-engine`` (``salt-pip install salt-mysql-engine``)

.. code-block:: bash

    salt-run jobs.list_jobs ext_source=mysql_jobcache
    salt-run jobs.lookup_jid 20261122214227130648 ext_source=mysql_jobcache

The connection is the engine's, ``mysql.*`` in the master config. This returner reads only: the engine
writes. It is not a ``master_job_cache`` yet.
"""

import logging

import salt.utils.jid

try:
    from salt_mysql_engine import reader

    HAS_PACKAGE = True
except ImportError:
    HAS_PACKAGE = False

log = logging.getLogger(__name__)

__virtualname__ = "mysql_jobcache"


def __virtual__():
    if not HAS_PACKAGE:
        return False, "the Python package salt-mysql-engine is not installed for Salt"
    return __virtualname__


def _ask(question, nothing):
    # The jobs runner has no use for an exception: say what is wrong, and answer with nothing.
    try:
        return question(reader.Reader(__opts__))
    except (reader.ServerUnavailable, reader.SettingsError) as exc:
        log.error("The jobs in the database cannot be read: %s", exc)
        return nothing


def get_load(jid):
    """
    The job's load; with ``Minions``, the ids that it was published to, where they are known.
    """
    return _ask(lambda db: db.load(jid), {})


def get_jid(jid):
    """
    What each minion returned for the job.
    """
    return _ask(lambda db: db.returns(jid), {})


def get_jids():
    """
    All jobs, by jid, in the form of ``jobs.list_jobs``.
    """
    jobs = _ask(lambda db: db.newest_jobs(0), [])
    return {jid: salt.utils.jid.format_jid_instance(jid, load) for jid, load in jobs}


def get_jids_filter(count, filter_find_job=True):
    """
    The newest ``count`` jobs, oldest first.
    """
    skip = "saltutil.find_job" if filter_find_job else ""
    jobs = _ask(lambda db: db.newest_jobs(count, skip=skip), [])
    return [salt.utils.jid.format_jid_instance_ext(jid, load) for jid, load in jobs]


def get_fun(fun):
    """
    The newest return of each minion for the function ``fun``.
    """
    return _ask(lambda db: db.last_of_function(fun), {})


def get_minions():
    """
    The ids of all minions that returned something.
    """
    return _ask(lambda db: db.minions(), [])
