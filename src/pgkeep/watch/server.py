"""Can the server be dumped, all of it, by this role, with these tools?"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pgkeep.adapters import clock, pgbinaries, postgres
from pgkeep.errors import DatabaseError, ToolError
from pgkeep.watch.check import Check, failed, some

if TYPE_CHECKING:
    import psycopg

# A server's clock that is further off makes times in logs and in manifests hard to match.
CLOCK_DRIFT = dt.timedelta(minutes=1)

# What pg_dump dumps: nothing of the system, of other sessions, or of an extension (but its configuration tables).
_DUMPED = """
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
      AND (NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                       AND d.deptype = 'e')
           OR EXISTS (SELECT FROM pg_extension e WHERE c.oid = ANY (e.extconfig)))
"""
_WHO_AND_HOW_MUCH = "SELECT quote_ident(current_user), pg_size_pretty(pg_database_size(current_database()))"
_NAMED = "SELECT format('%I.%I', n.nspname, c.relname)" + _DUMPED
# LOCK TABLE and COPY want SELECT on the whole table, and USAGE on the way to it.
_CLOSED_TABLES = _NAMED + (
    " AND c.relkind IN ('r', 'p')"
    " AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')) ORDER BY 1"
)
_CLOSED_SEQUENCES = _NAMED + (
    " AND c.relkind = 'S'"
    " AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_sequence_privilege(c.oid, 'SELECT')) ORDER BY 1"
)
_FILTERED_TABLES = _NAMED + " AND c.relkind IN ('r', 'p') AND row_security_active(c.oid) ORDER BY 1"
# Before 18 there is no has_largeobject_privilege, and no acl leaves the owner alone.
_CLOSED_LARGE_OBJECTS_18 = """
    SELECT oid::text FROM pg_largeobject_metadata WHERE NOT has_largeobject_privilege(oid, 'SELECT') ORDER BY oid
"""
_CLOSED_LARGE_OBJECTS = """
    SELECT m.oid::text FROM pg_largeobject_metadata m
    WHERE NOT current_setting('is_superuser')::bool AND NOT current_setting('lo_compat_privileges')::bool
      AND NOT pg_has_role(m.lomowner, 'USAGE')
      AND NOT EXISTS (SELECT FROM aclexplode(m.lomacl) AS a WHERE a.privilege_type = 'SELECT'
                      AND (a.grantee = 0 OR pg_has_role(a.grantee, 'USAGE')))
    ORDER BY m.oid
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What the storage checks need: the sizes of the databases that are to be dumped, by name, and whose they are."""

    system_identifier: str
    data_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is to be dumped: ``names`` empty and not ``everything`` means the target's own database."""

    names: tuple[str, ...]
    everything: bool
    globals: Literal["auto", "off"]
    connect_timeout_seconds: int


class Examination:
    """The checks of one server; ``facts`` are there once it has answered."""

    def __init__(self, target: postgres.Target, plan: Plan) -> None:
        self._target = target
        self._plan = plan
        self.facts: Facts | None = None

    def run(self) -> Iterator[Check]:
        """Raises ``DatabaseError`` where the server can't be reached or a question goes wrong."""
        first = self._target if not self._plan.names else self._target.database(self._plan.names[0])
        with self._connected(first) as connection:
            server = postgres.inspect_server(connection)
            self.facts = Facts(server.system_identifier, {})
            yield Check("server", "ok", f"{first.described} is PostgreSQL {server.version}")
            yield from self._way(first, connection)
            yield from _pg_dump(server)
            if server.in_recovery:
                remedy = "none is needed; dump the primary where unlogged tables matter"
                yield Check("standby", "warn", "a standby: unlogged tables have no rows there", remedy)
            yield _clock(connection)
            yield self._globals(connection)
            names = postgres.list_databases(connection) if self._plan.everything else self._plan.names
        for name in names or (server.database,):
            yield from self._database(name)

    def _connected(self, target: postgres.Target) -> Any:
        return postgres.connect(target, timeout_seconds=self._plan.connect_timeout_seconds)

    def _way(self, target: postgres.Target, connection: psycopg.Connection[Any]) -> Iterator[Check]:
        try:
            postgres.refuse_transaction_pooling(target, connection)
        except DatabaseError as error:
            yield failed("pooler", error)

    def _globals(self, connection: psycopg.Connection[Any]) -> Check:
        if self._plan.globals == "off":
            return Check("globals", "ok", "roles and tablespaces are not backed up: BACKUP_GLOBALS=off")
        if postgres.may_read_passwords(connection):
            return Check("globals", "ok", "roles can be read with their password hashes")
        text = "roles will be backed up without their passwords: this role may not read pg_authid"
        return Check("globals", "warn", text, "GRANT SELECT ON pg_catalog.pg_authid, or set passwords anew afterwards")

    def _database(self, name: str) -> Iterator[Check]:
        try:
            with self._connected(self._target.database(name)) as connection:
                server = postgres.inspect_server(connection)
                assert self.facts is not None
                self.facts.data_bytes[server.database] = server.data_bytes
                yield from _privileges(connection, server.database)
        except DatabaseError as error:
            yield failed("privileges", error)


