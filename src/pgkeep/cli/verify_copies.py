"""``pgkeep verify --from``: what was found about copies at a destination."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from pgkeep.adapters import clock
from pgkeep.cli import elsewhere, render
from pgkeep.cli.context import Context
from pgkeep.errors import IntegrityError, StorageError
from pgkeep.restore import check, copies
from pgkeep.restore.check import LockFacts
from pgkeep.restore.copies import Copy
from pgkeep.restore.recover import scratch_directory
from pgkeep.vault.verify import Finding, verify_path

if TYPE_CHECKING:
    from pgkeep.adapters.destinations import Place
    from pgkeep.progress import Progress


_FAILURES_TOLERATED = 3


class CopyReport(msgspec.Struct, frozen=True, kw_only=True):
    """A report as on a backup of the vault. ``checked``: ``index`` (its end and its sidecars) or ``content`` (all).

    ``sha256`` is the manifest's: only ``content`` compares it. ``lock`` null: nothing keeps the copy from being removed
    by whoever can write there.
    """

    path: str
    ok: bool
    findings: tuple[Finding, ...]
    checked: Literal["index", "content"]
    size_bytes: int
    sha256: str
    id: str
    version: str
    lock: LockFacts | None

    @property
    def remarks(self) -> tuple[str, ...]:
        """For people, beside the verdict."""
        locked = f"locked until {render.moment(self.lock.until)}, {self.lock.mode}" if self.lock else "not locked"
        return ("every member read" if self.checked == "content" else "index and sidecars", locked)


def verify_copies(
    context: Context, source: str, reference: str | None, database: str | None, *, deep: bool
) -> tuple[list[CopyReport], tuple[str, ...]]:
    """Reports on the copies meant (``reference`` None: on all), and what could not be read as one.

    Raises ``NotFoundError``, ``UsageError``, ``StorageError``.
    """
    destination = elsewhere.destination(context, source)
    scratch = elsewhere.scratch(context)
    with render.progress(quiet=context.json) as progress, destination.opened(to_read=True) as place:
        if reference is None:
            everything = copies.read_copies(place, progress)
            chosen, defects = list(everything.found), everything.defects
        else:
            copy, met = copies.find(place, reference, database, progress)
            elsewhere.warn(met)
            chosen, defects = [copy], ()
        elsewhere.warn(place.warnings)
        look = _Look(place, destination.label, scratch, progress, deep)
        return [look.report(copy) for copy in chosen], defects


class _Look:
    """At one copy after the other. One that can't be read is a finding; three in turn end it: the place is away."""

    def __init__(self, place: Place, label: str, scratch: Path, progress: Progress, deep: bool) -> None:
        self._place = place
        self._label = label
        self._scratch = scratch
        self._progress = progress
        self._deep = deep
        self._failures = 0

    def report(self, copy: Copy) -> CopyReport:
        """Raises ``StorageError``."""
        self._progress.note(f"verifying {copy.path}")
        lock = None
        try:
            defects, lock = check.check(self._place, copy, self._scratch, clock.now())
            findings = [Finding(each.code, each.message) for each in defects]
            if self._deep:
                findings += self._content(copy)
            self._failures = 0
        except StorageError as error:
            self._failures += 1
            if self._failures == _FAILURES_TOLERATED:
                raise
            findings = [Finding("unreadable", error.message)]
        return self._as_report(copy, tuple(dict.fromkeys(findings)), lock)

    def _as_report(self, copy: Copy, findings: tuple[Finding, ...], lock: LockFacts | None) -> CopyReport:
        manifest = copy.backup.manifest
        return CopyReport(
            path=elsewhere.place_of(self._label, copy),
            ok=not findings,
            findings=findings,
            checked="content" if self._deep else "index",
            size_bytes=manifest.size_bytes,
            sha256=manifest.sha256,
            id=manifest.id,
            version=copy.dumps[0].version if copy.dumps else "",
            lock=lock,
        )

    def _content(self, copy: Copy) -> tuple[Finding, ...]:
        with scratch_directory(self._scratch) as directory:
            try:
                path = check.fetch_for_reading(self._place, copy, directory, self._progress)
            except IntegrityError as error:
                return (Finding("content", error.message),)
            return verify_path(path, "content").findings
