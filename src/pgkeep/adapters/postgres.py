"""Connections to PostgreSQL: for our own questions through psycopg, for the tools through the same parameters.

A password never stands in an argument or the environment: the tools get it through a passfile that exists
only in memory, inherited as a descriptor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgkeep.adapters import process
from pgkeep.domain.manifest import DatabaseFacts
from pgkeep.errors import ConfigurationError, DatabaseError

if TYPE_CHECKING:
    import psycopg

_SOCKET_DIRECTORIES = ("/var/run/postgresql", "/tmp")  # noqa: S108 - where servers listen by default
_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where and as whom to connect: libpq's parameters without the password, and the password."""

    parameters: tuple[tuple[str, str], ...]
    password: str | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, parameters: Mapping[str, object], password: str | None = None) -> Target:
        """``parameters`` by libpq's names; None and empty values are left to libpq's own defaults."""
        given = {name: str(value) for name, value in parameters.items() if value not in (None, "")}
        password = given.pop("password", None) or password or os.environ.get("PGPASSWORD")
        return cls(tuple({**_default_socket(given), **given}.items()), password)

    @classmethod
    def parse(cls, conninfo: str, password: str | None = None) -> Target:
        """A libpq URI or keyword string. Raises ``ConfigurationError``, without the text: it may hold a password."""
        import psycopg.conninfo

        try:
            return cls.of(psycopg.conninfo.conninfo_to_dict(conninfo), password)
        except psycopg.ProgrammingError as error:
            hint = "postgresql://user@host:5432/database, or host=… dbname=… user=…"
            raise ConfigurationError("the target is not a libpq URI or keyword string", hint) from error

    def database(self, name: str) -> Target:
        """The same server, another database."""
        return dataclasses.replace(self, parameters=tuple({**dict(self.parameters), "dbname": name}.items()))

    def with_setting(self, name: str, value: str) -> Target:
        """The same, with a setting of the session; both must be plain words. A pooler may refuse it."""
        given = dict(self.parameters)
        options = given.get("options") or os.environ.get("PGOPTIONS") or ""
        given["options"] = f"{options} -c {name}={value}".strip()
        return dataclasses.replace(self, parameters=tuple(given.items()))

    @property
    def conninfo(self) -> str:
        """A keyword string without a password, fit for an argument list."""
        import psycopg.conninfo

        return psycopg.conninfo.make_conninfo("", **dict(self.parameters))

    @property
    def described(self) -> str:
        """For people: ``app@db:5432/app_db``."""
        given = dict(self.parameters)
        host = given.get("host") or given.get("service") or os.environ.get("PGHOST") or "local socket"
        user = given.get("user") or os.environ.get("PGUSER")
        port = given.get("port") or os.environ.get("PGPORT")
        prefix = f"{user}@" if user else ""
        return f"{prefix}{host}{f':{port}' if port else ''}/{given.get('dbname', '')}"


@contextlib.contextmanager
def tool_access(target: Target) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """Environment and descriptors that let a PostgreSQL tool log in. Raises ``ConfigurationError``."""
    if target.password is None:
        yield {}, ()
        return
    if "\n" in target.password or "\0" in target.password:
        raise ConfigurationError("the database password holds a line break", "a passfile can't carry it; change it")
    escaped = target.password.replace("\\", "\\\\").replace(":", "\\:")
    descriptor = os.memfd_create("passfile", os.MFD_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, f"*:*:*:*:{escaped}\n".encode())
        yield {"PGPASSFILE": f"/proc/self/fd/{descriptor}"}, (descriptor,)
    finally:
        os.close(descriptor)


def run_tool(
    program: Path, arguments: Sequence[str | os.PathLike[str]], target: Target, *, timeout_seconds: float | None = None
) -> process.Completed:
    """Run psql, pg_dumpall and the like against ``target``; its parameters become ``--dbname``."""
    with tool_access(target) as (environment, descriptors):
        command = [program, f"--dbname={target.conninfo}", "--no-password", *arguments]
        return process.run(command, environment=environment, descriptors=descriptors, timeout_seconds=timeout_seconds)


@contextlib.contextmanager
def connect(target: Target, *, timeout_seconds: int = 10) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection. Raises ``DatabaseError`` with the server's words and a remedy."""
    import psycopg

    try:
        connection = psycopg.connect(
            target.conninfo,
            password=target.password,
            autocommit=True,
            connect_timeout=timeout_seconds,
            # Else psycopg takes the database's own, and gives bytes for text where that is SQL_ASCII.
            client_encoding="UTF8",
            application_name="pgkeep",
        )
    except psycopg.Error as error:
        raise DatabaseError(f"can't connect to {target.described}: {_words(error)}", _remedy(str(error))) from error
    try:
        # As pg_dump does: neither a database's own time limit nor a name that hides a system's is for us.
        connection.execute("SET statement_timeout = 0; SET lock_timeout = 0; SET search_path = pg_catalog")
        yield connection
    except psycopg.Error as error:
        raise DatabaseError(f"{target.described}: {_words(error)}", _remedy(str(error))) from error
    finally:
        connection.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself. ``major`` is 15 for 15.4; ``data_bytes`` the database's size on its disk."""

    version: str
    major: int
    system_identifier: str
    database: str
    in_recovery: bool
    data_bytes: int


def inspect_server(connection: psycopg.Connection[Any]) -> Server:
    """Ask for the facts. Raises ``psycopg.Error``."""
    row = connection.execute(
        "SELECT current_setting('server_version'), current_setting('server_version_num')::int / 10000,"
        " current_database(), pg_is_in_recovery(), pg_database_size(current_database())"
    ).fetchone()
    assert row is not None
    version, major, database, in_recovery, data_bytes = row
    return Server(version.split()[0], major, _system_identifier(connection), database, in_recovery, data_bytes)


