"""Sizes and names at their edges: chunks exactly full, rows longer than a chunk, thousands of tables, any encoding."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.agent.compress import ROW_SEARCH_BYTES
from pgkeep.demo import awkward
from pgkeep.domain import names
from pgkeep.domain.artifact import CHUNK_BYTES, DATA_END, Index
from tests import clusters
from tests.clusters import Clusters, Database, NewDatabase
from tests.integration import keeper
from tests.integration.keeper import Keeper

SLOW_VARIABLE = "TESTS_SLOW"
MANY_TABLES = 3000
MANY_LARGE_OBJECTS = 5000
LARGEST_ROW_BYTES = 320_000_000
MEMORY_LIMIT_KIB = 160 * 1024

# COPY text of a table of one row, end mark included: these many bytes exactly. The end mark lies across the cut at
# every place that it can.
SIZES = [CHUNK_BYTES - 1, *(CHUNK_BYTES + offset for offset in range(len(DATA_END) + 2)), 2 * CHUNK_BYTES + 1]
# The same of a table of many rows.
ROWS_SIZES = [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1]


def _index(file: Path) -> Index:
    with LocalFile.open(file) as opened:
        return ArtifactReader(opened).index


def _round_trip(source: Database, kept: Keeper, file: Path) -> None:
    """Both faces against the source itself: what is tested here loses nothing by a dump."""
    tools = source.cluster.installation
    reference = awkward.fingerprint(source.conninfo, tools)
    with keeper.fresh_name(source.cluster) as target:
        kept.restore(file, target.conninfo, "--create")
        assert awkward.differences(reference, awkward.fingerprint(target.conninfo, tools)) == []
    with clusters.temporary_database(source.cluster) as target:
        # Into an encoding of its own: the dump says which one it is in.
        keeper.stock_restore(file, target)
        assert target.value("SELECT count(*) FROM pg_class WHERE oid >= 16384 AND relkind = 'r'") == source.value(
            "SELECT count(*) FROM pg_class WHERE oid >= 16384 AND relkind = 'r'"
        )


@pytest.fixture(scope="module")
def exact(session_clusters: Clusters) -> Iterator[tuple[Database, Keeper]]:
    """A table for each size: of one row, cut anywhere, or of rows of 1 000 bytes, cut at their ends."""
    cluster = session_clusters.get(15)
    with clusters.temporary_database(cluster) as database, keeper.keeping(cluster, database.name) as kept:
        for number, size_bytes in enumerate(SIZES):
            database.execute(
                f"CREATE TABLE one_{number} (v text);"
                f"INSERT INTO one_{number} VALUES (repeat('x', {size_bytes - len(DATA_END) - 1}))"
            )
        for number, size_bytes in enumerate(ROWS_SIZES):
            text_bytes = size_bytes - len(DATA_END)
            database.execute(
                f"CREATE TABLE rows_{number} (v text);"
                f"INSERT INTO rows_{number} SELECT rpad(n::text, 999, 'y')"
                f" FROM generate_series(1, {text_bytes // 1000 - 1}) AS n;"
                f"INSERT INTO rows_{number} VALUES (repeat('z', {text_bytes % 1000 + 999}))"
            )
        yield database, kept


@pytest.mark.parametrize("spool", ["never", "always"])
def test_tables_of_exactly_a_chunk_and_around_it(exact: tuple[Database, Keeper], spool: str) -> None:
    source, kept = exact
    file = kept.backup(BACKUP_SPOOL_COMPRESSION=spool, BACKUP_VERIFY="yes")
    tables = {table.name: table for table in _index(file).tables}
    wanted = {f"one_{number}": size_bytes for number, size_bytes in enumerate(SIZES)}
    wanted |= {f"rows_{number}": size_bytes for number, size_bytes in enumerate(ROWS_SIZES)}
    assert {name: table.raw_bytes for name, table in tables.items()} == wanted
    for name, table in tables.items():
        assert table.rows == source.value(f"SELECT count(*) FROM {name}")
        sizes = [chunk.raw_bytes for chunk in table.chunks]
        # Cut at a row's end where one is near; a single long row has only those of the end mark.
        near = 0 if spool == "always" else ROW_SEARCH_BYTES if name.startswith("rows") else len(DATA_END)
        assert all(CHUNK_BYTES - near <= size <= CHUNK_BYTES for size in sizes[:-1])
    assert [len(tables[f"one_{number}"].chunks) for number in range(3)] == [1, 1, 2]


def test_both_faces_restore_them(exact: tuple[Database, Keeper]) -> None:
    source, kept = exact
    file = kept.backup()
    for face in ("pgkeep", "stock"):
        with clusters.temporary_database(source.cluster) as target:
            if face == "pgkeep":
                kept.restore(file, target.conninfo)
            else:
                keeper.stock_restore(file, target)
            for number, size_bytes in enumerate(SIZES):
                assert target.value(f"SELECT length(v) FROM one_{number}") == size_bytes - len(DATA_END) - 1
            for number in range(len(ROWS_SIZES)):
                digest = f"SELECT md5(string_agg(v, '' ORDER BY v)) FROM rows_{number}"
                assert target.value(digest) == source.value(digest)


def test_rows_without_anything_in_them(new_database: NewDatabase, cluster15: ScratchCluster) -> None:
    """No rows; no columns; empty strings: their text is newlines, like the end mark's."""
    source = new_database(cluster15)
    source.execute(
        "CREATE TABLE none (v text); CREATE TABLE bare (); CREATE TABLE hollow (v text);"
        "INSERT INTO hollow SELECT '' FROM generate_series(1, 100000);"
        "CREATE TABLE marks (v text); INSERT INTO marks SELECT E'\\\\.' FROM generate_series(1, 1000)"
    )
    with (
        psycopg.connect(source.conninfo, autocommit=True) as connection,
        connection.cursor() as cursor,
        cursor.copy("COPY bare FROM STDIN") as copy,
    ):
        copy.write(b"\n" * (CHUNK_BYTES + 5))
    with keeper.keeping(cluster15, source.name) as kept:
        file = kept.backup()
        rows = {table.name: table.rows for table in _index(file).tables}
        assert rows == {"none": 0, "bare": CHUNK_BYTES + 5, "hollow": 100_000, "marks": 1000}
        assert kept.json("verify", "latest")["ok"] is True
        source.execute("TRUNCATE bare; INSERT INTO bare SELECT FROM generate_series(1, 1000)")
        with clusters.temporary_database(cluster15) as target:
            # Seventeen million rows of nothing take their time to load: a thousand behave alike.
            kept.restore(kept.backup(), target.conninfo)
            assert target.value("SELECT count(*) FROM bare") == 1000
            assert target.value("SELECT count(*) FROM hollow WHERE v = ''") == 100_000
            assert target.value("SELECT count(*) FROM marks WHERE v = E'\\\\.'") == 1000


