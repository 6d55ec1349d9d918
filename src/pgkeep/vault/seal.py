"""Sealing: a staged dump becomes a backup that nobody can change, or nothing at all.

The order is the safety: intent in the journal, a private copy that is checked, names linked without ever
overwriting, **the manifest last: its appearance is the commit point**, flags, audit record, journal closed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
from collections.abc import Iterator

from pgkeep import __version__
from pgkeep.adapters import durable, fsflags
from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names, retention
from pgkeep.domain import request as requests
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.manifest import Manifest
from pgkeep.domain.request import Request
from pgkeep.errors import FormatError, IntegrityError, PgkeepError, StorageError
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, journal
from pgkeep.vault.inspect import Depth, Inspection, inspect, large_object_count, statistics
from pgkeep.vault.layout import Vault

DUMP_MODE = 0o440
SIDECAR_MODE = 0o444
# NAME_MAX of every filesystem that pgkeep knows; names are ASCII.
NAME_LIMIT_BYTES = 255
COPY_STEP_BYTES = 64 * 1024 * 1024
# No dump takes longer than this.
PLAUSIBLE_AGE = dt.timedelta(days=14)


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What the vault decides by: how long, how much to leave free, how deep to look, whether names tell databases."""

    policy: retention.Policy
    reserve_bytes: int
    depth: Depth = "digests"
    named_by_database: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """One of the files of a backup: its name, and the file that waits for it."""

    name: str
    file: durable.NewFile


def seal(vault: Vault, staged_name: str, rules: Rules, progress: Progress) -> SealedBackup:
    """Take ``staging/<staged_name>/`` in and seal it. The staged files stay; the agent removes them.

    Raises ``IntegrityError`` for a dump that isn't whole, ``StorageError`` (disk full, read-only, missing
    right), ``RefusedError``. After an error nothing of it is visible.
    """
    with contextlib.ExitStack() as stack:
        staging = stack.enter_context(fsflags.opened(vault.layout.staging))
        incoming = stack.enter_context(fsflags.opened(vault.layout.incoming))
        request = _read_request(staging, staged_name)
        private = stack.enter_context(durable.NewFile.create(incoming, incoming, DUMP_MODE))
        _copy(vault, staging, f"{staged_name}/{requests.DUMP_NAME}", private, rules, progress)
        progress.step("seal.copied")
        inspection = inspect(LocalFile(private.fd), rules.depth)
        if inspection.defects:
            raise IntegrityError("the dump is not whole: " + "; ".join(inspection.defects[:5]), "make it again")
        progress.step("seal.inspected")
        manifest = _describe(vault, request, inspection, rules)
        parts = [_Part(manifest.filename, private), *_sidecars(manifest, incoming, stack)]
        for part in parts:
            os.fsync(part.file.fd)
        progress.step("seal.synced")
        _publish(vault, manifest, parts, progress)
    return SealedBackup(manifest, directory_of(manifest))


def directory_of(manifest: Manifest) -> str:
    """The directory below ``active/``: globals of all tiers share one."""
    return names.GLOBALS_DIRECTORY if manifest.kind == "globals" else manifest.type.value


def protect(vault: Vault, directory: int, name: str, inode: int) -> None:
    """Give a linked file its protection and read it back. Raises ``IntegrityError`` for another inode."""
    descriptor = durable.open_beneath(directory, name)
    try:
        if os.fstat(descriptor).st_ino != inode:
            raise IntegrityError(f"{name} is not the file that was sealed", "look at the audit log")
        if vault.protection == "chattr":
            fsflags.set_flag(descriptor, fsflags.IMMUTABLE, True)
        # After the flag: without this, ext4 and xfs were seen to lose it in a power cut.
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_request(staging: int, staged_name: str) -> Request:
    descriptor = durable.open_beneath(staging, f"{staged_name}/{requests.FILE_NAME}")
    try:
        data = os.read(descriptor, requests.SIZE_LIMIT_BYTES + 1)
    finally:
        os.close(descriptor)
    request = requests.decode(data)
    if not staged_name.startswith(request.id):
        raise FormatError(f"the request in {staged_name} names another backup: {request.id}")
    return request


