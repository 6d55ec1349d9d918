"""Uploads that are under way, remembered in files: a killed or interrupted one is continued, not begun again.

A file per object, named after a digest of its key: a line that says which upload, then a line for each finished part.
To be used under the extractor's lock. All of it can be lost: an upload is then begun anew.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec

from pgkeep.adapters import clock, durable
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.errors import FormatError

_FORMAT: Final = 1
_SUFFIX: Final = ".upload"
# Ten thousand parts of some 150 bytes each.
_LIMIT_BYTES: Final = 16 * 1024 * 1024


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """Which upload, of what, to where; ``started``: when."""

    format: int = _FORMAT
    label: str
    endpoint: str
    path: str
    size_bytes: int
    sha256: str
    part_size_bytes: int
    upload_id: str
    started: Annotated[dt.datetime, msgspec.Meta(tz=True)]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part that the server has. ``tag`` is its ETag, ``checksum`` its SHA-256 in base64."""

    number: int
    tag: str
    checksum: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9+/]{43}=\Z")]


# Made here, by one thread: msgspec 0.22 crashes where several threads are the first to decode a type.
_UPLOAD_DECODER: Final = msgspec.json.Decoder(Upload)
_PART_DECODER: Final = msgspec.json.Decoder(Part)


@dataclasses.dataclass(frozen=True, slots=True)
class Remembered:
    """An upload and its finished parts by number."""

    upload: Upload
    parts: dict[int, Part]


class Uploads:
    """The files in a directory; without one nothing is remembered."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def find(self, path: str) -> Remembered | None:
        """What is known of an upload to that path. Raises ``StorageError``."""
        return _read(self._file(self._directory, path)) if self._directory is not None else None

    def begin(self, upload: Upload) -> None:
        """Durably, and in the place of an older one of the same path. Raises ``StorageError``."""
        if self._directory is None:
            return
        with durable.explain(self._directory, "making the directory for unfinished uploads"):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = self._file(self._directory, upload.path).name
        durable.write_atomically(self._directory, name, msgspec.json.encode(upload) + b"\n", 0o600)

    def add(self, path: str, part: Part) -> None:
        """Not durably: a part that is forgotten is sent again. Raises ``StorageError``."""
        if self._directory is None:
            return
        file = self._file(self._directory, path)
        with durable.explain(file, "remembering a finished part"):
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                durable.write_all(descriptor, msgspec.json.encode(part) + b"\n")
            finally:
                os.close(descriptor)

    def forget(self, path: str) -> None:
        """Raises ``StorageError``."""
        if self._directory is not None:
            self._remove(self._file(self._directory, path))

    def all(self) -> Iterator[Remembered]:
        """Every one that can be read; what can't is removed. Raises ``StorageError``."""
        if self._directory is None or not self._directory.is_dir():
            return
        for file in sorted(self._directory.iterdir()):
            remembered = _read(file) if file.suffix == _SUFFIX else None
            if remembered is not None:
                yield remembered
            elif file.suffix == _SUFFIX or durable.is_temporary(file.name):
                self._remove(file)

    @staticmethod
    def _file(directory: Path, path: str) -> Path:
        return directory / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}{_SUFFIX}"

    @staticmethod
    def _remove(file: Path) -> None:
        with durable.explain(file, "forgetting an upload"):
            file.unlink(missing_ok=True)


def age(upload: Upload) -> dt.timedelta:
    return clock.now() - upload.started


def _read(file: Path) -> Remembered | None:
    """None for what is missing, or not to be understood. A last line that was cut off is left out."""
    if not file.exists():
        return None
    try:
        first, *others = read_sidecar(file, _LIMIT_BYTES).split(b"\n")[:-1] or [b""]
        upload = _UPLOAD_DECODER.decode(first)
        parts = [_PART_DECODER.decode(line) for line in others]
    except (FormatError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if upload.format != _FORMAT:
        return None
    return Remembered(upload, {part.number: part for part in parts})
