"""What lies at a destination. Its word is believed no further than it can be checked.

Whoever holds the extractor's credentials may have written there: over a manifest, over a dump, or files of their own.
Where versions are kept, the oldest of one path comes first, because it was there before anybody wrote over it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import datetime as dt
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pgkeep.adapters.destinations import NOT_A_FILE, Listed, Place
from pgkeep.domain import catalog, names
from pgkeep.domain import manifest as manifests
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.manifest import Manifest
from pgkeep.errors import FormatError, NotFoundError, PgkeepError, StorageError
from pgkeep.progress import Progress

FOLDERS: Final = (*(tier.value for tier in names.Tier), names.GLOBALS_DIRECTORY)
_SUFFIXES: Final = tuple(names.DUMP_SUFFIX + suffix for suffix in ("", *names.SIDECAR_SUFFIXES))
_PARALLEL_READS: Final = 8
# Of one path: who wrote more than these wanted to be a nuisance.
VERSIONS_READ: Final = 16
# One unreadable file is a defect; more of them mean that the destination is away.
_FAILURES_TOLERATED: Final = 4
_DAY_OF_IDENTIFIER: Final = re.compile(r"(\d{8})(T[0-9A-Za-z-]*)?", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """A backup at a destination. ``path``: the dump's there; ``manifest``: the version that says so.

    ``dumps``: the versions that have the size in the manifest, oldest first; empty where none has. ``others``: dumps
    of other sizes under that path. ``checksums``, ``signatures``: versions of these files. ``is_first``: no version of
    the manifest is older; ``latest`` and file names mean only such ones, an id means any.
    """

    backup: SealedBackup
    path: str
    manifest: Listed
    dumps: tuple[Listed, ...]
    others: tuple[Listed, ...]
    checksums: tuple[Listed, ...]
    signatures: tuple[Listed, ...]
    is_first: bool = True

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Copies:
    """Every backup that was found, the oldest first, and what could not be read as one, in words."""

    found: tuple[Copy, ...]
    defects: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    """A version of a manifest: what it says, or why it says nothing; and a digest of its bytes."""

    listed: Listed
    manifest: Manifest | None
    defect: str
    digest: str


def read_copies(place: Place, progress: Progress, folders: Iterable[str] = FOLDERS) -> Copies:
    """Read every manifest below these folders. Raises ``StorageError`` where the destination can't be read."""
    files: dict[str, list[Listed]] = {}
    for listed in place.files(folders):
        if listed.path.endswith(_SUFFIXES) and listed.size_bytes != NOT_A_FILE:
            files.setdefault(listed.path, []).append(listed)
    defects: list[str] = []
    chosen: list[Listed] = []
    for path in sorted(path for path in files if path.endswith(names.MANIFEST_SUFFIX)):
        try:
            require_place(path)
            chosen += files[path][:VERSIONS_READ]
        except FormatError as error:
            defects.append(f"{path}: {error.message}")
    progress.note(f"manifests to read: {len(chosen)}")
    copies: list[Copy] = []
    for path, group in itertools.groupby(_read_all(place, chosen), key=lambda read: read.listed.path):
        versions = list(group)
        copies += _copies(versions, files)
        if not any(version.manifest for version in versions):
            defects.append(f"{path}: {versions[0].defect}")
    return Copies(tuple(sorted(copies, key=lambda copy: catalog.sealing_order(copy.backup))), tuple(defects))


def find(place: Place, reference: str, database: str | None, progress: Progress) -> tuple[Copy, tuple[str, ...]]:
    """The one backup that ``reference`` means (see :func:`pgkeep.domain.catalog.resolve`), and defects met on the way.

    Where the reference tells the day, only its folders are read at first. Raises ``NotFoundError``, ``UsageError``,
    ``StorageError``.
    """
    narrow = folders_of(reference)
    if narrow is not None:
        try:
            copies = read_copies(place, progress, narrow)
            return choose(copies.found, reference, database), copies.defects
        except NotFoundError:
            pass
    copies = read_copies(place, progress)
    try:
        return choose(copies.found, reference, database), copies.defects
    except NotFoundError as error:
        if not copies.defects:
            raise
        unread = f"{len(copies.defects)} manifests there can't be read: {'; '.join(copies.defects[:3])}"
        raise NotFoundError(error.message, unread) from error


