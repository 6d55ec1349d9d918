"""The awkward database keeps its promises, and the fingerprint tells equal databases from unequal ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pgkeep.adapters import process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.demo import awkward
from pgkeep.errors import DatabaseError
from tests import clusters
from tests.clusters import Database, NewDatabase

# What the rest of the project relies on; each query must say true.
PROMISES = {
    "a table of 200 000 rows": "SELECT count(*) = 200000 FROM shop.events",
    "a row larger than 16 MiB": "SELECT max(octet_length(body)) > 16 << 20 FROM shop.documents",
    "rows without columns": 'SELECT count(*) = 3 FROM "no columns"',
    "an empty table": "SELECT NOT EXISTS (SELECT FROM shop.empty)",
    "a line break in a table's name": "SELECT count(*) = 1 FROM pg_class WHERE relname LIKE E'%\\nCOPY %\\n%'",
    "quotes in a table's name": "SELECT count(*) = 1 FROM pg_class WHERE relname LIKE '%.%\"%''%\\\\%'",
    "a name of 63 bytes": "SELECT count(*) = 1 FROM pg_class WHERE octet_length(relname) = 63",
    "a schema with a space": "SELECT count(*) = 1 FROM pg_namespace WHERE nspname LIKE '% %' AND nspname !~ '\"'",
    "values like COPY's own": "SELECT count(*) = 2 FROM shop.\"hostile alone\" WHERE v IN ('\\N', '\\.')",
    "null, and the empty string": "SELECT count(*) = 1 AND min(v) = '' FROM shop.\"hostile alone\" WHERE v = ''",
    "a function that looks like a dump": "SELECT prosrc LIKE E'%\\nCOPY public.x FROM stdin;\\n%\\n\\\\\\\\.\\n%'"
    " FROM pg_proc WHERE proname = 'looks_like_a_dump'",
    "sub-partitions": "SELECT count(*) = 2 FROM pg_partition_tree('shop.measurements') WHERE level = 2",
    "default partitions": "SELECT count(*) = 2 FROM pg_partitioned_table WHERE partdefid <> 0",
    "a dropped column": "SELECT count(*) >= 2 FROM pg_attribute WHERE attisdropped",
    "foreign keys in a circle": "SELECT count(*) = 2 FROM pg_constraint WHERE contype = 'f' AND condeferrable",
    "a foreign key to itself": "SELECT count(*) = 1 FROM pg_constraint WHERE contype = 'f' AND conrelid = confrelid",
    "constraints not validated": "SELECT count(*) = 2 FROM pg_constraint WHERE NOT convalidated",
    "an exclusion constraint": "SELECT count(*) = 1 FROM pg_constraint WHERE contype = 'x'",
    "a materialised view without data": "SELECT count(*) = 1 FROM pg_class WHERE relkind = 'm' AND NOT relispopulated",
    "an unlogged table": "SELECT count(*) = 1 FROM pg_class WHERE relpersistence = 'u' AND relkind = 'r'",
    "policies": "SELECT count(*) = 1 FROM pg_policy",
    "default privileges": "SELECT count(*) = 2 FROM pg_default_acl",
    "extended statistics": "SELECT count(*) = 1 FROM pg_statistic_ext",
    "an event trigger": "SELECT count(*) = 1 FROM pg_event_trigger",
    "a generated column": "SELECT count(*) = 1 FROM pg_attribute WHERE attgenerated = 's'",
    "identity columns": "SELECT count(*) = 3 FROM pg_attribute WHERE attidentity <> ''",
    "large objects": "SELECT count(*) = 5 FROM pg_largeobject_metadata",
    "an empty large object": "SELECT count(*) = 1 FROM shop.attachments WHERE length(lo_get(content)) = 0",
    "a large object over 1 MiB": "SELECT count(*) = 1 FROM shop.attachments WHERE length(lo_get(content)) > 1 << 20",
    "a large object of somebody else's": "SELECT count(*) = 1 FROM pg_largeobject_metadata"
    " WHERE pg_get_userbyid(lomowner) <> current_user AND lomacl IS NOT NULL",
}

# A change, and the only keys of the fingerprint that may and must change with it.
CHANGES = {
    "row": (
        "UPDATE shop.cars SET name = 'Car' WHERE id = 3",
        {'table "shop"."cars"'},
    ),
    "null for empty": (
        "UPDATE shop.\"hostile alone\" SET v = NULL WHERE v = ''",
        {'table "shop"."hostile alone"'},
    ),
    "values swapped between rows": (
        "UPDATE shop.hashed_0 SET value = CASE value WHEN 'value 1' THEN 'value 12' ELSE 'value 1' END"
        " WHERE value IN ('value 1', 'value 12')",
        {'table "shop"."hashed_0"'},
    ),
    "row twice": (
        'INSERT INTO "odd schema"."Tab.le with ""quotes"", it\'s; \\ and --"'
        ' SELECT * FROM "odd schema"."Tab.le with ""quotes"", it\'s; \\ and --"',
        {'table "odd schema"."Tab.le with ""quotes"", it\'s; \\ and --"'},
    ),
    "row without columns": (
        'INSERT INTO "no columns" DEFAULT VALUES',
        {'table "public"."no columns"'},
    ),
    "end of the large row": (
        "ALTER TABLE shop.documents DISABLE RULE quiet; UPDATE shop.documents SET body = body || ' ' WHERE id = 1;"
        "ALTER TABLE shop.documents ENABLE RULE quiet",
        {'table "shop"."documents"'},
    ),
    "sequence": (
        "SELECT nextval('shop.countdown')",
        {'sequence "shop"."countdown"'},
    ),
    "sequence was called": (
        "SELECT setval('\"odd schema\".\"never used\"', 42, true)",
        {'sequence "odd schema"."never used"'},
    ),
    "materialised view": (
        'REFRESH MATERIALIZED VIEW "Reporting".not_yet',
        {'materialized view "Reporting"."not_yet"'},
    ),
    "bytes of a large object": (
        "SELECT lo_put(content, 1500000, '\\x00') FROM shop.attachments WHERE name = 'binary'",
        {"large object"},
    ),
    "rights on a large object": (
        "DO $$BEGIN EXECUTE format('GRANT UPDATE ON LARGE OBJECT %s TO PUBLIC',"
        " (SELECT content FROM shop.attachments WHERE name = 'empty')); END$$",
        {"large object"},
    ),
    "comment on a large object": (
        "DO $$BEGIN EXECUTE format('COMMENT ON LARGE OBJECT %s IS ''other''',"
        " (SELECT content FROM shop.attachments WHERE name = 'binary')); END$$",
        {"large object"},
    ),
    "comment": (
        "COMMENT ON TABLE shop.events IS 'the large table'",
        {"schema TABLE events; Type: COMMENT"},
    ),
    "grant": (
        'REVOKE INSERT ON "select" FROM PUBLIC',
        {'schema TABLE "select"; Type: ACL'},
    ),
    "owner": (
        "ALTER TABLE shop.empty OWNER TO awkward_reader",
        # Owners are in the headings of all that belongs to the table.
        {"schema empty; Type: TABLE", "schema empty empty_pkey; Type: CONSTRAINT"},
    ),
    "column type": (
        "ALTER TABLE shop.empty ALTER COLUMN nothing TYPE varchar(7)",
        {"schema empty; Type: TABLE"},
    ),
    "order of a function's lines": (
        "CREATE OR REPLACE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN\nNULL;\nRETURN NEW;\nEND'",
        {"schema refuse(); Type: FUNCTION"},
    ),
    "disabled trigger": (
        'ALTER TABLE shop.customers DISABLE TRIGGER "note it"',
        {'schema customers note it; Type: TRIGGER'},
    ),
}  # fmt: skip


class _Watched:
    """A small awkward database and its latest fingerprint."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.latest = self.look()

    def look(self) -> dict[str, str]:
        return awkward.fingerprint(self.database.conninfo, self.database.cluster.installation)


