"""Files that survive a crash, are never overwritten, and are opened only where they should be.

Every fsync failure is raised: after one the kernel may have dropped the pages, and a second fsync that
succeeds proves nothing (fsync(2)).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from pgkeep.adapters.fsflags import Place, opened, path_of
from pgkeep.errors import IntegrityError, NotFoundError, RefusedError, StorageError

TEMPORARY_PREFIX: Final = ".pgkeep-temporary-"
COPY_BLOCK_BYTES: Final = 1024 * 1024

# linux/openat2.h, linux/fs.h, linux/falloc.h, fcntl.h; the call's number differs on alpha only.
_SYS_OPENAT2: Final = 437
_RESOLVE_BENEATH_WITHOUT_SYMLINKS: Final = 0x08 | 0x04 | 0x02
_RENAME_NOREPLACE: Final = 1
_AT_EMPTY_PATH: Final = 0x1000
_FALLOC_KEEP_SIZE_PUNCH_HOLE: Final = 0x01 | 0x02

_ABSENT: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY})
# Kernels without O_TMPFILE see an attempt to write to a directory.
UNNAMED_UNSUPPORTED: Final = _ABSENT | {errno.EISDIR, errno.ENOENT}
# A filesystem without hard links says EPERM (link(2)); so does an immutable directory, and a rename after it.
_NO_LINKS: Final = _ABSENT | {errno.EPERM, errno.EMLINK}
# EBADF: the target was opened for appending. EPERM: seccomp filters older than the call.
_NO_COPY_RANGE: Final = _ABSENT | {errno.EXDEV, errno.EBADF, errno.EPERM}
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

_REMEDIES: Final = {
    errno.ENOSPC: ("the disk is full", "make room on it (`pgkeep cleanup` removes what has expired) or enlarge it"),
    errno.EDQUOT: ("the disk quota is used up", "raise the quota, or free space that the same user holds"),
    errno.EROFS: ("the filesystem is read-only", "mount it read-write; disk errors cause this too: see dmesg"),
    errno.EACCES: ("permission denied", "give pgkeep's user the right to it (chown or chmod)"),
    errno.EPERM: ("operation not permitted", "look for a flag (lsattr), another owner, a missing capability"),
    errno.EIO: ("the device reports an input/output error", "check the disk (dmesg, smartctl) before anything else"),
    errno.EXDEV: ("the two places are on different filesystems or mounts", "mount their common parent as one volume"),
    errno.ENOENT: ("it does not exist", "check the path"),
    errno.EEXIST: ("it exists already", "nothing is ever overwritten: move it out of the way"),
    errno.ELOOP: ("a symbolic link stands where none may", "put the real file or directory there"),
}


# ---------------------------------------------------------------- errors, space


@contextmanager
def explain(path: Path | str, doing: str) -> Iterator[None]:
    """Turn an ``OSError`` of the body into a ``StorageError`` that names path, cause and remedy."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, doing) from error


def storage_error(error: OSError, path: Path | str, doing: str) -> StorageError:
    """The ``StorageError`` for an ``OSError``; for a full disk with the bytes and inodes still free."""
    cause, hint = _REMEDIES.get(error.errno or 0, (error.strerror or str(error), ""))
    space = _space_left(Path(path)) if error.errno in _FULL else ""
    return StorageError(f"{doing} failed at {path}: {cause}{space}", hint)


def is_full(error: StorageError) -> bool:
    """Is it for want of space (or of quota)?"""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL


def _space_left(path: Path) -> str:
    for place in (path, *path.parents):
        try:
            facts = os.statvfs(place)
        except OSError:  # the path itself may not exist: its parent says the same
            continue
        return f" ({facts.f_bavail * facts.f_frsize} bytes and {facts.f_favail} inodes are free)"
    return ""


