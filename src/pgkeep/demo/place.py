"""Where the demo's vault lies: found by trying, and removed again with all its flags."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pgkeep.adapters import durable, fsflags, protection
from pgkeep.domain.manifest import Protection
from pgkeep.errors import PgkeepError, ProtectionError, RefusedError, StorageError

PREFIX = "pgkeep-demo-"
# Seen on a tmpfs of 64 MB, which is what a container's /dev/shm has: the dump is then compressed on its way.
NEEDED_BYTES = 48_000_000
_HINT = "name a directory on a disk of its own (ext4, xfs, btrfs): TMPDIR=DIR pgkeep demo, or pgkeep demo --keep DIR"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """An empty directory for the vault, and what its filesystem was seen to protect for this process.

    ``why`` says what was seen; ``capability_missing``: only this process's rights kept it from immutability;
    ``is_ours``: the directory itself is to be removed too.
    """

    root: Path
    filesystem: str
    protection: Protection
    why: str
    capability_missing: bool
    is_ours: bool

    def remove(self) -> None:
        """Remove what is in it, flags included; then itself, if it is ours. Raises ``OSError``, ``ProtectionError``."""
        if not self.root.exists():
            return
        unprotect(self.root)
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self.is_ours:
            self.root.rmdir()


def temporary() -> Place:
    """A new directory in the first place that gives immutability, else read-only files.

    Raises ``ProtectionError`` naming every place that was tried.
    """
    reasons: list[str] = []
    found: list[Place] = []
    for parent in _parents():
        try:
            place = _try(parent)
        except (PgkeepError, OSError) as error:
            reasons.append(f"{parent}: {error}")
            continue
        if place.protection == "chattr":
            _drop(found)
            return place
        found.append(place)
    best = next((place for place in found if place.protection == "mode"), None)
    _drop([place for place in found if place is not best])
    if best is None:
        reasons += [f"{place.root.parent}: {place.why}" for place in found]
        raise ProtectionError(f"found no place whose filesystem protects files: {'; '.join(reasons)}", _HINT)
    return best


def chosen(directory: Path) -> Place:
    """The directory that a person named, new or empty.

    Raises ``RefusedError``, ``ProtectionError``, ``StorageError``.
    """
    directory = directory.absolute()
    is_ours = not directory.exists()
    with durable.explain(directory, "making the directory for the demo's vault"):
        if is_ours:
            directory.mkdir(mode=0o755)
        if any(directory.iterdir()):
            raise RefusedError(f"{directory} is not empty", "give --keep a new directory, or an empty one")
    try:
        place = _probed(directory, is_ours)
        if place.protection == "none":
            raise ProtectionError(f"{directory} is on {place.filesystem}, which protects nothing: {place.why}", _HINT)
    except BaseException:
        if is_ours:
            directory.rmdir()
        raise
    return place


def unprotect(top: Path) -> None:
    """Clear every immutable and append-only flag beneath, and let the owner write to the directories."""
    for name, _, files in os.walk(top):
        with fsflags.opened(Path(name)) as descriptor:
            _clear(descriptor)
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | stat.S_IRWXU)
        for path in (Path(name, file) for file in files):
            if path.is_file() and not path.is_symlink():
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    _clear(descriptor)
                finally:
                    os.close(descriptor)


def _parents() -> Iterator[Path]:
    """Temporary places first; memory and our own directories after them."""
    named = [tempfile.gettempdir(), "/var/tmp", "/tmp", "/dev/shm", os.path.expanduser("~")]
    with contextlib.suppress(FileNotFoundError):  # the current directory may have been removed
        named.append(os.getcwd())
    yield from (Path(name) for name in dict.fromkeys(map(os.path.realpath, named)))


def _try(parent: Path) -> Place:
    free_bytes = durable.free_bytes(parent)
    if free_bytes < NEEDED_BYTES:
        raise StorageError(f"has {free_bytes} bytes free, and the demo needs {NEEDED_BYTES}")
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        # Others may look in: in some containers the attacks are made as another user.
        directory.chmod(0o755)
        return _probed(directory, is_ours=True)
    except BaseException:
        directory.rmdir()
        raise


def _probed(directory: Path, is_ours: bool) -> Place:
    probe = protection.probe(directory)
    return Place(directory, probe.filesystem, probe.protection, probe.why, probe.capability_missing, is_ours)


def _drop(places: list[Place]) -> None:
    for place in places:
        place.remove()


def _clear(descriptor: int) -> None:
    with contextlib.suppress(fsflags.UnsupportedFlagsError):
        fsflags.set_flag(descriptor, fsflags.IMMUTABLE, on=False)
        fsflags.set_flag(descriptor, fsflags.APPEND, on=False)
