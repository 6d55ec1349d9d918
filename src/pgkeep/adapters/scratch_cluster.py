"""Throw-away PostgreSQL servers: private directory, Unix socket only, gone at the end.

For the demo, restore drills and tests. The server is not durable unless asked: a crash of the machine loses it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pgkeep.adapters import pgbinaries, process
from pgkeep.adapters.pgbinaries import Installation
from pgkeep.adapters.process import Identity, Running
from pgkeep.errors import DatabaseError, StorageError, ToolError

SUPERUSER = "postgres"
PORT = 5432
# sizeof(sockaddr_un.sun_path) is 108 on Linux, with the final NUL.
SOCKET_PATH_LIMIT_BYTES = 107
START_SECONDS = 60.0
STOP_SECONDS = 30.0
_INITDB_SECONDS = 120.0
_POLL_SECONDS = 0.02
_REMOVE_SECONDS = 10.0

_SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "logging_collector": "off",
    "timezone": "UTC",
    # In the data directory, not /dev/shm: that one is tiny in containers and keeps what a kill -9 leaves.
    "dynamic_shared_memory_type": "mmap",
    "jit": "off",
}
_THROW_AWAY_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "2GB",
}


class ScratchCluster:
    """A PostgreSQL server of our own, from ``with`` to its end; ``postgres`` is its superuser, without password.

    ``major``: a given one, else the preferred installation's. ``directory``: an existing parent for its private
    directory, else the temporary directory. ``settings`` override ours. As root the server runs as an unprivileged
    user. It dies with the thread that entered the context, even when that is killed.
    """

    def __init__(
        self,
        major: int | None = None,
        *,
        directory: Path | None = None,
        settings: Mapping[str, str] | None = None,
        durable: bool = False,
        installation: Installation | None = None,
    ) -> None:
        self.installation = installation or pgbinaries.choose_server(major)
        self.identity = unprivileged_identity()
        self.copied_reason = ""
        self._parent = directory
        self._settings = {**_SETTINGS, **({} if durable else _THROW_AWAY_SETTINGS), **(settings or {})}
        self._durable = durable
        self._stack = contextlib.ExitStack()
        self._running: Running | None = None
        self._server_stack = contextlib.ExitStack()

    def __enter__(self) -> ScratchCluster:
        with contextlib.ExitStack() as stack:
            self.directory = _private_directory(self._parent, self.identity)
            stack.callback(_remove, self.directory)
            self.socket_directory = self._socket_directory(stack)
            self._programs = self._runnable_programs()
            self._initialize()
            stack.callback(self.stop, immediate=not self._durable)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """The postmaster's process id. Raises ``DatabaseError`` while the server is stopped."""
        if self._running is None:
            raise DatabaseError("the scratch server is not running")
        return self._running.pid

    @property
    def data_directory(self) -> Path:
        return self.directory / "data"

    def conninfo(self, database: str = "postgres") -> str:
        """A libpq keyword string for the superuser; the database may have any name."""
        values = {
            "host": os.fspath(self.socket_directory), "port": str(PORT), "user": SUPERUSER, "dbname": database
        }  # fmt: skip
        return " ".join(f"{keyword}={_quoted(value)}" for keyword, value in values.items())

    def messages(self) -> str:
        """The tail of the server's log; empty while it is stopped."""
        return "" if self._running is None else self._running.messages()

    def start(self) -> None:
        """Start the server, again after a :meth:`stop` or a crash. Raises ``DatabaseError``, ``ToolError``."""
        self.stop(immediate=True)
        settings = {**self._settings, "unix_socket_directories": os.fspath(self.socket_directory)}
        arguments = [item for name, value in settings.items() for item in ("-c", f"{name}={value}")]
        self._running = self._server_stack.enter_context(
            process.start(
                [self._programs / "postgres", "-D", self.data_directory, *arguments],
                stdout=process.DEVNULL,
                identity=self.identity,
                directory=self.directory,
            )
        )
        self._wait_until_ready(self._running)

    def stop(self, *, immediate: bool = False) -> None:
        """End the server; clients are cut off. ``immediate`` skips the checkpoint: the next start recovers."""
        running, self._running = self._running, None
        if running is not None and running.poll() is None:
            os.kill(running.pid, signal.SIGQUIT if immediate else signal.SIGINT)
            # One that does not end in time is killed with its context, below.
            with contextlib.suppress(TimeoutError):
                running.wait(STOP_SECONDS)
        self._server_stack.close()

    def _wait_until_ready(self, running: Running) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready(running.pid):
            if running.poll() is not None or time.monotonic() > deadline:
                raise DatabaseError(f"the scratch server did not start: {running.messages()}", "see its messages")
            time.sleep(_POLL_SECONDS)

    def _is_ready(self, pid: int) -> bool:
        """As pg_ctl does: the first line of postmaster.pid is the process, the eighth its state."""
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"

    def _initialize(self) -> None:
        options = ["--auth=trust", f"--username={SUPERUSER}", "--encoding=UTF8", "--locale=C.UTF-8"]
        completed = process.run(
            [self._programs / "initdb", "-D", self.data_directory, *options, *([] if self._durable else ["--no-sync"])],
            identity=self.identity,
            directory=self.directory,
            timeout_seconds=_INITDB_SECONDS,
        )
        if completed.return_code != 0:
            raise DatabaseError(f"initdb failed: {completed.stderr}", "the user needs a line in /etc/passwd")

    def _socket_directory(self, stack: contextlib.ExitStack) -> Path:
        inside = self.directory / "socket"
        if len(os.fsencode(inside / f".s.PGSQL.{PORT}.lock")) <= SOCKET_PATH_LIMIT_BYTES:
            inside.mkdir(mode=0o700)
            _give(inside, self.identity)
            return inside
        outside = _private_directory(Path("/tmp"), self.identity)
        stack.callback(_remove, outside)
        return outside

    def _runnable_programs(self) -> Path:
        """The programs' directory, or a copy where the server's user can't reach it (wheels under /root)."""
        original = self.installation.directory
        if _runs(original, self.identity, self.directory):
            return original
        self.copied_reason = f"{original} can't be reached by user id {getattr(self.identity, 'uid', os.geteuid())}"
        copied = _copy_installation(self.installation, self.directory / "software")
        if not _runs(copied, self.identity, self.directory):
            raise ToolError(f"{self.copied_reason}, and a copy in {copied} does not run", "is that mounted noexec?")
        return copied


