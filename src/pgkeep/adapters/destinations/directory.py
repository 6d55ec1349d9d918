"""Copies in a directory: a disk of its own, or a share that the system has mounted (NFS, SMB, exFAT and the like)."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import NOT_A_FILE, Content, Listed, Lock, Probe
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, RefusedError, StorageError
from pgkeep.progress import Progress, Silent

MARKER_NAME: Final = ".pgkeep-destination.json"
_MARKER_LIMIT_BYTES: Final = 64 * 1024
_FOLDER_MODE: Final = 0o755
_BLOCK_BYTES: Final = 1024 * 1024
_TRIAL_BYTES: Final = 64 * 1024
# So much may wait in memory to be written: a slow share then can't hold one flush up for minutes.
_FLUSH_BYTES: Final = 32 * 1024 * 1024
# Of the vault's own disk, where the copies are on it: they are never deleted, and must not end the backups.
_SPARED_PART: Final = 0.1
# Filesystems without modes differ in how they say so; others agree and change nothing.
_NO_MODES: Final = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
# The medium, not the way to it: what is there can't be had back.
_DEFECTS: Final = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EILSEQ, errno.ENODATA})
_NO_DIRECTORY: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
_STEP_DOWN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class DirectoryDestination:
    """The destination ``path``; its files get ``mode``. ``vault`` is what it must not lie in, or hold."""

    kind = "directory"

    def __init__(self, path: Path, mode: int, vault: Path) -> None:
        self._path = path
        self._mode = mode
        self._vault = vault

    @property
    def label(self) -> str:
        return str(self._path)

    @contextlib.contextmanager
    def opened(self, *, to_read: bool = False) -> Iterator[DirectoryPlace]:
        """Held open to the end of the block: a share that is unmounted meanwhile is not written underneath."""
        root = self._open()
        try:
            if to_read:
                yield DirectoryPlace(self._path, root, self._mode, 0, [])
                return
            self._require_apart()
            self._require_writable(root)
            yield self._place(root)
        finally:
            os.close(root)

    def probe(self, progress: Progress) -> Probe:
        """Nothing is left behind: the file that is tried is removed again."""
        with self.opened() as place:
            place.try_out(progress)
            found = (
                f"{_TRIAL_BYTES} bytes were written to {self._path} ({durable.filesystem_type(self._path)}), "
                f"read back and removed; {place.free_bytes()} bytes are free",
                *place.warnings,
                "nothing locks copies in a directory: whoever can write there can change and remove them",
            )
        return Probe(ok=True, lock="none", findings=found)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = "is not a directory" if isinstance(error, NotADirectoryError) else "does not exist"
            hint = f"mount the destination there (in Compose: a volume `...:{self._path}`)"
            raise StorageError(f"the destination {self._path} {reason}", hint) from error
        except PermissionError as error:
            raise self._denied() from error
        except OSError as error:
            raise durable.storage_error(error, self._path, "opening the destination") from error

    def _require_apart(self) -> None:
        ours, theirs = self._path.resolve(), self._vault.resolve()
        nested = ours.is_relative_to(theirs) or theirs.is_relative_to(ours)
        # Mounted in two places it is the same directory all the same.
        if nested or (theirs.exists() and ours.samefile(theirs)):
            raise RefusedError(
                f"the destination {self._path} and the vault's {self._vault} are one place, or one holds the other",
                "give the copies a directory of their own, best on another machine",
            )

    def _require_writable(self, root: int) -> None:
        if os.fstatvfs(root).f_flag & os.ST_RDONLY:
            read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
            raise durable.storage_error(read_only, self._path, "opening the destination for copies") from read_only
        if not os.access(".", os.R_OK | os.W_OK | os.X_OK, dir_fd=root, effective_ids=True):
            raise self._denied()

    def _denied(self) -> StorageError:
        user, group = os.geteuid(), os.getegid()
        facts = self._path.stat()
        owner = f"it belongs to {facts.st_uid}:{facts.st_gid} with mode {stat.S_IMODE(facts.st_mode):04o}"
        return StorageError(
            f"the destination {self._path} can't be written by {user}:{group}: {owner}",
            f"on the host: `chown {user}:{group}` the directory that is mounted there; "
            f"an SMB share: mount it with uid={user},gid={group}",
        )

    def _place(self, root: int) -> DirectoryPlace:
        if not self._vault.exists() or os.fstat(root).st_dev != self._vault.stat().st_dev:
            return DirectoryPlace(self._path, root, self._mode, 0, [])
        warning = f"{self._path} is on the vault's own filesystem: these copies don't survive the loss of that disk"
        facts = os.fstatvfs(root)
        spared_bytes = int(facts.f_blocks * facts.f_frsize * _SPARED_PART)
        return DirectoryPlace(self._path, root, self._mode, spared_bytes, [warning])


class DirectoryPlace:
    """The opened directory. ``spared_bytes`` stay free there."""

    def __init__(self, path: Path, root: int, mode: int, spared_bytes: int, warnings: list[str]) -> None:
        self._path = path
        self._root = root
        self._mode = mode
        self._spared_bytes = spared_bytes
        self._warnings = warnings

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def read_marker(self) -> bytes | None:
        try:
            return self.read(MARKER_NAME, _MARKER_LIMIT_BYTES)
        except NotFoundError:
            return None

    def write_marker(self, data: bytes) -> None:
        durable.write_atomically(self._root, MARKER_NAME, data, 0o644)

    def sizes(self, files: Mapping[str, str]) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for folder in sorted({path.rpartition("/")[0] for path in files}):
            found |= {f"{folder}/{name}".lstrip("/"): size for name, size in self._listing(folder).items()}
        return {path: found[path] for path in files if path in found}

    def _listing(self, folder: str) -> Mapping[str, int]:
        try:
            with self._folder(folder) as directory, durable.explain(self._path / folder, "listing the copies"):
                return dict(_sizes(directory))
        except NotFoundError:
            return {}

    def files(self, folders: Iterable[str]) -> Iterator[Listed]:
        for folder in sorted(folders):
            within = [folder, *(f"{folder}/{name}" for name in self._folders_in(folder))]
            yield from sorted((file for each in within for file in self._files_in(each)), key=lambda file: file.path)

    def _files_in(self, folder: str) -> Iterator[Listed]:
        for name, size_bytes in self._listing(folder).items():
            if size_bytes != NOT_A_FILE:
                yield Listed(f"{folder}/{name}", size_bytes)

    def read(self, path: str, limit_bytes: int, version: str = "") -> bytes:
        with self._open_file(path) as descriptor, durable.explain(self._path / path, "reading the file"):
            data = b"".join(_blocks(descriptor, limit_bytes + 1))
        if len(data) > limit_bytes:
            raise FormatError(f"{self._path / path} is larger than {limit_bytes} bytes")
        return data

    @contextlib.contextmanager
    def opened_file(self, path: str, version: str = "") -> Iterator[DirectoryFile]:
        with self._open_file(path) as descriptor:
            yield DirectoryFile(self._path / path, descriptor)

    @contextlib.contextmanager
    def _open_file(self, path: str) -> Iterator[int]:
        try:
            descriptor = durable.open_beneath(self._root, path)
        except RefusedError as error:
            raise FormatError(error.message) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def content(self, path: str, progress: Progress, version: str = "") -> Content | None:
        try:
            descriptor = durable.open_beneath(self._root, path)
        except (NotFoundError, RefusedError):
            return None
        except StorageError as error:
            if _is_defect(error.__cause__):
                return None
            raise
        try:
            return _content(descriptor, progress)
        except OSError as error:
            if _is_defect(error):
                return None
            raise durable.storage_error(error, self._path / path, "reading the copy") from error
        finally:
            os.close(descriptor)

    def store(
        self,
        path: str,
        source: int,
        content: Content,
        progress: Progress,
        *,
        aside: str | None = None,
        retain_until: dt.datetime | None = None,
    ) -> str:
        folder, _, name = path.rpartition("/")
        self._require_room(path, content)
        with (
            self._folder(folder, make=True) as directory,
            durable.explain(self._path / path, "copying"),
            durable.NewFile.create(directory, directory) as new,
        ):
            progress.step("store.created")
            _copy(source, new.fd, content, progress)
            progress.step("store.written")
            self._close_to_writers(new.fd)
            os.fsync(new.fd)
            progress.step("store.flushed")
            if _content(new.fd, progress) != content:
                hint = "check the disk or the share (dmesg, smartctl) before anything else"
                raise StorageError(f"{self._path / path} gave back other bytes than were written", hint)
            progress.step("store.compared")
            if aside is not None:
                _rename(directory, name, aside)
                progress.step("store.moved-aside")
            new.publish(directory, name)
        progress.step("store.published")
        return ""

    def lock(self, path: str, version: str = "") -> Lock | None:
        return None

    def prolong(self, path: str, until: dt.datetime, version: str = "") -> None:
        """Nothing is locked here."""

    def secure(self, path: str, retain_until: dt.datetime | None, version: str = "") -> None:
        """There are no locks."""

    def remove(self, path: str, version: str = "") -> None:
        folder, _, name = path.rpartition("/")
        durable.require_plain(name)
        try:
            with self._folder(folder) as directory, durable.explain(self._path / path, "removing the file"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
                os.fsync(directory)
        except NotFoundError:
            return

    def free_bytes(self) -> int:
        return durable.free_bytes(self._root)

    def try_out(self, progress: Progress) -> None:
        """Copy something here as a backup would be, and remove it. Raises ``StorageError``."""
        name = f"{durable.TEMPORARY_PREFIX}trial-{secrets.token_hex(8)}"
        data = os.urandom(_TRIAL_BYTES)
        with open(os.memfd_create("pgkeep-trial"), "wb") as source:
            durable.write_all(source.fileno(), data)
            try:
                self.store(name, source.fileno(), Content(len(data), hashlib.sha256(data).hexdigest()), progress)
            finally:
                self.remove(name)

    def sweep(self, folders: Iterable[str]) -> list[str]:
        removed = self._sweep_folder("")
        for folder in folders:
            removed += self._sweep_folder(folder)
            for name in self._folders_in(folder):
                removed += self._sweep_folder(f"{folder}/{name}")
        return removed

    def _sweep_folder(self, folder: str) -> list[str]:
        removed = []
        try:
            with self._folder(folder) as directory, durable.explain(self._path / folder, "removing temporary files"):
                for name in filter(durable.is_temporary, os.listdir(directory)):
                    os.unlink(name, dir_fd=directory)
                    removed.append(f"{folder}/{name}".lstrip("/"))
        except NotFoundError:
            return []
        return removed

    def _folders_in(self, folder: str) -> list[str]:
        try:
            with self._folder(folder) as directory, durable.explain(self._path / folder, "listing the copies"):
                return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
        except NotFoundError:
            return []

    @contextlib.contextmanager
    def _folder(self, folder: str, *, make: bool = False) -> Iterator[int]:
        """A descriptor of a directory beneath the root, reached without following a link.

        Raises ``NotFoundError`` (or a link or a file stands in the way), ``StorageError`` for that if ``make``.
        """
        here = os.dup(self._root)
        try:
            for name in filter(None, folder.split("/")):
                below = self._step_down(here, name, folder, make=make)
                os.close(here)
                here = below
            yield here
        finally:
            os.close(here)

    def _step_down(self, directory: int, name: str, folder: str, *, make: bool) -> int:
        durable.require_plain(name)
        with durable.explain(self._path / folder, "opening the directory"):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, _FOLDER_MODE, dir_fd=directory)
                    os.fsync(directory)
            try:
                return os.open(name, _STEP_DOWN, dir_fd=directory)
            except OSError as error:
                if make or error.errno not in _NO_DIRECTORY:
                    raise
                raise NotFoundError(f"{self._path / folder} is not there") from error

    def _require_room(self, path: str, content: Content) -> None:
        free_bytes = durable.free_bytes(self._root)
        if content.size_bytes + self._spared_bytes > free_bytes:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            spared = f", and {self._spared_bytes} are left to the vault on the same disk" if self._spared_bytes else ""
            raise StorageError(
                f"{self._path} has {free_bytes} bytes free; {path} needs {content.size_bytes}{spared}",
                "make room at the destination or enlarge it: pgkeep never deletes a copy",
            ) from full

    def _close_to_writers(self, descriptor: int) -> None:
        try:
            os.fchmod(descriptor, self._mode)
        except OSError as error:
            if error.errno not in _NO_MODES:
                raise
        found = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if found != self._mode and not any("keeps no modes" in warning for warning in self._warnings):
            self._warnings.append(
                f"{self._path} keeps no modes: copies have {found:04o} instead of {self._mode:04o}, so that whoever "
                f"reaches them there may write to them"
            )


class DirectoryFile:
    """A file that is open for reading at any offset."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        with durable.explain(self._path, "reading the copy"):
            return os.pread(self._descriptor, length, offset)