def _pg_dump(server: postgres.Server) -> Iterator[Check]:
    try:
        chosen = pgbinaries.choose("pg_dump", server.major)
        chosen.installation.tool("pg_restore")
    except ToolError as error:
        yield failed("pg_dump", error)
        return
    text = f"pg_dump {chosen.installation.version} for a server {server.version}"
    if not chosen.newer:
        yield Check("pg_dump", "ok", text)
        return
    text += f": the backup may not restore into a server older than {chosen.installation.major}"
    yield Check("pg_dump", "warn", text, f"install postgresql-client-{server.major}")


def _clock(connection: psycopg.Connection[Any]) -> Check:
    row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
    assert row is not None
    drift = abs(clock.now() - dt.datetime.fromtimestamp(row[0], dt.UTC))
    text = f"the server's clock is {drift.total_seconds():.1f} s off this one"
    if drift > CLOCK_DRIFT:
        return Check("server clock", "warn", text, "synchronise both (chrony, timedatectl)")
    return Check("server clock", "ok", text)


def _privileges(connection: psycopg.Connection[Any], database: str) -> Iterator[Check]:
    role, size = _row(connection, _WHO_AND_HOW_MUCH)
    tables, sequences = _names(connection, _CLOSED_TABLES), _names(connection, _CLOSED_SEQUENCES)
    filtered = _names(connection, _FILTERED_TABLES)
    knows_objects = connection.info.server_version >= 180000
    objects = _names(connection, _CLOSED_LARGE_OBJECTS_18 if knows_objects else _CLOSED_LARGE_OBJECTS)
    where = f"{database}: {role}"
    remedy = f"GRANT pg_read_all_data TO {role}, or SELECT on each and USAGE on its schema"
    if tables:
        yield Check("privileges", "fail", f"{where} may not read these tables: {some(tables)}", remedy)
    if sequences:
        yield Check("privileges", "fail", f"{where} may not read these sequences: {some(sequences)}", remedy)
    if objects:
        text = f"{where} may not read these large objects: {some(objects)}"
        yield Check("privileges", "fail", text, "GRANT SELECT ON LARGE OBJECT …, or dump as their owner or a superuser")
    if filtered:
        text = f"{where} would see these tables through row security only: {some(filtered)}"
        remedy = f"pg_dump stops there: ALTER ROLE {role} BYPASSRLS, or dump as the tables' owner"
        yield Check("privileges", "fail", text, remedy)
    if not (tables or sequences or objects or filtered):
        yield Check("privileges", "ok", f"{where} may read all of it ({size})")


def _names(connection: psycopg.Connection[Any], query: str) -> list[str]:
    # The query is made of constants alone; psycopg wants a literal.
    return [str(name) for (name,) in connection.execute(query.encode())]


def _row(connection: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return tuple(row)
