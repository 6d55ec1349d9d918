"""Attacks on sealed files: real system calls, and the kernel's answers word for word."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import pwd
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pgkeep.adapters import scratch_cluster
from pgkeep.adapters.process import Identity
from pgkeep.domain.manifest import Protection

SUCCEEDED = "it went through"
_SCENE = "attacker"
# The flag answers EPERM, modes answer EACCES; anything else is a refusal for a reason that is not protection.
_REFUSALS: dict[Protection, frozenset[int]] = {
    "chattr": frozenset({errno.EPERM}),
    "mode": frozenset({errno.EPERM, errno.EACCES}),
    "none": frozenset(),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Attack:
    """What was tried on which path beneath the root, whether the protection refused it, and in which words."""

    action: str
    target: str
    refused: bool
    words: str


@dataclasses.dataclass(frozen=True, slots=True)
class Onslaught:
    """All attacks, who made them, and the files that were not afterwards what they were before."""

    by: str
    attacks: tuple[Attack, ...]
    changed: tuple[str, ...]

    @property
    def withstood(self) -> bool:
        return bool(self.attacks) and all(attack.refused for attack in self.attacks) and not self.changed


def attack(root: Path, files: Sequence[Path], protection: Protection) -> Onslaught:
    """Attack sealed files and the directory that holds each; what goes through does real damage.

    Made as this process's user; as an unprivileged one where that is root and only modes protect, because root
    passes over modes. Raises ``OSError`` where the scene can't be set.
    """
    identity = scratch_cluster.unprivileged_identity() if protection != "chattr" else None
    before = {path: _identity_of(path) for path in files}
    with _scene(root, identity) as scene, _acting_as(identity):
        attacks = tuple(_all(root, files, scene, protection))
    changed = tuple(str(path.relative_to(root)) for path in files if _identity_of(path) != before[path])
    return Onslaught(_name(identity), attacks, changed)


def _all(root: Path, files: Sequence[Path], scene: Path, protection: Protection) -> Iterator[Attack]:
    deeds: list[tuple[str, Path, Callable[[], object]]] = []
    for path in files:
        deeds += [(action, path, deed) for action, deed in _on_file(path, scene, protection).items()]
    for directory in dict.fromkeys(path.parent for path in files):
        deeds += [(action, directory, deed) for action, deed in _on_directory(directory).items()]
    for action, path, deed in deeds:
        refused, words = _outcome(path, deed, _REFUSALS[protection])
        yield Attack(action, str(path.relative_to(root)), refused, words)


def _on_file(path: Path, scene: Path, protection: Protection) -> dict[str, Callable[[], object]]:
    deeds: dict[str, Callable[[], object]] = {
        "overwrite": lambda: _write(path, 0),
        "append": lambda: _write(path, os.O_APPEND),
        "truncate": lambda: os.truncate(path, 0),
        "replace": lambda: os.rename(_forgery(scene), path),
        "rename": lambda: os.rename(path, path.with_name(path.name + ".gone")),
        "delete": lambda: os.unlink(path),
    }
    # Modes don't keep the owner from this: that is how they are weaker.
    return {"chmod": lambda: os.chmod(path, 0o666), **deeds} if protection == "chattr" else deeds


def _on_directory(directory: Path) -> dict[str, Callable[[], object]]:
    return {
        "add a file": lambda: (directory / "2000-01-01_00-00-00.sql.gz").touch(exist_ok=False),
        "rename": lambda: os.rename(directory, directory.with_name(directory.name + ".gone")),
        "remove": lambda: shutil.rmtree(directory),
    }


def _outcome(path: Path, deed: Callable[[], object], refusals: frozenset[int]) -> tuple[bool, str]:
    try:
        os.lstat(path)
    except OSError as error:
        return False, f"out of reach: {error.strerror}"
    try:
        deed()
    except OSError as error:
        return error.errno in refusals, error.strerror or str(error)
    return False, SUCCEEDED


def _write(path: Path, more_flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | more_flags)
    try:
        os.write(descriptor, b"x")
    finally:
        os.close(descriptor)


def _forgery(scene: Path) -> Path:
    forged = scene / "forged.sql.gz"
    forged.write_bytes(b"forged")
    return forged


@contextlib.contextmanager
def _scene(root: Path, identity: Identity | None) -> Iterator[Path]:
    """A directory of the attacker's own on the same filesystem, so that renames from it can work."""
    scene = root / _SCENE
    scene.mkdir(mode=0o700)
    try:
        if identity is not None:
            os.chown(scene, identity.uid, identity.gid)
        yield scene
    finally:
        shutil.rmtree(scene)


@contextlib.contextmanager
def _acting_as(identity: Identity | None) -> Iterator[None]:
    """Give up root's rights for the block: the kernel judges by the effective ids."""
    if identity is None:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(identity.gid)
    os.seteuid(identity.uid)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        os.setegid(os.getgid())
        os.setgroups(groups)


def _name(identity: Identity | None) -> str:
    uid = os.geteuid() if identity is None else identity.uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _identity_of(path: Path) -> tuple[int, int, str] | None:
    """Inode, mode and digest; None where there is no such file any more."""
    try:
        status = path.lstat()
        with path.open("rb") as file:
            return status.st_ino, status.st_mode, hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
