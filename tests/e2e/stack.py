"""A project directory as the deployment guide has it, with a database and pgkeep's services, on a real engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from pgkeep.adapters import process
from pgkeep.errors import ToolError
from tests.e2e import images
from tests.e2e.engine import ComposeVersion, Engine

SERVICES = ("backup-agent", "backup-vault", "backup-extractor")
VOLUMES = ("backup-staging", "backup-active", "backup-extracted", "backup-logs", "backup-state")
AGENT_UID, VAULT_UID, EXTRACTOR_UID = 10001, 10002, 10003
USERS = 2000
WAIT_SECONDS = 90.0
# An application with data in it before backups come, as the guide expects: it counts the users after a restore.
APPLICATION = f"""
CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL, joined timestamptz NOT NULL DEFAULT now());
INSERT INTO users SELECT n, 'user ' || n FROM generate_series(1, {USERS}) AS n;
CREATE TABLE orders (id bigint PRIMARY KEY, buyer bigint NOT NULL REFERENCES users, text text);
INSERT INTO orders SELECT n, 1 + n % {USERS}, md5(n::text) FROM generate_series(1, 20000) AS n;
"""
# What tests change of the defaults: looks at the destination and health checks that they need not wait for.
QUICK = {"CHECK_INTERVAL": "2", "PGKEEP_HEALTH_INTERVAL": "2s"}
# What may lie below active/, seen from there.
SEALED_NAME = re.compile(
    r"\./(vault\.json|(hourly|daily|weekly|monthly|yearly|manual|globals)/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"
    r"\.sql\.gz(\.sha256|\.manifest\.json)?)"
)
_Found = TypeVar("_Found")


def wait_until(
    condition: Callable[[], _Found],
    what: str,
    timeout_seconds: float = WAIT_SECONDS,
    *,
    say: Callable[[], str] = str,
) -> _Found:
    """The first true answer. Fails the test when there is none in time, with what was waited for and ``say()``."""
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_seconds:.0f} s in vain for: {what}\n{say()}")
        time.sleep(0.25)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """``directory`` is the project directory; ``name`` begins the names of containers and volumes."""

    engine: Engine
    directory: Path
    name: str
    password: str
    compose_version: ComposeVersion = "1.29"

    @property
    def external(self) -> Path:
        return self.directory / "external_storage"

    def container(self, service: str) -> str:
        """``backup-agent``, ``backup-vault``, ``backup-extractor`` or ``db``."""
        return f"{self.name}-{service}-1"

    def volume(self, volume: str) -> Path:
        """Where the engine keeps a volume on this machine, e.g. ``backup-active``. Raises ``ToolError``."""
        return Path(self.engine.output("volume", "inspect", "--format", "{{.Mountpoint}}", f"{self.name}-{volume}"))

    def shell(self, command: str, *, timeout_seconds: float = 120.0) -> process.Completed:
        """A command of the guide, word for word, in the project directory. Whatever its code, it is returned."""
        return self.engine.run(
            ["bash", "-c", command], check=False, directory=self.directory, timeout_seconds=timeout_seconds
        )

    def said(self, command: str, *, timeout_seconds: float = 120.0) -> str:
        """What that command printed. Fails the test where its code is not 0."""
        done = self.shell(command, timeout_seconds=timeout_seconds)
        assert done.return_code == 0, f"{command}: code {done.return_code}: {done.stdout.decode()} {done.stderr}"
        return done.stdout.decode()

    def compose(self, *arguments: str, check: bool = True) -> process.Completed:
        """This stack's Compose, in the project directory. Raises ``ToolError``."""
        return self.engine.compose(self.compose_version, *arguments, check=check, directory=self.directory)

    def execute(self, service: str, *command: str, user: int | None = None, check: bool = True) -> process.Completed:
        """``docker exec``, as the container's own user or as ``user``. Raises ``ToolError``."""
        whom = () if user is None else ("--user", str(user))
        return self.engine.docker("exec", *whom, self.container(service), *command, check=check)

    def psql(self, statement: str, database: str = "app_db") -> str:
        """Run SQL in the stack's server as its owner; rows without decoration. Raises ``ToolError``."""
        options = ("-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-U", "app", "-d", database)
        return self.execute("db", "psql", *options, "-c", statement).stdout.decode().strip()

    def inspect(self, service: str, form: str) -> str:
        """``docker inspect --format FORM`` of the service's container. Raises ``ToolError``."""
        return self.engine.output("inspect", "--format", form, self.container(service))

    def health(self, service: str) -> str:
        """``starting``, ``healthy`` or ``unhealthy``."""
        return self.inspect(service, "{{.State.Health.Status}}")

    def logs(self, service: str) -> str:
        done = self.engine.docker("logs", self.container(service))
        return done.stdout.decode() + done.stderr

    def sealed(self, tier: str) -> list[str]:
        """The dumps of the tier that have a manifest, oldest first: ``2026-01-31_00-00-00.sql.gz``."""
        listed = self.execute("backup-vault", "ls", f"/backups/active/{tier}", check=False).stdout.decode().split()
        suffix = ".manifest.json"
        return sorted(name.removesuffix(suffix) for name in listed if name.endswith(suffix))

    def extracted(self, tier: str) -> list[Path]:
        """The dumps of the tier that are whole at the destination, oldest first."""
        found = self.external.glob(f"{tier}/*/*.sql.gz")
        return sorted(path for path in found if path.with_name(f"{path.name}.manifest.json").exists())

    def digests(self) -> dict[str, str]:
        """Path below ``active/`` to SHA-256, of everything that is sealed. Raises ``ToolError``."""
        script = "cd /backups/active && find . -path './.*' -prune -o -type f -exec sha256sum {} +"
        lines = self.execute("backup-vault", "sh", "-c", script, user=VAULT_UID).stdout.decode().splitlines()
        return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}

    def assert_untouched(self, before: Mapping[str, str]) -> None:
        """All of an earlier ``digests()`` is as it was, and nothing lies there but backups: new ones are no harm."""
        now = self.digests()
        changed = {path for path, digest in before.items() if now.get(path) != digest}
        assert not changed
        strangers = {path for path in now if not SEALED_NAME.fullmatch(path)}
        assert not strangers

    def start_application(self) -> None:
        """The database, with users and orders in it; nothing of pgkeep's."""
        self.compose("up", "-d", "db")
        ready = ("pg_isready", "-q", "-h", "127.0.0.1", "-U", "app", "-d", "app_db")
        wait_until(lambda: self.execute("db", *ready, check=False).return_code == 0, "the database")
        self.psql(APPLICATION)

    def start(self) -> None:
        """Bring the services up and wait for the first backups, sealed and copied. Running ones are left alone."""
        self.compose("up", "-d", *SERVICES)
        for tier in ("daily", "globals"):
            copied = functools.partial(self.extracted, tier)
            wait_until(copied, f"the first backup in {tier}/ and its copy", say=self.trouble)

    def trouble(self) -> str:
        """What the services say and how they are, for a test that fails."""
        return "\n".join(f"--- {service}: {self._last_words(service)}" for service in SERVICES)

    def _last_words(self, service: str) -> str:
        tail = self.engine.docker("logs", "--tail", "20", self.container(service), check=False)
        return tail.stdout.decode() + tail.stderr

    def remove(self) -> None:
        """Containers, networks, volumes (their flags first) and the directory."""
        self.compose("down", "--timeout", "1", "--remove-orphans")
        every = self.engine.output("volume", "ls", "--quiet", "--filter", f"name={self.name}").split()
        own = [volume for volume in every if volume.startswith((f"{self.name}-", f"{self.name}_"))]
        if own:
            clear_flags(self.engine, own)
            self.engine.docker("volume", "rm", *own)
        shutil.rmtree(self.directory)


