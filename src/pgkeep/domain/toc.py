"""pg_dump's ``toc.dat`` (directory format), strictly read.

The layout is that of PostgreSQL's ``pg_backup_archiver.c`` (``ReadHead``, ``ReadToc``) and
``pg_backup_directory.c`` (``_ReadExtraToc``); archive versions 1.12 (PostgreSQL 9.0) to 1.16 (17, 18).
Integers are a sign byte and four bytes, little-endian; strings an integer length (-1: none) and their bytes.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from pgkeep.errors import FormatError

OLDEST_VERSION = (1, 12)
NEWEST_VERSION = (1, 16)

_BYTE_COMPRESSION = (1, 15)
_TABLE_ACCESS_METHOD = (1, 14)
_RELKIND = (1, 16)

_MAGIC = b"PGDMP"
_INTEGER = struct.Struct("<BI")
_INTEGER_BYTES = 4
_OFFSET_BYTES = (4, 8)
# A directory's toc.dat says "tar": the two formats share it.
_FORMAT_TAR = 3
_COMPRESSION_ALGORITHMS = 4
# Three integers and thirteen strings, all empty: bounds the count that a hostile header may claim.
_ENTRY_LEAST_BYTES = 16 * _INTEGER.size
_INTEGER_LIMIT = 2**31 - 1
_OID_LIMIT = 2**32 - 1
_NUMBER_LIMIT_DIGITS = 10
_FILE_NAME = re.compile(rb"[0-9]{1,10}\.dat|blobs(?:_[0-9]{1,10})?\.toc")
_ENCODING = re.compile(r"SET client_encoding = '([^']+)';")
# The words that PostgreSQL 15-18 do not take as a name everywhere (pg_get_keywords(), catcode <> 'U').
_RESERVED_WORDS = """
    all analyse analyze and any array as asc asymmetric authorization between bigint binary bit boolean both case
    cast char character check coalesce collate collation column concurrently constraint create cross current_catalog
    current_date current_role current_schema current_time current_timestamp current_user dec decimal default
    deferrable desc distinct do else end except exists extract false fetch float for foreign freeze from full grant
    greatest group grouping having ilike in initially inner inout int integer intersect interval into is isnull join
    json json_array json_arrayagg json_exists json_object json_objectagg json_query json_scalar json_serialize
    json_table json_value lateral leading least left like limit localtime localtimestamp merge_action national
    natural nchar none normalize not notnull null nullif numeric offset on only or order out outer overlaps overlay
    placing position precision primary real references returning right row select session_user setof similar
    smallint some substring symmetric system_user table tablesample then time timestamp to trailing treat trim true
    union unique user using values varchar variadic verbose when where window with xmlattributes xmlconcat
    xmlelement xmlexists xmlforest xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable
"""
_RESERVED = frozenset(_RESERVED_WORDS.split())
_PLAIN = re.compile(r"[a-z_][a-z0-9_]*", re.ASCII)
_UPDATE_HINT = "update pgkeep, or restore with pg_restore of the version that wrote it"
_DAMAGE_HINT = "the archive is damaged or was not written by pg_dump: verify the backup"

#: Descriptions of what COPY may have been taken from, and rows be restored into.
TABLE_DESCRIPTIONS = frozenset({"TABLE", "FOREIGN TABLE"})


class Section(IntEnum):
    """When an entry is restored; the numbers are pg_dump's."""

    NONE = 1
    PRE_DATA = 2
    DATA = 3
    POST_DATA = 4


_SECTIONS: Mapping[int, Section] = {int(section): section for section in Section}


# pg_dump's own quoting of identifiers, in the one statement that it always qualifies.
_IDENTIFIER = r'("(?:[^"]|"")+"|[^\s".(]+)'
_COPY_TARGET = re.compile(rf"COPY {_IDENTIFIER}\.{_IDENTIFIER} ")


def _unquoted(text: str) -> str:
    return text[1:-1].replace('""', '"') if text.startswith('"') else text


