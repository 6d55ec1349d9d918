"""The vault's service over a root of its own, as a process; and the part of an agent that it sees: staging."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pgkeep.domain import mailbox, names
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.health import Health
from pgkeep.domain.mailbox import Outcome
from pgkeep.domain.names import Tier
from pgkeep.domain.request import DUMP_NAME, FILE_NAME, Request, encode
from pgkeep.vault import store, verify
from pgkeep.vault.layout import Layout
from tests import clusters
from tests.attacks import forge

PROJECT = Path(__file__).parents[1]
DRIVER = PROJECT / "tests" / "faults" / "driver.py"
# An ordinary user of every Debian, to become.
USER = "backup"
# One that every user may run, if the tests' own lies in somebody's home; it must be of the same version.
SYSTEM_PYTHON = Path("/usr/bin/python3")
WAIT_SECONDS = 20.0


@functools.cache
def artifact() -> bytes:
    """A whole dump, made by the product's writer."""
    return forge.build()


def system_python() -> str:
    """An interpreter like ours that any user may run; skips where there is none."""
    wanted = f"{sys.version_info.major}.{sys.version_info.minor}"
    if SYSTEM_PYTHON.resolve().name != f"python{wanted}":
        clusters.skip(f"needs Python {wanted} as {SYSTEM_PYTHON}", could_run_here=False)
    return str(SYSTEM_PYTHON)


