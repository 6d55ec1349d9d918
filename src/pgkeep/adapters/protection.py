"""Which protection a directory's filesystem really gives: decided by what a canary file withstands.

Neither the filesystem's name nor an errno is believed: some accept ``chmod`` and change nothing (exFAT,
ntfs-3g), and a flag that reads back as set protects nothing if a write still goes through.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal

from pgkeep.adapters.durable import UNNAMED_UNSUPPORTED, explain, filesystem_type, link_unnamed, unnamed_file
from pgkeep.adapters.fsflags import (
    APPEND,
    CAPABILITY_HINT,
    IMMUTABLE,
    UNSUPPORTED_HINT,
    MissingCapabilityError,
    Place,
    UnsupportedFlagsError,
    opened,
    path_of,
    set_flag,
)
from pgkeep.domain.manifest import Protection
from pgkeep.errors import PgkeepError, ProtectionError

Wanted = Literal["auto", "chattr", "mode", "none"]

CANARY_PREFIX: Final = ".pgkeep-canary-"
# A file on these lives in another layer than the one that is asked: flags and descriptors come apart.
_STACKED: Final = frozenset({"overlay", "aufs", "fuse.fuse-overlayfs", "fuse.unionfs"})
_STRENGTH: Final[dict[Protection, int]] = {"none": 0, "mode": 1, "chattr": 2}
_SEALED_MODE: Final = 0o440
_OPEN_MODE: Final = 0o600


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a directory's filesystem was seen to do for this process.

    ``protection`` is the strongest that holds, ``why`` says what was seen. ``capability_missing``: the
    filesystem knows the flag and only this process may not set it. ``append_only``: the ``+a`` flag holds.
    """

    protection: Protection
    why: str
    capability_missing: bool
    hard_links: bool
    unnamed_files: bool
    filesystem: str
    append_only: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """The protection to use, and what a person must know about it (empty: nothing)."""

    protection: Protection
    warning: str = ""


@dataclass(frozen=True, slots=True)
class _Trial:
    """The outcome of one flag's trial: does it hold, what was seen, is it only the capability that is missing."""

    holds: bool
    why: str
    capability_missing: bool = False


def probe(directory: Place) -> Probe:
    """Try on a canary file in the directory what its filesystem protects; about a dozen system calls.

    The directory must be writable (``active/.incoming``, not a sealed tier). Leftovers of a probe that was
    killed are removed first. Raises ``ProtectionError`` on overlayfs, ``StorageError`` where it can't write.
    """
    with explain(path_of(directory), "probing the protection"), opened(directory) as directory_fd:
        filesystem = filesystem_type(directory_fd)
        if filesystem in _STACKED:
            raise ProtectionError(
                f"{path_of(directory)} is on {filesystem}: files there can't be protected",
                "put it on a volume: a named volume or a bind mount in the Compose file",
            )
        _sweep_canaries(directory_fd)
        with _canary(directory_fd) as canary:
            return _try_all(canary, filesystem)


def choose(found: Probe, wanted: Wanted, is_root: bool) -> Choice:
    """Decide the protection to use: pure. Raises ``ProtectionError`` where what is wanted can't be had.

    ``auto`` takes the strongest, but never lets root go on without a mere capability: that is a
    configuration to mend, not a filesystem's limit. A weaker protection than possible may be asked for.
    """
    if wanted == "auto":
        if found.capability_missing and is_root:
            raise ProtectionError(f"the immutable flag can't be set: {found.why}", CAPABILITY_HINT)
        return Choice(found.protection, "" if found.protection == "chattr" else _weak(found.protection, found))
    if _STRENGTH[wanted] > _STRENGTH[found.protection]:
        hint = CAPABILITY_HINT if found.capability_missing and wanted == "chattr" else UNSUPPORTED_HINT
        raise ProtectionError(f"protection {wanted!r} can't be had on {found.filesystem}: {found.why}", hint)
    if wanted == found.protection:
        return Choice(wanted, "" if wanted == "chattr" else _weak(wanted, found))
    return Choice(wanted, f"protection {wanted!r} is weaker than {found.protection!r}, which would hold here")


def _weak(protection: Protection, found: Probe) -> str:
    means = {
        "mode": "backups are read-only, not immutable: their owner and root can still change or delete them",
        "none": "backups are not protected at all: whoever can write there can change or delete them",
    }[protection]
    return f"{means} ({found.why})"


@dataclass(frozen=True, slots=True)
class _Canary:
    """A file to try things on; every name made for it starts with ``name``."""

    directory_fd: int
    fd: int
    name: str

    @property
    def other_name(self) -> str:
        return f"{self.name}.other"

    def unnamed(self, message: str) -> str:
        """The message about the directory instead of the canary, which nobody will find there."""
        return message.replace(f"/{self.name}", "")


@contextmanager
def _canary(directory_fd: int) -> Iterator[_Canary]:
    name = f"{CANARY_PREFIX}{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, _OPEN_MODE, dir_fd=directory_fd)
    canary = _Canary(directory_fd, fd, name)
    try:
        # Held while we live: another probe's sweep leaves a canary alone that somebody has locked.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield canary
    finally:
        try:
            _remove(canary)
        finally:
            os.close(fd)


