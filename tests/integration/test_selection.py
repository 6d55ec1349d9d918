"""A selection, given to the stock pg_restore, brings the asked tables whole: compared by pg_dump of both databases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

from pgkeep.adapters import pgbinaries, process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.domain import loading, selection, toc
from pgkeep.domain.selection import DatabaseObject, DetachedPartition, OrphanedForeignKey, Selection, parse_table_name
from pgkeep.domain.toc import TableName, Toc
from tests.clusters import MAJORS, Clusters, Database, NewDatabase, temporary_database

# Needs an extension with a type: citext comes with Debian's packages, vector with the wheels.
_EXTENSIONS = ("citext", "vector")
_ROLE = "selection_reader"

_SCHEMA = """
CREATE SCHEMA app; CREATE SCHEMA lib; CREATE SCHEMA "Odd Name"; CREATE SCHEMA elsewhere; CREATE SCHEMA "select";
CREATE EXTENSION {extension} WITH SCHEMA lib;
CREATE TYPE lib.mood AS ENUM ('low', 'high');
CREATE TYPE "select"."table" AS ENUM ('a');
CREATE DOMAIN lib.positive AS integer;
ALTER DOMAIN lib.positive ADD CONSTRAINT above CHECK (VALUE > 0) NOT VALID;
CREATE TYPE lib.pair AS (a integer, b lib.mood);
CREATE TYPE lib.span AS RANGE (subtype = integer);
CREATE COLLATION lib.plain FROM "C";
CREATE FUNCTION lib.stamp() RETURNS text LANGUAGE sql STABLE AS $$SELECT 'stamp'::text$$;
COMMENT ON FUNCTION lib.stamp() IS 'stamps';
CREATE FUNCTION lib."Dbl (Up"(v integer, "x y" lib.mood DEFAULT 'low') RETURNS integer
    LANGUAGE sql IMMUTABLE AS $$SELECT v * 2$$;
