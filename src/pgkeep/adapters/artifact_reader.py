"""Reads a seekable ``.sql.gz`` from its end: footer, index, then any part, wherever the bytes come from."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from pgkeep.adapters import gzip_members
from pgkeep.domain import artifact
from pgkeep.domain.artifact import FOOTER_BYTES, Chunk, Footer, Index, LargeObjectsPart, Part, TablePart, TocPart
from pgkeep.domain.manifest import TableStatistics
from pgkeep.errors import FormatError, NotFoundError, StorageError

# Enough to tell what a strange file is.
_MAGIC_BYTES = 32


class Source(Protocol):
    """Bytes that can be read at any offset; several threads may do so at once."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes; none only at the end."""


class File(Source, Protocol):
    """A source that is a file here, or becomes one as it is read; ``descriptor`` serves copies inside the kernel."""

    @property
    def descriptor(self) -> int: ...

    @property
    def is_remote(self) -> bool:
        """Only what was read or prefetched is behind the descriptor."""

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have these bytes (from, to) behind the descriptor. Raises ``StorageError``, ``IntegrityError``."""

    def release(self, start: int, end: int) -> None:
        """These bytes are not needed any more."""


class LocalFile:
    """A file opened for reading."""

    is_remote = False

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, follow_link: bool = True) -> LocalFile:
        """Waits for no FIFO. Raises ``NotFoundError``, ``StorageError`` (also for what is no regular file)."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow_link else os.O_NOFOLLOW)
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} does not exist") from error
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror}", "run as a user who may, e.g. root") from error
        # A device may have no end.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StorageError(f"{path} is not a regular file", "copy what it yields into one")
        return cls(descriptor)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, offset)

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """All of it is here."""

    def release(self, start: int, end: int) -> None:
        """It stays as it is."""

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


class ArtifactReader:
    """An artifact whose footer and index were read and checked. Raises ``FormatError`` where they don't hold."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.footer = _read_footer(source)
        self.index = _read_index(source, self.footer)

    def text(self, offset: int, part: Part) -> Iterator[bytes]:
        """A part's text in pieces, every member checked against the index. Raises ``FormatError``."""
        for chunk in part.chunks:
            yield from gzip_members.decompress(chunk, _sequential(self.source, offset))
            offset += chunk.length

    def toc(self) -> bytes | None:
        """pg_dump's ``toc.dat``; None where the artifact has none (roles and tablespaces)."""
        for offset, part in self.index.placed():
            if isinstance(part, TocPart):
                return artifact.decode_toc(split_lines(self.text(offset, part), artifact.TOC_LINE_LIMIT_BYTES))
        return None

    def check_digests(self, threads: int, wanted: Callable[[Part], bool] = lambda _: True) -> Iterator[str]:
        """Compare the wanted parts' bytes with the index; each defect in words. Quick: nothing is decompressed."""
        return self._check(self._compare_digest, threads, wanted)

    def check_content(self, threads: int) -> Iterator[str]:
        """Decompress every member and compare bytes, size and newlines with the index; each defect in words."""
        return self._check(self._compare_content, threads, lambda _: True)

    def _check(
        self, compare: Callable[[int, Chunk], None], threads: int, wanted: Callable[[Part], bool]
    ) -> Iterator[str]:
        with concurrent.futures.ThreadPoolExecutor(threads) as executor:
            places = self._chunks(wanted)
            pending = collections.deque(
                (place, executor.submit(compare, place.offset, place.chunk))
                for place in itertools.islice(places, 4 * threads)
            )
            while pending:
                place, future = pending.popleft()
                for following in itertools.islice(places, 1):
                    pending.append((following, executor.submit(compare, following.offset, following.chunk)))
                try:
                    future.result()
                except FormatError as error:
                    yield f"{place.described}: {error.message}"

    def _chunks(self, wanted: Callable[[Part], bool]) -> Iterator[_Place]:
        for offset, part in self.index.placed():
            for number, chunk in enumerate(part.chunks if wanted(part) else (), 1):
                yield _Place(offset, chunk, f"{describe(part)}, member {number} at byte {offset}")
                offset += chunk.length

    def _compare_digest(self, offset: int, chunk: Chunk) -> None:
        digest = hashlib.sha256()
        for block in _blocks(self.source, offset, chunk.length):
            digest.update(block)
        if digest.hexdigest() != chunk.sha256:
            raise FormatError("its digest differs from the index")

    def _compare_content(self, offset: int, chunk: Chunk) -> None:
        collections.deque(gzip_members.decompress(chunk, _sequential(self.source, offset)), maxlen=0)


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    chunk: Chunk
    described: str


def describe(part: Part) -> str:
    """A part's name for people."""
    match part:
        case TablePart():
            return f"table {part.schema}.{part.name}"
        case LargeObjectsPart():
            return f"large objects ({part.file})"
        case TocPart():
            return "the archive's contents (toc.dat)"
        case _:
            return "the SQL around the data"


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


def split_lines(pieces: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Lines with their ends; the last one may lack it. Raises ``FormatError`` for a line over the limit."""
    rest: list[bytes] = []
    rest_bytes = 0
    for piece in pieces:
        first, *others = piece.split(b"\n")
        rest.append(first)
        rest_bytes += len(first)
        for other in others:
            if rest_bytes > limit_bytes:
                raise FormatError(f"a line is longer than {limit_bytes} bytes")
            yield b"".join(rest) + b"\n"
            rest, rest_bytes = [other], len(other)
        if rest_bytes > limit_bytes:
            raise FormatError(f"a line is longer than {limit_bytes} bytes")
    if last := b"".join(rest):
        yield last


def _sequential(source: Source, offset: int) -> Callable[[int], bytes]:
    def read(length: int) -> bytes:
        nonlocal offset
        data = source.read(offset, length)
        offset += len(data)
        return data

    return read


def _blocks(source: Source, offset: int, length: int) -> Iterator[bytes]:
    """So many bytes, a block at a time. Raises ``FormatError`` where the file ends before."""
    read = _sequential(source, offset)
    while length:
        block = read(min(length, gzip_members.PIECE_BYTES))
        if not block:
            raise FormatError("the file ends too early")
        length -= len(block)
        yield block


def _read_footer(source: Source) -> Footer:
    size_bytes = source.size_bytes
    tail = source.read(max(0, size_bytes - FOOTER_BYTES), FOOTER_BYTES)
    try:
        return artifact.decode_footer(tail, size_bytes)
    except FormatError as error:
        if error.message != artifact.NO_FOOTER:
            raise
        raise FormatError(error.message, artifact.foreign_hint(source.read(0, _MAGIC_BYTES))) from error


def _read_index(source: Source, footer: Footer) -> Index:
    limit_bytes = artifact.index_limit_bytes(footer.index_offset)
    lines = split_lines(_inflated(source, footer, limit_bytes), artifact.INDEX_LINE_LIMIT_BYTES)
    return artifact.decode_index(lines, footer.index_offset)


def _inflated(source: Source, footer: Footer, limit_bytes: int) -> Iterator[bytes]:
    """The index's text; the digest of its members is compared at the end, before anything is believed."""
    digest = hashlib.sha256()

    def digested() -> Iterator[bytes]:
        for block in _blocks(source, footer.index_offset, footer.index_length):
            digest.update(block)
            yield block

    yield from gzip_members.decompress_all(digested(), limit_bytes)
    if digest.hexdigest() != footer.index_sha256:
        raise FormatError("the index's digest differs from the footer")
