"""Restore: pgkeep's, counting every row afterwards, against psql and pg_restore; and one table out of many."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import programs, workspace
from bench.databases import Databases, Say
from bench.figures import PGKEEP, DatabaseFigures, Race, RatioTarget
from bench.programs import Pgkeep
from bench.race import Contender, race
from bench.workspace import Workspace
from pgkeep.restore.recover import Options

SMALL_TABLE = "country"
JOBS = Options().parallel_jobs
PLAIN = "gunzip -c | psql"
PARALLEL = f"pg_restore -j {JOBS}"
ONE_TABLE = "pg_restore --table"
TARGETS = (RatioTarget(PLAIN, 0.75), RatioTarget(PARALLEL, 1.1))


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """One database's backups: a vault with pgkeep's, its sealed file, and pg_dump's directory."""

    databases: Databases
    pgkeep: Pgkeep
    sealed: Path
    directory: Path

    def pgkeep_arguments(self, target: str, *more: str) -> list[str]:
        return ["restore", "latest", "--to", self.databases.cluster.conninfo(target), "--create", *more]


@contextlib.contextmanager
def prepared(databases: Databases, database: str, space: Workspace, say: Say) -> Iterator[Prepared]:
    """Both backups, until the end of the block."""
    with space.place("restore") as place:
        say(f"preparing the backups of {database} to restore from")
        pgkeep = Pgkeep(place, databases.cluster, database)
        sealed = pgkeep.run("backup", "daily")["path"]
        directory = place / "directory"
        pg_dump, conninfo = databases.tool("pg_dump"), databases.cluster.conninfo(database)
        programs.run([pg_dump, "-Fd", f"-j{JOBS}", "-f", directory, conninfo])
        yield Prepared(databases, pgkeep, Path(place, "active", sealed), directory)


def run(backups: Prepared, figures: DatabaseFigures, rounds: int, say: Say) -> Race:
    """All of the database, each time into a new one; making that one is part of everybody's time."""
    phases: list[dict[str, float]] = []

    def pgkeep(target: str) -> None:
        phases.append(backups.pgkeep.run(*backups.pgkeep_arguments(target))["seconds"])

    title = f"restore of {figures.name}"
    contenders = [Contender(PGKEEP, pgkeep), Contender(PLAIN, _plain(backups)), Contender(PARALLEL, _parallel(backups))]
    timings = race(title, contenders, rounds, lambda: arena(backups.databases), say)
    return Race(title, timings, figures.text_bytes, (of_which(phases),))


def run_one_table(backups: Prepared, figures: DatabaseFigures, rounds: int, say: Say) -> Race:
    """The smallest table of all, out of the whole backup."""

    def pgkeep(target: str) -> None:
        backups.pgkeep.run(*backups.pgkeep_arguments(target, "--table", f"public.{SMALL_TABLE}"))

    title = f"restore of one small table of {figures.name}"
    contenders = [Contender(PGKEEP, pgkeep), Contender(ONE_TABLE, _parallel(backups, f"--table={SMALL_TABLE}"))]
    timings = race(title, contenders, rounds, lambda: arena(backups.databases), say)
    return Race(title, timings)


def _plain(backups: Prepared) -> Any:
    """psql reads pgkeep's sealed file: it is an ordinary one."""

    def plain(target: str) -> None:
        backups.databases.create(target)
        conninfo = backups.databases.cluster.conninfo(target)
        psql: programs.Command = [backups.databases.tool("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", conninfo]
        programs.pipeline([["gunzip", "-c", backups.sealed], psql], None)

    return plain


def _parallel(backups: Prepared, *more: str) -> Any:
    def parallel(target: str) -> None:
        backups.databases.create(target)
        conninfo = backups.databases.cluster.conninfo(target)
        options = [f"-j{JOBS}", "--exit-on-error", *more]
        programs.run([backups.databases.tool("pg_restore"), *options, "-d", conninfo, backups.directory])

    return parallel


@contextlib.contextmanager
def arena(databases: Databases) -> Iterator[str]:
    """The name of a database to be made; what was done before is on the disk."""
    with databases.unused_name() as name:
        databases.settle()
        workspace.settle()
        yield name


def of_which(phases: list[dict[str, float]]) -> str:
    """E.g. ``Of pgkeep's time: rebuild 0.10 s, load 12.00 s, …``: medians of what it reports itself."""
    others = [{**each, "all else": 2 * each["total"] - sum(each.values())} for each in phases]
    names = [name for name in others[0] if name != "total"]
    medians = [f"{name} {statistics.median(each[name] for each in others):.2f} s" for name in names]
    return f"Of pgkeep's time, once it has started: {', '.join(medians)}."