@dataclass(frozen=True, order=True)
class TableName:
    """A table's exact name; without a schema, wherever it is found."""

    schema: str | None
    name: str

    def __str__(self) -> str:
        return qualify(self.schema, self.name)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One line of ``pg_restore -l``. ``catalog`` is (oid of the catalog, oid of the object), 0 for none.

    ``dependencies`` may repeat a dump id and may name one that the archive does not hold.
    ``filename`` is the data's file without a compression's suffix; ``relkind`` is "" before version 1.16.
    """

    dump_id: int
    catalog: tuple[int, int]
    description: str
    schema: str | None
    name: str
    owner: str
    section: Section
    definition: str
    copy_statement: str | None
    dependencies: tuple[int, ...]
    filename: str | None
    had_dumper: bool
    relkind: str = ""

    @property
    def table_name(self) -> TableName:
        return TableName(self.schema, self.name)

    @property
    def is_table(self) -> bool:
        """Holds rows of its own or of its partitions; views and sequences do not count."""
        return self.description in TABLE_DESCRIPTIONS

    @property
    def is_table_data(self) -> bool:
        return self.description == "TABLE DATA"

    @property
    def copy_target(self) -> TableName | None:
        """The table that the rows are loaded into: a partition's may go through the root of its tree."""
        match = _COPY_TARGET.match(self.copy_statement or "")
        return None if match is None else TableName(_unquoted(match[1]), _unquoted(match[2]))

    @property
    def is_large_objects(self) -> bool:
        """The content of large objects; ``filename`` is a list of their files (one per entry from version 17)."""
        return self.description == "BLOBS"


@dataclass(frozen=True)
class Toc:
    """What the archive holds, in its own order. Versions are texts such as ``15.4 (Debian 15.4-1)``."""

    archive_version: tuple[int, int]
    server_version: str
    dump_version: str
    database: str
    entries: tuple[Entry, ...]

    @functools.cached_property
    def by_dump_id(self) -> Mapping[int, Entry]:
        return {entry.dump_id: entry for entry in self.entries}

    @functools.cached_property
    def dependents(self) -> Mapping[int, Sequence[Entry]]:
        """The entries that name a dump id among their dependencies, each once, in the archive's order."""
        found: dict[int, list[Entry]] = {}
        for entry in self.entries:
            for dump_id in dict.fromkeys(entry.dependencies):
                found.setdefault(dump_id, []).append(entry)
        return found

    @property
    def data_entries(self) -> tuple[Entry, ...]:
        """The entries that have a data file (tables' rows, large objects), in the archive's order."""
        return tuple(entry for entry in self.entries if entry.filename is not None)

    @property
    def encoding(self) -> str | None:
        """PostgreSQL's name of the encoding that texts and data are in, such as ``UTF8``."""
        for entry in self.entries:
            if entry.description == "ENCODING":
                match = _ENCODING.search(entry.definition)
                return match.group(1) if match else None
        return None

    @functools.cached_property
    def partitions(self) -> Mapping[int, Sequence[tuple[Entry, Entry]]]:
        """Parent's dump id -> (the entry that attaches, the partition); before pg_dump 14 the partition's own entry."""
        found: dict[int, list[tuple[Entry, Entry]]] = {}
        for entry in self.entries:
            if entry.description == "TABLE ATTACH":
                tables = self.tables_among(entry)
                children = [table for table in tables if _same_name(table, entry)]
                parents = [table for table in tables if not _same_name(table, entry)]
                if len(children) == 1 and len(parents) == 1:
                    found.setdefault(parents[0].dump_id, []).append((entry, children[0]))
            elif entry.is_table:
                for parent in self.tables_among(entry):
                    if _makes_partition(entry.definition, str(parent.table_name)):
                        found.setdefault(parent.dump_id, []).append((entry, entry))
        return found

    def tables_among(self, entry: Entry) -> list[Entry]:
        """The tables that an entry depends on, each once."""
        found = (self.by_dump_id.get(dump_id) for dump_id in dict.fromkeys(entry.dependencies))
        return [table for table in found if table is not None and table.is_table]

    def table_of(self, data_entry: Entry) -> Entry | None:
        """The table that the rows belong to; None for large objects and an extension's configuration table."""
        return next((table for table in self.tables_among(data_entry) if _same_name(table, data_entry)), None)


def read(data: bytes, codec: str) -> Toc:
    """Read a whole ``toc.dat``; ``codec`` is Python's name for the archive's encoding.

    Bytes that the codec refuses become ``\\xNN``. Memory stays within a small multiple of the input.
    Raises ``FormatError``: unknown version, damage, anything after the last entry.
    """
    _check_codec(codec)
    cursor = _Cursor(data)
    try:
        version = _read_preamble(cursor)
        database, server_version, dump_version = _read_origin(cursor, version, codec)
        entries = _read_entries(cursor, version, codec)
    except UnicodeError as error:
        raise FormatError(f"toc.dat can't be read as {codec}: {error}", _DAMAGE_HINT) from error
    cursor.expect_end()
    return Toc(version, server_version, dump_version, database, entries)


