"""What restore does, refuses and notices, by its real command line, on real servers."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import pgbinaries
from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.demo import awkward
from tests import clusters
from tests.clusters import Clusters, Database, NewDatabase
from tests.integration import keeper
from tests.integration.keeper import Keeper

RESTORE_FAILED = 8
INTEGRITY = 7
NOT_FOUND = 10
REFUSED = 11
USAGE = 2
# Small, and with one of everything that the options are about.
SHOP = '''
CREATE ROLE options_reader;
CREATE ROLE "options Owner ""x""";
CREATE TABLE parents (id serial PRIMARY KEY, name text);
CREATE TABLE children (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, parent integer REFERENCES parents);
INSERT INTO parents (name) SELECT 'parent ' || n FROM generate_series(1, 50) AS n;
INSERT INTO children (parent) SELECT 1 + n % 50 FROM generate_series(1, 200) AS n;
CREATE TABLE sales (day date, amount numeric, PRIMARY KEY (day, amount)) PARTITION BY RANGE (day);
CREATE TABLE sales_2024 PARTITION OF sales FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE TABLE sales_rest PARTITION OF sales DEFAULT;
INSERT INTO sales SELECT date '2024-06-01' + n, n FROM generate_series(1, 400) AS n;
CREATE INDEX ON sales (amount);
CREATE SCHEMA "Odd ""schema";
CREATE TABLE "Odd ""schema"."My.Table; --" (v text);
INSERT INTO "Odd ""schema"."My.Table; --" VALUES ('x');
ALTER TABLE "Odd ""schema"."My.Table; --" OWNER TO "options Owner ""x""";
GRANT SELECT ON parents TO options_reader;
'''
FINGERS = "SELECT string_agg(relname || ' ' || relkind::text, ',' ORDER BY relname) FROM pg_class WHERE oid >= 16384"


@pytest.fixture(scope="module")
def shop(session_clusters: Clusters) -> Iterator[tuple[Database, Keeper, Path]]:
    cluster = session_clusters.get(15)
    with clusters.temporary_database(cluster) as database, keeper.keeping(cluster, database.name) as kept:
        database.execute(SHOP)
        yield database, kept, kept.backup()
    for role in ("options_reader", 'options Owner ""x""'):
        Database(cluster, "postgres").execute(f'DROP ROLE "{role}"')


@pytest.fixture(scope="module")
def foreign() -> Iterator[ScratchCluster]:
    """A server that has none of our roles."""
    with ScratchCluster(15) as cluster:
        yield cluster


@pytest.fixture
def empty(shop: tuple[Database, Keeper, Path], new_database: NewDatabase) -> Database:
    return new_database(shop[0].cluster)


Shop = tuple[Database, Keeper, Path]


def test_a_target_that_holds_something_is_refused(shop: Shop, empty: Database) -> None:
    _, kept, file = shop
    empty.execute("CREATE TABLE in_the_way ()")
    said = kept.fails(REFUSED, "restore", file, "--to", empty.conninfo)
    assert "in_the_way" in said
    assert "--allow-non-empty" in said
    assert empty.value(FINGERS) == "in_the_way r"
    kept.restore(file, empty.conninfo, "--allow-non-empty")
    assert empty.value("SELECT count(*) FROM children") == 200


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TYPE mood AS ENUM ('x')",
        "CREATE SCHEMA s",
        "SELECT lo_create(0)",
        "CREATE SEQUENCE s",
        "CREATE VIEW v AS SELECT 1",
    ],
)
def test_anything_at_all_makes_a_target_not_empty(shop: Shop, empty: Database, statement: str) -> None:
    empty.execute(statement)
    assert "is not empty" in shop[1].fails(REFUSED, "restore", shop[2], "--to", empty.conninfo)


def test_an_extension_does_not_make_a_target_non_empty(shop: Shop, empty: Database) -> None:
    empty.execute("CREATE EXTENSION citext")
    shop[1].restore(shop[2], empty.conninfo)


def test_create_refuses_a_database_that_exists(shop: Shop, empty: Database) -> None:
    said = shop[1].fails(REFUSED, "restore", shop[2], "--to", empty.conninfo, "--create")
    assert empty.name in said
    assert empty.value(FINGERS) is None


def test_create_never_takes_the_archived_name(shop: Shop) -> None:
    """The source may be gone, and must not be filled again by accident."""
    database, kept, file = shop
    before = database.value(FINGERS)
    nameless = f"host='{database.cluster.socket_directory}' user=postgres"
    said = kept.fails(3, "restore", file, "--to", nameless, "--create")
    assert "name" in said
    with keeper.fresh_name(database.cluster) as fresh:
        answer = kept.restore(file, fresh.conninfo, "--create")
        assert answer["database"] == fresh.name
    assert database.value(FINGERS) == before


def test_what_fails_before_the_load_leaves_no_created_database(shop: Shop, scratch: Path) -> None:
    database, kept, file = shop
    damaged = _damaged(file, scratch)
    for path, arguments, code in [
        (file, ["--table", "no_such_table"], NOT_FOUND),
        (file, ["--table", "children"], REFUSED),
        (damaged, [], INTEGRITY),
    ]:
        with keeper.fresh_name(database.cluster) as fresh:
            kept.fails(code, "restore", path, "--to", fresh.conninfo, "--create", *arguments)
            exists = f"SELECT count(*) FROM pg_database WHERE datname = '{fresh.name}'"
            assert Database(database.cluster, "postgres").value(exists) == 0


def _damaged(file: Path, directory: Path) -> Path:
    """A copy with its sidecars, one bit of a table's rows changed."""
    copied = directory / file.name
    for suffix in ("", ".sha256", ".manifest.json"):
        shutil.copy(f"{file}{suffix}", f"{copied}{suffix}")
    with LocalFile.open(file) as opened:
        reader = ArtifactReader(opened)
        offset = next(place for place, part in reader.index.placed() if part in reader.index.tables)
    copied.chmod(0o600)
    with copied.open("r+b") as writable:
        writable.seek(offset + 20)
        byte = writable.read(1)
        writable.seek(offset + 20)
        writable.write(bytes([byte[0] ^ 1]))
    return copied


def test_a_damaged_backup_changes_nothing(shop: Shop, empty: Database, scratch: Path) -> None:
    damaged = _damaged(shop[2], scratch)
    said = shop[1].fails(INTEGRITY, "restore", damaged, "--to", empty.conninfo)
    assert "digest" in said
    assert empty.value(FINGERS) is None


def test_a_file_carried_elsewhere(shop: Shop, empty: Database, scratch: Path) -> None:
    """With its sidecars all works; without them all but --create, which says what it lacks."""
    database, _, file = shop
    bare = Keeper(scratch / "no vault here", {})
    alone = scratch / "alone.sql.gz"
    shutil.copy(file, alone)
    with keeper.fresh_name(database.cluster) as fresh:
        said = bare.fails(REFUSED, "restore", alone, "--to", fresh.conninfo, "--create")
        assert "without --create" in said
    bare.restore(alone, empty.conninfo)
    assert empty.value("SELECT count(*) FROM sales") == 400
    carried = scratch / file.name
    shutil.copy(file, carried)
    shutil.copy(f"{file}.manifest.json", f"{carried}.manifest.json")
    with keeper.fresh_name(database.cluster) as fresh:
        bare.restore(carried, fresh.conninfo, "--create")
        assert fresh.value("SELECT count(*) FROM sales") == 400


def test_one_table_with_its_serial_and_identity(shop: Shop, empty: Database) -> None:
    _, kept, file = shop
    answer = kept.restore(file, empty.conninfo, "--table", "parents", "--table", "public.children")
    assert (answer["tables"], answer["rows"]) == (2, 250)
    empty.execute("INSERT INTO parents (name) VALUES ('next'); INSERT INTO children (parent) VALUES (51)")
    assert empty.value("SELECT max(id) FROM parents") == 51
    assert empty.value("SELECT max(id) FROM children") == 201
    assert empty.value("SELECT count(*) FROM pg_constraint WHERE contype = 'f'") == 1


def test_a_partitioned_table_brings_its_partitions(shop: Shop, empty: Database) -> None:
    database, kept, file = shop
    answer = kept.restore(file, empty.conninfo, "--table", "sales")
    assert answer["rows"] == 400
    assert empty.value("SELECT count(*) FROM pg_inherits WHERE inhparent = 'sales'::regclass") == 2
    count = "SELECT count(*) FROM pg_indexes WHERE tablename ~ '^sales'"
    assert empty.value(count) == database.value(count)


def test_a_partition_alone_becomes_a_table_and_the_report_says_how_to_attach_it(shop: Shop, empty: Database) -> None:
    answer = shop[1].restore(shop[2], empty.conninfo, "--table", "sales_2024")
    assert any("ATTACH PARTITION" in note for note in answer["notes"])
    assert empty.value("SELECT count(*) FROM sales_2024") == answer["rows"] == 213


def test_a_foreign_key_without_its_parent_is_named(shop: Shop, empty: Database) -> None:
    _, kept, file = shop
    said = kept.fails(REFUSED, "restore", file, "--to", empty.conninfo, "--table", "children")
    assert "children_parent_fkey" in said
    assert "public.parents" in said
    assert "--allow-missing-parents" in said
    assert empty.value(FINGERS) is None
    answer = kept.restore(file, empty.conninfo, "--table", "children", "--allow-missing-parents")
    assert any("children_parent_fkey" in note for note in answer["notes"])
    assert empty.value("SELECT count(*) FROM children") == 200


def test_a_parent_that_the_target_has_is_enough(shop: Shop, empty: Database) -> None:
    _, kept, file = shop
    kept.restore(file, empty.conninfo, "--table", "parents")
    kept.restore(file, empty.conninfo, "--table", "children", "--allow-non-empty")
    assert empty.value("SELECT count(*) FROM pg_constraint WHERE contype = 'f'") == 1


def test_a_quoted_name(shop: Shop, empty: Database) -> None:
    answer = shop[1].restore(shop[2], empty.conninfo, "--table", '"Odd ""schema"."My.Table; --"')
    assert answer["rows"] == 1


def test_an_unknown_table_gets_near_misses(shop: Shop, empty: Database) -> None:
    said = shop[1].fails(NOT_FOUND, "restore", shop[2], "--to", empty.conninfo, "--table", "childen")
    assert "public.children" in said
    assert "name" in shop[1].fails(USAGE, "restore", shop[2], "--to", empty.conninfo, "--table", "a.b.c")


def test_a_table_that_is_there_is_not_overwritten(shop: Shop, empty: Database) -> None:
    empty.execute("CREATE TABLE parents (mine text)")
    said = shop[1].fails(REFUSED, "restore", shop[2], "--to", empty.conninfo, "--table", "parents", "--allow-non-empty")
    assert "public.parents" in said
    assert empty.value("SELECT count(*) FROM pg_attribute WHERE attrelid = 'parents'::regclass AND attnum > 0") == 1


@pytest.mark.parametrize("jobs", ["1", "5"])
def test_definitions_then_rows(shop: Shop, empty: Database, jobs: str) -> None:
    database, kept, file = shop
    answer = kept.restore(file, empty.conninfo, "--schema-only", "--jobs", jobs)
    assert answer["rows"] == 0
    assert empty.value("SELECT count(*) FROM parents") == 0
    kept.restore(file, empty.conninfo, "--data-only", "--jobs", jobs)
    tools = database.cluster.installation
    assert awkward.differences(awkward.fingerprint(database.conninfo, tools),
                               awkward.fingerprint(empty.conninfo, tools)) == []  # fmt: skip


def test_rows_of_one_table_into_a_table_that_is_there(shop: Shop, empty: Database) -> None:
    _, kept, file = shop
    kept.restore(file, empty.conninfo, "--schema-only")
    answer = kept.restore(file, empty.conninfo, "--data-only", "--table", "children", "--table", "sales_2024")
    assert (answer["rows"], answer["notes"]) == (413, [])
    assert empty.value("SELECT count(*) FROM parents") == 0


def test_options_that_make_no_sense_together(shop: Shop, empty: Database) -> None:
    for pair in (["--schema-only", "--data-only"], ["--create", "--data-only"]):
        shop[1].fails(USAGE, "restore", shop[2], "--to", empty.conninfo, *pair)


@pytest.mark.parametrize("how", ["trigger", "all of them", "rows before"])
def test_rows_that_go_missing_or_were_there_are_noticed(shop: Shop, empty: Database, how: str) -> None:
    _, kept, file = shop
    kept.restore(file, empty.conninfo, "--schema-only")
    empty.execute(
        {
            # Always: others do not fire in a restore by a superuser.
            "trigger": "CREATE FUNCTION eat() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN IF NEW.amount = 7 THEN RETURN NULL; END IF; RETURN NEW; END';"
            "CREATE TRIGGER eat BEFORE INSERT ON sales_2024 FOR EACH ROW EXECUTE FUNCTION eat();"
            "ALTER TABLE sales_2024 ENABLE ALWAYS TRIGGER eat",
            "all of them": "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER keep BEFORE INSERT ON sales_2024 FOR EACH ROW EXECUTE FUNCTION keep();"
            "ALTER TABLE sales_2024 ENABLE ALWAYS TRIGGER keep",
            "rows before": "INSERT INTO sales VALUES ('2024-02-29', 1)",
        }[how]
    )
    said = kept.fails(RESTORE_FAILED, "restore", file, "--to", empty.conninfo, "--data-only")
    found = {"trigger": 212, "all of them": 0, "rows before": 214}[how]
    assert f"public.sales_2024 has {found} rows, the backup 213" in said


def test_triggers_and_keys_rest_while_rows_alone_are_loaded(shop: Shop, empty: Database) -> None:
    """And are afterwards what they were before: disabled ones disabled."""
    _, kept, file = shop
    kept.restore(file, empty.conninfo, "--schema-only")
    empty.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'fired'; END$$;"
        "CREATE TRIGGER fires BEFORE INSERT ON parents FOR EACH ROW EXECUTE FUNCTION refuse();"
        "CREATE TRIGGER sleeps BEFORE INSERT ON parents FOR EACH ROW EXECUTE FUNCTION refuse();"
        "ALTER TABLE parents DISABLE TRIGGER sleeps"
    )
    states = "SELECT string_agg(tgname || tgenabled::text, ' ' ORDER BY tgname) FROM pg_trigger WHERE NOT tgisinternal"
    kept.restore(file, empty.conninfo, "--data-only")
    assert empty.value("SELECT count(*) FROM children") == 200
    assert empty.value(states) == "firesO sleepsD"
    # A role without that right is told by the server what stands in its way.
    empty.execute("TRUNCATE parents, children")
    with contextlib.ExitStack() as stack:
        postgres = Database(empty.cluster, "postgres")
        postgres.execute("CREATE ROLE no_superuser LOGIN; GRANT pg_write_all_data, pg_read_all_data TO no_superuser")
        stack.callback(postgres.execute, "DROP ROLE no_superuser")
        target = empty.conninfo.replace("user='postgres'", "user='no_superuser'")
        said = kept.fails(RESTORE_FAILED, "restore", file, "--to", target, "--data-only", "--table", "parents")
        assert "fired" in said


def test_missing_roles_are_named_before_anything_happens(shop: Shop, foreign: ScratchCluster) -> None:
    _, kept, file = shop
    with clusters.temporary_database(foreign) as target:
        said = kept.fails(REFUSED, "restore", file, "--to", target.conninfo)
        assert 'options Owner "x"' in said
        assert "--no-owner" in said
        assert target.value(FINGERS) is None
        # A role that is only granted something is pg_restore's to complain of, and not in silence.
        said = kept.fails(RESTORE_FAILED, "restore", file, "--to", target.conninfo, "--no-owner")
        assert 'role "options_reader" does not exist' in said
    with clusters.temporary_database(foreign) as target:
        kept.restore(file, target.conninfo, "--no-owner", "--no-privileges")
        assert target.value("SELECT count(*) FROM children") == 200
        owned = "SELECT count(*) FROM pg_class WHERE oid >= 16384 AND relowner <> 'postgres'::regrole"
        assert target.value(owned) == 0
        assert target.value("SELECT count(*) FROM pg_class WHERE relname = 'parents' AND relacl IS NULL") == 1


def test_only_the_chosen_tables_need_their_owners(shop: Shop, foreign: ScratchCluster) -> None:
    with clusters.temporary_database(foreign) as target:
        shop[1].restore(shop[2], target.conninfo, "--table", "parents", "--no-privileges")
        assert target.value("SELECT count(*) FROM parents") == 50
        target.execute('CREATE SCHEMA "Odd ""schema"; CREATE TABLE "Odd ""schema"."My.Table; --" (v text)')
        shop[1].restore(shop[2], target.conninfo, "--data-only", "--table", '"Odd ""schema"."My.Table; --"')


def test_an_extension_that_the_server_lacks_fails_in_its_words(shop: Shop, new_database: NewDatabase) -> None:
    """xml2 and such are in Debian's server and not in the wheels'; any that only one has will do."""
    source_cluster = shop[0].cluster
    source, target_cluster = new_database(source_cluster), ScratchCluster(16)
    with target_cluster:
        there = _extensions(source)
        lacking = sorted(there - _extensions(Database(target_cluster, "postgres")))
        if not lacking:
            clusters.skip("needs an extension that the other server lacks", could_run_here=False)
        source.execute(f'CREATE EXTENSION "{lacking[0]}"')
        with keeper.keeping(source_cluster, source.name) as kept, clusters.temporary_database(target_cluster) as target:
            said = kept.fails(RESTORE_FAILED, "restore", kept.backup(), "--to", target.conninfo)
            assert f'extension "{lacking[0]}" is not available' in said
            assert "drop it before another try" in said


def _extensions(database: Database) -> set[str]:
    found = database.value("SELECT array_agg(name::text) FROM pg_available_extensions WHERE name !~ 'plp|plt'")
    return set(found)


def test_a_password_in_the_target_is_accepted_with_a_warning(shop: Shop, empty: Database) -> None:
    answer = shop[1].run("restore", shop[2], "--to", f"{empty.conninfo} password=secret")
    assert answer.code == 0
    assert "process list" in answer.stderr
    assert "secret" not in answer.stderr


def test_the_scratch_directory_is_left_clean(shop: Shop, empty: Database, scratch: Path) -> None:
    _, kept, file = shop
    kept.of(TMPDIR=os.fspath(scratch)).restore(file, empty.conninfo)
    assert list(scratch.iterdir()) == []
    assert list((kept.root / "staging").iterdir()) == []


def test_a_setting_for_a_role_that_is_gone_is_a_note(shop: Shop, foreign: ScratchCluster) -> None:
    """The database is restored all the same; what could not be set is said."""
    cluster = shop[0].cluster
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(clusters.temporary_database(cluster))
        postgres = Database(cluster, "postgres")
        postgres.execute("CREATE ROLE only_here")
        stack.callback(postgres.execute, "DROP ROLE only_here")
        postgres.execute(f"ALTER ROLE only_here IN DATABASE {source.name} SET work_mem TO '8MB'")
        stack.callback(postgres.execute, f"ALTER ROLE only_here IN DATABASE {source.name} RESET ALL")
        kept = stack.enter_context(keeper.keeping(cluster, source.name))
        target = stack.enter_context(keeper.fresh_name(foreign))
        answer = kept.restore(kept.backup(), target.conninfo, "--create")
    assert ["only_here" in note and "work_mem" in note for note in answer["notes"]] == [True]


def test_the_fitting_pg_restore_is_found_behind_another(shop: Shop, empty: Database) -> None:
    """PGKEEP_PG_BIN puts one installation first and hides no other."""
    newest = max(pgbinaries.find_installations(), key=lambda each: each.major)
    shop[1].of(PGKEEP_PG_BIN=os.fspath(newest.directory)).restore(shop[2], empty.conninfo)
    assert empty.value("SELECT count(*) FROM sales") == 400
