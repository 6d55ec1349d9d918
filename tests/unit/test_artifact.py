"""The index, the table of contents and the footer: what is written is read back, and nothing else is."""

from __future__ import annotations

import gzip
import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.domain import artifact, large_objects, manifest
from pgkeep.domain.artifact import (
    CHUNK_BYTES,
    DATA_END_LINES,
    FOOTER_BYTES,
    Chunk,
    Footer,
    Header,
    Index,
    LargeObjectsPart,
    Part,
    SqlPart,
    TablePart,
    TocPart,
    decode_footer,
    decode_index,
    decode_toc,
    encode_footer,
    encode_index,
    encode_toc,
)
from pgkeep.errors import FormatError
from pgkeep.vault.inspect import inspect
from tests.attacks import forge

FROZEN_FOOTER = "4dd4d34eb8cb26fea9426c1c83ca478cf5316ff570a21f144b8f346b5db8a490"
# A real dump by PostgreSQL 15, as the first pgkeep wrote it: never to be changed.
VERSION_1 = Path(__file__).with_name("version1.sql.gz")
SPECIFICATION = Path(__file__).parents[2] / "docs" / "format.md"

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
# As toc.dat's texts come out: never half a character.
names = st.text(st.characters(codec="utf-8"), max_size=80)
chunks = st.builds(
    Chunk,
    length=st.integers(18, 2**32),
    raw_bytes=st.integers(0, CHUNK_BYTES),
    lines=st.integers(DATA_END_LINES, CHUNK_BYTES),
    sha256=digests,
)
chunk_runs = st.lists(chunks, min_size=1, max_size=3).map(tuple)
identifiers = st.integers(0, 2**32 - 1)


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    parts: list[Part] = [SqlPart(chunks=draw(chunk_runs))]
    for dump_id in draw(st.lists(identifiers, unique=True, max_size=4)):
        parts.append(
            TablePart(
                chunks=draw(chunk_runs),
                dump_id=dump_id,
                file=f"{dump_id}.dat",
                schema=draw(names),
                name=draw(names),
                extension=draw(st.booleans()),
            )
        )
    for number in draw(st.lists(identifiers, unique=True, max_size=2)):
        parts.append(
            LargeObjectsPart(
                chunks=draw(chunk_runs),
                file=f"blobs_{number}.toc",
                first=draw(identifiers),
                objects=draw(st.integers(1, 2**32)),
            )
        )
    if draw(st.booleans()):
        parts.append(TocPart(chunks=draw(chunk_runs)))
    header = Header(version=1, content="database", encoding=draw(names.map(lambda t: t[:64])), parts=len(parts))
    return Index(header, tuple(parts))


@given(indexes())
def test_an_index_is_read_back_as_it_was_written(index: Index) -> None:
    lines = list(encode_index(index))
    assert decode_index(lines, index.length) == index
    assert all(line.isascii() and line.startswith(b"-- ") and line.count(b"\n") == 1 for line in lines)
    assert len(lines) == 1 + len(index.parts)


@given(indexes())
def test_offsets_run_without_a_gap(index: Index) -> None:
    end = 0
    for offset, part in index.placed():
        assert offset == end
        end += part.length
    assert end == index.length


@given(indexes(), st.integers(1, 2**40))
def test_an_index_for_another_number_of_bytes_is_refused(index: Index, off: int) -> None:
    for data_bytes in (index.length + off, index.length - min(off, index.length)):
        with pytest.raises(FormatError):
            decode_index(encode_index(index), data_bytes)


@given(indexes(), st.data())
def test_a_line_less_or_twice_is_refused(index: Index, data: st.DataObject) -> None:
    lines = list(encode_index(index))
    number = data.draw(st.integers(0, len(lines) - 1))
    for wrong in (lines[:number] + lines[number + 1 :], [*lines, lines[number]]):
        with pytest.raises(FormatError):
            decode_index(wrong, index.length)


def test_no_index_at_all_is_refused() -> None:
    with pytest.raises(FormatError, match="line 1 of the index"):
        decode_index([], 0)


def test_a_newer_version_is_told_by_its_number() -> None:
    header = Header(version=7, content="database", encoding="UTF8", parts=0)
    with pytest.raises(FormatError, match="version 7") as caught:
        decode_index(encode_index(Index(header, ())), 0)
    assert caught.value.hint == "use a newer pgkeep"


