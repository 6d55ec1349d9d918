"""The server and the databases that are measured: made here, the same at every run, gone at the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
from psycopg import sql

from bench import machine, programs
from bench.figures import DatabaseFigures
from pgkeep.adapters import pgbinaries, process
from pgkeep.adapters.pgbinaries import Installation
from pgkeep.adapters.scratch_cluster import ScratchCluster

Say = Callable[[str], None]
KINDS = ("mixed", "dominant")
PREFERRED_MAJOR = 15
_SQL = Path(__file__).parent
_BLOCK_BYTES = 1024 * 1024


def choose_installation(major: int | None) -> Installation:
    """The one asked for, else PostgreSQL 15, else whatever there is. Raises ``ToolError``."""
    if major is not None:
        return pgbinaries.choose_server(major)
    found = [each for each in pgbinaries.find_installations() if each.has_server and each.major == PREFERRED_MAJOR]
    return found[0] if found else pgbinaries.choose_server()


def settings() -> dict[str, str]:
    """As a careful person would set a server of this size; no vacuum in the middle of a measurement."""
    return {
        "shared_buffers": f"{machine.shared_buffers_mib()}MB",
        "maintenance_work_mem": "256MB",
        "min_wal_size": "1GB",
        "max_wal_size": "4GB",
        "checkpoint_timeout": "30min",
        "autovacuum": "off",
    }


class Databases:
    """A durable server's databases: the generated ones by kind and scale, and empty ones to restore into."""

    def __init__(self, cluster: ScratchCluster, say: Say) -> None:
        self.cluster = cluster
        self._say = say
        self._made: dict[str, DatabaseFigures] = {}
        self._numbers = itertools.count(1)

    def tool(self, name: str) -> Path:
        return self.cluster.installation.tool(name)

    def provide(self, kind: str, scale: float) -> DatabaseFigures:
        """The database of this kind at this scale, generated when first asked for. Raises ``ToolError``."""
        name = f"{kind}_{scale:g}"
        if name not in self._made:
            self._say(f"generating the database {name}")
            started = time.monotonic()
            self._generate(name, kind, scale)
            figures = self._made[name] = self._measure(name)
            took = f"{time.monotonic() - started:.0f} s"
            self._say(f"  {figures.text_bytes / 1e6:.0f} MB of COPY text, {figures.rows} rows, {took}")
        return self._made[name]

    def drop(self, name: str) -> None:
        del self._made[name]
        self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextlib.contextmanager
    def unused_name(self) -> Iterator[str]:
        """The name of a database that is not there; if it is at the end of the block, it is dropped."""
        name = f"restored_{next(self._numbers)}"
        try:
            yield name
        finally:
            self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def create(self, name: str) -> None:
        """Make an empty database, with the server's stock program."""
        programs.run([self.tool("createdb"), f"--maintenance-db={self.cluster.conninfo()}", "-T", "template0", name])

    def settle(self) -> None:
        """A checkpoint: nobody pays for the writes of who came before."""
        self._execute(sql.SQL("CHECKPOINT"))

    def _execute(self, statement: sql.SQL | sql.Composed) -> None:
        with psycopg.connect(self.cluster.conninfo(), autocommit=True) as connection:
            connection.execute(statement)

    def _generate(self, name: str, kind: str, scale: float) -> None:
        self.create(name)
        files = [f"--file={_SQL / each}.sql" for each in ("material", kind)]
        options = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", f"scale={scale}"]
        programs.run([self.tool("psql"), *options, "-d", self.cluster.conninfo(name), *files])
        with psycopg.connect(self.cluster.conninfo(name), autocommit=True) as connection:
            connection.execute("VACUUM (FREEZE, ANALYZE)")

    def _measure(self, name: str) -> DatabaseFigures:
        """Reads all of it once, which also brings it into the page cache before anything is timed."""
        text_bytes = 0
        with process.start([self.tool("pg_dump"), self.cluster.conninfo(name)]) as running:
            while block := os.read(running.stdout.fileno(), _BLOCK_BYTES):
                text_bytes += len(block)
        with psycopg.connect(self.cluster.conninfo(name)) as connection:
            row = connection.execute(
                "SELECT pg_database_size(current_database()), count(*), sum(greatest(reltuples, 0))::bigint"
                " FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
            ).fetchone()
        assert row is not None
        return DatabaseFigures(name, text_bytes, *row)
