"""Bring a backup here from a destination: whole, under its plain names; or only what a restore reads of it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pgkeep.adapters import durable
from pgkeep.adapters.artifact_reader import ArtifactReader, statistics
from pgkeep.adapters.destinations import Listed, Place, RemoteFile
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.domain.artifact import Index, LargeObjectsPart
from pgkeep.domain.manifest import Manifest
from pgkeep.errors import BusyError, FormatError, IntegrityError, NotFoundError, RefusedError, StorageError
from pgkeep.progress import Progress
from pgkeep.restore.copies import VERSIONS_READ, Copy, checksum_text, decoded
from pgkeep.restore.download import PIECE_BYTES, in_order
from pgkeep.restore.sparse import SparseCopy, sparse_copy

CHECKSUM_LIMIT_BYTES: Final = 4096
_SIGNATURE_LIMIT_BYTES: Final = 64 * 1024
# The dump holds the database's secrets; what describes it does not.
_DUMP_MODE: Final = 0o600
_SIDECAR_MODE: Final = 0o644
_ELSEWHERE_HINT: Final = "use another destination's copy, or an older backup"


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """What lies in the directory now. ``fetched_bytes`` is what came over the wire: none if it was there already."""

    path: Path
    files: tuple[Path, ...]
    fetched_bytes: int


@contextlib.contextmanager
def opened(place: Place, copy: Copy, scratch: Path, progress: Progress) -> Iterator[SparseCopy]:
    """The dump, for reading parts of it: the oldest version that is what the manifest says, as far as its index tells.

    An encrypted one can't be read in parts: all of it is fetched. Raises ``IntegrityError`` where no version fits,
    ``StorageError``, ``RefusedError`` (no room in ``scratch``).
    """
    reasons: list[str] = []
    for dump in copy.dumps[:VERSIONS_READ]:
        with contextlib.ExitStack() as stack:
            try:
                remote = stack.enter_context(place.opened_file(dump.path, dump.version))
                file = stack.enter_context(sparse_copy(remote, scratch, progress))
                require_fitting(file, copy.backup.manifest, progress)
            except (FormatError, NotFoundError, IntegrityError) as error:
                reasons.append(error.message)
                progress.warn(f"{_named(dump)} is not the dump that its manifest describes: {error.message}")
                continue
            yield file
            return
    raise _unfit(copy, reasons)


def require_fitting(file: SparseCopy, manifest: Manifest, progress: Progress) -> None:
    """Is it this manifest's dump? By its index; by its digest where that is encrypted.

    Raises ``FormatError``, ``IntegrityError``, ``StorageError``.
    """
    if file.size_bytes != manifest.size_bytes:
        raise IntegrityError(f"it has {file.size_bytes} bytes, the manifest says {manifest.size_bytes}")
    if manifest.recipients:
        progress.note("the backup is encrypted: all of it is fetched")
        file.prefetch([(0, file.size_bytes)])
        if _digest_of(file.descriptor, file.size_bytes) != manifest.sha256:
            raise IntegrityError("its digest differs from the manifest's")
        return
    differing = list(contradictions(ArtifactReader(file).index, manifest))
    if differing:
        raise IntegrityError("; ".join(differing))


def contradictions(index: Index, manifest: Manifest) -> Iterator[str]:
    """Where a dump's index is not what the manifest says of it."""
    found: dict[str, object] = {
        "kind": index.header.content,
        "tables": statistics(index),
        "large_objects": sum(part.objects for part in index.parts if isinstance(part, LargeObjectsPart)),
        "raw_bytes": sum(part.raw_bytes for part in index.parts),
    }
    for name, value in found.items():
        if getattr(manifest, name) != value:
            yield f"the manifest's {name} differs from the file"


def fetch(place: Place, copy: Copy, directory: Path, progress: Progress) -> Fetched:
    """Put dump and sidecars into ``directory``, each whole or not at all, the manifest last.

    An interrupted one is taken up where it broke off. What is there already and equal stays. Raises ``RefusedError``
    (another file has such a name), ``IntegrityError``, ``StorageError``, ``BusyError``.
    """
    with durable.explain(directory, "making the directory"):
        directory.mkdir(parents=True, exist_ok=True)
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sidecars = read_sidecars(place, copy, progress)
        path = directory / copy.backup.manifest.filename
        missing = {suffix: data for suffix, data in sidecars.items() if not _is_there(path, suffix, data)}
        fetched_bytes = _fetch_dump(place, copy, directory, directory_fd, progress)
        progress.step("fetch.dump-published")
        for suffix, data in missing.items():
            write_sidecar(directory_fd, path.name + suffix, data)
        progress.step("fetch.published")
    finally:
        os.close(directory_fd)
    return Fetched(path, (path, *(path.with_name(path.name + suffix) for suffix in sidecars)), fetched_bytes)


