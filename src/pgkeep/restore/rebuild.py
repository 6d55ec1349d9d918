"""Make pg_restore's directory out of an artifact: its ``toc.dat``, and the data files of what is wanted."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from pgkeep.adapters import durable
from pgkeep.adapters.artifact_reader import ArtifactReader, File, split_lines
from pgkeep.domain import large_objects
from pgkeep.domain.artifact import LargeObjectsPart, Part, TablePart
from pgkeep.errors import FormatError

Wanted = Callable[[Part], bool]
Placed = tuple[int, Part]
"""A part, and where it begins."""
# So much of a remote file is fetched, checked and copied at a time, and takes space twice meanwhile.
BATCH_BYTES: Final = 256 * 1024 * 1024


def rebuild(reader: ArtifactReader, file: File, directory: Path, wanted: Wanted) -> None:
    """Fill the empty ``directory``. Tables' members are copied as they are: they *are* ``NNNN.dat.gz``.

    Their digests are compared first. Raises ``FormatError`` for a damaged member, ``StorageError``.
    """
    toc = reader.toc()
    if toc is None:
        raise FormatError("the artifact holds no archive (toc.dat)", "it may hold roles only: gunzip -c FILE | psql")
    with durable.explain(directory, "rebuilding the archive"):
        (directory / "toc.dat").write_bytes(toc)
        for batch in batches(reader, wanted):
            file.prefetch((offset, offset + part.length) for offset, part in batch)
            _require_whole(reader, batch)
            for offset, part in batch:
                _add(reader, file, offset, part, directory)
                file.release(offset, offset + part.length)


def batches(reader: ArtifactReader, wanted: Wanted) -> list[list[Placed]]:
    """The wanted parts in the file's order, in groups of about ``BATCH_BYTES``; a part is never divided."""
    groups: list[list[Placed]] = []
    group_bytes = BATCH_BYTES
    for offset, part in reader.index.placed():
        if wanted(part):
            if group_bytes >= BATCH_BYTES:
                groups.append([])
                group_bytes = 0
            groups[-1].append((offset, part))
            group_bytes += part.length
    return groups


def _require_whole(reader: ArtifactReader, batch: list[Placed]) -> None:
    chosen = {id(part) for _, part in batch}
    defects = list(reader.check_digests(len(os.sched_getaffinity(0)), lambda part: id(part) in chosen))
    if defects:
        raise FormatError("the backup is damaged: " + "; ".join(defects[:5]), "restore from another copy")


def _add(reader: ArtifactReader, file: File, offset: int, part: Part, directory: Path) -> None:
    if isinstance(part, TablePart):
        _copy_table(file, offset, part, directory)
    elif isinstance(part, LargeObjectsPart):
        _unpack_large_objects(reader, offset, part, directory)


def _copy_table(file: File, offset: int, part: TablePart, directory: Path) -> None:
    with (directory / f"{part.file}.gz").open("xb", buffering=0) as target:
        durable.copy_range(file.descriptor, offset, target.fileno(), part.length)


def _unpack_large_objects(reader: ArtifactReader, offset: int, part: LargeObjectsPart, directory: Path) -> None:
    lines = split_lines(reader.text(offset, part), large_objects.LINE_LIMIT_BYTES)
    listed = 0
    with (directory / part.file).open("x", encoding="ascii") as listing:
        for number, blocks in _grouped(large_objects.decode(lines, part.first)):
            listed += 1
            name = f"blob_{number}.dat"
            with (directory / name).open("xb") as target:
                _write(target, blocks)
            listing.write(f"{number} {name}\n")
    if listed != part.objects:
        raise FormatError(f"{part.file} promises {part.objects} large objects and holds {listed}")


def _write(target: BinaryIO, blocks: Iterator[bytes]) -> None:
    for block in blocks:
        target.write(block)


def _grouped(blocks: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Neighbouring blocks of one large object together; each group must be used up before the next."""
    for number, group in itertools.groupby(blocks, key=operator.itemgetter(0)):
        yield number, (block for _, block in group)
