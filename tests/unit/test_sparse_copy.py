"""The copy that fills as it is read: the right bytes whatever is asked for, and no more of them than that takes."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.adapters import durable
from pgkeep.errors import FormatError, IntegrityError, RefusedError, StorageError
from pgkeep.progress import Silent
from pgkeep.restore import download, sparse
from pgkeep.restore.ranges import Range, Ranges, merged, pieces
from pgkeep.restore.sparse import TAIL_BYTES, SparseCopy, sparse_copy

SMALL = 400
ranges_within = st.tuples(st.integers(0, SMALL), st.integers(0, SMALL)).map(sorted).map(tuple)
KIB = 1024


class Counting:
    """A remote file in memory that keeps count. ``at_most``: what a read gives; ``fails``: how many reads fail."""

    def __init__(self, data: bytes, at_most: int = 1 << 30) -> None:
        self._data = data
        self._at_most = at_most
        self._lock = threading.Lock()
        self.reads: list[Range] = []
        self.fails = 0
        self.ends_at = len(data)

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    @property
    def given_bytes(self) -> int:
        return sum(end - start for start, end in self.reads)

    def read(self, offset: int, length: int) -> bytes:
        assert length > 0
        with self._lock:
            if self.fails:
                self.fails -= 1
                raise StorageError("the server is away")
            data = self._data[offset : min(offset + min(length, self._at_most), self.ends_at)]
            self.reads.append((offset, offset + len(data)))
        return data


@contextmanager
def filling(remote: Counting, scratch: Path | None = None) -> Iterator[SparseCopy]:
    with sparse_copy(remote, scratch or Path(tempfile.gettempdir()), Silent()) as file:
        yield file


# ---------------------------------------------------------------- ranges


@given(st.lists(st.tuples(st.booleans(), ranges_within)), ranges_within)
def test_a_set_of_ranges_is_a_set_of_bytes(changes: list[tuple[bool, Range]], asked: Range) -> None:
    kept, expected = Ranges(), set[int]()
    for is_added, (start, end) in changes:
        (kept.add if is_added else kept.remove)(start, end)
        expected = expected | set(range(start, end)) if is_added else expected - set(range(start, end))
    found = list(kept)
    assert [byte for start, end in found for byte in range(start, end)] == sorted(expected)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found)), "they neither touch"
    missing = kept.missing(*asked)
    assert [byte for start, end in missing for byte in range(start, end)] == sorted(set(range(*asked)) - expected)


@given(st.lists(ranges_within), st.integers(0, 50), st.integers(0, 100))
def test_merging_adds_gaps_within_bounds_only(wanted: list[Range], gap_bytes: int, spare_bytes: int) -> None:
    asked = merged(wanted, gap_bytes, spare_bytes)
    needed = {byte for start, end in wanted for byte in range(start, end)}
    taken = [byte for start, end in asked for byte in range(start, end)]
    assert len(taken) == len(set(taken))
    assert needed <= set(taken)
    assert len(taken) - len(needed) <= spare_bytes
    between = [after[0] - before[1] for before, after in itertools.pairwise(asked)]
    assert all(gap > 0 for gap in between)


def test_neighbours_become_one_request() -> None:
    assert merged([(0, 10), (10, 20), (25, 30), (90, 95)], 5, 100) == [(0, 30), (90, 95)]
    assert merged([(0, 10), (15, 20), (25, 30)], 5, 5) == [(0, 20), (25, 30)]
    assert list(pieces([(0, 25), (30, 31)], 10)) == [(0, 10), (10, 20), (20, 25), (30, 31)]


# ---------------------------------------------------------------- the copy


@given(
    st.integers(0, SMALL),
    st.lists(st.one_of(ranges_within, st.lists(ranges_within, max_size=4)), max_size=8),
    st.integers(1, 60),
    st.integers(0, 60),
)
def test_any_sequence_of_reads_gives_the_bytes_and_fetches_each_once(
    size: int, looks: list[Range | list[Range]], at_most: int, tail: int
) -> None:
    data = random.Random(size).randbytes(size)
    remote = Counting(data, at_most)
    with pytest.MonkeyPatch.context() as patch, filling(remote) as file:
        patch.setattr(sparse, "TAIL_BYTES", tail)
        patch.setattr(sparse, "_GAP_BYTES", 3)
        patch.setattr(sparse, "_SPARE_BYTES", 10)
        needed = set[int]()
        for look in looks:
            if isinstance(look, list):
                file.prefetch(look)
            else:
                assert file.read(look[0], look[1] - look[0]) == data[look[0] : look[1]]
            for start, end in look if isinstance(look, list) else [look]:
                needed |= set(range(start, min(end, size)))
        assert file.fetched_bytes == remote.given_bytes <= len(needed) + tail + 10
        given_twice = [byte for start, end in remote.reads for byte in range(start, end)]
        assert len(given_twice) == len(set(given_twice)), "a byte came twice"


def test_bytes_that_nobody_asked_for_stay_within_the_bound(scratch: Path) -> None:
    """10 000 small wanted ranges with small gaps: a request each would take for ever, all in one too much."""
    data = os.urandom(12 << 20)
    remote = Counting(data)
    wanted = [(start, start + 600) for start in range(0, 10 << 20, 1000)]
    with filling(remote, scratch) as file:
        file.read(len(data) - 200, 200)
        file.prefetch(wanted)
        assert all(file.read(start, 600) == data[start : start + 600] for start, _ in wanted)
        fetched = remote.given_bytes
    needed = 600 * len(wanted)
    assert fetched <= needed + TAIL_BYTES + 256 * KIB
    assert len(remote.reads) < len(wanted)


def test_the_first_look_at_the_end_brings_what_lies_before_it() -> None:
    remote = Counting(os.urandom(3 * TAIL_BYTES))
    with filling(remote) as file:
        file.read(file.size_bytes - 186, 186)
        file.read(file.size_bytes - TAIL_BYTES, TAIL_BYTES // 2)
    assert remote.reads == [(2 * TAIL_BYTES, 3 * TAIL_BYTES)]


def test_a_look_elsewhere_first_brings_no_more_than_that() -> None:
    remote = Counting(os.urandom(3 * TAIL_BYTES))
    with filling(remote) as file:
        file.read(0, 32)
    assert remote.reads == [(0, 32)]


def test_threads_that_read_the_same_fetch_it_once(scratch: Path) -> None:
    data = os.urandom(1 << 20)
    remote = Counting(data, at_most=5000)
    with filling(remote, scratch) as file, concurrent.futures.ThreadPoolExecutor(8) as threads:
        looks = [(random.Random(n).randrange(1 << 20), 100_000) for n in range(64)]
        found = threads.map(lambda look: file.read(*look), looks)
        assert all(got == data[at : at + length] for got, (at, length) in zip(found, looks, strict=True))
    assert remote.given_bytes <= len(data)


def test_what_is_released_takes_no_space_and_comes_again(scratch: Path) -> None:
    data = os.urandom(4 << 20)
    remote = Counting(data)
    with filling(remote, scratch) as file:
        file.prefetch([(0, len(data))])
        os.fsync(file.descriptor)
        before = os.fstat(file.descriptor).st_blocks
        file.release(0, 3 << 20)
        assert os.fstat(file.descriptor).st_blocks <= before - (2 << 20) // 512
        assert file.read(1000, 5000) == data[1000:6000]


def test_the_descriptor_holds_what_was_prefetched(scratch: Path) -> None:
    data = os.urandom(100_000)
    with filling(Counting(data), scratch) as file:
        file.prefetch([(50, 70), (500, 900)])
        assert os.pread(file.descriptor, 400, 500) == data[500:900]
        assert os.fstat(file.descriptor).st_size == len(data)


def test_a_read_that_failed_can_be_tried_again() -> None:
    remote = Counting(b"x" * 100)
    remote.fails = 1
    with filling(remote) as file:
        with pytest.raises(StorageError, match="the server is away"):
            file.read(0, 10)
        assert file.read(0, 10) == b"x" * 10


def test_one_failing_request_ends_a_prefetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "PIECE_BYTES", 10)
    remote = Counting(b"x" * 1000)
    remote.fails = 1
    with filling(remote) as file, pytest.raises(StorageError, match="the server is away"):
        file.prefetch([(0, 1000)])


def test_a_file_that_ends_early_is_named_as_that() -> None:
    remote = Counting(b"x" * 1000)
    remote.ends_at = 500
    with filling(remote) as file:
        assert file.read(0, 100) == b"x" * 100
        with pytest.raises(IntegrityError, match="ends at byte 500"):
            file.prefetch([(100, 1000)])


def test_a_server_that_sends_more_than_asked_for_is_not_believed() -> None:
    class Generous(Counting):
        def read(self, offset: int, length: int) -> bytes:
            return super().read(offset, length) + b"\xff" * 50

    with filling(Generous(b"x" * 300)) as file:
        assert file.read(100, 10) == b"x" * 10
        assert file.read(110, 50) == b"x" * 50
    assert b"".join(download.in_order(Generous(b"y" * 300), 0, 300)) == b"y" * 300


def test_a_full_disk_is_known_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda _: 999)
    remote = Counting(b"x" * 1000)
    with filling(remote) as file, pytest.raises(RefusedError, match="takes 1000 bytes"):
        file.prefetch([(0, 1000)])
    assert remote.reads == []


def test_in_order_gives_all_of_it_and_stops_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PIECE_BYTES", 1000)
    data = os.urandom(50_500)
    remote = Counting(data, at_most=300)
    assert b"".join(download.in_order(remote, 700, len(data))) == data[700:]
    early = Counting(data)
    stream = download.in_order(early, 0, len(data))
    assert next(stream) == data[:1000]
    stream.close()
    assert early.given_bytes <= (download.PARALLEL_READS + 2) * 1000


def test_errors_of_other_kinds_pass_through() -> None:
    class Refusing(Counting):
        def read(self, offset: int, length: int) -> bytes:
            raise FormatError("no regular file")

    with filling(Refusing(b"x")) as file, pytest.raises(FormatError):
        file.read(0, 1)
