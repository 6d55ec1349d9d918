"""An honest artifact, ways to look at one, and what a path may be instead of a file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.domain import retention
from pgkeep.domain.names import Tier
from pgkeep.vault import seal
from pgkeep.vault.inspect import Depth, Inspection, inspect
from tests.attacks import forge
from tests.attacks.forge import Forgery

# What reading a hostile file may cost beside the program itself; a chunk of text is 16 MiB.
MEMORY_LIMIT_KIB = 100 * 1024
TIME_LIMIT_SECONDS = 30
IDENTIFIER = "20260131T235959Z-1f2e3d"
POLICY = retention.Policy(dict.fromkeys(Tier, 7), 1)
RULES = seal.Rules(POLICY, reserve_bytes=0)

HONEST = forge.build()


def look(data: bytes, depth: Depth = "content") -> Inspection:
    descriptor = os.memfd_create("hostile")
    try:
        os.write(descriptor, data)
        return inspect(LocalFile(descriptor), depth)
    finally:
        os.close(descriptor)


def defects(data: bytes, depth: Depth = "content") -> str:
    return "\n".join(look(data, depth).defects)


def forged() -> Forgery:
    return Forgery.of(HONEST)


def pgkeep(*arguments: str | Path, root: Path) -> subprocess.CompletedProcess[str]:
    """The command line, as a person calls it; anything that hangs is a failure."""
    environment = {**os.environ, "PGKEEP_ROOT": str(root), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pgkeep", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS)


def assert_clean(done: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    assert "internal error" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert done.returncode == exit_code, done.stderr


def not_whole(path: Path) -> Path:
    path.write_bytes(HONEST[:-1])
    return path


def fifo_at(path: Path) -> Path:
    os.mkfifo(path)
    return path


def directory_at(path: Path) -> Path:
    path.mkdir()
    return path


def socket_at(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def link_at(target: str | Path) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return make


def with_sidecar(suffix: str, make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        forge.write_with_checksum(path, HONEST)
        sidecar = path.with_name(path.name + suffix)
        sidecar.unlink(missing_ok=True)
        make(sidecar)
        return path

    return build


def sparse_at(size_bytes: int) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        with path.open("wb") as file:
            file.truncate(size_bytes)
        return path

    return make


def bytes_at(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return make