def free_bytes(path: Place) -> int:
    """Bytes that an ordinary user may still write there; root's reserve is not counted."""
    with explain(path_of(path), "reading the free space"):
        facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def filesystem_type(path: Place) -> str:
    """The filesystem's name as mount(8) shows it: ``ext4``, ``overlay``, ``fuseblk``…; ``unknown`` if hidden.

    By mount identity (fdinfo's ``mnt_id`` in mountinfo, proc(5)): device numbers mislead on btrfs and overlayfs.
    """
    with explain(path_of(path), "finding the filesystem's type"), opened(path) as fd:
        fdinfo = Path(f"/proc/self/fdinfo/{fd}").read_text()
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    mount_id = next(line.split()[1] for line in fdinfo.splitlines() if line.startswith("mnt_id:"))
    for line in mounts.splitlines():
        if line.split(" ", 1)[0] == mount_id:
            return line.partition(" - ")[2].split()[0]
    return "unknown"


def fsync_file(fd: int) -> None:
    """Content and size are on the disk afterwards. Raises ``OSError``; then the file must be written anew."""
    os.fsync(fd)


def fsync_directory(place: Place) -> None:
    """The directory's names are on the disk afterwards. Raises ``OSError``."""
    with opened(place) as fd:
        os.fsync(fd)