def _copy(vault: Vault, staging: int, path: str, private: durable.NewFile, rules: Rules, progress: Progress) -> None:
    """Into an inode of the vault's own: whoever holds the staged file open can't reach it."""
    source = durable.open_beneath(staging, path)
    try:
        size_bytes = os.fstat(source).st_size
        free_bytes = durable.free_bytes(vault.layout.incoming)
        if free_bytes < size_bytes + rules.reserve_bytes:
            raise StorageError(
                f"{vault.layout.active} has {free_bytes} bytes free; the backup needs {size_bytes}"
                f" and {rules.reserve_bytes} stay in reserve",
                "free space, enlarge the disk, or shorten the retention of what is yet to come",
            )
        with durable.explain(vault.layout.incoming, "copying the dump"):
            for offset in range(0, size_bytes, COPY_STEP_BYTES):
                durable.copy_range(source, offset, private.fd, min(COPY_STEP_BYTES, size_bytes - offset))
                progress.advance(min(offset + COPY_STEP_BYTES, size_bytes), size_bytes)
            os.fchmod(private.fd, DUMP_MODE)
    finally:
        os.close(source)


def _describe(vault: Vault, request: Request, inspection: Inspection, rules: Rules) -> Manifest:
    assert inspection.index is not None, "an inspection without defects has read the index"
    index = inspection.index
    if index.header.content != request.kind:
        raise IntegrityError(f"the dump holds {index.header.content}, the request says {request.kind}")
    sealed_at = dt.datetime.now(dt.UTC)
    filename = _free_name(vault, request, rules)
    return Manifest(
        version=manifests.VERSION,
        id=request.id,
        kind=request.kind,
        filename=filename,
        timestamp=filename.split(".")[0],
        type=request.tier,
        database=request.database,
        size_bytes=inspection.size_bytes,
        sha256=inspection.sha256,
        created_at=request.created_at,
        sealed_at=sealed_at,
        retain_until=retention.retain_until(rules.policy, request.tier, sealed_at),
        immutable=vault.protection == "chattr",
        protection=vault.protection,
        system_identifier=request.system_identifier,
        server_version=request.server_version,
        dump_version=request.dump_version,
        pgkeep_version=__version__,
        dump_seconds=round(request.dump_seconds, 3),
        facts=request.facts,
        tables=statistics(index),
        large_objects=large_object_count(index),
        raw_bytes=sum(part.raw_bytes for part in index.parts),
        notes=request.notes,
    )


def _free_name(vault: Vault, request: Request, rules: Rules) -> str:
    """Named by the dump's moment; a name that is taken is never touched, the next free second is.

    The agent's moment is believed only where it is plausible by the vault's clock.
    """
    directory = names.GLOBALS_DIRECTORY if request.kind == "globals" else request.tier.value
    database = request.database if rules.named_by_database and request.kind == "database" else None
    now = dt.datetime.now(dt.UTC)
    moment = request.created_at if now - PLAUSIBLE_AGE <= request.created_at <= now else now
    while True:
        name = names.dump_name(moment, database)
        if len(name + names.SIGNATURE_SUFFIX) > NAME_LIMIT_BYTES:
            raise FormatError(f"the database's name is too long for a file's: {name[:80]}…")
        taken = vault.directory(directory) / name
        if not taken.exists() and not taken.with_name(name + names.MANIFEST_SUFFIX).exists():
            return name
        moment += dt.timedelta(seconds=1)


def _sidecars(manifest: Manifest, incoming: int, stack: contextlib.ExitStack) -> Iterator[_Part]:
    """Checksum and manifest, the manifest last."""
    checksum = f"{manifest.sha256}  {manifest.filename}\n".encode()
    encoded = manifests.encode(manifest)
    if len(encoded) > manifests.SIZE_LIMIT_BYTES:
        raise IntegrityError(f"the dump's tables make a manifest of {len(encoded)} bytes: nobody could read it")
    for suffix, data in ((names.CHECKSUM_SUFFIX, checksum), (names.MANIFEST_SUFFIX, encoded)):
        file = stack.enter_context(durable.NewFile.create(incoming, incoming, SIDECAR_MODE))
        durable.write_all(file.fd, data)
        os.fchmod(file.fd, SIDECAR_MODE)
        yield _Part(manifest.filename + suffix, file)


