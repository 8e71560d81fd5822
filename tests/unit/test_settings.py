"""Options: what is allowed, what is answered to a typing error, and which source wins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from salt_mysql_engine import settings
from salt_mysql_engine.errors import SettingsError
from salt_mysql_engine.settings import OPTIONS, Connection, Source

ROOT = Path(__file__).parents[2]
NUMBERS = {name: option for name, option in OPTIONS.items() if option.minimum is not None}

every_number = pytest.mark.parametrize("name", NUMBERS)


def problem(name: str, value: Any) -> str:
    values, problems = settings.parse({name: value})
    assert values == {}
    (said,) = problems
    return said


@pytest.mark.parametrize("name", OPTIONS)
def test_every_default_is_within_its_own_bounds(name: str) -> None:
    assert OPTIONS[name].parse(name, OPTIONS[name].default) == OPTIONS[name].default


@every_number
def test_a_number_is_taken_up_to_its_bounds_and_no_further(name: str) -> None:
    option = NUMBERS[name]
    low, high = option.minimum, option.maximum
    assert low is not None
    assert high is not None
    for good in (low, high):
        values, problems = settings.parse({name: good})
        assert (values, problems) == ({name: good}, [])
        assert type(values[name]) is type(option.default)
    for bad in (low * 0.99 or -0.01, math.nextafter(low, -math.inf), high + 1, math.nextafter(high, math.inf), -1):
        assert problem(name, bad).startswith(f"{name}: {bad!r} is not allowed; it must be a")


@every_number
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True, "7", None, [7], {}], ids=repr)
def test_what_is_no_finite_number_is_a_problem_and_never_an_exception(name: str, bad: Any) -> None:
    assert "is not allowed" in problem(name, bad)


def test_a_whole_number_may_be_written_with_a_point_but_not_be_a_fraction() -> None:
    assert settings.parse({"batch_size": 100.0}) == ({"batch_size": 100}, [])
    assert "a whole number from 1 to 50,000 rows" in problem("batch_size", 100.5)


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("schema", "drop", "create or check"),
        ("schema", ["create"], "create or check"),
        ("runner_jobs", 1, "true or false"),
        ("wheel_jobs", "yes", "true or false"),
        ("skip_functions", "test.ping", "a list of 1,000 texts at most"),
        ("events", ["salt/*", 5], "a list of 1,000 texts at most"),
        *[("verify_returns", bad, "auto or true or false") for bad in ("yes", "true", "Auto", "", 1, 0, 1.0, None, [])],
        *[("journal_full", bad, "drop_newest or drop_oldest") for bad in ("drop", True, None, ["drop_oldest"])],
    ],
)
def test_a_value_of_the_wrong_kind_is_answered_with_what_is_allowed(name: str, bad: Any, allowed: str) -> None:
    assert problem(name, bad) == f"{name}: {bad!r} is not allowed; it must be {allowed}"


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("true", True), ("false", False), ("yes", True), ("off", False), ("'auto'", "auto")],
)
def test_verify_returns_is_auto_or_a_truth_as_yaml_gives_it(text: str, value: Any) -> None:
    given_ = yaml.safe_load(f"verify_returns: {text}")
    values, problems = settings.parse(given_)
    assert (values, problems) == ({"verify_returns": value}, [])
    assert values["verify_returns"] is value or value == "auto"
    assert settings.combine(values, {}).verify_returns == value


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_a_full_journal_gives_up_the_newest_or_the_oldest(policy: str) -> None:
    assert settings.parse({"journal_full": policy}) == ({"journal_full": policy}, [])


def test_a_number_that_may_be_zero_switches_something_off() -> None:
    assert {name for name, option in NUMBERS.items() if option.minimum == 0} == {
        "dead_letters_max",
        "journal_max_age_hours",
        "list_jobs_max",
        "reconcile_interval_seconds",
        "retention_days",
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("batchsize", "batch_size"), ("flush_intervall", "flush_interval"), ("event", "events"), ("Schema", "schema")],
)
def test_an_unknown_name_is_answered_with_the_nearest_known_one(name: str, nearest: str) -> None:
    assert problem(name, 1) == f"{name}: no such option; did you mean {nearest}?"


def test_a_name_like_no_other_is_answered_with_all_that_are_known() -> None:
    assert all(name in problem("zzz", 1) for name in OPTIONS)


@pytest.mark.parametrize("name", ["mysql.host", "host", "pass", "unix_socket"])
def test_a_connection_option_in_the_wrong_place_is_answered_with_the_right_one(name: str) -> None:
    assert "mysql.* in the master config" in problem(name, "x")


@given(st.dictionaries(st.text() | st.none() | st.integers(), st.floats() | st.text() | st.lists(st.integers())))
def test_every_option_given_is_either_a_value_or_a_problem(options: dict[Any, Any]) -> None:
    values, problems = settings.parse(options)
    assert len(values) + len(problems) == len(options)


def test_one_wrong_option_does_not_cost_the_others() -> None:
    values, problems = settings.parse({"batch_size": 0, "flush_interval": 2, "events": ("a/*",)})
    assert values == {"flush_interval": 2.0, "events": ["a/*"]}
    assert len(problems) == 1


def test_the_pillar_wins_over_the_master_config_which_wins_over_the_defaults() -> None:
    chosen = settings.combine({"batch_size": 10, "flush_interval": 5.0}, {"batch_size": 20})
    assert (chosen.batch_size, chosen.flush_interval, chosen.schema) == (20, 5.0, "create")
    report = chosen.report()
    assert list(report) == list(OPTIONS)
    assert report["batch_size"] == {"value": 20, "source": "pillar"}
    assert report["flush_interval"] == {"value": 5.0, "source": "master config"}
    assert report["schema"] == {"value": "create", "source": "default"}
    assert {source.value for source in Source} == {entry["source"] for entry in report.values()}


def test_the_reference_page_is_what_the_table_of_options_gives() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == settings.reference(), "run: python -m salt_mysql_engine.settings > docs/options.md"
    assert all(f"\n| `{name}` | `{option.default}` |" in page for name, option in OPTIONS.items())


def test_without_any_mysql_options_the_defaults_are_those_of_saltext_mysql() -> None:
    assert Connection.from_opts({}) == Connection(
        hosts=("salt",), port=3306, user="salt", password="salt", db="salt", ssl_ca=None, ssl_cert=None, ssl_key=None
    )


GIVEN = {"host": "db", "user": "u", "pass": "p", "db": "d", "port": 3307, "unix_socket": "/s", "ssl_ca": "/ca"}
MEANT = Connection(hosts=("db",), user="u", password="p", db="d", port=3307, unix_socket="/s", ssl_ca="/ca")


@pytest.mark.parametrize("given", [{f"mysql.{key}": value for key, value in GIVEN.items()}, {"mysql": GIVEN}])
def test_the_flat_and_the_nested_form_mean_the_same(given: dict[str, Any]) -> None:
    assert Connection.from_opts(given) == MEANT


def test_the_flat_form_wins_over_the_nested_one() -> None:
    login = Connection.from_opts({"mysql.host": "flat", "mysql": {"host": "nested", "db": "nested"}})
    assert (login.hosts, login.db) == (("flat",), "nested")


@pytest.mark.parametrize("name", ["pass", "passwd", "password"])
def test_the_password_has_three_names(name: str) -> None:
    assert Connection.from_opts({f"mysql.{name}": "secret"}).password == "secret"
    assert Connection.from_opts({"mysql": {name: "secret"}}).password == "secret"


@pytest.mark.parametrize("unset", [None, "none", "None"])
def test_none_means_unset(unset: Any) -> None:
    assert Connection.from_opts({f"mysql.{name}": unset for name in GIVEN}) == Connection()


def test_a_password_is_taken_as_it_is_even_when_yaml_made_a_number_of_it() -> None:
    assert Connection.from_opts({"mysql.pass": 12345}).password == "12345"
    assert Connection.from_opts({"mysql.pass": ""}).password == ""


def test_the_password_is_not_in_what_is_printed() -> None:
    assert "hunter2" not in repr(Connection(password="hunter2"))


@pytest.mark.parametrize("port", [1, 65535, "3306", "1"])
def test_a_port_may_be_a_number_or_its_text(port: Any) -> None:
    assert Connection.from_opts({"mysql.port": port}).port == int(port)


@pytest.mark.parametrize("port", [0, 65536, -1, 3306.5, "mysql", "", True, [3306]])
def test_a_port_that_is_none_is_refused_by_name(port: Any) -> None:
    with pytest.raises(SettingsError, match=r"^mysql\.port: "):
        Connection.from_opts({"mysql.port": port})


def test_hosts_may_be_a_list_and_keep_their_order() -> None:
    assert Connection.from_opts({"mysql.host": ["db1", "db2"]}).hosts == ("db1", "db2")


@pytest.mark.parametrize("host", ["", [], ["db", ""], ["db", 5], 5, True, {"db": 1}], ids=repr)
def test_a_host_that_is_none_is_refused_by_name(host: Any) -> None:
    with pytest.raises(SettingsError, match=r"^mysql\.host: "):
        Connection.from_opts({"mysql.host": host})


@pytest.mark.parametrize("name", ["ssl_ca", "ssl_cert", "ssl_key"])
def test_any_ssl_option_asks_for_encryption(name: str) -> None:
    assert Connection.from_opts({f"mysql.{name}": "/etc/x.pem"}).tls
    assert not Connection().tls


def test_the_masters_own_options_are_taken_as_they_are_where_they_can_be() -> None:
    opts = {
        "id": 7,
        "keep_jobs_seconds": 3600,
        "tcp_master_pub_port": 14512,
        "cluster_peers": ("a", "b"),
        "event_return": "mysql",
        "sock_dir": "/run",
    }
    usable, problems = settings.usable_opts(opts)
    assert problems == []
    assert usable == {
        "id": "7",
        "keep_jobs_seconds": 3600.0,
        "tcp_master_pub_port": 14512,
        "cluster_peers": ["a", "b"],
        "event_return": ["mysql"],
        "sock_dir": "/run",
    }


def test_what_the_master_does_not_say_has_salts_own_default() -> None:
    usable, problems = settings.usable_opts({"id": "m"})
    assert problems == []
    assert usable == {
        "id": "m",
        "keep_jobs_seconds": 86400.0,
        "tcp_master_pub_port": 4512,
        "cluster_peers": [],
        "event_return": [],
    }


def test_peers_are_those_of_a_cluster_alone() -> None:
    usable, _ = settings.usable_opts({"id": "m", "cluster_peers": "other"})
    assert settings.peers(usable) is None
    assert settings.peers({**usable, "cluster_id": "c"}) == ["other"]


def test_jobs_that_are_kept_for_ever_are_so() -> None:
    for for_ever in (0, 0.0):
        assert settings.usable_opts({"id": "m", "keep_jobs_seconds": for_ever})[0]["keep_jobs_seconds"] == math.inf


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("keep_jobs_seconds", None),
        ("keep_jobs_seconds", "86400"),
        ("keep_jobs_seconds", True),
        ("keep_jobs_seconds", -1),
        ("keep_jobs_seconds", 10**12 + 1),
        ("keep_jobs_seconds", math.nan),
        ("tcp_master_pub_port", None),
        ("tcp_master_pub_port", 65_536),
        ("tcp_master_pub_port", "4512"),
        ("cluster_peers", 5),
        ("cluster_peers", {"a": 1}),
        ("cluster_peers", ["a", 5]),
        ("event_return", [None]),
    ],
)
def test_a_master_option_that_cannot_be_used_is_named_and_its_default_stands(name: str, bad: Any) -> None:
    usable, problems = settings.usable_opts({"id": "m", name: bad})
    assert usable == settings.usable_opts({"id": "m"})[0]
    (problem,) = problems
    assert problem.startswith(f"{name}: {bad!r} is not allowed; it must be ")


def test_a_whole_ports_number_is_taken_up_to_the_last_one() -> None:
    for port in (0, 65_535):
        assert settings.usable_opts({"id": "m", "tcp_master_pub_port": port})[0]["tcp_master_pub_port"] == port


OURS = {"journal_max_bytes": 4096}


@pytest.mark.parametrize(
    ("engines", "found"),
    [
        ([{"mysql_jobcache": OURS}], OURS),
        ([{"other": {"a": 1}}, {"mysql_jobcache": OURS}], OURS),
        ([{"other": {"a": 1}, "mysql_jobcache": OURS}], OURS),
        ([{"shipping": {"engine_module": "mysql_jobcache", **OURS}}], OURS),
        ([{"mysql_jobcache": {"engine_module": "other", "a": 1}}, {"mysql_jobcache": OURS}], OURS),
        ({"mysql_jobcache": OURS}, OURS),
        (["mysql_jobcache"], {}),
        ([{"mysql_jobcache": None}], {}),
        ([{"other": OURS}], {}),
        ("mysql_jobcache", {}),
        (None, {}),
    ],
)
def test_other_processes_find_the_engines_options_wherever_salt_takes_them_from(engines: Any, found: Any) -> None:
    assert settings.of_master({"engines": engines}) == found
    assert settings.of_master({}) == {}
