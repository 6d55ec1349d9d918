"""Can the place where backups lie hold and protect them, and is all well with those that are there?"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator
from pathlib import Path

from pgkeep.adapters import durable, fsflags, protection
from pgkeep.domain.catalog import SealedBackup, ordered
from pgkeep.errors import ProtectionError
from pgkeep.vault import journal, store
from pgkeep.vault.layout import IDENTITY_NAME, Layout, is_flagged, read_identity
from pgkeep.watch.check import Check, some
from pgkeep.watch.server import Facts

# Of a database's size on its disk, indexes included; seen between 0.1 and 0.35.
EXPECTED_RATIO = 0.35
# Where a backup of the database is there already, the next one is about as large.
GROWTH = 1.2
STALE_AFTER = dt.timedelta(days=2)


def nearest(path: Path) -> Path:
    """The path itself, or the closest of its parents that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def root(layout: Layout) -> Iterator[Check]:
    place = nearest(layout.root)
    writable = os.access(place, os.W_OK | os.X_OK)
    if not place.is_dir():
        yield Check("root", "fail", f"{place} is not a directory", "set PGKEEP_ROOT")
    elif not writable:
        remedy = f"chown or chmod it for user id {os.geteuid()}, or set PGKEEP_ROOT"
        yield Check("root", "fail", f"{place} is not writable for user id {os.geteuid()}", remedy)
    elif place != layout.root:
        yield Check("root", "ok", f"{layout.root} does not exist yet; the first backup makes it in {place}")
    else:
        yield Check("root", "ok", f"{layout.root} is there and writable")


def vault(layout: Layout) -> Iterator[Check]:
    """Raises ``RefusedError``, ``FormatError`` for a vault that is not to be used."""
    if layout.exists:
        identity = read_identity(layout)
        yield Check("vault", "ok", f"vault {identity.id}, made {identity.created_at:%Y-%m-%d}")
    elif layout.active.is_dir() and any(layout.active.iterdir()):
        text = f"{layout.active} holds something and its {IDENTITY_NAME} is missing"
        yield Check("vault", "warn", text, "was a volume swapped? pgkeep starts only in an empty directory")
    else:
        yield Check("vault", "ok", "none yet; the first backup makes it")


def protection_in_force(layout: Layout, wanted: protection.Wanted) -> Iterator[Check]:
    """By what a canary file withstands where it can be put. Raises ``ProtectionError``, ``StorageError``."""
    place = layout.incoming if layout.exists else nearest(layout.root)
    found = protection.probe(place)
    where = f"tried in {place}, on {found.filesystem}"
    chosen = protection.choose(found, wanted, os.geteuid() == 0)
    if layout.exists and chosen.protection != "chattr" and is_flagged(layout.active):
        text = "the vault carries the immutable flag, which this process may not set or lift"
        raise ProtectionError(f"{text} ({found.why})", fsflags.CAPABILITY_HINT)
    if not chosen.warning:
        yield Check("protection", "ok", f"{chosen.protection}: {found.why} ({where})")
        return
    remedy = fsflags.CAPABILITY_HINT if found.capability_missing else fsflags.UNSUPPORTED_HINT
    yield Check("protection", "warn", f"{chosen.protection}: {chosen.warning} ({where})", remedy)


def space(layout: Layout, facts: Facts, backups: tuple[SealedBackup, ...], reserve_bytes: int) -> Iterator[Check]:
    """Free space on each of the file systems against the next backup. Raises ``StorageError``."""
    artifact_bytes = expected_artifact_bytes(facts, backups)
    data_bytes = sum(facts.data_bytes.values())
    staging, active = nearest(layout.staging), nearest(layout.active)
    if staging.stat().st_dev == active.stat().st_dev:
        least = 2 * artifact_bytes + reserve_bytes
        yield _space(active, least, least + data_bytes)
    else:
        yield _space(staging, artifact_bytes, artifact_bytes + data_bytes)
        yield _space(active, artifact_bytes + reserve_bytes, 2 * artifact_bytes + reserve_bytes)


