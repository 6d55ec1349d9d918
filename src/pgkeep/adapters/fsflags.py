"""The inode flags that ``chattr`` sets: immutable and append-only.

Through ``FS_IOC_GETFLAGS`` and ``FS_IOC_SETFLAGS`` (ioctl_iflags(2), linux/fs.h), always read, modify,
write, read back. The read-back decides: ext4 has been seen to return an error and still set the flag.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pgkeep.errors import ProtectionError

Place = int | Path
"""A directory: an open descriptor of it, or its path."""

IMMUTABLE: Final = 0x00000010
APPEND: Final = 0x00000020
FLAG_NAMES: Final = {IMMUTABLE: "immutable", APPEND: "append-only"}

CAPABILITY_HINT: Final = (
    "in a container: give the vault service `cap_add: [LINUX_IMMUTABLE]` in the Compose file; outside containers: "
    "run as root. In a user namespace (rootless containers, userns-remap) the flag can never be set"
)
UNSUPPORTED_HINT: Final = "keep active/ on ext4, xfs or btrfs, or accept a weaker protection in the configuration"

# Filesystems differ in how they say that they know no flags; ntfs-3g says EINVAL.
_UNSUPPORTED: Final = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_DENIED: Final = frozenset({errno.EPERM, errno.EACCES})
_CAP_LINUX_IMMUTABLE: Final = 9


class MissingCapabilityError(ProtectionError):
    """The filesystem knows the flag, and the kernel won't let this process set or clear it."""


class UnsupportedFlagsError(ProtectionError):
    """The filesystem knows no such flags."""


def _request_numbers() -> tuple[int, int]:
    """The two ioctl numbers; a few architectures lay their bits out differently (asm/ioctl.h)."""
    odd = platform.machine().startswith(("ppc", "mips", "sparc", "alpha"))
    read, write, shift = (2, 4, 29) if odd else (2, 1, 30)
    body = (struct.calcsize("l") << 16) | (ord("f") << 8)
    return (read << shift) | body | 1, (write << shift) | body | 2


_GETFLAGS, _SETFLAGS = _request_numbers()


def path_of(place: Place) -> str:
    """The path, or the one behind a descriptor: for messages only, it may have moved since."""
    if isinstance(place, Path):
        return str(place)
    try:
        return os.readlink(f"/proc/self/fd/{place}")
    except OSError:  # no /proc: the message then says less
        return f"descriptor {place}"


@contextmanager
def opened(place: Place) -> Iterator[int]:
    """A descriptor of the directory: the given one, or one of our own that is closed afterwards."""
    if isinstance(place, int):
        yield place
        return
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def get_flags(fd: int) -> int:
    """All inode flags of an open file or directory.

    Raises ``UnsupportedFlagsError`` where the filesystem has none, ``ProtectionError`` otherwise.
    """
    # The request is declared with a long, and the kernel fills an int: zeroed room for both.
    room = bytearray(struct.calcsize("l"))
    try:
        fcntl.ioctl(fd, _GETFLAGS, room)
    except OSError as error:
        raise _explained(error, fd, "reading the inode flags") from error
    return int(struct.unpack_from("=I", room)[0])


def has_flag(fd: int, flag: int) -> bool:
    """Is the flag set on this open file or directory? Raises as :func:`get_flags`."""
    return bool(get_flags(fd) & flag)


def set_flag(fd: int, flag: int, on: bool) -> None:
    """Set or clear ``IMMUTABLE`` or ``APPEND``; other flags stay as they are. Not durable until an fsync.

    Raises ``MissingCapabilityError``, ``UnsupportedFlagsError``, or ``ProtectionError`` when the kernel
    agreed and the flag reads back unchanged.
    """
    before = get_flags(fd)
    wanted = before | flag if on else before & ~flag
    if wanted == before:
        return
    refusal = _write_flags(fd, wanted)
    if has_flag(fd, flag) == on:
        return
    doing = f"{'setting' if on else 'clearing'} the {FLAG_NAMES.get(flag, hex(flag))} flag"
    if refusal is not None:
        raise _explained(refusal, fd, doing) from refusal
    raise ProtectionError(f"{doing} of {path_of(fd)} was accepted and changed nothing", UNSUPPORTED_HINT)


def set_path_flag(path: Path, flag: int, on: bool) -> None:
    """As :func:`set_flag`, for a regular file by its path; links are not followed. Raises ``OSError`` too."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        set_flag(fd, flag, on)
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def lifted(directory_fd: int, flag: int = IMMUTABLE) -> Iterator[None]:
    """Clear the flag for the body; set and fsync it afterwards, whatever happened in the body.

    The flag is set afterwards even if it was not before: a process killed inside an earlier body leaves
    the directory open, and the next use closes it. Raises as :func:`set_flag`, and ``OSError`` from the
    fsync; a failure to set it again wins over an error of the body, which stays visible as its context.
    """
    try:
        set_flag(directory_fd, flag, on=False)
        yield
    finally:
        _restore(directory_fd, flag)


def _restore(directory_fd: int, flag: int) -> None:
    try:
        set_flag(directory_fd, flag, on=True)
    except (KeyboardInterrupt, SystemExit):
        # An interrupt may land in the middle of this very cleanup: finish it first.
        set_flag(directory_fd, flag, on=True)
        raise
    os.fsync(directory_fd)


def _write_flags(fd: int, flags: int) -> OSError | None:
    """Hand the flags to the kernel. An error is returned, not raised: the read-back decides."""
    try:
        fcntl.ioctl(fd, _SETFLAGS, struct.pack("=I", flags).ljust(struct.calcsize("l"), b"\0"))
    except OSError as error:
        return error
    return None


def _explained(error: OSError, fd: int, doing: str) -> ProtectionError:
    where = path_of(fd)
    if error.errno in _UNSUPPORTED:
        message = f"{doing} of {where}: the filesystem has no such flags ({os.strerror(error.errno or 0)})"
        return UnsupportedFlagsError(message, UNSUPPORTED_HINT)
    if error.errno in _DENIED:
        return MissingCapabilityError(f"{doing} of {where} was refused: {_reason()}", CAPABILITY_HINT)
    return ProtectionError(f"{doing} of {where} failed: {os.strerror(error.errno or 0)}")


def _reason() -> str:
    """Why the kernel said EPERM, as far as this process can tell."""
    if not _holds_capability():
        return "this process lacks the capability CAP_LINUX_IMMUTABLE"
    if _in_user_namespace():
        return "this process is in a user namespace, whose capabilities don't reach inode flags"
    return "the kernel denies it although the capability is there (is the file somebody else's?)"


def _holds_capability() -> bool:
    effective = [line for line in _proc_lines("status") if line.startswith("CapEff:")]
    return bool(effective) and bool(int(effective[0].split()[1], 16) >> _CAP_LINUX_IMMUTABLE & 1)


def _in_user_namespace() -> bool:
    """The first user namespace maps every uid to itself; any other maps something else."""
    return [line.split() for line in _proc_lines("uid_map")] not in ([], [["0", "0", "4294967295"]])


def _proc_lines(name: str) -> list[str]:
    try:
        return Path("/proc/self", name).read_text().splitlines()
    except OSError:  # no /proc: the message then says less
        return []
