"""Takes one entry of staging: a dump is admitted and sealed, a failure written down; each gets its outcome.

What lies there is in other hands. So whatever is wrong with one entry becomes its outcome and nobody else's trouble.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from pgkeep.adapters import clock, durable
from pgkeep.domain import admission, mailbox
from pgkeep.domain.admission import Admission
from pgkeep.domain.mailbox import Outcome, SealedName
from pgkeep.domain.request import Request
from pgkeep.errors import IntegrityError, NotFoundError, PgkeepError, RefusedError, StorageError
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, condition, receive, seal
from pgkeep.vault.condition import Condition
from pgkeep.vault.holdings import Holdings
from pgkeep.vault.inspector import InspectorGoneError
from pgkeep.vault.layout import Layout, Vault
from pgkeep.vault.staging import Entry

RECORDS_AN_HOUR = 200
ATTEMPTS = 5
_HOUR_SECONDS = 3600.0
_ATTEMPTS_NAME = "attempts.json"
_TEXT_CHARACTERS = 2000


class Throttle:
    """Audit records that the agent causes: so many an hour, then one that says how many were left out."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._written: deque[float] = deque()
        self._left_out = 0

    def record(self, event: str, **details: Any) -> None:
        """Raises ``StorageError``."""
        now = time.monotonic()
        while self._written and now - self._written[0] > _HOUR_SECONDS:
            self._written.popleft()
        if len(self._written) >= RECORDS_AN_HOUR:
            self._left_out += 1
            return
        self._close_gap()
        audit_log.record(self._vault, event, **details)
        self._written.append(now)

    def _close_gap(self) -> None:
        if self._left_out:
            audit_log.record(self._vault, "reports left out", count=self._left_out)
            self._left_out = 0

    def tidy(self) -> None:
        """Say what was left out once the hour is over, though nothing else comes. Raises ``StorageError``."""
        if self._left_out and time.monotonic() - self._written[0] > _HOUR_SECONDS:
            self._close_gap()


