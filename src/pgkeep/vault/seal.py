"""Sealing: a staged dump becomes a backup that nobody can change, or nothing at all.

The order is the safety: intent in the journal, a private copy that is checked, names linked without ever
overwriting, **the manifest last: its appearance is the commit point**, flags, audit record, journal closed.
A dump for several tiers is one file with a name in each: linked everywhere before it is protected, because an
immutable file takes no further name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
from collections.abc import Callable, Iterator, Sequence

from pgkeep import __version__
from pgkeep.adapters import clock, durable, fsflags
from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names, retention
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.manifest import Manifest
from pgkeep.domain.names import Tier
from pgkeep.domain.request import Request
from pgkeep.errors import FormatError, IntegrityError, PgkeepError
from pgkeep.progress import Progress
from pgkeep.vault import journal, receive, settle
from pgkeep.vault.inspect import Inspection, inspect
from pgkeep.vault.journal import Place
from pgkeep.vault.layout import Vault

SIDECAR_MODE = 0o444
# NAME_MAX of every filesystem that pgkeep knows; names are ASCII.
NAME_LIMIT_BYTES = 255
# No dump takes longer than this.
PLAUSIBLE_AGE = dt.timedelta(days=14)
UNLIMITED_BYTES = 2**63 - 1


def _inspect_digests(file: LocalFile) -> Inspection:
    return inspect(file, "digests")


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What the vault decides by: how long, how much to leave free, who looks into the dump, whether names tell
    databases, and how large a dump may be."""

    policy: retention.Policy
    reserve_bytes: int
    inspect: Callable[[LocalFile], Inspection] = _inspect_digests
    named_by_database: bool = False
    limit_bytes: int = UNLIMITED_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """One of the files of a backup: its name, and the file that waits for it."""

    name: str
    file: durable.NewFile


@dataclasses.dataclass(frozen=True, slots=True)
class _Named:
    """A backup under one tier's name: what its manifest says, and its files, the manifest last."""

    manifest: Manifest
    parts: tuple[_Part, ...]

    @property
    def place(self) -> Place:
        inodes = {part.name: part.file.inode for part in self.parts}
        return Place(directory=directory_of(self.manifest), filename=self.manifest.filename, inodes=inodes)


def seal(
    vault: Vault,
    staged_name: str,
    request: Request,
    tiers: Sequence[Tier],
    rules: Rules,
    progress: Progress,
    *,
    again: bool = False,
) -> tuple[SealedBackup, ...]:
    """Take ``staging/<staged_name>/`` in and seal it under each tier. The staged files stay; the agent removes them.

    ``again``: some name of it is sealed already, and has its identifier.

    Raises ``IntegrityError`` for a dump that isn't whole, ``StorageError`` (disk full, read-only, missing
    right), ``RefusedError``. After an error nothing of it is visible.
    """
    with contextlib.ExitStack() as stack:
        incoming = stack.enter_context(fsflags.opened(vault.layout.incoming))
        private = stack.enter_context(durable.NewFile.create(incoming, incoming, receive.DUMP_MODE))
        receive.copy_dump(vault.layout, staged_name, private, rules.reserve_bytes, rules.limit_bytes, progress)
        progress.step("seal.copied")
        inspection = rules.inspect(LocalFile(private.fd))
        if inspection.defects:
            raise IntegrityError("the dump is not whole: " + "; ".join(inspection.defects[:5]), "make it again")
        progress.step("seal.inspected")
        distinct = _without_repetition(request, tiers, rules)
        manifests_of_tiers = _describe(vault, request, distinct, inspection, rules, again)
        backups = [
            _Named(
                manifest,
                (_dump_part(manifest, private, incoming, number, stack), *_sidecars(manifest, incoming, stack)),
            )
            for number, manifest in enumerate(manifests_of_tiers)
        ]
        for part in (part for backup in backups for part in backup.parts):
            os.fsync(part.file.fd)
        progress.step("seal.synced")
        _publish(vault, request.id, backups, progress)
    return tuple(SealedBackup(backup.manifest, directory_of(backup.manifest)) for backup in backups)


def directory_of(manifest: Manifest) -> str:
    """The directory below ``active/``: globals of all tiers share one."""
    return names.GLOBALS_DIRECTORY if manifest.kind == "globals" else manifest.type.value


def _without_repetition(request: Request, tiers: Sequence[Tier], rules: Rules) -> list[Tier]:
    """Globals of all tiers share a directory: one name there, kept as long as the longest tier asks."""
    distinct = list(dict.fromkeys(tiers))
    if request.kind != "globals":
        return distinct
    return [max(distinct, key=lambda tier: rules.policy.days[tier] or float("inf"))]


