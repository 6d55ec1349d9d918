"""What is about to be done to the vault, written down before: after a crash exactly that is finished or undone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from pgkeep.adapters import durable
from pgkeep.domain import names
from pgkeep.errors import FormatError
from pgkeep.vault.layout import SEALED_DIRECTORIES

_SUFFIX = ".json"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A backup under one tier's name.

    ``inodes`` by file name, the manifest last: a name with another inode is not ours to touch.
    """

    directory: str
    filename: str
    inodes: dict[str, int]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An intent for every name that a dump is to get, or for the one that it loses."""

    id: str
    action: Literal["seal", "expire"]
    places: tuple[Place, ...]


def write(journal: Path, entry: Entry) -> None:
    """Durable on return. Raises ``StorageError``."""
    durable.write_atomically(journal, entry.id + _SUFFIX, msgspec.json.encode(entry), 0o600)


def close(journal: Path, entry: Entry) -> None:
    """The intent is carried out, or undone."""
    path = journal / (entry.id + _SUFFIX)
    with durable.explain(path, "closing the journal"):
        path.unlink(missing_ok=True)
        durable.fsync_directory(journal)


def pending(journal: Path) -> Iterator[Entry]:
    """What a crash left, oldest first. Raises ``FormatError``."""
    for path in sorted(journal.glob("*" + _SUFFIX)):
        try:
            yield _checked(msgspec.json.decode(path.read_bytes(), type=Entry))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise FormatError(
                f"the journal {path} is unreadable: {error}", "report this; nothing was changed"
            ) from error


def _checked(entry: Entry) -> Entry:
    """On its word files are removed: it may speak of one backup's files in a directory for backups only."""
    for place in entry.places:
        allowed = {place.filename + suffix for suffix in ("", *names.SIDECAR_SUFFIXES)}
        if place.directory not in SEALED_DIRECTORIES or "/" in place.filename or not place.inodes.keys() <= allowed:
            raise ValueError("it names something that is no backup's file")
    return entry
