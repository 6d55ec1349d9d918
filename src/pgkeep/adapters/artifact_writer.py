"""Writes a seekable ``.sql.gz`` from front to back: parts, then toc, index and footer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from pgkeep.adapters import durable, gzip_members
from pgkeep.domain import artifact
from pgkeep.domain.artifact import Chunk, Footer, Header, Index, LargeObjectsPart, Part, SqlPart, TablePart, TocPart


class ArtifactWriter:
    """Appends to an open file descriptor. One part after the other; nothing is ever rewritten."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._parts: list[Part] = []

    def add_sql(self, pieces: Iterable[bytes]) -> None:
        """SQL around the data; nothing at all adds nothing."""
        if chunks := self._compressed(pieces):
            self._parts.append(SqlPart(chunks=chunks))

    def add_table(self, part: TablePart, pool: int, offsets: Iterable[int]) -> None:
        """A table whose compressed chunks lie in the file ``pool``, each at its offset."""
        for offset, length in _runs(zip(offsets, (chunk.length for chunk in part.chunks), strict=True)):
            durable.copy_range(pool, offset, self._descriptor, length)
        self._parts.append(part)

    def add_large_objects(self, file: str, first: int, objects: int, text: Iterable[bytes]) -> None:
        # A single object without content has no text, and every part has a member.
        chunks = self._compressed(text) or (self._member([]),)
        self._parts.append(LargeObjectsPart(chunks=chunks, file=file, first=first, objects=objects))

    def add_toc(self, toc: Iterable[bytes]) -> None:
        """``toc.dat`` in blocks of a multiple of three bytes (but the last)."""
        lines = (line for block in toc for line in artifact.encode_toc(block))
        self._parts.append(TocPart(chunks=self._compressed(lines)))

    def finish(self, content: Literal["database", "globals"], encoding: str) -> Index:
        """Append index and footer. The caller syncs."""
        header = Header(version=artifact.VERSION, content=content, encoding=encoding, parts=len(self._parts))
        index = Index(header, tuple(self._parts))
        digest = hashlib.sha256()
        chunks = self._compressed(artifact.encode_index(index), digest)
        footer = Footer(index.length, sum(chunk.length for chunk in chunks), digest.hexdigest())
        durable.write_all(self._descriptor, artifact.encode_footer(footer))
        return index

    def _compressed(self, pieces: Iterable[bytes], digest: hashlib._Hash | None = None) -> tuple[Chunk, ...]:
        return tuple(self._member(text, digest) for text in gzip_members.chunked(pieces))

    def _member(self, text: list[bytes], digest: hashlib._Hash | None = None) -> Chunk:
        chunk, output = gzip_members.compress(text)
        for data in output:
            durable.write_all(self._descriptor, data)
            if digest is not None:
                digest.update(data)
        return chunk


def _runs(places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join neighbouring ``(offset, length)`` places: fewer and larger copies."""
    start = end = 0
    for offset, length in places:
        if offset != end:
            if end > start:
                yield start, end - start
            start = offset
        end = offset + length
    if end > start:
        yield start, end - start
