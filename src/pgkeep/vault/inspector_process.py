"""The inspector's own process: no capability, nobody's uid, no network to speak of; it forks once for every dump.

Started as ``python -m pgkeep.vault.inspector_process DESCRIPTOR`` by :mod:`pgkeep.vault.inspector`, which says what
goes over the socket. This process itself reads no hostile byte. It stays small: what a look into a dump needs is
loaded by the fork that looks.
"""

from __future__ import annotations

import array
import importlib
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import pgkeep
from pgkeep.adapters import confinement, privileges

# How a job ends: its exit codes. Anything else, and every signal, is a defect of the dump too.
WHOLE = 0
OUT_OF_MEMORY = 3
BROKE_OFF = 4

_MIB = 1024 * 1024
PROCESSORS = 4
# Four threads with their stacks and arenas, and an index of the file's own size several times over.
_MEMORY_BYTES = 1024 * _MIB
_MEMORY_PER_BYTE = 8
_MEMORY_LIMIT_BYTES = 8 * 1024 * _MIB
# The slowest of machines inflates ten times as much.
_SECONDS = 60
_BYTES_PER_SECOND = 256 * 1024
_WAIT_SECONDS = 0.02
_MESSAGE_BYTES = 64


def processor_seconds(size_bytes: int) -> int:
    """The processor time that a look into a dump of this size may take."""
    return _SECONDS + size_bytes // _BYTES_PER_SECOND


def wall_seconds(size_bytes: int) -> float:
    """And how long it may take in all, on a slow disk."""
    return 4.0 * processor_seconds(size_bytes)


def memory_bytes(size_bytes: int) -> int:
    """The address space that it may take."""
    return min(_MEMORY_BYTES + size_bytes * _MEMORY_PER_BYTE, _MEMORY_LIMIT_BYTES)


def serve(line: socket.socket) -> None:
    """Look into one dump after the other until the vault is gone."""
    line.send(b"ready")
    while True:
        message, descriptors = _receive(line)
        if not message:
            return
        number, size_bytes = map(int, message.split())
        status = _carry_out(line, size_bytes, descriptors)
        line.send(b"%d %d" % (number, status))


def _carry_out(line: socket.socket, size_bytes: int, descriptors: list[int]) -> int:
    """The wait status of the fork that looked. Killed when it takes too long, or when the vault wants no answer."""
    child = os.fork()
    if child == 0:
        _work(line, size_bytes, *descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    deadline = time.monotonic() + wall_seconds(size_bytes)
    watched = select.poll()
    watched.register(line, select.POLLIN)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if watched.poll(_WAIT_SECONDS * 1000) or time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]


def _work(line: socket.socket, size_bytes: int, file: int, answer: int) -> NoReturn:
    """In the fork: look, answer, end. Nothing comes back from here."""
    code = BROKE_OFF
    try:
        privileges.hide_from_own_user()
        privileges.die_with_parent()
        line.close()
        confinement.limit(memory_bytes(size_bytes), processor_seconds(size_bytes), PROCESSORS)
        confinement.refuse_system_calls()
        code = _look(file, answer)
    except MemoryError:
        code = OUT_OF_MEMORY
    finally:
        os._exit(code)


def _look(file: int, answer: int) -> int:
    import msgspec

    from pgkeep.adapters.artifact_reader import LocalFile
    from pgkeep.vault import inspect

    findings = msgspec.json.encode(inspect.examine(LocalFile(file), "content"))
    rest = memoryview(findings)
    while rest:
        rest = rest[os.write(answer, rest) :]
    return WHOLE


def _receive(line: socket.socket) -> tuple[bytes, list[int]]:
    message, ancillary, _, _ = line.recvmsg(_MESSAGE_BYTES, socket.CMSG_SPACE(2 * array.array("i").itemsize))
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data)
    return message, list(descriptors)


def _is_readable_to_all(path: str) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in Path(path).resolve().parents)


def _load_what_nobody_may_read() -> None:
    """An interpreter in somebody's home is closed to nobody: then all is loaded before, at the price of memory."""
    if not (_is_readable_to_all(os.__file__) and _is_readable_to_all(pgkeep.__file__)):
        for name in ("concurrent.futures.thread", "pgkeep.vault.inspect"):
            importlib.import_module(name)


def main(descriptor: int) -> None:
    """Give up every right, then serve."""
    _load_what_nobody_may_read()
    privileges.renounce()
    privileges.hide_from_own_user()
    with socket.socket(fileno=descriptor) as line:
        serve(line)


if __name__ == "__main__":
    main(int(sys.argv[1]))
