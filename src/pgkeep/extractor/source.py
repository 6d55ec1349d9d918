"""The vault as the extractor sees it: a list that costs little, and one backup at a time, open for copying."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import Content
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, StorageError
from pgkeep.extractor.plan import Origin, Signature

DIRECTORIES: Final = (*(tier.value for tier in names.Tier), names.GLOBALS_DIRECTORY)
_CHECKSUM_LIMIT_BYTES: Final = 4096
_SIGNATURE_LIMIT_BYTES: Final = 64 * 1024
_READER_HINT: Final = "the extractor's user must be in the vault's group, whose dumps are closed to others (0440)"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What of a manifest the extractor goes by; the rest is passed over unread, however long it is."""

    version: str
    id: manifests.Name
    filename: manifests.FileName
    size_bytes: manifests.Count
    sha256: manifests.Digest
    kind: manifests.Kind
    type: names.Tier
    database: str
    system_identifier: str
    created_at: manifests.Moment
    sealed_at: manifests.Moment
    retain_until: manifests.Moment | None
    findings: tuple[str, ...] = ()

    @property
    def origin(self) -> Origin:
        return Origin(
            kind=self.kind,
            type=self.type,
            database=self.database,
            system_identifier=self.system_identifier,
            created_at=self.created_at,
            sealed_at=self.sealed_at,
            retain_until=self.retain_until,
            is_doubted=bool(self.findings),
        )


# Made here, by one thread: msgspec 0.22 crashes where several threads are the first to decode a type.
_FACTS_DECODER: Final = msgspec.json.Decoder(Facts)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One of a backup's files: what follows the dump's name in its own, an open descriptor, and what it must hold."""

    suffix: str
    descriptor: int
    content: Content


@dataclasses.dataclass(frozen=True, slots=True)
class Backup:
    """An open backup. ``parts`` are in the order in which they are to appear: the dump first, the manifest last."""

    id: str
    origin: Origin
    signature: Signature
    parts: tuple[Part, ...]


def list_backups(active: Path) -> dict[str, Signature]:
    """Every dump that has a manifest, by its path below ``active/``; nothing is opened. Raises ``StorageError``."""
    found = {}
    for directory in DIRECTORIES:
        with durable.explain(active / directory, "listing the backups"):
            for entry in os.scandir(active / directory):
                if entry.name.endswith(names.MANIFEST_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # expired since
                        facts = entry.stat(follow_symlinks=False)
                        path = f"{directory}/{entry.name.removesuffix(names.MANIFEST_SUFFIX)}"
                        found[path] = _signature(facts)
    return found


def is_there(active: Path, path: str) -> bool:
    """Is it (still) a backup? The vault removes the manifest first."""
    return os.path.lexists(active / (path + names.MANIFEST_SUFFIX))


def read_facts(data: bytes) -> Facts:
    """Raises ``FormatError``."""
    try:
        facts = _FACTS_DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the manifest is malformed: {error}") from error
    if facts.version.split(".")[0] != manifests.VERSION.split(".")[0]:
        raise FormatError(f"manifest version {facts.version!r} is not known here", "use a newer pgkeep")
    return facts


@contextlib.contextmanager
def opened(active: Path, path: str) -> Iterator[Backup]:
    """All files of a backup, held open: should it expire meanwhile, the copy is whole all the same.

    Raises ``NotFoundError`` (a file is missing), ``IntegrityError`` (they don't belong together), ``StorageError``.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_explained_opening(active))
        manifest = _sidecar(directory, active, path, names.MANIFEST_SUFFIX, manifests.SIZE_LIMIT_BYTES, stack)
        facts = read_facts(manifest.data)
        if facts.filename != path.rpartition("/")[2]:
            raise IntegrityError(f"the manifest of {path} names another file: {facts.filename!r}")
        dump = _open(directory, path, stack)
        if os.fstat(dump).st_size != facts.size_bytes:
            raise IntegrityError(f"{path} has {os.fstat(dump).st_size} bytes, its manifest says {facts.size_bytes}")
        checksum = _sidecar(directory, active, path, names.CHECKSUM_SUFFIX, _CHECKSUM_LIMIT_BYTES, stack)
        if checksum.data != f"{facts.sha256}  {facts.filename}\n".encode():
            raise IntegrityError(f"{path}{names.CHECKSUM_SUFFIX} and the manifest give different digests")
        parts = [Part("", dump, Content(facts.size_bytes, facts.sha256)), checksum.part]
        with contextlib.suppress(NotFoundError):  # not every vault signs
            parts.append(_sidecar(directory, active, path, names.SIGNATURE_SUFFIX, _SIGNATURE_LIMIT_BYTES, stack).part)
        signature = _signature(os.fstat(manifest.part.descriptor))
        yield Backup(facts.id, facts.origin, signature, (*parts, manifest.part))


@dataclasses.dataclass(frozen=True, slots=True)
class _Sidecar:
    part: Part
    data: bytes


@contextlib.contextmanager
def _explained_opening(active: Path) -> Iterator[int]:
    with durable.explain(active, "opening the vault's directory"):
        descriptor = os.open(active, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sidecar(
    directory: int, active: Path, path: str, suffix: str, limit_bytes: int, stack: contextlib.ExitStack
) -> _Sidecar:
    descriptor = _open(directory, path + suffix, stack)
    with durable.explain(active / (path + suffix), "reading the file"):
        data = bytearray()
        while len(data) <= limit_bytes and (block := os.pread(descriptor, 1024 * 1024, len(data))):
            data += block
    if len(data) > limit_bytes:
        raise FormatError(f"{path}{suffix} is larger than {limit_bytes} bytes")
    return _Sidecar(Part(suffix, descriptor, Content(len(data), hashlib.sha256(data).hexdigest())), bytes(data))


def _open(directory: int, path: str, stack: contextlib.ExitStack) -> int:
    try:
        descriptor = durable.open_beneath(directory, path)
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):
            raise StorageError(error.message, _READER_HINT) from error.__cause__
        raise
    stack.callback(os.close, descriptor)
    return descriptor


def _signature(facts: os.stat_result) -> Signature:
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
