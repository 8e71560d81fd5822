"""
The jobs of the ``mysql_jobcache`` engine, for ``salt-run jobs.*``; and the master's job cache itself.

.. versionadded:: 0.1.0

:depends: the Python package ``salt-mysql-engine`` (``salt-pip install salt-mysql-engine``)

To ask the database, beside Salt's own job cache:

.. code-block:: bash

    salt-run jobs.list_jobs ext_source=mysql_jobcache
    salt-run jobs.lookup_jid 20261122214227130648 ext_source=mysql_jobcache

To have the jobs there alone:

.. code-block:: yaml

    master_job_cache: mysql_jobcache
    engines:
      - mysql_jobcache

Then the master's processes hand jobs and returns over by local files, which takes some microseconds and no network, and
the engine ships them. What is read is what the database and the engine's journal hold together.

The connection is the engine's, ``mysql.*`` in the master config. On minions this returner does nothing.
"""

import logging

import salt.utils.jid

try:
    from salt_mysql_engine import spool

    HAS_PACKAGE = True
except ImportError:
    HAS_PACKAGE = False

log = logging.getLogger(__name__)

__virtualname__ = "mysql_jobcache"


def __virtual__():
    if not HAS_PACKAGE:
        return False, "the Python package salt-mysql-engine is not installed for Salt"
    return __virtualname__


def _answers():
    # PyMySQL and all that reads is for those alone who ask.
    from salt_mysql_engine.answers import Answers

    return Answers(__opts__)


def get_load(jid):
    """
    The job's load; with ``Minions``, the ids that it was published to, where they are known.
    """
    return _answers().load(str(jid))


def get_jid(jid):
    """
    What each minion returned for the job.
    """
    return _answers().returns(str(jid))


def get_jids():
    """
    All jobs, by jid, in the form of ``jobs.list_jobs``; with ``list_jobs_max`` the newest ones.
    """
    answers = _answers()
    jobs = {jid: _formatted(salt.utils.jid.format_jid_instance, jid, load) for jid, load in answers.jobs()}
    if jobs and __opts__.get("job_cache_store_endtime"):
        for jid, moment in answers.endtimes(min(jobs)).items():
            if jobs.get(jid):
                jobs[jid]["EndTime"] = _endtime(moment)
    return {jid: job for jid, job in jobs.items() if job}


def get_jids_filter(count, filter_find_job=True):
    """
    The newest ``count`` jobs, oldest first.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        log.error("The number of jobs must be a whole number, not %r", count)
        return []
    skip = "saltutil.find_job" if filter_find_job else ""
    jobs = _answers().newest_jobs(count, skip=skip)
    return [job for jid, load in jobs if (job := _formatted(salt.utils.jid.format_jid_instance_ext, jid, load))]


def get_fun(fun):
    """
    The newest return of each minion for the function ``fun``.
    """
    return _answers().last_of_function(str(fun))


def get_minions():
    """
    The ids of all minions that returned something.
    """
    return _answers().minions()


def get_endtime(jid):
    """
    When the last return of the job came, as ``jobs.list_job`` shows it; ``False`` where nothing did.
    """
    moment = _answers().endtime(str(jid))
    return _endtime(moment) if moment else False


def _endtime(moment):
    return salt.utils.jid.jid_to_time(f"{moment:%Y%m%d%H%M%S%f}")


def _formatted(form, jid, load):
    try:
        return form(jid, load)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:  # a row that is no job of Salt's
        log.debug("The job %r cannot be shown: %s", jid, exc)
        return None


def _hand_off(work):
    # Whatever goes wrong, the master's work goes on.
    try:
        hand = spool.current()
        if hand is None:
            if __opts__.get("__role") == "minion":
                log.error("The returner mysql_jobcache is the master's: use it there, as master_job_cache")
                return
            hand = spool.of(__opts__)
        work(hand)
    except Exception:  # pylint: disable=broad-except
        log.exception("mysql_jobcache could not take what the master gave it")


def prep_jid(nocache=False, passed_jid=None):
    """
    A new job id, or the one that was passed.
    """
    jid = passed_jid or salt.utils.jid.gen_jid(__opts__)
    if nocache:
        _hand_off(lambda to: to.keep_out(jid))
    return jid


def save_load(jid, load, minions=None):
    """
    Store what was published, and to whom. Salt gives each return here, too, which says all of itself (``returner``).
    """
    if "return" not in load:
        _hand_off(lambda to: to.published(jid, load, minions))


def save_minions(jid, minions, syndic_id=None):  # noqa: ARG001 (Salt calls it so)
    """
    Store the minions that a syndic found for a job.
    """
    _hand_off(lambda to: to.minions(jid, minions))


def returner(load):
    """
    Store a return.
    """
    if load.get("jid") == "req":
        load["jid"] = prep_jid(nocache=load.get("nocache", False))
    _hand_off(lambda to: to.returned(load))


def event_return(events):
    """
    Store events in ``salt_events``: with ``event_return: mysql_jobcache``.
    """
    _hand_off(lambda to: to.events(events))


def update_endtime(jid, time):
    """
    Nothing to do: a job's end is the time of its last return (``get_endtime``).
    """


def clean_old_jobs():
    """
    Nothing to do: the engine deletes what is older than its ``retention_days``.
    """
