"""An inspector whose fork was taken over by the dump that it read; started like the real one.

``DEED`` in the environment says what it does instead of looking.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable

from pgkeep.vault import inspector_process

LIE = b'{"contents":null,"defects":["%s"]}'


def _escape(file: int, answer: int) -> int:
    """Try every way out, and tell which ones worked."""
    server = os.getppid()
    ways: dict[str, Callable[[], object]] = {
        "fork": os.fork,
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "kill the inspector": lambda: os.kill(server, 9),
        "signal anybody": lambda: os.kill(1, 0),
        "connect": socket.socket,
        "write a file": lambda: os.write(os.open("/tmp/escaped", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC), b"x"),
        "write to the dump": lambda: os.pwrite(file, b"x", 0),
        "open the dump for writing": lambda: os.open(f"/proc/self/fd/{file}", os.O_RDWR),
        "make the dump longer": lambda: os.ftruncate(file, 1 << 20),
        "chmod the dump": lambda: os.fchmod(file, 0o777),
        "read the inspector's memory": lambda: os.open(f"/proc/{server}/mem", os.O_RDONLY),
        "use the vault's line": lambda: [os.write(each, b"1 0") for each in range(3, 64) if each not in (file, answer)],
        "become root": lambda: os.setuid(0),
        "raise a limit": lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (-1, -1)),
    }
    worked = []
    for name, way in ways.items():
        try:
            way()
        except (OSError, ValueError):
            continue
        worked.append(name)
    os.write(answer, LIE % ",".join(["tried", *worked]).encode())
    return inspector_process.WHOLE


def _hang(file: int, answer: int) -> int:
    while True:
        time.sleep(1)


def _spin(file: int, answer: int) -> int:
    while True:
        os.pread(file, 1, 0)


def _say(text: bytes) -> Callable[[int, int], int]:
    def look(file: int, answer: int) -> int:
        os.write(answer, text)
        return inspector_process.WHOLE

    return look


def _talk_without_end(file: int, answer: int) -> int:
    while True:
        os.write(answer, b" " * 65536)


def _swell(file: int, answer: int) -> int:
    return len(bytearray(64 << 30))


def _crash(file: int, answer: int) -> int:
    return len(ctypes.string_at(0))


DEEDS: dict[str, Callable[[int, int], int]] = {
    "escape": _escape,
    "hang": _hang,
    "spin": _spin,
    "nothing": _say(b""),
    "nonsense": _say(b"\xff{"),
    "another form": _say(b'{"contents":1}'),
    "talk": _talk_without_end,
    "swell": _swell,
    "crash": _crash,
    "give up": lambda file, answer: 9,
}

if __name__ == "__main__":
    setattr(inspector_process, "_look", DEEDS[os.environ["DEED"]])  # noqa: B010 (mypy takes no assignment)
    if os.environ["DEED"] == "spin":
        inspector_process.processor_seconds = lambda size_bytes: 1
    inspector_process.main(int(sys.argv[1]))
