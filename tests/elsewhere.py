"""Backups at a destination, and a machine that has nothing of its own: for the tests of reading back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pgkeep.adapters.destinations import Content, Destination
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.progress import Silent
from tests import clusters
from tests.clusters import Database
from tests.integration.keeper import Keeper, keeping

SUFFIXES = ("", names.CHECKSUM_SUFFIX, names.MANIFEST_SUFFIX)
# One table that hardly compresses and makes many members, one of a megabyte, small ones with all that hangs on them.
FILL = """
    CREATE SCHEMA shop;
    CREATE TABLE shop.large AS
        SELECT n, (SELECT string_agg(md5(n::text || k), '') FROM generate_series(1, 60) AS k) AS t
        FROM generate_series(1, 20000) AS n;
    CREATE TABLE shop.orders (id int PRIMARY KEY, t text);
    INSERT INTO shop.orders SELECT n, (SELECT string_agg(md5(n::text || k), '') FROM generate_series(1, 20) AS k)
        FROM generate_series(1, 3000) AS n;
    CREATE TABLE small (a int UNIQUE); INSERT INTO small VALUES (1), (2);
    SELECT lo_from_bytea(0, 'x');
"""
CHANGE = "INSERT INTO small VALUES (3)"


@dataclasses.dataclass(frozen=True)
class Source:
    """Two backups of a database in a vault: the ``first`` without, the ``second`` with the row 3 in ``small``."""

    keeper: Keeper
    database: Database
    first: dict[str, Any]
    second: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """Every dump in the vault, roles included; the oldest first."""
        return sorted((self.keeper.root / "active").glob("*/*.sql.gz"))

    def table_bytes(self, name: str) -> int:
        """How long a table's members are in the second backup."""
        manifest = json.loads(Path(self.second["path"] + names.MANIFEST_SUFFIX).read_text())
        return next(int(table["compressed_bytes"]) for table in manifest["tables"] if table["name"] == name)


@contextlib.contextmanager
def source(cluster: ScratchCluster) -> Iterator[Source]:
    """A daily backup, and a manual one after a change; roles beside each."""
    with clusters.temporary_database(cluster) as database, keeping(cluster, database.name) as keeper:
        database.execute(FILL)
        first = keeper.of(BACKUP_GLOBALS="auto").json("backup", "daily")
        database.execute(CHANGE)
        yield Source(keeper, database, first, keeper.json("backup", "manual"))


def copy_out(source: Source, destination: Destination) -> None:
    """Every backup, as the extractor does it."""
    with destination.opened() as place:
        for dump in source.files:
            manifest = manifests.decode(Path(f"{dump}{names.MANIFEST_SUFFIX}").read_bytes())
            for suffix in SUFFIXES:
                data = Path(f"{dump}{suffix}").read_bytes()
                with open(f"{dump}{suffix}", "rb") as file:
                    place.store(
                        f"{dump.parent.name}/{dump.name[:10]}/{dump.name}{suffix}",
                        file.fileno(),
                        Content(len(data), hashlib.sha256(data).hexdigest()),
                        Silent(),
                        retain_until=manifest.retain_until,
                    )


def path_of(backup: Mapping[str, Any]) -> str:
    """Where a backup's dump lies at a destination."""
    name = Path(str(backup["path"])).name
    return f"{backup['tier']}/{name[:10]}/{name}"


def bare_machine(source: Source, directory: Path, **variables: str) -> Keeper:
    """Somebody else's, after the disaster: no vault, no configuration."""
    environment = {"EXTERNAL_DIRECTORY": "off", "TMPDIR": os.fspath(directory), **variables}
    return Keeper(directory / "nothing-here", environment)


class Wire:
    """A port before a server's, which counts what comes back; ``limit_bytes``: after so many it is cut for good."""

    def __init__(self, port: int, limit_bytes: int | None = None) -> None:
        self._target = port
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.received_bytes = 0
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def is_cut(self) -> bool:
        return self._limit_bytes is not None and self.received_bytes >= self._limit_bytes

    def close(self) -> None:
        """As a cable that is pulled."""
        with self._lock:
            ends = [self._listener, *self._open]
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._open |= {client, server}
                for way in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=way, daemon=True).start()

    def _pump(self, giver: socket.socket, taker: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := giver.recv(65536):
                if counted:
                    with self._lock:
                        self.received_bytes += len(data)
                    if self.is_cut:
                        self.close()
                        return
                taker.sendall(data)
        for end in (giver, taker):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def wire(port: int, limit_bytes: int | None = None) -> Iterator[Wire]:
    """Counting until the end of the block."""
    opened = Wire(port, limit_bytes)
    try:
        yield opened
    finally:
        opened.close()
