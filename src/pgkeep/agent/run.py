"""One run: dump every configured database once for all the tiers that are due, hand over, wait for the vault's word."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pgkeep.adapters import clock, durable, lock, postgres
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.agent import backups, dump, entries
from pgkeep.agent.handover import Staged
from pgkeep.domain import mailbox, manifest, names, schedule
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.mailbox import PARTIAL_SUFFIX, READY_SUFFIX, Failure, Outcome
from pgkeep.domain.names import GLOBALS_DIRECTORY, Tier
from pgkeep.domain.request import Request
from pgkeep.errors import DatabaseError, FormatError, NotFoundError, PgkeepError, RefusedError, StorageError
from pgkeep.progress import Progress

LOCK_NAME = ".lock"
DUMPS_WAITING_LIMIT = 3
GLOBALS_TRIES = 3
_REASON_CHARACTERS = 4000
_CUT_OFF = "the run was cut off, and could not even say so"


class Listener(Protocol):
    """Who hears of what earlier runs left: a run's progress, or a service's log."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


_Dump = Callable[[Staged], Request]


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What the configuration says. ``databases`` is asked anew for each run: None is the target's own."""

    staging: Path
    active: Path
    target: postgres.Target
    databases: Callable[[], Sequence[str | None]]
    with_globals: bool
    options: dump.Options
    schedule: Mapping[Tier, str]
    zone: str
    vault_timeout_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """One subject (a database, or "globals") without a backup, while others may have gone well."""

    subject: str
    error: PgkeepError


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What came of a run. ``skipped``: what had its backup already."""

    sealed: tuple[SealedBackup, ...]
    failures: tuple[Failed, ...]
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Subject:
    label: str
    make: _Dump
    directories: tuple[str, ...]
    database: str | None


def back_up(
    setup: Setup, tiers: Sequence[Tier], progress: Progress, wait_seconds: float, since: dt.datetime | None = None
) -> Result:
    """``since``: leave out what already has a backup in all these tiers from then on (a failed run is made good).

    Raises where nothing can begin: ``BusyError`` after ``wait_seconds`` of another run, ``VaultSilentError``,
    ``StorageError``, ``DatabaseError``. What fails later is in the result.
    """
    entries.prepare(setup.staging)
    on_wait = _waiting_for(progress)
    with lock.locked(setup.staging / LOCK_NAME, wait_seconds, on_wait), durable.explain(setup.staging, "backing up"):
        clear_up(setup.staging, setup.active, progress)
        progress.step("run.cleared")
        with _reported(setup.staging, tiers, progress):
            _require_attentive_vault(setup.staging)
            subjects = _subjects(setup, tiers, progress)
        return _back_up_each(setup, subjects, tiers, progress, since)


def ask_for_cleanup(setup: Setup, progress: Progress) -> Outcome:
    """Let the vault remove what has expired. Raises ``VaultSilentError``, ``RefusedError``, ``StorageError``."""
    entries.prepare(setup.staging)
    now = clock.now()
    ask = mailbox.Ask(id=names.new_identifier(now), command="cleanup", asked_at=now)
    with entries.asked(setup.staging, ask):
        progress.step("run.asked")
        return _accepted(entries.wait_for_outcome(setup.active, ask.id, setup.vault_timeout_seconds, progress))


def check_database(setup: Setup) -> None:
    """Raises ``DatabaseError`` where the server can't be reached or refuses us."""
    parameters = dict(setup.target.parameters)
    target = setup.target if parameters.get("dbname") else _first(setup)
    with postgres.connect(target, timeout_seconds=setup.options.connect_timeout_seconds) as connection:
        connection.execute("SELECT 1")


def clear_up(staging: Path, active: Path, progress: Progress) -> None:
    """What runs before this one left: answered entries go, what was cut off is reported. The caller has the lock."""
    tell_and_collect(staging, active, progress)
    if forged := entries.remove_forged(staging):
        progress.warn(f"{forged} names in staging were no directories, so none of the agent's: removed")
    for path in sorted(staging.iterdir()):
        identifier, _, suffix = path.name.rpartition(".")
        if names.is_identifier(identifier) and f".{suffix}" == PARTIAL_SUFFIX:
            progress.warn(f"a run before this one was cut off: its {path.name} is removed from staging")
            if not (staging / f"{identifier}{mailbox.FAILED_SUFFIX}").exists():
                entries.report(staging, _foreseen(path, identifier), progress)
            entries.remove(path)