@pytest.fixture(scope="module")
def watched(cluster15: ScratchCluster) -> Iterator[_Watched]:
    with clusters.temporary_database(cluster15) as database:
        awkward.fill(database.conninfo, rows=1000)
        yield _Watched(database)


def _stock_copy(source: Database, target: Database) -> None:
    """``pg_dump | psql``."""
    tools = source.cluster.installation
    psql: list[str | Path] = [tools.tool("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", target.conninfo]
    with (
        process.start([tools.tool("pg_dump"), "-d", source.conninfo]) as dump,
        process.start(psql, stdin=dump.stdout.fileno(), stdout=process.DEVNULL) as restore,
    ):
        assert restore.wait(120) == 0, restore.messages()
        assert dump.wait(10) == 0, dump.messages()


def test_stock_restore_is_equal(any_awkward: Database, new_database: NewDatabase) -> None:
    restored = new_database(any_awkward.cluster)
    _stock_copy(any_awkward, restored)
    tools = any_awkward.cluster.installation
    one, other = (awkward.fingerprint(each.conninfo, tools) for each in (any_awkward, restored))
    assert awkward.differences(one, other) == []
    assert sum(key.startswith("table ") for key in one) >= 30
    assert sum(key.startswith("large object ") for key in one) == 5


def test_promises(any_awkward: Database) -> None:
    assert {name: any_awkward.value(query) for name, query in PROMISES.items()} == dict.fromkeys(PROMISES, True)


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_shows_and_only_where_it_is(watched: _Watched, name: str) -> None:
    statements, expected = CHANGES[name]
    before = watched.latest
    watched.database.execute(statements)
    watched.latest = watched.look()
    found = awkward.differences(before, watched.latest)
    shown = {each if not each.startswith("large object") else "large object" for each in found}
    shown = {each.split("; Schema:")[0] for each in shown}
    assert shown == expected
    assert len(found) in (len(expected), 2 * len(expected)), "one key each; two where the key itself changed"


def test_a_missing_object_is_a_difference(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    one, other = new_database(cluster15), new_database(cluster15)
    for database in (one, other):
        database.execute("CREATE TABLE t (); CREATE VIEW v AS SELECT 1 AS one")
    other.execute("DROP VIEW v; SELECT lo_create(7)")
    tools = cluster15.installation
    found = awkward.differences(awkward.fingerprint(one.conninfo, tools), awkward.fingerprint(other.conninfo, tools))
    assert found == ["large object 7", "schema v; Type: VIEW; Schema: public; Owner: postgres"]


def test_fill_tells_what_it_made(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    database = new_database(cluster15)
    filled = {(each.schema, each.name): each.rows for each in awkward.fill(database.conninfo, rows=500)}
    assert filled["shop", "events"] == 500
    assert filled["public", "no columns"] == 3
    assert filled["shop", "vehicles"] == 2, "its own rows, without the children's"
    assert filled["shop", "empty"] == 0


def test_fill_makes_all_or_nothing(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    database = new_database(cluster15)
    database.execute("CREATE SCHEMA shop; CREATE TABLE shop.empty ()")
    with pytest.raises(DatabaseError, match="already exists"):
        awkward.fill(database.conninfo, rows=500)
    assert database.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'Reporting'") == 0


def test_unreachable_database_is_an_error(cluster15: ScratchCluster) -> None:
    with pytest.raises(DatabaseError, match="no such one"):
        awkward.fingerprint(cluster15.conninfo("no such one"), cluster15.installation)


def test_a_copy_of_the_template_is_free_to_change(awkward15: Database, cluster15: ScratchCluster) -> None:
    awkward15.execute("DROP SCHEMA shop CASCADE")
    with psycopg.connect(cluster15.conninfo(clusters.AWKWARD_TEMPLATE)) as connection:
        assert connection.execute("SELECT count(*) > 0 FROM shop.events").fetchone() == (True,)
