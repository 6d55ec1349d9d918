"""A remote file as a local one that fills as it is read: a hole wherever nobody has looked yet."""

from __future__ import annotations

import concurrent.futures
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import RemoteFile
from pgkeep.errors import RefusedError
from pgkeep.progress import Progress
from pgkeep.restore.download import PARALLEL_READS, PIECE_BYTES, read_exactly
from pgkeep.restore.ranges import Range, Ranges, merged, pieces

# Footer, index and pg_dump's table of contents of most databases come with the first request.
TAIL_BYTES: Final = 256 * 1024
# A request costs about as long as so many bytes; all such bytes of one file together stay within the second figure.
_GAP_BYTES: Final = 64 * 1024
_SPARE_BYTES: Final = 256 * 1024
_FULL_HINT: Final = "set TMPDIR to a roomier place"


class SparseCopy:
    """Reads like :class:`pgkeep.adapters.artifact_reader.LocalFile`; what is missing is fetched first, once.

    Several threads may read at once. ``descriptor`` shows what was fetched, and zeros elsewhere.
    """

    is_remote = True

    def __init__(self, remote: RemoteFile, descriptor: int, scratch: Path, progress: Progress) -> None:
        """``scratch`` is where the descriptor's file lies, for messages."""
        self._remote = remote
        self._descriptor = descriptor
        self._scratch = scratch
        self._progress = progress
        self._size_bytes = remote.size_bytes
        self._spare_bytes = _SPARE_BYTES
        self._here = Ranges()
        self._on_its_way = Ranges()
        self._changed = threading.Condition()
        self.fetched_bytes = 0

    @property
    def descriptor(self) -> int:
        return self._descriptor

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Raises ``StorageError``, ``IntegrityError`` (the file ends early at the destination)."""
        end = min(offset + length, self._size_bytes)
        # The first look goes to the end: the index lies there.
        near_end = not self.fetched_bytes and end > self._size_bytes - TAIL_BYTES
        self._have(max(0, min(offset, self._size_bytes - TAIL_BYTES)) if near_end else offset, end)
        return os.pread(self._descriptor, max(0, end - offset), offset)

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Fetch what of these is missing with a few requests at once. Raises as :meth:`read`, ``RefusedError``."""
        wanted = [missing for start, end in ranges for missing in self._missing(start, min(end, self._size_bytes))]
        asked = merged(wanted, _GAP_BYTES, self._spare_bytes)
        total_bytes = _length(asked)
        self._spare_bytes -= total_bytes - _length(wanted)
        self._require_room(total_bytes)
        done_bytes = 0
        with concurrent.futures.ThreadPoolExecutor(PARALLEL_READS) as threads:
            futures = {threads.submit(self._have, *piece): piece for piece in pieces(asked, PIECE_BYTES)}
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    done_bytes += futures[future][1] - futures[future][0]
                    self._progress.advance(done_bytes, total_bytes)
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def release(self, start: int, end: int) -> None:
        """Give the space back; read again, it would be fetched again. Nothing may be reading there."""
        with durable.explain(self._scratch, "giving space back"):
            if durable.punch_hole(self._descriptor, start, end - start):
                with self._changed:
                    self._here.remove(start, end)

    def _missing(self, start: int, end: int) -> list[Range]:
        with self._changed:
            return self._here.missing(start, end)

    def _have(self, start: int, end: int) -> None:
        while claim := self._claim(start, end):
            try:
                self._fetch(*claim)
            finally:
                with self._changed:
                    self._on_its_way.remove(*claim)
                    self._changed.notify_all()

    def _claim(self, start: int, end: int) -> Range | None:
        """A missing range that nobody else is fetching; waits while others fetch all that is missing."""
        with self._changed:
            while missing := self._here.missing(start, end):
                free = [each for gap in missing for each in self._on_its_way.missing(*gap)]
                if free:
                    self._on_its_way.add(*free[0])
                    return free[0]
                self._changed.wait()
        return None

    def _fetch(self, start: int, end: int) -> None:
        for data in read_exactly(self._remote, start, end):
            with durable.explain(self._scratch, "keeping what was fetched"):
                _write_at(self._descriptor, data, start)
            with self._changed:
                self._here.add(start, start + len(data))
                self.fetched_bytes += len(data)
            start += len(data)

    def _require_room(self, needed_bytes: int) -> None:
        free_bytes = durable.free_bytes(self._descriptor)
        if needed_bytes > free_bytes:
            message = f"fetching takes {needed_bytes} bytes; {self._scratch} has {free_bytes} free"
            raise RefusedError(message, _FULL_HINT)


@contextmanager
def sparse_copy(remote: RemoteFile, scratch: Path, progress: Progress) -> Iterator[SparseCopy]:
    """For the block, in a file without a name in ``scratch``: it is gone however the process ends.

    Raises ``StorageError``.
    """
    with tempfile.TemporaryFile(prefix=durable.TEMPORARY_PREFIX, dir=scratch, buffering=0) as file:
        with durable.explain(scratch, "making room for what is fetched"):
            file.truncate(remote.size_bytes)
        yield SparseCopy(remote, file.fileno(), scratch, progress)


def _length(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
