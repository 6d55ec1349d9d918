"""Reading from the end: lines, places, parts, and sources that are no files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile, describe, split_lines
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain.artifact import FOOTER_BYTES, TablePart
from pgkeep.errors import FormatError, NotFoundError, StorageError
from tests.attacks import forge

HONEST = forge.build()


class Memory:
    """A source that gives few bytes at a time, as a network may."""

    def __init__(self, data: bytes, at_most: int) -> None:
        self._data = data
        self._at_most = at_most

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + min(length, self._at_most)]


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"a", b"\n")), max_size=12))
def test_lines_are_the_same_wherever_the_text_is_cut(pieces: list[bytes]) -> None:
    text = b"".join(pieces)
    lines = list(split_lines(pieces, 1000))
    assert b"".join(lines) == text
    assert all(line.endswith(b"\n") for line in lines[:-1])
    assert all(line.count(b"\n") == line.endswith(b"\n") for line in lines)
    assert b"" not in lines


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 10), st.integers(1, 7), st.booleans())
def test_a_line_over_the_limit_is_refused_and_none_below(
    lengths: list[int], limit: int, step: int, ended: bool
) -> None:
    text = b"\n".join(b"x" * length for length in lengths) + b"\n" * ended
    pieces = [text[start : start + step] for start in range(0, len(text), step)]
    if max(lengths) > limit:
        with pytest.raises(FormatError, match="longer than"):
            list(split_lines(pieces, limit))
    else:
        assert b"".join(split_lines(pieces, limit)) == text


@pytest.mark.parametrize("at_most", [FOOTER_BYTES, 1000, 1 << 20])
def test_every_part_is_read_from_a_source_that_gives_little(at_most: int) -> None:
    reader = ArtifactReader(Memory(HONEST, at_most))
    texts = [b"".join(reader.text(offset, part)) for offset, part in reader.index.placed()]
    assert b"".join(texts) == gzip.decompress(HONEST[: reader.footer.index_offset])
    assert list(reader.check_content(2)) == []
    assert list(reader.check_digests(2)) == []
    assert reader.toc() == forge.toc()


def test_the_index_names_what_is_there() -> None:
    index = ArtifactReader(Memory(HONEST, 1 << 20)).index
    assert [(table.schema, table.name, table.rows) for table in index.tables] == [
        ("public", "customers", 2),
        ("public", "orders", 3),
        ("shop", "Größe \N{GRINNING FACE}", 0),
    ]
    assert [(part.first, part.objects) for part in index.large_objects] == [(16401, 3)]
    kinds = [describe(part) for part in index.parts if not isinstance(part, TablePart)]
    assert set(kinds) == {"the SQL around the data", "large objects (blobs.toc)", "the archive's contents (toc.dat)"}


def test_only_wanted_parts_are_looked_at() -> None:
    damaged = bytearray(HONEST)
    reader = ArtifactReader(Memory(HONEST, 1 << 20))
    place = next(offset for offset, part in reader.index.placed() if isinstance(part, TablePart) and part.dump_id == 12)
    damaged[place + 12] ^= 1
    reader = ArtifactReader(Memory(bytes(damaged), 1 << 20))
    others = lambda part: not (isinstance(part, TablePart) and part.dump_id == 12)  # noqa: E731
    assert list(reader.check_digests(2, others)) == []
    assert list(reader.check_digests(2)) == [
        f"table public.orders, member 1 at byte {place}: its digest differs from the index"
    ]


def test_a_file_without_contents_has_none() -> None:
    forgery = forge.Forgery.of(HONEST)
    forgery.pieces.pop()
    assert ArtifactReader(Memory(forgery.data(), 1 << 20)).toc() is None


def test_a_source_that_ends_too_early_is_refused() -> None:
    class Shrinking(Memory):
        size_bytes = property(lambda self: len(HONEST))

    with pytest.raises(FormatError):
        ArtifactReader(Shrinking(HONEST[: len(HONEST) // 2], 1 << 20))


@pytest.mark.parametrize("what", ["directory", "fifo", "device", "none"])
def test_only_a_regular_file_is_opened(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path = Path("/dev/zero")
    with pytest.raises(NotFoundError if what == "none" else StorageError):
        LocalFile.open(path)
    with pytest.raises(NotFoundError if what == "none" else FormatError):
        read_sidecar(path, 10)


def test_a_link_is_followed_only_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(HONEST)
    link = tmp_path / "link"
    link.symlink_to("dump")
    with LocalFile.open(link) as file:
        assert file.size_bytes == len(HONEST)
    with pytest.raises(StorageError):
        LocalFile.open(link, follow_link=False)
    with pytest.raises(FormatError, match="not a regular file"):
        read_sidecar(link, 10**6)


def test_a_sidecar_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.sha256"
    path.write_bytes(b"0123456789")
    assert read_sidecar(path, 10) == b"0123456789"
    with pytest.raises(FormatError, match="larger than 9 bytes"):
        read_sidecar(path, 9)
    # A file of proc says that it is empty, and is not.
    with pytest.raises(FormatError, match="larger than 20 bytes"):
        read_sidecar(Path("/proc/self/maps"), 20)
