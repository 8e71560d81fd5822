"""Every error that the engine raises: the docstring is the message, the verdict is what to do about it.

Driver exceptions stop at ``database.py``; nothing above it knows aiomysql.
"""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """What the writer does with a batch whose statement failed."""

    RETRY = "retry"
    """The server is away, busy or chose us as a victim: the same batch again, after a back-off."""

    OPERATOR = "operator"
    """A person must act (password, privilege, missing table): keep everything, say so, try slowly."""

    TOO_MUCH = "too much"
    """The server is healthy, and the batch is over a limit on a statement or transaction: halve it. No row is at fault,
    so that nothing becomes a dead letter: a row that is too much by itself waits for a person."""

    SPLIT = "split"
    """The server is healthy and refused some row: halve the batch until that row stands alone."""


class EngineError(Exception):
    """The engine could not do what was asked."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class SettingsError(EngineError):
    """An option is unknown or out of its bounds."""


class JournalError(EngineError):
    """The journal could not be opened."""


class GarbageError(EngineError):
    """The bytes on the event bus are not frames of any Salt that we know."""


class ControlError(EngineError):
    """The engine did not answer on its control socket."""


class DatabaseError(EngineError):
    """The database did not take what was sent."""

    verdict = Verdict.RETRY


class ServerUnavailable(DatabaseError):
    """The database server cannot take the batch now."""


class AnswerTimeout(ServerUnavailable):
    """The database server did not answer in time."""


class ConnectionLost(ServerUnavailable):
    """The connection to the database server ended."""


class TransactionAborted(ServerUnavailable):
    """The database server, which is well, gave this transaction up."""


class TooManySessions(ServerUnavailable):
    """The database user has as many connections as it may."""


class OperatorNeeded(DatabaseError):
    """The database server refuses us until someone changes something."""

    verdict = Verdict.OPERATOR


class UnknownRefusal(OperatorNeeded):
    """The database server refuses something, and its error number says neither what nor why."""


class TooMuch(OperatorNeeded):
    """The batch is over a limit of the database server's."""

    verdict = Verdict.TOO_MUCH


class RowsRejected(DatabaseError):
    """The database server refuses at least one row of the batch."""

    verdict = Verdict.SPLIT


class RowTooLarge(RowsRejected):
    """A row is larger than the database server takes on this connection."""
