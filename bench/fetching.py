"""One table out of a backup that lies in S3: how much is fetched for it, and how long it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bench import extracting, object_storage, programs
from bench.databases import Say
from bench.figures import PGKEEP, DatabaseFigures, Fetch, Race
from bench.race import Contender, race
from bench.restoring import SMALL_TABLE, Prepared, arena
from bench.workspace import Workspace
from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile
from tests.s3_proxy import Answer, Rule, proxy_to
from tests.s3_servers import SeaweedFS

DESTINATION = "s3"
WHOLE = "pgkeep: the whole database from S3"
LOCAL = "pgkeep: the same table from the vault"
LIMIT_BYTES = 1024 * 1024


def run(
    backups: Prepared, figures: DatabaseFigures, rounds: int, space: Workspace, say: Say
) -> tuple[Race, list[Fetch]]:
    """The backup goes to a server first. Bytes are counted on the way from there, in restores that nobody times."""
    with object_storage.server(space) as running:
        say(f"bringing the backup of {figures.name} to S3")
        variables = object_storage.variables(running.endpoint)
        extracting.extract(backups.pgkeep.environment | variables)
        fetches = []
        for table, size_bytes in _tables(backups.sealed):
            fetches.append(_counted(backups, running, figures.name, table, size_bytes))
            asked = f"{fetches[-1].received_bytes / 1e6:.2f} MB came for {size_bytes / 1e6:.2f} MB of it"
            say(f"one table of {figures.name} from S3, {table}: {asked}")
        return _race(backups, figures, rounds, variables, say), fetches


def _tables(sealed: Path) -> list[tuple[str, int]]:
    """The small table and the largest one, with their bytes in the backup."""
    with LocalFile.open(sealed) as file:
        lengths = {part.name: part.length for part in ArtifactReader(file).index.tables}
    return [(name, lengths[name]) for name in (SMALL_TABLE, max(lengths, key=lengths.__getitem__))]


def _counted(backups: Prepared, running: SeaweedFS, database: str, table: str, size_bytes: int) -> Fetch:
    received: list[int] = []

    def count(answer: Answer) -> Answer:
        received.append(len(answer.body))
        return answer

    with proxy_to(running.port, [Rule(times=-1, answer=count)]) as proxy, arena(backups.databases) as target:
        restored = _restore(backups, target, object_storage.variables(proxy.endpoint), table)
    return Fetch(database, table, size_bytes, restored["fetched_bytes"], sum(received), len(received))


def _race(backups: Prepared, figures: DatabaseFigures, rounds: int, variables: Mapping[str, str], say: Say) -> Race:
    def one(target: str) -> None:
        _restore(backups, target, variables, SMALL_TABLE)

    def whole(target: str) -> None:
        _restore(backups, target, variables)

    def local(target: str) -> None:
        backups.pgkeep.run(*backups.pgkeep_arguments(target, "--table", f"public.{SMALL_TABLE}"))

    title = f"restore of one small table of {figures.name} from S3"
    contenders = [Contender(PGKEEP, one), Contender(WHOLE, whole), Contender(LOCAL, local)]
    return Race(title, race(title, contenders, rounds, lambda: arena(backups.databases), say))


def _restore(backups: Prepared, target: str, variables: Mapping[str, str], table: str | None = None) -> dict[str, int]:
    """What it printed. Raises ``ToolError``."""
    # The largest one may refer to tables that are not restored.
    chosen = [] if table is None else ["--table", f"public.{table}", "--allow-missing-parents"]
    arguments = backups.pgkeep_arguments(target, "--from", DESTINATION, *chosen, "--json")
    answer: dict[str, int] = json.loads(
        programs.run(backups.pgkeep.command(*arguments), {**backups.pgkeep.environment, **variables})
    )
    return answer