def _publish(vault: Vault, manifest: Manifest, parts: list[_Part], progress: Progress) -> None:
    directory = vault.directory(directory_of(manifest))
    entry = journal.Entry(
        id=manifest.id,
        action="seal",
        directory=directory.name,
        filename=manifest.filename,
        inodes={part.name: part.file.inode for part in parts},
    )
    try:
        journal.write(vault.layout.journal, entry)
        progress.step("seal.journal-written")
        with durable.explain(directory, "sealing the backup"), vault.unlocked(directory) as descriptor:
            progress.step("seal.directory-opened")
            for part in parts:
                part.file.publish(descriptor, part.name)
                progress.step(f"seal.linked{part.name.removeprefix(manifest.filename) or '-dump'}")
            finish(vault, descriptor, entry, progress)
        progress.step("seal.directory-closed")
        _account(vault, entry, manifest, progress)
    except BaseException:
        _settle(vault, entry, progress)
        raise


def _settle(vault: Vault, entry: journal.Entry, progress: Progress) -> None:
    """Undo or finish at once; what goes wrong in that must not hide why it came to it."""
    try:
        if undo_or_finish(vault, entry, progress):
            progress.warn(f"{entry.directory}/{entry.filename} is whole and sealed all the same")
    except PgkeepError as error:
        progress.warn(f"the next run will clear up what is left of {entry.id}: {error.message}")


def finish(vault: Vault, directory: int, entry: journal.Entry, progress: Progress) -> None:
    """Protect every name of a committed backup. Idempotent."""
    for name, inode in entry.inodes.items():
        protect(vault, directory, name, inode)
        progress.step(f"seal.protected{name.removeprefix(entry.filename) or '-dump'}")
    os.fsync(directory)


def _account(vault: Vault, entry: journal.Entry, manifest: Manifest, progress: Progress) -> None:
    _record_sealed(vault, entry, manifest)
    progress.step("seal.audited")
    journal.close(vault.layout.journal, entry)
    progress.step("seal.journal-closed")


def _record_sealed(vault: Vault, entry: journal.Entry, manifest: Manifest) -> None:
    audit_log.record(
        vault,
        "sealed",
        id=manifest.id,
        path=f"{entry.directory}/{manifest.filename}",
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        protection=manifest.protection,
        retain_until=manifest.retain_until,
    )


def undo_or_finish(vault: Vault, entry: journal.Entry, progress: Progress) -> bool:
    """After a failure or a crash: True if the manifest was there and the backup is whole now, else all is gone."""
    directory = vault.directory(entry.directory)
    with durable.explain(directory, "clearing up after a failure"), vault.unlocked(directory) as descriptor:
        manifest_name = entry.filename + names.MANIFEST_SUFFIX
        committed = _is_ours(descriptor, manifest_name, entry)
        if committed:
            finish(vault, descriptor, entry, progress)
        else:
            remove_names(descriptor, entry)
    if committed:
        manifest = manifests.decode((directory / manifest_name).read_bytes())
        if not audit_log.holds(vault, "sealed", entry.id):
            _record_sealed(vault, entry, manifest)
    else:
        audit_log.record(vault, "sealing undone", id=entry.id, path=f"{entry.directory}/{entry.filename}")
    progress.step("seal.settled")
    journal.close(vault.layout.journal, entry)
    return committed


def remove_names(directory: int, entry: journal.Entry) -> None:
    """Unlink those names of the entry that still are the inodes it speaks of, the manifest first."""
    for name in reversed(entry.inodes):
        if _is_ours(directory, name, entry):
            descriptor = durable.open_beneath(directory, name)
            try:
                with contextlib.suppress(fsflags.UnsupportedFlagsError):
                    fsflags.set_flag(descriptor, fsflags.IMMUTABLE, False)
            finally:
                os.close(descriptor)
            os.unlink(name, dir_fd=directory)
    os.fsync(directory)


def _is_ours(directory: int, name: str, entry: journal.Entry) -> bool:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino == entry.inodes[name]
    except FileNotFoundError:
        return False
