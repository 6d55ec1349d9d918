"""Members in memory, with isal's codec and with the standard library's: the same behaviour, within the same limits."""

from __future__ import annotations

import gzip
import importlib.util
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgkeep.adapters import gzip_members
from pgkeep.domain.artifact import CHUNK_BYTES, Chunk
from pgkeep.errors import FormatError
from tests.attacks import forge

PIECE = gzip_members.PIECE_BYTES
# Incompressible, so that compressed blocks have the sizes of their texts.
NOISE = random.Random(7).randbytes(2 * PIECE + 3)


def _without_isal() -> ModuleType:
    """The module as it is where isal has no wheel."""
    blocked = {name: sys.modules.get(name) for name in ("isal", "isal.igzip", "isal.isal_zlib")}
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]
    try:
        spec = importlib.util.spec_from_file_location("gzip_members_without_isal", gzip_members.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        for name, known in blocked.items():
            if known is None:
                del sys.modules[name]
            else:
                sys.modules[name] = known


@pytest.fixture(params=["isal", "zlib"], scope="module")
def members(request: pytest.FixtureRequest) -> ModuleType:
    chosen = gzip_members if request.param == "isal" else _without_isal()
    assert (chosen._codec is zlib) == (request.param == "zlib")
    return chosen


def _member(members: ModuleType, text: bytes) -> tuple[Chunk, bytes]:
    chunk, output = members.compress([text])
    return chunk, b"".join(output)


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 3])
@pytest.mark.parametrize("filler", ["noise", "zeros", "newlines"])
def test_texts_of_every_critical_size_come_back(members: ModuleType, size: int, filler: str) -> None:
    text = {"noise": NOISE[:size], "zeros": b"\0" * size, "newlines": b"\n" * size}[filler]
    chunk, data = _member(members, text)
    assert chunk == forge.describe(data, text)
    assert gzip.decompress(data) == text
    pieces = list(members.decompress(chunk, forge.reader_of(data)))
    assert b"".join(pieces) == text
    assert max(map(len, pieces), default=0) <= PIECE
    assert b"".join(members.decompress_all([data], size)) == text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.binary(max_size=300), max_size=6), step=st.integers(1, 40))
def test_a_chain_read_in_crumbs_comes_back(members: ModuleType, texts: list[bytes], step: int) -> None:
    """Member's ends fall everywhere: into a block, onto its end, several into one block."""
    data = b"".join(gzip.compress(text) for text in texts) or gzip.compress(b"")
    blocks = (data[start : start + step] for start in range(0, len(data), step))
    assert b"".join(members.decompress_all(blocks, 10_000)) == b"".join(texts)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(max_size=200), max_size=8))
def test_pieces_make_the_same_member_text(members: ModuleType, pieces: list[bytes]) -> None:
    chunk, output = members.compress(pieces)
    text = b"".join(pieces)
    assert chunk == forge.describe(b"".join(output), text)
    assert b"".join(members.decompress(chunk, forge.reader_of(b"".join(output)))) == text


def test_a_read_that_stops_short_is_gone_on_with(members: ModuleType) -> None:
    chunk, data = _member(members, NOISE)
    read = forge.reader_of(data)
    assert b"".join(members.decompress(chunk, lambda length: read(min(length, 777)))) == NOISE


def _wrong(chunk: Chunk, **fields: int | str) -> Chunk:
    known = {"length": chunk.length, "raw_bytes": chunk.raw_bytes, "lines": chunk.lines, "sha256": chunk.sha256}
    return Chunk(**{**known, **fields})  # type: ignore[arg-type]


def test_everything_that_differs_from_the_index_is_refused(members: ModuleType) -> None:
    chunk, data = _member(members, b"one\ntwo\n")
    longer = data + data
    for wrong in (
        _wrong(chunk, raw_bytes=7), _wrong(chunk, raw_bytes=9), _wrong(chunk, lines=1), _wrong(chunk, sha256="0" * 64),
        _wrong(chunk, length=chunk.length - 1), _wrong(chunk, length=chunk.length + 1),
        _wrong(chunk, length=len(longer)),
    ):  # fmt: skip
        with pytest.raises(FormatError):
            list(members.decompress(wrong, forge.reader_of(longer)))
    with pytest.raises(FormatError, match="ends in the middle"):
        list(members.decompress(chunk, forge.reader_of(data[:-1])))


@pytest.mark.parametrize("text", [b"one\ntwo\n" * 50, b""])
def test_every_truncation_and_every_flip_is_refused(members: ModuleType, text: bytes) -> None:
    chunk, data = _member(members, text)
    for position in range(len(data)):
        with pytest.raises(FormatError):
            list(members.decompress_all([data[:position]], 1000))
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(FormatError):
            list(members.decompress(chunk, forge.reader_of(bytes(damaged))))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200), magic=st.booleans())
def test_noise_is_refused_or_read_but_never_hangs(members: ModuleType, noise: bytes, magic: bool) -> None:
    data = (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" if magic else b"") + noise
    try:
        text = b"".join(members.decompress_all([data], 1000))
    except FormatError:
        return
    assert gzip.decompress(data) == text


def test_a_bomb_is_refused_before_it_unfolds(members: ModuleType) -> None:
    bomb = forge.zeros_member(64 << 20)
    taken = [0]

    def drain(pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            taken[0] += len(piece)

    with pytest.raises(FormatError, match="more than 5000000 bytes"):
        drain(members.decompress_all([bomb], 5_000_000))
    assert taken[0] <= 5_000_000
    chunk = _wrong(forge.describe(bomb, b""), raw_bytes=CHUNK_BYTES)
    taken[0] = 0
    with pytest.raises(FormatError, match="more than the index says"):
        drain(members.decompress(chunk, forge.reader_of(bomb)))
    assert taken[0] <= CHUNK_BYTES


def test_zeros_after_a_member_are_refused(members: ModuleType) -> None:
    """gzip's own tool forgives padding; in an artifact nothing may hide."""
    with pytest.raises(FormatError):
        list(members.decompress_all([gzip.compress(b"text"), b"\0" * 50], 1000))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 40), max_size=12))
def test_grouping_loses_nothing_and_fills_every_chunk(
    members: ModuleType, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(members, "CHUNK_BYTES", 16)
        data = random.Random(len(sizes)).randbytes(sum(sizes))
        groups = [b"".join(group) for group in members.chunked(_cut(data, sizes))]
    assert b"".join(groups) == data
    assert all(len(group) == 16 for group in groups[:-1])
    assert all(0 < len(group) <= 16 for group in groups)


def _cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    position = 0
    for size in sizes:
        yield data[position : position + size]
        position += size


def test_a_file_is_read_whole_and_a_broken_one_refused(members: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "12.dat.gz"
    path.write_bytes(gzip.compress(NOISE[:PIECE]) + gzip.compress(NOISE[PIECE:]))
    assert b"".join(members.read_file(path)) == NOISE
    for data in (path.read_bytes()[:-1], b"no gzip at all", path.read_bytes() + b"more"):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"12\.dat\.gz"):
            list(members.read_file(path))
