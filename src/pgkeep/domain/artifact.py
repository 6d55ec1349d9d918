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
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec

from pgkeep.errors import FormatError

VERSION = 1
CHUNK_BYTES = 16 * 1024 * 1024
# A table of 10 TB has 650 000 chunks of about 100 bytes of index each, all on one line.
INDEX_LINE_LIMIT_BYTES = 128 * 1024 * 1024
INDEX_LIMIT_BYTES = 512 * 1024 * 1024
# A member of 20 bytes can have an entry of 100 bytes, a table of 60 bytes a line of 900: small files, small indexes.
INDEX_BYTES_PER_BYTE = 32
INDEX_LEAST_LIMIT_BYTES = 64 * 1024
# As text: a million entries of pg_dump's table of contents, with what belongs to them.
TOC_LIMIT_BYTES = 1024 * 1024 * 1024
_TOC_LINE_BYTES = 3072
TOC_LINE_LIMIT_BYTES = 8192
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
# These become files beside toc.dat: nothing but pg_dump's own two patterns.
_DataFile = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,10}\.dat\Z")]
_ListFile = Annotated[str, msgspec.Meta(pattern=r"\Ablobs(_[0-9]{1,10})?\.toc\Z")]
_Name = Annotated[str, msgspec.Meta(max_length=1024)]


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
    file: _DataFile
    schema: _Name
    name: _Name
    extension: bool = False
    """True for an extension's configuration table: the extension may have put rows of its own there."""

    @property
    def rows(self) -> int:
        return self.lines - DATA_END_LINES


class LargeObjectsPart(_Part, frozen=True, tag="large_objects", kw_only=True):
    """Large objects as SQL calls; ``file`` is pg_dump's list of them, ``first`` the first one's number."""

    file: _ListFile
    first: _Identifier
    objects: Annotated[int, msgspec.Meta(ge=1, le=2**32)]


class TocPart(_Part, frozen=True, tag="toc"):
    """pg_dump's ``toc.dat`` in base64, in SQL comments."""


Part: TypeAlias = SqlPart | TablePart | LargeObjectsPart | TocPart


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The index's first line. ``parts`` counts the lines that follow."""

    pgkeep: Literal["index"] = "index"
    version: int
    content: Literal["database", "globals"]
    encoding: Annotated[str, msgspec.Meta(max_length=64)]
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


def index_limit_bytes(data_bytes: int) -> int:
    """How much text an index of so many bytes of file may have: a small file can't claim to be a large one."""
    return min(INDEX_LIMIT_BYTES, INDEX_LEAST_LIMIT_BYTES + data_bytes * INDEX_BYTES_PER_BYTE)


def decode_index(lines: Iterable[bytes], data_bytes: int) -> Index:
    """Read the lines of :func:`encode_index`; ``data_bytes`` lie before the index. Raises ``FormatError``.

    It stops at the first part too many, so memory is in proportion to the file.
    """
    iterator = iter(lines)
    header = _decode_line(next(iterator, b""), _HEADER, 1)
    if header.version != VERSION:
        raise FormatError(f"index version {header.version} is not known here", "use a newer pgkeep")
    parts: list[Part] = []
    length = 0
    for number, line in enumerate(iterator, 2):
        parts.append(_decode_line(line, _PART, number))
        length += parts[-1].length
        if length > data_bytes or len(parts) > header.parts:
            raise FormatError("the index describes more than there is")
    if len(parts) != header.parts:
        raise FormatError(f"the index promises {header.parts} parts and holds {len(parts)}")
    if length != data_bytes:
        raise FormatError("the index does not account for every byte before it")
    _check_parts(parts)
    return Index(header, tuple(parts))


def _encode_line(value: msgspec.Struct) -> bytes:
    # psql reads comments too, under the dump's own encoding: only ASCII is safe under all of them.
    text = json.dumps(msgspec.to_builtins(value), ensure_ascii=True, separators=(",", ":"))
    return COMMENT + text.encode("ascii") + b"\n"


def _decode_line(line: bytes, decoder: msgspec.json.Decoder[_T], number: int) -> _T:
    if not line.startswith(COMMENT) or not line.endswith(b"\n"):
        raise FormatError(f"line {number} of the index is not an SQL comment")
    try:
        return decoder.decode(line[len(COMMENT) :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"line {number} of the index is malformed: {error}") from error


def _check_parts(parts: Sequence[Part]) -> None:
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
    toc_bytes = parts[-1].raw_bytes if parts and isinstance(parts[-1], TocPart) else 0
    if toc_bytes > TOC_LIMIT_BYTES:
        raise FormatError(f"the archive's contents (toc.dat) take {toc_bytes} bytes, more than {TOC_LIMIT_BYTES}")


def codec(encoding: str) -> str:
    """The Python codec for names in a dump of this encoding: for people's eyes, so never a failure."""
    return _CODECS.get(encoding, "latin-1")


def encode_toc(toc: bytes) -> Iterator[bytes]:
    """``toc.dat`` as lines of SQL comments."""
    for start in range(0, len(toc), _TOC_LINE_BYTES):
        yield COMMENT + base64.b64encode(toc[start : start + _TOC_LINE_BYTES]) + b"\n"


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


NO_FOOTER = "the file does not end in a pgkeep footer"
# How other files begin, and what restores them; the first that fits.
_FOREIGN = (
    (b"\x1f\x8b", "it is cut short, or not pgkeep's: gunzip -c FILE | psql -v ON_ERROR_STOP=1 restores what is there"),
    (b"PGDMP", "it is an archive of pg_dump: pg_restore -d TARGET FILE"),
    (b"(\xb5/\xfd", "it is compressed by zstd: zstd -dc FILE | psql -v ON_ERROR_STOP=1"),
    (b"BZh", "it is compressed by bzip2: bzip2 -dc FILE | psql -v ON_ERROR_STOP=1"),
    (b"\xfd7zXZ\x00", "it is compressed by xz: xz -dc FILE | psql -v ON_ERROR_STOP=1"),
    (b'\x04"M\x18', "it is compressed by lz4: lz4 -dc FILE | psql -v ON_ERROR_STOP=1"),
    (b"age-encryption.org/", "it is encrypted: age -d -i KEY FILE | gunzip -c | psql -v ON_ERROR_STOP=1"),
    (b"-----BEGIN AGE", "it is encrypted: age -d -i KEY FILE | gunzip -c | psql -v ON_ERROR_STOP=1"),
    (b"--", "it is plain SQL: psql -v ON_ERROR_STOP=1 -f FILE"),
)


def foreign_hint(head: bytes) -> str:
    """What a file without our footer may be, by its first bytes, and the stock command for it."""
    if not head:
        return "it is empty"
    return next((hint for magic, hint in _FOREIGN if head.startswith(magic)), "it is no dump that is known here")


def decode_footer(tail: bytes, size_bytes: int) -> Footer:
    """Read a file's last ``FOOTER_BYTES`` bytes; ``size_bytes`` is the whole file's. Raises ``FormatError``."""
    match = _FOOTER_PATTERN.search(tail[-FOOTER_BYTES:])
    if match is None:
        raise FormatError(NO_FOOTER)
    if match[1] != b"1":
        raise FormatError(f"footer version {match[1].decode()} is not known here", "use a newer pgkeep")
    footer = Footer(int(match[2]), int(match[3]), match[4].decode("ascii"))
    if encode_footer(footer) != tail[-FOOTER_BYTES:]:
        raise FormatError("the footer is damaged")
    if footer.index_offset + footer.index_length + FOOTER_BYTES != size_bytes:
        raise FormatError("the footer does not fit the file's size: something was added or is missing")
    return footer
