"""The seekable ``.sql.gz``: what its index and its footer say. ``docs/format.md`` is the specification.

The file is a chain of gzip members whose text, taken together, is a plain SQL dump. The last members
hold SQL comments: pg_dump's ``toc.dat``, the index of everything before it, and a footer of fixed
size that finds the index from the end of the file.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec

from pgkeep.errors import FormatError

VERSION = 1
CHUNK_BYTES = 16 * 1024 * 1024
# A table of 10 TB has 650 000 chunks of about 100 bytes of index each, all on one line.
INDEX_LINE_LIMIT_BYTES = 256 * 1024 * 1024
INDEX_LIMIT_BYTES = 1024 * 1024 * 1024
COMMENT = b"-- "
# pg_dump ends every table's rows with these lines; they are part of NNNN.dat.
DATA_END = b"\\.\n\n\n"
DATA_END_LINES = 3
TRAILER_TEXT = re.compile(rb"^-- PostgreSQL database (cluster )?dump complete$", re.MULTILINE)

# PostgreSQL's encodings by Python's names; what is not here is read as Latin-1, which never fails.
_CODECS = {
    "SQL_ASCII": "utf-8", "UTF8": "utf-8", "LATIN1": "latin-1", "LATIN2": "iso8859-2", "LATIN9": "iso8859-15",
    "WIN1250": "cp1250", "WIN1251": "cp1251", "WIN1252": "cp1252", "KOI8R": "koi8-r", "EUC_JP": "euc_jp",
    "EUC_KR": "euc_kr", "EUC_CN": "gb2312", "EUC_TW": "big5", "EUC_JIS_2004": "euc_jis_2004",
}  # fmt: skip

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Identifier = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_FileName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_]{1,64}\.(dat|toc)\Z")]


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One gzip member: its length in the file, its text's bytes and newlines, the digest of its bytes."""

    length: Annotated[int, msgspec.Meta(ge=18, le=2**32)]
    raw_bytes: Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES)]
    lines: Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Part(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    chunks: tuple[Chunk, ...]

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def raw_bytes(self) -> int:
        return sum(chunk.raw_bytes for chunk in self.chunks)

    @property
    def lines(self) -> int:
        return sum(chunk.lines for chunk in self.chunks)


class SqlPart(_Part, frozen=True, tag="sql"):
    """SQL around the data, as pg_restore wrote it."""


class TablePart(_Part, frozen=True, tag="table", kw_only=True):
    """One table's rows; the members' bytes are exactly the ``NNNN.dat.gz`` of pg_dump's directory."""

    dump_id: _Identifier
    file: _FileName
    schema: str
    name: str
    extension: bool = False
    """True for an extension's configuration table: the extension may have put rows of its own there."""

    @property
    def rows(self) -> int:
        return self.lines - DATA_END_LINES


class LargeObjectsPart(_Part, frozen=True, tag="large_objects", kw_only=True):
    """Large objects as SQL calls; ``file`` is pg_dump's list of them, ``first`` the first one's number."""

    file: _FileName
    first: _Identifier
    objects: Annotated[int, msgspec.Meta(ge=1)]


class TocPart(_Part, frozen=True, tag="toc"):
    """pg_dump's ``toc.dat`` in base64, in SQL comments."""


Part: TypeAlias = SqlPart | TablePart | LargeObjectsPart | TocPart


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The index's first line. ``parts`` counts the lines that follow."""

    pgkeep: Literal["index"] = "index"
    version: int
    content: Literal["database", "globals"]
    encoding: str
    parts: _Count


class Index(msgspec.Struct, frozen=True):
    """All of a file up to the index itself, without gaps, in the file's order."""

    header: Header
    parts: tuple[Part, ...]

    @property
    def tables(self) -> tuple[TablePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, TablePart))

    @property
    def large_objects(self) -> tuple[LargeObjectsPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, LargeObjectsPart))

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    def placed(self) -> Iterator[tuple[int, Part]]:
        """Each part with its offset in the file."""
        offsets = itertools.accumulate((part.length for part in self.parts), initial=0)
        return zip(offsets, self.parts, strict=False)


_T = TypeVar("_T")
_HEADER = msgspec.json.Decoder(Header)
_PART: msgspec.json.Decoder[Part] = msgspec.json.Decoder(Part)


def encode_index(index: Index) -> Iterator[bytes]:
    """The index as lines of SQL comments: the header, then a line a part."""
    yield _encode_line(index.header)
    for part in index.parts:
        yield _encode_line(part)


