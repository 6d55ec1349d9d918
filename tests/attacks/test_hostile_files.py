"""Files made to deceive: every one is named for what it is, in bounded memory and time, and never with a traceback."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile
from pgkeep.domain import artifact, large_objects
from pgkeep.domain.artifact import CHUNK_BYTES, FOOTER_BYTES, Footer
from pgkeep.errors import FormatError, PgkeepError, RefusedError
from pgkeep.restore.rebuild import rebuild
from pgkeep.restore.recover import choose_pg_restore
from pgkeep.restore.target import list_members
from pgkeep.vault.inspect import DEFECTS_LIMIT, Depth
from tests.attacks import forge
from tests.attacks.forge import Forgery, Table
from tests.attacks.hostile import (
    HONEST,
    MEMORY_LIMIT_KIB,
    TIME_LIMIT_SECONDS,
    assert_clean,
    defects,
    forged,
    look,
    pgkeep,
)

# ---------------------------------------------------------------- accidents: cut, flipped, added, joined


@pytest.mark.parametrize("depth", ["digests", "content"])
def test_an_honest_artifact_has_no_defect(depth: Depth) -> None:
    found = look(HONEST, depth)
    assert found.defects == ()
    assert found.sha256 == hashlib.sha256(HONEST).hexdigest()
    assert [table.rows for table in found.contents.tables] == [2, 3, 0] if found.contents else False


def test_every_truncation_is_named() -> None:
    assert [length for length in range(len(HONEST)) if not look(HONEST[:length], "digests").defects] == []


def test_every_flipped_byte_is_named() -> None:
    missed = []
    for position in range(len(HONEST)):
        damaged = bytearray(HONEST)
        damaged[position] ^= 1 << position % 8
        if not look(bytes(damaged), "digests").defects:
            missed.append(position)
    assert missed == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_flips_of_a_larger_artifact_are_named_by_the_deep_look(data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(LARGE) - 1))
    damaged = bytearray(LARGE)
    damaged[position] ^= data.draw(st.integers(1, 255))
    assert look(bytes(damaged)).defects


_ROWS = b"".join(b"%d\t%s\n" % (n, hashlib.sha256(b"%d" % n).hexdigest().encode()) for n in range(2000))
LARGE = forge.build((Table(7, "public", "large", (_ROWS, _ROWS, _ROWS)), *forge.TABLES))


@pytest.mark.parametrize(
    "extra", [b"\0", b"\n", b"garbage" * 1000, gzip.compress(b"-- more\n", mtime=0), HONEST[-FOOTER_BYTES:]]
)
def test_anything_added_at_the_end_is_named(extra: bytes) -> None:
    assert "footer" in defects(HONEST + extra)


def test_two_joined_artifacts_are_named() -> None:
    assert "something was added or is missing" in defects(HONEST + HONEST)
    assert "something was added or is missing" in defects(LARGE + HONEST)


def test_a_wrong_checksum_or_size_within_a_member_is_named_even_under_a_right_digest() -> None:
    for position in (-8, -1):
        forgery = forged()
        piece = forgery.piece("table")
        member = bytearray(piece.members[0])
        member[position] ^= 1
        piece.members = [bytes(member)]
        piece.line["chunks"][0][3] = hashlib.sha256(member).hexdigest()
        assert "table public.customers, member 1" in defects(forgery.data())
        assert defects(forgery.data(), "digests") == ""


# ---------------------------------------------------------------- members moved about


def test_swapped_members_of_the_same_size_are_named() -> None:
    rows = (b"1\tAAAA\n", b"2\tBBBB\n")
    data = forge.build((Table(11, "public", "a", (rows[0],)), Table(12, "public", "b", (rows[1],))))
    forgery = Forgery.of(data)
    first, second = forgery.piece("table", 0), forgery.piece("table", 1)
    assert len(first.members[0]) == len(second.members[0])
    first.members, second.members = second.members, first.members
    found = defects(forgery.data(), "digests")
    assert "table public.a, member 1" in found
    assert "table public.b, member 1" in found


def test_a_table_that_was_removed_without_a_trace_in_the_index_is_missed_by_its_name() -> None:
    forgery = forged()
    forgery.pieces.remove(forgery.piece("table", 1))
    assert defects(forgery.data(), "digests") == "the data of public.orders (12.dat) is missing"


def test_removed_large_objects_are_missed() -> None:
    forgery = forged()
    forgery.pieces.remove(forgery.piece("large_objects"))
    assert defects(forgery.data(), "digests") == "the large objects of blobs.toc are missing"


def test_a_removed_member_is_missed() -> None:
    forgery = forged()
    orders = forgery.piece("table", 1)
    del orders.members[1], orders.line["chunks"][1]
    orders.line["chunks"][0][2] = 3
    assert "table public.orders" in defects(forgery.data())


def test_a_removed_table_of_contents_is_missed() -> None:
    forgery = forged()
    forgery.pieces.remove(forgery.piece("toc"))
    assert defects(forgery.data()) == "the archive's contents (toc.dat) are missing"


def test_a_dump_without_its_last_words_is_named() -> None:
    assert defects(forge.build(end=(b"SELECT 1;\n",))) == "the trailer is missing: pg_dump did not finish"
    assert "the trailer is missing" in defects(forge.build(end=(forge.END, b"-- x\n" * 20000)))


@pytest.mark.parametrize("cut", range(1, len(forge.END)))
def test_last_words_across_two_parts_are_found(cut: int) -> None:
    """SQL is cut into parts wherever a megabyte is full."""
    assert defects(forge.build(end=(forge.END[:cut], forge.END[cut:]))) == ""


def test_rows_without_their_end_mark_are_named() -> None:
    forgery = forged()
    piece = forgery.piece("table")
    text = b"1\tAda\n2\tGrace\n\n\n\n"
    piece.members = [gzip.compress(text)]
    piece.describe([text])
    assert defects(forgery.data()) == "table public.customers: its rows lack their end mark"


# ---------------------------------------------------------------- a forged index


def _set(kind: str, /, **fields: Any) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.piece(kind).line.update(fields)


def _chunk(position: int, value: Any) -> Callable[[Forgery], None]:
    def change(forgery: Forgery) -> None:
        forgery.piece("table").line["chunks"][0][position] = value

    return change


def _header(**fields: Any) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.header_lies.update(fields)


DIGEST = "0" * 64
FORGED_INDEXES: dict[str, Callable[[Forgery], None]] = {
    "length one more": lambda f: _chunk(0, len(f.piece("table").members[0]) + 1)(f),
    "length one less": lambda f: _chunk(0, len(f.piece("table").members[0]) - 1)(f),
    "length zero": _chunk(0, 0),
    "length negative": _chunk(0, -100),
    "length huge": _chunk(0, 2**63),
    "length beyond 64 bits": _chunk(0, 2**100),
    "length a float": _chunk(0, 1e300),
    "length a text": _chunk(0, "100"),
    "length null": _chunk(0, None),
    "raw bytes one more": _chunk(1, 22),
    "raw bytes one less": _chunk(1, 20),
    "raw bytes over a chunk": _chunk(1, CHUNK_BYTES + 1),
    "raw bytes negative": _chunk(1, -1),
    "rows one more": _chunk(2, 6),
    "rows one less": _chunk(2, 4),
    "rows negative": _chunk(2, -1),
    "rows less than the end mark": _chunk(2, 2),
    "digest wrong": _chunk(3, DIGEST),
    "digest short": _chunk(3, DIGEST[:-1]),
    "digest in capitals": _chunk(3, DIGEST[:-1] + "A"),
    "digest with a newline": _chunk(3, DIGEST + "\n"),
    "no chunks": _set("table", chunks=[]),
    "chunks nested": _set("table", chunks=[[[[[]]]]]),
    "a chunk too short": _set("table", chunks=[[18, 0, 0]]),
    "a chunk too long": _set("table", chunks=[[18, 0, 0, DIGEST, 0]]),
    "chunks a text": _set("table", chunks="many"),
    "kind unknown": _set("table", kind="view"),
    "kind missing": lambda f: f.piece("table").line.pop("kind"),
    "a field unknown": _set("table", offset=0),
    "dump id another": _set("table", dump_id=12),
    "dump id negative": _set("table", dump_id=-11),
    "dump id huge": _set("table", dump_id=2**40),
    "file upwards": _set("table", file="../11.dat"),
    "file absolute": _set("table", file="/11.dat"),
    "file with a zero byte": _set("table", file="11.dat\0"),
    "file with a newline": _set("table", file="11.dat\n"),
    "file of another table": _set("table", file="12.dat"),
    "file the table of contents": _set("table", file="toc.dat"),
    "list upwards": _set("large_objects", file="../blobs.toc"),
    "list the table of contents": _set("large_objects", file="toc.dat"),
    "list a table's data": _set("large_objects", file="11.dat"),
    "list one of its own objects": _set("large_objects", file="blob_16401.dat"),
    "list another": _set("large_objects", file="blobs_1.toc"),
    "objects none": _set("large_objects", objects=0),
    "objects one more": _set("large_objects", objects=4),
    "objects huge": _set("large_objects", objects=2**62),
    "objects first another": _set("large_objects", first=16402),
    "objects first zero": _set("large_objects", first=0),
    "objects first negative": _set("large_objects", first=-1),
    "schema another": _set("table", schema="secret"),
    "name another": _set("table", name="customers2"),
    "name endless": _set("table", name="x" * 10_000),
    "name null": _set("table", name=None),
    "extension a number": _set("table", extension=1),
    "a part twice": lambda f: f.pieces.append(f.piece("table")),
    "table of contents first": lambda f: f.pieces.insert(0, f.pieces.pop()),
    "two tables of contents": lambda f: f.pieces.append(f.piece("toc")),
    "version of the future": _header(version=2),
    "version a text": _header(version="1"),
    "version negative": _header(version=-1),
    "version huge": _header(version=10**30),
    "parts one more": _header(parts=99),
    "parts one less": _header(parts=1),
    "parts huge": _header(parts=2**62),
    "parts negative": _header(parts=-1),
    "content unknown": _header(content="everything"),
    "another product's": _header(pgkeep="table"),
    "encoding endless": _header(encoding="x" * 10_000),
    "encoding a path": _header(encoding=["UTF8"]),
    "header's field unknown": _header(created=1),
}


@pytest.mark.parametrize("name", FORGED_INDEXES)
def test_a_forged_index_is_named(name: str) -> None:
    forgery = forged()
    FORGED_INDEXES[name](forgery)
    found = defects(forgery.data())
    assert found, f"{name}: nothing was found"
    assert len(found) < 5000, f"{name}: {len(found)} characters of findings"


RAW_INDEXES = {
    "empty": b"",
    "not a comment": b'{"pgkeep":"index"}\n',
    "no newline": b"-- {}",
    "not JSON": b"-- {\n",
    "not UTF-8": b'-- {"pgkeep":"\xff\xfe"}\n',
    "half a character": b'-- {"pgkeep":"\\ud800"}\n',
    "nested": b"-- " + b"[" * 60_000 + b"\n",
    "nested objects": b"-- " + b'{"a":' * 12_000 + b"\n",
    "a number": b"-- 7\n",
    "zero bytes": b"\0" * 1000,
    "blank lines": b"\n" * 1000,
    "psql": b"\\! touch /tmp/owned\n",
}


@pytest.mark.parametrize("name", RAW_INDEXES)
def test_an_index_that_is_none_is_named(name: str) -> None:
    assert "index" in defects(forge.with_index(forged().body(), RAW_INDEXES[name]))


@settings(max_examples=150)
@given(st.binary(max_size=400))
def test_an_index_of_noise_is_named(noise: bytes) -> None:
    body = forged().body()
    assert look(forge.with_index(body, noise), "digests").defects
    assert look(forge.with_compressed_index(body, noise), "digests").defects


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.data())
def test_any_value_in_any_place_of_the_index_ends_in_words(data: st.DataObject) -> None:
    forgery = forged()
    line = data.draw(st.sampled_from([piece.line for piece in forgery.pieces]))
    field = data.draw(st.sampled_from(sorted(line)))
    line[field] = data.draw(json_values)
    found = look(forgery.data())
    assert (
        found.defects
        or line == forged().pieces[[p.line for p in forgery.pieces].index(line)].line
        or (field == "extension")
    )


@pytest.mark.parametrize(
    "footer",
    [
        Footer(0, 0, DIGEST),
        Footer(10**19 - 1, 10**19 - 1, DIGEST),
        Footer(len(HONEST) - FOOTER_BYTES, 0, hashlib.sha256(b"").hexdigest()),
        Footer(0, len(HONEST) - FOOTER_BYTES, hashlib.sha256(HONEST[:-FOOTER_BYTES]).hexdigest()),
        Footer(len(HONEST) - FOOTER_BYTES - 1, 1, DIGEST),
        Footer(2**63, 2**63 - 1, DIGEST),
    ],
)
def test_a_footer_of_absurd_numbers_is_named(footer: Footer) -> None:
    assert defects(HONEST[:-FOOTER_BYTES] + artifact.encode_footer(footer))


def test_a_footer_of_the_future_is_told_from_a_broken_one() -> None:
    text = HONEST[-FOOTER_BYTES:]
    assert "use a newer pgkeep" in defects(HONEST[:-FOOTER_BYTES] + text.replace(b"footer 1", b"footer 2"))


# ---------------------------------------------------------------- gzip's own tricks


@pytest.mark.parametrize(
    "fields",
    [{"name": b"a" * 70_000}, {"comment": b"c" * 70_000}, {"extra": b"e" * 65_535}, {"name": b"../../etc/passwd"}],
    ids=["name", "comment", "extra", "path"],
)
@pytest.mark.parametrize("check", [False, True], ids=["", "header-crc"])
def test_optional_fields_of_gzip_carry_nothing_in_and_fool_nobody(fields: dict[str, bytes], check: bool) -> None:
    """RFC 1952 allows them, stock tools skip them: the text counts."""
    forgery = forged()
    piece = forgery.piece("table")
    text = gzip.decompress(piece.members[0])
    piece.members = [forge.gzip_with_fields(text, **fields, check=check)]
    piece.describe([text])
    assert defects(forgery.data()) == ""


def test_two_members_in_one_chunk_are_named() -> None:
    forgery = forged()
    piece = forgery.piece("table")
    halves = b"1\tAda\n", b"2\tGrace\n" + artifact.DATA_END
    piece.members = [b"".join(map(gzip.compress, halves))]
    piece.describe([b"".join(halves)])
    assert "a member does not end where the index says" in defects(forgery.data())


@pytest.mark.parametrize(
    "member", [b"\0" * 40, zlib.compress(b"1\tAda\n" * 50), b"\x1f\x8b" * 30], ids=["zeros", "zlib", "magic"]
)
def test_a_member_that_is_no_gzip_is_named(member: bytes) -> None:
    forgery = forged()
    piece = forgery.piece("table")
    piece.members = [member]
    piece.describe([b"1\tAda\n" + artifact.DATA_END])
    assert "table public.customers, member 1" in defects(forgery.data())


# ---------------------------------------------------------------- bombs

_MEASURE = """
import resource, sys
from pathlib import Path
from pgkeep.vault.verify import verify_path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = verify_path(Path(sys.argv[1]), sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(report.findings[0].message)
"""


def measured(path: Path, depth: Depth = "content") -> tuple[int, str]:
    """Growth of the peak resident memory in KiB, and the first finding; in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _MEASURE, str(path), depth]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    growth, finding = done.stdout.splitlines()[:2]
    return int(growth), finding