class Attempts:
    """How often work on an entry was begun and never ended, by a crash of the whole process; on the disk."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    @contextlib.contextmanager
    def counted(self, identifier: str) -> Iterator[None]:
        """Raises ``RefusedError`` where too many attempts came to no end before this one; ``StorageError``."""
        before = self._read().get(identifier, 0)
        self._write({identifier: before + 1})
        try:
            if before >= ATTEMPTS:
                raise RefusedError(f"the vault broke off {before} times while it worked on this", "report this")
            yield
        finally:
            with durable.explain(self._layout.state / _ATTEMPTS_NAME, "forgetting an attempt"):
                (self._layout.state / _ATTEMPTS_NAME).unlink(missing_ok=True)

    def _read(self) -> dict[str, int]:
        """A torn or missing file is no reason to stop: it only counts."""
        try:
            return msgspec.json.decode((self._layout.state / _ATTEMPTS_NAME).read_bytes(), type=dict[str, int])
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            return {}

    def _write(self, counts: dict[str, int]) -> None:
        durable.write_atomically(self._layout.state, _ATTEMPTS_NAME, msgspec.json.encode(counts), 0o600)


@dataclasses.dataclass(frozen=True, slots=True)
class Desk:
    """All that taking an entry needs."""

    vault: Vault
    rules: seal.Rules
    policy: admission.Policy
    holdings: Holdings
    condition: Condition
    throttle: Throttle
    clean_up: Callable[[], str]
    progress: Progress


class Intake:
    """Answers entries. Only ``StorageError`` from writing answers down, and ``InspectorGoneError``, come out of it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._attempts = Attempts(desk.vault.layout)

    def take(self, entry: Entry) -> Outcome | None:
        """The outcome to publish; None where the entry has vanished meanwhile."""
        try:
            with self._attempts.counted(entry.id):
                return self._take(entry)
        except InspectorGoneError:
            raise
        except (IntegrityError, RefusedError, NotFoundError) as error:
            return self._refuse(entry, error)
        except PgkeepError as error:
            return self._fail(entry, error)
        except (OSError, MemoryError) as error:
            return self._fail(entry, _as_storage_error(error, self._desk.vault.layout))

    def _take(self, entry: Entry) -> Outcome:
        if entry.kind == "ready":
            return self._take_dump(entry)
        return self._take_failure(entry) if entry.kind == "failed" else self._take_wish(entry)

    # ------------------------------------------------------------ dumps

    def _take_dump(self, entry: Entry) -> Outcome:
        desk = self._desk
        request = receive.read_request(desk.vault.layout, entry.name)
        decision = admission.assign(request, clock.now(), desk.holdings.backups, desk.policy)
        if decision.refusal:
            hint = "it is the vault's schedule and what it holds that decide: see `pgkeep list`"
            raise RefusedError(f"{decision.refusal} ({_described(request)})", hint)
        desk.progress.step("vault.admitted")
        if decision.tiers:
            self._seal(entry, request, decision)
        desk.condition.sealed(_subject(request))
        return self._sealed(entry.id, decision.notes)

    def _seal(self, entry: Entry, request: Request, decision: Admission) -> None:
        desk = self._desk
        again = bool(decision.present)
        try:
            sealed = seal.seal(desk.vault, entry.name, request, decision.tiers, desk.rules, desk.progress, again=again)
        except (PgkeepError, OSError) as error:
            # It may have come to the commit all the same; then it is sealed, whatever went wrong after.
            desk.holdings.read()
            if not desk.holdings.of_dump(entry.id):
                raise
            desk.progress.warn(f"{entry.id} is sealed, but: {error}")
            return
        desk.holdings.add(sealed)

    def _sealed(self, identifier: str, notes: tuple[str, ...]) -> Outcome:
        found = self._desk.holdings.of_dump(identifier)
        names = tuple(
            SealedName(id=backup.manifest.id, path=backup.path_in_vault, tier=backup.manifest.type) for backup in found
        )
        paths = " and ".join(name.path for name in names)
        said = f" ({'; '.join(notes)})" if notes else ""
        self._desk.progress.note(f"sealed {identifier} as {paths}{said}")
        return _outcome(identifier, "sealed", "; ".join(notes), names=names)

    # ------------------------------------------------------------ failures, wishes

    def _take_failure(self, entry: Entry) -> Outcome:
        path = f"{entry.name}/{mailbox.FAILURE_NAME}"
        failure = mailbox.decode_failure(self._read(path))
        event = "backup interrupted" if failure.interrupted else "backup failed"
        subject, reason = _cut(failure.subject), _cut(failure.reason)
        self._desk.throttle.record(event, id=entry.id, of=subject, tiers=failure.tiers, reason=reason, told_by="agent")
        text = f"{event}: {subject}: {reason}"
        self._desk.condition.failed(subject, text)
        self._desk.progress.warn(text)
        return _outcome(entry.id, "noted")

    def _take_wish(self, entry: Entry) -> Outcome:
        mailbox.decode_ask(self._read(f"{entry.name}/{mailbox.ASK_NAME}"))
        said = self._desk.clean_up()
        self._desk.throttle.record("cleanup asked", id=entry.id, told_by="agent", outcome=said)
        return _outcome(entry.id, "done", said)

    def _read(self, path: str) -> bytes:
        return receive.read_small(self._desk.vault.layout, path, mailbox.SIZE_LIMIT_BYTES)

    # ------------------------------------------------------------ what goes wrong

    def _refuse(self, entry: Entry, error: PgkeepError) -> Outcome | None:
        """For good: another try of the same would end the same way."""
        if not os.path.lexists(self._desk.vault.layout.staging / entry.name):
            return None
        event = "backup refused" if entry.kind == "ready" else "report refused"
        reason = _cut(error.message)
        self._desk.throttle.record(event, id=entry.id, reason=reason)
        self._desk.condition.refused(f"{entry.id}: {reason}")
        self._desk.progress.warn(f"{event}: {entry.id}: {reason}")
        return _outcome(entry.id, "refused", reason, error.hint)

    def _fail(self, entry: Entry, error: PgkeepError) -> Outcome | None:
        """The vault's own trouble: it may pass."""
        if not os.path.lexists(self._desk.vault.layout.staging / entry.name):
            return None
        reason = _cut(error.message)
        text = f"{entry.id} could not be sealed: {reason}"
        self._desk.condition.failed(self._subject_of(entry), text)
        self._desk.progress.warn(text)
        try:
            self._desk.throttle.record("sealing failed", id=entry.id, reason=reason)
        except StorageError as second:
            # A full disk often causes both.
            self._desk.progress.warn(f"the failure could not be written to the audit log: {second.message}")
        return _outcome(entry.id, "failed", reason, error.hint)

    def _subject_of(self, entry: Entry) -> str:
        """Empty where that can't be read, whatever the reason."""
        try:
            return _subject(receive.read_request(self._desk.vault.layout, entry.name))
        except (PgkeepError, OSError):
            return ""


def _subject(request: Request) -> str:
    """As the agent calls it in its reports."""
    return condition.GLOBALS if request.kind == "globals" else _cut(request.database)


def _outcome(identifier: str, state: Any, message: str = "", hint: str = "", **more: Any) -> Outcome:
    return Outcome(id=identifier, state=state, time=clock.now(), message=_cut(message), hint=_cut(hint), **more)


def _as_storage_error(error: OSError | MemoryError, layout: Layout) -> StorageError:
    if isinstance(error, OSError):
        return durable.storage_error(error, layout.active, "taking in a dump")
    return StorageError("there is not enough memory to take the dump in", "raise the service's memory limit")


def _described(request: Request) -> str:
    what = "roles and tablespaces" if request.kind == "globals" else f"database {request.database[:200]!r}"
    return f"{what}, asked for {', '.join(request.tiers)}"


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}…"
