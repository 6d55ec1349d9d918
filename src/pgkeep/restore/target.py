"""The database that a restore goes into: is it there, is it empty, can it read the dump, make it anew."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pgkeep.adapters import postgres
from pgkeep.domain.manifest import DatabaseFacts
from pgkeep.domain.selection import DatabaseObject, existence_query
from pgkeep.domain.toc import TableName
from pgkeep.errors import ConfigurationError, DatabaseError, RefusedError

if TYPE_CHECKING:
    import psycopg

_MAINTENANCE_DATABASES = ("postgres", "template1")
# These settings hold a list whose members were quoted when it was stored (guc.h, GUC_LIST_QUOTE).
_LIST_SETTINGS = frozenset(
    {"local_preload_libraries", "search_path", "session_preload_libraries", "shared_preload_libraries",
     "temp_tablespaces", "unix_socket_directories"}
)  # fmt: skip
_MEMBER = re.compile(r'\s*("(?:[^"]|"")*"|[^\s",;]+)\s*(?:,(?=.)|\Z)', re.DOTALL)
# The first thing that a restore could run into: made by a user, and not by an extension.
_FIRST_OBJECT = """
WITH own AS (
    SELECT 'relation ' || oid::regclass AS name, oid FROM pg_class WHERE relkind = ANY ('{r,p,v,m,S,f}')
    UNION ALL SELECT 'function ' || oid::regprocedure, oid FROM pg_proc
    UNION ALL SELECT 'schema ' || nspname, oid FROM pg_namespace WHERE nspname !~ '^pg_'
    UNION ALL SELECT 'type ' || oid::regtype, oid FROM pg_type WHERE typrelid = 0 AND typelem = 0
)
SELECT name FROM own WHERE oid >= 16384 AND oid NOT IN (SELECT objid FROM pg_depend WHERE deptype = 'e')
UNION ALL SELECT 'large object ' || oid FROM pg_largeobject_metadata LIMIT 1
"""


# What ANALYZE without a name would look at, the largest first.
_ANALYZED = """
SELECT nspname, relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind = ANY ('{r,m,p}') AND pg_class.oid >= 16384 AND relpersistence <> 't' ORDER BY relpages DESC
"""


@dataclasses.dataclass(frozen=True, slots=True)
class TargetFacts:
    """``major`` of the server; ``is_superuser`` of our role there."""

    database: str
    major: int
    is_superuser: bool


def inspect_target(target: postgres.Target) -> TargetFacts:
    """Raises ``DatabaseError``."""
    with postgres.connect(target) as connection:
        return _facts(connection)


def require_empty(target: postgres.Target) -> None:
    """Raises ``RefusedError`` naming the first thing that is in the way."""
    with postgres.connect(target) as connection:
        row = connection.execute(_FIRST_OBJECT).fetchone()
    if row is not None:
        raise RefusedError(
            f"the target {target.described} is not empty: it holds {row[0]}",
            "restore into a new database (--create), or say --allow-non-empty",
        )


def missing_roles(target: postgres.Target, owners: Iterable[str]) -> list[str]:
    """Those of ``owners`` that the server has not."""
    wanted = sorted(set(owners))
    query = "SELECT name FROM unnest(%s::text[]) AS name WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)"
    with postgres.connect(target) as connection:
        return [name for (name,) in connection.execute(query, [wanted])]


def existing_objects(target: postgres.Target, asked: Sequence[DatabaseObject]) -> frozenset[DatabaseObject]:
    """Those of the asked objects that the target has."""
    with postgres.connect(target) as connection:
        connection.execute("SET search_path TO ''")
        parameters = [[thing.kind for thing in asked], [thing.name for thing in asked]]
        # The query is made of constants alone; psycopg wants a literal.
        rows = connection.execute(existence_query().encode(), parameters).fetchall()
    return frozenset(DatabaseObject(kind, name) for kind, name in rows)


def create_database(target: postgres.Target, facts: DatabaseFacts) -> None:
    """Make the database that ``target`` names, with the recorded encoding and locale.

    Raises ``RefusedError`` where it exists, ``ConfigurationError`` without a name, ``DatabaseError``.
    """
    name = dict(target.parameters).get("dbname")
    if not name:
        raise ConfigurationError("--create needs the new database's name", "add dbname=… to --to")
    with postgres.connect(maintenance(target)) as connection:
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is not None:
            raise RefusedError(f"the database {name!r} exists already", "choose another name, or leave --create out")
        major = _facts(connection).major
        connection.execute(_create_statement(name, facts, major))


def drop_database(target: postgres.Target) -> None:
    """Take :func:`create_database` back. Raises ``DatabaseError``."""
    from psycopg import sql

    name = dict(target.parameters)["dbname"]
    with postgres.connect(maintenance(target)) as connection:
        connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


def apply_settings(target: postgres.Target, facts: DatabaseFacts) -> list[str]:
    """ALTER DATABASE … SET as recorded; the ones that this server refuses come back in words."""
    import psycopg
    from psycopg import sql

    refused = []
    with postgres.connect(target) as connection:
        name = sql.Identifier(_facts(connection).database)
        for role, setting, value in facts.settings:
            subject = sql.SQL("DATABASE {}").format(name)
            if role:
                subject = sql.SQL("ROLE {} IN DATABASE {}").format(sql.Identifier(role), name)
            members = list_members(value) if setting in _LIST_SETTINGS else [value]
            given = sql.SQL(", ").join(map(sql.Literal, members))
            try:
                statement = sql.SQL("ALTER {} SET {} TO {}")
                connection.execute(statement.format(subject, sql.Identifier(*setting.split(".")), given))
            except psycopg.Error as error:
                refused.append(f"the setting {setting} was refused: {' '.join(str(error).split())}")
    return refused


def list_members(value: str) -> list[str]:
    """The members of a setting that holds a list, unquoted: each goes to the server as a literal, never as SQL."""
    members = [match[1] for match in _MEMBER.finditer(value)]
    if not members or _MEMBER.sub("", value):
        return [value]
    return [text[1:-1].replace('""', '"') if text.startswith('"') else text for text in members]


def analyze(target: postgres.Target, tables: Sequence[TableName] | None, jobs: int) -> None:
    """Gather the planner's statistics of the named tables, or of all; ``jobs`` tables at a time."""
    if tables is None:
        with postgres.connect(target) as connection:
            if postgres.accept_any_bytes(connection):
                # The names that a list would hold may be no text at all.
                connection.execute("ANALYZE")
                return
            tables = [TableName(schema, name) for schema, name in connection.execute(_ANALYZED)]

    def analyze_some(some: Sequence[TableName]) -> None:
        with postgres.connect(target) as connection:
            any_bytes = postgres.accept_any_bytes(connection)
            for table in some:
                name = postgres.quoted_name(table.schema or "public", table.name, any_bytes=any_bytes)
                connection.execute(b"ANALYZE " + name)

    jobs = max(1, min(jobs, len(tables)))
    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        collections.deque(threads.map(analyze_some, (tables[start::jobs] for start in range(jobs))), maxlen=0)


