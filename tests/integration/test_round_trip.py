"""What goes in comes out: by pgkeep, by gunzip and psql, by pg_restore -j; on every major, equal to pg_dump | psql."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile
from pgkeep.demo import awkward
from tests import clusters
from tests.clusters import AWKWARD_TEMPLATE, MAJORS, Clusters, Database
from tests.integration import keeper
from tests.integration.keeper import Keeper

PGBENCH_SCALE = 2


@dataclasses.dataclass(frozen=True)
class Subject:
    """A database, its backups (as they come, and with a compressed spool), and what stock tools restore."""

    database: Database
    keeper: Keeper
    plain: Path
    spooled: Path
    reference: dict[str, str]

    def assert_equal(self, restored: Database) -> None:
        found = awkward.fingerprint(restored.conninfo, self.database.cluster.installation)
        assert awkward.differences(self.reference, found) == []


CASES = [(kind, major) for major in MAJORS for kind in ("awkward", "pgbench")]


@pytest.fixture(scope="module", params=CASES, ids=[f"{kind}-pg{major}" for kind, major in CASES])
def subject(request: pytest.FixtureRequest, session_clusters: Clusters) -> Iterator[Subject]:
    kind, major = request.param
    with contextlib.ExitStack() as stack:
        if kind == "awkward":
            cluster = session_clusters.get_with_awkward_template(major)
            database = stack.enter_context(clusters.temporary_database(cluster, template=AWKWARD_TEMPLATE))
        else:
            database = stack.enter_context(clusters.temporary_database(session_clusters.get(major)))
            _fill_with_pgbench(database)
        kept = stack.enter_context(keeper.keeping(database.cluster, database.name))
        plain = kept.backup()
        spooled = kept.backup(BACKUP_SPOOL_COMPRESSION="always")
        with clusters.temporary_database(database.cluster) as copy:
            keeper.stock_copy(database, copy)
            reference = awkward.fingerprint(copy.conninfo, database.cluster.installation)
        yield Subject(database, kept, plain, spooled, reference)


def _fill_with_pgbench(database: Database) -> None:
    keeper.shell(
        '"$pgbench" --initialize --quiet --foreign-keys --partitions=3 --scale="$scale" "$target"',
        pgbench=database.cluster.installation.tool("pgbench"),
        scale=str(PGBENCH_SCALE),
        target=database.conninfo,
    )


def test_pgkeep_restores_into_a_database_of_its_own_making(subject: Subject) -> None:
    with keeper.fresh_name(subject.database.cluster) as target:
        answer = subject.keeper.restore(subject.plain, target.conninfo, "--create")
        subject.assert_equal(target)
    assert answer["database"] == target.name
    assert answer["seconds"]["total"] >= answer["seconds"]["load"] > 0


def test_gunzip_and_psql_restore(subject: Subject) -> None:
    with clusters.temporary_database(subject.database.cluster) as target:
        keeper.stock_restore(subject.plain, target)
        subject.assert_equal(target)


def test_a_compressed_spool_brings_the_same_backup(subject: Subject) -> None:
    """Table by table the same text; and what is between was restored from it, once by each face."""
    assert _table_texts(subject.spooled) == _table_texts(subject.plain)
    with keeper.fresh_name(subject.database.cluster) as target:
        subject.keeper.restore(subject.spooled, target.conninfo, "--create", "--jobs", "2")
        subject.assert_equal(target)
    with clusters.temporary_database(subject.database.cluster) as target:
        keeper.stock_restore(subject.spooled, target)
        subject.assert_equal(target)


def test_pg_restore_reads_the_rebuilt_directory(subject: Subject, tmp_path: Path) -> None:
    directory = keeper.rebuilt(subject.plain, tmp_path / "archive")
    with clusters.temporary_database(subject.database.cluster) as target:
        keeper.shell(
            '"$restore" --exit-on-error --dbname="$target" "$directory"',
            restore=target.cluster.installation.tool("pg_restore"),
            target=target.conninfo,
            directory=directory,
        )
        subject.assert_equal(target)


def test_stock_tools_check_the_file(subject: Subject) -> None:
    for file in (subject.plain, subject.spooled):
        done = keeper.shell('cd "$directory"; sha256sum -c "$sum"; gzip -t "$file"',
                            directory=file.parent, sum=file.name + ".sha256", file=file.name)  # fmt: skip
        assert done.stdout.decode() == f"{file.name}: OK\n"


def test_pgkeep_finds_nothing_wrong(subject: Subject) -> None:
    report = subject.keeper.json("verify", "--all")
    assert report["ok"] is True
    assert report["findings"] == []
    assert len(report["backups"]) == 2


def test_the_index_counts_every_row(subject: Subject) -> None:
    """Against the source itself, table by table: nothing is left out of the index."""
    counted = {line.split(" ", 1)[1]: int(text.split(" ")[0]) for line, text in subject.reference.items()
               if line.startswith("table ")}  # fmt: skip
    with LocalFile.open(subject.plain) as file:
        index = ArtifactReader(file).index
    quoted = {'"{}"."{}"'.format(*(part.replace('"', '""') for part in (table.schema, table.name))): table.rows
              for table in index.tables}  # fmt: skip
    assert quoted == counted


def _table_texts(file: Path) -> dict[str, tuple[int, int, list[bytes]]]:
    """Rows, bytes, and the sorted lines' worth of a table: parallel scans may differ in order, so lines are sorted."""
    found = {}
    with LocalFile.open(file) as opened:
        reader = ArtifactReader(opened)
        for offset, part in reader.index.placed():
            if part in reader.index.tables:
                text = b"".join(reader.text(offset, part))
                found[f"{part.schema}.{part.name}"] = (part.rows, part.raw_bytes, sorted(text.split(b"\n")))
    return found
