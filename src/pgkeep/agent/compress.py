"""Compress pg_dump's data files behind its back: each chunk as soon as it is on disk, then free the space.

Every compressed chunk goes to one *pool* file in the order of completion; the artifact is put together
from it once pg_dump has written its table of contents, which is the last thing it does.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from pgkeep.adapters import durable, gzip_members
from pgkeep.domain.artifact import CHUNK_BYTES, DATA_END, Chunk
from pgkeep.errors import FormatError

DATA_FILE = re.compile(r"\d{1,10}\.dat", re.ASCII)
SPOOLED_FILE = re.compile(r"(\d{1,10}\.dat)\.gz", re.ASCII)
# How far back from a chunk's end a row's end is looked for; a longer row is cut anywhere.
ROW_SEARCH_BYTES = 64 * 1024

# The end mark and the newline before it.
_TAIL_BYTES = len(DATA_END) + 1


@dataclasses.dataclass(frozen=True, slots=True)
class PooledChunk:
    """A compressed chunk and where in the pool it lies."""

    chunk: Chunk
    offset: int


class Pool:
    """An append-only file that several threads write to."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._end = 0
        self._lock = threading.Lock()

    def add(self, chunk: Chunk, pieces: list[bytes]) -> PooledChunk:
        with self._lock:
            offset = self._end
            self._end += chunk.length
        position = offset
        for piece in pieces:
            position += _write(self.descriptor, piece, position)
        return PooledChunk(chunk, offset)

    def close(self) -> None:
        os.close(self.descriptor)


class _Source:
    """One data file under way: what was handed to the threads, and what came of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.taken_bytes = 0
        self.chunks: list[concurrent.futures.Future[PooledChunk]] = []

    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def is_complete(self, size_bytes: int) -> bool:
        """True once pg_dump's end mark is the last thing in it: no row can look like that."""
        tail = os.pread(self.descriptor, _TAIL_BYTES, max(0, size_bytes - _TAIL_BYTES))
        return tail in (DATA_END, b"\n" + DATA_END)

    def cut(self) -> int:
        """The length of the next full chunk: to a row's end where one is near."""
        start = self.taken_bytes + CHUNK_BYTES - ROW_SEARCH_BYTES
        newline = os.pread(self.descriptor, ROW_SEARCH_BYTES, start).rfind(b"\n")
        return CHUNK_BYTES if newline < 0 else CHUNK_BYTES - ROW_SEARCH_BYTES + newline + 1

    def finish(self) -> None:
        """All of it is handed over: the name goes now, the space when the threads are done."""
        self.path.unlink()
        os.close(self.descriptor)


class Compressor:
    """Sweeps pg_dump's directory; a context manager that waits for its threads."""

    def __init__(self, directory: Path, pool: Pool, threads: int) -> None:
        self._directory = directory
        self._pool = pool
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="compress")
        self._limit = 2 * threads
        self._open: dict[str, _Source] = {}
        self._chunks: dict[str, list[concurrent.futures.Future[PooledChunk]]] = {}
        self._spooled: dict[str, concurrent.futures.Future[list[PooledChunk]]] = {}
        self._pending: set[concurrent.futures.Future[PooledChunk]] = set()
        self.taken_bytes = 0

    def __enter__(self) -> Compressor:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for source in self._open.values():
            os.close(source.descriptor)
        self._open.clear()

    def sweep(self) -> None:
        """Hand to the threads whatever pg_dump has finished writing. Errors of earlier chunks surface here."""
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries if DATA_FILE.fullmatch(entry.name)]
        for name in names:
            self._take(self._open.get(name) or self._begin(name))

    def finish(self) -> dict[str, list[PooledChunk]]:
        """After pg_dump ended well: everything that is left, then every file's chunks in order.

        Raises ``FormatError`` for a file without its end mark.
        """
        self.sweep()
        if self._open:
            raise FormatError(f"pg_dump left {min(self._open)} without its end mark", "look at the server's log")
        with os.scandir(self._directory) as entries:
            spooled = [match[1] for entry in entries if (match := SPOOLED_FILE.fullmatch(entry.name))]
        for name in spooled:
            self._spooled[name] = self._threads.submit(self._compress_spooled, self._directory / f"{name}.gz")
        found = {name: [chunk.result() for chunk in chunks] for name, chunks in self._chunks.items()}
        return found | {name: chunks.result() for name, chunks in self._spooled.items()}

    def _begin(self, name: str) -> _Source:
        source = self._open[name] = _Source(self._directory / name)
        return source

    def _take(self, source: _Source) -> None:
        size_bytes = source.size_bytes()
        while size_bytes - source.taken_bytes > CHUNK_BYTES:
            self._submit(source, source.cut())
        if size_bytes > source.taken_bytes and source.is_complete(size_bytes):
            self._submit(source, size_bytes - source.taken_bytes)
            source.finish()
            name = source.path.name
            del self._open[name]
            self._chunks[name] = source.chunks

    def _submit(self, source: _Source, length: int) -> None:
        self._wait_for_room()
        # A descriptor of the job's own: the source's is closed as soon as all of it is handed over.
        descriptor = os.dup(source.descriptor)
        future = self._threads.submit(self._compress, descriptor, source.taken_bytes, length)
        # Here, not in the job: one that is cancelled never runs.
        future.add_done_callback(lambda _: os.close(descriptor))
        source.taken_bytes += length
        self.taken_bytes += length
        source.chunks.append(future)
        self._pending.add(future)

    def _wait_for_room(self) -> None:
        if len(self._pending) >= self._limit:
            done, self._pending = concurrent.futures.wait(self._pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                future.result()

    def _compress(self, descriptor: int, offset: int, length: int) -> PooledChunk:
        chunk, pieces = gzip_members.compress(_pieces(descriptor, offset, length))
        if length >= CHUNK_BYTES - ROW_SEARCH_BYTES:
            # The end mark may lie across the cut: what is_complete() reads must stay.
            durable.punch_hole(descriptor, offset, length - _TAIL_BYTES)
        return self._pool.add(chunk, pieces)

    def _compress_spooled(self, path: Path) -> list[PooledChunk]:
        """A file that pg_dump compressed because the disk is small: once through memory, chunk by chunk."""
        chunks = []
        tail = b""
        for text in gzip_members.chunked(gzip_members.read_file(path)):
            chunk, pieces = gzip_members.compress(text)
            chunks.append(self._pool.add(chunk, pieces))
            tail = (tail + b"".join(text[-2:]))[-_TAIL_BYTES:]
        if tail not in (DATA_END, b"\n" + DATA_END):
            raise FormatError(f"pg_dump left {path.name} without its end mark", "look at the server's log")
        path.unlink()
        return chunks


def _write(descriptor: int, data: bytes, position: int) -> int:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], position + written)
    return written


def _pieces(descriptor: int, offset: int, length: int) -> Iterator[bytes]:
    end = offset + length
    while offset < end:
        piece = os.pread(descriptor, min(gzip_members.PIECE_BYTES, end - offset), offset)
        if not piece:
            raise FormatError("a data file shrank while it was read")
        offset += len(piece)
        yield piece