@pytest.mark.parametrize("spool", ["never", "always"])
def test_a_row_longer_than_a_chunk(new_database: NewDatabase, cluster15: ScratchCluster, spool: str) -> None:
    source = new_database(cluster15)
    source.execute(
        "CREATE TABLE long (id int, v text); ALTER TABLE long ALTER v SET STORAGE EXTERNAL;"
        "INSERT INTO long SELECT n, repeat(md5(n::text) || E'\\n\\\\', 600000) FROM generate_series(1, 2) AS n"
    )
    with keeper.keeping(cluster15, source.name) as kept:
        _round_trip(source, kept, kept.backup(BACKUP_SPOOL_COMPRESSION=spool))


def test_a_row_of_hundreds_of_megabytes_in_bounded_memory(new_database: NewDatabase, cluster15: ScratchCluster) -> None:
    if os.environ.get(SLOW_VARIABLE) != "1":
        clusters.skip(f"takes a minute: set {SLOW_VARIABLE}=1", could_run_here=False)
    source = new_database(cluster15)
    source.execute(
        "CREATE TABLE longest (v text); ALTER TABLE longest ALTER v SET STORAGE EXTERNAL;"
        f"INSERT INTO longest VALUES (repeat('0123456789abcde' || E'\\n', {LARGEST_ROW_BYTES // 16}))"
    )
    digest = "SELECT md5(v) FROM longest"
    with keeper.keeping(cluster15, source.name) as kept, clusters.temporary_database(cluster15) as target:
        with _watched_memory() as peak_kib:
            file = kept.backup(BACKUP_VERIFY="yes")
        kept.restore(file, target.conninfo)
        assert target.value(digest) == source.value(digest)
    assert 10_000 < max(peak_kib) < MEMORY_LIMIT_KIB


