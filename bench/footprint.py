"""Peaks of memory and of disk, by looking at pgkeep's process while it works."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from bench import programs
from bench.databases import Databases, Say
from bench.figures import DatabaseFigures, Footprint
from bench.programs import Pgkeep
from bench.workspace import Workspace

MEMORY_LIMIT_BYTES = 160_000_000
# "Flat": four times the data may not take more than this times the memory.
GROWTH_LIMIT = 1.1


class Sampler:
    """The peaks so far of one process that works under ``root``.

    The kernel keeps the peak of resident memory itself (VmHWM in proc(5)), of this process without its children.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.memory_bytes = 0
        self.staging_bytes = 0
        self.disk_bytes = 0

    def sample(self, pid: int) -> None:
        # The last answer counts, not the highest: before exec(2) it is the peak of whoever started the process.
        self.memory_bytes = peak_memory_bytes(pid) or self.memory_bytes
        files = {**_named_files(self.root), **_nameless_files(self.root, pid)}
        staging = os.fspath(self.root / "staging")
        self.staging_bytes = max(
            self.staging_bytes, sum(size for path, size in files.values() if path.startswith(staging))
        )
        self.disk_bytes = max(self.disk_bytes, sum(size for _, size in files.values()))


def run(
    databases: Databases, kinds: tuple[str, ...], scales: list[float], space: Workspace, say: Say
) -> list[Footprint]:
    """A backup and a restore of each kind at each scale; one database at a time, dropped afterwards."""
    footprints = []
    for kind in kinds:
        for scale in sorted(scales):
            figures = databases.provide(kind, scale)
            for each in _both(databases, kind, figures, space):
                footprints.append(each)
                peaks = f"{each.memory_bytes / 1e6:.0f} MB of memory, {each.staging_bytes / 1e6:.0f} MB of staging"
                say(f"peaks of pgkeep {each.verb}, {figures.name}: {peaks}, {each.seconds:.2f} s")
            databases.drop(figures.name)
    return footprints


def _both(databases: Databases, kind: str, figures: DatabaseFigures, space: Workspace) -> Iterator[Footprint]:
    with space.place("footprint") as root, databases.unused_name() as target:
        pgkeep = Pgkeep(root, databases.cluster, figures.name)
        yield _watched(pgkeep, kind, figures, "backup", "daily")
        conninfo = databases.cluster.conninfo(target)
        yield _watched(pgkeep, kind, figures, "restore", "latest", "--to", conninfo, "--create")


def _watched(pgkeep: Pgkeep, kind: str, figures: DatabaseFigures, *arguments: str) -> Footprint:
    sampler = Sampler(pgkeep.root)
    seconds = programs.run_sampled(pgkeep.command(*arguments), pgkeep.environment, sampler.sample)
    return Footprint(
        verb=arguments[0],
        database=kind,
        text_bytes=figures.text_bytes,
        seconds=seconds,
        memory_bytes=sampler.memory_bytes,
        staging_bytes=sampler.staging_bytes,
        disk_bytes=sampler.disk_bytes,
    )


def peak_memory_bytes(pid: int) -> int:
    """VmHWM; 0 when the process has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _named_files(root: Path) -> dict[int, tuple[str, int]]:
    """Path and allocated bytes by inode of what has a name. Files may vanish while we look."""
    found = {}
    for parent, _, names in os.walk(root):
        for name in names:
            path = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                found[status.st_ino] = (path, status.st_blocks * 512)
    return found


def _nameless_files(root: Path, pid: int) -> dict[int, tuple[str, int]]:
    """The same for what the process holds open without a name: not linked yet, or removed already."""
    found = {}
    directory = Path(f"/proc/{pid}/fd")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for link in list(directory.iterdir()):
            # A descriptor may be closed between these calls.
            with contextlib.suppress(FileNotFoundError):
                path, status = os.readlink(link), os.stat(link)
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0 and path.startswith(os.fspath(root)):
                    found[status.st_ino] = (path, status.st_blocks * 512)
    return found
