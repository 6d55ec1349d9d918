"""Extraction: a sealed backup's way to a directory outside, against stock tools."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench import footprint, programs, workspace
from bench.databases import Databases, Say
from bench.figures import PGKEEP, Peak, Race, RatioTarget
from bench.programs import Pgkeep
from bench.race import Contender, race
from bench.workspace import Workspace
from pgkeep.domain import names
from pgkeep.errors import ToolError

STOCK = "cp; sha256sum of the source; sync"
COMPARED = "cp; sha256sum of both; sync"
ACCELERATED = "cp; openssl sha256 of the source; sync"
TARGETS = (RatioTarget(STOCK, 1.0),)
MEMORY_LIMIT_BYTES = 150_000_000
BYTES_OF_SCALE = 1_000_000_000
_BLOCK_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Vault:
    """One with a single backup, whose dump is ``dump``."""

    root: Path
    dump: Path
    size_bytes: int
    environment: Mapping[str, str]

    def settle(self) -> None:
        """As if nothing had ever been extracted, with the dump on the disk and not in memory."""
        shutil.rmtree(self.root / "extracted", ignore_errors=True)
        workspace.settle()
        forget(self.dump)

    def extract(self, destination: Mapping[str, str]) -> None:
        """``destination``: its variables. Raises ``ToolError``, also where there was nothing to do."""
        extract({**self.environment, **destination})


@contextlib.contextmanager
def vault(databases: Databases, size_bytes: int, space: Workspace, say: Say) -> Iterator[Vault]:
    """With a backup of exactly that size. What the dump holds is nothing to those who copy it: it is made up."""
    say(f"making a vault with a backup of {size_bytes / 1e6:.0f} MB")
    with space.place("vault") as root:
        pgkeep = Pgkeep(root, databases.cluster, "postgres")
        dump = Path(root, "active", pgkeep.run("backup", "daily")["path"])
        workspace.unseal(root)
        dump.unlink()
        _describe(dump, size_bytes, _fill(dump, size_bytes))
        yield Vault(root, dump, size_bytes, pgkeep.environment)


def run(made: Vault, rounds: int, space: Workspace, say: Say) -> Race:
    """Each copies the dump into an empty directory on the same disk; pgkeep its sidecars, too."""

    @contextlib.contextmanager
    def arena() -> Iterator[Path]:
        with space.place("outside") as place:
            made.settle()
            yield place

    title = f"extraction of {made.size_bytes / 1e6:.0f} MB to a directory"
    return Race(title, race(title, contenders(made), rounds, arena, say), made.size_bytes)


def contenders(made: Vault) -> list[Contender[Path]]:
    def pgkeep(place: Path) -> None:
        made.extract(directory(place))

    def stock(place: Path) -> None:
        _copy(made.dump, place, ["sha256sum", made.dump])

    def compared(place: Path) -> None:
        _copy(made.dump, place, ["sha256sum", made.dump])
        programs.run(["sha256sum", place / made.dump.name])

    def accelerated(place: Path) -> None:
        _copy(made.dump, place, ["openssl", "dgst", "-sha256", made.dump])

    return [
        Contender(PGKEEP, pgkeep),
        Contender(STOCK, stock),
        Contender(COMPARED, compared),
        Contender(ACCELERATED, accelerated),
    ]


def peak(what: str, made: Vault, destination: Mapping[str, str]) -> Peak:
    """Of the process that extracts, memory at its highest."""
    made.settle()
    highest = 0

    def sample(pid: int) -> None:
        # The last answer counts, as for any other command.
        nonlocal highest
        highest = footprint.peak_memory_bytes(pid) or highest

    seconds = programs.run_sampled(_pass(), {**made.environment, **destination}, sample)
    return Peak(what, made.size_bytes, seconds, highest)


def directory(place: Path) -> dict[str, str]:
    """The variables of a destination that is this directory, and of no other."""
    return {"EXTERNAL_DIRECTORY": os.fspath(place)}


def extract(environment: Mapping[str, str]) -> None:
    """One pass. Raises ``ToolError``, also where there was nothing to do."""
    answer = json.loads(programs.run(_pass(), environment))
    if not all(each["extracted"] for each in answer["destinations"]):
        raise ToolError(f"nothing was extracted: {answer}", "the figures would mean nothing")


def forget(path: Path) -> None:
    """Out of the page cache with it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _pass() -> list[str]:
    return [*programs.pgkeep_command(), "extractor", "once", "--json"]


def _copy(dump: Path, place: Path, digesting: programs.Command) -> None:
    programs.run(["cp", dump, place])
    programs.run(digesting)
    programs.run(["sync", place / dump.name, place])


def _fill(path: Path, size_bytes: int) -> str:
    """Random bytes; their digest."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        while rest := size_bytes - file.tell():
            block = os.urandom(min(rest, _BLOCK_BYTES))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _describe(dump: Path, size_bytes: int, sha256: str) -> None:
    """In its sidecars, as pgkeep would."""
    checksum, path = _beside(dump, names.CHECKSUM_SUFFIX), _beside(dump, names.MANIFEST_SUFFIX)
    manifest = json.loads(path.read_bytes()) | {"size_bytes": size_bytes, "sha256": sha256}
    for each, text in ((checksum, f"{sha256}  {dump.name}\n"), (path, json.dumps(manifest))):
        each.unlink()
        each.write_text(text)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
