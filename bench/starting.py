"""How long it takes until the command says something."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from bench import programs
from bench.databases import Databases, Say
from bench.figures import Race
from bench.programs import Pgkeep
from bench.race import Contender, race
from bench.workspace import Workspace

VERSION = "pgkeep --version"
LIST = "pgkeep list"
VERSION_LIMIT_SECONDS = 0.1
REPETITIONS = 20
WARM_UPS = 3
LISTED_BACKUPS = 3


def run(databases: Databases, space: Workspace, say: Say) -> Race:
    """Medians of many starts, in turns; an empty Python program is the floor."""
    with space.place("starting") as root:
        pgkeep = Pgkeep(root, databases.cluster, "postgres")
        say(f"start-up times: sealing {LISTED_BACKUPS} small backups to list")
        for _ in range(LISTED_BACKUPS):
            pgkeep.run("backup", "manual")
        contenders = [
            _starts("python -c pass", pgkeep, [sys.executable, "-c", "pass"]),
            _starts(VERSION, pgkeep, pgkeep.command("--version")),
            _starts(LIST, pgkeep, pgkeep.command("list")),
        ]
        race("start-up", contenders, WARM_UPS, _nothing, _silent)
        timings = race("start-up", contenders, REPETITIONS, _nothing, _silent)
    say(", ".join(f"{each.contender}: {each.median_seconds * 1000:.0f} ms" for each in timings))
    return Race("start-up", timings)


def _starts(name: str, pgkeep: Pgkeep, command: list[str]) -> Contender[None]:
    def start(_: None) -> None:
        programs.run(command, pgkeep.environment)

    return Contender(name, start)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def _silent(_: str) -> None:
    """Dozens of lines of a tenth of a second each would tell nobody anything."""
