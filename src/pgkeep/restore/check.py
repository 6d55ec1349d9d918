"""Is a copy at a destination what its manifest says? By its end and its sidecars; ``--deep`` fetches it first."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import Listed, Lock, Place
from pgkeep.domain import names
from pgkeep.domain.artifact import foreign_hint
from pgkeep.domain.manifest import SIZE_LIMIT_BYTES, Manifest
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, PgkeepError, StorageError
from pgkeep.progress import Progress, Silent
from pgkeep.restore import fetch
from pgkeep.restore.copies import VERSIONS_READ, Copy
from pgkeep.restore.sparse import sparse_copy

_MAGIC_BYTES = 64
_AGE_HINT = "it is encrypted"


class Defect(msgspec.Struct, frozen=True):
    """A word for machines, a sentence for people."""

    code: str
    message: str


class LockFacts(msgspec.Struct, frozen=True):
    """What keeps a copy there, by the destination's own word."""

    mode: str
    until: dt.datetime


def check(place: Place, copy: Copy, scratch: Path, now: dt.datetime) -> tuple[list[Defect], LockFacts | None]:
    """Sidecars, size, the end and the index of every version of the dump, and the lock; the rest is not read.

    Never raises for what is wrong with the copy. Raises ``StorageError`` where the destination can't be read.
    """
    defects = [Defect(copy.backup.state, problem) for problem in copy.backup.problems]
    if copy.checksums and not fetch.has_checksum(place, copy):
        defects.append(
            Defect("checksum", f"the digest differs from {copy.backup.manifest.filename}{names.CHECKSUM_SUFFIX}")
        )
    defects += _dumps(place, copy, scratch)
    lock, more = _lock(place, copy, now)
    return [*defects, *more], lock


def _dumps(place: Place, copy: Copy, scratch: Path) -> Iterator[Defect]:
    for dump in copy.dumps[:VERSIONS_READ]:
        try:
            with place.opened_file(dump.path, dump.version) as remote:
                if copy.backup.manifest.recipients:
                    _require_encrypted(remote.read(0, _MAGIC_BYTES))
                else:
                    with sparse_copy(remote, scratch, Silent()) as file:
                        fetch.require_fitting(file, copy.backup.manifest, Silent())
        except (FormatError, IntegrityError, NotFoundError) as error:
            yield Defect("content", f"{_named(dump)}{_explained(error)}")


def _require_encrypted(head: bytes) -> None:
    if not foreign_hint(head).startswith(_AGE_HINT):
        raise FormatError("it is not encrypted, as its manifest says")


def _explained(error: PgkeepError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


def _named(dump: Listed) -> str:
    return f"version {dump.version}: " if dump.version else ""


def _lock(place: Place, copy: Copy, now: dt.datetime) -> tuple[LockFacts | None, list[Defect]]:
    """The lock of what a restore would use: of dump and manifest the one that ends first."""
    used = [*copy.dumps[:1], copy.manifest]
    locks: list[Lock | None] = []
    for each in used:
        with contextlib.suppress(NotFoundError):
            locks.append(place.lock(each.path, each.version))
    found = [lock for lock in locks if lock is not None]
    if not found:
        return None, []
    shortest = min(found, key=lambda lock: lock.until)
    facts = LockFacts(shortest.mode, shortest.until)
    retain_until = copy.backup.manifest.retain_until
    if len(found) < len(locks):
        return facts, [Defect("lock", "only a part of it is locked: the rest can be removed")]
    if shortest.until <= now and (retain_until is None or now < retain_until):
        return facts, [Defect("lock", f"its lock ended at {shortest.until:%Y-%m-%d %H:%M} UTC, before its time")]
    return facts, []


def fetch_for_reading(place: Place, copy: Copy, directory: Path, progress: Progress) -> Path:
    """Dump and sidecars as they are there, sound or not, for a look at every member. The dump's path.

    Of several versions of the dump the oldest that has the manifest's digest; the last one where none has.
    Raises ``IntegrityError`` where nothing can be had, ``StorageError``.
    """
    manifest = copy.backup.manifest
    path = directory / manifest.filename
    dumps = (copy.dumps or copy.others[-1:])[:VERSIONS_READ]
    if not any(_download(place, dump, path, manifest, progress) for dump in dumps) and not path.exists():
        raise IntegrityError("the dump can't be had")
    with durable.explain(directory, "keeping what was fetched"):
        for listed in (*copy.checksums[:1], copy.manifest):
            suffix = listed.path.removeprefix(copy.path)
            with contextlib.suppress(NotFoundError, FormatError):
                data = place.read(listed.path, SIZE_LIMIT_BYTES, listed.version)
                path.with_name(path.name + suffix).write_bytes(data)
    return path


def _download(place: Place, dump: Listed, path: Path, manifest: Manifest, progress: Progress) -> bool:
    """Has it the manifest's digest?"""
    try:
        with place.opened_file(dump.path, dump.version) as remote, durable.explain(path, "keeping what was fetched"):
            _require_room(path.parent, remote.size_bytes)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                return fetch.download(remote, descriptor, 0, progress) == manifest.sha256
            finally:
                os.close(descriptor)
    except (FormatError, NotFoundError, IntegrityError):
        return False


def _require_room(directory: Path, needed_bytes: int) -> None:
    if needed_bytes > durable.free_bytes(directory):
        raise StorageError(f"{directory} has no room for {needed_bytes} bytes", "set TMPDIR to a roomier place")
