"""The database that PostgreSQL's own regression tests leave behind: 1 500 relations of every odd kind.

Name the source tree of a PostgreSQL 15 in ``TESTS_POSTGRES_SOURCE`` (``apt-get source postgresql-15``, unpacked), and
in ``TESTS_POSTGRES_INCLUDE`` the server's headers where they are not in /usr/include/postgresql/15/server; it
takes gcc and about three minutes. ``test_dump_situations.py`` has objects of every kind for every day.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.demo import awkward
from tests import clusters
from tests.clusters import Database
from tests.integration import keeper
from tests.integration.keeper import Keeper

SOURCE_VARIABLE = "TESTS_POSTGRES_SOURCE"
INCLUDE_VARIABLE = "TESTS_POSTGRES_INCLUDE"
MAJOR = 15
# The schedule's groups run in parallel; more sessions than this gain nothing here.
SESSIONS = 4
TEST_SECONDS = 240.0


@pytest.fixture(scope="module")
def regression() -> Iterator[Database]:
    source = os.environ.get(SOURCE_VARIABLE)
    if not source:
        clusters.skip(f"needs PostgreSQL {MAJOR}'s sources: name them in {SOURCE_VARIABLE}", could_run_here=False)
    tests = Path(source) / "src/test/regress"
    with clusters.scratch_directory() as directory, ScratchCluster(MAJOR) as cluster:
        libraries = _libraries(tests, cluster, directory)
        database = Database(cluster, "regression")
        Database(cluster, "postgres").execute("CREATE DATABASE regression TEMPLATE template0")
        for name, value in {"lc_messages": "C", "TimeZone": "PST8PDT", "DateStyle": "Postgres, MDY"}.items():
            database.execute(f"ALTER DATABASE regression SET {name} TO '{value}'")
        for group in _schedule(tests / "parallel_schedule"):
            with concurrent.futures.ThreadPoolExecutor(SESSIONS) as threads:
                list(threads.map(lambda name: _run(name, tests, libraries, directory, database), group))
        # A setup that went wrong (a library that does not load) would leave little, and prove little.
        assert database.value("SELECT count(*) FROM pg_class WHERE oid >= 16384") > 1400
        assert database.value(f"SELECT count(*) FROM pg_proc WHERE probin = '{libraries}/regress.so'") > 20
        yield database


def _libraries(tests: Path, cluster: ScratchCluster, directory: Path) -> Path:
    """regress.so, built, and what the tests load of contrib."""
    include = os.environ.get(INCLUDE_VARIABLE, f"/usr/include/postgresql/{MAJOR}/server")
    compiler: list[str | Path] = ["gcc", "-shared", "-fPIC", "-O1", f"-I{include}", "-o", directory / "regress.so"]
    built = process.run([*compiler, tests / "regress.c"])
    assert built.return_code == 0, built.stderr
    installed = process.run([cluster.installation.tool("pg_config"), "--pkglibdir"])
    for name in ("autoinc.so", "refint.so"):
        shutil.copy(Path(installed.stdout.decode().strip()) / name, directory)
    (directory / "results").mkdir()
    for path in (directory, directory / "results", *directory.glob("*.so")):
        path.chmod(0o777)
    return directory


def _schedule(path: Path) -> Iterator[list[str]]:
    for line in path.read_text().splitlines():
        if line.startswith("test: "):
            yield line.removeprefix("test: ").split()


def _run(name: str, tests: Path, libraries: Path, directory: Path, database: Database) -> None:
    """As pg_regress does it. What a test prints is its own affair; only what it leaves behind matters here."""
    environment = {
        "PG_ABS_SRCDIR": os.fspath(tests),
        "PG_ABS_BUILDDIR": os.fspath(directory),
        "PG_LIBDIR": os.fspath(libraries),
        "PG_DLSUFFIX": ".so",
        "PGTZ": "PST8PDT",
        "PGDATESTYLE": "Postgres, MDY",
        "PGOPTIONS": "-c intervalstyle=postgres_verbose",
    }
    psql = database.cluster.installation.tool("psql")
    command: list[str | Path] = [psql, "-X", "-q", "-d", database.conninfo, "-o", "/dev/null"]
    done = process.run(
        [*command, "-v", "HIDE_TABLEAM=on", "-v", "HIDE_TOAST_COMPRESSION=on"],
        environment=environment,
        input_bytes=(tests / "sql" / f"{name}.sql").read_bytes(),
        timeout_seconds=TEST_SECONDS,
    )
    assert done.return_code in (0, 2, 3), f"{name}: {done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def kept(regression: Database) -> Iterator[tuple[Keeper, Path, dict[str, str]]]:
    with (
        keeper.keeping(regression.cluster, regression.name) as made,
        clusters.temporary_database(regression.cluster) as copy,
    ):
        keeper.stock_copy(regression, copy)
        yield made, made.backup(), awkward.fingerprint(copy.conninfo, regression.cluster.installation)


@pytest.mark.timeout(900)
def test_pgkeep_restores_all_of_it(regression: Database, kept: tuple[Keeper, Path, dict[str, str]]) -> None:
    made, file, reference = kept
    with keeper.fresh_name(regression.cluster) as target:
        made.restore(file, target.conninfo, "--create")
        found = awkward.fingerprint(target.conninfo, regression.cluster.installation)
    assert awkward.differences(reference, found) == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("spool", ["never", "always"])
def test_gunzip_and_psql_restore_all_of_it(
    regression: Database, kept: tuple[Keeper, Path, dict[str, str]], spool: str
) -> None:
    made, file, reference = kept
    if spool == "always":
        file = made.backup(BACKUP_SPOOL_COMPRESSION="always")
    with clusters.temporary_database(regression.cluster) as target:
        keeper.stock_restore(file, target)
        found = awkward.fingerprint(target.conninfo, regression.cluster.installation)
    assert awkward.differences(reference, found) == []


@pytest.mark.timeout(900)
def test_every_table_can_be_restored_alone(regression: Database, kept: tuple[Keeper, Path, dict[str, str]]) -> None:
    """A hundred of them at once, with what they need: types, functions, operators, parents."""
    made, file, _ = kept
    names = regression.value(
        "SELECT array_agg(format('%I.%I', nspname, relname)) FROM (SELECT nspname, relname FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = relnamespace WHERE relkind IN ('r', 'p') AND nspname = 'public'"
        " AND relpersistence = 'p' AND NOT relispartition ORDER BY md5(relname) LIMIT 100) AS chosen"
    )
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(clusters.temporary_database(regression.cluster))
        arguments = [word for name in names for word in ("--table", name)]
        answer = made.restore(file, target.conninfo, "--allow-missing-parents", *arguments)
    assert answer["tables"] >= len(names) - 5