def maintenance(target: postgres.Target) -> postgres.Target:
    """A database of the same server that is there before ours is. Raises ``DatabaseError``."""
    failure: DatabaseError | None = None
    for name in _MAINTENANCE_DATABASES:
        try:
            with postgres.connect(target.database(name)):
                return target.database(name)
        except DatabaseError as error:
            failure = error
    assert failure is not None
    raise failure


def _facts(connection: psycopg.Connection[Any]) -> TargetFacts:
    row = connection.execute(
        "SELECT current_database(), current_setting('server_version_num')::int / 10000,"
        " current_setting('is_superuser') = 'on'"
    ).fetchone()
    assert row is not None
    return TargetFacts(*row)


def _create_statement(name: str, facts: DatabaseFacts, major: int) -> Any:
    from psycopg import sql

    options: list[tuple[str, str | None]] = [
        ("ENCODING", facts.encoding),
        ("LC_COLLATE", facts.collate),
        ("LC_CTYPE", facts.ctype),
    ]
    if major >= 15:
        options.append(("LOCALE_PROVIDER", facts.locale_provider))
        options.append(("BUILTIN_LOCALE" if facts.locale_provider == "builtin" else "ICU_LOCALE", facts.icu_locale))
    if major >= 16:
        options.append(("ICU_RULES", facts.icu_rules))
    given = [sql.SQL(word + " {}").format(sql.Literal(value)) for word, value in options if value is not None]
    return sql.SQL("CREATE DATABASE {} TEMPLATE template0 {}").format(sql.Identifier(name), sql.SQL(" ").join(given))
