"""A vault, a database and the command line over both; and what must hold whenever nothing is under way."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgkeep.domain.catalog import SealedBackup
from pgkeep.vault import store, verify
from pgkeep.vault.layout import SEALED_DIRECTORIES, Layout
from tests import clusters

PROJECT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.py")
RUN_SECONDS = 60.0
WITHOUT_CAPABILITY = ("setpriv", "--bounding-set=-linux_immutable", "--inh-caps=-linux_immutable")
# What lies in active/.incoming/ when nothing is under way.
RESERVE = [".pgkeep-reserve"]

TABLES = """
    CREATE SCHEMA shop;
    CREATE TABLE shop.customers (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, note text);
    CREATE TABLE shop.orders (id serial PRIMARY KEY, customer int REFERENCES shop.customers, total numeric(9, 2));
    CREATE TABLE shop.empty (id int);
    INSERT INTO shop.customers (name, note)
        SELECT 'Zoë ' || n, E'tab\\t and \\\\. ' || repeat('x', n % 50) FROM generate_series(1, 300) AS n;
    INSERT INTO shop.orders (customer, total) SELECT 1 + n % 300, n / 7.0 FROM generate_series(1, 2000) AS n;
    SELECT lo_from_bytea(0, 'a large object');
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """How a run of the command line ended. A negative ``code`` is the signal that ended it."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    def must(self, code: int = 0) -> Result:
        """Itself, if it ended like that and without a traceback."""
        assert self.code == code, f"exit {self.code} instead of {code}: {self.stderr}\n{self.stdout}"
        assert "Traceback" not in self.stderr, self.stderr
        assert "internal error" not in self.stderr, self.stderr
        return self


class Machine:
    """One vault under ``root`` and the database that is backed up into it."""

    def __init__(self, root: Path, database: clusters.Database, **environment: str) -> None:
        self.root = root
        self.layout = Layout(root)
        self.database = database
        self._verified: set[str] = set()
        self.environment = {
            "PGKEEP_ROOT": str(root),
            "PGKEEP_RESERVE": "0",
            "DB_HOST": str(database.cluster.socket_directory),
            "DB_USER": "postgres",
            "DB_NAME": database.name,
            "BACKUP_GLOBALS": "off",
            **environment,
        }

    def start(
        self, *arguments: str, under: Sequence[str] = (), environment: Mapping[str, str] | None = None, **fault: Any
    ) -> subprocess.Popen[str]:
        """The command line under way; ``fault`` are the fields of the driver's plan."""
        program = [str(DRIVER)] if fault else ["-m", "pgkeep"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "DB_", "BACKUP"))}
        return subprocess.Popen(
            [*under, sys.executable, "-W", "error", *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **inherited,
                "PYTHONPATH": str(PROJECT / "src"),
                **self.environment,
                **(environment or {}),
                **({"FAULT": json.dumps(fault)} if fault else {}),
            },
        )

    def run(
        self, *arguments: str, under: Sequence[str] = (), environment: Mapping[str, str] | None = None, **fault: Any
    ) -> Result:
        """The command line to its end."""
        started = time.monotonic()
        return finish(self.start(*arguments, under=under, environment=environment, **fault), started)

    def backup(self, tier: str = "manual", **fault: Any) -> dict[str, Any]:
        """A backup that must succeed, as ``--json`` shows it."""
        shown: dict[str, Any] = self.run("backup", tier, "--json", **fault).must().json
        return shown

    def steps(self, *arguments: str, record: Path) -> list[str]:
        """The named steps of a run that succeeds, with their number of occurrence: ``seal.copied#2``."""
        self.run(*arguments, record=str(record)).must()
        names = record.read_text().splitlines()
        return [f"{name}#{names[: place + 1].count(name)}" for place, name in enumerate(names)]

    def backups(self) -> list[SealedBackup]:
        """What a reader sees now: every one of them whole, nothing unreadable beside them."""
        catalog = store.read_catalog(self.layout)
        assert not catalog.defects, catalog.defects
        return sorted(catalog.backups, key=lambda backup: backup.path_in_vault)

    def identifiers(self) -> list[str]:
        return sorted(backup.manifest.id for backup in self.backups())

    def assert_whole(self, *, protected: bool = True) -> None:
        """Every listed backup passes verification in full; its protection too unless a crash may have left it open."""
        for backup in self.backups():
            assert backup.state in ({"sealed"} if protected else {"sealed", "unprotected"}), backup.problems
            path = self.layout.active / backup.path_in_vault
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert digest == backup.manifest.sha256
            if digest not in self._verified:
                report = verify.verify_path(path, "content")
                assert report.ok, report.findings
                self._verified.add(digest)

    def audit(self) -> list[dict[str, Any]]:
        """Every record of the audit log; fails on a torn line."""
        return [json.loads(line) for line in self.layout.audit.read_text().splitlines()]

    def events(self, identifier: str) -> list[str]:
        return [record["event"] for record in self.audit() if record.get("id") == identifier]

    def assert_at_rest(self, *, chattr: bool = True) -> None:
        """Nothing half, nothing left: staging, incoming and journal are empty, and every directory is closed."""
        active = self.layout.active
        assert names_in(self.layout.staging) == []
        assert names_in(self.layout.incoming) == RESERVE
        assert names_in(self.layout.journal) == []
        assert names_in(self.layout.quarantine) == []
        assert names_in(active) == sorted((".incoming", ".outcomes", ".quarantine", "vault.json", *SEALED_DIRECTORIES))
        expected = {
            f"{backup.path_in_vault}{suffix}"
            for backup in self.backups()
            for suffix in ("", ".sha256", ".manifest.json")
        }
        found = {f"{name}/{entry}" for name in SEALED_DIRECTORIES for entry in names_in(active / name)}
        assert found == expected
        closed = [active, *(active / name for name in SEALED_DIRECTORIES)]
        sealed = [active / "vault.json", *(active / path for path in sorted(found))]
        if chattr:
            flags = all_flags(active)
            assert [path for path in (*closed, *sealed) if "i" not in flags[path]] == []
            assert not self.layout.audit.exists() or "a" in flags_of(self.layout.audit)
        for path in sealed:
            assert not stat.S_IMODE(path.stat().st_mode) & 0o222, path


