"""Put the artifact together: pg_restore's SQL, the compressed data, the table of contents, the index."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from pgkeep.adapters import gzip_members
from pgkeep.adapters.artifact_writer import ArtifactWriter
from pgkeep.agent.compress import Pool, PooledChunk
from pgkeep.agent.skeleton import LARGE_OBJECT_LISTS, Hole, Shadow, print_sql
from pgkeep.domain import large_objects
from pgkeep.domain.artifact import Index, TablePart, codec
from pgkeep.domain.toc import Entry, Toc
from pgkeep.domain.toc import read as read_toc
from pgkeep.errors import FormatError

# A multiple of what one line of base64 holds, so that only the last line is shorter.
TOC_BLOCK_BYTES = 3072 * 256


@dataclasses.dataclass(frozen=True, slots=True)
class RawDump:
    """pg_dump's finished directory, its tables already compressed into the pool."""

    directory: Path
    pool: Pool
    tables: dict[str, list[PooledChunk]]
    encoding: str


def assemble(raw: RawDump, pg_restore: Path, target: int) -> Index:
    """Write the artifact to the descriptor ``target``. Raises ``FormatError``, ``DatabaseError``, ``OSError``."""
    toc = read_toc((raw.directory / "toc.dat").read_bytes(), codec(raw.encoding))
    entries = {entry.filename: entry for entry in toc.entries if entry.filename}
    lists = {path.name: path for path in sorted(raw.directory.glob(LARGE_OBJECT_LISTS)) if path.stat().st_size}
    shadow = Shadow(raw.directory.with_name("shadow"), raw.directory / "toc.dat", raw.tables)
    for name, path in lists.items():
        shadow.add_large_objects(name, _first_line(path))
    writer = ArtifactWriter(target)
    for sql, hole in _runs(print_sql(pg_restore, shadow)):
        writer.add_sql(sql)
        if hole is None:
            continue
        if hole.file in lists:
            _add_large_objects(writer, lists[hole.file], hole)
        else:
            _add_table(writer, raw, toc, entries[hole.file])
    writer.add_toc(_blocks(raw.directory / "toc.dat", TOC_BLOCK_BYTES))
    return writer.finish("database", raw.encoding)


def _runs(pieces: Iterator[bytes | Hole]) -> Iterator[tuple[list[bytes], Hole | None]]:
    """Each run of SQL with the hole that ends it; a long run is given out in parts, without one."""
    run: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, Hole):
            yield run, piece
            run = []
        else:
            run.append(piece)
            if len(run) > 16:
                yield run, None
                run = []
    yield run, None


def _add_table(writer: ArtifactWriter, raw: RawDump, toc: Toc, entry: Entry) -> None:
    pooled = raw.tables[entry.filename or ""]
    part = TablePart(
        chunks=tuple(place.chunk for place in pooled),
        dump_id=entry.dump_id,
        file=entry.filename or "",
        schema=entry.schema or "",
        name=entry.name,
        extension=toc.table_of(entry) is None,
    )
    writer.add_table(part, raw.pool.descriptor, (place.offset for place in pooled))


def _add_large_objects(writer: ArtifactWriter, list_path: Path, hole: Hole) -> None:
    numbers = [int(line.split()[0]) for line in list_path.read_text("ascii").splitlines()]
    text = large_objects.encode(_objects(list_path), hole.quote)
    writer.add_large_objects(list_path.name, numbers[0], len(numbers), text)


def _objects(list_path: Path) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Each large object with its content; its file goes as soon as it was read."""
    with list_path.open(encoding="ascii") as lines:
        for line in lines:
            number, name = line.split()
            path = list_path.parent / name
            if path.is_file():
                yield int(number), _blocks(path, large_objects.WRITE_BYTES)
                path.unlink()
            else:
                spooled = path.with_name(f"{name}.gz")
                yield int(number), _regrouped(gzip_members.read_file(spooled))
                spooled.unlink()


def _regrouped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for start in range(0, len(piece), large_objects.WRITE_BYTES):
            yield piece[start : start + large_objects.WRITE_BYTES]


def _blocks(path: Path, size_bytes: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(size_bytes):
            yield block


def _first_line(path: Path) -> str:
    with path.open(encoding="ascii") as file:
        line = file.readline()
    if len(line.split()) != 2 or os.sep in line:
        raise FormatError(f"{path.name} lists large objects in a way that is not known here")
    return line
