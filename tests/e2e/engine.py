"""A Docker engine of one's own for the tests, or another that is named; see README.md beside this file.

The daemon runs in network, mount and process namespaces of its own. So it can't touch another daemon's bridge,
iptables or mounts, builds and containers have no way out, and killing the namespace's first process takes the daemon
and every container with it at once. Its files are in one run folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pgkeep.adapters import process
from pgkeep.errors import PgkeepError, ToolError
from tests.e2e import packages

ComposeVersion = Literal["1.29", "2"]
COMPOSE_VERSIONS: tuple[ComposeVersion, ...] = ("1.29", "2")
HOST_VARIABLE = "TESTS_E2E_DOCKER_HOST"
CACHE_VARIABLE = "TESTS_E2E_CACHE"
RUN_VARIABLE = "TESTS_E2E_RUN"
RUN_PREFIX = "pgkeep-e2e-"
READY_SECONDS = 60.0
COMMAND_SECONDS = 300.0
GONE_SECONDS = 20.0
_CGROUPS = Path("/sys/fs/cgroup")
# Debian's client, not another that comes first in PATH.
_CLIENTS = ("/usr/bin/docker", "docker")
# First process of the namespaces: it reaps what containers leave behind, and hides the machine's own Docker state.
_FIRST_PROCESS = """
exec >>"$1" 2>&1
shift
ip link set lo up || exit 1
for folder in /run/containerd /run/docker /etc/docker; do
  mkdir -p "$folder" && mount -t tmpfs tmpfs "$folder" || exit 1
done
"$@" &
child=$!
trap 'kill -TERM "$child"' TERM
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """An engine that answers. ``run_folder`` and ``first_process_id``: of our own daemon, else None."""

    host: str
    config: Path
    client: str
    run_folder: Path | None = None
    first_process_id: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What ``docker`` and ``docker-compose`` need to talk to it; PATH begins with the right client."""
        path = f"{self.config / 'bin'}:{os.environ.get('PATH', os.defpath)}"
        return {"DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.config), "DOCKER_CONTEXT": "", "PATH": path}

    def docker(self, *arguments: str | Path, **options: object) -> process.Completed:
        """``docker ARGUMENTS``; options as for ``run``."""
        return self.run([self.client, *arguments], **options)  # type: ignore[arg-type]

    def output(self, *arguments: str | Path) -> str:
        """What ``docker ARGUMENTS`` printed, without the last newline. Raises ``ToolError``."""
        return self.docker(*arguments).stdout.decode().rstrip("\n")

    def compose(self, version: ComposeVersion, *arguments: str | Path, **options: object) -> process.Completed:
        """``docker-compose`` 1.29 or the V2 plugin with ARGUMENTS; options as for ``run``."""
        program = ["docker-compose"] if version == "1.29" else [self.client, "compose"]
        return self.run([*program, *arguments], **options)  # type: ignore[arg-type]

    def in_namespaces(self, *arguments: str | Path) -> process.Completed:
        """Run in the daemon's network and mounts: published ports are reachable from there only."""
        if self.first_process_id is None:
            raise ToolError("another's engine has no namespaces that we may enter", f"unset {HOST_VARIABLE}")
        return self.run(["nsenter", "--target", str(self.first_process_id), "--net", "--mount", "--pid", *arguments])

    def run(
        self,
        command: Sequence[str | Path],
        *,
        check: bool = True,
        timeout_seconds: float = COMMAND_SECONDS,
        environment: Mapping[str, str] | None = None,
        input_bytes: bytes | None = None,
        directory: Path | None = None,
    ) -> process.Completed:
        """A program that talks to this engine. Raises ``ToolError`` where ``check`` and its code is not 0."""
        completed = process.run(
            command,
            environment={**self.environment, **(environment or {})},
            timeout_seconds=timeout_seconds,
            input_bytes=input_bytes,
            directory=directory,
        )
        if check and completed.return_code != 0:
            # A script among the arguments would bury what it said.
            shown = " ".join(str(part).strip().partition("\n")[0] for part in command)
            raise ToolError(f"{shown}: code {completed.return_code}: {completed.stderr}", "see the daemon's log")
        return completed


