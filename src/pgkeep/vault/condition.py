"""How the service is: what is wrong, judged by the vault's own clock, and the word of it that never falls silent."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from pgkeep.adapters import clock, durable
from pgkeep.domain import admission, health, schedule
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.names import Tier
from pgkeep.errors import StorageError
from pgkeep.progress import Progress
from pgkeep.vault.layout import Layout

GRACE = dt.timedelta(minutes=30)
REFUSALS_REMEMBERED = dt.timedelta(hours=24)
FAILURES_REMEMBERED = dt.timedelta(hours=24)
GLOBALS = "globals"
# What the agent calls a database whose name it did not come to know, and a run that did not come to one.
NAMELESS = ("", "database", "backup")
# Longer than any disk takes for the 64 MiB between two signs of life.
SILENCE_SECONDS = 900.0
_PROBLEMS_SHOWN = 20
_PROBLEM_CHARACTERS = 500
_REFUSALS_COUNTED = 1000


class Pulse:
    """Passes progress on to a listener, and remembers when there was some last."""

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self.last = time.monotonic()

    def alive(self) -> None:
        self.last = time.monotonic()

    def step(self, name: str) -> None:
        self.alive()
        self._listener.step(name)

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        self.alive()
        self._listener.advance(done_bytes, total_bytes)

    def note(self, text: str) -> None:
        self._listener.note(text)

    def warn(self, text: str) -> None:
        self._listener.warn(text)


class Heartbeat:
    """Writes the health file from a thread of its own, so that it goes on during long work; ends with the block."""

    def __init__(self, layout: Layout, pulse: Pulse) -> None:
        self.problems: tuple[str, ...] = ()
        self._layout = layout
        self._pulse = pulse
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._is_failing = False

    def __enter__(self) -> Heartbeat:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """Write what is known now. A full disk is said once: the file's age tells the rest."""
        told = health.Health(role="vault", pid=os.getpid(), time=clock.now(), problems=(*self._stuck(), *self.problems))
        try:
            durable.write_atomically(self._layout.state, self._layout.health.name, health.encode(told), 0o600)
            self._is_failing = False
        except StorageError as error:
            if not self._is_failing:
                self._pulse.warn(f"the health file can't be written: {error.message}")
            self._is_failing = True

    def _run(self) -> None:
        while not self._ended.wait(health.INTERVAL_SECONDS * 2 / 3):
            self.beat()

    def _stuck(self) -> Iterator[str]:
        silence_seconds = time.monotonic() - self._pulse.last
        if silence_seconds > SILENCE_SECONDS:
            yield f"nothing has moved for {silence_seconds / 60:.0f} minutes: does a disk hang?"


@dataclasses.dataclass
class Condition:
    """What the service remembers of itself between two looks.

    ``last_failure`` is its own trouble, until anything is sealed; ``failures`` are those of backups, by what they are
    of, with their moments: a database that fails is not well because another, or the globals, were sealed since.
    """

    standing: tuple[str, ...] = ()
    last_failure: str = ""
    failures: dict[str, tuple[dt.datetime, str]] = dataclasses.field(default_factory=dict)
    refusals: deque[tuple[dt.datetime, str]] = dataclasses.field(
        default_factory=lambda: deque(maxlen=_REFUSALS_COUNTED)
    )

    def failed(self, subject: str, text: str) -> None:
        """``subject``: a database's name, or :data:`GLOBALS`, or one of :data:`NAMELESS`."""
        self.failures.pop(subject, None)
        self.failures[subject] = clock.now(), text
        if len(self.failures) > _PROBLEMS_SHOWN:
            del self.failures[next(iter(self.failures))]

    def sealed(self, subject: str) -> None:
        """What failed of it before is made good."""
        self.last_failure = ""
        for known in (subject, *(NAMELESS if subject != GLOBALS else ())):
            self.failures.pop(known, None)

    def refused(self, reason: str) -> None:
        self.refusals.append((clock.now(), reason))

    def problems(
        self, checks: Sequence[Callable[[], Iterator[str]]], now: dt.datetime | None = None
    ) -> tuple[str, ...]:
        """Sentences, bounded in number and length; each of ``checks`` adds its own."""
        now = now or clock.now()
        found = [*self.standing, *filter(None, [self.last_failure]), *self._failed(now), *self._refused(now)]
        for check in checks:
            found += check()
        return tuple(problem[:_PROBLEM_CHARACTERS] for problem in found[:_PROBLEMS_SHOWN])

    def _failed(self, now: dt.datetime) -> Iterator[str]:
        # A database that is not backed up any more is not ill for ever.
        yield from (text for moment, text in self.failures.values() if abs(now - moment) < FAILURES_REMEMBERED)

    def _refused(self, now: dt.datetime) -> Iterator[str]:
        recent = [reason for moment, reason in self.refusals if abs(now - moment) < REFUSALS_REMEMBERED]
        if recent:
            yield f"{len(recent)} of the agent's dumps refused in 24 hours, the last: {recent[-1]}"


def overdue(
    expressions: Mapping[Tier, str], zone: str, sealed: Sequence[SealedBackup], since: dt.datetime, now: dt.datetime
) -> Iterator[str]:
    """A tier is overdue when the first slot after its newest backup is past by a grace, and as long as a dump takes.

    ``since``: when the vault was made; before that nothing could be missed.
    """
    newest = admission.newest_by_tier(sealed, now)
    for tier, expression in expressions.items():
        backup = newest.get(tier)
        moment = backup.manifest.sealed_at if backup else min(since, now)
        slow = dt.timedelta(seconds=min(2 * backup.manifest.dump_seconds, 86400.0)) if backup else dt.timedelta()
        missed = schedule.next_slot(expression, zone, moment)
        if now > missed + GRACE + slow:
            newest_is = f"the newest is of {moment:%Y-%m-%d %H:%M} UTC" if backup else "there is none"
            yield f"the {tier} backup of {missed:%Y-%m-%d %H:%M} UTC is overdue: {newest_is}"


def damaged(sealed: Sequence[SealedBackup], defects: Sequence[str]) -> Iterator[str]:
    """Backups that are not as they were sealed."""
    ill = [(backup.path_in_vault, backup.problems[0]) for backup in sealed if backup.problems]
    if ill:
        yield f"{len(ill)} backups are not as they were sealed, e.g. {ill[0][0]}: {ill[0][1]}"
    if defects:
        yield f"{len(defects)} manifests can't be read, e.g. {defects[0]}"


def short_of_space(layout: Layout, reserve_bytes: int, sealed: Sequence[SealedBackup]) -> Iterator[str]:
    """Would the largest of the next backups still fit, if it is as large as its last one? Raises ``StorageError``."""
    newest: dict[admission.Subject, SealedBackup] = {}
    for backup in sorted(sealed, key=lambda each: each.manifest.sealed_at):
        newest[admission.subject_of(backup.manifest)] = backup
    wanted_bytes = reserve_bytes + max((each.manifest.size_bytes for each in newest.values()), default=0)
    free_bytes = durable.free_bytes(layout.incoming)
    if free_bytes < wanted_bytes:
        yield f"{layout.active} has {free_bytes} bytes free; the next backup and the reserve take {wanted_bytes}"
    if not layout.reserve.exists():
        yield f"nothing is in reserve for removing what has expired: {layout.active} is full"
