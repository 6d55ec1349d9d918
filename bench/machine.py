"""On what the figures were taken: the machine, and the versions of everything that ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

from pgkeep import __version__
from pgkeep.adapters import process
from pgkeep.adapters.pgbinaries import Installation

ROOT = Path(__file__).parents[1]


def machine(scratch: Path) -> dict[str, str]:
    """For people: processor, memory, kernel, the scratch directory's filesystem, and what else is going on."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    processors = len(os.sched_getaffinity(0))
    return {
        "Processor": f"{_first_value('/proc/cpuinfo', 'model name')}, {processors} of {os.cpu_count()} used",
        "Memory": f"{_memory_bytes() / 1e9:.1f} GB",
        "Kernel": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}",
        "Filesystem": filesystem(scratch),
        "Load before the run": f"{load} (1, 5 and 15 minutes)",
    }


def is_busy() -> bool:
    """Whether others kept more than half of the processors at work during the last minute."""
    return os.getloadavg()[0] > len(os.sched_getaffinity(0)) / 2


def versions(installation: Installation) -> dict[str, str]:
    """For people: our own, Python's, PostgreSQL's, and those of the libraries and tools that do the work."""
    return {
        "pgkeep": f"{__version__}{_commit()}",
        "Python": platform.python_version(),
        "isal, psycopg": ", ".join(importlib.metadata.version(name) for name in ("isal", "psycopg")),
        "PostgreSQL": f"{installation.version}, server and tools ({installation.source})",
        "gzip": _gzip_version(),
    }


def shared_buffers_mib() -> int:
    """A quarter of the memory, as PostgreSQL's manual suggests, and no more than 1 GB."""
    return max(128, min(1024, _memory_bytes() // 4 // 2**20))


def filesystem(path: Path) -> str:
    """E.g. ``ext4 (rw,relatime)``: of the mount that holds this path, from /proc/self/mountinfo."""
    best = ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        mount = fields[4].encode().decode("unicode_escape")
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, f"{fields[fields.index('-') + 1]} ({fields[5]})")
    return best[1]


def _memory_bytes() -> int:
    return int(_first_value("/proc/meminfo", "MemTotal").split()[0]) * 1024


def _first_value(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _gzip_version() -> str:
    return process.run(["gzip", "--version"]).stdout.decode().splitlines()[0].removeprefix("gzip ")


def _commit() -> str:
    """Which commit, and whether the source was changed since; nothing outside a clone."""
    if shutil.which("git") is None:
        return ""
    environment: Mapping[str, str] = {"GIT_OPTIONAL_LOCKS": "0"}
    head = process.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], environment=environment)
    changed = process.run(["git", "-C", ROOT, "status", "--porcelain", "src"], environment=environment)
    if head.return_code != 0:
        return ""
    return f", commit {head.stdout.decode().strip()}{', with changes' if changed.stdout else ''}"
