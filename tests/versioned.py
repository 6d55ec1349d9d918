"""A destination in memory that keeps versions, as a bucket does: for what nobody would do to a real one in a second."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import msgspec

from pgkeep.adapters.destinations import Listed, Lock, Place
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.domain.artifact import LargeObjectsPart
from pgkeep.domain.manifest import Manifest
from pgkeep.errors import FormatError, NotFoundError, StorageError
from tests.attacks import forge
from tests.unit.test_manifest import EXAMPLE

DUMP = forge.build()
MOMENT = dt.datetime(2026, 3, 1, 23, 59, 59, tzinfo=dt.UTC)


@dataclasses.dataclass(frozen=True)
class Version:
    name: str
    data: bytes


@dataclasses.dataclass
class InMemory:
    """The reading half of a place. ``broken``: paths that can't be read; ``locks``: by path."""

    kept: dict[str, list[Version]] = dataclasses.field(default_factory=dict)
    broken: set[str] = dataclasses.field(default_factory=set)
    locks: dict[str, Lock] = dataclasses.field(default_factory=dict)
    read_paths: list[str] = dataclasses.field(default_factory=list)
    given_bytes: int = 0
    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    @property
    def place(self) -> Place:
        return cast(Place, self)

    def put(self, path: str, data: bytes) -> str:
        name = f"v{next(self._numbers)}"
        self.kept.setdefault(path, []).append(Version(name, data))
        return name

    def files(self, folders: Iterable[str]) -> Iterator[Listed]:
        for path in sorted(self.kept):
            if any(path.startswith(f"{folder}/") for folder in folders):
                for version in self.kept[path]:
                    yield Listed(path, len(version.data), version.name)

    def read(self, path: str, limit_bytes: int, version: str = "") -> bytes:
        self.read_paths.append(path)
        data = self._find(path, version)
        if len(data) > limit_bytes:
            raise FormatError(f"{path} is larger than {limit_bytes} bytes")
        return data

    @contextlib.contextmanager
    def opened_file(self, path: str, version: str = "") -> Iterator[Any]:
        yield _Remote(self, self._find(path, version))

    def lock(self, path: str, version: str = "") -> Lock | None:
        return self.locks.get(path)

    def _find(self, path: str, version: str) -> bytes:
        if path in self.broken:
            raise StorageError(f"{path} can't be read")
        found = [each for each in self.kept.get(path, []) if version in ("", each.name)]
        if not found:
            raise NotFoundError(f"{path} is not there")
        return found[-1].data


class _Remote:
    def __init__(self, owner: InMemory, data: bytes) -> None:
        self._owner = owner
        self._data = data
        self.size_bytes = len(data)

    def read(self, offset: int, length: int) -> bytes:
        found = self._data[offset : offset + length]
        self._owner.given_bytes += len(found)
        return found


def manifest_of(dump: bytes, moment: dt.datetime = MOMENT, **fields: Any) -> Manifest:
    """A manifest that tells the truth about this dump, but for ``fields``."""
    from pgkeep.adapters.artifact_reader import ArtifactReader, statistics

    index = ArtifactReader(_Remote(InMemory(), dump)).index
    values: dict[str, Any] = {
        "id": f"{moment:%Y%m%dT%H%M%SZ}-{hashlib.sha256(dump).hexdigest()[:6]}",
        "kind": "database",
        "type": names.Tier.DAILY,
        "filename": names.dump_name(moment, None),
        "timestamp": names.format_timestamp(moment),
        "database": "app",
        "created_at": moment,
        "sealed_at": moment,
        "findings": (),
        "recipients": (),
        "size_bytes": len(dump),
        "sha256": hashlib.sha256(dump).hexdigest(),
        "tables": statistics(index),
        "large_objects": sum(part.objects for part in index.parts if isinstance(part, LargeObjectsPart)),
        "raw_bytes": sum(part.raw_bytes for part in index.parts),
        **fields,
    }
    return msgspec.structs.replace(EXAMPLE, **values)


def path_of(manifest: Manifest) -> str:
    directory = names.GLOBALS_DIRECTORY if manifest.kind == "globals" else manifest.type.value
    return f"{directory}/{manifest.filename[:10]}/{manifest.filename}"


def put_backup(place: InMemory, dump: bytes = DUMP, moment: dt.datetime = MOMENT, **fields: Any) -> Manifest:
    """All of a copy, as the extractor makes it."""
    manifest = manifest_of(dump, moment, **fields)
    path = path_of(manifest)
    place.put(path, dump)
    place.put(path + names.CHECKSUM_SUFFIX, f"{manifest.sha256}  {manifest.filename}\n".encode())
    place.put(path + names.MANIFEST_SUFFIX, manifests.encode(manifest))
    return manifest