def read_sidecars(place: Place, copy: Copy, progress: Progress) -> dict[str, bytes]:
    """By suffix, in the order in which they are to appear. Raises ``IntegrityError``, ``StorageError``."""
    manifest = copy.backup.manifest
    found = {names.CHECKSUM_SUFFIX: checksum_text(manifest)}
    if not has_checksum(place, copy):
        progress.warn(f"{copy.path}{names.CHECKSUM_SUFFIX} is missing there, or wrong; written from the manifest")
    for signature in copy.signatures[:1]:
        found[names.SIGNATURE_SUFFIX] = place.read(signature.path, _SIGNATURE_LIMIT_BYTES, signature.version)
    data = place.read(copy.manifest.path, manifests.SIZE_LIMIT_BYTES, copy.manifest.version)
    if decoded(data, copy.manifest.path) != manifest:
        raise IntegrityError(f"{copy.manifest.path} was changed just now", "try again; somebody else writes there")
    return {**found, names.MANIFEST_SUFFIX: data}


def has_checksum(place: Place, copy: Copy) -> bool:
    """Does a version of the checksum file say what the manifest says?"""
    expected = checksum_text(copy.backup.manifest)
    candidates = [each for each in copy.checksums if each.size_bytes == len(expected)]
    for listed in candidates[:VERSIONS_READ]:
        with contextlib.suppress(NotFoundError, FormatError):
            if place.read(listed.path, CHECKSUM_LIMIT_BYTES, listed.version) == expected:
                return True
    return False


def write_sidecar(directory_fd: int, name: str, data: bytes) -> None:
    """Never overwrites. Raises ``RefusedError``, ``StorageError``."""
    with durable.NewFile.create(directory_fd, directory_fd, _SIDECAR_MODE) as new:
        with durable.explain(name, "writing the file"):
            durable.write_all(new.fd, data)
        new.publish(directory_fd, name)


def download(remote: RemoteFile, target: int, start: int, progress: Progress) -> str:
    """Write all from ``start`` on to an open file that holds what is before. The digest of the whole, read and written.

    Raises ``IntegrityError``, ``StorageError``, ``OSError``.
    """
    digest = hashlib.sha256()
    for block in _blocks(target, start):
        digest.update(block)
    os.lseek(target, start, os.SEEK_SET)
    done_bytes = start
    for data in in_order(remote, start, remote.size_bytes):
        digest.update(data)
        durable.write_all(target, data)
        done_bytes += len(data)
        progress.advance(done_bytes, remote.size_bytes)
    return digest.hexdigest()


def _fetch_dump(place: Place, copy: Copy, directory: Path, directory_fd: int, progress: Progress) -> int:
    """How many bytes had to be fetched."""
    manifest = copy.backup.manifest
    path = directory / manifest.filename
    if _is_same_dump(path, manifest):
        progress.note(f"{path} is there already, and whole")
        return 0
    partial = f"{durable.TEMPORARY_PREFIX}{manifest.sha256[:32]}"
    with durable.explain(path, "fetching"), _own_partial(directory_fd, partial) as descriptor:
        fetched_bytes = _fill(place, copy, descriptor, directory, progress)
        os.fchmod(descriptor, _DUMP_MODE)
        # Not discarded on the way out: what is there of it is where the next attempt begins.
        durable.NewFile(descriptor, partial, directory_fd).publish(directory_fd, manifest.filename)
    return fetched_bytes


@contextlib.contextmanager
def _own_partial(directory_fd: int, name: str) -> Iterator[int]:
    """A file that an attempt before this one may have begun; it goes where it can't become the dump.

    Raises ``BusyError``, ``OSError``.
    """
    descriptor = _open_partial(directory_fd, name)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                "another process is fetching the same backup there", "wait until it has finished"
            ) from error
        try:
            yield descriptor
        except IntegrityError:
            os.unlink(name, dir_fd=directory_fd)
            raise
    finally:
        os.close(descriptor)


