"""One tree of errors. Each says what happened, what to do, and how the process exits.

Exit codes are part of the interface (``docs/operations.md`` lists them): a script may branch on them.
"""

from __future__ import annotations

from typing import ClassVar


class PgkeepError(Exception):
    """Base of every error that pgkeep raises on purpose.

    ``message`` names the cause, ``hint`` the remedy (may be empty). Neither ever holds a secret.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PgkeepError):
    """The command line asks for something that makes no sense."""

    exit_code = 2


class ConfigurationError(PgkeepError):
    """A setting is unknown, malformed or out of range."""

    exit_code = 3


class DatabaseError(PgkeepError):
    """The server can't be reached, refuses us, or a dump failed."""

    exit_code = 4


class ToolError(PgkeepError):
    """A program that pgkeep needs is missing or of the wrong version."""

    exit_code = 5


class StorageError(PgkeepError):
    """A disk is full, read-only, of an unfit filesystem, or a right is missing."""

    exit_code = 6


class ProtectionError(StorageError):
    """The protection that was asked for can't be had here."""


class IntegrityError(PgkeepError):
    """A backup, or something that claims to be one, is not what it should be."""

    exit_code = 7


class FormatError(IntegrityError):
    """Bytes don't follow the format that they claim."""


class RestoreError(PgkeepError):
    """A restore failed part of the way."""

    exit_code = 8


class BusyError(PgkeepError):
    """Somebody else holds the lock."""

    exit_code = 9


class NotFoundError(PgkeepError):
    """No such backup, table or database."""

    exit_code = 10


class RefusedError(PgkeepError):
    """pgkeep declines: going on could lose data."""

    exit_code = 11