def decode_index(lines: Iterable[bytes]) -> Index:
    """Read the lines of :func:`encode_index`. Raises ``FormatError``."""
    iterator = iter(lines)
    header = _decode_line(next(iterator, b""), _HEADER, 1)
    if header.version != VERSION:
        raise FormatError(f"index version {header.version} is not known here", "use a newer pgkeep")
    parts = tuple(_decode_line(line, _PART, number) for number, line in enumerate(iterator, 2))
    if len(parts) != header.parts:
        raise FormatError(f"the index promises {header.parts} parts and holds {len(parts)}")
    _check_parts(parts)
    return Index(header, parts)


def _encode_line(value: msgspec.Struct) -> bytes:
    # psql reads comments too, under the dump's own encoding: only ASCII is safe under all of them.
    text = json.dumps(msgspec.to_builtins(value), ensure_ascii=True, separators=(",", ":"))
    return COMMENT + text.encode("ascii") + b"\n"


def _decode_line(line: bytes, decoder: msgspec.json.Decoder[_T], number: int) -> _T:
    if not line.startswith(COMMENT) or not line.endswith(b"\n"):
        raise FormatError(f"line {number} of the index is not an SQL comment")
    try:
        return decoder.decode(line[len(COMMENT) :])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FormatError(f"line {number} of the index is malformed: {error}") from error


def _check_parts(parts: tuple[Part, ...]) -> None:
    files = [part.file for part in parts if isinstance(part, TablePart | LargeObjectsPart)]
    if len(set(files)) != len(files):
        raise FormatError("the index names a data file twice")
    if any(isinstance(part, TocPart) for part in parts[:-1]):
        raise FormatError("the index names the archive's contents (toc.dat) before the end")
    for part in parts:
        if not part.chunks:
            raise FormatError("the index holds a part without a chunk")
        if isinstance(part, TablePart):
            if part.file != f"{part.dump_id}.dat":
                raise FormatError(f"the index gives {part.file} to dump id {part.dump_id}")
            if part.rows < 0:
                raise FormatError(f"the index gives {part.file} less than its end mark")


def codec(encoding: str) -> str:
    """The Python codec for names in a dump of this encoding: for people's eyes, so never a failure."""
    return _CODECS.get(encoding, "latin-1")


def encode_toc(toc: bytes) -> Iterator[bytes]:
    """``toc.dat`` as lines of SQL comments."""
    for start in range(0, len(toc), 3072):
        yield COMMENT + base64.b64encode(toc[start : start + 3072]) + b"\n"


def decode_toc(lines: Iterable[bytes]) -> bytes:
    """The reverse of :func:`encode_toc`. Raises ``FormatError``."""
    decoded = bytearray()
    for line in lines:
        if not line.startswith(COMMENT):
            raise FormatError("the archive's contents (toc.dat) are not in SQL comments")
        try:
            decoded += base64.b64decode(line[len(COMMENT) :].rstrip(b"\n"), validate=True)
        except binascii.Error as error:
            raise FormatError("the archive's contents (toc.dat) are not base64") from error
    return bytes(decoded)


class Footer(msgspec.Struct, frozen=True):
    """Where the index's members lie, and the digest of their bytes."""

    index_offset: int
    index_length: int
    index_sha256: str


_FOOTER = "-- pgkeep-footer 1 index_offset={:019d} index_length={:019d} index_sha256={}\n"
_FOOTER_PATTERN = re.compile(
    rb"-- pgkeep-footer (\d+) index_offset=(\d{19}) index_length=(\d{19}) index_sha256=([0-9a-f]{64})\n"
)
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"


def encode_footer(footer: Footer) -> bytes:
    """The file's last member: one *stored* deflate block, so that its size never varies."""
    text = _FOOTER.format(footer.index_offset, footer.index_length, footer.index_sha256).encode("ascii")
    block = b"\x01" + struct.pack("<HH", len(text), len(text) ^ 0xFFFF) + text
    return _GZIP_HEADER + block + struct.pack("<II", zlib.crc32(text), len(text))


FOOTER_BYTES = len(encode_footer(Footer(0, 0, "0" * 64)))


def decode_footer(tail: bytes, size_bytes: int) -> Footer:
    """Read a file's last ``FOOTER_BYTES`` bytes; ``size_bytes`` is the whole file's. Raises ``FormatError``."""
    match = _FOOTER_PATTERN.search(tail[-FOOTER_BYTES:])
    if match is None:
        hint = "it may be cut short, or not be pgkeep's; gunzip -c FILE | psql restores what is there"
        raise FormatError("the file does not end in a pgkeep footer", hint)
    if match[1] != b"1":
        raise FormatError(f"footer version {match[1].decode()} is not known here", "use a newer pgkeep")
    footer = Footer(int(match[2]), int(match[3]), match[4].decode("ascii"))
    if encode_footer(footer) != tail[-FOOTER_BYTES:]:
        raise FormatError("the footer is damaged")
    if footer.index_offset + footer.index_length + FOOTER_BYTES != size_bytes:
        raise FormatError("the footer does not fit the file's size: something was added or is missing")
    return footer
