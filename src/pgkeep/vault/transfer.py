"""Copy directory trees with all that a vault needs of them, and read every file back from where it went.

Nothing is followed: a symbolic link is copied as a link. Names that share an inode share one again where the target's
filesystem has links. What is there already, from a copy that was cut off, is compared and kept.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from pgkeep.adapters import durable
from pgkeep.adapters.fsflags import opened, path_of
from pgkeep.errors import IntegrityError, RefusedError, StorageError
from pgkeep.progress import Progress
from pgkeep.vault import unseal

# What a file may take beyond its bytes: its last block, its name, its inode.
OVERHEAD_BYTES = 8192
_BLOCK_BYTES = 1024 * 1024
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """A directory to copy, and where to.

    ``apart``: names at its top that are not copied, nor removed there. ``prune``: what the source does not hold (any
    more) goes from the target. ``optional``: the name at its top below which what can't be read may stay behind.
    """

    source: Path
    target: Path
    apart: frozenset[str] = frozenset()
    prune: bool = True
    optional: str = ""


class Transfer:
    """One copy of several trees. What could not be taken along is in ``left_behind``, in words.

    ``foreign``: paths by the owner and group that they should have there, and this process may not give them.
    ``true_modes``, ``modes``: whether the source's and the target's filesystem keep modes (and owners).
    """

    def __init__(self, *, links: bool, true_modes: bool, modes: bool, progress: Progress) -> None:
        self.left_behind: list[str] = []
        self.foreign: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
        self._links = links
        self._true_modes = true_modes
        self._modes = modes
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = 0

    def require_room(self, trees: Sequence[Tree], reserve_bytes: int) -> None:
        """Raises ``StorageError`` naming what is missing. What an earlier run copied already counts as room."""
        needed: dict[int, int] = collections.defaultdict(lambda: reserve_bytes)
        places: dict[int, Path] = {}
        for tree in trees:
            files, size_bytes = self._measure(tree.source, tree.apart)
            _, present_bytes = self._measure(tree.target, tree.apart)
            device = tree.target.stat().st_dev
            needed[device] += size_bytes + files * OVERHEAD_BYTES - present_bytes
            places.setdefault(device, tree.target)
            self._total_bytes += size_bytes
        for device, place in places.items():
            if (free_bytes := durable.free_bytes(place)) < needed[device]:
                raise StorageError(
                    f"{place} has {free_bytes} bytes free; what is to come there needs {needed[device]}",
                    "free space there, or take a larger disk",
                )

    def copy(self, tree: Tree) -> dict[str, str]:
        """All of the tree, durable and read back: every file's digest, by its path below the top.

        Raises ``StorageError``, ``IntegrityError`` (it reads back otherwise), ``RefusedError``.
        """
        with opened(tree.source) as source, opened(tree.target) as target:
            walk = _Walk(self, tree, target)
            with durable.explain(tree.target, f"copying {tree.source.name}/"):
                walk.directory(source, target, "")
        return walk.digests

    def leave_behind(self, path: str, why: str) -> None:
        text = path.encode(errors="backslashreplace").decode()
        self.left_behind.append(f"{text}: {why}")
        self._progress.warn(f"{text} is left behind: {why}")

    def bring(self, source: int, target: int, name: str, path: Path) -> str:
        """One file to ``path``; the digest of the source, which is the target's too afterwards."""
        facts = os.fstat(source)
        kept = self._kept(source, target, name, path)
        if kept is not None:
            return kept
        unseal.remove_entry(target, name)
        with durable.NewFile.create(target, target) as new:
            wanted = self._pour(source, new.fd)
            self.adopt(new.fd, facts, path)
            new.publish(target, name)
        if _digest_on_disk(target, name) != wanted:
            raise IntegrityError(
                f"{path_of(target)}/{name} does not read back as it was written",
                "check the disk there and the memory (dmesg); the vault is whole where it was",
            )
        self._progress.step("move.file-copied")
        return wanted

    def adopt(self, descriptor: int, facts: os.stat_result, path: Path) -> None:
        """Owner, mode and time of the source, as far as both filesystems have them and we may give files away."""
        if self._modes and self._true_modes:
            try:
                os.fchown(descriptor, facts.st_uid, facts.st_gid)
            except PermissionError:
                self.foreign[facts.st_uid, facts.st_gid].append(os.fspath(path))
        if self._modes:
            invented = 0o700 if stat.S_ISDIR(facts.st_mode) else 0o644
            os.fchmod(descriptor, stat.S_IMODE(facts.st_mode) if self._true_modes else invented)
        os.utime(descriptor, ns=(facts.st_mtime_ns, facts.st_mtime_ns))

    def _kept(self, source: int, target: int, name: str, path: Path) -> str | None:
        """The digest, where an earlier run brought the same already."""
        facts = os.fstat(source)
        try:
            present = os.stat(name, dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(present.st_mode) or present.st_size != facts.st_size:
            return None
        wanted = self._pour(source, None)
        if _digest_on_disk(target, name) != wanted:
            self._done_bytes -= facts.st_size
            return None
        descriptor = unseal.open_regular(target, name)
        try:
            self.adopt(descriptor, facts, path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return wanted

    def _pour(self, source: int, target: int | None) -> str:
        """Read all of the source, write it to the target if there is one; the digest of what was read."""
        state = hashlib.sha256()
        for data in _blocks(source):
            state.update(data)
            if target is not None:
                durable.write_all(target, data)
            self._done_bytes += len(data)
            self._progress.advance(self._done_bytes, max(self._total_bytes, self._done_bytes))
        return state.hexdigest()

    def _measure(self, top: Path, apart: frozenset[str]) -> tuple[int, int]:
        """Files and their bytes; a file with several names counts once where there are links."""
        sizes: dict[tuple[int, int], int] = {}
        with durable.explain(top, "measuring what is there"), opened(top) as descriptor:
            for number, facts in enumerate(_files(descriptor, apart, 0)):
                sizes[facts.st_dev, facts.st_ino if self._links else -number] = facts.st_size
        return len(sizes), sum(sizes.values())

    @property
    def links(self) -> bool:
        return self._links


class _Walk:
    """Through one tree: where each inode went, and every file's digest."""

    def __init__(self, transfer: Transfer, tree: Tree, top: int) -> None:
        self.digests: dict[str, str] = {}
        self._transfer = transfer
        self._tree = tree
        self._top = top
        self._first_names: dict[tuple[int, int], str] = {}

    def directory(self, source: int, target: int, place: str) -> None:
        apart = frozenset() if place else self._tree.apart
        names = set(os.listdir(source)) - apart
        for name in set(os.listdir(target)) - names - apart:
            if self._tree.prune or durable.is_temporary(name):
                unseal.remove_entry(target, name)
        for name in sorted(names):
            self._entry(source, target, name, f"{place}/{name}" if place else name)
        os.fsync(target)

    def _entry(self, source: int, target: int, name: str, path: str) -> None:
        mode = os.stat(name, dir_fd=source, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            unseal.remove_entry(target, name)
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISDIR(mode) or stat.S_ISREG(mode):
            self._readable(source, target, name, path)
        else:
            self._leave_behind(path, _KINDS.get(stat.S_IFMT(mode), "a thing of an unknown kind"))

    def _leave_behind(self, path: str, why: str) -> None:
        self._transfer.leave_behind(f"{self._tree.source.name}/{path}", why)

    def _readable(self, source: int, target: int, name: str, path: str) -> None:
        try:
            descriptor = unseal.open_any(source, name)
        except PermissionError as error:
            if path.partition("/")[0] != self._tree.optional:
                raise
            self._leave_behind(path, f"it can't be read: {error.strerror}")
            return
        try:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self._subdirectory(descriptor, target, name, path)
            else:
                self._file(descriptor, target, name, path)
        finally:
            os.close(descriptor)

    def _subdirectory(self, source: int, target: int, name: str, path: str) -> None:
        if path.count("/") >= unseal.DEPTH_LIMIT:
            raise RefusedError(f"{path} is nested too deep to be pgkeep's", "remove it, or move it out of the way")
        _make_directory(target, name)
        with unseal.below(target, name) as inner:
            self.directory(source, inner, path)
            self._transfer.adopt(inner, os.fstat(source), self._tree.target / path)

    def _file(self, source: int, target: int, name: str, path: str) -> None:
        facts = os.fstat(source)
        first = self._first_names.setdefault((facts.st_dev, facts.st_ino), path)
        if first != path and self._transfer.links:
            self._link_again(first, target, name)
            self.digests[path] = self.digests[first]
        else:
            self.digests[path] = self._transfer.bring(source, target, name, self._tree.target / path)

    def _link_again(self, first: str, directory: int, name: str) -> None:
        """A further name for a file that was copied under its first one."""
        descriptor = durable.open_beneath(self._top, first)
        try:
            if not _is(directory, name, os.fstat(descriptor)):
                unseal.remove_entry(directory, name)
                durable.link_unnamed(descriptor, directory, name)
        finally:
            os.close(descriptor)


def _is(directory: int, name: str, facts: os.stat_result) -> bool:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (facts.st_dev, facts.st_ino)


def _make_directory(parent: int, name: str) -> None:
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            return
    except FileNotFoundError:
        os.mkdir(name, 0o700, dir_fd=parent)
        return
    unseal.remove_entry(parent, name)
    os.mkdir(name, 0o700, dir_fd=parent)


def _files(directory: int, apart: frozenset[str], depth: int) -> Iterator[os.stat_result]:
    for name in set(os.listdir(directory)) - apart:
        facts = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISREG(facts.st_mode):
            yield facts
        elif stat.S_ISDIR(facts.st_mode) and depth < unseal.DEPTH_LIMIT:
            # What can't be read is dealt with when its turn comes.
            with contextlib.suppress(PermissionError), unseal.below(directory, name) as inner:
                yield from _files(inner, frozenset(), depth + 1)


def _digest_on_disk(directory: int, name: str) -> str:
    """What the disk holds, not what memory remembers. The file was flushed before."""
    descriptor = unseal.open_regular(directory, name)
    try:
        durable.drop_cache(descriptor)
        state = hashlib.sha256()
        for data in _blocks(descriptor):
            state.update(data)
        return state.hexdigest()
    finally:
        os.close(descriptor)


def _blocks(descriptor: int) -> Iterator[bytes]:
    offset = 0
    with durable.explain(path_of(descriptor), "reading the file"):
        while data := os.pread(descriptor, _BLOCK_BYTES, offset):
            yield data
            offset += len(data)
