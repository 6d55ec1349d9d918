"""A pass: copy what the vault has and the destination has not, look after what is there, and report.

Nothing at a destination is ever overwritten, and nothing removed whatever became of its source, unless the destination
has a policy of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from pgkeep.adapters import clock, durable, lock
from pgkeep.adapters.destinations import Destination, Place
from pgkeep.domain import anchors as anchoring
from pgkeep.domain import retention
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, PgkeepError, StorageError
from pgkeep.extractor import anchors, plan, source
from pgkeep.extractor.copies import Copies, Failure, Journal
from pgkeep.extractor.state import Marker, Memory, State, decode_marker, encode_marker
from pgkeep.extractor.work import Report, Work, tell
from pgkeep.progress import Progress

LOCK_NAME: Final = ".lock"
# Where else than among the copies a killed pass may have left something.
_SWEPT: Final = (*source.DIRECTORIES, anchoring.FOLDER)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One destination: what it is called, where the extractor reads and keeps its own, and how it is looked after.

    ``state`` is this destination's alone; ``vault_log`` the vault's audit log. ``recheck``: the time within which every
    copy is read in full (None: never); ``policy``: what may leave the destination (None: nothing); ``prolong``: its
    locks are extended, to so long from now at the most (None: they are not). ``required`` and ``interval_seconds`` are
    for the service.
    """

    name: str
    active: Path
    state: Path
    log: Path
    vault_log: Path
    recheck: dt.timedelta | None
    policy: retention.Policy | None = None
    prolong: dt.timedelta | None = None
    required: bool = True
    interval_seconds: float = 300.0


