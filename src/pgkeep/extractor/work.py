"""The single steps of a pass: one backup that fails does not keep the others from being copied."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from pgkeep.adapters import clock, durable
from pgkeep.domain import retention
from pgkeep.errors import IntegrityError, NotFoundError, PgkeepError, StorageError
from pgkeep.extractor import expiry, plan, source
from pgkeep.extractor.copies import Copies, Failure, Journal
from pgkeep.extractor.plan import Plan, Problem, Record, Signature
from pgkeep.progress import Progress

# One after the other: then it is the destination, not the backup.
_FAILURES_IN_A_ROW: Final = 3


@dataclasses.dataclass(slots=True)
class Report:
    """What a pass did, by path below ``active/``; ``lost`` copies are broken, and their originals have expired.

    ``name``, ``destination``: what it is called, and where it is. ``expired``: removed, as their time there was over.
    ``alarm``: the vault's audit log is not what it was.
    """

    name: str
    destination: str
    extracted: list[str] = dataclasses.field(default_factory=list)
    repaired: list[str] = dataclasses.field(default_factory=list)
    adopted: list[str] = dataclasses.field(default_factory=list)
    rechecked: list[str] = dataclasses.field(default_factory=list)
    expired: list[str] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    lost: list[Failure] = dataclasses.field(default_factory=list)
    alarm: str = ""

    @property
    def troubles(self) -> list[Failure]:
        return [*self.failures, *self.lost]


class Work:
    """Carries a plan out. ``try_all``: also what failed less than a day ago for a reason that lasts."""

    def __init__(self, copies: Copies, sources: Mapping[str, Signature], report: Report, *, try_all: bool) -> None:
        self._copies = copies
        self._sources = sources
        self._report = report
        self._try_all = try_all
        self._waiting: list[str] = []
        self._lost: set[str] = set()
        self._failures_in_a_row = 0
        # The smallest dump that the destination had no room for.
        self._too_large_bytes: float = float("inf")

    def bring_all(self, todo: Plan) -> None:
        """New backups first, then what is broken."""
        for path in todo.to_copy:
            if path not in self._copies.records:
                self._bring(path)
            elif path not in todo.broken:
                self._attempt(path, functools.partial(self._look_again, path))
        for path, problem in todo.broken.items():
            if path in self._sources:
                self._attempt(path, functools.partial(self._mend, path, problem))
            else:
                self._attempt(path, functools.partial(self._lose, path, problem))
        if self._waiting:
            reason = f"{len(self._waiting)} more backups wait until {self._copies.label} takes them"
            self._fail("", StorageError(f"{reason}, {self._waiting[0]} first", "mend the failures before this one"))

    def stop_expiring(self, sizes: Mapping[str, int]) -> None:
        """Nothing is to leave any more: what is there stays, and what the vault still has comes back."""
        for path, record in self._expired():
            if any(record.path + suffix in sizes for suffix in record.files):
                self._copies.keep(path)
            else:
                self._copies.state.forget(self._copies.destination, path)

    def _expired(self) -> list[tuple[str, Record]]:
        return [(path, record) for path, record in self._copies.records.items() if record.expired_at is not None]

    def settle_expired(self, sizes: Mapping[str, int]) -> set[str]:
        """Finish removals that were cut off; what the vault has still of what was removed: not to be copied again."""
        still: set[str] = set()
        for path, record in self._expired():
            if any(record.path + suffix in sizes for suffix in record.files):
                finish = functools.partial(self._copies.finish_expiry, path, "the removal was cut off")
                self._attempt(path, functools.partial(finish, in_vault=path in self._sources))
            elif path not in self._sources:
                self._copies.state.forget(self._copies.destination, path)
            if path in self._sources:
                self._attempt(path, functools.partial(self._tell_apart, path, still))
        return still

    def expire(self, policy: retention.Policy) -> None:
        """Whatever is over by the destination's own policy leaves it, the oldest first."""
        for each in expiry.due(plan.living(self._copies.records), policy, clock.now()):
            self._attempt(each.path, functools.partial(self._expire, each))

    def prolong(self, longest: dt.timedelta, asked: set[str]) -> None:
        """Extend the locks of what the vault still has. ``asked``: whose locks are known to be unknown; it grows."""
        for path, record in list(plan.living(self._copies.records).items()):
            if path in self._sources and not record.problem:
                if record.locked is None and path not in asked:
                    asked.add(path)
                    self._attempt(path, functools.partial(self._copies.learn_lock, path))
                until = plan.lock_wanted(self._copies.records[path], clock.now(), longest)
                if until is not None:
                    self._attempt(path, functools.partial(self._copies.extend_lock, path, until))

    def reread(self, todo: Plan, period: dt.timedelta | None) -> None:
        """Those that had gone and are back, and as many of the others as are due; None: names and sizes will do."""
        if period is None:
            for path in todo.reappeared:
                self._attempt(path, functools.partial(self._copies.accept, path))
            return
        memory, now = self._copies.journal.memory, clock.now()
        since = memory.rechecked_until or now
        chosen, until = plan.to_recheck(self._copies.records, todo.to_reread, now, period, since)
        for path in (*todo.reappeared, *chosen):
            self._attempt(path, functools.partial(self._recheck, path))
        memory.rechecked_until = until

    def _expire(self, due: expiry.Due) -> None:
        if self._copies.expire(due.path, due.reason, in_vault=due.path in self._sources):
            self._report.expired.append(due.path)

    def _tell_apart(self, path: str, still: set[str]) -> None:
        record = self._copies.records[path]
        if record.source == self._sources[path] or self._copies.is_the_one_removed(path):
            still.add(path)
        else:
            self._copies.state.forget(self._copies.destination, path)

    def _bring(self, path: str) -> None:
        before = None if self._try_all else self._copies.journal.known_to_fail(path)
        if before is not None:
            self._report.failures.append(Failure(path, before))
        elif self._failures_in_a_row >= _FAILURES_IN_A_ROW or self._size_bytes(path) >= self._too_large_bytes:
            self._waiting.append(path)
        else:
            self._attempt(path, functools.partial(self._bring_now, path))

    def _bring_now(self, path: str) -> None:
        self._copies.progress.note(f"copying {path}")
        report = self._report
        outcome = self._copies.bring(path)
        {"extracted": report.extracted, "repaired": report.repaired, "adopted": report.adopted}[outcome].append(path)
        self._failures_in_a_row = 0

    def _look_again(self, path: str) -> None:
        if not self._copies.is_unchanged(path):
            self._bring(path)

    def _mend(self, path: str, problem: Problem) -> None:
        # Until it is whole again it is no good copy that another could leave for.
        self._copies.remember_problem(path, problem)
        if problem == "missing":
            self._copies.tell(path, problem, in_vault=True)
        self._bring(path)

    def _lose(self, path: str, problem: Problem) -> None:
        self._copies.remember_problem(path, problem)
        error = self._copies.tell(path, problem, in_vault=False)
        if path not in self._lost:
            self._lost.add(path)
            self._report.lost.append(Failure(path, error))

    def _recheck(self, path: str) -> None:
        if self._copies.check(path):
            self._report.rechecked.append(path)
        elif path in self._sources:
            self._bring(path)
        else:
            self._lose(path, "damaged")

    def _attempt(self, path: str, work: Callable[[], None]) -> None:
        try:
            with durable.explain(path, "copying"):
                work()
        except NotFoundError as error:
            # Expired since it was listed; what has a manifest and lacks another file is another matter.
            if source.is_there(self._copies.active, path):
                self._fail(path, IntegrityError(f"{path} is incomplete: {error.message}", "see `pgkeep verify --all`"))
        except PgkeepError as error:
            if isinstance(error, StorageError) and durable.is_full(error):
                self._too_large_bytes = min(self._too_large_bytes, self._size_bytes(path))
            elif isinstance(error, StorageError):
                self._failures_in_a_row += 1
            self._fail(path, error)

    def _fail(self, path: str, error: PgkeepError) -> None:
        self._report.failures.append(Failure(path, error))
        tell(self._copies.journal, path, error, self._copies.progress, at=self._copies.label)

    def _size_bytes(self, path: str) -> int:
        try:
            return os.lstat(self._copies.active / path).st_size
        except FileNotFoundError:  # expired since: whoever opens it finds out
            return 0


def tell(journal: Journal, subject: str, error: PgkeepError, progress: Progress, **details: Any) -> None:
    """The audit log hears of a failure; where that fails too, the failure itself is what must be heard of."""
    try:
        journal.trouble("extraction failed", subject, error, **details)
    except PgkeepError as other:
        progress.warn(f"the failure could not be written to the audit log: {other.message}")
