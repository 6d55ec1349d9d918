"""The real command line, as a person or a script runs it; and the stock tools that stand beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pgkeep
from pgkeep.adapters import process
from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile
from pgkeep.adapters.pgbinaries import Installation
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.restore.rebuild import rebuild
from tests import clusters
from tests.clusters import Database

_SOURCE = Path(pgkeep.__file__).parents[1]
# All that a run gets of our environment: what else a developer's shell holds would steer it.
_INHERITED = ("PATH", "HOME", "TZ", "COVERAGE_PROCESS_START")
_RUN_SECONDS = 280.0


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """How a run ended: exit code, stdout, stderr."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.stdout)


class Keeper:
    """``pgkeep`` with a root and an environment of its own; every method runs it anew."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        self.root = root
        self.environment = {
            **{name: os.environ[name] for name in _INHERITED if name in os.environ},
            "PYTHONPATH": os.fspath(_SOURCE),
            "PGKEEP_ROOT": os.fspath(root),
            **environment,
        }

    def of(self, **variables: str) -> Keeper:
        """The same vault with further (or other) variables."""
        return Keeper(self.root, {**self.environment, **variables})

    def run(self, *arguments: str | Path) -> Answer:
        """Run to the end, whatever comes of it."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        program = ["env", "-i", *settings, sys.executable, "-W", "error", "-m", "pgkeep"]
        done = process.run([*program, *arguments], timeout_seconds=_RUN_SECONDS)
        return Answer(done.return_code, done.stdout.decode(), done.stderr)

    def json(self, *arguments: str | Path) -> Any:
        """Run with ``--json``; it must succeed."""
        answer = self.run(*arguments, "--json")
        assert answer.code == 0, f"pgkeep {arguments} exits with {answer.code}: {answer.stderr}"
        return answer.json()

    def fails(self, code: int, *arguments: str | Path) -> str:
        """Run; it must exit with ``code``, without a traceback. What it said on stderr."""
        answer = self.run(*arguments)
        assert answer.code == code, f"pgkeep {arguments} exits with {answer.code}, not {code}: {answer.stderr}"
        assert "Traceback" not in answer.stderr, answer.stderr
        return answer.stderr

    def backup(self, *arguments: str, **variables: str) -> Path:
        """The sealed file of the one database."""
        return self.file(self.of(**variables).json("backup", *arguments))

    def file(self, backup: Mapping[str, Any]) -> Path:
        """Where a backup lies that ``backup --json`` or ``list --json`` shows."""
        return self.root / "active" / str(backup["path"])

    def restore(self, reference: str | Path, target: str, *arguments: str) -> Any:
        """Restore; the JSON document."""
        document = self.json("restore", reference, "--to", target, *arguments)
        assert document["ok"] is True
        return document


def reach(cluster: ScratchCluster, database: str | None = None) -> dict[str, str]:
    """The guide's variables for a server, and for a database of it."""
    variables = {"DB_HOST": os.fspath(cluster.socket_directory), "DB_PORT": "5432", "DB_USER": "postgres"}
    return variables if database is None else {**variables, "DB_NAME": database}


@contextlib.contextmanager
def keeping(cluster: ScratchCluster, database: str | None = None, **variables: str) -> Iterator[Keeper]:
    """A vault of one's own that backs up ``database``, without globals unless asked (``BACKUP_GLOBALS=auto``)."""
    with clusters.scratch_directory() as directory:
        yield Keeper(directory / "backups", {"BACKUP_GLOBALS": "off", **reach(cluster, database), **variables})


@contextlib.contextmanager
def fresh_name(cluster: ScratchCluster) -> Iterator[Database]:
    """A database that does not exist yet; whatever was made of it is dropped."""
    with clusters.temporary_database(cluster) as database:
        Database(cluster, "postgres").execute(f'DROP DATABASE "{database.name}"')
        yield database


def shell(script: str, **variables: str | Path) -> process.Completed:
    """A pipeline in bash; it must succeed as a whole. ``variables`` are set (and quoted) before it."""
    settings = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in variables.items())
    done = process.run(["bash", "-c", f"set -euo pipefail\n{settings}{script}"], timeout_seconds=_RUN_SECONDS)
    assert done.return_code == 0, f"{script}: {done.stderr}"
    return done


def stock_copy(source: Database, target: Database) -> None:
    """What all else is measured by: the server's own pg_dump, piped into its own psql."""
    tools = source.cluster.installation
    shell(
        '"$dump" -d "$source" | "$psql" -X -q -v ON_ERROR_STOP=1 -d "$target" >/dev/null',
        dump=tools.tool("pg_dump"),
        psql=tools.tool("psql"),
        source=source.conninfo,
        target=target.conninfo,
    )


def stock_restore(file: Path, target: Database, tools: Installation | None = None) -> process.Completed:
    """The face that needs no pgkeep: ``gunzip -c FILE | psql``."""
    return shell(
        'gunzip -c "$file" | "$psql" -X -q -v ON_ERROR_STOP=1 -d "$target" >/dev/null',
        file=file,
        psql=(tools or target.cluster.installation).tool("psql"),
        target=target.conninfo,
    )


def rebuilt(file: Path, directory: Path) -> Path:
    """pg_restore's directory, made out of an artifact, with everything in it."""
    directory.mkdir()
    with LocalFile.open(file) as opened:
        rebuild(ArtifactReader(opened), opened, directory, lambda _: True)
    return directory


def text_digest(file: Path) -> str:
    """Of all the text that gunzip makes of a file."""
    done = shell('gunzip -c "$file" | sha256sum', file=file)
    return done.stdout.decode().split()[0]


def bytes_digest(file: Path) -> str:
    """Of the file as it is."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