def tell_and_collect(staging: Path, active: Path, listener: Listener) -> None:
    """Remove what the vault has answered, and say what that is. The caller has the lock. Raises ``StorageError``."""
    for outcome in entries.collect(staging, active):
        _tell(outcome, listener)


def _back_up_each(
    setup: Setup, subjects: Sequence[_Subject], tiers: Sequence[Tier], progress: Progress, since: dt.datetime | None
) -> Result:
    sealed: list[SealedBackup] = []
    failures: list[Failed] = []
    skipped: list[str] = []
    for subject in subjects:
        if since is not None and _is_backed_up(setup.active, subject, since):
            skipped.append(subject.label)
            continue
        try:
            sealed += _back_up(setup, subject, tiers, progress)
        except PgkeepError as error:
            failures.append(Failed(subject.label, error))
            if isinstance(error, entries.VaultSilentError):
                break  # the others would only fill staging
    return Result(tuple(sealed), tuple(failures), tuple(skipped))


def _back_up(setup: Setup, subject: _Subject, tiers: Sequence[Tier], progress: Progress) -> list[SealedBackup]:
    identifier = _dump(setup, subject, tiers, progress)
    progress.note(f"{subject.label} is handed over to the vault")
    outcome = entries.wait_for_outcome(setup.active, identifier, setup.vault_timeout_seconds, progress)
    progress.step("run.answered")
    sealed = _sealed(setup.active, outcome) if outcome.state == "sealed" else []
    entries.remove(setup.staging / f"{identifier}{READY_SUFFIX}")
    progress.step("run.removed")
    _accepted(outcome)
    if {name.path.partition("/")[0] for name in outcome.names} != set(subject.directories):
        progress.warn(outcome.message or f"{subject.label}: the vault gave it other tiers than it was made for")
    return sealed


def _dump(setup: Setup, subject: _Subject, tiers: Sequence[Tier], progress: Progress) -> str:
    """The identifier of what now waits for the vault. What fails or is interrupted is reported to it."""
    identifier = names.new_identifier(clock.now())
    failure = _failure(identifier, tiers, subject.label, _CUT_OFF, interrupted=True)
    try:
        staged = Staged(setup.staging, identifier)
    except StorageError as error:
        entries.report(setup.staging, _failure(identifier, tiers, subject.label, error), progress)
        raise
    try:
        staged.foresee(failure)
        progress.step("run.began")
        progress.note(f"dumping {subject.label}")
        with durable.explain(setup.staging, f"dumping {subject.label}"):
            subject.make(staged)
    except BaseException as error:
        # Its data first: a full disk may have no room for a report.
        staged.clear()
        entries.report(setup.staging, _failure(identifier, tiers, subject.label, error), progress)
        staged.remove()
        raise
    return identifier


@contextlib.contextmanager
def _reported(staging: Path, tiers: Sequence[Tier], progress: Progress) -> Iterator[None]:
    """What keeps a run from beginning is reported to the vault too."""
    try:
        yield
    except BaseException as error:
        identifier = names.new_identifier(clock.now())
        entries.report(staging, _failure(identifier, tiers, "backup", error), progress)
        raise


def _failure(
    identifier: str, tiers: Sequence[Tier], subject: str, reason: str | BaseException, *, interrupted: bool = False
) -> Failure:
    if isinstance(reason, PgkeepError):
        reason = reason.message
    elif isinstance(reason, BaseException):
        interrupted = not isinstance(reason, Exception)
        reason = f"{type(reason).__name__}: {reason}" if str(reason) and not interrupted else type(reason).__name__
    return Failure(
        id=identifier,
        tiers=tuple(tiers),
        subject=subject[:_REASON_CHARACTERS],
        reason=reason[:_REASON_CHARACTERS],
        failed_at=clock.now(),
        interrupted=interrupted,
    )


def _foreseen(partial: Path, identifier: str) -> Failure:
    """What a run wrote down before it was killed; where it got not even that far, what can be said without."""
    try:
        return mailbox.decode_failure(read_sidecar(partial / mailbox.FAILURE_NAME, mailbox.SIZE_LIMIT_BYTES))
    except (NotFoundError, FormatError):
        return _failure(identifier, (Tier.MANUAL,), "backup", _CUT_OFF, interrupted=True)