def _sizes(directory: int) -> Iterator[tuple[str, int]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if not durable.is_temporary(entry.name):
                with contextlib.suppress(FileNotFoundError):  # gone since: it is not there then
                    facts = entry.stat(follow_symlinks=False)
                    yield entry.name, facts.st_size if stat.S_ISREG(facts.st_mode) else NOT_A_FILE


def _copy(source: int, target: int, content: Content, progress: Progress) -> None:
    """Raises ``IntegrityError`` where the source is not what it should be, ``OSError``."""
    digest = hashlib.sha256()
    done_bytes = 0
    for block in _blocks(source, content.size_bytes + 1):
        digest.update(block)
        durable.write_all(target, block)
        done_bytes += len(block)
        if done_bytes % _FLUSH_BYTES == 0:
            os.fdatasync(target)
            durable.drop_cache(target)
        progress.advance(done_bytes, content.size_bytes)
    if Content(done_bytes, digest.hexdigest()) != content:
        found, wanted = (
            f"{done_bytes} bytes with sha256 {digest.hexdigest()}",
            f"{content.size_bytes}, {content.sha256}",
        )
        raise IntegrityError(
            f"the source is not what its manifest says: {found} instead of {wanted}",
            "`pgkeep verify --all` looks at every backup of the vault; the copies made before are untouched",
        )


def _content(descriptor: int, progress: Progress | None = None) -> Content:
    """Read from the medium, not from memory. Raises ``OSError``."""
    digest = hashlib.sha256()
    done_bytes, size_bytes = 0, os.fstat(descriptor).st_size
    for block in _blocks(descriptor):
        digest.update(block)
        done_bytes += len(block)
        (progress or Silent()).advance(done_bytes, size_bytes)
    return Content(done_bytes, digest.hexdigest())


def _blocks(descriptor: int, limit_bytes: int | None = None) -> Iterator[bytes]:
    """All of it, from the disk, leaving nothing of it in the cache: what the machine needs there is not pushed out."""
    durable.drop_cache(descriptor)
    offset = 0
    while limit_bytes is None or offset < limit_bytes:
        length = _BLOCK_BYTES if limit_bytes is None else min(_BLOCK_BYTES, limit_bytes - offset)
        block = os.pread(descriptor, length, offset)
        if not block:
            break
        yield block
        offset += len(block)
        if offset % _FLUSH_BYTES == 0:
            durable.drop_cache(descriptor)
    durable.drop_cache(descriptor)


def _rename(directory: int, name: str, aside: str) -> None:
    """Only pgkeep makes such names, one process at a time: looking before is enough. Raises ``OSError``."""
    durable.require_plain(aside)
    if aside in os.listdir(directory):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), aside)
    with contextlib.suppress(FileNotFoundError):
        os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def _is_defect(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _DEFECTS
