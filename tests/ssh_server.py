"""A real OpenSSH server with rsync, on a port of its own, and a way in between that can be cut."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgkeep.adapters.destinations.rsync import Options, RsyncDestination
from tests import clusters

_READY_SECONDS = 20.0
_CONFIGURATION = """
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 100
MaxSessions 50
LogLevel VERBOSE
# Debian's bash then leaves out root's .bashrc, whatever it may hold here.
SetEnv SHLVL=3
"""


class SshServer:
    """sshd for root's account. A key may have a command of its own, as in an account that is restricted."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.known_hosts = directory / "known_hosts"
        self._running: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        make_key(self.directory / "host_key")
        self.make_known(self.port)
        (self.directory / "authorized_keys").touch()
        self.configuration.write_text(_CONFIGURATION.format(port=self.port, directory=self.directory))

    def make_known(self, port: int) -> None:
        """Also by another port that leads here."""
        public = (self.directory / "host_key.pub").read_text().split()
        with self.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")

    @property
    def configuration(self) -> Path:
        return self.directory / "sshd_config"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        # Where sshd puts its children (sshd(8)); an init script would have made it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            command = [shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", str(self.configuration)]
            self._running = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _READY_SECONDS
        while not self._answers():
            assert self._running.poll() is None, self.log
            assert time.monotonic() < deadline, "sshd does not answer"
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """With every session and what runs in it: SIGTERM as a machine that shuts down, SIGKILL as one that crashes."""
        if self._running is not None:
            children = descendants(self._running.pid)
            # All stand still first: none hears of another's end, as in a crash.
            for each in (signal.SIGSTOP, number) if number == signal.SIGKILL else (number,):
                for child in children:
                    # They end by themselves too.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, each)
            self._running.kill()
            self._running.wait()
            self._running = None

    def let_in(self, name: str, command: str = "") -> Path:
        """A new key that may log in; the file with its private half. ``command``: all that it may run."""
        key = self.directory / f"key-{name}"
        make_key(key)
        options = f'restrict,command="{command}" ' if command else ""
        with (self.directory / "authorized_keys").open("a") as file:
            file.write(options + key.with_name(f"{key.name}.pub").read_text())
        return key

    def let_in_by_script(self, name: str, text: str) -> Path:
        """As ``let_in``, with a shell script for a command: what was asked for is in $SSH_ORIGINAL_COMMAND."""
        script = self.directory / f"script-{name}"
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        return self.let_in(name, str(script))

    def sessions(self) -> int:
        """How many programs were started on the server so far."""
        return self.log.count("Starting session: ")

    def destination(self, key: Path, path: Path | str, **options: Any) -> RsyncDestination:
        return RsyncDestination(self.options(key, path, **options))

    def options(self, key: Path, path: Path | str, **more: Any) -> Options:
        facts = {"port": self.port, "known_hosts_file": self.known_hosts, **more}
        return Options(target=f"root@127.0.0.1:{path}", key_file=key, **facts)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            return connection.recv(4) == b"SSH-"
        return False


@contextlib.contextmanager
def running() -> Iterator[SshServer]:
    """A server until the end of the block; skips where there can be none."""
    clusters.need_root("an SSH server that anybody can log in to")
    for program in ("sshd", "ssh", "rsync"):
        if shutil.which(program) is None and not Path(f"/usr/sbin/{program}").exists():
            clusters.skip(f"needs {program}: the rsync destination", could_run_here=True)
    with tempfile.TemporaryDirectory(prefix="pgkeep-sshd-") as directory:
        server = SshServer(Path(directory), free_port())
        server.prepare()
        server.start()
        try:
            yield server
        finally:
            server.stop()


def need_rrsync(option: str = "-no-del") -> str:
    """The path of rrsync, which comes with Debian's rsync, if it has this option; else skips."""
    path = shutil.which("rrsync")
    if path is None:
        clusters.skip("needs rrsync (Debian: of the package rsync)")
    if f"'{option}'" not in Path(path).read_text():
        clusters.skip(f"needs an rrsync with {option}", could_run_here=False)
    return path


def make_key(path: Path, passphrase: str = "") -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def descendants(pid: int) -> list[int]:
    """Children and theirs, the youngest generation last."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):
            found += [int(child) for child in path.read_text().split()]
    return found + [each for child in found for each in descendants(child)]


@dataclasses.dataclass
class Way:
    """A port that leads to another one: what goes there is counted, and it can be cut, or go dead."""

    port: int
    to_port: int
    sent_bytes: int = 0
    limit_bytes: int | None = None
    dead: bool = False

    def __post_init__(self) -> None:
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Connections are reset, as by a router that was switched off and on."""
        for connection in self._open:
            with contextlib.suppress(OSError):  # closed by the other side already
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def close(self) -> None:
        self.cut()
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listening.accept()
                theirs = socket.create_connection(("127.0.0.1", self.to_port))
                self._open += [ours, theirs]
                threading.Thread(target=self._carry, args=(ours, theirs, True), daemon=True).start()
                threading.Thread(target=self._carry, args=(theirs, ours, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, there: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                while self.dead:
                    time.sleep(0.05)
                target.sendall(data)
                self.sent_bytes += len(data) if there else 0
                if self.limit_bytes is not None and self.sent_bytes > self.limit_bytes:
                    self.cut()
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def way_to(server: SshServer) -> Iterator[Way]:
    """A way that the server is known by."""
    way = Way(free_port(), server.port)
    server.make_known(way.port)
    try:
        yield way
    finally:
        way.close()