CREATE FUNCTION lib.touch() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NEW; END$$;
CREATE FUNCTION lib.alike(a integer, b integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$SELECT a = b$$;
CREATE OPERATOR lib.=== (FUNCTION = lib.alike, LEFTARG = integer, RIGHTARG = integer);
CREATE OPERATOR CLASS lib.int_order FOR TYPE integer USING btree AS
    OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 btint4cmp(integer, integer);
CREATE OPERATOR CLASS lib.int_order FOR TYPE integer USING hash AS OPERATOR 1 =, FUNCTION 1 hashint4(integer);
CREATE TEXT SEARCH DICTIONARY lib.words (TEMPLATE = simple);
CREATE TEXT SEARCH CONFIGURATION lib.search (COPY = simple);
ALTER TEXT SEARCH CONFIGURATION lib.search ALTER MAPPING FOR asciiword WITH lib.words;
CREATE SEQUENCE lib.shared START 100;
CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER "far off" FOREIGN DATA WRAPPER nowhere;
CREATE FOREIGN TABLE app.remote (a integer) SERVER "far off";

CREATE TABLE app.parent (id serial PRIMARY KEY, code text NOT NULL UNIQUE);
CREATE TABLE app.other (id integer PRIMARY KEY, flag boolean);
CREATE TABLE app.log (at text);
CREATE TABLE app.base (base_id integer DEFAULT 5, common text);
ALTER TABLE app.base ENABLE ROW LEVEL SECURITY;
CREATE POLICY everybody ON app.base USING (true);
CREATE TABLE app.main (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ser serial,
    shared integer DEFAULT nextval('lib.shared'),
    mood lib.mood DEFAULT 'low',
    awkward "select"."table",
    amount lib.positive,
    pairs lib.pair[],
    span lib.span,
    name text COLLATE lib.plain DEFAULT lib.stamp(),
    doubled integer GENERATED ALWAYS AS (lib."Dbl (Up"(7)) STORED,
    parent_id integer REFERENCES app.parent (id),
    self_id bigint REFERENCES app.main (id),
    ext lib.{extension},
    note text,
    CONSTRAINT positive CHECK (shared > 0),
    CONSTRAINT alike CHECK (shared OPERATOR(lib.===) shared),
    CONSTRAINT code_fk FOREIGN KEY (note) REFERENCES app.parent (code)
);
CREATE TABLE app.inh (extra integer) INHERITS (app.base);
CREATE INDEX main_name ON app.main (lower(name));
CREATE INDEX main_expr ON app.main (lib."Dbl (Up"(shared));
CREATE INDEX main_order ON app.main (ser lib.int_order);
CREATE INDEX main_hash ON app.main USING hash (ser lib.int_order);
CREATE INDEX main_search ON app.main USING gin (to_tsvector('lib.search', note));
CREATE STATISTICS app.main_stats (dependencies) ON shared, ser FROM app.main;
COMMENT ON TABLE app.main IS 'the main'; COMMENT ON COLUMN app.main.note IS 'a note';
COMMENT ON CONSTRAINT positive ON app.main IS 'pos'; COMMENT ON INDEX app.main_name IS 'idx';
COMMENT ON CONSTRAINT main_pkey ON app.main IS 'pk'; COMMENT ON CONSTRAINT code_fk ON app.main IS 'fk';
COMMENT ON STATISTICS app.main_stats IS 'stats'; COMMENT ON SEQUENCE lib.shared IS 'seq';
GRANT SELECT ON app.main TO {role}; GRANT UPDATE (note) ON app.main TO {role};
GRANT USAGE ON SCHEMA app TO {role}; GRANT USAGE ON SEQUENCE app.main_ser_seq TO {role};
ALTER TABLE app.main ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON app.main FOR SELECT TO {role} USING (shared IN (SELECT id FROM app.other WHERE flag));
CREATE TRIGGER touch BEFORE UPDATE ON app.main FOR EACH ROW EXECUTE FUNCTION lib.touch();
COMMENT ON TRIGGER touch ON app.main IS 'tr';
CREATE RULE logged AS ON DELETE TO app.main DO ALSO INSERT INTO app.log VALUES ('x');
CREATE FUNCTION app.rowfn(r app.main) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$SELECT r.shared < 100000000$$;
ALTER TABLE app.main ADD CONSTRAINT rowcheck CHECK (app.rowfn(main));
ALTER TABLE app.main ADD CONSTRAINT later CHECK (ser > 0) NOT VALID;
CREATE VIEW app.seen AS SELECT id, name FROM app.main;
CREATE MATERIALIZED VIEW app.mat AS SELECT id, name FROM app.main;
CREATE FUNCTION app.merely_reads(r app.main) RETURNS integer LANGUAGE sql AS $$SELECT 1$$;
CREATE TABLE elsewhere.child (id integer PRIMARY KEY, main_id bigint REFERENCES app.main (id));
CREATE TABLE app.uses_row (x app.other);
CREATE TABLE app.borrows (a integer DEFAULT nextval('app.parent_id_seq'));
CREATE TABLE "Odd Name"."We.ird ""q"" !" (
    "Id" integer GENERATED BY DEFAULT AS IDENTITY, "a b" text,
    CONSTRAINT "c d" CHECK ("Id" > 0), CONSTRAINT "p k" PRIMARY KEY ("Id")
);
CREATE TABLE app."a" (x integer CONSTRAINT "b c" PRIMARY KEY);
CREATE TABLE app."a b" (x integer REFERENCES app."a", CONSTRAINT c PRIMARY KEY (x));
CREATE TABLE app.measure (
    at date NOT NULL, region text NOT NULL, v integer, parent_id integer REFERENCES app.parent (id),
    PRIMARY KEY (at, region)
) PARTITION BY RANGE (at);
CREATE TABLE app.measure_24 PARTITION OF app.measure FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')
    PARTITION BY LIST (region);
CREATE TABLE app.measure_24_eu PARTITION OF app.measure_24 FOR VALUES IN ('eu');
CREATE TABLE elsewhere.measure_25 PARTITION OF app.measure FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE INDEX measure_v ON app.measure (v);
CREATE TRIGGER mtouch BEFORE UPDATE ON app.measure FOR EACH ROW EXECUTE FUNCTION lib.touch();
ALTER TABLE elsewhere.measure_25 DISABLE TRIGGER mtouch;
CREATE TABLE app.refs_measure (at date, region text, FOREIGN KEY (at, region) REFERENCES app.measure);
CREATE TABLE app.replicated (a integer NOT NULL, b integer);
CREATE UNIQUE INDEX replicated_a ON app.replicated (a);
ALTER TABLE app.replicated REPLICA IDENTITY USING INDEX replicated_a;
CREATE TABLE public.main (id integer); CREATE TABLE app.empty ();
INSERT INTO app.parent (code) SELECT 'c' || g FROM generate_series(1, 10) g;
INSERT INTO app.main (parent_id, note, amount) SELECT g, 'c' || g, g FROM generate_series(1, 10) g;
INSERT INTO app.measure VALUES ('2024-03-01', 'eu', 1, 1), ('2025-03-01', 'us', 2, 2);
INSERT INTO app.inh VALUES (1, 'x', 2); INSERT INTO elsewhere.child VALUES (1, 1); INSERT INTO app.log VALUES ('y');
INSERT INTO app.other VALUES (1, true); INSERT INTO app."a" VALUES (1); INSERT INTO app."a b" VALUES (1);
INSERT INTO "Odd Name"."We.ird ""q"" !" ("a b") VALUES ('z');
SELECT lo_from_bytea(0, 'hello');
ANALYZE;
"""


@dataclasses.dataclass(frozen=True)
class Source:
    """The rich database and its dump; ``extension`` is the one that it uses."""

    database: Database
    dump: Path
    toc: Toc
    extension: str

    @property
    def cluster(self) -> ScratchCluster:
        return self.database.cluster

    def select(self, *wanted: str, exists: Callable[[DatabaseObject], bool] = lambda _: False) -> Selection:
        return selection.select(self.toc, [parse_table_name(text) for text in wanted], exists=exists)

    def names(self, chosen: Selection) -> list[tuple[str, str]]:
        entries = (self.toc.by_dump_id[dump_id] for dump_id in chosen.dump_ids)
        return [(entry.description, entry.name) for entry in entries]

    def tool(self, name: str) -> Path:
        return pgbinaries.choose(name, self.cluster.installation.major, match="exact").path


@pytest.fixture(scope="module", params=MAJORS, ids=lambda major: f"pg{major}")
def source(
    request: pytest.FixtureRequest, session_clusters: Clusters, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Source]:
    cluster = session_clusters.get(request.param)
    directory = tmp_path_factory.mktemp("selection")
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {_ROLE}".encode())
        try:
            with temporary_database(cluster) as database:
                yield _dumped(database, directory / "dump")
        finally:
            connection.execute(f"DROP ROLE {_ROLE}".encode())


def _dumped(database: Database, dump: Path) -> Source:
    available = "SELECT name FROM pg_available_extensions WHERE name IN ('{}', '{}') LIMIT 1".format(*_EXTENSIONS)
    extension = database.value(available)
    database.execute(_SCHEMA.format(extension=extension, role=_ROLE))
    major = database.cluster.installation.major
    options = ["--statistics"] if major >= 18 else []
    program = pgbinaries.choose("pg_dump", major, match="exact").path
    completed = process.run([program, "-Fd", "-j2", *options, "-f", dump, "-d", database.conninfo])
    assert completed.return_code == 0, completed.stderr
    return Source(database, dump, toc.read((dump / "toc.dat").read_bytes(), "utf-8"), extension)


def _restore(source: Source, chosen: Selection, target: Database, tmp_path: Path, *options: str) -> None:
    """In as many runs as pgkeep itself makes: in one with several jobs, pg_restore may deadlock with itself."""
    listing = tmp_path / "list"
    connection = f"--dbname={target.conninfo}"
    program = source.tool("pg_restore")
    for dump_ids in loading.runs(source.toc, chosen.dump_ids):
        listing.write_text(loading.list_file(dump_ids))
        completed = process.run([program, "--exit-on-error", "-L", listing, connection, *options, source.dump])
        assert (completed.return_code, completed.stderr) == (0, "")


def _dump_of_tables(source: Source, database: Database, tables: Sequence[TableName], *also: str) -> str:
    """What pg_dump says of the tables: definition, rows, grants, comments, policies, triggers, sequences."""
    patterns = [part for name in tables for part in ("-t", _pattern(name))]
    further = [part for name in also for part in ("-t", name)]
    completed = process.run([source.tool("pg_dump"), *patterns, *further, "-d", database.conninfo])
    assert completed.return_code == 0, completed.stderr
    return re.sub(r"^\\(un)?restrict .*\n", "", completed.stdout.decode(), flags=re.MULTILINE)


def _pattern(name: TableName) -> str:
    """For pg_dump -t: everything quoted."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in (name.schema or "", name.name))


def _found(database: Database, asked: Sequence[DatabaseObject]) -> set[DatabaseObject]:
    with psycopg.connect(database.conninfo, options="-c search_path=") as connection:
        arrays = [each.kind for each in asked], [each.name for each in asked]
        rows = connection.execute(selection.existence_query().encode(), arrays).fetchall()
    return {DatabaseObject(kind, name) for kind, name in rows}


_CASES = {
    "everything around one table": (["app.main", "parent"], ["lib.shared"]),
    "partitions at every level": (["app.measure", "app.parent"], []),
    "a foreign key to a partitioned table": (["refs_measure", "measure", "parent"], []),
    "inherited": (["inh"], []),
    "inherited, with the parent": (["inh", "base"], []),
    "a column of a row type": (["uses_row"], []),
    "another table's sequence": (["borrows"], ["app.parent_id_seq"]),
    "names that need quotes": (['"Odd Name"."We.ird ""q"" !"'], []),
    "names that look like one another": (['app."a b"', "app.a"], []),
    "a replica identity": (["replicated"], []),
    "no columns": (["empty"], []),
    "a foreign table": (["remote"], []),
    "one without a schema entry": (["main"], []),
}


@pytest.mark.parametrize("case", _CASES)
def test_into_an_empty_database(case: str, source: Source, new_database: NewDatabase, tmp_path: Path) -> None:
    wanted, also = _CASES[case]
    target = new_database(source.cluster)
    chosen = source.select(*wanted)
    assert chosen.orphaned_foreign_keys == ()
    assert chosen.detached == ()
    _restore(source, chosen, target, tmp_path)
    before, after = (_dump_of_tables(source, each, chosen.tables, *also) for each in (source.database, target))
    assert after == before
    assert "CREATE" in after


def test_a_foreign_table_brings_its_server(source: Source) -> None:
    kinds = {need.object for need in source.select("remote").prerequisites}
    assert kinds >= {DatabaseObject("server", '"far off"'), DatabaseObject("foreign data wrapper", "nowhere")}


def test_what_is_not_brought(source: Source, new_database: NewDatabase, tmp_path: Path) -> None:
    target = new_database(source.cluster)
    chosen = source.select("app.main", "parent")
    _restore(source, chosen, target, tmp_path)
    brought = {name for _, name in source.names(chosen)}
    assert not brought & {"seen", "mat", "child", "merely_reads(app.main)", "measure", "inh", "base", "remote"}
    assert [name for kind, name in source.names(chosen) if kind == "TABLE DATA"] == ["main", "parent"]
    assert target.value("SELECT count(*) FROM app.main") == 10
    # Tables that a rule and a policy mention: there, and empty.
    assert target.value("SELECT (SELECT count(*) FROM app.log) + (SELECT count(*) FROM app.other)") == 0
    assert target.value("SELECT count(*) FROM pg_largeobject_metadata") == 0
    following = source.database.value("SELECT last_value + 1 FROM lib.shared")
    assert target.value("SELECT nextval('lib.shared')") == following


def test_every_prerequisite_is_named(source: Source) -> None:
    chosen = source.select("app.main", "parent")
    assert {need.object for need in chosen.prerequisites} == {
        DatabaseObject("schema", "app"),
        DatabaseObject("schema", "lib"),
        DatabaseObject("schema", '"select"'),
        DatabaseObject("extension", source.extension),
        DatabaseObject("collation", "lib.plain"),
        DatabaseObject("type", "lib.mood"),
        DatabaseObject("type", "lib.positive"),
        DatabaseObject("type", "lib.pair"),
        DatabaseObject("type", "lib.span"),
        DatabaseObject("type", '"select"."table"'),
        DatabaseObject("function", "lib.stamp()"),
        DatabaseObject("function", "lib.touch()"),
        DatabaseObject("function", 'lib."Dbl (Up"(integer, lib.mood)'),
        DatabaseObject("function", "lib.alike(integer, integer)"),
        DatabaseObject("function", "app.rowfn(app.main)"),
        DatabaseObject("operator", "lib.===(integer,integer)"),
        DatabaseObject("operator class", "lib.int_order USING btree"),
        DatabaseObject("operator class", "lib.int_order USING hash"),
        DatabaseObject("operator family", "lib.int_order USING btree"),
        DatabaseObject("operator family", "lib.int_order USING hash"),
        DatabaseObject("text search configuration", "lib.search"),
        DatabaseObject("text search dictionary", "lib.words"),
        DatabaseObject("sequence", "lib.shared"),
        DatabaseObject("table", "app.log"),
        DatabaseObject("table", "app.other"),
    }
    assert set(chosen.dump_ids) > {dump_id for need in chosen.prerequisites for dump_id in need.dump_ids}
    comments = {need.object: len(need.dump_ids) for need in chosen.prerequisites}
    assert comments[DatabaseObject("function", "lib.stamp()")] == 2


def test_the_server_knows_every_prerequisite_by_its_name(source: Source, new_database: NewDatabase) -> None:
    tables = [entry.table_name for entry in source.toc.entries if entry.is_table]
    asked = sorted({question for table in tables for question in selection.questions(source.toc, [table])})
    assert {each.kind for each in asked} >= {"schema", "table", "operator", "server", "extension"}
    assert _found(source.database, asked) == set(asked)
    assert _found(new_database(source.cluster), asked) == set()
    probes = {"schema": "to_regnamespace", "table": "to_regclass", "sequence": "to_regclass", "index": "to_regclass",
              "function": "to_regprocedure", "collation": "to_regcollation", "operator": "to_regoperator"}  # fmt: skip
    with psycopg.connect(source.database.conninfo) as connection:
        for each in asked:
            if each.kind in probes:
                row = connection.execute(f"SELECT {probes[each.kind]}(%s) IS NOT NULL".encode(), [each.name]).fetchone()
                assert row == (True,), each


def test_an_unknown_kind_counts_as_absent(source: Source) -> None:
    assert _found(source.database, [DatabaseObject("cast", "(a AS b)"), DatabaseObject("schema", "app")]) == {
        DatabaseObject("schema", "app")
    }


def test_into_a_database_that_has_some_of_it(source: Source, new_database: NewDatabase, tmp_path: Path) -> None:
    target = new_database(source.cluster)
    target.execute(
        """
        CREATE SCHEMA lib; CREATE SCHEMA app; CREATE TYPE lib.mood AS ENUM ('low', 'high', 'new');
        CREATE FUNCTION lib.stamp() RETURNS text LANGUAGE sql AS $$SELECT 'mine'::text$$;
        CREATE FUNCTION lib.touch(integer) RETURNS integer LANGUAGE sql AS $$SELECT 1$$;
        CREATE SEQUENCE lib.shared START 5000; CREATE TABLE app.other (id integer, flag boolean);
        CREATE TABLE app.parent (id integer PRIMARY KEY, code text UNIQUE);
        INSERT INTO app.parent SELECT g, 'c' || g FROM generate_series(1, 20) g;
        """
    )
    asked = selection.questions(source.toc, [parse_table_name("app.main")])
    found = _found(target, sorted(asked))
    chosen = source.select("app.main", exists=found.__contains__)
    assert set(chosen.present) == {
        DatabaseObject("schema", "app"),
        DatabaseObject("schema", "lib"),
        DatabaseObject("type", "lib.mood"),
        DatabaseObject("function", "lib.stamp()"),
        DatabaseObject("sequence", "lib.shared"),
        DatabaseObject("table", "app.other"),
    }
    assert chosen.orphaned_foreign_keys == ()
    _restore(source, chosen, target, tmp_path)
    assert target.value("SELECT lib.stamp()") == "mine"
    assert target.value("SELECT nextval('lib.shared')") == 5000
    keys = "SELECT count(*) FROM pg_constraint WHERE conrelid = 'app.main'::regclass AND contype = 'f'"
    assert target.value(keys) == 3


def test_an_orphaned_foreign_key_is_left_out_and_named(
    source: Source, new_database: NewDatabase, tmp_path: Path
) -> None:
    target = new_database(source.cluster)
    chosen = source.select("app.main", "child")
    child, parent = TableName("app", "main"), TableName("app", "parent")
    assert chosen.orphaned_foreign_keys == (
        OrphanedForeignKey("code_fk", child, parent),
        OrphanedForeignKey("main_parent_id_fkey", child, parent),
    )
    _restore(source, chosen, target, tmp_path)
    keys = "SELECT string_agg(conname, ' ' ORDER BY conname) FROM pg_constraint WHERE contype = 'f'"
    assert target.value(keys) == "child_main_id_fkey main_self_id_fkey"


def test_one_partition_alone_becomes_a_table(source: Source, new_database: NewDatabase, tmp_path: Path) -> None:
    target = new_database(source.cluster)
    chosen = source.select("measure_24", "elsewhere.measure_25")
    assert [alone.partition.name for alone in chosen.detached] == ["measure_24", "measure_25"]
    _restore(source, chosen, target, tmp_path)
    assert target.value("SELECT count(*) FROM app.measure_24") == 1
    attached = "SELECT string_agg(inhrelid::regclass::text, ' ' ORDER BY inhrelid) FROM pg_inherits JOIN pg_class"
    tables = attached + " ON oid = inhrelid WHERE relkind IN ('r', 'p')"
    assert target.value(tables) == "app.measure_24_eu"


def test_a_lost_partition_can_return_to_its_parent(source: Source, new_database: NewDatabase, tmp_path: Path) -> None:
    target = new_database(source.cluster)
    _restore(source, source.select("measure", "parent"), target, tmp_path)
    whole = _dump_of_tables(source, target, source.select("measure").tables)
    target.execute("DROP TABLE app.measure_24")
    asked = selection.questions(source.toc, [parse_table_name("measure_24")])
    found = _found(target, sorted(asked))
    assert DatabaseObject("table", "app.measure_24") in asked - found
    chosen = source.select("measure_24", exists=found.__contains__)
    _restore(source, chosen, target, tmp_path)
    (alone,) = chosen.detached
    statement = "ALTER TABLE ONLY app.measure ATTACH PARTITION app.measure_24 FOR VALUES FROM"
    assert alone.statement.startswith(statement)
    assert alone == DetachedPartition(TableName("app", "measure_24"), TableName("app", "measure"), alone.statement)
    target.execute(alone.statement)
    assert _dump_of_tables(source, target, source.select("measure").tables) == whole


def test_planner_statistics_come_along(source: Source, new_database: NewDatabase, tmp_path: Path) -> None:
    kinds = [kind for kind, _ in source.names(source.select("app.main", "parent"))]
    if source.cluster.installation.major < 18:
        assert "STATISTICS DATA" not in kinds
        return
    target = new_database(source.cluster)
    _restore(source, source.select("app.main", "parent"), target, tmp_path)
    count = "SELECT count(*) FROM pg_stats WHERE tablename IN ('main', 'main_name') AND schemaname = 'app'"
    assert target.value(count) == source.database.value(count) > 10
    assert target.value("SELECT count(*) FROM pg_stats WHERE tablename = 'log'") == 0


def test_every_table_at_once(source: Source, new_database: NewDatabase, tmp_path: Path) -> None:
    target = new_database(source.cluster)
    tables = [entry.table_name for entry in source.toc.entries if entry.is_table]
    chosen = selection.select(source.toc, tables, exists=lambda _: False)
    assert len(chosen.data_dump_ids) == sum(entry.is_table_data for entry in source.toc.entries)
    assert chosen.orphaned_foreign_keys == ()
    assert list(chosen.dump_ids) == [e.dump_id for e in source.toc.entries if e.dump_id in set(chosen.dump_ids)]
    _restore(source, chosen, target, tmp_path, "--jobs=2")
    left_out = {source.toc.by_dump_id[e.dump_id].description for e in source.toc.entries} - {
        kind for kind, _ in source.names(chosen)
    }
    assert left_out <= {"ENCODING", "STDSTRINGS", "SEARCHPATH", "DATABASE", "VIEW", "MATERIALIZED VIEW",
                        "MATERIALIZED VIEW DATA", "BLOB", "BLOBS", "BLOB METADATA"}  # fmt: skip
