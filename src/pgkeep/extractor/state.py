"""What the extractor remembers: its destination, every copy there, and what it has reported. All of it can be lost.

Below ``extracted/<name of the destination>/``: ``memory.json``, and ``<its id>/<tier>/<dump>.json``, a copy each.
Without it, copies that are whole are recognised again by their digests.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from pgkeep.adapters import durable
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import names
from pgkeep.domain.manifest import Moment
from pgkeep.errors import FormatError, NotFoundError, RefusedError
from pgkeep.extractor import anchors
from pgkeep.extractor.plan import Record, path_outside
from pgkeep.progress import Progress

_MEMORY_NAME: Final = "memory.json"
_MEMORY_LIMIT_BYTES: Final = 64 * 1024 * 1024
_RECORD_LIMIT_BYTES: Final = 64 * 1024
_FORMAT: Final = 1
# The same trouble is told of again after so long.
REPEAT_AFTER: Final = dt.timedelta(days=1)
_IDENTIFIER = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """The file at a destination that tells it from all others, and from an empty mount point."""

    format: int
    id: str
    vault: str
    made_at: Moment


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """Trouble that is in the audit log already. ``lasting``: it is of a kind that another try won't end."""

    message: str
    time: Moment
    hint: str = ""
    lasting: Literal["", "bad", "refused"] = ""


class Memory(msgspec.Struct, kw_only=True):
    """What is remembered beside the copies. ``rechecked_until``: see :func:`pgkeep.extractor.plan.to_recheck`.

    ``failing_since``: the first pass that went wrong of those that did without a good one since.
    """

    format: int = _FORMAT
    destination: str | None = None
    rechecked_until: Moment | None = None
    failing_since: Moment | None = None
    anchors: anchors.Memory = anchors.Memory()
    told: dict[str, Told] = {}

    def is_news(self, key: str, message: str, now: dt.datetime) -> bool:
        """Is it worth a record: new, changed in more than its figures, or told of long ago?"""
        before = self.told.get(key)
        if before is None or _without_figures(before.message) != _without_figures(message):
            return True
        return not now - REPEAT_AFTER < before.time <= now

    def copied(self) -> Memory:
        """As it is now, to compare with later."""
        return msgspec.structs.replace(self, told=dict(self.told))


# Made here, by one thread: msgspec 0.22 crashes where several threads are the first to decode a type.
_MARKER_DECODER: Final = msgspec.json.Decoder(Marker)
_MEMORY_DECODER: Final = msgspec.json.Decoder(Memory)
_RECORD_DECODER: Final = msgspec.json.Decoder(Record)


def encode_marker(marker: Marker) -> bytes:
    return msgspec.json.encode(marker) + b"\n"


def decode_marker(data: bytes) -> Marker:
    """Raises ``FormatError``, ``RefusedError`` (a newer pgkeep's)."""
    try:
        marker = _MARKER_DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the destination's marker is malformed: {error}") from error
    if marker.format > _FORMAT:
        raise RefusedError(f"the destination has format {marker.format}, known here is {_FORMAT}", "use a newer pgkeep")
    if _IDENTIFIER.fullmatch(marker.id) is None:
        raise FormatError(f"the destination's marker is malformed: its id is {marker.id!r}")
    return marker


class State:
    """The files below one directory. To be used under the extractor's lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[str, Record] = {}
        self._seen: tuple[object, ...] = ()

    def load_memory(self, progress: Progress) -> Memory:
        """Raises ``StorageError``, ``RefusedError`` (a newer pgkeep wrote it)."""
        try:
            memory = _MEMORY_DECODER.decode(read_sidecar(self._directory / _MEMORY_NAME, _MEMORY_LIMIT_BYTES))
        except NotFoundError:
            return Memory(told={})
        except (FormatError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            progress.warn(f"what the extractor remembered is unreadable, and will be found out anew: {error}")
            return Memory(told={})
        if memory.format > _FORMAT:
            raise RefusedError(f"a newer pgkeep has written {self._directory}", "use a newer pgkeep")
        return memory

    def save_memory(self, memory: Memory) -> None:
        """Raises ``StorageError``."""
        self._make(self._directory)
        durable.write_atomically(self._directory, _MEMORY_NAME, msgspec.json.encode(memory) + b"\n", 0o600)

    def records(self, destination: str, progress: Progress) -> dict[str, Record]:
        """Every copy by its source's path below ``active/``; read again only if somebody else wrote since.

        The dictionary is the state's own. Raises ``StorageError``.
        """
        if self._seen != self._directories(destination):
            self._records = dict(self._read_all(destination, progress))
            self._seen = self._directories(destination)
        return self._records

    def save(self, destination: str, path: str, record: Record) -> None:
        """Raises ``StorageError``."""
        tier, _, filename = path.partition("/")
        directory = self._directory / destination / tier
        self._make(directory)
        durable.write_atomically(directory, f"{filename}.json", msgspec.json.encode(record) + b"\n", 0o600)
        self._records[path] = record
        self._seen = self._directories(destination)

    def forget(self, destination: str, path: str) -> None:
        """Raises ``StorageError``."""
        file = self._directory / destination / f"{path}.json"
        with durable.explain(file, "forgetting a copy"):
            file.unlink(missing_ok=True)
            durable.fsync_directory(file.parent)
        self._records.pop(path, None)
        self._seen = self._directories(destination)

    def _make(self, directory: Path) -> None:
        with durable.explain(directory, "making the extractor's directories"):
            for each in (*reversed(directory.parents), directory):
                if each.is_relative_to(self._directory.parent) and not each.is_dir():
                    each.mkdir(mode=0o700)
                    durable.fsync_directory(each.parent)

    def _directories(self, destination: str) -> tuple[object, ...]:
        """Changes whenever any process makes, replaces or removes a record."""
        base = self._directory / destination
        found: list[object] = [destination]
        with durable.explain(base, "reading what is remembered of the copies"), contextlib.suppress(FileNotFoundError):
            found += sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(base))
        return tuple(found)

    def _read_all(self, destination: str, progress: Progress) -> Iterator[tuple[str, Record]]:
        base = self._directory / destination
        with durable.explain(base, "reading what is remembered of the copies"), contextlib.suppress(FileNotFoundError):
            for tier in sorted(os.listdir(base)):
                for name in sorted(os.listdir(base / tier)):
                    if durable.is_temporary(name):
                        os.unlink(base / tier / name)
                    elif (record := _read(base / tier / name, progress)) is not None:
                        path = f"{tier}/{name.removesuffix('.json')}"
                        if _fits(path, record):
                            yield path, record
                        else:
                            progress.warn(f"{base / tier / name} speaks of another copy, and is passed over")


def _fits(path: str, record: Record) -> bool:
    """Whatever a record says, nothing but that backup's own copy is looked at, or leaves, on its word."""
    try:
        is_its_own = record.path == path_outside(path)
    except FormatError:
        return False
    return is_its_own and record.files.keys() <= {"", *names.SIDECAR_SUFFIXES} and "" in record.files


def _read(file: Path, progress: Progress) -> Record | None:
    """None for what is no record: the copy is then recognised anew."""
    try:
        return _RECORD_DECODER.decode(read_sidecar(file, _RECORD_LIMIT_BYTES))
    except (FormatError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        progress.warn(f"{file} is unreadable, and its copy will be looked at anew: {error}")
        return None


def _without_figures(text: str) -> str:
    """Free bytes and times differ on each occasion."""
    return re.sub(r"[0-9]+", "#", text)
