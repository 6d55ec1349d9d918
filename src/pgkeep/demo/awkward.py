"""Fill a database that is awkward on purpose, and prove that two databases are equal."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

from pgkeep.adapters import process
from pgkeep.adapters.pgbinaries import Installation
from pgkeep.errors import DatabaseError

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.sql import Composed

DEFAULT_ROWS = 200_000
# What decides how values look as text; the server's and the database's own choice must not matter.
_SESSION = """
    SET DateStyle = 'ISO, YMD'; SET IntervalStyle = 'postgres'; SET TimeZone = 'UTC'; SET bytea_output = 'hex';
    SET extra_float_digits = 1; SET search_path = pg_catalog; SET row_security = off; SET default_tablespace = '';
    SET statement_timeout = 0; SET work_mem = '64MB'; SET lock_timeout = 0
"""
_RELATIONS = """
    SELECT n.nspname, c.relname, c.relkind::text, c.relispopulated,
           coalesce((SELECT array_agg(a.attname::text ORDER BY a.attname COLLATE "C") FROM pg_attribute a
                     WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '{}')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'm', 'S') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
          AND n.nspname !~ '^pg_(toast|temp)'
    ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C"
"""
# lo_get, not pages: a hole comes back from a restore as zeros that are stored.
_LARGE_OBJECTS = """
    SELECT oid::text,
           concat_ws(' ', length(lo_get(oid)), md5(lo_get(oid)), pg_get_userbyid(lomowner),
                     (SELECT array_agg(acl::text ORDER BY acl::text COLLATE "C")
                      FROM unnest(coalesce(lomacl, acldefault('L', lomowner))) AS acl),
                     md5(obj_description(oid, 'pg_largeobject')))
    FROM pg_largeobject_metadata ORDER BY oid
