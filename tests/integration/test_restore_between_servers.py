"""Restores between servers of several versions, and of databases whose own nature is in the way."""

from __future__ import annotations

import contextlib

import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.demo import awkward
from tests import clusters
from tests.clusters import AWKWARD_TEMPLATE, Clusters, Database, NewDatabase
from tests.integration import keeper

RESTORE_FAILED = 8
REFUSED = 11
FIRST = "SELECT min(relname::text) FROM pg_class WHERE oid >= 16384"


def test_one_failing_row_is_a_failure(new_database: NewDatabase, cluster15: ScratchCluster) -> None:
    """A CHECK whose function refuses what it let in before: psql would end with 0, and a table short."""
    source, target = new_database(cluster15), new_database(cluster15)
    source.execute(
        "CREATE TABLE fine AS SELECT 1 AS x;"
        "CREATE FUNCTION strict_check(v int) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
        " IF v > 1 AND current_setting('session_replication_role') = 'origin' THEN"
        " RAISE EXCEPTION 'row % was made by other laws', v; END IF; RETURN true; END $$;"
        "SET session_replication_role = replica;"
        "CREATE TABLE checked (v int CHECK (strict_check(v))); INSERT INTO checked VALUES (1), (2)"
    )
    with keeper.keeping(cluster15, source.name) as kept:
        said = kept.fails(RESTORE_FAILED, "restore", kept.backup(), "--to", target.conninfo)
    assert "row 2 was made by other laws" in said


@pytest.mark.parametrize("newer", [16, 18])
def test_an_older_dump_goes_into_newer_servers(session_clusters: Clusters, newer: int) -> None:
    """With a pg_restore that neither the dump nor the server is too new for."""
    older, younger = session_clusters.get_with_awkward_template(15), session_clusters.get_with_awkward_template(newer)
    with keeper.keeping(older, AWKWARD_TEMPLATE) as kept, keeper.fresh_name(younger) as target:
        file = kept.backup()
        kept.restore(file, target.conninfo, "--create")
        with clusters.temporary_database(younger) as copy:
            keeper.stock_restore(file, copy)
            tools = younger.installation
            assert awkward.differences(awkward.fingerprint(copy.conninfo, tools),
                                       awkward.fingerprint(target.conninfo, tools)) == []  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["--create"]])
def test_a_dump_by_18_is_refused_on_15(session_clusters: Clusters, arguments: list[str]) -> None:
    newer, older = session_clusters.get(18), session_clusters.get(15)
    with clusters.temporary_database(newer) as source, keeper.keeping(newer, source.name) as kept:
        source.execute("CREATE TABLE t AS SELECT 1 AS x")
        context = keeper.fresh_name(older) if arguments else clusters.temporary_database(older)
        with context as target:
            said = kept.fails(REFUSED, "restore", kept.backup(), "--to", target.conninfo, *arguments)
            assert "pg_dump 18" in said
            assert "restore into PostgreSQL 18 or later" in said
            if not arguments:
                assert target.value(FIRST) is None