def choose(copies: Sequence[Copy], reference: str, database: str | None) -> Copy:
    """As :func:`find`, among these."""
    exact = [copy for copy in copies if copy.backup.manifest.id == reference]
    first = [copy for copy in copies if copy.is_first]
    try:
        return _resolve(exact or first, reference, database)
    except NotFoundError:
        return _resolve(copies, reference, database)


def _resolve(copies: Sequence[Copy], reference: str, database: str | None) -> Copy:
    chosen = catalog.resolve([copy.backup for copy in copies], reference, database=database)
    return next(copy for copy in copies if copy.backup is chosen)


def folders_of(reference: str) -> list[str] | None:
    """Where a backup of that name can lie; None: anywhere."""
    directory, slash, filename = reference.rpartition("/")
    directories = FOLDERS if not slash else (directory,)
    if directory and directory not in FOLDERS:
        return None
    if reference.startswith(catalog.LATEST + ":"):
        return [reference.partition(":")[2]] if reference.partition(":")[2] in FOLDERS else None
    try:
        days = [names.parse_dump_name(filename)[0].date()]
    except FormatError:
        days = _days_of_identifier(reference)
    return [f"{each}/{day}" for each in directories for day in days] or None


def _days_of_identifier(reference: str) -> list[dt.date]:
    """An id tells when its dump began, or, for a further tier, when it was sealed: names differ by that at most."""
    match = _DAY_OF_IDENTIFIER.fullmatch(reference)
    try:
        day = dt.datetime.strptime(match[1], "%Y%m%d").replace(tzinfo=dt.UTC).date() if match else None
        return [] if day is None else [day + dt.timedelta(days=offset) for offset in (-1, 0, 1)]
    except (ValueError, OverflowError):  # no such day
        return []


def require_place(path: str) -> None:
    """``TIER/DAY/NAME`` with the day of the name, as the extractor lays files down. Raises ``FormatError``."""
    parts = path.removesuffix(names.MANIFEST_SUFFIX).split("/")
    if len(parts) != 3 or parts[0] not in FOLDERS:
        raise FormatError("no backup belongs there")
    moment, _ = names.parse_dump_name(parts[2])
    if parts[1] != f"{moment:%Y-%m-%d}":
        raise FormatError(f"it belongs into the folder of its day, {parts[0]}/{moment:%Y-%m-%d}")


def checksum_text(manifest: Manifest) -> bytes:
    """What the ``.sha256`` file of this backup must hold."""
    return f"{manifest.sha256}  {manifest.filename}\n".encode()


def decoded(data: bytes, path: str) -> Manifest:
    """A manifest that fits the place where it was found. Raises ``FormatError``."""
    manifest = manifests.decode(data)
    directory, _, name = path.split("/")
    if manifest.filename + names.MANIFEST_SUFFIX != name:
        raise FormatError(f"it names another file: {manifest.filename!r}")
    if directory != (names.GLOBALS_DIRECTORY if manifest.kind == "globals" else manifest.type.value):
        raise FormatError(f"it is of another kind than {directory}: {manifest.kind}, {manifest.type.value}")
    return manifest


