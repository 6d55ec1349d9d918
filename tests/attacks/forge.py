"""Artifacts without a server: honest ones by the product's own writer, and forged ones put together by hand."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pgkeep.adapters import gzip_members
from pgkeep.adapters.artifact_writer import ArtifactWriter
from pgkeep.domain import artifact, large_objects
from pgkeep.domain.artifact import DATA_END, FOOTER_BYTES, Chunk, Footer, TablePart

START = b"--\n-- PostgreSQL database dump\n--\n\nSET client_encoding = 'UTF8';\n\n"
END = b"--\n-- PostgreSQL database dump complete\n--\n\n"
Content = tuple[int, bytes]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with its rows as COPY text; every piece becomes a member, the end mark goes to the last."""

    dump_id: int
    schema: str
    name: str
    pieces: tuple[bytes, ...] = (b"",)

    @property
    def file(self) -> str:
        return f"{self.dump_id}.dat"

    @property
    def members(self) -> tuple[bytes, ...]:
        return (*self.pieces[:-1], self.pieces[-1] + DATA_END)


TABLES = (
    Table(11, "public", "customers", (b"1\tAda\n2\tGrace\n",)),
    Table(12, "public", "orders", (b"10\t1\n11\t1\n", b"12\t2\n")),
    Table(13, "shop", "Größe \N{GRINNING FACE}"),
)
OBJECTS: tuple[Content, ...] = ((16401, b"\x00first\xff"), (16402, b""), (16403, b"third" * 40))
OBJECTS_FILE = "blobs.toc"


# ---------------------------------------------------------------- pg_dump's toc.dat


def _integer(value: int) -> bytes:
    return struct.pack("<BI", value < 0, abs(value))


def _text(value: str | bytes | None) -> bytes:
    if value is None:
        return _integer(-1)
    raw = value.encode() if isinstance(value, str) else value
    return _integer(len(raw)) + raw


def _entry(
    dump_id: int, description: str, name: str, schema: str | None, *, section: int, file: str = "", **more: Any
) -> bytes:
    fields = [_integer(dump_id), _integer(bool(file)), _text("0"), _text("0"), _text(name), _text(description)]
    fields += [_integer(section), _text(more.get("definition", "")), _text(""), _text(more.get("copy", ""))]
    fields += [_text(schema), _text(None), _text(None), _text("owner"), _text("false")]
    fields += [_text(str(each)) for each in more.get("dependencies", ())] + [_text(None), _text(file)]
    return b"".join(fields)


def toc(
    tables: Sequence[Table] = TABLES,
    *,
    objects_file: str | None = OBJECTS_FILE,
    dump_version: str = "15.8",
    filler: bytes = b"",
) -> bytes:
    """A ``toc.dat`` of archive version 1.14 (PostgreSQL 15) that lists the tables' data; ``filler`` makes it large."""
    entries = [_entry(1, "ENCODING", "ENCODING", None, section=2, definition="SET client_encoding = 'UTF8';\n")]
    for table in tables:
        definition = f'CREATE TABLE "{table.schema}"."{table.name}" (a text, b text);\n'
        own = 100 + table.dump_id
        entries.append(_entry(own, "TABLE", table.name, table.schema, section=2, definition=definition))
        copy = f'COPY "{table.schema}"."{table.name}" (a, b) FROM stdin;\n'
        entries.append(
            _entry(
                table.dump_id,
                "TABLE DATA",
                table.name,
                table.schema,
                section=3,
                file=table.file,
                copy=copy,
                dependencies=(own,),
            )
        )
    if objects_file:
        entries.append(_entry(90, "BLOBS", "BLOBS", None, section=3, file=objects_file))
    if filler:
        entries.append(_entry(91, "FUNCTION", "filler()", "public", section=2, definition=filler.decode("ascii")))
    head = b"PGDMP" + bytes((1, 14, 0, 4, 8, 3)) + _integer(0)
    head += b"".join(_integer(each) for each in (0, 0, 0, 1, 0, 126, 0))
    head += _text("forged") + _text("15.8") + _text(dump_version)
    return head + _integer(len(entries)) + b"".join(entries)


# ---------------------------------------------------------------- honest artifacts


