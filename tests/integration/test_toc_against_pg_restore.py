"""Our reading of toc.dat against ``pg_restore -l -v``: every entry, every major, stock and embedded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pgkeep.adapters import pgbinaries, process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.domain import toc
from pgkeep.domain.toc import Toc
from tests.clusters import Database, NewDatabase

_LINE = re.compile(r"(\d+); (\d+) (\d+) (.*)")
_DEPENDS = re.compile(r";\tdepends on: ([\d ]+)")
_COUNT = re.compile(r";     TOC Entries: (\d+)")
_VERSION = re.compile(r";     Dump Version: (\d+)\.(\d+)-0")


def _tool(name: str, major: int) -> Path:
    return pgbinaries.choose(name, major, match="exact").path


def _dumped(database: Database, directory: Path, *options: str) -> Path:
    target = directory / "dump"
    program = _tool("pg_dump", database.cluster.installation.major)
    completed = process.run([program, "-Fd", "-f", target, *options, "-d", database.conninfo])
    assert completed.return_code == 0, completed.stderr
    return target


def _listed(dump: Path, major: int) -> str:
    completed = process.run([_tool("pg_restore", major), "-l", "-v", dump])
    assert completed.return_code == 0, completed.stderr
    return completed.stdout.decode()


def _as_pg_restore_writes(found: Toc) -> list[str]:
    """``-l`` turns a name's line ends into blanks, and writes ``-`` for no schema."""
    lines = []
    for each in found.entries:
        name, schema = (re.sub(r"[\r\n]", " ", text) for text in (each.name, each.schema or "-"))
        catalog = f"{each.catalog[0]} {each.catalog[1]}"
        lines.append(f"{each.dump_id}; {catalog} {each.description} {schema} {name} {each.owner}")
        if each.dependencies:
            lines.append(";\tdepends on: " + " ".join(map(str, each.dependencies)))
    return lines


def _check(dump: Path, major: int) -> Toc:
    found = toc.read((dump / "toc.dat").read_bytes(), "utf-8")
    listing = _listed(dump, major)
    head, _, body = listing.partition(";\n; Selected TOC Entries:\n;\n")
    count, version = _COUNT.search(head), _VERSION.search(head)
    assert count is not None
    assert version is not None
    assert found.archive_version == (int(version.group(1)), int(version.group(2)))
    assert f";     Dumped by pg_dump version: {found.dump_version}\n" in head
    assert f";     Dumped from database version: {found.server_version}\n" in head
    assert len(found.entries) == int(count.group(1))
    assert _as_pg_restore_writes(found) == body.splitlines()
    return found


def test_every_entry_of_the_awkward_database(any_awkward: Database, tmp_path: Path) -> None:
    major = any_awkward.cluster.installation.major
    options = ["--statistics"] if major >= 18 else []
    dump = _dumped(any_awkward, tmp_path, *options)
    found = _check(dump, major)
    assert found.archive_version == {15: (1, 14), 16: (1, 15), 18: (1, 16)}[major]
    named = {entry.filename for entry in found.data_entries}
    on_disk = {path.name.removesuffix(".gz") for path in dump.iterdir() if not path.name.startswith("blob_")}
    assert named == on_disk - {"toc.dat"}
    for entry in found.data_entries:
        table = found.table_of(entry)
        assert (table is None) == entry.is_large_objects
        assert table is None or table.table_name == entry.table_name


def test_names_with_line_ends_and_statements(
    any_cluster: ScratchCluster, new_database: NewDatabase, tmp_path: Path
) -> None:
    database = new_database(any_cluster)
    database.execute(
        """
        CREATE SCHEMA "a; b";
        CREATE TABLE "a; b"."line
end" ("1; 2" int DEFAULT 1 PRIMARY KEY, "depends on: 3" text);
        COMMENT ON COLUMN "a; b"."line
end"."1; 2" IS E'\\\\.\\nCOPY x FROM stdin;';
        """
    )
    found = _check(_dumped(database, tmp_path), any_cluster.installation.major)
    (table,) = [entry for entry in found.entries if entry.is_table]
    assert (table.schema, table.name) == ("a; b", "line\nend")


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP"])
def test_another_encoding(encoding: str, cluster15: ScratchCluster, new_database: NewDatabase, tmp_path: Path) -> None:
    database = new_database(cluster15)
    name = {"LATIN1": "café", "EUC_JP": "日本"}[encoding]
    database.execute(f'CREATE TABLE "{name}" (a int)')
    data = (_dumped(database, tmp_path, f"--encoding={encoding}") / "toc.dat").read_bytes()
    found = toc.read(data, {"LATIN1": "latin-1", "EUC_JP": "euc_jp"}[encoding])
    assert found.encoding == encoding
    assert [entry.name for entry in found.entries if entry.is_table] == [name]
    # With the wrong codec the name is not right, but everything is still there.
    wrong = toc.read(data, "utf-8")
    assert [entry.dump_id for entry in wrong.entries] == [entry.dump_id for entry in found.entries]
    assert "\\x" in next(entry.name for entry in wrong.entries if entry.is_table)


def test_a_data_only_archive(cluster18: ScratchCluster, new_database: NewDatabase, tmp_path: Path) -> None:
    database = new_database(cluster18)
    database.execute("CREATE TABLE parent (a int PRIMARY KEY); CREATE TABLE child (a int REFERENCES parent)")
    found = _check(_dumped(database, tmp_path, "--data-only"), 18)
    assert [found.table_of(entry) for entry in found.data_entries] == [None, None]