@contextlib.contextmanager
def _watched_memory() -> Iterator[list[int]]:
    """The peak memory (VmHWM) of the pgkeep that runs meanwhile, sampled; pg_dump's own is not ours."""
    peaks = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for process_directory in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError, StopIteration):
                    if b"-m\0pgkeep\0backup" in (process_directory / "cmdline").read_bytes():
                        lines = (process_directory / "status").read_text().splitlines()
                        peaks.append(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def test_thousands_of_tables(new_database: NewDatabase, cluster15: ScratchCluster) -> None:
    source = new_database(cluster15)
    # Not one transaction: its locks would not fit into the server's table.
    for start in range(0, MANY_TABLES, 500):
        source.execute(
            f"DO $$BEGIN FOR n IN {start}..{start + 499} LOOP EXECUTE format("
            "'CREATE TABLE %I AS SELECT %s AS v WHERE %s %% 3 > 0', 'table ' || n, n, n); END LOOP; END$$"
        )
    with keeper.keeping(cluster15, source.name) as kept:
        started = time.monotonic()
        document = kept.json("backup")
        dumping_seconds = time.monotonic() - started
        assert document["tables"] == MANY_TABLES
        assert document["rows"] == MANY_TABLES * 2 // 3
        file = kept.file(document)
        with clusters.temporary_database(cluster15) as target:
            answer = kept.restore(file, target.conninfo, "--table", '"table 1"', "--table", '"table 2999"')
            assert answer["rows"] == 2
        with clusters.temporary_database(cluster15) as target:
            kept.restore(file, target.conninfo)
            assert target.value("SELECT count(*) FROM pg_class WHERE relname ~ '^table '") == MANY_TABLES
    # Ten times what an idle machine takes: only what grows with the square would be slower.
    assert dumping_seconds < 60


@pytest.mark.parametrize(("major", "spool"), [(15, "always"), (18, "never")])
def test_thousands_of_large_objects_and_a_huge_one(
    new_database: NewDatabase, session_clusters: Clusters, major: int, spool: str
) -> None:
    """PostgreSQL 15 lists all of them in one file, 18 a thousand a file."""
    cluster = session_clusters.get(major)
    source = new_database(cluster)
    source.execute(
        f"SELECT lo_from_bytea(n, convert_to(repeat('object ' || n, n % 50), 'UTF8'))"
        f" FROM generate_series(100001, {100000 + MANY_LARGE_OBJECTS}) AS n;"
        "SELECT lo_from_bytea(100, decode(repeat(md5('x'), 2621440), 'hex'));"
        # With a hole, which a dump turns into zeros.
        "SELECT lo_create(102); SELECT lo_put(102, 3000000, 'after the hole')"
    )
    reference = awkward.fingerprint(source.conninfo, cluster.installation)
    with keeper.keeping(cluster, source.name) as kept:
        file = kept.backup(BACKUP_SPOOL_COMPRESSION=spool)
        assert sum(part.objects for part in _index(file).large_objects) == MANY_LARGE_OBJECTS + 2
        with keeper.fresh_name(cluster) as target:
            kept.restore(file, target.conninfo, "--create")
            assert awkward.differences(reference, awkward.fingerprint(target.conninfo, cluster.installation)) == []
        with clusters.temporary_database(cluster) as target:
            keeper.stock_restore(file, target)
            assert awkward.differences(reference, awkward.fingerprint(target.conninfo, cluster.installation)) == []


NAMES = [
    "a/../b",
    "\"quoted\" 'twice' \\",
    "line\nbreak",
    "100%s %2F",
    "Übergröße 日本",
    ".hidden",
    "-r",
    "x" * 63,
    "a=b c",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_database_of_any_name(new_database: NewDatabase, cluster15: ScratchCluster, name: str) -> None:
    """With others beside it, so that its name becomes part of a file's name."""
    source = new_database(cluster15, name=name)
    source.execute("CREATE TABLE t AS SELECT 1 AS x")
    with keeper.keeping(cluster15, None) as kept:
        listed = f"[{_toml_string(name)}, {_toml_string('postgres')}]"
        document = kept.of(DB_NAMES=listed).json("backup")
        found = {backup["database"]: kept.file(backup) for backup in document["backups"]}
        assert found.keys() == {name, "postgres"}
        assert found[name].parent == kept.root / "active" / "manual"
        assert names.parse_dump_name(found[name].name)[1] == name
        assert kept.json("verify", "--all")["ok"] is True
        answer = kept.json("restore", "latest", "--database", name, "--create", "--to",
                           cluster15.conninfo(f"{name}2"[-63:]))  # fmt: skip
        restored = Database(cluster15, answer["database"])
        assert restored.value("SELECT x FROM t") == 1
        with psycopg.connect(cluster15.conninfo(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(restored.name)))


def _toml_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


ENCODINGS = {
    "LATIN1": "Größe ÿ".encode("latin-1"),
    "EUC_JP": "日本語 表".encode("euc_jp"),
    "WIN1251": "Таблица".encode("cp1251"),
    "KOI8R": "Ёж".encode("koi8-r"),
    "SQL_ASCII": b"odd \xff\xfe name",
}


@pytest.mark.parametrize(("encoding", "raw"), ENCODINGS.items(), ids=list(ENCODINGS))
def test_other_encodings(cluster15: ScratchCluster, encoding: str, raw: bytes) -> None:
    """Names and rows in them; SQL_ASCII with bytes that are no text at all."""
    with contextlib.ExitStack() as stack:
        postgres = Database(cluster15, "postgres")
        name = f"in_{encoding.lower()}"
        postgres.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        stack.callback(postgres.execute, f"DROP DATABASE {name}")
        source = Database(cluster15, name)
        statements = (
            b'CREATE TABLE "NAME" (v text); INSERT INTO "NAME" VALUES (\'NAME \\.\'), (NULL);'
            b"COMMENT ON TABLE \"NAME\" IS 'NAME'; SELECT lo_from_bytea(0, 'x')"
        )
        _run_bytes(source, statements.replace(b"NAME", raw))
        kept = stack.enter_context(keeper.keeping(cluster15, name))
        document = kept.json("backup")
        assert document["database"] == name
        assert (document["tables"], document["rows"]) == (1, 2)
        assert kept.json("verify", "latest")["ok"] is True
        assert kept.run("show", "latest").code == 0
        with keeper.fresh_name(cluster15) as target:
            kept.restore(kept.file(document), target.conninfo, "--create")
            recorded = f"SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = '{target.name}'"
            assert postgres.value(recorded) == encoding
            assert _dumped(target) == _dumped(source)
        stock = f"{name}_stock"
        postgres.execute(f"CREATE DATABASE {stock} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        stack.callback(postgres.execute, f"DROP DATABASE {stock}")
        keeper.stock_restore(kept.file(document), Database(cluster15, stock))
        assert _dumped(Database(cluster15, stock)) == _dumped(source)


def _run_bytes(database: Database, statements: bytes) -> None:
    with psycopg.connect(database.conninfo, autocommit=True) as connection:
        # As they stand, in whatever encoding the server has.
        result = connection.pgconn.exec_(statements)
        assert not result.error_message, result.error_message


def _dumped(database: Database) -> bytes:
    done = keeper.shell(
        '"$dump" --dbname="$target" | grep -av "^.\\(un\\)\\?restrict "',
        dump=database.cluster.installation.tool("pg_dump"),
        target=database.conninfo,
    )
    return done.stdout


def test_strings_that_do_not_conform(new_database: NewDatabase, cluster15: ScratchCluster) -> None:
    """standard_conforming_strings=off in the database: backslashes in literals are doubled, those of lowrite, too."""
    source = new_database(cluster15)
    source.execute(
        "SELECT lo_from_bytea(0, '\\x00ff5c2700'), lo_create(0);"
        "SELECT lo_from_bytea(0, decode(repeat('5c27', 300000), 'hex'));"
        "CREATE TABLE t (v text DEFAULT E'a\\\\b'); INSERT INTO t VALUES (E'c\\\\d');"
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$SELECT E'\\\\'$$;"
        f"ALTER DATABASE {source.name} SET standard_conforming_strings TO off;"
        f"ALTER DATABASE {source.name} SET escape_string_warning TO off"
    )
    with keeper.keeping(cluster15, source.name) as kept:
        file = kept.backup()
        _round_trip(source, kept, file)
        with clusters.temporary_database(cluster15) as target:
            keeper.stock_restore(file, target)
            sizes = "SELECT array_agg(md5(lo_get(oid)) ORDER BY oid) FROM pg_largeobject_metadata"
            assert target.value(sizes) == source.value(sizes)