def clear_flags(engine: Engine, volumes: Sequence[str]) -> None:
    """What ``pgkeep uninstall`` does with more care. Its code says nothing: it is not 0 for links."""
    run = ("run", "--rm", "--network", "none", "--cap-add", "LINUX_IMMUTABLE")
    mounts = [f"--volume={volume}:/volumes/{volume}" for volume in volumes]
    engine.docker(*run, *mounts, images.PYTHON, "chattr", "-R", "-f", "-i", "-a", "/volumes", check=False)


def lay_out(
    engine: Engine,
    context: Path,
    directory: Path,
    settings: Mapping[str, str] | None = None,
    *,
    compose_file: str | None = None,
    compose_version: ComposeVersion = "1.29",
) -> Stack:
    """The project directory, ready for ``up``: the example's Compose file, or ``compose_file`` and ours beside it.

    ``settings`` goes to ``.env``; the directory's name is that of containers and volumes.
    """
    directory.mkdir(parents=True)
    (directory / "pgkeep").symlink_to(context)
    variables = {"PGKEEP_NAME": directory.name, **QUICK, **(settings or {})}
    if compose_file is None:
        shutil.copy(context / "deploy" / "compose.example.yaml", directory / "docker-compose.yml")
    else:
        (directory / "docker-compose.yml").write_text(compose_file)
        variables["COMPOSE_FILE"] = "docker-compose.yml:pgkeep/deploy/compose.yaml"
    (directory / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    password = _write_password(directory / "secrets")
    (directory / "external_storage").mkdir()
    os.chown(directory / "external_storage", EXTRACTOR_UID, EXTRACTOR_UID)
    return Stack(engine, directory, directory.name, password, compose_version)


def _write_password(folder: Path) -> str:
    """Awkward in a shell, in a URL and in a conninfo, and found by nobody's chance."""
    password = f'it\'s "{secrets.token_hex(12)}" $HOME %2F@:/'
    folder.mkdir()
    file = folder / "db_password.txt"
    file.write_text(f"{password}\n")
    file.chmod(0o400)
    os.chown(file, AGENT_UID, AGENT_UID)
    return password


@contextlib.contextmanager
def removed_afterwards(stack: Stack) -> Iterator[Stack]:
    try:
        yield stack
    finally:
        try:
            stack.remove()
        except ToolError as error:
            raise ToolError(f"{error.message}\n{stack.trouble()}", error.hint) from error
