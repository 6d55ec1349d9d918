"""One backup at a time: bring it to the destination, look whether it is still whole there, mend it, remove it."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from pgkeep.adapters import clock
from pgkeep.adapters.destinations import Content, Place
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, PgkeepError, RefusedError, StorageError
from pgkeep.extractor import audit, plan, source
from pgkeep.extractor.plan import File, Locked, Record
from pgkeep.extractor.state import REPEAT_AFTER, Memory, State, Told
from pgkeep.progress import Progress

Outcome = Literal["extracted", "repaired", "adopted"]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with one backup (its path below ``active/``), or with the copy of it."""

    path: str
    error: PgkeepError


class Journal:
    """Tells the audit log of one destination, and of the same trouble only when it is news."""

    def __init__(self, log: Path, name: str, memory: Memory) -> None:
        self.log = log
        self.memory = memory
        self._name = name

    def record(self, event: audit.Event, **details: Any) -> None:
        """Raises ``StorageError``."""
        audit.record(self.log, event, destination_name=self._name, **details)

    def trouble(self, event: audit.Event, path: str, error: PgkeepError, *, suffix: str = "", **details: Any) -> None:
        """``path``: below ``active/``, empty for the whole destination; ``suffix``: of the backup's file in question.

        Raises ``StorageError``.
        """
        key, now = f"{event} {path}{suffix}", clock.now()
        if self.memory.is_news(key, error.message, now):
            named = {"path": path} if path else {}
            self.record(event, **named, reason=error.message, **details)
            self.memory.told[key] = Told(error.message, now, error.hint, _lasting(error))

    def settled(self, path: str) -> None:
        """It went well: the same trouble would be news again."""
        for event in ("extraction failed", "copy missing", "copy damaged"):
            for suffix in ("", *names.SIDECAR_SUFFIXES):
                self.memory.told.pop(f"{event} {path}{suffix}", None)

    def known_to_fail(self, path: str) -> PgkeepError | None:
        """Why it failed less than a day ago, and would again; finding that out means to read all of a backup."""
        told = self.memory.told.get(f"extraction failed {path}")
        if told is None or not told.lasting or not clock.now() - REPEAT_AFTER < told.time <= clock.now():
            return None
        return (RefusedError if told.lasting == "refused" else IntegrityError)(told.message, told.hint)


