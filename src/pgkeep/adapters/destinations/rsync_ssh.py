"""One connection to an SSH server: who we are, whom we trust, and nothing of the user's own configuration."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pgkeep.adapters import clock, durable, process
from pgkeep.adapters.destinations.rsync_errors import Server, error_of
from pgkeep.adapters.process import Completed, Running
from pgkeep.errors import ConfigurationError, StorageError, ToolError

CONNECT_SECONDS: Final = 20
_ALIVE_SECONDS: Final = 15
_ALIVE_COUNT: Final = 4
_PREFIX: Final = "pgkeep-rsync-"
# A directory that nobody holds may be one in the making: not before this age is it a killed run's.
_STALE_SECONDS: Final = 3600
_KEY_LIMIT_BYTES: Final = 64 * 1024
# A socket's path (unix(7)), less what ssh appends while it makes it.
_SOCKET_PATH_BYTES: Final = 108 - 20
_OPENSSH_MAGIC: Final = b"openssh-key-v1\0"
_KEY_HINT: Final = "make a key of its own for pgkeep: `ssh-keygen -t ed25519 -N '' -f FILE`"
_POLL_SECONDS: Final = 0.02


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory that only we can read, removed at the end; what a killed run left of its own is removed first."""
    parent = Path(tempfile.gettempdir())
    with durable.explain(parent, "making a temporary directory"):
        _remove_stale(parent)
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path)
        os.close(held)


def _remove_stale(parent: Path) -> None:
    """It may hold a key, or a large file: held by no process any more, it goes."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, BlockingIOError, PermissionError):
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                facts = os.fstat(held)
                if facts.st_uid == os.geteuid() and clock.now().timestamp() - facts.st_mtime > _STALE_SECONDS:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(held)


class Connection:
    """How to reach the server: ``command`` is what rsync is to use as its remote shell."""

    def __init__(self, server: Server, user: str | None, directory: Path) -> None:
        self.server = server
        self._user = user
        self._directory = directory
        self._configuration = directory / "ssh_config"

    @property
    def command(self) -> str:
        """rsync splits it at spaces outside of quotes (rsync(1), ``--rsh``)."""
        return f'ssh -F "{self._configuration}"'

    def prepare(self) -> None:
        """Write ssh's configuration. Raises ``ConfigurationError``, ``StorageError``."""
        if shutil.which("ssh") is None:
            raise ToolError("ssh is missing", "install OpenSSH's client (Debian: openssh-client)")
        key, known = self._usable_key(), Path(self.server.known_hosts_file).absolute()
        with durable.explain(known, "reading the known hosts"), known.open("rb"):
            pass
        options = {**self._options(), "IdentityFile": _quoted(key), "UserKnownHostsFile": _quoted(known)}
        text = "Host *\n" + "".join(f"    {name} {value}\n" for name, value in options.items())
        durable.write_atomically(self._directory, self._configuration.name, text.encode(), 0o600)

    def _options(self) -> dict[str, str]:
        """Of no other file anything is read: with ``-F`` ssh ignores its other configuration (ssh(1))."""
        options = {
            "Port": str(self.server.port),
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "PreferredAuthentications": "publickey",
            "StrictHostKeyChecking": "yes",
            "GlobalKnownHostsFile": "/dev/null",
            "UpdateHostKeys": "no",
            "CheckHostIP": "no",
            "ClearAllForwardings": "yes",
            "ForwardAgent": "no",
            "RequestTTY": "no",
            "Compression": "no",
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": str(_ALIVE_SECONDS),
            "ServerAliveCountMax": str(_ALIVE_COUNT),
            "LogLevel": "ERROR",
            "ControlMaster": "no",
            "ControlPath": _quoted(self._socket) if self._can_share else "none",
        }
        return options | ({"User": self._user} if self._user else {})

    @property
    def _socket(self) -> Path:
        return self._directory / "connection"

    @property
    def _can_share(self) -> bool:
        return len(os.fsencode(self._socket)) <= _SOCKET_PATH_BYTES

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Log in once for all that the body does. Where the server does not allow that, each program logs in itself.

        Raises what keeps us from logging in at all: :func:`error_of`.
        """
        if not self._can_share:
            yield
            return
        # In the foreground, as a child of ours: nothing of it survives us.
        arguments = ["ssh", "-F", str(self._configuration), "-M", "-N", self.server.host]
        with process.start(arguments, stdout=process.DEVNULL) as master:
            self._wait_for(master)
            yield

    def _wait_for(self, master: Running) -> None:
        deadline = time.monotonic() + 2 * CONNECT_SECONDS
        while not self._socket.exists():
            code = master.poll()
            if code is not None:
                raise error_of(self.server, Completed(code, b"", master.messages()), "connecting")
            if time.monotonic() > deadline:
                waited = Completed(255, b"", f"{master.messages()}\nConnection timed out")
                raise error_of(self.server, waited, "connecting")
            time.sleep(_POLL_SECONDS)

    def _usable_key(self) -> Path:
        """The key's file, or a copy that ssh takes: it wants no rights for others, and a line's end at the end.

        Secrets are mounted with all kinds of modes, and saved without a last line's end.
        """
        path = Path(self.server.key_file).absolute()
        with durable.explain(path, "reading the SSH key"), path.open("rb") as file:
            facts = os.fstat(file.fileno())
            data = file.read(_KEY_LIMIT_BYTES + 1)
        if not stat.S_ISREG(facts.st_mode) or len(data) > _KEY_LIMIT_BYTES or b"PRIVATE KEY" not in data:
            raise ConfigurationError(f"{path} is no private SSH key", "name the file that `ssh-keygen` made")
        if _has_passphrase(data):
            raise ConfigurationError(f"the key {path} has a passphrase, and nobody is there to type it", _KEY_HINT)
        whole = data.replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n"
        if not facts.st_mode & 0o077 and whole == data:
            return path
        durable.write_atomically(self._directory, "key", whole, 0o600)
        return self._directory / "key"


def _has_passphrase(key: bytes) -> bool:
    """By the cipher's name, the first field of OpenSSH's format (PROTOCOL.key), or by the header of the older ones."""
    if b"ENCRYPTED" in key:
        return True
    body = b"".join(line for line in key.splitlines() if not line.startswith(b"-----"))
    with contextlib.suppress(ValueError):  # no base64: ssh says so
        whole = base64.b64decode(body)
        return whole.startswith(_OPENSSH_MAGIC) and not whole.startswith(_OPENSSH_MAGIC + b"\0\0\0\4none")
    return False


def _quoted(path: Path) -> str:
    """For ssh's configuration: ``%`` begins a token there (ssh_config(5)), spaces need quotes."""
    text = str(path)
    if '"' in text or "\n" in text:
        raise ConfigurationError(f"{text!r}: ssh can't be given such a path", "use one without quotes in it")
    return '"' + text.replace("%", "%%") + '"'


def require_free(directory: Path, size_bytes: int, what_for: str) -> None:
    """Raises ``StorageError`` unless so much can be written there."""
    free_bytes = durable.free_bytes(directory)
    if free_bytes < size_bytes:
        raise StorageError(
            f"{directory} has {free_bytes} bytes free; {what_for} needs {size_bytes}",
            "name a larger directory in TMPDIR",
        )
