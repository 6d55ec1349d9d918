"""Splitting pg_restore's output at the markers, wherever its blocks end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pgkeep.agent import skeleton
from pgkeep.agent.skeleton import Hole, Shadow
from pgkeep.errors import FormatError


@pytest.fixture
def shadow(tmp_path: Path) -> Shadow:
    (tmp_path / "toc.dat").write_bytes(b"PGDMP")
    made = Shadow(tmp_path / "shadow", tmp_path / "toc.dat", ["11.dat", "12.dat"])
    made.add_large_objects("blobs.toc", "16401 blob_16401.dat\n")
    return made


def marker(shadow: Shadow, name: str) -> bytes:
    """What stands in for the file, as pg_restore reads it."""
    return (shadow.directory / name).read_bytes()


def printed(shadow: Shadow, quote: bytes = rb"'\x") -> tuple[bytes, list[bytes | Hole]]:
    """pg_restore's output over this shadow, and what it has to be split into."""
    hexed = marker(shadow, "blob_16401.dat").hex().encode()
    first, second, third, last = (
        b"CREATE TABLE a ();\nCOPY a FROM stdin;\n",
        b"COPY b FROM stdin;\n",
        b"SELECT pg_catalog.lowrite(0, ",
        b"');\n-- PostgreSQL database dump complete\n",
    )
    output = first + marker(shadow, "11.dat") + second + marker(shadow, "12.dat") + third + quote + hexed + last
    wanted: list[bytes | Hole] = [
        first,
        Hole("11.dat"),
        second,
        Hole("12.dat"),
        third + quote,
        Hole("blobs.toc", quote),
        last,
    ]
    return output, wanted


def joined(pieces: list[bytes | Hole]) -> list[bytes | Hole]:
    """Neighbouring pieces of SQL as one."""
    found: list[bytes | Hole] = []
    for piece in pieces:
        if found and isinstance(piece, bytes) and isinstance(found[-1], bytes):
            found[-1] += piece
        elif piece != b"":
            found.append(piece)
    return found


@pytest.mark.parametrize("quote", [rb"'\x", rb"'\\x"])
def test_every_size_of_block_gives_the_same_pieces(
    shadow: Shadow, quote: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, wanted = printed(shadow, quote)
    for block_bytes in range(1, len(output) + 2):
        monkeypatch.setattr(skeleton, "BLOCK_BYTES", block_bytes)
        assert joined(list(shadow.split(io.BytesIO(output)))) == wanted, f"blocks of {block_bytes} bytes"


def test_a_marker_at_every_offset_of_a_block_is_found(shadow: Shadow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "BLOCK_BYTES", 256)
    output, wanted = printed(shadow)
    for padding in range(257):
        assert isinstance(wanted[0], bytes)
        expected: list[bytes | Hole] = [b"-" * padding + wanted[0], *wanted[1:]]
        assert joined(list(shadow.split(io.BytesIO(b"-" * padding + output)))) == expected


def test_a_file_that_was_not_printed_is_an_error(shadow: Shadow) -> None:
    output, _ = printed(shadow)
    with pytest.raises(FormatError, match=r"nothing for 12\.dat"):
        list(shadow.split(io.BytesIO(output.replace(marker(shadow, "12.dat"), b""))))
    with pytest.raises(FormatError, match="nothing for"):
        list(shadow.split(io.BytesIO(b"")))


def test_a_file_that_was_printed_twice_is_an_error(shadow: Shadow) -> None:
    output, _ = printed(shadow)
    with pytest.raises(FormatError, match=r"11\.dat twice"):
        list(shadow.split(io.BytesIO(output + marker(shadow, "11.dat"))))


def test_markers_can_not_be_guessed_and_half_ones_are_sql(shadow: Shadow, tmp_path: Path) -> None:
    again = Shadow(tmp_path / "again", tmp_path / "toc.dat", ["11.dat", "12.dat"])
    assert marker(again, "11.dat") != marker(shadow, "11.dat")
    output, wanted = printed(shadow)
    for decoy in (marker(again, "11.dat"), marker(shadow, "11.dat")[:-2] + b"\n", marker(shadow, "11.dat")[1:]):
        assert joined(list(shadow.split(io.BytesIO(output + decoy)))) == [*wanted[:-1], wanted[-1] + decoy]  # type: ignore[operator]


def test_the_shadow_holds_the_same_contents_and_holds_one_large_object(shadow: Shadow, tmp_path: Path) -> None:
    assert (shadow.directory / "toc.dat").read_bytes() == (tmp_path / "toc.dat").read_bytes()
    assert (shadow.directory / "blobs.toc").read_text() == "16401 blob_16401.dat\n"
    assert sorted(path.name for path in shadow.directory.iterdir()) == [
        "11.dat", "12.dat", "blob_16401.dat", "blobs.toc", "toc.dat",
    ]  # fmt: skip