@dataclasses.dataclass(frozen=True, slots=True)
class Copies:
    """The copies at one open destination, whose marker says ``destination``.

    ``prolong``: locks are extended, and never to more than so long from now; None: they are left alone.
    """

    active: Path
    place: Place
    destination: str
    label: str
    state: State
    records: Mapping[str, Record]
    journal: Journal
    progress: Progress
    prolong: dt.timedelta | None = None

    def is_unchanged(self, path: str) -> bool:
        """Is a backup whose manifest lies elsewhere on the disk now (the vault was moved) still what was copied?

        Remembers that, and reads nothing outside. Raises as :meth:`bring`.
        """
        known = self.records[path]
        with source.opened(self.active, path) as backup:
            self._require_same(path, known, backup)
            if {suffix: _content(file) for suffix, file in known.files.items()} != _contents(backup):
                return False
            self._save(path, source=backup.signature)
        return True

    def is_the_one_removed(self, path: str) -> bool:
        """The same, of a backup whose copy's time was over; another one of that name is copied. Raises as above."""
        with source.opened(self.active, path) as backup:
            if self.records[path].id != backup.id:
                return False
            self._save(path, source=backup.signature)
        return True

    def bring(self, path: str) -> Outcome:
        """Make the copy of a backup whole, copying what of it is not, and remember it.

        Raises ``NotFoundError`` where the backup has expired, ``IntegrityError`` (the source is bad),
        ``RefusedError`` (another backup's copy lies there), ``StorageError``.
        """
        known = self.records.get(path)
        outside = plan.path_outside(path)
        with source.opened(self.active, path) as backup:
            self.progress.step("extract.opened")
            versions = {part.suffix: _version(known, part.suffix) for part in backup.parts}
            sizes = self.place.sizes({outside + suffix: version for suffix, version in versions.items()})
            if known is None:
                self._require_ours(outside, backup, sizes)
                if sizes:
                    versions |= self._newest_versions(outside)
            else:
                self._require_same(path, known, backup)
            found = {}
            for part in backup.parts:
                target = _Target(path, outside + part.suffix, versions[part.suffix], backup.origin.retain_until)
                found[part.suffix], versions[part.suffix] = self._bring_part(target, part, sizes)
            self.progress.step("extract.copied")
        record = _record(outside, backup, versions, known, self._lock(outside, versions[""]))
        outcome = _outcome(set(found.values()), known)
        self.journal.record(outcome, **self._details(path, record))
        self.progress.step("extract.audited")
        self.state.save(self.destination, path, record)
        self.progress.step("extract.recorded")
        self.journal.settled(path)
        return outcome

    def check(self, path: str) -> bool:
        """Read a known copy in full, and remember what came of it. Raises ``StorageError``."""
        record = self.records[path]
        for suffix, file in record.files.items():
            if self.place.content(record.path + suffix, self.progress, file.version) != _content(file):
                self.remember_problem(path, "damaged")
                self.progress.step("check.damaged")
                return False
        self.accept(path, checked_at=clock.now())
        self.progress.step("check.recorded")
        return True

    def accept(self, path: str, **changed: Any) -> None:
        """It is whole, as far as is looked; it may have had a problem before. Raises ``StorageError``."""
        if self.records[path].problem:
            self.journal.record("adopted", **self._details(path, self.records[path]))
            self.journal.settled(path)
        self._save(path, problem="", **changed)

    def keep(self, path: str) -> None:
        """Its removal, begun or not, is no longer wanted. Raises ``StorageError``."""
        self._save(path, expired_at=None)

    def learn_lock(self, path: str) -> None:
        """What lock is on a copy that was made before anybody asked. Raises ``StorageError``."""
        record = self.records[path]
        lock = self.place.lock(record.path, record.files[""].version)
        if lock is not None:
            self._save(path, locked=Locked(record.copied_at, lock.until))

    def extend_lock(self, path: str, until: dt.datetime) -> None:
        """Raises ``StorageError``, ``RefusedError``."""
        record = self.records[path]
        for suffix, file in record.files.items():
            self.place.prolong(record.path + suffix, until, file.version)
            self.progress.step("lock.prolonged")
        self.journal.record("lock prolonged", **self._details(path, record), until=until)
        self._save(path, locked=Locked(clock.now(), until))

    def expire(self, path: str, reason: str, *, in_vault: bool) -> bool:
        """Remove a copy whose time is over, unless a lock keeps it: False then. Raises ``StorageError``,
        ``RefusedError`` (never done at this kind of destination)."""
        record, now = self.records[path], clock.now()
        if record.locked is not None and now < record.locked.until:
            return False
        for suffix, file in record.files.items():
            lock = self.place.lock(record.path + suffix, file.version)
            if lock is not None and now < lock.until:
                self._save(path, locked=Locked(now, lock.until))
                return False
        self._save(path, expired_at=now)
        self.progress.step("expire.remembered")
        self.finish_expiry(path, reason, in_vault=in_vault)
        return True

    def finish_expiry(self, path: str, reason: str, *, in_vault: bool) -> None:
        """The manifest goes first: what is left of the copy counts as none. Raises as :meth:`expire`."""
        record = self.records[path]
        self.journal.record("copy expired", **self._details(path, record), reason=reason, in_vault=in_vault)
        self.progress.step("expire.audited")
        for suffix, file in reversed(record.files.items()):
            self.place.remove(record.path + suffix, file.version)
            self.progress.step("expire.removed")
        self.journal.settled(path)
        if not in_vault:
            self.state.forget(self.destination, path)

    def remember_problem(self, path: str, problem: plan.Problem) -> None:
        """Raises ``StorageError``."""
        if self.records[path].problem != problem:
            self._save(path, problem=problem)

    def tell(self, path: str, problem: plan.Problem, *, in_vault: bool) -> IntegrityError:
        """The audit log hears of a copy that is missing or damaged. Raises ``StorageError``."""
        record = self.records[path]
        error = _broken(f"{self.label}/{record.path}", problem)
        event: audit.Event = "copy missing" if problem == "missing" else "copy damaged"
        self.journal.trouble(event, path, error, **self._identity(record), in_vault=in_vault)
        return error

    def _bring_part(self, target: _Target, part: source.Part, sizes: Mapping[str, int]) -> tuple[plan.Problem, str]:
        """How it was found, and the version that is whole now."""
        name = target.outside.rpartition("/")[2]
        aside = f"{name}.damaged-{clock.now():%Y%m%dT%H%M%S.%fZ}"
        if target.outside not in sizes:
            # Where there are versions, what is missing is ours; somebody else's may stand under its name.
            return "missing", self._store(target, part, aside if target.version else None)
        size_is_right = sizes[target.outside] == part.content.size_bytes
        if size_is_right and self.place.content(target.outside, self.progress, target.version) == part.content:
            self.place.secure(target.outside, target.retain_until, target.version)
            return "", target.version
        error = _broken(f"{self.label}/{target.outside}", "damaged")
        moved_to = f"{self.label}/{plan.folder_of(target.outside)}/{aside}"
        self.journal.trouble("copy damaged", target.path, error, suffix=part.suffix, moved_to=moved_to, in_vault=True)
        self.progress.step("extract.damage-told")
        return "damaged", self._store(target, part, aside)

    def _store(self, target: _Target, part: source.Part, aside: str | None) -> str:
        return self.place.store(
            target.outside, part.descriptor, part.content, self.progress, aside=aside, retain_until=target.retain_until
        )

    def _newest_versions(self, outside: str) -> dict[str, str]:
        """Of the copy's files that are there and of which nothing is known, by what follows the dump's name."""
        try:
            listed = list(self.place.files((plan.folder_of(outside),)))
        except StorageError:  # whoever may not list goes by names: reading them tells what is there
            return {}
        return {each.path.removeprefix(outside): each.version for each in listed if each.path.startswith(outside)}

    def _lock(self, outside: str, version: str) -> Locked | None:
        if self.prolong is None:
            return None
        lock = self.place.lock(outside, version)
        return None if lock is None else Locked(clock.now(), lock.until)

    def _save(self, path: str, **changed: Any) -> None:
        self.state.save(self.destination, path, msgspec.structs.replace(self.records[path], **changed))

    def _require_same(self, path: str, known: Record, backup: source.Backup) -> None:
        """What is sealed never changes: where it did, the copy is what is right."""
        dump = backup.parts[0].content
        if (known.id, _content(known.files[""])) != (backup.id, dump):
            raise RefusedError(
                f"{path} is no longer what was copied to {self.label}/{known.path}: it was {known.id} with sha256 "
                f"{known.files[''].sha256}, and is {backup.id} with {dump.sha256}",
                "the vault's audit log says what was sealed; the copy is left as it is",
            )

    def _require_ours(self, outside: str, backup: source.Backup, sizes: Mapping[str, int]) -> None:
        """Another backup there, whole by its own manifest, is somebody's: it is never in the way of ours."""
        if outside + names.MANIFEST_SUFFIX not in sizes:
            return
        try:
            other = source.read_facts(self.place.read(outside + names.MANIFEST_SUFFIX, manifests.SIZE_LIMIT_BYTES))
        except (FormatError, NotFoundError):  # damaged: to be replaced
            return
        theirs = Content(other.size_bytes, other.sha256)
        if (other.id, theirs) == (backup.id, backup.parts[0].content) or sizes.get(outside) != other.size_bytes:
            return
        if self.place.content(outside, self.progress) == theirs:
            raise RefusedError(
                f"{self.label}/{outside} is the copy of another backup, {other.id}, and is never overwritten",
                "do two vaults copy to the same place? Give each a directory of its own",
            )

    def _details(self, path: str, record: Record) -> dict[str, Any]:
        dump = record.files[""]
        return {"path": path, **self._identity(record), "sha256": dump.sha256, "size_bytes": dump.size_bytes}

    def _identity(self, record: Record) -> dict[str, Any]:
        return {"id": record.id, "copy": f"{self.label}/{record.path}", "destination": self.destination}