def read_facts(connection: psycopg.Connection[Any], major: int) -> DatabaseFacts:
    """What ``restore --create`` needs of the connected database. Raises ``psycopg.Error``."""
    provider = "datlocprovider" if major >= 15 else "'c'"
    locale = "datlocale" if major >= 17 else "daticulocale" if major >= 15 else "NULL"
    rules = "daticurules" if major >= 16 else "NULL"
    row = connection.execute(
        f"SELECT pg_encoding_to_char(encoding), datcollate, datctype, {provider}, {locale}, {rules}"  # noqa: S608
        " FROM pg_database WHERE datname = current_database()"
    ).fetchone()
    assert row is not None
    encoding, collate, ctype, kind, icu_locale, icu_rules = row
    names = {"c": "libc", "i": "icu", "b": "builtin"}
    return DatabaseFacts(
        encoding=encoding,
        collate=collate,
        ctype=ctype,
        locale_provider=names.get(_text(kind), "libc"),
        icu_locale=icu_locale,
        icu_rules=icu_rules,
        settings=_settings(connection),
        extensions=tuple(connection.execute("SELECT extname, extversion FROM pg_extension ORDER BY 1").fetchall()),
    )


def accept_any_bytes(connection: psycopg.Connection[Any]) -> bool:
    """Whether the database has no encoding (SQL_ASCII); from here on the session then takes names of any bytes."""
    if connection.info.parameter_status("server_encoding") != "SQL_ASCII":
        return False
    connection.execute("SET client_encoding = 'SQL_ASCII'")
    return True


def quoted_name(schema: str, name: str, *, any_bytes: bool) -> bytes:
    r"""A qualified name in SQL. ``any_bytes``: what stands as ``\xNN`` in it was no UTF-8 when it was read."""
    parts = [b'"' + part.encode().replace(b'"', b'""') + b'"' for part in (schema, name)]
    if any_bytes:
        parts = [_ESCAPED_BYTE.sub(lambda match: bytes.fromhex(match[1].decode()), part) for part in parts]
    return b".".join(parts)


def list_databases(connection: psycopg.Connection[Any]) -> list[str]:
    """Every database that can be dumped: no templates, none that refuses connections."""
    query = "SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate ORDER BY datname"
    return [name for (name,) in connection.execute(query)]


def may_read_passwords(connection: psycopg.Connection[Any]) -> bool:
    """Whether the role reads pg_authid: not so on managed servers."""
    row = connection.execute("SELECT has_table_privilege('pg_catalog.pg_authid', 'SELECT')").fetchone()
    return bool(row and row[0])


def refuse_transaction_pooling(target: Target, connection: psycopg.Connection[Any]) -> None:
    """Raises ``DatabaseError`` behind a pooler that hands one backend to several sessions (PgBouncer).

    Only a pooler answers with another backend's number than the one it greeted with; if two open sessions
    then get the same backend, sessions are not ours, and pg_dump's SET and its snapshot would be lost.
    """
    here = _backend(connection)
    if here == connection.info.backend_pid:
        return
    with connect(target) as other, other.transaction():
        if _backend(other) == here:
            raise DatabaseError(
                f"{target.described} is a PgBouncer (or another pooler) in transaction mode: a dump needs a session",
                "connect to the server itself, or to a pool in session mode",
            )


def _backend(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


def _system_identifier(connection: psycopg.Connection[Any]) -> str:
    import psycopg

    try:
        row = connection.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    except psycopg.errors.InsufficientPrivilege:
        # Some managed servers take the right away; backups then group by database name alone.
        return "unknown"
    assert row is not None
    return str(row[0])


def _settings(connection: psycopg.Connection[Any]) -> tuple[tuple[str, str, str], ...]:
    """ALTER DATABASE … SET, for all roles ('') and for named ones."""
    rows = connection.execute(
        "SELECT coalesce(pg_get_userbyid(nullif(setrole, 0)), ''), item FROM pg_db_role_setting,"
        " unnest(setconfig) AS item"
        " WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1, 2"
    ).fetchall()
    return tuple((role, *item.split("=", 1)) for role, item in rows)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _default_socket(given: Mapping[str, str]) -> dict[str, str]:
    """psycopg's libpq and the tools' may be built with different socket directories: settle on one."""
    if {"host", "hostaddr", "service"} & given.keys() or os.environ.get("PGHOST") or os.environ.get("PGSERVICE"):
        return {}
    port = given.get("port") or os.environ.get("PGPORT") or "5432"
    for directory in _SOCKET_DIRECTORIES:
        if Path(directory, f".s.PGSQL.{port}").exists():
            return {"host": directory}
    return {}


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


def _remedy(message: str) -> str:
    remedies = {
        "password authentication failed": "check DB_USER and the password file (DB_PASSWORD_FILE)",
        "no password supplied": "give a password: DB_PASSWORD_FILE, a passfile or a service file",
        "does not exist": "check DB_NAME and DB_USER; `psql -l` lists the databases",
        "Connection refused": "is the server up, and does it listen at this host and port?",
        "No such file or directory": "is the server up, and does its socket lie elsewhere? set DB_HOST",
        "could not translate host name": "check DB_HOST; in Compose, agent and database must share a network",
        "failed to resolve host": "check DB_HOST; in Compose, agent and database must share a network",
        "no pg_hba.conf entry": "let this user and address in: pg_hba.conf on the server",
        "timeout expired": "is the server reachable from here? a firewall drops packets silently",
        "permission denied": "grant the role what it reads, e.g. pg_read_all_data",
    }
    return next((remedy for words, remedy in remedies.items() if words in message), "")
