"""SQL text: whatever a stranger wrote stays inside its quotes, and statements stay under the limit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from salt_mysql_engine import schema, sql
from salt_mysql_engine.records import Event, Return

texts = st.text() | st.text(alphabet="\\'\"`%;-\x00\n\x1aaé😀(), ")
_STRING = re.compile(r"'((?:[^'\\]|\\.|'')*)'", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)|''", re.DOTALL)


def literals(statement: bytes) -> tuple[list[str], str]:
    """The strings that MySQL's lexer reads in a statement, and the rest with ``?`` in their places.

    Manual, "String Literals": ``''`` is a quote, a backslash escapes, an unknown escape is the character itself.
    """
    special = {"0": "\0", "b": "\b", "n": "\n", "r": "\r", "t": "\t", "Z": "\x1a"}

    def unescaped(match: re.Match[str]) -> str:
        return "'" if match[1] is None else special.get(match[1], match[1])

    text = statement.decode()
    return [_ESCAPE.sub(unescaped, found) for found in _STRING.findall(text)], _STRING.sub("?", text)


@given(texts)
@example("\\' OR 1=1 -- ")
@example("\\")
@example("''\\''")
def test_any_text_comes_back_from_its_literal_and_nothing_stands_outside(text: str) -> None:
    assert literals(sql.quote(text).encode()) == ([text], "?")


def test_a_value_in_the_place_of_an_identifier_cannot_be() -> None:
    heads = (sql.INSERT_LOADS, sql.INSERT_RETURNS, sql.INSERT_EVENTS, sql.KEEP_LOADS, sql.KEEP_RETURNS, sql.KEEP_EVENTS)
    for head in heads:
        assert not set(b"'\"\\%") & set(head)


@given(texts, texts, texts, texts, texts, st.booleans(), st.booleans())
def test_a_return_row_holds_its_values_in_the_order_of_its_columns(
    jid: str, minion: str, fun: str, value: str, full: str, success: bool, failed: bool
) -> None:
    altered = "2026-01-02 03:04:05.000006"
    ret = Return(jid, minion, fun, value, full, success, altered, {}, failed=failed)
    row = sql.return_row(ret)
    held = [fun, jid, value, minion, "01"[success], full, altered]
    assert literals(row) == (held, f"(?, ?, ?, ?, ?, ?, ?, {failed:d})")
    assert sql.without_failed(row) == sql.return_row(ret, failed=False)
    assert literals(sql.without_failed(row)) == (held, "(?, ?, ?, ?, ?, ?, ?)")
    assert literals(sql.return_row(ret, timed=False, failed=False)) == (held[:-1], "(?, ?, ?, ?, ?, ?)")


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("failed", [True, False])
def test_a_statement_names_just_the_columns_that_a_table_has(timed: bool, failed: bool) -> None:
    head = sql.insert_returns(timed=timed, failed=failed)
    assert (b"alter_time" in head, b"failed" in head) == (timed, failed)
    assert re.fullmatch(rb"INSERT INTO `salt_returns` \((`\w+`, )+`\w+`\) VALUES ", head)


@given(texts, texts, texts, st.binary(min_size=16, max_size=16))
def test_an_event_row_holds_its_values_in_the_order_of_its_columns(
    tag: str, data: str, master: str, key: bytes
) -> None:
    row = sql.event_row(Event(tag, data, "2026-01-02 03:04:05"), master, key)
    assert literals(row) == ([tag, data, "2026-01-02 03:04:05", master, key.hex()], "(?, ?, ?, ?, X?)")


@given(texts, texts)
def test_a_load_is_inserted_and_updated_with_the_same_values(jid: str, load: str) -> None:
    assert literals(sql.load_row(jid, load)) == ([jid, load], "(?, ?)")
    assert literals(sql.update_load(jid, load)) == ([load, jid], "UPDATE `jids` SET `load` = ? WHERE `jid` = ?")


@given(st.lists(texts, min_size=1), st.lists(texts, min_size=1))
def test_look_ups_ask_for_just_the_keys_given(jids: list[str], ids: list[str]) -> None:
    asked, statement = literals(sql.select_loads(jids))
    assert asked == jids
    assert statement.endswith(f"IN ({', '.join('?' * len(jids))}) FOR UPDATE")
    asked, statement = literals(sql.select_stored_loads(jids))
    assert asked == jids
    assert statement.endswith(f"IN ({', '.join('?' * len(jids))})")


def asked_for(statements: Iterable[bytes], before: list[str]) -> list[list[tuple[str, str]]]:
    """The (jid, minion) that each statement asks for."""
    asked = []
    for statement in statements:
        texts_, rest = literals(statement)
        assert texts_[: len(before)] == before
        values_ = iter(texts_[len(before) :])
        lists = re.findall(r"\(`jid` = \? AND `id` IN \(([?, ]+)\)\)", rest)
        assert rest.endswith(" WHERE " + " OR ".join(f"(`jid` = ? AND `id` IN ({marks}))" for marks in lists))
        pairs = []
        for marks in lists:
            jid = next(values_)
            pairs += [(jid, next(values_)) for _ in range(marks.count("?"))]
        assert len(lists) <= sql.MAX_BRANCHES
        assert 0 < len(pairs) <= sql.MAX_KEYS
        assert list(values_) == []
        asked.append(pairs)
    return asked


@given(st.sets(st.tuples(texts, texts)))
def test_returns_are_asked_for_by_job_each_once(pairs: set[tuple[str, str]]) -> None:
    for statements, before in (
        (sql.select_return_lengths(pairs), ['%, "trimmed": true}']),
        (sql.select_values(pairs), []),
        (sql.select_returned(pairs), []),
    ):
        asked = [pair for some in asked_for(statements, before) for pair in some]
        assert sorted(asked) == sorted(pairs)


@pytest.mark.parametrize(
    ("jobs", "minions", "statements"), [(1, 1000, 1), (1, 1001, 2), (2, 999, 2), (100, 10, 1), (101, 1, 2), (350, 3, 4)]
)
def test_no_statement_asks_for_too_much(jobs: int, minions: int, statements: int) -> None:
    pairs = [(f"2026{job:016}", f"web{minion}") for job in range(jobs) for minion in range(minions)]
    asked = asked_for(sql.select_returned(pairs), [])
    assert [pair for some in asked for pair in some] == pairs
    assert len(asked) == statements


@given(texts, texts, texts, texts)
def test_a_whole_return_takes_the_place_of_just_its_own_row(jid: str, minion: str, value: str, full: str) -> None:
    ret = Return(jid, minion, "f", value, full, True, "2026-01-02 03:04:05", {}, failed=True)
    for failed, more in ((True, ", `failed` = 1"), (False, "")):
        asked, rest = literals(sql.update_return(ret, failed=failed))
        assert asked == [value, full, "1", jid, minion]
        assert rest == (
            f"UPDATE `salt_returns` SET `return` = ?, `full_ret` = ?, `success` = ?{more} WHERE `jid` = ? AND `id` = ?"
        )


rows_and_limit = st.tuples(
    st.lists(st.integers(0, 3000).map(lambda size: b"(" + b"x" * size + b")")), st.integers(1, 8 * 1024)
)


@given(rows_and_limit)
def test_statements_hold_every_row_once_and_in_order_under_the_limit(given_: tuple[list[bytes], int]) -> None:
    rows, max_bytes = given_
    sent: list[bytes] = []
    for statement, count in sql.statements(sql.INSERT_RETURNS, rows, sql.KEEP_RETURNS, max_bytes=max_bytes):
        assert statement.startswith(sql.INSERT_RETURNS)
        assert statement.endswith(sql.KEEP_RETURNS)
        inside = statement[len(sql.INSERT_RETURNS) : -len(sql.KEEP_RETURNS)].split(b",")
        assert len(inside) == count > 0
        assert len(statement) <= max_bytes or count == 1
        sent += inside
    assert sent == rows


@pytest.mark.parametrize(("spare", "counts"), [(0, [10]), (-1, [9, 1]), (9, [10])])
def test_a_statement_is_filled_to_its_last_byte_and_no_further(spare: int, counts: list[int]) -> None:
    rows = [b"(1234567)"] * 10  # ten bytes with the comma
    max_bytes = sql.STATEMENT_ROOM + 100 + spare
    made = list(sql.statements(sql.INSERT_LOADS, rows, sql.KEEP_LOADS, max_bytes=max_bytes))
    assert [count for _, count in made] == counts


def test_rows_that_fit_together_go_in_one_statement() -> None:
    ((_, count),) = sql.statements(sql.INSERT_LOADS, [b"(1)"] * 1000, sql.KEEP_LOADS, max_bytes=8 * 1024)
    assert count == 1000


def test_the_room_kept_beside_the_rows_is_enough_for_every_head_and_tail() -> None:
    for head, tail in (
        (sql.INSERT_LOADS_WITH_COLUMNS, sql.KEEP_LOADS),
        (sql.INSERT_RETURNS, sql.KEEP_RETURNS),
        (sql.INSERT_EVENTS, sql.KEEP_EVENTS),
    ):
        assert len(head) + len(tail) < sql.STATEMENT_ROOM


def test_the_schema_file_creates_each_table_with_the_columns_that_are_written() -> None:
    ddl = schema.statements()
    assert ddl.pop(schema.VERSIONS)
    for head in (sql.INSERT_LOADS_WITH_COLUMNS, sql.INSERT_RETURNS, sql.INSERT_EVENTS):
        table, *columns = re.findall(r"`(\w+)`", head.decode())
        statement = ddl.pop(table)
        assert f"CREATE TABLE IF NOT EXISTS `{table}`" in statement
        assert ";" not in statement
        assert all(f"\n    `{column}` " in statement for column in columns)
    assert ddl == {}


@given(texts, texts, texts.map(json.dumps), texts.map(json.dumps), st.booleans(), st.booleans(), st.booleans())
@example("1", "we'b\\1", json.dumps("', 'we''b\\\\1', '1', '"), json.dumps("\\'"), True, True, True)
@example("1", ", ", json.dumps(", "), json.dumps(", "), True, False, False)
def test_the_update_by_a_row_is_the_update_by_its_return(
    job: str, minion: str, value: str, whole: str, success: bool, timed: bool, failed: bool
) -> None:
    ret = Return(job, minion, "f", value, whole, success, "2026-03-29 00:00:00.000000", {}, failed=not success)
    row = sql.return_row(ret, timed=timed, failed=failed)
    by_row = sql.update_return_by_row(job, minion, row, timed=timed, failed=failed)
    assert by_row == sql.update_return(ret, failed=failed)
