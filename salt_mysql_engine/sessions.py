"""What every session with the server is, whoever opens it: said by statement at each login, and then asked for.

A server may have other defaults than we need (``sql_mode``, ``completion_type``, ``sql_select_limit``), may not heed
the character set that a client asks for (``skip-character-set-client-handshake``), or may set another one afterwards
(``init_connect``); a proxy may lose what was said. In a session that is not what it must be nothing is read or written:
texts would be stored as others, and in some character sets a backslash is the end of a character, and escapes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import OperatorNeeded

_NO_LIMIT = 2**64 - 1


def statements(*, autocommit: bool) -> tuple[str, ...]:
    """What is said first; none of it needs a privilege."""
    return (
        "SET NAMES utf8mb4 COLLATE utf8mb4_general_ci",
        # Strict: a value that does not fit is an error, never silently cut. No NO_BACKSLASH_ESCAPES: see sql.py.
        # MySQL 8 warns about strict mode without the three between (ER_SQL_MODE_MERGED, 3135).
        "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO,"
        f"NO_ENGINE_SUBSTITUTION', SESSION time_zone = '+00:00', SESSION autocommit = {autocommit:d}, "
        # DEFAULT would be what the server has globally.
        f"SESSION completion_type = 0, SESSION sql_select_limit = {_NO_LIMIT}, SESSION sql_safe_updates = 0, "
        "SESSION sql_big_selects = 1",
        # Next-key locks of the default level make several masters' upserts deadlock.
        "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE",
    )


ABOUT = ("version", "version_comment", "max_allowed_packet")
"""Variables that tell of the server, and are asked for along with the others."""
_MUST_BE = {
    "character_set_client": "utf8mb4",
    "character_set_connection": "utf8mb4",
    "character_set_results": "utf8mb4",
    "time_zone": "+00:00",
    "completion_type": "NO_CHAIN",
    "sql_select_limit": str(_NO_LIMIT),
    "sql_safe_updates": "OFF",
    # MariaDB has had the second name of each until 11.1, MySQL has the first alone.
    "transaction_isolation": "READ-COMMITTED",
    "tx_isolation": "READ-COMMITTED",
    "transaction_read_only": "OFF",
    "tx_read_only": "OFF",
}

QUESTION = "SHOW SESSION VARIABLES WHERE Variable_name IN ({})".format(
    ", ".join(f"'{name}'" for name in (*_MUST_BE, "sql_mode", "autocommit", *ABOUT))
)


def check(answer: Iterable[tuple[Any, ...]], host: str, *, autocommit: bool) -> dict[str, str]:
    """The variables that answer :data:`QUESTION`, when they are as they must be.

    Raises:
        OperatorNeeded: the server did not do as it was told, or something between us undid it.
    """
    found = {str(name): str(value) for name, value in answer}
    must_be = {**_MUST_BE, "autocommit": "ON" if autocommit else "OFF"}
    wrong = [
        f"{name} is {found[name]!r} instead of {value!r}"
        for name, value in must_be.items()
        if name in found and found[name].lower() != value.lower()
    ]
    wrong += [f"{name} is not told" for name in list(_MUST_BE)[:3] if name not in found]
    modes = found.get("sql_mode", "").split(",")
    if "STRICT_ALL_TABLES" not in modes or "NO_BACKSLASH_ESCAPES" in modes:
        wrong.append(f"sql_mode is {found.get('sql_mode', '')!r} instead of STRICT_ALL_TABLES and others")
    if wrong:
        raise OperatorNeeded(
            f"{host}: the session is not what it must be, and nothing is written in it: {'; '.join(wrong)}. It was set "
            "at login; look for what sets it back, in the server or in a proxy before it"
        )
    return found