def test_rows_that_are_loaded_through_the_root_are_counted_there(
    new_database: NewDatabase, cluster15: ScratchCluster
) -> None:
    """pg_dump does so for what is hashed by an enum; siblings that are not, and sub-partitions, go their own way."""
    source, target = new_database(cluster15), new_database(cluster15)
    source.execute(
        "CREATE TYPE colour AS ENUM ('red', 'green', 'blue');"
        "CREATE TABLE flat (c colour, n int) PARTITION BY HASH (c);"
        "CREATE TABLE flat_0 PARTITION OF flat FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE flat_1 PARTITION OF flat FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
        "INSERT INTO flat SELECT (enum_range(NULL::colour))[1 + n % 3], n FROM generate_series(1, 90) AS n;"
        "CREATE TABLE deep (c colour, n int) PARTITION BY RANGE (n);"
        "CREATE TABLE deep_low PARTITION OF deep FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE deep_high PARTITION OF deep FOR VALUES FROM (100) TO (200) PARTITION BY HASH (c);"
        "CREATE TABLE deep_high_0 PARTITION OF deep_high FOR VALUES WITH (MODULUS 1, REMAINDER 0);"
        "INSERT INTO deep SELECT (enum_range(NULL::colour))[1 + n % 3], n FROM generate_series(1, 150) AS n;"
    )
    with keeper.keeping(cluster15, source.name) as kept:
        file = kept.backup()
        kept.restore(file, target.conninfo)
        assert target.value("SELECT count(*) FROM flat") == 90
        assert target.value("SELECT count(*) FROM deep") == 150
        with clusters.temporary_database(cluster15) as other:
            said = kept.fails(REFUSED, "restore", file, "--to", other.conninfo, "--table", "deep_high_0")
            assert "--table 'public.deep'" in said
            assert other.value(FIRST) is None
            kept.restore(file, other.conninfo, "--table", "deep")
            assert other.value("SELECT count(*) FROM deep_high_0") == 51
        with clusters.temporary_database(cluster15) as other:
            kept.restore(file, other.conninfo, "--schema-only")
            eat = "CREATE FUNCTION eat() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
            eat += "CREATE TRIGGER eat BEFORE INSERT ON deep_high_0 FOR EACH ROW EXECUTE FUNCTION eat();"
            other.execute(eat + "ALTER TABLE deep_high_0 ENABLE ALWAYS TRIGGER eat")
            said = kept.fails(RESTORE_FAILED, "restore", file, "--to", other.conninfo, "--data-only")
            assert "public.deep has 99 rows, the backup 150" in said


def test_settings_that_matter_to_the_restore_itself(new_database: NewDatabase, cluster15: ScratchCluster) -> None:
    """A database that would cut its own restore short: settings come last, and are all there in the end."""
    source = new_database(cluster15)
    with contextlib.ExitStack() as stack:
        role = f"settings_{source.name}"
        postgres = Database(cluster15, "postgres")
        postgres.execute(f"CREATE ROLE {role}")
        stack.callback(postgres.execute, f"DROP ROLE {role}")
        stack.callback(postgres.execute, f"ALTER ROLE {role} IN DATABASE {source.name} RESET ALL")
        source.execute('CREATE SCHEMA "My, ""Schema"; CREATE TABLE t AS SELECT n FROM generate_series(1, 100) AS n')
        for setting in (
            'search_path TO "My, ""Schema", public, "$user"',
            "statement_timeout TO '300ms'",
            "default_transaction_read_only TO on",
            "temp_tablespaces TO ''",
            "\"my.app\" TO 'it''s \\ \"quoted\" ünï'",
            "DateStyle TO 'German, DMY'",
        ):
            postgres.execute(f"ALTER DATABASE {source.name} SET {setting}")
        postgres.execute(f"ALTER ROLE {role} IN DATABASE {source.name} SET search_path TO ''")
        kept = stack.enter_context(keeper.keeping(cluster15, source.name))
        target = stack.enter_context(keeper.fresh_name(cluster15))
        answer = kept.restore(kept.backup(), target.conninfo, "--create")
        assert answer["notes"] == []
        query = "SELECT setrole::regrole, ARRAY(SELECT unnest(setconfig) ORDER BY 1) FROM pg_db_role_setting"
        query += " JOIN pg_database AS d ON d.oid = setdatabase WHERE datname = '{}' ORDER BY 1"
        restored, recorded = (_rows(postgres, query.format(name)) for name in (target.name, source.name))
        assert restored == recorded
        assert len(recorded) == 2


def test_the_target_s_own_time_limit_is_not_ours(new_database: NewDatabase, cluster15: ScratchCluster) -> None:
    """ANALYZE computes an index's expression, which takes its time here."""
    source, target = new_database(cluster15), new_database(cluster15)
    source.execute(
        "CREATE FUNCTION slow(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_catalog.pg_sleep(0.6); RETURN n; END';"
        "CREATE TABLE t AS SELECT 1 AS n; CREATE INDEX ON t (slow(n))"
    )
    Database(cluster15, "postgres").execute(f"ALTER DATABASE {target.name} SET statement_timeout TO '300ms'")
    with keeper.keeping(cluster15, source.name) as kept:
        assert kept.restore(kept.backup(), target.conninfo)["rows"] == 1


def _rows(database: Database, query: str) -> list[str]:
    found = database.value(f"SELECT array_agg(line::text) FROM ({query}) AS line")
    return list(found)