def _describe(
    vault: Vault, request: Request, tiers: Sequence[Tier], inspection: Inspection, rules: Rules, again: bool
) -> list[Manifest]:
    contents = inspection.contents
    assert contents is not None, "an inspection without defects has read the index"
    if contents.kind != request.kind:
        raise IntegrityError(f"the dump holds {contents.kind}, the request says {request.kind}")
    sealed_at = clock.now()
    filename = _free_name(vault, request, tiers, rules)
    first = names.new_identifier(sealed_at) if again else request.id
    identifiers = [first, *(names.new_identifier(sealed_at) for _ in tiers[1:])]
    return [
        Manifest(
            version=manifests.VERSION,
            id=identifier,
            staged_id=request.id,
            kind=request.kind,
            filename=filename,
            timestamp=filename.split(".")[0],
            type=tier,
            database=request.database,
            size_bytes=inspection.size_bytes,
            sha256=inspection.sha256,
            created_at=request.created_at,
            sealed_at=sealed_at,
            retain_until=retention.retain_until(rules.policy, tier, sealed_at),
            immutable=vault.protection == "chattr",
            protection=vault.protection,
            system_identifier=request.system_identifier,
            server_version=request.server_version,
            dump_version=request.dump_version,
            pgkeep_version=__version__,
            dump_seconds=round(request.dump_seconds, 3),
            facts=request.facts,
            tables=contents.tables,
            large_objects=contents.large_objects,
            raw_bytes=contents.raw_bytes,
            notes=request.notes,
        )
        for identifier, tier in zip(identifiers, tiers, strict=True)
    ]


def _free_name(vault: Vault, request: Request, tiers: Sequence[Tier], rules: Rules) -> str:
    """Named by the dump's moment; a name that is taken is never touched, the next second free in every tier is.

    The agent's moment is believed only where it is plausible by the vault's clock.
    """
    directories = [names.GLOBALS_DIRECTORY] if request.kind == "globals" else [tier.value for tier in tiers]
    is_named = (rules.named_by_database or request.is_one_of_several) and request.kind == "database"
    database = request.database if is_named else None
    now = clock.now()
    moment = request.created_at if now - PLAUSIBLE_AGE <= request.created_at <= now else now
    while True:
        name = names.dump_name(moment, database)
        if len(name + names.SIGNATURE_SUFFIX) > NAME_LIMIT_BYTES:
            raise FormatError(f"the database's name is too long for a file's: {name[:80]}…")
        if not any(_is_taken(vault, directory, name) for directory in directories):
            return name
        moment += dt.timedelta(seconds=1)


def _is_taken(vault: Vault, directory: str, name: str) -> bool:
    path = vault.directory(directory) / name
    return path.exists() or path.with_name(name + names.MANIFEST_SUFFIX).exists()


def _dump_part(
    manifest: Manifest, private: durable.NewFile, incoming: int, number: int, stack: contextlib.ExitStack
) -> _Part:
    """The one file itself, or a copy for each further name where a file can't have several."""
    if number == 0 or private.is_unnamed:
        return _Part(manifest.filename, private)
    copy = stack.enter_context(durable.NewFile.create(incoming, incoming, receive.DUMP_MODE))
    with durable.explain(fsflags.path_of(incoming), "copying the dump for a further tier"):
        for offset in range(0, manifest.size_bytes, receive.COPY_STEP_BYTES):
            durable.copy_range(private.fd, offset, copy.fd, min(receive.COPY_STEP_BYTES, manifest.size_bytes - offset))
        os.fchmod(copy.fd, receive.DUMP_MODE)
    return _Part(manifest.filename, copy)


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


def _publish(vault: Vault, identifier: str, backups: Sequence[_Named], progress: Progress) -> None:
    entry = journal.Entry(id=identifier, action="seal", places=tuple(backup.place for backup in backups))
    try:
        journal.write(vault.layout.journal, entry)
        progress.step("seal.journal-written")
        with contextlib.ExitStack() as stack:
            directories = [_unlocked(vault, place, stack) for place in entry.places]
            progress.step("seal.directory-opened")
            for backup, descriptor in zip(backups, directories, strict=True):
                _link(backup, descriptor, progress)
            for place, descriptor in zip(entry.places, directories, strict=True):
                settle.finish(vault, descriptor, place, progress)
        progress.step("seal.directory-closed")
        for backup in backups:
            settle.record_sealed(vault, backup.place, backup.manifest)
        progress.step("seal.audited")
        journal.close(vault.layout.journal, entry)
        progress.step("seal.journal-closed")
    except BaseException:
        _settle(vault, entry, progress)
        raise


def _unlocked(vault: Vault, place: Place, stack: contextlib.ExitStack) -> int:
    directory = vault.directory(place.directory)
    stack.enter_context(durable.explain(directory, "sealing the backup"))
    return stack.enter_context(vault.unlocked(directory))


def _link(backup: _Named, directory: int, progress: Progress) -> None:
    for part in backup.parts:
        part.file.publish(directory, part.name)
        progress.step(f"seal.linked{part.name.removeprefix(backup.manifest.filename) or '-dump'}")


def _settle(vault: Vault, entry: journal.Entry, progress: Progress) -> None:
    """Undo or finish at once; what goes wrong in that must not hide why it came to it."""
    try:
        if settle.undo_or_finish(vault, entry, progress):
            named = ", ".join(f"{place.directory}/{place.filename}" for place in entry.places)
            progress.warn(f"{named}: whole and sealed all the same, as far as it came")
    except PgkeepError as error:
        progress.warn(f"the next run will clear up what is left of {entry.id}: {error.message}")
