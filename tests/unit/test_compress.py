"""Compressing behind a slow writer: what comes out is what went in, byte for byte, and the space is given back."""

from __future__ import annotations

import gzip
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgkeep.adapters import gzip_members
from pgkeep.agent import compress
from pgkeep.agent.compress import Compressor, Pool, PooledChunk
from pgkeep.domain.artifact import CHUNK_BYTES, DATA_END
from pgkeep.errors import FormatError

SMALL_CHUNK = 4096
SMALL_SEARCH = 256
RANDOM = random.Random(11)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 KiB instead of 16 MiB: every boundary within reach."""
    monkeypatch.setattr(compress, "CHUNK_BYTES", SMALL_CHUNK)
    monkeypatch.setattr(compress, "ROW_SEARCH_BYTES", SMALL_SEARCH)
    monkeypatch.setattr(gzip_members, "CHUNK_BYTES", SMALL_CHUNK)


class Workshop:
    """A directory that a writer fills, and the compressor that empties it."""

    def __init__(self, directory: Path) -> None:
        self.raw = directory / "raw"
        self.raw.mkdir()
        self.pool = Pool(directory / "pool")
        self.compressor = Compressor(self.raw, self.pool, 2)

    def text(self, chunks: list[PooledChunk]) -> bytes:
        """What the pool holds for a file, checked against what is said of every chunk."""
        members = [os.pread(self.pool.descriptor, place.chunk.length, place.offset) for place in chunks]
        texts = [gzip.decompress(member) for member in members]
        assert [(len(text), text.count(b"\n")) for text in texts] == [
            (place.chunk.raw_bytes, place.chunk.lines) for place in chunks
        ]
        return b"".join(texts)

    def finish(self) -> dict[str, bytes]:
        return {name: self.text(chunks) for name, chunks in self.compressor.finish().items()}


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    try:
        with made.compressor:
            yield made
    finally:
        made.pool.close()


def rows(size_bytes: int, row_bytes: int = 60) -> bytes:
    """COPY text of about so many bytes."""
    count = max(1, size_bytes // (row_bytes + 1))
    return b"".join(bytes(RANDOM.choices(b"abcdef\t0123456789", k=row_bytes)) + b"\n" for _ in range(count))


def write_slowly(path: Path, data: bytes, steps: list[int], pause_seconds: float) -> None:
    """As pg_dump's stdio does, but with the ends of its writes wherever they hurt."""
    with path.open("wb", buffering=0) as file:
        position = 0
        for step in steps:
            file.write(data[position : position + step])
            position += step
            time.sleep(pause_seconds)
        file.write(data[position:])