def _require_attentive_vault(staging: Path) -> None:
    dumps = sum(entry.suffix == READY_SUFFIX for entry in entries.waiting(staging))
    if dumps > DUMPS_WAITING_LIMIT:
        raise entries.silent_vault(dumps)


def _subjects(setup: Setup, tiers: Sequence[Tier], progress: Progress) -> list[_Subject]:
    databases = setup.databases()
    options = dataclasses.replace(
        setup.options,
        is_one_of_several=len(databases) > 1,
        interval_seconds=_shortest_interval_seconds(setup, tiers),
        watch_blocking=True,
    )

    def of(name: str | None) -> _Dump:
        target = setup.target.database(name) if name else setup.target
        return lambda staged: dump.dump_database(staged, target, tiers, options, progress)

    directories = tuple(tier.value for tier in tiers)
    found = [
        _Subject(name or "database", of(name), directories, name if len(databases) > 1 else None) for name in databases
    ]
    if setup.with_globals:
        found.append(
            _Subject("globals", _globals(setup, databases, tiers, options, progress), (GLOBALS_DIRECTORY,), None)
        )
    return found


def _globals(
    setup: Setup, databases: Sequence[str | None], tiers: Sequence[Tier], options: dump.Options, progress: Progress
) -> _Dump:
    """They are the server's, whichever database it is asked in: one that is gone or closed to us is no reason."""

    def make(staged: Staged) -> Request:
        *others, last = (setup.target.database(name) if name else setup.target for name in databases[:GLOBALS_TRIES])
        for target in others:
            try:
                return dump.dump_globals(staged, target, tiers, options, progress)
            except DatabaseError as error:
                progress.warn(f"globals: {error.message}; asking in another database")
        return dump.dump_globals(staged, last, tiers, options, progress)

    return make


def _shortest_interval_seconds(setup: Setup, tiers: Sequence[Tier]) -> float | None:
    scheduled = [setup.schedule[tier] for tier in tiers if tier in setup.schedule]
    now = clock.now()
    return min((schedule.interval(each, setup.zone, now).total_seconds() for each in scheduled), default=None)


def _is_backed_up(active: Path, subject: _Subject, since: dt.datetime) -> bool:
    return all(backups.is_backed_up(active / name, subject.database, since) for name in subject.directories)


def _accepted(outcome: Outcome) -> Outcome:
    """Raises ``RefusedError``, or ``StorageError`` for trouble of the vault's own."""
    if outcome.state == "refused":
        raise RefusedError(f"the vault refused: {outcome.message}", outcome.hint)
    if outcome.state == "failed":
        raise StorageError(f"the vault failed: {outcome.message}", outcome.hint)
    return outcome


def _sealed(active: Path, outcome: Outcome) -> list[SealedBackup]:
    """What the vault says that it sealed, as the manifests tell it. Raises ``FormatError``, ``StorageError``."""
    return list(filter(None, (_sealed_backup(active, name.path) for name in outcome.names)))


def _sealed_backup(active: Path, path: str) -> SealedBackup | None:
    directory, slash, file_name = path.partition("/")
    if not slash or directory not in {*(tier.value for tier in Tier), GLOBALS_DIRECTORY}:
        raise FormatError(f"the outcome names {path!r}, which is no place of a backup")
    names.parse_dump_name(file_name)
    try:
        data = read_sidecar(active / directory / f"{file_name}{names.MANIFEST_SUFFIX}", manifest.SIZE_LIMIT_BYTES)
    except NotFoundError:
        return None  # sealed, and expired since
    return SealedBackup(manifest.decode(data), directory)


def _tell(outcome: Outcome, listener: Listener) -> None:
    if outcome.state == "sealed":
        paths = ", ".join(name.path for name in outcome.names)
        listener.note(f"the vault has sealed {outcome.id}, which an earlier run had left, as {paths}")
    elif outcome.state in ("refused", "failed"):
        listener.warn(f"the vault did not take {outcome.id}, which an earlier run had left: {outcome.message}")


def _waiting_for(progress: Progress) -> Callable[[str], None]:
    return lambda holder: progress.note(f"waiting for {holder}")


def _first(setup: Setup) -> postgres.Target:
    name = next(iter(setup.databases()), None)
    return setup.target.database(name) if name else setup.target