def expected_artifact_bytes(facts: Facts, backups: tuple[SealedBackup, ...]) -> int:
    """The next backups' size together: as the newest one's of each database, else by the usual ratio. Pure."""
    newest = {
        backup.manifest.database: backup.manifest.size_bytes
        for backup in ordered(backups)
        if backup.manifest.kind == "database" and backup.manifest.system_identifier == facts.system_identifier
    }
    return sum(
        int(newest[name] * GROWTH) if name in newest else int(size_bytes * EXPECTED_RATIO)
        for name, size_bytes in facts.data_bytes.items()
    )


def _space(place: Path, least_bytes: int, comfortable_bytes: int) -> Check:
    return weigh_space(str(place), durable.free_bytes(place), least_bytes, comfortable_bytes)


def weigh_space(place: str, free_bytes: int, least_bytes: int, comfortable_bytes: int) -> Check:
    """Below ``least`` a backup can't succeed; below ``comfortable`` (data waits uncompressed) it may not. Pure."""
    seen = f"{_size(free_bytes)} are free on {place}"
    remedy = "free space or enlarge the disk; `pgkeep cleanup --dry-run` says what may go"
    if free_bytes < least_bytes:
        return Check("space", "fail", f"{seen}; a backup needs about {_size(least_bytes)}", remedy)
    if free_bytes < comfortable_bytes:
        text = f"{seen}: tight for a backup that needs {_size(least_bytes)} to {_size(comfortable_bytes)}"
        return Check("space", "warn", text, remedy)
    return Check("space", "ok", f"{seen}; a backup needs {_size(least_bytes)} to {_size(comfortable_bytes)}")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def unfinished(layout: Layout) -> Iterator[Check]:
    """What a crash left. Raises ``FormatError`` for an unreadable journal."""
    for directory in (layout.journal, layout.quarantine):
        if directory.exists() and not os.access(directory, os.R_OK | os.X_OK):
            yield Check("unfinished work", "warn", f"{directory} can't be read by user id {os.geteuid()}",
                        "run doctor as the user that makes the backups")  # fmt: skip
            return
    pending = [f"{entry.action} {entry.id}" for entry in journal.pending(layout.journal)]
    if pending:
        text = f"the journal names work under way or cut off: {some(pending)}"
        yield Check("journal", "warn", text, "the next backup or cleanup finishes or undoes it")
    else:
        yield Check("journal", "ok", "nothing is pending")
    aside = sorted(path.name for path in layout.quarantine.iterdir()) if layout.quarantine.exists() else []
    if aside:
        text = f"{len(aside)} files were put aside in {layout.quarantine}: {some(aside)}"
        yield Check("quarantine", "warn", text, "find out who put them into the vault, then remove them")
    else:
        yield Check("quarantine", "ok", "empty")


def backups(
    catalog: store.Catalog | None,
    now: dt.datetime,
    remedy: str = "pgkeep backup; does whatever starts it still run?",
) -> Iterator[Check]:
    """The state of what is there, and the newest one's age. ``remedy``: what to do where there is no recent one."""
    found = ordered(catalog.backups) if catalog else []
    problems = [f"{backup.path_in_vault}: {problem}" for backup in found for problem in backup.problems]
    problems += catalog.defects if catalog else ()
    if problems:
        yield Check("backups", "fail", some(problems, 3), "`pgkeep verify --all` says more; make a new backup now")
    newest = {b.manifest.database: b.manifest.sealed_at for b in found if b.manifest.kind == "database"}
    if not newest:
        yield Check("newest backup", "warn", "there is none yet", remedy)
    yield from (_age(name, now - sealed_at, remedy) for name, sealed_at in sorted(newest.items()))


def _age(database: str, age: dt.timedelta, remedy: str) -> Check:
    text = f"{database}: {age.total_seconds() / 3600:.1f} hours old"
    if age > STALE_AFTER:
        return Check("newest backup", "warn", text, remedy)
    return Check("newest backup", "ok", text)


def sealed_at(catalog: store.Catalog | None) -> dt.datetime | None:
    """When the newest backup was sealed."""
    return max((backup.manifest.sealed_at for backup in catalog.backups), default=None) if catalog else None