def finish(running: subprocess.Popen[str], started: float | None = None) -> Result:
    with running:
        try:
            stdout, stderr = running.communicate(timeout=RUN_SECONDS)
        except BaseException:
            running.kill()
            raise
    return Result(running.returncode, stdout, stderr, time.monotonic() - (started or time.monotonic()))


@contextlib.contextmanager
def paused(machine: Machine, gate: Path, *arguments: str, at: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """The command line, held at a step for the body and let go afterwards; call :func:`finish` on it then."""
    running = machine.start(*arguments, action="pause", at=at, gate=str(gate), **more)
    try:
        wait_for(lambda: gate.exists() or running.poll() is not None)
        assert running.poll() is None, running.communicate()
        yield running
    except BaseException:
        running.kill()
        running.communicate()
        raise
    finally:
        gate.unlink(missing_ok=True)


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flags_of(path: Path) -> str:
    """As stock lsattr shows them: ``----i---------e-------``."""
    return subprocess.run(["lsattr", "-d", path], check=True, capture_output=True, text=True).stdout.split()[0]


def all_flags(directory: Path) -> dict[Path, str]:
    """The flags of a directory and of everything beneath it."""
    shown = subprocess.run(["lsattr", "-R", "-a", directory], check=True, capture_output=True, text=True).stdout
    lines = [line.split(" ", 1) for line in shown.splitlines() if line[:1] in ("-", "s", "u", "S", "i", "a")]
    return {Path(os.path.normpath(path.strip())): flags for flags, path in lines} | {directory: flags_of(directory)}


def is_flagged(path: Path) -> bool:
    return "i" in flags_of(path)


def processes_of(text: str) -> list[str]:
    """Command lines of every process that mentions ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line and int(path.parent.name) != os.getpid():
                found.append(f"{path.parent.name}: {line}")
    return found
