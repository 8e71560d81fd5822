"""Every option of the engine, once: name, type, default, bounds, meaning.

The reference page (``docs/options.md``) is generated from this table by ``python -m
salt_mysql_engine.settings``. Two sources are laid over the defaults: the engine's block in the
master config, then the pillar of the master's own id. What is wrong in the master config is logged
and its default is used; a pillar is taken whole or not at all, so that a typing error leaves the last
good settings in effect.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Mapping
from typing import Any

from .errors import SettingsError

PILLAR_KEY = "mysql_jobcache"


_MOST_TEXTS, _MOST_CHARACTERS = 1000, 1000
_MOST_SAID = 100
"""Characters of a value that a sentence says again."""
MOST_PROBLEMS = 20
"""Of many sentences so many are said."""


class Source(str, enum.Enum):
    """Where a setting in effect came from."""

    DEFAULT = "default"
    MASTER_CONFIG = "master config"
    PILLAR = "pillar"


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: a default, what it must be, and what it is for (``doc``, one paragraph)."""

    default: Any
    doc: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str | bool, ...] = ()
    unit: str = ""

    @property
    def bounds(self) -> str:
        """The values that are allowed, for people."""
        if self.choices:
            return " or ".join(str(choice).lower() for choice in self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, list):
            return f"a list of {_MOST_TEXTS:,} texts at most"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        return f"{kind} from {self.minimum:,} to {self.maximum:,}{' ' * bool(self.unit)}{self.unit}"

    def parse(self, name: str, value: Any) -> Any:
        """The value in the option's own type.

        Raises:
            SettingsError: naming the option, what was given and what is allowed.
        """
        wrong = SettingsError(f"{name}: {_said(value)} is not allowed; it must be {self.bounds}")
        if self.choices:
            if not any(type(value) is type(choice) and value == choice for choice in self.choices):  # 1 is not true
                raise wrong
            return value
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise wrong
            return value
        if isinstance(self.default, list):
            if not isinstance(value, (list, tuple)) or len(value) > _MOST_TEXTS:
                raise wrong
            if not all(isinstance(item, str) and len(item) <= _MOST_CHARACTERS for item in value):
                raise wrong
            return list(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong
        assert self.minimum is not None
        assert self.maximum is not None
        if not self.minimum <= value <= self.maximum:
            raise wrong
        if isinstance(self.default, int) and value != int(value):
            raise wrong
        return type(self.default)(value)


OPTIONS: dict[str, Option] = {
    "batch_size": Option(500, "Rows in a batch: so many pending rows are written at once.", 1, 50_000, unit="rows"),
    "batch_bytes": Option(
        4 * 1024 * 1024,
        "SQL text in a batch: a batch never holds more, except a single row that is larger. Statements "
        "end at 1 MiB, or below the server's max_allowed_packet.",
        16 * 1024,
        256 * 1024 * 1024,
        unit="bytes",
    ),
    "flush_interval": Option(
        1.0,
        "How long the oldest pending row may wait for its batch to fill. A timer ends the wait, not the next event.",
        0.01,
        300.0,
        unit="seconds",
    ),
    "connect_timeout": Option(5.0, "Time for connecting and logging in to one host.", 0.1, 300.0, unit="seconds"),
    "statement_timeout": Option(
        30.0,
        "Time for one statement or COMMIT; after it the connection is given up and the batch is tried again.",
        0.1,
        3600.0,
        unit="seconds",
    ),
    "schema": Option(
        "create",
        "create: create the tables that are missing. check: touch nothing, and say what is missing.",
        choices=("create", "check"),
    ),
    "runner_jobs": Option(True, "Store runner jobs (orchestration too), under the master's id."),
    "wheel_jobs": Option(True, "Store wheel jobs, under the master's id."),
    "skip_functions": Option(
        ["saltutil.find_job"],
        "Functions whose jobs and returns are not stored, as globs. The default is what the master itself asks while a "
        "command waits; an empty list stores that too.",
    ),
    "skip_values": Option(
        ["runner.jobs.*", "runner.mysql_jobcache.*", "wheel.config.values", "wheel.key.*"],
        "Functions whose values are not stored, as globs: the row says that the value was left out. The default is "
        "what viewers of jobs ask the master for again and again, and what tells its secrets.",
    ),
    "events": Option(
        [],
        "Tags of events to store in salt_events, as globs, beside the job tables: what event_return would store.",
    ),
    "verify_returns": Option(
        "auto",
        "true: a job or return becomes a row only once the master's own job cache holds it, and as that holds it; any "
        "accepted minion can put another one's return on the bus, but not into the cache. auto: true where the master "
        "keeps a local job cache (master_job_cache: local_cache, job_cache: true, no ext_job_cache), else false.",
        choices=("auto", True, False),
    ),
    "verify_wait_seconds": Option(
        10.0,
        "How long a return may wait for its copy in the job cache, holding no other up; then it is a dead letter. "
        "While 100,000 wait nothing new is read, and each waits for a second at most.",
        0.1,
        3600.0,
        unit="seconds",
    ),
    "max_event_bytes": Option(
        16 * 1024 * 1024,
        "The largest event that is opened, and the largest of a job's files in the job cache; its row may have twice "
        "as much. What is larger is a dead letter, and the job cache still has it. The process that decodes large "
        "events may take twelve times as much memory.",
        1024 * 1024,
        48 * 1024 * 1024,
        unit="bytes",
    ),
    "max_event_objects": Option(
        500_000,
        "The most values in an event: what has more is a dead letter too.",
        300_000,
        50_000_000,
        unit="objects",
    ),
    "reconcile_interval_seconds": Option(
        600.0,
        "How often the master's job cache is compared with the database for what the bus did not bring; this also "
        "happens after a start and after every gap on the bus. 0: only then.",
        0.0,
        86_400.0,
        unit="seconds",
    ),
    "journal_max_bytes": Option(
        2 * 1024**3,
        "How large the journal may grow while the database is away, together with what the master's processes have "
        "handed over and the engine did not take yet. Those processes know the master config alone, not the pillar.",
        1024 * 1024,
        1024**4,
        unit="bytes",
    ),
    "journal_max_age_hours": Option(
        0.0,
        "Events that have waited longer are dropped, and counted, once a pillar was compiled. 0: none.",
        0.0,
        24.0 * 366,
        unit="hours",
    ),
    "journal_full": Option(
        "drop_newest",
        "What a full journal gives up, counted: drop_newest: the events that come; drop_oldest: those that waited "
        "longest. The job cache still has what came within keep_jobs_seconds, and reconcile brings it back.",
        choices=("drop_newest", "drop_oldest"),
    ),
    "dead_letters_max": Option(
        10_000,
        "Dead letters of each reason that are kept, all together in a quarter of journal_max_bytes; beyond either the "
        "oldest are dropped, and counted.",
        0,
        1_000_000,
        unit="letters",
    ),
    "retention_days": Option(
        0.0,
        "Jobs that began longer ago are deleted from the tables, with their returns, and events of that age too. 0: "
        "everything stays; Salt's keep_jobs_seconds means nothing here.",
        0.0,
        36_500.0,
        unit="days",
    ),
    "archive": Option(
        False,
        "What retention_days takes out of the tables is moved to jids_archive, salt_returns_archive and "
        "salt_events_archive, the tables of saltext.mysql's archive_jobs.",
    ),
    "partitions": Option(
        "none",
        "Partitions of jids and salt_returns by the time in the jid, in tables that the engine creates or that migrate "
        "changes. The engine makes new partitions ahead of time, and retention drops whole ones.",
        choices=("none", "day", "week", "month"),
    ),
    "list_jobs_max": Option(
        0,
        "How many jobs get_jids gives, which is what salt-run jobs.list_jobs begins with: the newest ones. 0: all, as "
        "every job cache does. Whoever asks reads it in the master config: the pillar does not reach there.",
        0,
        10_000_000,
        unit="jobs",
    ),
    "pillar_refresh_seconds": Option(
        60.0,
        "How often the master's own pillar is compiled for these options.",
        1.0,
        86_400.0,
        unit="seconds",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings in effect. Fields are the options of the table above, units as there."""

    batch_size: int
    batch_bytes: int
    flush_interval: float
    connect_timeout: float
    statement_timeout: float
    schema: str
    runner_jobs: bool
    wheel_jobs: bool
    skip_functions: list[str]
    skip_values: list[str]
    events: list[str]
    verify_returns: str | bool
    verify_wait_seconds: float
    max_event_bytes: int
    max_event_objects: int
    reconcile_interval_seconds: float
    journal_max_bytes: int
    journal_max_age_hours: float
    journal_full: str
    dead_letters_max: int
    retention_days: float
    archive: bool
    partitions: str
    list_jobs_max: int
    pillar_refresh_seconds: float
    sources: Mapping[str, Source]

    def report(self) -> dict[str, dict[str, Any]]:
        """Each setting's value and where it came from, for ``status``."""
        return {name: {"value": getattr(self, name), "source": self.sources[name].value} for name in OPTIONS}


def parse(options: Any) -> tuple[dict[str, Any], list[str]]:
    """One source's options, checked: the good values, and a sentence for each that is not.

    An unknown name is answered with the nearest known one.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    if not isinstance(options, Mapping):
        return {}, [f"{PILLAR_KEY}: {_said(options)} is no mapping; write options as `name: value`, one on each line"]
    for name, value in options.items():
        if name not in OPTIONS:
            problems.append(_unknown(str(name)[:_MOST_SAID]))
            continue
        try:
            values[name] = OPTIONS[name].parse(name, value)
        except SettingsError as exc:
            problems.append(str(exc))
    return values, problems


def combine(master_config: Mapping[str, Any], pillar: Mapping[str, Any]) -> Settings:
    """Settings from two sources that :func:`parse` has checked; the pillar wins."""
    values = {name: option.default for name, option in OPTIONS.items()}
    sources = dict.fromkeys(OPTIONS, Source.DEFAULT)
    for source, given in ((Source.MASTER_CONFIG, master_config), (Source.PILLAR, pillar)):
        values.update(given)
        sources.update(dict.fromkeys(given, source))
    return Settings(**values, sources=sources)


def usable_opts(opts: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The master's opts as the engine can use them, and a sentence for each that it cannot: its default stands then."""
    usable, problems = dict(opts), []

    def use(name: str, value: Any, wanted: str) -> None:
        if value is None:
            problems.append(f"{name}: {_said(opts[name])} is not allowed; it must be {wanted}")
        usable[name] = _MASTER_DEFAULTS[name] if value is None else value

    for name, most in (("keep_jobs_seconds", 10**12), ("tcp_master_pub_port", 65_535)):
        given = opts.get(name, _MASTER_DEFAULTS[name])
        good = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 <= given <= most
        use(name, type(_MASTER_DEFAULTS[name])(given) if good else None, "a whole number, 0 or more")
    usable["keep_jobs_seconds"] = usable["keep_jobs_seconds"] or float("inf")  # 0: for ever
    for name in ("cluster_peers", "event_return"):
        given = opts.get(name) or []
        given = [given] if isinstance(given, str) else given
        good = isinstance(given, (list, tuple)) and all(isinstance(item, str) for item in given)
        use(name, list(given) if good else None, "a text or a list of texts")
    usable["id"] = str(opts["id"])
    return usable, problems


def peers(opts: Mapping[str, Any]) -> list[str] | None:
    """The master's peers in its cluster, of opts that :func:`usable_opts` gave; ``None`` without a cluster."""
    return opts["cluster_peers"] if opts.get("cluster_id") else None


_MASTER_DEFAULTS: dict[str, Any] = {
    "keep_jobs_seconds": 86_400.0,
    "tcp_master_pub_port": 4512,
    "cluster_peers": [],
    "event_return": [],
}


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}..."


def of_master(opts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands under the engine in the master config of ``opts``; for other processes than the engine's own."""
    engines = opts.get("engines") or []
    for engine in engines if isinstance(engines, list) else [engines]:
        if isinstance(engine, Mapping):
            for name, options in engine.items():
                # ``{name: {engine_module: mysql_jobcache}}`` names one engine's second copy (salt/engines/__init__.py)
                if isinstance(options, Mapping) and options.get("engine_module", name) == PILLAR_KEY:
                    return {key: value for key, value in options.items() if key != "engine_module"}
    return {}


def _unknown(name: str) -> str:
    if name.startswith("mysql.") or name in _CONNECTION:
        return f"{name}: the connection is set by mysql.* in the master config, not here"
    near = difflib.get_close_matches(name, OPTIONS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(OPTIONS)}"
    return f"{name}: no such option; {hint}"


_CONNECTION = (
    "host",
    "port",
    "user",
    "pass",
    "passwd",
    "password",
    "db",
    "unix_socket",
    "ssl_ca",
    "ssl_cert",
    "ssl_key",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """Where and as whom to log in: ``mysql.*`` of the master config."""

    hosts: tuple[str, ...] = ("salt",)
    port: int = 3306
    user: str = "salt"
    password: str = dataclasses.field(default="salt", repr=False)
    db: str = "salt"
    unix_socket: str | None = None
    ssl_ca: str | None = None
    ssl_cert: str | None = None
    ssl_key: str | None = None

    @property
    def tls(self) -> bool:
        """Whether the connection must be encrypted: any ``ssl_*`` is given."""
        return bool(self.ssl_ca or self.ssl_cert or self.ssl_key)

    @classmethod
    def from_opts(cls, opts: Mapping[str, Any]) -> Connection:
        """Reads ``mysql.host`` or ``mysql: {host:}``, with the defaults of saltext.mysql 1.1.0.

        The flat form wins, as in ``config.option``. ``None`` and the text ``none`` mean unset, as there.

        Raises:
            SettingsError: naming the option that cannot be used.
        """
        nested = opts.get("mysql")
        nested = nested if isinstance(nested, Mapping) else {}

        def get(*names: str) -> Any:
            for name in names:
                value = opts.get(f"mysql.{name}", nested.get(name))
                if value is not None and str(value).lower() != "none":
                    return value
            return None

        given: dict[str, Any] = {}
        hosts = get("host")
        if hosts is not None:
            given["hosts"] = tuple(hosts) if isinstance(hosts, (list, tuple)) else (hosts,)
            if not given["hosts"] or not all(isinstance(host, str) and host for host in given["hosts"]):
                raise SettingsError(f"mysql.host: {hosts!r} must be a host name or a list of them")
        port = get("port")
        if port is not None:
            if not str(port).isdecimal() or not 0 < int(port) < 65536:
                raise SettingsError(f"mysql.port: {port!r} must be a whole number from 1 to 65535")
            given["port"] = int(port)
        for field, names in (
            ("user", ("user",)),
            ("password", ("pass", "passwd", "password")),
            ("db", ("db",)),
            ("unix_socket", ("unix_socket",)),
            ("ssl_ca", ("ssl_ca",)),
            ("ssl_cert", ("ssl_cert",)),
            ("ssl_key", ("ssl_key",)),
        ):
            value = get(*names)
            if value is not None:
                given[field] = str(value)
        return cls(**given)


def reference() -> str:
    """The options as a Markdown page."""
    lines = [
        "# Options",
        "",
        "Generated from `salt_mysql_engine/settings.py` by `python -m salt_mysql_engine.settings > docs/options.md`.",
        "",
        "Each can stand under the engine in the master config, or under `mysql_jobcache` in the pillar of the",
        "master's own id; the pillar wins, and takes effect while the engine runs.",
        "",
        "| option | default | allowed | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for name, option in OPTIONS.items():
        lines.append(f"| `{name}` | `{option.default}` | {option.bounds} | {option.doc} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201 (this is the page's generator)
