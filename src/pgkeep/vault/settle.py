"""Bring what the journal names to its end: a sealing finished or undone, name by name; a removal finished."""

from __future__ import annotations

import contextlib
import os

from pgkeep.adapters import durable, fsflags
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.domain.manifest import Manifest
from pgkeep.errors import IntegrityError
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, journal
from pgkeep.vault.journal import Place
from pgkeep.vault.layout import SEALED_DIRECTORIES, Vault


def finish(vault: Vault, directory: int, place: Place, progress: Progress) -> None:
    """Protect every name of a committed backup. Idempotent."""
    for name, inode in place.inodes.items():
        protect(vault, directory, name, inode)
        progress.step(f"seal.protected{name.removeprefix(place.filename) or '-dump'}")
    os.fsync(directory)


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


def undo_or_finish(vault: Vault, entry: journal.Entry, progress: Progress) -> bool:
    """After a failure or a crash: True if any manifest was there; its backup is whole now, everything else is gone.

    What is undone goes first: it may share its dump with a name that stays, which is protected last.
    """
    committed = [place for place in entry.places if _is_committed(vault, place)]
    for place in entry.places:
        if place not in committed:
            _undo(vault, entry, place)
    for place in committed:
        _finish_after_crash(vault, place, progress)
    progress.step("seal.settled")
    journal.close(vault.layout.journal, entry)
    return bool(committed)


def record_sealed(vault: Vault, place: Place, manifest: Manifest) -> None:
    audit_log.record(
        vault,
        "sealed",
        id=manifest.id,
        path=f"{place.directory}/{place.filename}",
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        protection=manifest.protection,
        retain_until=manifest.retain_until,
    )


def remove_names(vault: Vault, directory: int, place: Place) -> None:
    """Unlink those names of the place that still are the inodes it speaks of, the manifest first.

    A dump that has names in other tiers too gets its flag back at once.
    """
    for name in reversed(place.inodes):
        if is_ours(directory, name, place):
            descriptor = durable.open_beneath(directory, name)
            try:
                with contextlib.suppress(fsflags.UnsupportedFlagsError):
                    fsflags.set_flag(descriptor, fsflags.IMMUTABLE, False)
                os.unlink(name, dir_fd=directory)
                if vault.protection == "chattr" and os.fstat(descriptor).st_nlink:
                    fsflags.set_flag(descriptor, fsflags.IMMUTABLE, True)
            finally:
                os.close(descriptor)
    os.fsync(directory)


def protect_again(vault: Vault, place: Place) -> None:
    """After a crash in the middle of a removal: the other names of the same dump get their flag back."""
    if vault.protection != "chattr":
        return
    inodes = set(place.inodes.values())
    for directory in map(vault.directory, SEALED_DIRECTORIES):
        for entry in os.scandir(directory):
            if entry.inode() in inodes and entry.is_file(follow_symlinks=False):
                fsflags.set_path_flag(directory / entry.name, fsflags.IMMUTABLE, True)


def is_ours(directory: int, name: str, place: Place) -> bool:
    """Is the name still the inode that the journal speaks of?"""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino == place.inodes[name]
    except FileNotFoundError:
        return False


def _is_committed(vault: Vault, place: Place) -> bool:
    with fsflags.opened(vault.directory(place.directory)) as descriptor:
        return is_ours(descriptor, place.filename + names.MANIFEST_SUFFIX, place)


def _undo(vault: Vault, entry: journal.Entry, place: Place) -> None:
    directory = vault.directory(place.directory)
    with durable.explain(directory, "clearing up after a failure"), vault.unlocked(directory) as descriptor:
        remove_names(vault, descriptor, place)
    audit_log.record(vault, "sealing undone", id=entry.id, path=f"{place.directory}/{place.filename}")


def _finish_after_crash(vault: Vault, place: Place, progress: Progress) -> None:
    directory = vault.directory(place.directory)
    with durable.explain(directory, "clearing up after a failure"), vault.unlocked(directory) as descriptor:
        finish(vault, descriptor, place, progress)
    manifest = manifests.decode((directory / (place.filename + names.MANIFEST_SUFFIX)).read_bytes())
    if not audit_log.holds(vault, "sealed", manifest.id):
        record_sealed(vault, place, manifest)