def quote_identifier(name: str) -> str:
    """As SQL: in double quotes unless it is plain."""
    if _PLAIN.fullmatch(name) and name not in _RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def qualify(schema: str | None, name: str) -> str:
    return quote_identifier(name) if schema is None else f"{quote_identifier(schema)}.{quote_identifier(name)}"


class _Cursor:
    """Reads forward; never past the end."""

    __slots__ = ("_data", "_end", "position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._end = len(data)
        self.position = 0

    @property
    def remaining_bytes(self) -> int:
        return self._end - self.position

    def take(self, size_bytes: int) -> bytes:
        start = self.position
        if size_bytes > self._end - start:
            raise self.damage("is cut short")
        self.position = start + size_bytes
        return self._data[start : self.position]

    def byte(self) -> int:
        return self.take(1)[0]

    def integer(self) -> int:
        start = self.position
        if self._end - start < _INTEGER.size:
            raise self.damage("is cut short")
        sign, value = _INTEGER.unpack_from(self._data, start)
        if sign > 1 or value > _INTEGER_LIMIT:
            raise self.damage("holds an impossible number")
        self.position = start + _INTEGER.size
        return -value if sign else int(value)

    def raw(self) -> bytes | None:
        # The busiest function: integer() and take() are written out.
        start = self.position + _INTEGER.size
        if start > self._end:
            raise self.damage("is cut short")
        sign, size_bytes = _INTEGER.unpack_from(self._data, self.position)
        if sign:
            if (sign, size_bytes) != (1, 1):
                raise self.damage("holds a text of negative length")
            self.position = start
            return None
        end = start + size_bytes
        if end > self._end:
            raise self.damage("is cut short")
        self.position = end
        text = self._data[start:end]
        if b"\0" in text:
            raise self.damage("holds a text with a zero byte")
        return text

    def number(self, limit: int) -> int:
        """A number that is written as a text of digits."""
        return self.digits(self.raw(), limit)

    def digits(self, text: bytes | None, limit: int) -> int:
        # isdigit() of bytes is ASCII only; int() alone would take signs, blanks and underscores.
        if text is None or not text.isdigit() or len(text) > _NUMBER_LIMIT_DIGITS or (value := int(text)) > limit:
            raise self.damage("holds a malformed number")
        return value

    def expect_end(self) -> None:
        if self.remaining_bytes:
            raise self.damage(f"goes on for {self.remaining_bytes} bytes after its last entry")

    def damage(self, what: str) -> FormatError:
        return FormatError(f"toc.dat {what} (at byte {self.position})", _DAMAGE_HINT)


def _check_codec(codec: str) -> None:
    try:
        # Of what pg_dump writes, every encoding keeps ASCII as it is.
        keeps_ascii = b"PGDMP".decode(codec, "backslashreplace") == "PGDMP"
    except (LookupError, ValueError):
        keeps_ascii = False
    if not keeps_ascii:
        raise FormatError(f"{codec!r} is not a text encoding that an archive can be in")


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version, sizes, format. Returns the archive version."""
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise FormatError("toc.dat does not begin as a pg_dump archive", _DAMAGE_HINT)
    version, revision = (cursor.byte(), cursor.byte()), cursor.byte()
    if not OLDEST_VERSION <= version <= NEWEST_VERSION or revision:
        raise FormatError(f"archive version {version[0]}.{version[1]}-{revision} is not known here", _UPDATE_HINT)
    if cursor.byte() != _INTEGER_BYTES or cursor.byte() not in _OFFSET_BYTES:
        raise FormatError("toc.dat was written with unusual integer sizes", _UPDATE_HINT)
    if cursor.byte() != _FORMAT_TAR:
        raise FormatError("toc.dat is not of the directory format", "dump with pg_dump --format=directory")
    return version


def _read_origin(cursor: _Cursor, version: tuple[int, int], codec: str) -> tuple[str, str, str]:
    """Compression and time are passed over. Returns database, server version, pg_dump's version."""
    if version < _BYTE_COMPRESSION:
        cursor.integer()
    elif cursor.byte() >= _COMPRESSION_ALGORITHMS:
        raise FormatError("toc.dat names an unknown compression", _UPDATE_HINT)
    for _ in ("second", "minute", "hour", "day", "month", "year", "daylight saving"):
        cursor.integer()
    database, server, dump = ((cursor.raw() or b"").decode(codec, "backslashreplace") for _ in range(3))
    return database, server, dump


def _read_entries(cursor: _Cursor, version: tuple[int, int], codec: str) -> tuple[Entry, ...]:
    count = cursor.integer()
    if not 0 <= count <= cursor.remaining_bytes // _ENTRY_LEAST_BYTES:
        raise cursor.damage(f"claims {count} entries, more than it has room for")
    reader = _EntryReader(cursor, version, codec)
    return tuple(reader.entry() for _ in range(count))


class _EntryReader:
    """Reads entry after entry; schemas, owners and descriptions repeat, so each is kept once."""

    def __init__(self, cursor: _Cursor, version: tuple[int, int], codec: str) -> None:
        self._cursor = cursor
        self._has_access_method = version >= _TABLE_ACCESS_METHOD
        self._has_relkind = version >= _RELKIND
        self._codec = codec
        self._known: dict[bytes, str] = {}
        self._dump_ids: set[int] = set()
        self._filenames: set[str] = set()

    def entry(self) -> Entry:
        cursor = self._cursor
        dump_id = self._dump_id()
        had_dumper = cursor.integer() != 0
        catalog = cursor.number(_OID_LIMIT), cursor.number(_OID_LIMIT)
        name, description, section = self._text(cursor.raw()), self._repeated(cursor.raw()), self._section()
        definition = self._text(cursor.raw())
        cursor.raw()  # the statement that drops it
        copy_statement = self._text(cursor.raw())
        schema = self._repeated(cursor.raw())
        cursor.raw()  # tablespace
        if self._has_access_method:
            cursor.raw()
        relkind = self._relkind() if self._has_relkind else ""
        owner = self._repeated(cursor.raw())
        cursor.raw()  # "true" for a table WITH OIDS, gone since PostgreSQL 12
        dependencies, filename = self._dependencies(), self._filename(had_dumper)
        return Entry(
            dump_id,
            catalog,
            description,
            schema or None,
            name,
            owner,
            section,
            definition,
            copy_statement or None,
            dependencies,
            filename,
            had_dumper,
            relkind,
        )

    def _text(self, raw: bytes | None) -> str:
        return raw.decode(self._codec, "backslashreplace") if raw else ""

    def _repeated(self, raw: bytes | None) -> str:
        if not raw:
            return ""
        text = self._known.get(raw)
        if text is None:
            text = self._known[raw] = raw.decode(self._codec, "backslashreplace")
        return text

    def _dump_id(self) -> int:
        dump_id = self._cursor.integer()
        if dump_id <= 0 or dump_id in self._dump_ids:
            raise self._cursor.damage(f"holds the dump id {dump_id}, which is not positive or comes twice")
        self._dump_ids.add(dump_id)
        return dump_id

    def _section(self) -> Section:
        section = _SECTIONS.get(self._cursor.integer())
        if section is None:
            raise self._cursor.damage("holds an unknown section")
        return section

    def _relkind(self) -> str:
        code = self._cursor.integer()
        if not 0 <= code < 128:
            raise self._cursor.damage("holds an impossible kind of relation")
        return chr(code) if code else ""

    def _dependencies(self) -> tuple[int, ...]:
        cursor = self._cursor
        found: list[int] = []
        while (text := cursor.raw()) is not None:
            found.append(cursor.digits(text, _INTEGER_LIMIT))
        return tuple(found)

    def _filename(self, had_dumper: bool) -> str | None:
        raw = self._cursor.raw() or b""
        if bool(raw) != had_dumper:
            raise self._cursor.damage("names a data file without data, or data without a file")
        if not raw:
            return None
        name = raw.decode("ascii", "backslashreplace")
        # The name becomes a path: anything but pg_dump's own patterns could point elsewhere.
        if _FILE_NAME.fullmatch(raw) is None or name in self._filenames:
            raise self._cursor.damage(f"holds the file name {name[:80]!r}, which is malformed or comes twice")
        self._filenames.add(name)
        return name


def _same_name(first: Entry, second: Entry) -> bool:
    return first.name == second.name and first.schema == second.schema


def _makes_partition(definition: str, parent: str) -> bool:
    return f"\nALTER TABLE ONLY {parent} ATTACH PARTITION " in definition or f" PARTITION OF {parent}\n" in definition