def _open_partial(directory_fd: int, name: str) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory_fd)
    except FileNotFoundError:
        pass
    except OSError:  # a link, somebody else's, no file
        os.unlink(name, dir_fd=directory_fd)
    else:
        facts = os.fstat(descriptor)
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 and facts.st_uid == os.geteuid():
            return descriptor
        # Whoever owns it could change it after it was checked.
        os.close(descriptor)
        os.unlink(name, dir_fd=directory_fd)
    return os.open(name, flags | os.O_CREAT | os.O_EXCL, _DUMP_MODE, dir_fd=directory_fd)


def _fill(place: Place, copy: Copy, descriptor: int, directory: Path, progress: Progress) -> int:
    manifest = copy.backup.manifest
    fetched_bytes = 0
    reasons: list[str] = []
    held_bytes = min(os.fstat(descriptor).st_size, manifest.size_bytes)
    begun = held_bytes - held_bytes % PIECE_BYTES
    _require_room(directory, manifest.size_bytes - begun)
    for dump in copy.dumps[:VERSIONS_READ]:
        # What was begun may be of another version, or torn by a power cut: from the beginning then.
        for start in (begun, 0) if begun else (0,):
            os.ftruncate(descriptor, start)
            try:
                with place.opened_file(dump.path, dump.version) as remote:
                    _require_size(remote, manifest)
                    fetched_bytes += manifest.size_bytes - start
                    if start:
                        progress.note(f"going on at byte {start}")
                    progress.step("fetch.begun")
                    if download(remote, descriptor, start, progress) == manifest.sha256:
                        return fetched_bytes
                reasons.append("its digest differs from the manifest's")
            except (FormatError, NotFoundError, IntegrityError) as error:
                reasons.append(error.message)
        begun = 0
        progress.warn(f"{_named(dump)} is not the dump that its manifest describes: {reasons[-1]}")
    os.ftruncate(descriptor, 0)
    raise _unfit(copy, reasons)


def _require_size(remote: RemoteFile, manifest: Manifest) -> None:
    if remote.size_bytes != manifest.size_bytes:
        raise IntegrityError(f"it has {remote.size_bytes} bytes, the manifest says {manifest.size_bytes}")


def _require_room(directory: Path, needed_bytes: int) -> None:
    free_bytes = durable.free_bytes(directory)
    if needed_bytes > free_bytes:
        raise StorageError(
            f"{directory} has {free_bytes} bytes free; the dump needs {needed_bytes}", "fetch it to a roomier disk"
        )


def _is_same_dump(path: Path, manifest: Manifest) -> bool:
    """Raises ``RefusedError`` where something else stands there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _in_the_way(path) from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != manifest.size_bytes:
            raise _in_the_way(path)
        if _digest_of(descriptor, facts.st_size) != manifest.sha256:
            raise _in_the_way(path)
        return True
    finally:
        os.close(descriptor)


def _is_there(path: Path, suffix: str, data: bytes) -> bool:
    sidecar = path.with_name(path.name + suffix)
    try:
        if read_sidecar(sidecar, len(data)) != data:
            raise _in_the_way(sidecar)
    except NotFoundError:
        return False
    except FormatError as error:
        raise _in_the_way(sidecar) from error
    return True


def _in_the_way(path: Path) -> RefusedError:
    return RefusedError(f"{path} exists, is something else, and is never overwritten", "fetch into another directory")


def _digest_of(descriptor: int, size_bytes: int) -> str:
    digest = hashlib.sha256()
    for block in _blocks(descriptor, size_bytes):
        digest.update(block)
    return digest.hexdigest()


def _blocks(descriptor: int, size_bytes: int) -> Iterator[bytes]:
    offset = 0
    while offset < size_bytes and (block := os.pread(descriptor, min(size_bytes - offset, 1024 * 1024), offset)):
        offset += len(block)
        yield block


def _named(dump: Listed) -> str:
    return f"{dump.path} (version {dump.version})" if dump.version else dump.path


def _unfit(copy: Copy, reasons: list[str]) -> IntegrityError:
    if not copy.dumps:
        why = f"its size is {copy.others[0].size_bytes} bytes" if copy.others else "it is missing"
        return IntegrityError(f"the dump {copy.path} can't be had: {why}", _ELSEWHERE_HINT)
    return IntegrityError(f"the dump {copy.path} is not what its manifest says: {reasons[0]}", _ELSEWHERE_HINT)
