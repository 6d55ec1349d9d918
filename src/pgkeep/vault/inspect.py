"""Look into an artifact and believe nothing: digest, structure, contents against index, statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Literal

from pgkeep.adapters import gzip_members
from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile, describe
from pgkeep.domain import toc
from pgkeep.domain.artifact import (
    DATA_END,
    TRAILER_TEXT,
    Index,
    LargeObjectsPart,
    Part,
    SqlPart,
    TablePart,
    codec,
)
from pgkeep.domain.manifest import TableStatistics
from pgkeep.errors import FormatError

Depth = Literal["digests", "content"]
# The trailer stands in the last lines of the SQL.
_TRAILER_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Inspection:
    """What was found. ``defects`` empty: the artifact is whole as far as ``depth`` looks."""

    size_bytes: int
    sha256: str
    index: Index | None
    defects: tuple[str, ...]


def inspect(file: LocalFile, depth: Depth) -> Inspection:
    """Check a whole artifact. Never raises for what is wrong with it: that is in ``defects``."""
    sha256, size_bytes = digest(file)
    try:
        reader = ArtifactReader(file)
    except FormatError as error:
        return Inspection(size_bytes, sha256, None, (error.message,))
    threads = len(os.sched_getaffinity(0))
    defects = list(reader.check_content(threads) if depth == "content" else reader.check_digests(threads))
    if not defects:
        defects += _structure(reader, depth)
    return Inspection(size_bytes, sha256, reader.index, tuple(defects))


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
            for offset, part in reader.index.placed():
                if isinstance(part, TablePart) and not _ends_well(reader, offset, part):
                    yield f"{describe(part)}: its rows lack their end mark"
    except FormatError as error:
        yield error.message


def _trailer(reader: ArtifactReader) -> Iterator[str]:
    """pg_dump's last words must be there: without them the dump was cut short."""
    last = b""
    for offset, part in reader.index.placed():
        if isinstance(part, SqlPart):
            chunk_offset = offset + part.length - part.chunks[-1].length
            last = b"".join(reader.text(chunk_offset, SqlPart(chunks=part.chunks[-1:])))[-_TRAILER_BYTES:]
    if not TRAILER_TEXT.search(last):
        yield "the trailer is missing: pg_dump did not finish"


def _contents(reader: ArtifactReader) -> Iterator[str]:
    """pg_dump's own table of contents against the index: the same data files, under the same names."""
    data = reader.toc()
    if data is None:
        yield "the archive's contents (toc.dat) are missing"
        return
    read = toc.read(data, codec(reader.index.header.encoding))
    listed = {entry.filename: entry for entry in read.entries if entry.is_table_data}
    tables = {table.file: table for table in reader.index.tables}
    for name in sorted(listed.keys() - tables.keys(), key=str):
        yield f"the data of {listed[name].schema}.{listed[name].name} ({name}) is missing"
    for name in sorted(tables.keys() - listed.keys()):
        yield f"{describe(tables[name])} ({name}) is not in the archive's contents"
    for name in tables.keys() & listed.keys():
        table, entry = tables[name], listed[name]
        if (table.dump_id, table.schema, table.name) != (entry.dump_id, entry.schema, entry.name):
            yield f"{describe(table)} ({name}) is {entry.schema}.{entry.name} in the archive's contents"


def _ends_well(reader: ArtifactReader, offset: int, part: Part) -> bool:
    """The last two members suffice: the end mark may lie across a cut."""
    last = part.chunks[-2:]
    start = offset + part.length - sum(chunk.length for chunk in last)
    tail = b""
    for piece in reader.text(start, SqlPart(chunks=last)):
        tail = (tail + piece)[-len(DATA_END) - 1 :]
    return tail in (DATA_END, b"\n" + DATA_END)


def large_object_count(index: Index) -> int:
    return sum(part.objects for part in index.parts if isinstance(part, LargeObjectsPart))