def test_the_worst_honest_index_is_within_the_limit_for_its_bytes() -> None:
    """Empty tables with the longest names that PostgreSQL and JSON can make of 63 bytes."""
    name = "\x01" * 63
    member = len(gzip.compress(artifact.DATA_END))
    table = TablePart(
        chunks=(Chunk(member, 5, 3, "0" * 64),), dump_id=2**32 - 1, file="4294967295.dat", schema=name, name=name
    )
    # No COPY statement is shorter than this, and each is compressed by itself.
    sql = SqlPart(chunks=(Chunk(len(gzip.compress(b'COPY "a"."b" FROM stdin;\n')), 25, 1, "0" * 64),))
    parts = (sql, table) * 1000
    index = Index(Header(version=1, content="database", encoding="UTF8", parts=len(parts)), parts)
    assert sum(map(len, encode_index(index))) < artifact.index_limit_bytes(index.length)


@given(st.binary(max_size=20_000))
def test_contents_are_read_back_as_they_were_written(toc: bytes) -> None:
    lines = list(encode_toc(toc))
    assert decode_toc(lines) == toc
    assert all(line.startswith(b"-- ") and len(line) <= artifact.TOC_LINE_LIMIT_BYTES for line in lines)


@pytest.mark.parametrize(
    "line", [b"AAAA\n", b"-- A\n", b"-- AA$A\n", b"-- AAAA AAAA\n", b"--AAAA\n", b"-- \xff\xff\xff\xff\n"]
)
def test_contents_that_are_not_base64_in_comments_are_refused(line: bytes) -> None:
    with pytest.raises(FormatError):
        decode_toc([line])


footers = st.builds(
    Footer, index_offset=st.integers(0, 2**62), index_length=st.integers(0, 2**62), index_sha256=digests
)


@given(footers, st.binary(max_size=300))
def test_a_footer_is_read_back_from_the_end_of_any_file(footer: Footer, before: bytes) -> None:
    encoded = encode_footer(footer)
    assert len(encoded) == FOOTER_BYTES
    size_bytes = footer.index_offset + footer.index_length + FOOTER_BYTES
    assert decode_footer(before + encoded, size_bytes) == footer
    assert gzip.decompress(encoded).startswith(b"-- pgkeep-footer 1 ")
    assert gzip.decompress(encoded).count(b"\n") == 1


@given(footers, st.integers(0, FOOTER_BYTES - 1), st.integers(1, 255))
def test_a_flipped_byte_of_the_footer_is_refused(footer: Footer, position: int, flip: int) -> None:
    damaged = bytearray(encode_footer(footer))
    damaged[position] ^= flip
    with pytest.raises(FormatError):
        decode_footer(bytes(damaged), footer.index_offset + footer.index_length + FOOTER_BYTES)


@given(footers, st.integers(-100, 100).filter(bool))
def test_a_footer_in_a_file_of_another_size_is_refused(footer: Footer, more: int) -> None:
    with pytest.raises(FormatError, match="does not fit"):
        decode_footer(encode_footer(footer), footer.index_offset + footer.index_length + FOOTER_BYTES + more)


@given(st.binary(max_size=400))
def test_noise_is_no_footer(noise: bytes) -> None:
    with pytest.raises(FormatError):
        decode_footer(noise, len(noise))


def test_the_footer_is_the_same_for_ever() -> None:
    """Version 1 as published: a file of today must open with every later reader."""
    encoded = encode_footer(Footer(1234, 567, "ab" * 32))
    assert FOOTER_BYTES == 186
    assert hashlib.sha256(encoded).hexdigest() == FROZEN_FOOTER
    text = f"-- pgkeep-footer 1 index_offset={1234:019d} index_length={567:019d} index_sha256={'ab' * 32}\n"
    assert gzip.decompress(encoded) == text.encode()


def test_a_line_of_the_index_is_the_same_for_ever() -> None:
    part = TablePart(chunks=(Chunk(20, 5, 3, "c" * 64),), dump_id=9, file="9.dat", schema="public", name="ü")
    assert list(encode_index(Index(Header(version=1, content="database", encoding="UTF8", parts=1), (part,)))) == [
        b'-- {"pgkeep":"index","version":1,"content":"database","encoding":"UTF8","parts":1}\n',
        b'-- {"kind":"table","chunks":[[20,5,3,"' + b"c" * 64 + b'"]],"dump_id":9,"file":"9.dat",'
        b'"schema":"public","name":"\\u00fc","extension":false}\n',
    ]


@pytest.mark.parametrize("encoding", ["UTF8", "SQL_ASCII", "EUC_JIS_2004", "MULE_INTERNAL", "", "\0", "../x", "x" * 64])
def test_any_encoding_has_a_codec(encoding: str) -> None:
    assert b"abc".decode(artifact.codec(encoding)) == "abc"