def test_a_slow_writer_is_followed_through_every_pause_in_the_end_mark(small_chunks: None, workshop: Workshop) -> None:
    files = {f"{number}.dat": rows(number * 900) + DATA_END for number in range(1, 13)}

    def steps(data: bytes) -> list[int]:
        start = len(data) - len(DATA_END)
        return [700] * (start // 700) + [start % 700] + [1] * (len(DATA_END) - 1)

    writers = [
        threading.Thread(target=write_slowly, args=(workshop.raw / name, data, steps(data), 0.002))
        for name, data in files.items()
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        workshop.compressor.sweep()
    assert workshop.finish() == files
    assert list(workshop.raw.iterdir()) == []
    assert workshop.compressor.taken_bytes == sum(map(len, files.values()))


def test_a_file_is_gone_as_soon_as_its_end_mark_is_there_and_not_before(small_chunks: None, workshop: Workshop) -> None:
    path = workshop.raw / "7.dat"
    with path.open("wb", buffering=0) as file:
        for byte in rows(100) + DATA_END:
            workshop.compressor.sweep()
            assert path.exists()
            file.write(bytes([byte]))
    workshop.compressor.sweep()
    assert not path.exists()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(
        st.one_of(
            st.integers(0, 80),
            st.integers(SMALL_SEARCH - 2, SMALL_SEARCH + 2),
            st.integers(SMALL_CHUNK - SMALL_SEARCH - 2, SMALL_CHUNK + 2),
            st.integers(2 * SMALL_CHUNK, 3 * SMALL_CHUNK),
        ),
        max_size=12,
    ),
    sweeps=st.lists(st.integers(1, 5000), max_size=12),
)
def test_rows_of_any_length_come_back(
    lengths: list[int],
    sweeps: list[int],
    small_chunks: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = b"".join(b"x" * length + b"\n" for length in lengths) + DATA_END
    workshop = Workshop(tmp_path_factory.mktemp("rows"))
    with workshop.compressor, (workshop.raw / "1.dat").open("wb", buffering=0) as file:
        position = 0
        for step in sweeps:
            file.write(data[position : position + step])
            position += step
            workshop.compressor.sweep()
        file.write(data[position:])
        found = workshop.compressor.finish()
        assert workshop.text(found["1.dat"]) == data
        assert all(0 < place.chunk.raw_bytes <= SMALL_CHUNK for place in found["1.dat"])
    workshop.pool.close()


@pytest.mark.parametrize("extra", range(-2, 3))
def test_sizes_around_a_chunk_come_back(small_chunks: None, workshop: Workshop, extra: int) -> None:
    size = 2 * SMALL_CHUNK + extra - len(DATA_END)
    files = {
        "1.dat": b"x" * (size - 1) + b"\n" + DATA_END,
        "2.dat": b"\n" * size + DATA_END,
    }
    for name, data in files.items():
        (workshop.raw / name).write_bytes(data)
    assert workshop.finish() == files


def test_a_chunk_ends_with_a_row_where_one_ends_near(small_chunks: None, workshop: Workshop) -> None:
    data = rows(10 * SMALL_CHUNK) + DATA_END
    (workshop.raw / "1.dat").write_bytes(data)
    for place in workshop.compressor.finish()["1.dat"]:
        member = os.pread(workshop.pool.descriptor, place.chunk.length, place.offset)
        assert gzip.decompress(member).endswith(b"\n")


@pytest.mark.parametrize(
    "row",
    [
        rb"\\.", rb"a\\.", rb"\\.b", rb"\N", rb"\\", b"", rb"\\.\n\n\n", rb"x\\.\t\\.", b"\\\\.\n\n", b"\\\\.\n\n\n",
    ],
)  # fmt: skip
def test_rows_that_look_like_the_end_mark_do_not_end_a_file(small_chunks: None, workshop: Workshop, row: bytes) -> None:
    r"""pg_dump doubles the backslash of a value ``\.``; rows of one empty text are empty lines."""
    path = workshop.raw / "1.dat"
    data = (row + b"\n") * 3
    with path.open("wb", buffering=0) as file:
        for byte in data:
            file.write(bytes([byte]))
            workshop.compressor.sweep()
            assert path.exists()
        file.write(DATA_END)
    assert workshop.finish() == {"1.dat": data + DATA_END}


def test_many_small_files_and_empty_tables(small_chunks: None, workshop: Workshop) -> None:
    files = {f"{number}.dat": (rows(40) if number % 2 else b"") + DATA_END for number in range(3000, 3400)}
    for number, (name, data) in enumerate(files.items()):
        (workshop.raw / name).write_bytes(data)
        if number % 50 == 0:
            workshop.compressor.sweep()
    assert workshop.finish() == files
    assert list(workshop.raw.iterdir()) == []


def test_real_chunks_a_row_longer_than_two_and_holes_where_they_were(workshop: Workshop) -> None:
    row = bytes(RANDOM.choices(b"0123456789abcdef", k=1 << 16)) * 560
    assert len(row) > 2 * CHUNK_BYTES
    data = rows(1 << 20) + row + b"\n" + rows(1 << 20)
    path = workshop.raw / "1.dat"
    with path.open("wb", buffering=0) as file:
        file.write(data)
        workshop.compressor.sweep()
        deadline = time.monotonic() + 30
        while path.stat().st_blocks * 512 > CHUNK_BYTES and time.monotonic() < deadline:
            time.sleep(0.01)
        freed = len(data) - path.stat().st_blocks * 512
        file.write(DATA_END)
    assert workshop.finish() == {"1.dat": data + DATA_END}
    assert freed >= 2 * (CHUNK_BYTES - compress.ROW_SEARCH_BYTES)


@pytest.mark.parametrize("data", [b"", b"1\tAda\n", b"1\tAda\n" + DATA_END[:-1], DATA_END[1:], b"x" + DATA_END])
def test_a_writer_that_stops_without_the_end_mark_is_an_error(
    small_chunks: None, workshop: Workshop, data: bytes
) -> None:
    (workshop.raw / "3.dat").write_bytes(data)
    with pytest.raises(FormatError, match=r"3\.dat without its end mark"):
        workshop.compressor.finish()


@pytest.mark.parametrize("size", [0, 1, SMALL_CHUNK - 6, SMALL_CHUNK - 5, SMALL_CHUNK - 3, 5 * SMALL_CHUNK])
def test_files_that_pg_dump_compressed_come_back(small_chunks: None, workshop: Workshop, size: int) -> None:
    data = (b"x" * (size - 1) + b"\n" if size else b"") + DATA_END
    (workshop.raw / "9.dat.gz").write_bytes(gzip.compress(data))
    assert workshop.finish() == {"9.dat": data}
    assert list(workshop.raw.iterdir()) == []


@pytest.mark.parametrize(
    "data", [gzip.compress(b"1\n", mtime=0), gzip.compress(b"1\n" + DATA_END, mtime=0)[:-9], b"no gzip", b""]
)
def test_a_broken_one_of_these_is_an_error(small_chunks: None, workshop: Workshop, data: bytes) -> None:
    (workshop.raw / "9.dat.gz").write_bytes(data)
    with pytest.raises(FormatError, match=r"9\.dat"):
        workshop.compressor.finish()


def test_only_data_files_are_touched(small_chunks: None, workshop: Workshop) -> None:
    others = ("toc.dat", "blobs.toc", "blob_16401.dat", "1.dat.tmp", "x1.dat", "12345678901.dat", "١.dat")
    for name in others:
        (workshop.raw / name).write_bytes(DATA_END)
    assert workshop.finish() == {}
    assert sorted(path.name for path in workshop.raw.iterdir()) == sorted(others)


def test_a_link_among_the_data_is_not_followed(small_chunks: None, workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(DATA_END)
    (workshop.raw / "1.dat").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        workshop.compressor.sweep()
    assert (tmp_path / "precious").read_bytes() == DATA_END


def test_a_failure_of_a_thread_surfaces_and_leaves_no_descriptor_open(tmp_path: Path, small_chunks: None) -> None:
    before = set(os.listdir("/proc/self/fd"))
    workshop = Workshop(tmp_path)
    (workshop.raw / "1.dat").write_bytes(rows(100 * SMALL_CHUNK))
    workshop.pool.close()
    workshop.pool.descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"), workshop.compressor:
        workshop.compressor.sweep()
    workshop.pool.close()
    assert set(os.listdir("/proc/self/fd")) == before
