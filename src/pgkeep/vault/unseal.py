"""Take a vault's protection away, and what it held with it: by descriptor, following nothing, never leaving the root.

Only for whoever gives the vault up on purpose; expiry has its own way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from pgkeep.adapters import durable, fsflags, lock
from pgkeep.domain.manifest import Protection
from pgkeep.errors import NotFoundError, RefusedError, StorageError, UsageError
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, moved
from pgkeep.vault.layout import IDENTITY_NAME, SEALED_DIRECTORIES, Layout, Vault, is_flagged, read_identity

# pgkeep's own directories lie three deep; deeper ones are somebody else's and are brought up before they are entered.
DEPTH_LIMIT = 64
# mkfs makes it, and keeps it for root.
LOST_AND_FOUND = "lost+found"
_OWNER_RIGHTS = 0o700


@dataclasses.dataclass(frozen=True, slots=True)
class Removal:
    """What is to be removed (or was): the vault, its directories, those of them that stay for a reason."""

    id: str
    backups: int
    cleared: tuple[Path, ...]
    removed: tuple[Path, ...]
    left: tuple[str, ...] = ()


def survey(layout: Layout, *, delete: bool) -> Removal:
    """What :func:`uninstall` would do. Raises ``NotFoundError``, ``FormatError``, ``RefusedError``."""
    if not layout.exists:
        raise NotFoundError(f"there is no vault under {layout.root}", "check PGKEEP_ROOT, or --root")
    require_own(layout)
    manifests = (layout.active.glob(f"{name}/*.manifest.json") for name in SEALED_DIRECTORIES)
    return Removal(
        id=read_identity(layout).id,
        backups=sum(1 for each in manifests for _ in each),
        cleared=(layout.active, layout.logs, layout.state),
        removed=(layout.active, layout.state, layout.staging) if delete else (),
    )


def uninstall(layout: Layout, identifier: str, *, delete: bool, wait_seconds: float, progress: Progress) -> Removal:
    """Lift every flag of the vault, then remove it where ``delete`` says so; the logs stay.

    Raises ``UsageError`` (another vault's id), ``BusyError``, ``ProtectionError`` (the capability is missing, and
    nothing was done), ``StorageError``, and as :func:`survey`.
    """
    planned = survey(layout, delete=delete)
    if identifier != planned.id:
        raise UsageError(f"the vault under {layout.root} is {planned.id}, not {identifier}", "nothing was done")
    with lock.locked(layout.lock, wait_seconds, lambda holder: progress.note(f"waiting for {holder}")):
        with durable.explain(layout.active, "lifting the protection"):
            # Room for the record, on a disk that is full.
            layout.reserve.unlink(missing_ok=True)
        vault = Vault(layout, _protection(layout))
        progress.step("uninstall.started")
        audit_log.record(vault, "protection removed", id=planned.id, backups=planned.backups, delete=delete)
        progress.step("uninstall.audited")
        for directory in planned.cleared:
            clear(directory, progress)
        if not delete:
            return planned
        left = remove_vault(layout, progress)
    return dataclasses.replace(planned, left=tuple(left))


def clear(top: Path, progress: Progress) -> None:
    """No immutable and no append-only flag is left beneath, and every directory is open to its owner.

    What is somebody else's and closed to us carries no flag of ours: a warning, and on.
    Raises ``ProtectionError``, ``StorageError``.
    """
    with durable.explain(top, "lifting the protection"), fsflags.opened(top) as descriptor:
        _clear_directory(descriptor, os.fstat(descriptor).st_dev, 0, progress)


def remove_vault(layout: Layout, progress: Progress, *, logs: bool = False) -> list[str]:
    """Remove a vault whose flags are lifted; its lock is held by the caller and goes last but for the identity.

    What is not the vault's to remove stays, and is returned in words. Raises ``StorageError``, ``RefusedError``.
    """
    left = [] if logs else list(_emptied(layout.staging, progress))
    remove_content(layout.active, progress, frozenset({IDENTITY_NAME}))
    if logs:
        remove_content(layout.logs, progress)
    remove_content(layout.state, progress, frozenset({layout.lock.name, moved.NAME}))
    progress.step("unseal.emptied")
    with durable.explain(layout.active, "removing the vault"):
        for path in (layout.active / IDENTITY_NAME, layout.state / moved.NAME, layout.lock):
            path.unlink(missing_ok=True)
    directories = (layout.active, layout.state, layout.staging, *((layout.logs, layout.root) if logs else ()))
    return left + [text for directory in directories for text in _removed(directory)]


def remove_content(top: Path, progress: Progress, keep: frozenset[str] = frozenset()) -> None:
    """Everything in the directory but ``keep``; none at all is fine. Raises ``StorageError``, ``RefusedError``."""
    if not top.exists():
        return
    with durable.explain(top, "removing what is there"), fsflags.opened(top) as descriptor:
        for name in sorted(set(os.listdir(descriptor)) - keep - {LOST_AND_FOUND}):
            remove_entry(descriptor, name)
            progress.step("unseal.removed-one")
        os.fsync(descriptor)


def remove_entry(directory: int, name: str) -> None:
    """Whatever stands under that name, flags or not; nothing there is fine. Raises ``OSError``, ``RefusedError``."""
    pending = [name]
    while pending:
        _remove(directory, pending[-1], _Top(directory, os.fstat(directory).st_dev, pending), 0)
        if not _lexists(directory, pending[-1]):
            pending.pop()


@dataclasses.dataclass(frozen=True, slots=True)
class _Top:
    """Where a removal began, its filesystem, and what is still to be removed there."""

    directory: int
    device: int
    pending: list[str]


def _remove(directory: int, name: str, top: _Top, depth: int) -> None:
    try:
        facts = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(facts.st_mode):
        _unlink(directory, name)
        return
    if facts.st_dev != top.device:
        raise RefusedError(f"{fsflags.path_of(directory)}/{name} is another filesystem", "unmount it first")
    with below(directory, name) as inner:
        _open_up(inner)
        if depth < DEPTH_LIMIT:
            for each in os.listdir(inner):
                _remove(inner, each, top, depth + 1)
    if depth < DEPTH_LIMIT:
        os.rmdir(name, dir_fd=directory)
    else:
        _bring_up(directory, name, top)


def _bring_up(directory: int, name: str, top: _Top) -> None:
    """A directory that is nested without end goes to the top, to be removed from there."""
    higher = f"{durable.TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    os.rename(name, higher, src_dir_fd=directory, dst_dir_fd=top.directory)
    top.pending.insert(0, higher)


def _lexists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _unlink(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except PermissionError:
        with contextlib.suppress(OSError, RefusedError), opened_regular(directory, name) as descriptor:
            _lift_flags(descriptor)
        os.unlink(name, dir_fd=directory)


def _clear_directory(directory: int, device: int, depth: int, progress: Progress) -> None:
    _open_up(directory)
    for name in sorted(os.listdir(directory)):
        if depth or name != LOST_AND_FOUND:
            try:
                _clear_entry(directory, name, device, depth, progress)
            except PermissionError as error:
                progress.warn(f"{fsflags.path_of(directory)}/{name} stays as it is: {error.strerror}")
    progress.step("unseal.directory-cleared")


def _clear_entry(directory: int, name: str, device: int, depth: int, progress: Progress) -> None:
    facts = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISREG(facts.st_mode):
        with opened_regular(directory, name) as descriptor:
            _lift_flags(descriptor)
    elif stat.S_ISDIR(facts.st_mode) and facts.st_dev == device and depth < DEPTH_LIMIT:
        with below(directory, name) as inner:
            _clear_directory(inner, device, depth + 1, progress)


def _open_up(directory: int) -> None:
    _lift_flags(directory)
    mode = stat.S_IMODE(os.fstat(directory).st_mode)
    if mode & _OWNER_RIGHTS != _OWNER_RIGHTS:
        os.fchmod(directory, mode | _OWNER_RIGHTS)


def _lift_flags(descriptor: int) -> None:
    with contextlib.suppress(fsflags.UnsupportedFlagsError):
        for flag in (fsflags.IMMUTABLE, fsflags.APPEND):
            fsflags.set_flag(descriptor, flag, on=False)


def _protection(layout: Layout) -> Protection:
    """What there is to lift. Raises ``ProtectionError`` where this process may not."""
    if not is_flagged(layout.active):
        return "mode"
    with fsflags.opened(layout.active) as directory, fsflags.lifted(directory):
        return "chattr"


def require_own(layout: Layout) -> None:
    """Raises ``RefusedError`` where one of the root's directories is a link: what it leads to is not the root's."""
    for directory in (layout.active, layout.state, layout.logs, layout.staging):
        if directory.is_symlink():
            hint = f"lift the flags by hand: chattr -R -i -a {directory.resolve()}"
            raise RefusedError(f"{directory} is a symbolic link: pgkeep removes nothing outside {layout.root}", hint)


def _emptied(staging: Path, progress: Progress) -> Iterator[str]:
    """Staging is the agent's: where the vault may only read it, it stays."""
    try:
        remove_content(staging, progress)
    except StorageError as error:
        yield f"{staging}: {error.message}"


def _removed(directory: Path) -> Iterator[str]:
    """A mount point, or a name in a directory of another's, can't be removed from here; it is empty."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        yield f"{directory} stays: {error.strerror}"


@contextlib.contextmanager
def below(directory: int, name: str) -> Iterator[int]:
    """A descriptor of a directory in a directory; a link is not followed. Raises ``OSError``."""
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened_regular(directory: int, name: str) -> Iterator[int]:
    """As :func:`open_regular`, closed at the end of the block."""
    descriptor = open_regular(directory, name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened_path(path: Path) -> Iterator[int]:
    """As :func:`opened_regular`, for a file whose directory is above suspicion."""
    with fsflags.opened(path.parent) as directory, opened_regular(directory, path.name) as descriptor:
        yield descriptor


def open_regular(directory: int, name: str) -> int:
    """A file in a directory, for reading; a link is not followed. Raises ``OSError``, ``RefusedError``."""
    descriptor = open_any(directory, name)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise RefusedError(f"{fsflags.path_of(directory)}/{name} is no regular file any more", "find out who changed it")


def open_any(directory: int, name: str) -> int:
    """Whatever stands there, but a link; a FIFO is not waited for. Raises ``OSError``."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=directory)
