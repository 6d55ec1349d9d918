"""One backup at a time: bring it to the destination, look whether it is still whole there, mend it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from pgkeep.adapters import clock
from pgkeep.adapters.destinations import Content, Place
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, PgkeepError, RefusedError
from pgkeep.extractor import audit, plan, source
from pgkeep.extractor.plan import File, Record
from pgkeep.extractor.state import REPEAT_AFTER, Memory, State, Told
from pgkeep.progress import Progress

Outcome = Literal["extracted", "repaired", "adopted"]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with one backup (its path below ``active/``), or with the copy of it."""

    path: str
    error: PgkeepError


class Journal:
    """Tells the audit log, and of the same trouble only when it is news."""

    def __init__(self, log: Path, memory: Memory) -> None:
        self.log = log
        self.memory = memory

    def record(self, event: audit.Event, **details: Any) -> None:
        """Raises ``StorageError``."""
        audit.record(self.log, event, **details)

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
    """The copies at one open destination, whose marker says ``destination``."""

    active: Path
    place: Place
    destination: str
    label: str
    state: State
    records: Mapping[str, Record]
    journal: Journal
    progress: Progress

    def is_unchanged(self, path: str) -> bool:
        """Is a backup whose manifest lies elsewhere on the disk now (the vault was moved) still what was copied?

        Remembers that, and reads nothing outside. Raises as :meth:`bring`.
        """
        known = self.records[path]
        with source.opened(self.active, path) as backup:
            self._require_same(path, known, backup)
            if known.files != _files(backup):
                return False
            self.state.save(self.destination, path, msgspec.structs.replace(known, source=backup.signature))
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
            listing = self.place.listing(plan.folder_of(outside))
            if known is None:
                self._require_ours(outside, backup, listing)
            else:
                self._require_same(path, known, backup)
            found = {self._bring_part(path, outside, part, listing) for part in backup.parts}
            self.progress.step("extract.copied")
        record = _record(outside, backup, known)
        outcome = _outcome(found, known)
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
            if self.place.content(record.path + suffix, self.progress) != Content(file.size_bytes, file.sha256):
                self.remember_problem(path, "damaged")
                self.progress.step("check.damaged")
                return False
        if record.problem:
            self.journal.record("adopted", **self._details(path, record))
            self.journal.settled(path)
        whole = msgspec.structs.replace(record, checked_at=clock.now(), problem="")
        self.state.save(self.destination, path, whole)
        self.progress.step("check.recorded")
        return True

    def remember_problem(self, path: str, problem: plan.Problem) -> None:
        """Raises ``StorageError``."""
        record = self.records[path]
        if record.problem != problem:
            self.state.save(self.destination, path, msgspec.structs.replace(record, problem=problem))

    def tell(self, path: str, problem: plan.Problem, *, in_vault: bool) -> IntegrityError:
        """The audit log hears of a copy that is missing or damaged. Raises ``StorageError``."""
        record = self.records[path]
        error = _broken(f"{self.label}/{record.path}", problem)
        event: audit.Event = "copy missing" if problem == "missing" else "copy damaged"
        self.journal.trouble(event, path, error, **self._identity(record), in_vault=in_vault)
        return error

    def _bring_part(self, path: str, outside: str, part: source.Part, listing: Mapping[str, int]) -> plan.Problem:
        """How it was found; it is whole afterwards."""
        target = outside + part.suffix
        name = target.rpartition("/")[2]
        if name not in listing:
            self.place.store(target, part.descriptor, part.content, self.progress)
            return "missing"
        size_is_right = listing[name] == part.content.size_bytes
        if size_is_right and self.place.content(target, self.progress) == part.content:
            return ""
        aside = f"{name}.damaged-{clock.now():%Y%m%dT%H%M%S.%fZ}"
        error = _broken(f"{self.label}/{target}", "damaged")
        moved_to = f"{self.label}/{plan.folder_of(target)}/{aside}"
        self.journal.trouble("copy damaged", path, error, suffix=part.suffix, moved_to=moved_to, in_vault=True)
        self.progress.step("extract.damage-told")
        self.place.store(target, part.descriptor, part.content, self.progress, aside)
        return "damaged"

    def _require_same(self, path: str, known: Record, backup: source.Backup) -> None:
        """What is sealed never changes: where it did, the copy is what is right."""
        dump = backup.parts[0].content
        if (known.id, known.files[""]) != (backup.id, File(dump.size_bytes, dump.sha256)):
            raise RefusedError(
                f"{path} is no longer what was copied to {self.label}/{known.path}: it was {known.id} with sha256 "
                f"{known.files[''].sha256}, and is {backup.id} with {dump.sha256}",
                "the vault's audit log says what was sealed; the copy is left as it is",
            )

    def _require_ours(self, outside: str, backup: source.Backup, listing: Mapping[str, int]) -> None:
        """Another backup there, whole by its own manifest, is somebody's: it is never in the way of ours."""
        name = outside.rpartition("/")[2]
        if name + names.MANIFEST_SUFFIX not in listing:
            return
        try:
            other = source.read_facts(self.place.read(outside + names.MANIFEST_SUFFIX, manifests.SIZE_LIMIT_BYTES))
        except (FormatError, NotFoundError):  # damaged: to be replaced
            return
        theirs = Content(other.size_bytes, other.sha256)
        if (other.id, theirs) == (backup.id, backup.parts[0].content) or listing.get(name) != other.size_bytes:
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


def _record(outside: str, backup: source.Backup, known: Record | None) -> Record:
    now = clock.now()
    return Record(
        id=backup.id,
        path=outside,
        files=_files(backup),
        source=backup.signature,
        copied_at=known.copied_at if known is not None else now,
        checked_at=now,
    )


def _files(backup: source.Backup) -> dict[str, File]:
    return {part.suffix: File(part.content.size_bytes, part.content.sha256) for part in backup.parts}


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