class Daemon:
    """A root whose directories have the owners that the images give them, and ``pgkeep vault`` over it."""

    def __init__(
        self,
        root: Path,
        *,
        user: str | None = USER,
        owner: str | None = None,
        program: Sequence[str] = (sys.executable,),
        **environment: str,
    ) -> None:
        self.root = root
        self._owner = owner or user
        self._program = program
        self.layout = Layout(root)
        self.user = user
        self.log = root.parent / f"{root.name}.log"
        self.environment = {
            "PGKEEP_ROOT": str(root),
            "PGKEEP_RESERVE": "0",
            **({"PGKEEP_VAULT_USER": user} if user else {}),
            **environment,
        }
        self._running: subprocess.Popen[bytes] | None = None
        self._prepare()

    def _prepare(self) -> None:
        self.root.mkdir(exist_ok=True)
        self.layout.staging.mkdir(exist_ok=True)
        for path, mode in ((self.layout.active, 0o755), (self.layout.logs, 0o755), (self.layout.state, 0o700)):
            path.mkdir(mode=mode, exist_ok=True)
            if self._owner:
                owner = pwd.getpwnam(self._owner)
                os.chown(path, owner.pw_uid, owner.pw_gid)

    # ------------------------------------------------------------ the process

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid

    def start(self, *, environment: Mapping[str, str] | None = None, **fault: Any) -> None:
        """``fault`` are the fields of the fault driver's plan."""
        module = [str(DRIVER)] if fault else ["-m", "pgkeep"]
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(
                [*self._program, "-W", "error", *module, "vault"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment(environment), **({"FAULT": json.dumps(fault)} if fault else {})},
            )

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Another command over the same root, to its end."""
        return subprocess.run(
            [*self._program, "-W", "error", "-m", "pgkeep", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=self._environment(environment),
        )

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        foreign = ("PG", "DB_", "BACKUP")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = f"{PROJECT}/src:{sysconfig.get_path('purelib')}"
        return {**inherited, "PYTHONPATH": path, **self.environment, **(more or {})}

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Its exit code, once it ends by itself."""
        assert self._running is not None
        try:
            return self._running.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end: {self.said()}") from None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Its exit code and how long it took, in seconds."""
        assert self._running is not None
        started = time.monotonic()
        self._running.send_signal(number)
        return self.wait(), time.monotonic() - started

    def close(self) -> None:
        if self._running is not None and self._running.poll() is None:
            self._running.kill()
            self._running.wait()

    def is_alive(self) -> bool:
        return self._running is not None and self._running.poll() is None

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
        """Wait for it, as long as the service lives."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.is_alive(), f"the service ended: {self.said()}"
            assert time.monotonic() < deadline, f"it did not happen in time: {self.said()}"
            time.sleep(0.01)
        return found

    # ------------------------------------------------------------ the agent's part

    def stage(self, *tiers: Tier, data: bytes | None = None, **more: Any) -> str:
        """A dump that waits for the vault; ``more`` are fields of its request. Its identifier."""
        identifier = str(more.get("id", names.new_identifier(dt.datetime.now(dt.UTC))))
        partial = self.layout.staging / f"{identifier}{mailbox.PARTIAL_SUFFIX}"
        partial.mkdir()
        (partial / DUMP_NAME).write_bytes(artifact() if data is None else data)
        (partial / FILE_NAME).write_bytes(encode(request(identifier, *(tiers or (Tier.HOURLY,)), **more)))
        partial.rename(self.entry(identifier))
        return identifier

    def report(self, reason: str = "pg_dump: error", **more: Any) -> str:
        """A failure that the agent tells of."""
        identifier = names.new_identifier(dt.datetime.now(dt.UTC))
        failure = mailbox.Failure(
            id=identifier, tiers=(Tier.DAILY,), subject="app", reason=reason, failed_at=dt.datetime.now(dt.UTC), **more
        )
        self._leave(identifier, mailbox.FAILED_SUFFIX, mailbox.FAILURE_NAME, mailbox.encode(failure))
        return identifier

    def ask(self) -> str:
        """A wish for a clean-up."""
        identifier = names.new_identifier(dt.datetime.now(dt.UTC))
        wish = mailbox.Ask(id=identifier, command="cleanup", asked_at=dt.datetime.now(dt.UTC))
        self._leave(identifier, mailbox.ASKED_SUFFIX, mailbox.ASK_NAME, mailbox.encode(wish))
        return identifier

    def _leave(self, identifier: str, suffix: str, name: str, data: bytes) -> None:
        partial = self.layout.staging / f"{identifier}{mailbox.PARTIAL_SUFFIX}"
        partial.mkdir()
        (partial / name).write_bytes(data)
        partial.rename(self.entry(identifier, suffix))

    def entry(self, identifier: str, suffix: str = mailbox.READY_SUFFIX) -> Path:
        return self.layout.staging / f"{identifier}{suffix}"

    def take_away(self, identifier: str, suffix: str = mailbox.READY_SUFFIX) -> None:
        shutil.rmtree(self.entry(identifier, suffix))

    def outcome(self, identifier: str, seconds: float = WAIT_SECONDS) -> Outcome:
        """The vault's answer, waited for."""
        path = self.layout.outcomes / mailbox.outcome_name(identifier)
        self.until(path.exists, seconds)
        return mailbox.decode_outcome(path.read_bytes())

    # ------------------------------------------------------------ what is there

    def outcomes(self) -> list[str]:
        """The identifiers that are answered; none before the service has begun."""
        if not self.layout.outcomes.is_dir():
            return []
        return sorted(path.stem for path in self.layout.outcomes.iterdir())

    def health(self) -> Health:
        return msgspec.json.decode(self.layout.health.read_bytes(), type=Health)

    def problems(self) -> str:
        return "\n".join(self.health().problems)

    def backups(self) -> list[SealedBackup]:
        catalog = store.read_catalog(self.layout)
        assert not catalog.defects, catalog.defects
        return sorted(catalog.backups, key=lambda backup: backup.path_in_vault)

    def names_of(self, identifier: str) -> list[Tier]:
        """The tiers under which the dump of that identifier is sealed."""
        return [backup.manifest.type for backup in self.backups() if backup.manifest.staged_id == identifier]

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.layout.audit.read_text().splitlines()]

    def assert_whole(self) -> None:
        """Every backup is sealed, and verifies."""
        for backup in self.backups():
            assert backup.state == "sealed", backup.problems
            report = verify.verify_path(self.layout.active / backup.path_in_vault, "content")
            assert report.ok, report.findings


def request(identifier: str, *tiers: Tier, **more: Any) -> Request:
    """What an agent says of a dump of :func:`artifact`."""
    given: dict[str, Any] = {
        "id": identifier,
        "kind": "database",
        "tiers": tiers,
        "database": "app",
        "created_at": dt.datetime.now(dt.UTC),
        "system_identifier": "7000000000000000001",
        "server_version": "15.8",
        "dump_version": "15.8",
        "dump_seconds": 1.0,
        **more,
    }
    return Request(**given)


@contextlib.contextmanager
def daemon(root: Path | None = None, **options: Any) -> Iterator[Daemon]:
    """In a scratch directory of its own unless ``root`` is given; not started yet. Ended and cleared afterwards."""
    with contextlib.ExitStack() as stack:
        place = root or stack.enter_context(clusters.scratch_directory()) / "root"
        own = Daemon(place, **options)
        stack.callback(own.close)
        yield own