def _read_all(place: Place, chosen: Sequence[Listed]) -> Iterator[_Read]:
    """In the order given, a few at a time. Raises ``StorageError`` when too many can't be read."""
    failures = 0
    with concurrent.futures.ThreadPoolExecutor(_PARALLEL_READS) as threads:
        submitted = ((listed, threads.submit(_bytes_of, place, listed)) for listed in chosen)
        pending = collections.deque(itertools.islice(submitted, 2 * _PARALLEL_READS))
        try:
            while pending:
                listed, future = pending.popleft()
                try:
                    # Decoded here: msgspec builds its knowledge of a type at its first use, and crashes when several
                    # threads do so at once (seen with 0.22).
                    read = _decoded(listed, future.result())
                except PgkeepError as error:
                    failures += isinstance(error, StorageError)
                    if failures > _FAILURES_TOLERATED:
                        raise
                    read = _Read(listed, None, error.message, "")
                pending.extend(itertools.islice(submitted, 1))
                yield read
        finally:
            for _, future in pending:
                future.cancel()


def _bytes_of(place: Place, listed: Listed) -> bytes:
    if listed.size_bytes > manifests.SIZE_LIMIT_BYTES:
        raise FormatError(f"it is larger than {manifests.SIZE_LIMIT_BYTES} bytes")
    return place.read(listed.path, manifests.SIZE_LIMIT_BYTES, listed.version)


def _decoded(listed: Listed, data: bytes) -> _Read:
    return _Read(listed, decoded(data, listed.path), "", hashlib.sha256(data).hexdigest())


def _copies(versions: Sequence[_Read], files: dict[str, list[Listed]]) -> Iterator[Copy]:
    """The backups that the versions of one manifest speak of: one for each id, the oldest first."""
    path = versions[0].listed.path
    written = len(files[path])
    overwritten = written > len(versions) or len({version.digest for version in versions}) > 1
    first: str | None = None
    seen: set[str] = set()
    for version in versions:
        if version.manifest is None or version.manifest.id in seen:
            continue
        seen.add(version.manifest.id)
        problems = []
        if first is not None:
            problems.append(f"its manifest was written over that of {first}: it is another's unless its id is known")
        elif overwritten:
            problems.append(f"the manifest was written {written} times; the oldest is taken{_unread(versions)}")
        yield _copy(version.listed, version.manifest, problems, files, is_first=first is None)
        first = first or version.manifest.id


def _unread(versions: Sequence[_Read]) -> str:
    defects = [version.defect for version in versions if version.manifest is None]
    return f" ({len(defects)} of them say nothing: {defects[0]})" if defects else ""


def _copy(
    listed: Listed, manifest: Manifest, problems: list[str], files: dict[str, list[Listed]], *, is_first: bool
) -> Copy:
    path = listed.path.removesuffix(names.MANIFEST_SUFFIX)
    dumps = files.get(path, [])
    fitting = tuple(dump for dump in dumps if dump.size_bytes == manifest.size_bytes)
    others = tuple(dump for dump in dumps if dump.size_bytes != manifest.size_bytes)
    checksums = files.get(path + names.CHECKSUM_SUFFIX, [])
    missing = list(_missing(manifest, fitting, others, checksums))
    if fitting and others:
        problems.append(f"the dump was written {len(dumps)} times; {len(others)} have another size and are passed over")
    state: catalog.State = "incomplete" if missing else "sealed" if is_first else "suspect"
    return Copy(
        backup=SealedBackup(manifest, path.partition("/")[0], state, (*missing, *problems)),
        path=path,
        manifest=listed,
        dumps=fitting,
        others=others,
        checksums=tuple(checksums),
        signatures=tuple(files.get(path + names.SIGNATURE_SUFFIX, ())),
        is_first=is_first,
    )


def _missing(
    manifest: Manifest, fitting: Sequence[Listed], others: Sequence[Listed], checksums: Sequence[Listed]
) -> Iterator[str]:
    if not fitting and others:
        yield f"the dump has {others[0].size_bytes} bytes, the manifest says {manifest.size_bytes}"
    elif not fitting:
        yield "the dump is missing"
    if not checksums:
        yield "the checksum file is missing or not a regular file"
