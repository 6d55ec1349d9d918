"""Look into an artifact and believe nothing: digest, structure, contents against index, statistics."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import Literal

import msgspec

from pgkeep.adapters import gzip_members
from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile, describe, split_lines
from pgkeep.domain import large_objects, toc
from pgkeep.domain.artifact import (
    DATA_END,
    TRAILER_TEXT,
    Chunk,
    Index,
    LargeObjectsPart,
    Part,
    SqlPart,
    TablePart,
    codec,
)
from pgkeep.domain.contents import disagreements
from pgkeep.domain.manifest import Count, Kind, TableStatistics
from pgkeep.errors import FormatError

Depth = Literal["digests", "content"]
# The trailer stands in the last lines of the SQL.
_TRAILER_BYTES = 64 * 1024
_ROWS_ENDS = (DATA_END, b"\n" + DATA_END)
# A file that is wrong throughout is described well enough by so many.
DEFECTS_LIMIT = 1000


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What the index says of the whole; that it is true is what :func:`examine` finds out."""

    kind: Kind
    tables: tuple[TableStatistics, ...]
    large_objects: Count
    raw_bytes: Count


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What a look into an artifact brought: JSON between the vault and its inspector. ``contents`` None: no index."""

    contents: Contents | None
    defects: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Inspection:
    """What was found. ``defects`` empty: the artifact is whole as far as the look went."""

    size_bytes: int
    sha256: str
    contents: Contents | None
    defects: tuple[str, ...]


def inspect(file: LocalFile, depth: Depth) -> Inspection:
    """Check a whole artifact. Never raises for what is wrong with it: that is in ``defects``."""
    sha256, size_bytes = digest(file)
    findings = examine(file, depth)
    return Inspection(size_bytes, sha256, findings.contents, findings.defects)


def examine(file: LocalFile, depth: Depth) -> Findings:
    """All but the file's digest: the part that reads hostile structure."""
    try:
        reader = ArtifactReader(file)
    except FormatError as error:
        return Findings(contents=None, defects=(_explained(error),))
    threads = len(os.sched_getaffinity(0))
    checks = reader.check_content(threads) if depth == "content" else reader.check_digests(threads)
    defects = list(itertools.islice(checks, DEFECTS_LIMIT)) or list(
        itertools.islice(_structure(reader, depth), DEFECTS_LIMIT)
    )
    if len(defects) == DEFECTS_LIMIT:
        defects.append(f"these are the first {DEFECTS_LIMIT} defects; what follows was not looked at")
    return Findings(contents=_contents_of(reader.index), defects=tuple(defects))


def _explained(error: FormatError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


def digest(file: LocalFile) -> tuple[str, int]:
    """SHA-256 of all bytes, and how many there are."""
    state = hashlib.sha256()
    offset = 0
    while data := file.read(offset, gzip_members.PIECE_BYTES):
        state.update(data)
        offset += len(data)
    return state.hexdigest(), offset


def statistics(index: Index) -> tuple[TableStatistics, ...]:
    """Every table's rows and sizes, in the file's order."""
    return tuple(
        TableStatistics(
            schema=table.schema,
            name=table.name,
            rows=table.rows,
            raw_bytes=table.raw_bytes,
            compressed_bytes=table.length,
            digest=hashlib.sha256("".join(chunk.sha256 for chunk in table.chunks).encode("ascii")).hexdigest(),
        )
        for table in index.tables
    )


def _structure(reader: ArtifactReader, depth: Depth) -> Iterator[str]:
    try:
        yield from _trailer(reader)
        if reader.index.header.content == "database":
            yield from _contents(reader)
        if depth == "content":
            yield from _data(reader)
    except FormatError as error:
        yield error.message


def _trailer(reader: ArtifactReader) -> Iterator[str]:
    """pg_dump's last words must be there: without them the dump was cut short. They may lie across a cut."""
    last: collections.deque[tuple[int, Chunk]] = collections.deque(maxlen=2)
    for offset, part in reader.index.placed():
        if isinstance(part, SqlPart):
            for chunk in part.chunks:
                last.append((offset, chunk))
                offset += chunk.length
    tail = b""
    for offset, chunk in last:
        for piece in reader.text(offset, SqlPart(chunks=(chunk,))):
            tail = (tail + piece)[-_TRAILER_BYTES:]
    if not TRAILER_TEXT.search(tail):
        yield "the trailer is missing: pg_dump did not finish"


def _contents(reader: ArtifactReader) -> Iterator[str]:
    """pg_dump's own table of contents against the index: the same data files, under the same names."""
    data = reader.toc()
    if data is None:
        yield "the archive's contents (toc.dat) are missing"
        return
    yield from disagreements(reader.index, toc.read(data, codec(reader.index.header.encoding)))


def _data(reader: ArtifactReader) -> Iterator[str]:
    before: tuple[int, Part] | None = None
    for offset, part in reader.index.placed():
        if isinstance(part, TablePart) and _tail(reader, offset, part, len(DATA_END) + 1) not in _ROWS_ENDS:
            yield f"{describe(part)}: its rows lack their end mark"
        if isinstance(part, LargeObjectsPart):
            sql = _tail(reader, *before, large_objects.OPENING_BYTES) if before else b""
            yield from _objects(reader, offset, part, sql)
        before = offset, part


def _objects(reader: ArtifactReader, offset: int, part: LargeObjectsPart, sql_before: bytes) -> Iterator[str]:
    if large_objects.first_number(sql_before) != part.first:
        yield f"{describe(part)}: the SQL before it does not open large object {part.first}"
    lines = split_lines(reader.text(offset, part), large_objects.LINE_LIMIT_BYTES)
    found = large_objects.count(lines, part.first)
    if found != part.objects:
        yield f"{describe(part)}: it promises {part.objects} large objects and holds {found}"


def _tail(reader: ArtifactReader, offset: int, part: Part, size_bytes: int) -> bytes:
    """A part's last bytes. The last two members suffice: they may lie across a cut."""
    last = part.chunks[-2:]
    start = offset + part.length - sum(chunk.length for chunk in last)
    tail = b""
    for piece in reader.text(start, SqlPart(chunks=last)):
        tail = (tail + piece)[-size_bytes:]
    return tail


def _contents_of(index: Index) -> Contents:
    return Contents(
        kind=index.header.content,
        tables=statistics(index),
        large_objects=sum(part.objects for part in index.parts if isinstance(part, LargeObjectsPart)),
        raw_bytes=sum(part.raw_bytes for part in index.parts),
    )