def build(
    tables: Sequence[Table] = TABLES,
    objects: Sequence[Content] = OBJECTS,
    *,
    contents: bytes | None = None,
    objects_text: bytes | None = None,
    end: Sequence[bytes] = (END,),
) -> bytes:
    """An artifact by the product's own writer; each piece of ``end`` becomes an SQL part of its own."""
    descriptor = os.memfd_create("artifact")
    try:
        writer = ArtifactWriter(descriptor)
        writer.add_sql([START])
        for table in tables:
            writer.add_sql([f'COPY "{table.schema}"."{table.name}" (a, b) FROM stdin;\n'.encode()])
            _add_table(writer, table)
        if objects:
            writer.add_sql(
                [b"SELECT pg_catalog.lo_open('%d', 131072);\n" % objects[0][0], b"SELECT pg_catalog.lowrite(0, '\\x"]
            )
            text = objects_text or b"".join(large_objects.encode(((n, [c]) for n, c in objects), b"'\\x"))
            writer.add_large_objects(OBJECTS_FILE, objects[0][0], len(objects), [text])
            writer.add_sql([b"');\nSELECT pg_catalog.lo_close(0);\n\n"])
        for piece in end:
            writer.add_sql([piece])
        writer.add_toc([toc(tables, objects_file=OBJECTS_FILE if objects else None) if contents is None else contents])
        writer.finish("database", "UTF8")
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def _add_table(writer: ArtifactWriter, table: Table) -> None:
    pool = os.memfd_create("pool")
    try:
        chunks, offsets, position = [], [], 0
        for text in table.members:
            chunk, output = gzip_members.compress([text])
            os.write(pool, b"".join(output))
            chunks.append(chunk)
            offsets.append(position)
            position += chunk.length
        part = TablePart(
            chunks=tuple(chunks), dump_id=table.dump_id, file=table.file, schema=table.schema, name=table.name
        )
        writer.add_table(part, pool, offsets)
    finally:
        os.close(pool)


# ---------------------------------------------------------------- forged artifacts


@dataclasses.dataclass
class Piece:
    """A part: its line in the index as plain JSON, and its members. Change either, or both in step."""

    line: dict[str, Any]
    members: list[bytes]

    def describe(self, texts: Iterable[bytes]) -> None:
        """Let the line say what is true of the members, whose texts are given."""
        self.line["chunks"] = [
            [len(member), len(text), text.count(b"\n"), hashlib.sha256(member).hexdigest()]
            for member, text in zip(self.members, texts, strict=True)
        ]


@dataclasses.dataclass
class Forgery:
    """An artifact taken apart; :meth:`data` puts it together again, consistently but for what was forged."""

    header: dict[str, Any]
    pieces: list[Piece]
    header_lies: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes) -> Forgery:
        footer = artifact.decode_footer(data[-FOOTER_BYTES:], len(data))
        lines = gzip.decompress(data[footer.index_offset : -FOOTER_BYTES]).splitlines()
        header, *parts = (json.loads(line.removeprefix(b"-- ")) for line in lines)
        pieces, position = [], 0
        for part in parts:
            members = []
            for length, *_ in part["chunks"]:
                members.append(data[position : position + length])
                position += length
            pieces.append(Piece(part, members))
        return cls(header, pieces)

    def piece(self, kind: str, number: int = 0) -> Piece:
        return [piece for piece in self.pieces if piece.line["kind"] == kind][number]

    def body(self) -> bytes:
        return b"".join(member for piece in self.pieces for member in piece.members)

    def index_text(self) -> bytes:
        """The index's text; the number of parts is right unless it is among the lies."""
        header = {**self.header, "parts": len(self.pieces), **self.header_lies}
        return b"".join(b"-- " + json.dumps(line).encode() + b"\n" for line in (header, *(p.line for p in self.pieces)))

    def data(self) -> bytes:
        return with_index(self.body(), self.index_text())


def with_index(body: bytes, index_text: bytes) -> bytes:
    """A file whose footer is right, whatever the index says."""
    return with_compressed_index(body, gzip.compress(index_text, 1))


def with_compressed_index(body: bytes, index: bytes) -> bytes:
    footer = Footer(len(body), len(index), hashlib.sha256(index).hexdigest())
    return body + index + artifact.encode_footer(footer)


def zeros_member(text_bytes: int, letter: bytes = b"\0") -> bytes:
    """A gzip member of so many equal bytes, made in constant memory: about a thousandth of its text."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = letter * (1024 * 1024)
    out = [compressor.compress(block) for _ in range(text_bytes // len(block))]
    return b"".join([*out, compressor.flush()])


def gzip_with_fields(text: bytes, *, name: bytes = b"", comment: bytes = b"", extra: bytes = b"", check: bool) -> bytes:
    """A gzip member with the optional header fields of RFC 1952."""
    flags = bool(extra) << 2 | bool(name) << 3 | bool(comment) << 4 | check << 1
    header = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff"
    if extra:
        header += struct.pack("<H", len(extra)) + extra
    if name:
        header += name + b"\0"
    if comment:
        header += comment + b"\0"
    if check:
        header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(text) + deflate.flush()
    return header + body + struct.pack("<II", zlib.crc32(text), len(text) & 0xFFFFFFFF)


def describe(member: bytes, text: bytes) -> Chunk:
    """What an index would truly say of the member."""
    return Chunk(len(member), len(text), text.count(b"\n"), hashlib.sha256(member).hexdigest())


def reader_of(data: bytes) -> Callable[[int], bytes]:
    """``read(n)`` over bytes."""
    return io.BytesIO(data).read


def write_with_checksum(path: Path, data: bytes) -> Path:
    """The file and its ``.sha256``, as they lie in a vault."""
    path.write_bytes(data)
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    return path