"""
# Follows whichever object comes last, which would else look changed where another becomes the last.
_DUMP_END = "\n--\n-- PostgreSQL database dump complete\n--\n"


@dataclasses.dataclass(frozen=True, slots=True)
class FilledTable:
    """A table (or partition, or filled materialised view) and how many rows it holds itself."""

    schema: str
    name: str
    rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Relation:
    schema: str
    name: str
    kind: str
    populated: bool
    columns: list[str]

    @property
    def label(self) -> str:
        """Both parts quoted as SQL does, since either may hold a dot."""
        return ".".join('"' + part.replace('"', '""') + '"' for part in (self.schema, self.name))


def fill(conninfo: str, rows: int = DEFAULT_ROWS) -> list[FilledTable]:
    """Create everything in an empty database, as its superuser; ``rows`` go to the largest table.

    Creates two roles without login where they are missing. Raises ``DatabaseError``.
    """
    import psycopg

    script = resources.files("pgkeep.demo").joinpath("awkward.sql").read_bytes()
    try:
        with psycopg.connect(conninfo) as connection:
            connection.execute("SELECT set_config('awkward.rows', %s, true)", [str(rows)])
            connection.execute(script)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("ANALYZE")
            return _filled_tables(connection)
    except psycopg.Error as error:
        raise DatabaseError(f"the awkward database was not made: {error}", "it needs a superuser, empty") from error


def fingerprint(conninfo: str, tools: Installation) -> dict[str, str]:
    """What two databases must share to be equal; the order in which anything is stored does not matter.

    Keys: ``table <name>`` and ``materialized view <name>`` (rows and a digest over all rows), ``sequence <name>``,
    ``large object <oid>`` (length, digest, owner, rights, comment), ``schema <heading>`` for each object in
    :func:`schema_text`.
    One snapshot for the data; ``tools`` must be able to dump the server. Raises ``DatabaseError``.
    """
    import psycopg

    try:
        with psycopg.connect(conninfo) as connection:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            connection.execute(_SESSION)
            data = dict(_data_fingerprint(connection))
    except psycopg.Error as error:
        raise DatabaseError(f"can't read the database: {error}", "it needs a superuser") from error
    return {**data, **_schema_fingerprint(schema_text(conninfo, tools))}


def schema_text(conninfo: str, tools: Installation) -> str:
    r"""``pg_dump --schema-only`` without what differs from run to run: ``\restrict`` keys and versions."""
    completed = process.run([tools.tool("pg_dump"), "--schema-only", f"--dbname={conninfo}"])
    if completed.return_code != 0:
        raise DatabaseError(f"pg_dump --schema-only failed: {completed.stderr}")
    # Split at line feeds only: names and comments may hold other things that look like a line's end.
    lines = completed.stdout.decode().split("\n")
    return "\n".join(line for line in lines if not line.startswith((r"\restrict ", r"\unrestrict ", "-- Dumped ")))


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The keys on which two fingerprints differ, or that only one has; empty for equal databases."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _schema_fingerprint(text: str) -> dict[str, str]:
    """A digest for each of pg_dump's headings; what has the same heading (it may) shares one.

    A restore may change the order of a child table's columns, so a table's lines are taken in sorted order.
    """
    digests: dict[str, list[str]] = {}
    for block in text.rpartition(_DUMP_END)[0].split("\n--\n-- Name: "):
        heading, _, body = block.partition("\n--\n")
        body = body.strip()
        if body.startswith(("CREATE TABLE ", "CREATE UNLOGGED TABLE ")):
            body = "\n".join(sorted(line.rstrip(",") for line in body.split("\n")))
        digests.setdefault(f"schema {heading}", []).append(hashlib.sha256(body.encode()).hexdigest())
    return {heading: " ".join(sorted(each)) for heading, each in digests.items()}


def _data_fingerprint(connection: Connection) -> Iterator[tuple[str, str]]:
    for relation in _relations(connection):
        if relation.kind == "S":
            yield f"sequence {relation.label}", _text(connection, _sequence_query(relation))
        elif relation.kind == "m":
            digest = _text(connection, _rows_query(relation)) if relation.populated else "not populated"
            yield f"materialized view {relation.label}", digest
        else:
            yield f"table {relation.label}", _text(connection, _rows_query(relation))
    for oid, description in connection.execute(_LARGE_OBJECTS):
        yield f"large object {oid}", description


def _relations(connection: Connection) -> list[_Relation]:
    return [_Relation(*row) for row in connection.execute(_RELATIONS.encode())]


def _rows_query(relation: _Relation) -> Composed:
    """Rows and a digest over the sorted digests of the rows: 32 bytes a row to sort, however large the rows are.

    Columns by name, since a restore may change their order (a child whose columns came before its parent's).
    """
    from psycopg import sql

    query = """
        SELECT count(*) || ' rows ' || coalesce(md5(string_agg(d, '' ORDER BY d COLLATE "C")), '')
        FROM (SELECT md5(ROW({columns})::text) AS d FROM ONLY {table}) AS digests
    """
    columns = sql.SQL(", ").join(sql.Identifier(name) for name in relation.columns)
    return sql.SQL(query).format(columns=columns, table=sql.Identifier(relation.schema, relation.name))


def _sequence_query(relation: _Relation) -> Composed:
    from psycopg import sql

    query = sql.SQL("SELECT concat_ws(' ', last_value, is_called) FROM {}")
    return query.format(sql.Identifier(relation.schema, relation.name))


def _text(connection: Connection, query: Composed) -> str:
    row = connection.execute(query).fetchone()
    assert row is not None, "an aggregate, or a sequence: always one row"
    return str(row[0])


def _filled_tables(connection: Connection) -> list[FilledTable]:
    from psycopg import sql

    counted = []
    for relation in _relations(connection):
        if relation.kind != "S" and relation.populated:
            table = sql.Identifier(relation.schema, relation.name)
            rows = int(_text(connection, sql.SQL("SELECT count(*) FROM ONLY {}").format(table)))
            counted.append(FilledTable(relation.schema, relation.name, rows))
    return counted