def _remove(canary: _Canary) -> None:
    _clear_flags(canary.fd)
    for name in (canary.name, canary.other_name):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=canary.directory_fd)


def _clear_flags(fd: int) -> None:
    try:
        set_flag(fd, IMMUTABLE, on=False)
        set_flag(fd, APPEND, on=False)
    except UnsupportedFlagsError:
        return  # then none was set


def _sweep_canaries(directory_fd: int) -> None:
    for name in os.listdir(directory_fd):
        if name.startswith(CANARY_PREFIX):
            _sweep_canary(directory_fd, name)


def _sweep_canary(directory_fd: int, name: str) -> None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    except (FileNotFoundError, PermissionError):
        return  # its own probe has just removed it, or it is another user's
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear_flags(fd)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory_fd)
    except (BlockingIOError, PermissionError, MissingCapabilityError):
        return  # a probe under way in another process, or a leftover of one with more rights: it does no harm
    finally:
        os.close(fd)


def _try_all(canary: _Canary, filesystem: str) -> Probe:
    # The flags come last: a filesystem on which they don't hold may lose the canary to the trial.
    hard_links = _has_hard_links(canary)
    unnamed_files = _has_unnamed_files(canary)
    mode_holds = _honours_modes(canary)
    append_only = _try_flag(canary, APPEND, _attacks_on_appendable(canary))
    immutable = _try_flag(canary, IMMUTABLE, _attacks_on_immutable(canary))
    protection: Protection = "chattr" if immutable.holds else "mode" if mode_holds else "none"
    return Probe(
        protection=protection,
        why=immutable.why if protection != "none" else f"{immutable.why}; file modes are not honoured either",
        capability_missing=immutable.capability_missing,
        hard_links=hard_links,
        unnamed_files=unnamed_files,
        filesystem=filesystem,
        append_only=append_only.holds,
    )


def _has_hard_links(canary: _Canary) -> bool:
    here = canary.directory_fd
    try:
        os.link(canary.name, canary.other_name, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
            return False
        raise
    os.unlink(canary.other_name, dir_fd=here)
    return True


def _has_unnamed_files(canary: _Canary) -> bool:
    """Can a file be made without a name and be given one afterwards?"""
    try:
        fd = unnamed_file(canary.directory_fd)
    except OSError as error:
        if error.errno in UNNAMED_UNSUPPORTED:
            return False
        raise
    try:
        link_unnamed(fd, canary.directory_fd, canary.other_name)
        os.unlink(canary.other_name, dir_fd=canary.directory_fd)
    except PgkeepError:  # whatever keeps it from being linked: it is of no use here
        return False
    finally:
        os.close(fd)
    return True


def _honours_modes(canary: _Canary) -> bool:
    """Two different modes, each read back: one alone might be what the mount shows for everything."""
    for mode in (_SEALED_MODE, _OPEN_MODE):
        try:
            os.chmod(canary.name, mode, dir_fd=canary.directory_fd)
        except OSError as error:
            if error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
                return False
            raise
        seen = os.stat(canary.name, dir_fd=canary.directory_fd, follow_symlinks=False)
        if stat.S_IMODE(seen.st_mode) != mode:
            return False
    return True


def _try_flag(canary: _Canary, flag: int, attacks: dict[str, Callable[[], None]]) -> _Trial:
    try:
        set_flag(canary.fd, flag, on=True)
    except MissingCapabilityError as error:
        return _Trial(False, canary.unnamed(error.message), capability_missing=True)
    except ProtectionError as error:
        return _Trial(False, canary.unnamed(error.message))
    survived = [name for name, attack in attacks.items() if not _is_refused(attack)]
    _clear_flags(canary.fd)
    if survived:
        return _Trial(False, f"the flag was set and did not prevent: {', '.join(survived)}")
    return _Trial(True, f"with the flag set the kernel refused: {', '.join(attacks)}")


def _attacks_on_immutable(canary: _Canary) -> dict[str, Callable[[], None]]:
    here, name, other = canary.directory_fd, canary.name, canary.other_name
    return {
        "write": lambda: _open_for_writing(here, name),
        "chmod": lambda: os.chmod(name, _SEALED_MODE, dir_fd=here),
        "link": lambda: os.link(name, other, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False),
        "rename": lambda: os.rename(name, other, src_dir_fd=here, dst_dir_fd=here),
        "unlink": lambda: os.unlink(name, dir_fd=here),
    }


def _attacks_on_appendable(canary: _Canary) -> dict[str, Callable[[], None]]:
    # Append-only refuses links as immutable does, but that is no part of what it is needed for.
    wanted = {"write", "rename", "unlink"}
    return {name: attack for name, attack in _attacks_on_immutable(canary).items() if name in wanted}


def _open_for_writing(directory_fd: int, name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd))


def _is_refused(attack: Callable[[], None]) -> bool:
    try:
        attack()
    except OSError as error:
        # A flag answers EPERM; anything else (EACCES, ENOENT after a rename that worked) is another reason.
        return error.errno == errno.EPERM
    return False