def unprivileged_identity() -> Identity | None:
    """Whom the server runs as: None (ourselves) unless we are root, which postgres refuses to be.

    initdb looks the user up in the passwd database, so a bare number would not do. Raises ``ToolError``.
    """
    if os.geteuid() != 0:
        return None
    entries = {entry.pw_name: entry for entry in pwd.getpwall() if entry.pw_uid != 0}
    for name in ("postgres", "nobody", *entries):
        if name in entries:
            return Identity(entries[name].pw_uid, entries[name].pw_gid)
    raise ToolError("no unprivileged user in /etc/passwd to run PostgreSQL as", "add one, e.g. nobody")


def _private_directory(parent: Path | None, identity: Identity | None) -> Path:
    """A new directory, 0700 and the server's user's, in the first of the places that this user can reach."""
    parents = [parent] if parent is not None else [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    for each in parents:
        made = Path(tempfile.mkdtemp(prefix="pgkeep-", dir=each)).resolve()
        _give(made, identity)
        if identity is None or process.run(["test", "-w", made], identity=identity).return_code == 0:
            return made
        made.rmdir()
    places = ", ".join(str(each) for each in parents)
    raise StorageError(f"the user that runs PostgreSQL can't reach {places}", "name another directory, or mend modes")


def _runs(programs: Path, identity: Identity | None, directory: Path) -> bool:
    """Asked twice: setpriv execs with root's right to search directories, the running program is without it."""
    questions: list[list[str | Path]] = [["test", "-r", programs / "postgres"], [programs / "initdb", "--version"]]
    return all(process.run(each, identity=identity, directory=directory).return_code == 0 for each in questions)


def _copy_installation(installation: Installation, target: Path) -> Path:
    """Copy ``<package>/<prefix>`` and ``<package>.libs``: the programs look for both relative to themselves."""
    prefix = installation.directory.parent
    if installation.source == "system" or prefix in (Path("/"), Path("/usr"), Path("/usr/local")):
        raise ToolError(f"{installation.directory} can't be read by the user that runs PostgreSQL", "mend its modes")
    package = prefix.parent
    unneeded = shutil.ignore_patterns("include", "*.a", "pkgconfig", "pgxs")
    shutil.copytree(prefix, target / package.name / prefix.name, ignore=unneeded, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    _readable_by_all(target)
    return target / package.name / prefix.name / "bin"


def _readable_by_all(top: Path) -> None:
    """The private directory above keeps everybody else out; the original's modes may have been 0700."""
    for path in [top, *top.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755)


def _give(path: Path, identity: Identity | None) -> None:
    if identity is not None:
        os.chown(path, identity.uid, identity.gid)


def _remove(directory: Path) -> None:
    """Backends of a postmaster that was killed end by themselves and may write until then."""
    deadline = time.monotonic() + _REMOVE_SECONDS
    while directory.exists():
        try:
            shutil.rmtree(directory)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
