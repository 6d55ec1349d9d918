"""What lies in the vault: read the catalog, recover after a crash, put strangers aside."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from pgkeep.adapters import clock, durable, fsflags
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.domain.catalog import SealedBackup
from pgkeep.errors import FormatError, NotFoundError, StorageError
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, expire, journal, settle
from pgkeep.vault.layout import SEALED_DIRECTORIES, Layout, Vault

# NAME_MAX of every Linux filesystem.
_NAME_BYTES = 255


@dataclasses.dataclass(frozen=True, slots=True)
class Catalog:
    """Every sealed backup, and what could not be read as one, in words."""

    backups: tuple[SealedBackup, ...]
    defects: tuple[str, ...]


def read_catalog(layout: Layout, decode: Callable[[bytes], manifests.Manifest] = manifests.decode) -> Catalog:
    """Read every manifest. Raises ``NotFoundError`` where there is no vault."""
    if not layout.exists:
        raise NotFoundError(f"there is no vault under {layout.root}", "`pgkeep backup` makes it; or set PGKEEP_ROOT")
    backups: list[SealedBackup] = []
    defects: list[str] = []
    for directory in SEALED_DIRECTORIES:
        for path in sorted((layout.active / directory).glob("*" + names.MANIFEST_SUFFIX)):
            try:
                backups.append(_read(path, decode))
            except (FormatError, StorageError, NotFoundError, OSError) as error:
                defects.append(f"{directory}/{path.name}: {error}")
    return Catalog(tuple(backups), tuple(defects))


def _read(path: Path, decode: Callable[[bytes], manifests.Manifest]) -> SealedBackup:
    manifest = decode(read_sidecar(path, manifests.SIZE_LIMIT_BYTES))
    if manifest.filename + names.MANIFEST_SUFFIX != path.name or "/" in manifest.filename:
        raise FormatError(f"it names another file: {manifest.filename!r}")
    missing = tuple(_missing(path.parent / manifest.filename, manifest))
    if missing:
        return SealedBackup(manifest, path.parent.name, "incomplete", missing)
    bare = tuple(_unprotected(path.parent / manifest.filename, path, manifest))
    return SealedBackup(manifest, path.parent.name, "unprotected" if bare else "sealed", bare)


def _missing(dump: Path, manifest: manifests.Manifest) -> Iterator[str]:
    if dump.is_symlink() or (dump.exists() and not dump.is_file()):
        yield "the dump is not a regular file"
    elif not dump.is_file():
        yield "the dump is missing"
    elif dump.stat().st_size != manifest.size_bytes:
        yield f"the dump has {dump.stat().st_size} bytes, the manifest says {manifest.size_bytes}"
    checksum = dump.with_name(dump.name + names.CHECKSUM_SUFFIX)
    if checksum.is_symlink() or not checksum.is_file():
        yield "the checksum file is missing or not a regular file"


def _unprotected(dump: Path, manifest_path: Path, manifest: manifests.Manifest) -> Iterator[str]:
    for path in (dump, dump.with_name(dump.name + names.CHECKSUM_SUFFIX), manifest_path):
        if manifest.protection == "chattr" and _flag_is_missing(path):
            yield f"{path.name} has lost its immutable flag"
        if manifest.protection != "none" and path.stat().st_mode & 0o222:
            yield f"{path.name} has become writable"


def _flag_is_missing(path: Path) -> bool:
    """False where we may not look: the dump is closed to those who only list."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        return False
    try:
        return not fsflags.has_flag(descriptor, fsflags.IMMUTABLE)
    except fsflags.UnsupportedFlagsError:
        return True
    finally:
        os.close(descriptor)


def recover(vault: Vault, progress: Progress) -> None:
    """Finish or undo what a crash left, close every directory again, and put strangers aside. Idempotent."""
    for entry in list(journal.pending(vault.layout.journal)):
        if entry.action == "expire":
            expire.finish_removal(vault, entry, progress)
            outcome = "its removal was finished"
        elif settle.undo_or_finish(vault, entry, progress):
            outcome = "it is whole and sealed"
        else:
            outcome = "it was undone"
        progress.warn(f"a run before this one was cut off while it worked on {entry.id}: {outcome}")
    for path in (*vault.layout.incoming.iterdir(), *vault.layout.journal.iterdir()):
        if durable.is_temporary(path.name):
            path.unlink()
    for directory in SEALED_DIRECTORIES:
        for name in _strangers(vault.directory(directory)):
            _put_aside(vault, vault.directory(directory), name)
            progress.warn(f"{directory}/{name} belongs to no backup and was moved to {vault.layout.quarantine}")
    vault.close_directories()


def _strangers(directory: Path) -> list[str]:
    present = {path.name for path in directory.iterdir()}
    backups = {name.removesuffix(names.MANIFEST_SUFFIX) for name in present if name.endswith(names.MANIFEST_SUFFIX)}
    known = {backup + suffix for backup in backups for suffix in ("", *names.SIDECAR_SUFFIXES)}
    return sorted(present - known)


def _put_aside(vault: Vault, directory: Path, name: str) -> None:
    moment = clock.now().strftime("%Y%m%dT%H%M%S.%fZ")
    target = vault.layout.quarantine / os.fsdecode(os.fsencode(f"{moment}-{directory.name}-{name}")[:_NAME_BYTES])
    with durable.explain(directory / name, "moving it to quarantine"), vault.unlocked(directory):
        if vault.protection == "chattr" and stat.S_IFMT(os.lstat(directory / name).st_mode) in (
            stat.S_IFREG,
            stat.S_IFDIR,
        ):
            for flag in (fsflags.IMMUTABLE, fsflags.APPEND):
                fsflags.set_path_flag(directory / name, flag, False)
        (directory / name).rename(target)
    audit_log.record(vault, "quarantined", path=f"{directory.name}/{_utf8(name)}", moved_to=_utf8(target.name))


def _utf8(name: str) -> str:
    """A file name may hold any bytes; a record holds text."""
    return name.encode(errors="backslashreplace").decode()