def _ten_gigabytes() -> bytes:
    """A gzip member that never ends its zeros: one compressed piece, again and again."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = compressor.compress(b"\0" * (32 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + piece * 320


def _table_bomb() -> bytes:
    forgery = forged()
    piece = forgery.piece("table")
    piece.members = [_ten_gigabytes()]
    piece.line["chunks"] = [[len(piece.members[0]), CHUNK_BYTES, 3, hashlib.sha256(piece.members[0]).hexdigest()]]
    return forgery.data()


def _toc_bomb(member_text: bytes, count: int) -> bytes:
    forgery = forged()
    piece = forgery.piece("toc")
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece.members = [compressor.compress(member_text) + compressor.flush()]
    piece.describe([member_text])
    piece.members *= count
    piece.line["chunks"] *= count
    return forgery.data()


def _index_of(line: bytes, count: int) -> bytes:
    header = b'-- {"pgkeep":"index","version":1,"content":"database","encoding":"UTF8","parts":%d}\n' % count
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    pieces = [compressor.compress(header), *(compressor.compress(line * 1000) for _ in range(count // 1000))]
    return b"".join([*pieces, compressor.flush()])


_LINE = b'-- {"kind":"sql","chunks":[[18,0,0,"' + b"0" * 64 + b'"]]}\n'
_BASE64_LINES = (b"-- " + b"A" * 4096 + b"\n") * (CHUNK_BYTES // 4100)


def _index_bomb(index: bytes) -> bytes:
    return forge.with_compressed_index(forged().body(), index)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "table": (_table_bomb, "a member holds more than the index says"),
    "index of zeros": (lambda: _index_bomb(_ten_gigabytes()), "bytes of text"),
    "index of parts": (lambda: _index_bomb(_index_of(_LINE, 200_000)), "bytes of text"),
    "index of a few parts too many": (lambda: _index_bomb(_index_of(_LINE, 1_000)), "more than there is"),
    "index in one line": (lambda: _index_bomb(_index_of(b"-- " + b"[" * 1000, 100_000)), "bytes of text"),
    "contents of many members": (lambda: _toc_bomb(_BASE64_LINES, 700), "more than"),
    "contents in one line": (lambda: _toc_bomb(b"A" * CHUNK_BYTES, 20), "a line is longer than"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_does_not_go_off(name: str, scratch: Path) -> None:
    make, words = BOMBS[name]
    path = scratch / "bomb.sql.gz"
    path.write_bytes(make())
    growth, finding = measured(path, "digests" if name.startswith("contents") else "content")
    assert words in finding
    assert growth < MEMORY_LIMIT_KIB


def test_a_file_that_is_wrong_throughout_is_described_in_bounded_space() -> None:
    forgery = forged()
    piece = forgery.piece("table")
    piece.members = [b"\0" * 18] * (DEFECTS_LIMIT + 50)
    piece.line["chunks"] = [[18, 0, 3, DIGEST]] * len(piece.members)
    found = look(forgery.data()).defects
    assert len(found) == DEFECTS_LIMIT + 1
    assert "what follows was not looked at" in found[-1]


# ---------------------------------------------------------------- contents that lie


def test_contents_that_name_another_table_are_named() -> None:
    liar = (dataclasses.replace(forge.TABLES[0], name="salaries"), *forge.TABLES[1:])
    data = forge.build(contents=forge.toc(liar))
    assert defects(data, "digests") == "table public.customers (11.dat) is public.salaries in the archive's contents"


def test_contents_of_another_dump_are_named() -> None:
    found = defects(forge.build(contents=forge.toc(forge.TABLES[1:], objects_file=None)), "digests").splitlines()
    assert found == [
        "table public.customers (11.dat) is not in the archive's contents",
        "the large objects of blobs.toc are not in the archive's contents",
    ]


def test_restore_refuses_what_contradicts_itself_before_it_looks_for_a_server(scratch: Path) -> None:
    path = scratch / "liar.sql.gz"
    path.write_bytes(forge.build(contents=forge.toc(forge.TABLES[1:])))
    done = pgkeep("restore", path, "--to", "host=/nowhere dbname=x", root=scratch / "none")
    assert_clean(done, 7, "the backup contradicts itself: table public.customers (11.dat)")


@pytest.mark.parametrize("version", ["", "abc", "-1", "\N{ARABIC-INDIC DIGIT ONE}5", "\x1b[2J", "99999999999999999999"])
def test_an_impossible_version_of_pg_dump_is_refused(version: str) -> None:
    with pytest.raises(PgkeepError, match=r"no version of pg_dump|can't read it"):
        choose_pg_restore(version, 15)


def test_versions_before_a_release_are_read() -> None:
    with pytest.raises(RefusedError, match=r"18beta1.*version 15"):
        choose_pg_restore("18beta1", 15)


@pytest.mark.parametrize(
    ("value", "members"),
    [
        ('"$user", public', ["$user", "public"]),
        ('"My, ""Schema", public', ['My, "Schema', "public"]),
        ('""', [""]),
        ("public; DROP TABLE customers", ["public; DROP TABLE customers"]),
        ('a"; DROP TABLE customers; --', ['a"; DROP TABLE customers; --']),
        ("a, (SELECT 1)", ["a, (SELECT 1)"]),
    ],
)
def test_a_setting_from_a_manifest_never_becomes_sql(value: str, members: list[str]) -> None:
    assert list_members(value) == members


@settings(max_examples=100)
@given(st.integers(0, len(forge.toc()) - 1), st.integers(1, 255))
def test_damaged_contents_under_right_digests_end_in_words_or_in_another_whole_archive(
    position: int, flip: int
) -> None:
    damaged = bytearray(forge.toc())
    damaged[position] ^= flip
    assert all(isinstance(defect, str) for defect in look(forge.build(contents=bytes(damaged)), "digests").defects)


SMUGGLED = {
    "a statement": b"00');\nDROP TABLE customers;\nSELECT pg_catalog.lowrite(0, '\\x00",
    "a statement in a call": b"00'); DROP TABLE customers; --",
    "a psql command": b"00');\n\\! touch /tmp/owned\n",
    "another function": b"00');\nSELECT pg_catalog.lo_unlink(16401);\n",
    "an uneven digit": b"000",
    "an object twice": b"00');\nSELECT pg_catalog.lo_close(0);\n\n"
    b"SELECT pg_catalog.lo_open('16402', 131072);\nSELECT pg_catalog.lowrite(0, '\\x00');\n"
    b"SELECT pg_catalog.lo_close(0);\n\nSELECT pg_catalog.lo_open('16401', 131072);\n"
    b"SELECT pg_catalog.lowrite(0, '\\x00",
    "too few": b"00",
    "an endless line": b"0" * (large_objects.LINE_LIMIT_BYTES + 1),
    "bytes": b"\xff\xfe\0",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_large_objects_with_something_smuggled_in_are_refused(name: str, scratch: Path) -> None:
    data = forge.build(objects_text=SMUGGLED[name])
    assert "large object" in defects(data) or "a line is longer" in defects(data)
    path = scratch / "smuggler.sql.gz"
    path.write_bytes(data)
    directory = scratch / "archive"
    directory.mkdir()
    with LocalFile.open(path) as file, pytest.raises(FormatError):
        rebuild(ArtifactReader(file), file, directory, lambda part: True)


def test_the_honest_ones_are_rebuilt(scratch: Path) -> None:
    path = scratch / "honest.sql.gz"
    path.write_bytes(HONEST)
    directory = scratch / "archive"
    directory.mkdir()
    with LocalFile.open(path) as file:
        rebuild(ArtifactReader(file), file, directory, lambda part: True)
    assert (directory / "toc.dat").read_bytes() == forge.toc()
    assert gzip.decompress((directory / "12.dat.gz").read_bytes()) == b"".join(forge.TABLES[1].members)
    assert {n: (directory / f"blob_{n}.dat").read_bytes() for n, _ in forge.OBJECTS} == dict(forge.OBJECTS)
    assert (directory / "blobs.toc").read_text() == "".join(f"{n} blob_{n}.dat\n" for n, _ in forge.OBJECTS)