def write_atomically(directory: Place, name: str, data: bytes, mode: int = 0o644) -> None:
    """Write a small file: afterwards the name holds the old content or the new, whole and durable.

    Replaces what the name held. Raises ``StorageError``; the temporary file is then gone.
    """
    require_plain(name)
    with explain(f"{path_of(directory)}/{name}", "writing the file"), opened(directory) as directory_fd:
        fd, temporary = _named_temporary(directory_fd)
        try:
            write_all(fd, data)
            os.fchmod(fd, mode)
            os.fsync(fd)
            os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except BaseException:
            with suppress(FileNotFoundError):  # an interrupt may come just after the rename
                os.unlink(temporary, dir_fd=directory_fd)
            raise
        finally:
            os.close(fd)
        os.fsync(directory_fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte; ``os.write`` may stop short. Raises ``OSError``."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def is_temporary(name: str) -> bool:
    """Is it a name that only a killed writer leaves behind? To be removed by whoever holds the lock there."""
    return name.startswith(TEMPORARY_PREFIX)


def require_plain(name: str) -> None:
    """Raises ``RefusedError`` unless the name is one component, and not ``.`` or ``..``."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise RefusedError(f"{name!r} is not a plain file name")


def _named_temporary(directory_fd: int, mode: int = 0o600) -> tuple[int, str]:
    name = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, mode, dir_fd=directory_fd), name


def unnamed_file(directory_fd: int, mode: int = 0o600) -> int:
    """A file without a name (``O_TMPFILE``): gone with its descriptor unless linked. Raises ``OSError``."""
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=directory_fd)


def link_unnamed(fd: int, directory_fd: int, name: str) -> None:
    """Give the open file this (further) name; never overwrites.

    Raises ``RefusedError`` where the name is taken, ``StorageError`` otherwise.
    """
    require_plain(name)
    with _never_overwriting(directory_fd, name):
        _link_descriptor(fd, directory_fd, name)


class NewFile:
    """A file in the making: nobody sees it under its final name before :meth:`publish`.

    Without a name at all where the filesystem can (``O_TMPFILE``), else under a temporary name in the
    incoming directory. Use as a context manager: what is not published vanishes.
    """

    def __init__(self, fd: int, temporary: str | None, incoming_fd: int) -> None:
        self.fd = fd
        self._incoming_fd = incoming_fd
        self._temporary = temporary
        self._has_its_only_name = False

    @classmethod
    def create(cls, directory_fd: int, incoming_fd: int, mode: int = 0o600) -> Self:
        """A new, empty file, open for reading and writing; ``incoming_fd`` must outlive it. Raises ``StorageError``."""
        with explain(path_of(incoming_fd), "creating a file"):
            if os.fstat(directory_fd).st_dev != os.fstat(incoming_fd).st_dev:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            try:
                return cls(unnamed_file(incoming_fd, mode), None, incoming_fd)
            except OSError as error:
                if error.errno not in UNNAMED_UNSUPPORTED:
                    raise
            return cls(*_named_temporary(incoming_fd, mode), incoming_fd)

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    @property
    def is_unnamed(self) -> bool:
        """It began without a name (``O_TMPFILE``): it can be published under several."""
        return self._temporary is None and not self._has_its_only_name

    @property
    def can_be_published_again(self) -> bool:
        """False once a file that began under a temporary name was published: a second name needs a copy.

        exFAT has no hard links, and ntfs-3g can't link a descriptor whose first name is gone.
        """
        return not self._has_its_only_name

    def publish(self, directory_fd: int, name: str) -> None:
        """fsync the file, give it this name without overwriting, fsync the directory.

        Raises ``RefusedError`` where the name is taken, ``StorageError`` otherwise. When the directory's fsync
        is what failed, the name is there and may not survive a crash.
        """
        require_plain(name)
        if self._has_its_only_name:
            raise StorageError(f"{name} can't be a second name of the same file: no such links here", "copy it")
        with explain(path_of(self.fd), "flushing to the disk"):
            os.fsync(self.fd)
        with _never_overwriting(directory_fd, name):
            self._name_it(directory_fd, name)
            os.fsync(directory_fd)

    def discard(self) -> None:
        """Close the descriptor; what was never published vanishes. May be called twice."""
        try:
            self._drop_temporary()
        finally:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def _name_it(self, directory_fd: int, name: str) -> None:
        try:
            _link_descriptor(self.fd, directory_fd, name)
        except OSError as error:
            if self._temporary is None or error.errno not in _NO_LINKS:
                raise
            _move_without_replacing(self._incoming_fd, self._temporary, directory_fd, name)
            self._temporary, self._has_its_only_name = None, True
        self._drop_temporary()

    def _drop_temporary(self) -> None:
        # Before anything makes the inode immutable: its temporary name could then not be removed.
        if self._temporary is not None:
            os.unlink(self._temporary, dir_fd=self._incoming_fd)
            self._temporary, self._has_its_only_name = None, True


@contextmanager
def _never_overwriting(directory_fd: int, name: str) -> Iterator[None]:
    path = f"{path_of(directory_fd)}/{name}"
    try:
        with explain(path, "publishing the file"):
            yield
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError):
            raise RefusedError(f"{path} exists already and is never overwritten") from error.__cause__
        raise


def _link_descriptor(fd: int, directory_fd: int, name: str) -> None:
    """linkat(2) by descriptor: through /proc, or with ``AT_EMPTY_PATH`` where /proc is not mounted."""
    if os.path.lexists(f"/proc/self/fd/{fd}"):
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory_fd, follow_symlinks=True)
    else:
        _checked(_libc().linkat(fd, b"", directory_fd, os.fsencode(name), _AT_EMPTY_PATH))


def _move_without_replacing(source_fd: int, source: str, target_fd: int, target: str) -> None:
    names = (source_fd, os.fsencode(source), target_fd, os.fsencode(target))
    try:
        _checked(_libc().renameat2(*names, _RENAME_NOREPLACE))
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        _move_under_lock(source_fd, source, target_fd, target)


def _move_under_lock(source_fd: int, source: str, target_fd: int, target: str) -> None:
    """Check and rename; only pgkeep's own processes are kept out in between, which is all exFAT can give."""
    own_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=source_fd)
    try:
        fcntl.flock(own_fd, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            os.stat(target, dir_fd=target_fd, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)
    finally:
        os.close(own_fd)


# ---------------------------------------------------------------- opening what others wrote


def open_beneath(directory_fd: int, relative_path: str, flags: int = os.O_RDONLY) -> int:
    """Open an existing regular file beneath the directory, following no symbolic link, waiting for no FIFO.

    Raises ``RefusedError`` for a link, ``..``, an absolute path or anything but a regular file,
    ``NotFoundError``, ``StorageError``.
    """
    parts = relative_path.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\0" in relative_path:
        raise RefusedError(f"{relative_path!r} does not name a file beneath the directory")
    safe = flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with _refusing_links(f"{path_of(directory_fd)}/{relative_path}"):
        try:
            fd = _openat2(directory_fd, relative_path, safe)
        except OSError as error:
            # EPERM: container runtimes older than the call forbid what they don't know.
            if error.errno not in {errno.ENOSYS, errno.EPERM}:
                raise
            fd = _open_by_component(directory_fd, parts, safe)
    return _require_regular(fd, relative_path)


@contextmanager
def _refusing_links(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist") from error
    except OSError as error:
        # ENXIO: a FIFO or socket opened for writing, or a socket at all.
        if error.errno in {errno.ELOOP, errno.EXDEV, errno.ENOTDIR, errno.ENXIO, errno.EISDIR}:
            reason = "a symbolic link, a way outside, or no regular file"
            raise RefusedError(f"{path} is not opened: {reason} ({error.strerror})") from error
        raise storage_error(error, path, "opening the file") from error


def _openat2(directory_fd: int, path: str, flags: int) -> int:
    how = (ctypes.c_uint64 * 3)(flags, 0, _RESOLVE_BENEATH_WITHOUT_SYMLINKS)
    number, size = ctypes.c_long(_SYS_OPENAT2), ctypes.c_size_t(ctypes.sizeof(how))
    return _checked(_libc().syscall(number, ctypes.c_int(directory_fd), os.fsencode(path), how, size))


def _open_by_component(directory_fd: int, parts: list[str], flags: int) -> int:
    """The same for kernels without openat2 (before 5.6): one component at a time."""
    here = os.dup(directory_fd)
    try:
        for part in parts[:-1]:
            step = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(part, step, dir_fd=here)
            os.close(here)
            here = below
        return os.open(parts[-1], flags, dir_fd=here)
    finally:
        os.close(here)


def _require_regular(fd: int, name: str) -> int:
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise RefusedError(f"{name} is not a regular file")


# ---------------------------------------------------------------- copying, holes, cache


def copy_range(source_fd: int, source_offset: int, target_fd: int, length_bytes: int) -> None:
    """Copy so many bytes to the target's present position, inside the kernel where it can (even by reflink).

    Raises ``IntegrityError`` where the source ends early, ``OSError`` otherwise.
    """
    end = source_offset + length_bytes
    try:
        while source_offset < end:
            copied = os.copy_file_range(source_fd, target_fd, min(end - source_offset, 2**30), source_offset)
            if copied == 0:
                break  # the end of the source, or a filesystem that answers 0 for "can't": reading decides
            source_offset += copied
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    _copy_by_reading(source_fd, source_offset, target_fd, end)


def _copy_by_reading(source_fd: int, offset: int, target_fd: int, end: int) -> None:
    while offset < end:
        block = os.pread(source_fd, min(end - offset, COPY_BLOCK_BYTES), offset)
        if not block:
            raise IntegrityError(f"{path_of(source_fd)} ends {end - offset} bytes too soon to be copied")
        write_all(target_fd, block)
        offset += len(block)


def punch_hole(fd: int, offset: int, length_bytes: int) -> bool:
    """Give the range's blocks back to the filesystem; the size stays. False where it can't. Raises ``OSError``."""
    if length_bytes == 0:
        return True
    try:  # c_int64 is off_t wherever long has 64 bits, and with musl
        _checked(
            _libc().fallocate(fd, _FALLOC_KEEP_SIZE_PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length_bytes))
        )
    except OSError as error:
        if error.errno in {errno.EOPNOTSUPP, errno.ENOSYS}:
            return False
        raise
    return True


def drop_cache(fd: int) -> None:
    """Let the file's clean pages go, so that the next read comes from the disk. Dirty pages stay."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- the C library


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