def cache_folder() -> Path:
    """Where plugins and images are kept between runs; made if it is not there."""
    folder = Path(os.environ.get(CACHE_VARIABLE, "/var/cache/pgkeep-e2e"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def plugins_folder() -> Path:
    return cache_folder() / "cli-plugins"


def why_not_here() -> str | None:
    """Why no engine can be had, or None."""
    if os.environ.get(HOST_VARIABLE):
        return None
    if os.geteuid() != 0:
        return f"needs root, or a Docker engine named in {HOST_VARIABLE}"
    missing = packages.missing_packages() + packages.missing_plugins(plugins_folder())
    return f"needs {', '.join(missing)}; {packages.INSTALL_HINT}" if missing else None


@contextlib.contextmanager
def running() -> Iterator[Engine]:
    """The engine that ``TESTS_E2E_DOCKER_HOST`` names, or one of our own, which is gone at the end."""
    named = os.environ.get(HOST_VARIABLE)
    with _named_engine(named) if named else _own_engine() as engine:
        yield engine


def sweep() -> list[Path]:
    """Remove what killed runs left: nothing whose owner lives. Returns the folders that are gone."""
    removed = []
    for folder in sorted(_run_parent().glob(f"{RUN_PREFIX}*")):
        with contextlib.suppress(BlockingIOError), _owned(folder):
            _remove(folder)
            removed.append(folder)
    return removed


@contextlib.contextmanager
def _named_engine(host: str) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="pgkeep-e2e-config-") as folder:
        engine = Engine(host, Path(folder), _client())
        _write_config(Path(folder), engine.client)
        engine.output("version", "--format", "{{.Server.Version}}")
        yield engine


@contextlib.contextmanager
def _own_engine() -> Iterator[Engine]:
    reason = why_not_here()
    if reason is not None:
        raise ToolError(f"no Docker engine: {reason}", packages.INSTALL_HINT)
    sweep()
    # Locked before it has a name that another's sweep looks for.
    hidden = Path(tempfile.mkdtemp(prefix=f".{RUN_PREFIX}", dir=_run_parent()))
    folder = hidden.with_name(hidden.name.removeprefix("."))
    with _owned(hidden):
        hidden.rename(folder)
        try:
            with process.start(_daemon_command(folder), stdout=process.DEVNULL) as unshare:
                try:
                    yield _wait_until_ready(folder, unshare)
                finally:
                    os.kill(unshare.pid, signal.SIGKILL)
        finally:
            _remove(folder)


def _daemon_command(folder: Path) -> list[str | Path]:
    _write_config(folder / "config", _client())
    (folder / "daemon.json").write_text("{}\n")
    # Mounts that the tests make later reach the daemon, and none of its own comes back.
    namespaces = ["--net", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "--mount-proc"]
    daemon = {
        "--config-file": folder / "daemon.json",
        "--data-root": folder / "data",
        "--exec-root": folder / "exec",
        "--host": _socket(folder),
        "--pidfile": folder / "dockerd.pid",
        "--cgroup-parent": f"/{folder.name}",
        "--exec-opt": "native.cgroupdriver=cgroupfs",
    }
    options = [str(part) for pair in daemon.items() for part in pair]
    first: list[str | Path] = ["sh", "-c", _FIRST_PROCESS, "sh", folder / "dockerd.log", "dockerd", *options]
    return ["unshare", *namespaces, *first]


def _wait_until_ready(folder: Path, unshare: process.Running) -> Engine:
    engine = Engine(_socket(folder), folder / "config", _client(), folder)
    deadline = time.monotonic() + READY_SECONDS
    while engine.docker("version", check=False).return_code != 0:
        if unshare.poll() is not None or time.monotonic() > deadline:
            raise ToolError(f"dockerd did not start: {unshare.messages()} {_log_tail(folder)}", "read its last lines")
        time.sleep(0.1)
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
    (folder / "first_process").write_text(f"{children[0]} {_start_time(int(children[0]))}")
    return dataclasses.replace(engine, first_process_id=int(children[0]))


def _remove(folder: Path) -> None:
    """The daemon and its containers first, then their cgroups, then the files, whatever flags they carry."""
    _kill_namespace(folder)
    for cgroup in [_CGROUPS / folder.name, *_CGROUPS.glob(f"*/{folder.name}")]:
        _remove_cgroup(cgroup)
    # Its code says nothing: it is non-zero for sockets.
    process.run(["chattr", "-R", "-f", "-i", "-a", folder], timeout_seconds=COMMAND_SECONDS)
    shutil.rmtree(folder)


def _kill_namespace(folder: Path) -> None:
    record = folder / "first_process"
    if not record.exists():
        return
    process_id, started = record.read_text().split()
    deadline = time.monotonic() + GONE_SECONDS
    while _start_time(int(process_id)) == started:
        # Its last act is to wait for every other process of the namespace.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process_id), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ToolError(f"process {process_id} of {folder} does not die", "look at it with ps")
        time.sleep(0.02)


def _start_time(process_id: int) -> str | None:
    """The process's start, in clock ticks since boot; None when it is gone, or dead and not yet reaped."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _remove_cgroup(cgroup: Path) -> None:
    for directory, _, _ in os.walk(cgroup, topdown=False):
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            try:
                os.rmdir(directory)
                break
            except OSError:
                # The kernel frees a dead process's group a moment later.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; whoever holds it lives. Raises ``BlockingIOError`` where another does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _write_config(config: Path, client: str) -> None:
    config.mkdir(exist_ok=True)
    (config / "config.json").write_text("{}\n")
    (config / "cli-plugins").symlink_to(plugins_folder())
    (config / "bin").mkdir()
    (config / "bin" / "docker").symlink_to(client)


def _client() -> str:
    for name in _CLIENTS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolError("there is no docker client", packages.INSTALL_HINT)


def _run_parent() -> Path:
    return Path(os.environ.get(RUN_VARIABLE, "/var/tmp"))


def _socket(folder: Path) -> str:
    return f"unix://{folder / 'docker.sock'}"


def _log_tail(folder: Path) -> str:
    log = folder / "dockerd.log"
    return log.read_text(errors="replace")[-4000:] if log.exists() else "no log"


def main(arguments: Sequence[str]) -> int:
    """``install``, ``images``, ``sweep``, ``run COMMAND…`` (with a fresh engine, the images and its environment)."""
    from tests.e2e import images

    match list(arguments):
        case ["install"]:
            packages.install(plugins_folder())
        case ["images"]:
            with running() as engine:
                images.provide(engine, print)
        case ["sweep"]:
            print(*sweep(), sep="\n")
        case ["run", *command] if command:
            with running() as engine:
                images.provide(engine, print)
                return os.waitstatus_to_exitcode(_spawn(command, engine.environment))
        case _:
            print("python -m tests.e2e.engine install | images | sweep | run COMMAND ...", file=sys.stderr)
            return 2
    return 0


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """A command on our own terminal, in our process group; its wait status."""
    given = {**os.environ, **environment}
    return os.waitpid(os.posix_spawnp(command[0], list(command), given), 0)[1]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PgkeepError as error:
        sys.exit(f"{error}")