@dataclasses.dataclass(frozen=True, slots=True)
class _Target:
    """Where one file of a backup (``path`` below ``active/``) goes; ``version``: the one that is known there."""

    path: str
    outside: str
    version: str
    retain_until: dt.datetime | None


def _record(
    outside: str, backup: source.Backup, versions: Mapping[str, str], known: Record | None, locked: Locked | None
) -> Record:
    now = clock.now()
    return Record(
        id=backup.id,
        path=outside,
        files={
            part.suffix: File(part.content.size_bytes, part.content.sha256, versions[part.suffix])
            for part in backup.parts
        },
        source=backup.signature,
        copied_at=known.copied_at if known is not None else now,
        checked_at=now,
        origin=backup.origin,
        locked=locked or (known.locked if known is not None else None),
    )


def _contents(backup: source.Backup) -> dict[str, Content]:
    return {part.suffix: part.content for part in backup.parts}


def _content(file: File) -> Content:
    return Content(file.size_bytes, file.sha256)


def _version(known: Record | None, suffix: str) -> str:
    file = known.files.get(suffix) if known is not None else None
    return file.version if file is not None else ""


def _outcome(found: set[plan.Problem], known: Record | None) -> Outcome:
    if found == {""}:
        return "adopted"
    return "repaired" if known is not None or "damaged" in found else "extracted"


def _broken(where: str, problem: plan.Problem) -> IntegrityError:
    return IntegrityError(f"the copy {where} is {problem}", "`pgkeep extractor adopt` accepts what can't be mended")


def _lasting(error: PgkeepError) -> Literal["", "bad", "refused"]:
    if isinstance(error, RefusedError):
        return "refused"
    return "bad" if isinstance(error, IntegrityError) else ""