@pytest.mark.parametrize(
    ("head", "words"),
    [(b"", "it is empty"), (b"\x1f\x8b\x08", "gunzip"), (b"PGDMP", "pg_restore"), (b"MZ", "no dump that is known")],
)
def test_strange_files_are_told_apart_by_their_first_bytes(head: bytes, words: str) -> None:
    assert words in artifact.foreign_hint(head)


def test_parts_can_not_be_changed() -> None:
    with pytest.raises(AttributeError):
        Chunk(20, 5, 3, "c" * 64).length = 1  # type: ignore[misc]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert([17, 5, 3, "c" * 64], Chunk)


def _specified_reader() -> dict[str, Any]:
    """The reader that docs/format.md gives, as it stands there."""
    (source,) = re.findall(
        r"^```python\n(.*?)^```$", SPECIFICATION.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    names: dict[str, Any] = {"__name__": "specified"}
    exec(compile(source, str(SPECIFICATION), "exec"), names)
    return names


def test_the_reader_in_the_specification_reads_a_real_dump() -> None:
    with warnings.catch_warnings():
        # It leaves closing its file to the end of the process.
        warnings.simplefilter("ignore", ResourceWarning)
        found = list(_specified_reader()["read_artifact"](VERSION_1))
    assert found == [("public", "fruit", b"1\tapple\n2\tpear\n3\t\\N\n")]


def test_the_reader_in_the_specification_reads_what_is_written_today_and_sees_damage(tmp_path: Path) -> None:
    read = _specified_reader()["read_artifact"]
    path = tmp_path / "new.sql.gz"
    data = forge.build()
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert [(s, n, t) for s, n, t in read(path)] == [(t.schema, t.name, b"".join(t.pieces)) for t in forge.TABLES]
        path.write_bytes(data[:400] + bytes([data[400] ^ 1]) + data[401:])
        with pytest.raises(AssertionError, match="damaged at byte"):
            list(read(path))


_HEX_LINE = re.compile(r"^([0-9a-f]{2}(?: {1,2}[0-9a-f]{2})+)(?: {3,}| …|$)", re.MULTILINE)


def test_the_specification_shows_the_real_bytes() -> None:
    """Every line of hex in the worked example, and the index, are those of the file."""
    data = VERSION_1.read_bytes()
    shown = SPECIFICATION.read_text(encoding="utf-8").split("## 2. A worked example")[1].split("## 3.")[0]
    lines = [bytes.fromhex(line) for line in _HEX_LINE.findall(shown)]
    assert len(lines) == 8
    assert b"".join(lines[:4]) == data[603:648]
    assert all(line in data[-FOOTER_BYTES:] for line in lines[4:])
    footer = decode_footer(data[-FOOTER_BYTES:], len(data))
    assert gzip.decompress(data[footer.index_offset : -FOOTER_BYTES]).decode() in shown
    places = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+) \| (\d+) \|", shown, re.MULTILINE)]
    assert [start + length for start, length in places] == [*(start for start, _ in places[1:]), len(data)]


def test_a_real_file_of_version_1_is_whole_for_ever() -> None:
    with LocalFile.open(VERSION_1) as file:
        found = inspect(file, "content")
    assert found.defects == ()
    assert found.sha256 == "e797dee2b845ff012bab3f9ce57caf9c08784ebd3380d9627bc3f5ce8ebe4502"
    assert found.contents is not None
    assert [(table.name, table.rows) for table in found.contents.tables] == [("fruit", 3)]


def test_the_specification_names_the_limits_that_hold() -> None:
    text = SPECIFICATION.read_text(encoding="utf-8")
    for words in (
        f"last **{FOOTER_BYTES}** bytes",
        f"**{CHUNK_BYTES:,}**".replace(",", " "),
        f"{artifact.INDEX_LIMIT_BYTES >> 20} MiB; and {artifact.INDEX_LEAST_LIMIT_BYTES >> 10} KiB"
        f" + {artifact.INDEX_BYTES_PER_BYTE} × `index_offset`",
        f"a line of the index | {artifact.INDEX_LINE_LIMIT_BYTES >> 20} MiB",
        f"{artifact.TOC_LIMIT_BYTES >> 30} GiB; a line of it {artifact.TOC_LINE_LIMIT_BYTES}",
        f"a line of large objects | {large_objects.LINE_LIMIT_BYTES:,}".replace(",", " "),
        f"at most {large_objects.WRITE_BYTES:,} bytes".replace(",", " "),
        f"at most {manifest.SIZE_LIMIT_BYTES >> 20} MiB",
    ):
        assert words in text, words
