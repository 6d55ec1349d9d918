"""What the vault holds, and what a person means by a reference to it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pgkeep.domain.manifest import Manifest
from pgkeep.domain.names import GLOBALS_DIRECTORY, Tier
from pgkeep.errors import NotFoundError, UsageError

State = Literal["sealed", "unprotected", "incomplete", "suspect"]

LATEST = "latest"
PREFIX_LENGTH_MINIMUM = 4
_NAMED_AT_MOST = 8
_DIRECTORIES = (*(tier.value for tier in Tier), GLOBALS_DIRECTORY)
_LIST_HINT = "`pgkeep list` shows what there is"


@dataclass(frozen=True, slots=True)
class SealedBackup:
    """One name under ``active/``. A dump that is linked under several tiers is one of these for each.

    ``state``: ``sealed`` (whole, and the recorded protection, however weak, is in force), ``unprotected``
    (whole, but the recorded protection is gone), ``incomplete`` (a part of it is missing or unreadable),
    ``suspect`` (its content is doubted). ``problems`` are sentences that explain any state but ``sealed``.
    """

    manifest: Manifest
    directory: str
    state: State = "sealed"
    problems: tuple[str, ...] = ()

    @property
    def path_in_vault(self) -> str:
        """The dump's place below ``active/``, e.g. ``daily/2026-01-31_23-59-59.sql.gz``; unique."""
        return f"{self.directory}/{self.manifest.filename}"

    @property
    def is_good(self) -> bool:
        """Whether it counts as a backup that a restore may rely on."""
        return self.state == "sealed" and not self.problems and not self.manifest.findings


def sealing_order(backup: SealedBackup) -> tuple[dt.datetime, dt.datetime, str, str]:
    """A total order: by the vault's clock first, because ``created_at`` is the agent's word."""
    manifest = backup.manifest
    return manifest.sealed_at, manifest.created_at, manifest.id, backup.path_in_vault


def ordered(backups: Iterable[SealedBackup]) -> list[SealedBackup]:
    """The oldest first; the same result for any order of the input."""
    return sorted(backups, key=sealing_order)


def resolve(backups: Iterable[SealedBackup], reference: str, *, database: str | None = None) -> SealedBackup:
    """The one backup that ``reference`` means; ``database`` narrows every kind of reference.

    A reference is an id, the beginning of one, ``latest``, ``latest:TIER``, a file name or ``TIER/filename``.
    ``latest`` does not look at the state: an older backup is never given silently for a newer, doubtful one.
    Raises ``NotFoundError``, or ``UsageError`` naming the candidates where several fit.
    """
    candidates = [backup for backup in ordered(backups) if database in (None, backup.manifest.database)]
    if reference == LATEST or reference.startswith(LATEST + ":"):
        return _latest(candidates, reference, database)
    exact = [backup for backup in candidates if reference in _exact_names(backup)]
    found = exact or _with_prefix(candidates, reference)
    if not found:
        raise NotFoundError(f"no backup {reference!r}{_of(database)}", _LIST_HINT)
    if len(found) > 1:
        raise UsageError(f"{reference!r} fits {len(found)} backups: {_name_some(found)}", "give one of these in full")
    return found[0]


def _exact_names(backup: SealedBackup) -> tuple[str, str, str]:
    return backup.manifest.id, backup.manifest.filename, backup.path_in_vault


def _with_prefix(candidates: Sequence[SealedBackup], reference: str) -> list[SealedBackup]:
    if len(reference) < PREFIX_LENGTH_MINIMUM:
        raise UsageError(
            f"{reference!r} is too short for the beginning of an id",
            f"give {PREFIX_LENGTH_MINIMUM} characters or more, or `{LATEST}`",
        )
    return [backup for backup in candidates if backup.manifest.id.startswith(reference)]


def _latest(candidates: Sequence[SealedBackup], reference: str, database: str | None) -> SealedBackup:
    directory = _directory_of_latest(reference)
    kind = "globals" if directory == GLOBALS_DIRECTORY else "database"
    fitting = [b for b in candidates if b.manifest.kind == kind and directory in (None, b.directory)]
    if not fitting:
        tier = "" if directory is None else f" in {directory}"
        raise NotFoundError(f"there is no backup{tier}{_of(database)} yet", _LIST_HINT)
    databases = sorted({backup.manifest.database for backup in fitting})
    if len(databases) > 1:
        named = ", ".join(repr(name) for name in databases[:_NAMED_AT_MOST]) + _and_more(len(databases))
        raise UsageError(f"{reference!r} could be of any of {len(databases)} databases: {named}", "name the database")
    return fitting[-1]


def _directory_of_latest(reference: str) -> str | None:
    if reference == LATEST:
        return None
    directory = reference.removeprefix(LATEST + ":")
    if directory not in _DIRECTORIES:
        raise UsageError(f"{directory!r} is not a tier", f"the tiers are {', '.join(_DIRECTORIES)}")
    return directory


def _name_some(found: Sequence[SealedBackup]) -> str:
    named = [f"{backup.manifest.id} ({backup.path_in_vault})" for backup in found[:_NAMED_AT_MOST]]
    return ", ".join(named) + _and_more(len(found))


def _and_more(count: int) -> str:
    return f" and {count - _NAMED_AT_MOST} more" if count > _NAMED_AT_MOST else ""


def _of(database: str | None) -> str:
    return "" if database is None else f" of the database {database!r}"
