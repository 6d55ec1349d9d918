"""Backup: pgkeep's, sealing included, against what people use."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from bench import programs, workspace
from bench.databases import Databases, Say
from bench.figures import PGKEEP, DatabaseFigures, Race, RatioTarget
from bench.race import Contender, race
from bench.workspace import Workspace

DISCARDED = "pg_dump > /dev/null"
PIPED = "pg_dump | gzip -6 > file"
GUIDE = "pg_dump > file; gzip -9; sha256 by 8 KiB"
TARGETS = (RatioTarget(DISCARDED, 1.25), RatioTarget(PIPED, 0.5))
GUIDE_BLOCK_BYTES = 8192


def run(
    databases: Databases, figures: DatabaseFigures, rounds: int, space: Workspace, say: Say, *, everybody: bool
) -> Race:
    """Each backs the same database up, into a directory of its own that goes afterwards.

    ``everybody``: those too whose minutes of zlib say the same for one database as for another.
    """

    @contextlib.contextmanager
    def arena() -> Iterator[Path]:
        with space.place("backup") as place:
            workspace.settle()
            yield place
        workspace.settle()

    title = f"backup of {figures.name}"
    protections: set[str] = set()
    racing = contenders(databases, figures.name, protections)
    if not everybody:
        racing = [each for each in racing if each.name == PIPED or not each.once]
    timings = race(title, racing, rounds, arena, say)
    return Race(title, timings, figures.text_bytes, (f"Protection that pgkeep sealed with: {', '.join(protections)}.",))


def contenders(databases: Databases, database: str, protections: set[str]) -> list[Contender[Path]]:
    """pgkeep first; the protection that it got is added to ``protections``."""
    conninfo = databases.cluster.conninfo(database)
    pg_dump = databases.tool("pg_dump")

    def pgkeep(place: Path) -> int:
        sealed = programs.Pgkeep(place, databases.cluster, database).run("backup", "daily")
        protections.add(sealed["protection"])
        return int(sealed["size_bytes"])

    def discarded(_: Path) -> None:
        programs.pipeline([[pg_dump, conninfo]], None)

    def piped(place: Path) -> int:
        programs.pipeline([[pg_dump, conninfo], ["gzip", "-6"]], place / "dump.sql.gz")
        return (place / "dump.sql.gz").stat().st_size

    def custom(place: Path) -> int:
        programs.run([pg_dump, "-Fc", "-f", place / "dump", conninfo])
        return (place / "dump").stat().st_size

    def directory(place: Path) -> int:
        programs.run([pg_dump, "-Fd", "-j2", "-f", place / "dump", conninfo])
        return sum(path.stat().st_size for path in (place / "dump").iterdir())

    def guide(place: Path) -> int:
        programs.pipeline([[pg_dump, conninfo]], place / "dump.sql")
        programs.run(["gzip", "-9", place / "dump.sql"])
        digest_in_small_blocks(place / "dump.sql.gz")
        return (place / "dump.sql.gz").stat().st_size

    return [
        Contender(PGKEEP, pgkeep),
        Contender(DISCARDED, discarded),
        Contender(PIPED, piped, once=True),
        Contender("pg_dump -Fc -f file", custom, once=True),
        Contender("pg_dump -Fd -j2 -f directory", directory, once=True),
        Contender(GUIDE, guide, once=True),
    ]


def digest_in_small_blocks(path: Path) -> str:
    """sha256 as the deployment guide's script takes it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(GUIDE_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()
