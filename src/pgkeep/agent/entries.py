"""What lies in staging for the vault, and what the vault answers: the agent's half of :mod:`pgkeep.domain.mailbox`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pgkeep.adapters import durable, lock
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.agent.handover import DIRECTORY_MODE, FILE_MODE
from pgkeep.domain import mailbox, names
from pgkeep.domain.mailbox import ASKED_SUFFIX, FAILED_SUFFIX, READY_SUFFIX, Ask, Failure, Outcome
from pgkeep.errors import BusyError, NotFoundError, StorageError
from pgkeep.progress import Progress

POLL_SECONDS = 0.2
NOTE_AFTER_SECONDS = 10.0
# While the vault takes nothing, every failed try would leave another report.
REPORTS_WAITING_LIMIT = 20
ENTRIES_READ_LIMIT = 10_000
_SUFFIXES = (READY_SUFFIX, FAILED_SUFFIX, ASKED_SUFFIX)
_RUNNING_HINT = "is backup-vault running? `docker compose logs backup-vault` says what it does"


class VaultSilentError(BusyError):
    """The vault has not answered in time. What was handed over stays in staging until it does."""

    exit_code = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Something that waits for the vault, or that the vault has answered. ``since``: when it was handed over."""

    identifier: str
    suffix: str
    path: Path
    since: dt.datetime


def prepare(staging: Path) -> None:
    """Make the directory where there is none; its parent must be there. Raises ``StorageError``."""
    with durable.explain(staging, "making the staging area"):
        staging.mkdir(mode=DIRECTORY_MODE, exist_ok=True)


def waiting(staging: Path) -> list[Entry]:
    """The agent's own entries in staging, the oldest first. Raises ``StorageError``."""
    with durable.explain(staging, "reading what waits for the vault"), os.scandir(staging) as scan:
        return sorted(filter(None, map(_entry, islice(scan, ENTRIES_READ_LIMIT))), key=lambda entry: entry.path.name)


def post(staging: Path, identifier: str, suffix: str, file_name: str, data: bytes) -> Path:
    """Leave a message for the vault, whole from the moment it can be seen. Raises ``StorageError``."""
    target = staging / f"{identifier}{suffix}"
    with durable.explain(target, "leaving a message for the vault"), _making(staging, file_name, data) as made:
        made.rename(target)
    return target


def report(staging: Path, failure: Failure, progress: Progress) -> None:
    """Leave a failure for the vault to put into the audit log; where even that can't be written, only say so."""
    try:
        if sum(entry.suffix == FAILED_SUFFIX for entry in waiting(staging)) < REPORTS_WAITING_LIMIT:
            post(staging, failure.id, FAILED_SUFFIX, mailbox.FAILURE_NAME, mailbox.encode(failure))
        else:
            progress.warn(f"{REPORTS_WAITING_LIMIT} reports of failures wait for the vault: no more are left for it")
    except StorageError as error:
        # The failure itself is what the caller must hear of; a full disk often causes both.
        progress.warn(f"the failure could not be reported to the vault: {error.message}")


@contextlib.contextmanager
def asked(staging: Path, ask: Ask) -> Iterator[None]:
    """A wish that waits for the vault during the block, and is gone after it. Raises ``StorageError``."""
    target = staging / f"{ask.id}{ASKED_SUFFIX}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(durable.explain(target, "leaving a message for the vault"))
        made = stack.enter_context(_making(staging, mailbox.ASK_NAME, mailbox.encode(ask)))
        # Somebody waits for this answer: it is not for the next run to throw away.
        stack.enter_context(lock.in_use(made))
        made.rename(target)
        stack.callback(remove, target)
        yield


def read_outcome(active: Path, identifier: str) -> Outcome | None:
    """The vault's answer, or None while there is none. Raises ``FormatError``, ``StorageError``."""
    path = active / mailbox.OUTCOMES_DIRECTORY / mailbox.outcome_name(identifier)
    try:
        return mailbox.decode_outcome(read_sidecar(path, mailbox.SIZE_LIMIT_BYTES))
    except NotFoundError:
        return None


def wait_for_outcome(active: Path, identifier: str, timeout_seconds: float, progress: Progress) -> Outcome:
    """Raises ``VaultSilentError``, ``FormatError``, ``StorageError``."""
    started = time.monotonic()
    told = False
    while (outcome := read_outcome(active, identifier)) is None:
        waited = time.monotonic() - started
        if waited >= timeout_seconds:
            raise VaultSilentError(f"the vault has not answered for {waited:.0f} s", _RUNNING_HINT)
        if waited >= NOTE_AFTER_SECONDS and not told:
            progress.note("waiting for the vault")
            told = True
        time.sleep(min(POLL_SECONDS, timeout_seconds - waited))
    return outcome


def collect(staging: Path, active: Path) -> list[Outcome]:
    """Remove the entries that were answered and that nobody waits for; the answers. Raises ``StorageError``.

    The caller holds the lock of staging.
    """
    found = []
    for entry in waiting(staging):
        outcome = read_outcome(active, entry.identifier)
        if outcome is not None and (entry.suffix != ASKED_SUFFIX or lock.is_abandoned(entry.path)):
            remove(entry.path)
            found.append(outcome)
    return found


def remove(path: Path) -> None:
    """An entry of our own. Raises ``StorageError``."""
    with durable.explain(path, "clearing staging"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def sweep_unfinished(staging: Path) -> None:
    """What was cut off while it was written; for the one process that may sweep. Raises ``StorageError``."""
    with durable.explain(staging, "clearing staging"), os.scandir(staging) as scan:
        for name in [each.name for each in islice(scan, ENTRIES_READ_LIMIT) if durable.is_temporary(each.name)]:
            remove(staging / name)


def remove_forged(staging: Path) -> int:
    """Remove links, files and the like that bear an entry's name: the agent leaves directories alone, the vault does
    not look at others. How many; no more than :data:`ENTRIES_READ_LIMIT` at a time. Raises ``StorageError``.

    The caller holds the lock of staging.
    """
    with durable.explain(staging, "clearing staging"), os.scandir(staging) as scan:
        found = [Path(each.path) for each in islice(scan, ENTRIES_READ_LIMIT) if _is_forged(each)]
        for path in found:
            path.unlink(missing_ok=True)
    return len(found)


def silent_vault(count: int) -> VaultSilentError:
    return VaultSilentError(f"the vault does not take what is there: {count} dumps wait in staging", _RUNNING_HINT)


def _is_named(name: str) -> bool:
    stem, dot, last = name.rpartition(".")
    return dot + last in _SUFFIXES and names.is_identifier(stem)


def _is_forged(found: os.DirEntry[str]) -> bool:
    return _is_named(found.name) and not found.is_dir(follow_symlinks=False)


def _entry(found: os.DirEntry[str]) -> Entry | None:
    stem, dot, last = found.name.rpartition(".")
    if not _is_named(found.name) or not found.is_dir(follow_symlinks=False):
        return None
    try:
        changed = found.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return None
    return Entry(stem, dot + last, Path(found.path), dt.datetime.fromtimestamp(changed, dt.UTC))


@contextlib.contextmanager
def _making(staging: Path, file_name: str, data: bytes) -> Iterator[Path]:
    """A directory with this file, to be renamed within the block; gone afterwards if it was not."""
    directory = staging / f"{durable.TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    directory.mkdir(mode=0o700)
    try:
        path = directory / file_name
        path.write_bytes(data)
        path.chmod(FILE_MODE)
        directory.chmod(DIRECTORY_MODE)
        yield directory
    finally:
        if directory.exists():
            shutil.rmtree(directory)