class Extractor:
    """Copies to one destination. ``vault_id`` says whose backups these are; raises where there is no vault."""

    def __init__(self, settings: Settings, destination: Destination, vault_id: Callable[[], str]) -> None:
        self.settings = settings
        self.destination = destination
        self._vault_id = vault_id
        self.failing_since: dt.datetime | None = None
        """As the last pass left it: the first one that went wrong, of those that did without a good one since."""
        self._state = State(settings.state)
        self._said: set[str] = set()
        self._swept = False
        # Copies that had no lock when they were asked: they get none by waiting.
        self._unlocked: set[str] = set()
        self._adopt_hint = (
            f"mount the right one; if this one is meant, deliberately new or replaced: "
            f"`pgkeep extractor adopt {settings.name}`"
        )

    def run_pass(self, progress: Progress, wait_seconds: float = 0.0, *, try_all: bool = True) -> Report:
        """One pass; what fails for single backups is in the report. ``try_all``: also those found bad a while ago.

        Raises ``BusyError`` (another pass is under way), ``NotFoundError`` (no vault yet), ``StorageError``,
        ``RefusedError`` (the destination is not fit, not there, or not the one it was).
        """
        with self._exclusively(progress, wait_seconds) as journal:
            try:
                with durable.explain(self.destination.label, "copying"):
                    report = self._pass(journal, progress, try_all)
            except NotFoundError:  # no vault yet: nothing has gone wrong
                raise
            except PgkeepError as error:
                self._remember_trouble(journal.memory, there_is=True)
                tell(journal, "", error, progress, at=self.destination.label)
                raise
            self._remember_trouble(journal.memory, there_is=bool(report.troubles))
            if all(failure.path for failure in report.failures):
                journal.settled("")
        return report

    def adopt(self, progress: Progress, wait_seconds: float = 0.0) -> str:
        """Take what is there now for the destination, as it is; copies that are lost for good are forgotten.

        Returns the destination's id. Raises as :meth:`run_pass`.
        """
        with self._exclusively(progress, wait_seconds) as journal, self.destination.opened() as place:
            vault, before = self._vault_id(), journal.memory.destination
            marker = _marker(place)
            if not isinstance(marker, Marker) or marker.vault != vault:
                marker = _write_new_marker(place, vault, progress)
            forgotten = self._forget_lost(place, marker.id, journal, progress)
            details = {"destination": marker.id, "before": before, "forgotten": len(forgotten)}
            journal.record("destination adopted", at=self.destination.label, **details)
            journal.memory.destination = marker.id
            # Whatever was found to be wrong with the anchored log is accepted with it.
            journal.memory.anchors = anchors.Memory()
            for path in ("", *forgotten):
                journal.settled(path)
        return marker.id

    @contextlib.contextmanager
    def _exclusively(self, progress: Progress, wait_seconds: float) -> Iterator[Journal]:
        """The lock, and what is remembered; saved again at the end, however that is."""
        settings = self.settings
        with durable.explain(settings.state, "making the extractor's directory"):
            settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        waiting = lock.locked(
            settings.state / LOCK_NAME, wait_seconds, lambda holder: progress.note(f"waiting for {holder}")
        )
        with waiting:
            journal = Journal(settings.log, settings.name, self._state.load_memory(progress))
            self.failing_since = journal.memory.failing_since
            before = journal.memory.copied()
            try:
                yield journal
            finally:
                if journal.memory != before:
                    self._state.save_memory(journal.memory)

    def _remember_trouble(self, memory: Memory, *, there_is: bool) -> None:
        memory.failing_since = (memory.failing_since or clock.now()) if there_is else None
        self.failing_since = memory.failing_since

    def _pass(self, journal: Journal, progress: Progress, try_all: bool) -> Report:
        vault = self._vault_id()
        sources = source.list_backups(self.settings.active)
        progress.step("pass.listed")
        with self.destination.opened() as place:
            destination = self._recognise(place, vault, journal, progress)
            self._sweep(place, journal, progress)
            copies = self._copies(place, destination, journal, progress)
            report = Report(self.settings.name, self.destination.label)
            try:
                self._work(copies, sources, Work(copies, sources, report, try_all=try_all))
                self._anchor(place, vault, journal, report, progress)
            finally:
                self._say(place.warnings, progress)
        return report

    def _copies(self, place: Place, destination: str, journal: Journal, progress: Progress) -> Copies:
        return Copies(
            self.settings.active,
            place,
            destination,
            self.destination.label,
            self._state,
            self._state.records(destination, progress),
            journal,
            progress,
            self.settings.prolong,
        )

    def _work(self, copies: Copies, sources: dict[str, plan.Signature], work: Work) -> None:
        sizes = copies.place.sizes(plan.files_of(copies.records.values()))
        copies.progress.step("pass.sizes-seen")
        if self.settings.policy is None:
            work.stop_expiring(sizes)
        removed = work.settle_expired(sizes)
        wanted = {path: signature for path, signature in sources.items() if path not in removed}
        todo = plan.compare(wanted, plan.living(copies.records), sizes)
        copies.progress.step("pass.compared")
        work.bring_all(todo)
        work.reread(todo, self.settings.recheck)
        if self.settings.prolong is not None:
            work.prolong(self.settings.prolong, self._unlocked)
        if self.settings.policy is not None:
            work.expire(self.settings.policy)

    def _anchor(self, place: Place, vault: str, journal: Journal, report: Report, progress: Progress) -> None:
        """After the copies, and without being in their way: what goes wrong is in the report."""
        memory = anchors.publish(place, self.settings.vault_log, vault, journal.memory.anchors, progress)
        journal.memory.anchors = memory
        report.alarm = memory.alarm
        for sentence, kind in ((memory.alarm, IntegrityError), (memory.trouble, StorageError)):
            if sentence:
                error = kind(sentence, "see `pgkeep audit verify`")
                report.failures.append(Failure("", error))
                tell(journal, "", error, progress, suffix=f"anchor {kind.__name__}", at=self.destination.label)

    def _recognise(self, place: Place, vault: str, journal: Journal, progress: Progress) -> str:
        """The id of the destination that is mounted. Raises ``StorageError`` unless it is the one remembered."""
        label, known, found = self.destination.label, journal.memory.destination, _marker(place)
        if isinstance(found, FormatError):
            raise StorageError(f"{label}: {found.message}", self._adopt_hint) from found
        if found is None and known is not None:
            raise StorageError(f"{label} has no marker of pgkeep's, and had one: is it mounted?", self._adopt_hint)
        if found is not None and known is None and found.vault != vault:
            raise StorageError(f"{label} keeps the copies of another vault ({found.vault})", self._adopt_hint)
        if found is not None and known not in (None, found.id):
            raise StorageError(
                f"{label} is not the destination that it was: another is mounted there", self._adopt_hint
            )
        if found is None:
            found = _write_new_marker(place, vault, progress)
        if known is None:
            journal.record("destination adopted", at=label, destination=found.id, before=None, forgotten=0)
            journal.memory.destination = found.id
            self._state.save_memory(journal.memory)
            progress.step("pass.destination-remembered")
        return found.id

    def _sweep(self, place: Place, journal: Journal, progress: Progress) -> None:
        """Once in a process's life: within it, nothing is left behind."""
        if self._swept:
            return
        removed = place.sweep(_SWEPT)
        if removed:
            progress.warn(f"a pass before this one was cut off: removed {len(removed)} temporary files of its copies")
            journal.record("temporary files removed", at=self.destination.label, paths=removed[:100])
        self._swept = True

    def _forget_lost(self, place: Place, destination: str, journal: Journal, progress: Progress) -> list[str]:
        sources = source.list_backups(self.settings.active)
        records = self._state.records(destination, progress)
        known = plan.living(records)
        broken = plan.compare(sources, known, place.sizes(plan.files_of(known.values()))).broken
        lost = sorted(path for path in broken if path not in sources)
        for path in lost:
            self._state.forget(destination, path)
        return lost

    def _say(self, warnings: tuple[str, ...], progress: Progress) -> None:
        for warning in warnings:
            if warning not in self._said:
                self._said.add(warning)
                progress.warn(warning)


def _marker(place: Place) -> Marker | FormatError | None:
    """What the destination says of itself; an error, not raised, for a marker that can't be read."""
    try:
        data = place.read_marker()
        return None if data is None else decode_marker(data)
    except FormatError as error:
        return error


def _write_new_marker(place: Place, vault: str, progress: Progress) -> Marker:
    marker = Marker(format=1, id=secrets.token_hex(16), vault=vault, made_at=clock.now())
    place.write_marker(encode_marker(marker))
    progress.step("pass.marker-written")
    return marker
