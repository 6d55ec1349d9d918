"""Durable files on real filesystems: published whole or not at all, never overwritten, opened where they belong."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import durable, fsflags
from pgkeep.adapters.durable import NewFile
from pgkeep.errors import BusyError, IntegrityError, NotFoundError, RefusedError, StorageError
from tests import clusters
from tests.contract import filesystems
from tests.contract.filesystems import cleared, forbidding, opened, run_python

MIB = 1 << 20
TYPES = {"ntfs": "fuseblk", "exfat": "fuseblk"}
mount = filesystems.parametrized(filesystems.KINDS)


class Place:
    """A directory of the test's own with ``active`` and ``incoming`` in it, both open."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = path
        self.active, self.incoming = path / "active", path / "incoming"
        self.active.mkdir(parents=True)
        self.incoming.mkdir()
        self.active_fd = os.open(self.active, os.O_DIRECTORY)
        self.incoming_fd = os.open(self.incoming, os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.active_fd)
        os.close(self.incoming_fd)

    def new_file(self, data: bytes = b"sealed") -> NewFile:
        new = NewFile.create(self.active_fd, self.incoming_fd)
        durable.write_all(new.fd, data)
        return new

    @property
    def has_flags(self) -> bool:
        return self.kind in filesystems.WITH_FLAGS


@pytest.fixture
def place(mount: tuple[str, Path], tmp_path: Path) -> Iterator[Place]:
    made = Place(mount[0], mount[1] / tmp_path.name)
    with cleared(made.active):
        yield made
        made.close()


@pytest.fixture
def directory(scratch: Path) -> Iterator[int]:
    fd = os.open(scratch, os.O_DIRECTORY)
    yield fd
    os.close(fd)


def assert_empty_soon(path: Path) -> None:
    deadline = time.monotonic() + 5
    while os.listdir(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(path) == []


# New files


def test_a_new_file_appears_only_when_published(place: Place) -> None:
    with place.new_file() as new:
        inode = new.inode
        assert os.listdir(place.active) == []
        new.publish(place.active_fd, "a.sql.gz")
        left = [name for name in os.listdir(place.incoming) if not name.startswith(".fuse_hidden")]
        assert left == []
    assert_empty_soon(place.incoming)  # libfuse hides an unlinked file that is open, and removes it afterwards
    assert (place.active / "a.sql.gz").read_bytes() == b"sealed"
    if place.kind != "exfat":  # whose driver makes inode numbers up
        assert (place.active / "a.sql.gz").stat().st_ino == inode


def test_what_is_discarded_leaves_nothing(place: Place) -> None:
    new = place.new_file()
    new.discard()
    new.discard()
    with pytest.raises(RuntimeError), place.new_file():
        raise RuntimeError
    assert_empty_soon(place.active)
    assert_empty_soon(place.incoming)


def test_publishing_never_overwrites(place: Place) -> None:
    (place.active / "a.sql.gz").write_bytes(b"older")
    with place.new_file() as new:
        with pytest.raises(RefusedError, match=r"active/a\.sql\.gz exists already"):
            new.publish(place.active_fd, "a.sql.gz")
        new.publish(place.active_fd, "b.sql.gz")
    assert (place.active / "a.sql.gz").read_bytes() == b"older"
    assert (place.active / "b.sql.gz").read_bytes() == b"sealed"
    assert_empty_soon(place.incoming)


@pytest.mark.parametrize("kind", ["dangling", "to a file"])
def test_publishing_does_not_follow_a_link_under_its_name(place: Place, kind: str) -> None:
    if place.kind == "exfat":
        with pytest.raises(OSError, match="not implemented"):
            (place.active / "a.sql.gz").symlink_to("elsewhere")
        return
    (place.active / "a.sql.gz").symlink_to("elsewhere")
    if kind == "to a file":
        (place.active / "elsewhere").write_bytes(b"older")
    with place.new_file() as new, pytest.raises(RefusedError, match="exists already"):
        new.publish(place.active_fd, "a.sql.gz")
    assert (place.active / "a.sql.gz").is_symlink()


def test_one_inode_takes_several_names_where_links_exist(place: Place) -> None:
    with place.new_file() as new:
        new.publish(place.active_fd, "first")
        if not place.has_flags:  # ntfs-3g and exfat have no unnamed files
            assert not new.can_be_published_again
            with pytest.raises(StorageError, match="no such links") as caught:
                new.publish(place.active_fd, "second")
            assert caught.value.hint == "copy it"
            return
        assert new.can_be_published_again
        new.publish(place.active_fd, "second")
    assert (place.active / "first").samefile(place.active / "second")
    assert (place.active / "first").stat().st_nlink == 2


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b"])
def test_only_plain_names_are_published(place: Place, name: str) -> None:
    with place.new_file() as new, pytest.raises(RefusedError, match="not a plain file name"):
        new.publish(place.active_fd, name)


def test_a_name_too_long_is_explained_and_leaves_nothing(place: Place) -> None:
    with place.new_file() as new, pytest.raises(StorageError, match="too long"):
        new.publish(place.active_fd, "n" * 300)
    assert_empty_soon(place.active)
    assert_empty_soon(place.incoming)


def test_the_mode_is_the_owner_s_alone_until_told_otherwise(place: Place) -> None:
    if not place.has_flags:
        pytest.skip(f"{place.kind} keeps no modes: tests/contract/test_protection.py shows it")
    with place.new_file() as new:
        assert os.fstat(new.fd).st_mode & 0o777 == 0o600


def test_two_filesystems_are_refused_before_anything_is_written(place: Place, scratch: Path) -> None:
    with opened(scratch, os.O_DIRECTORY) as elsewhere:
        with pytest.raises(StorageError, match="different filesystems") as caught:
            NewFile.create(place.active_fd, elsewhere)
        assert "one volume" in caught.value.hint
    assert os.listdir(scratch) == []


def test_nothing_can_be_made_or_linked_in_an_immutable_directory(place: Place) -> None:
    """Why the vault works in ``.incoming`` and lifts the flag for the link."""
    if not place.has_flags:
        pytest.skip(f"{place.kind} has no flags: tests/contract/test_fsflags.py shows it")
    with place.new_file() as new:
        fsflags.set_flag(place.active_fd, fsflags.IMMUTABLE, True)
        with pytest.raises(PermissionError):
            durable.unnamed_file(place.active_fd)
        with pytest.raises(StorageError, match="not permitted") as caught:
            new.publish(place.active_fd, "a.sql.gz")
        assert "lsattr" in caught.value.hint
        with fsflags.lifted(place.active_fd):
            new.publish(place.active_fd, "a.sql.gz")
    assert os.listdir(place.active) == ["a.sql.gz"]


def test_an_older_descriptor_of_the_staged_file_can_not_alter_the_sealed_one(place: Place) -> None:
    if not place.has_flags:
        pytest.skip(f"{place.kind} has no flags: tests/contract/test_fsflags.py shows it")
    staged, sealed = place.incoming / "staged", place.active / "a.sql.gz"
    staged.write_bytes(b"honest")
    with opened(staged, os.O_RDWR) as older, opened(staged) as source:
        with place.new_file(b"") as new:
            durable.copy_range(source, 0, new.fd, 6)
            new.publish(place.active_fd, "a.sql.gz")
        with cleared(sealed), opened(sealed) as fd:
            fsflags.set_flag(fd, fsflags.IMMUTABLE, True)
            assert os.pwrite(older, b"forged", 0) == 6
            os.ftruncate(older, 0)
            os.fsync(older)
            assert sealed.read_bytes() == b"honest"


def test_sealing_in_place_is_not_enough(place: Place) -> None:
    """The measured reason for an inode of the vault's own: only ext4 stops a descriptor opened earlier."""
    if not place.has_flags:
        pytest.skip(f"{place.kind} has no flags: tests/contract/test_fsflags.py shows it")
    path = place.active / "in-place"
    path.write_bytes(b"honest")
    with cleared(path), opened(path, os.O_RDWR) as older:
        fsflags.set_flag(older, fsflags.IMMUTABLE, True)
        if place.kind == "ext4":
            with pytest.raises(PermissionError):
                os.pwrite(older, b"forged", 0)
        else:
            assert os.pwrite(older, b"forged", 0) == 6
        assert path.read_bytes() == (b"honest" if place.kind == "ext4" else b"forged")


def test_a_file_is_linked_without_proc(directory: int, scratch: Path) -> None:
    program = """
from pgkeep.adapters import durable
assert not os.path.exists("/proc/self")
directory = os.open(sys.argv[1], os.O_DIRECTORY)
fd = durable.unnamed_file(directory)
os.write(fd, b"sealed")
durable.link_unnamed(fd, directory, "linked")
print(json.dumps(errors_of(lambda: durable.link_unnamed(fd, directory, "linked"))[0]))
"""
    assert run_python(program, scratch, under=filesystems.WITHOUT_PROC) == "RefusedError"
    assert (scratch / "linked").read_bytes() == b"sealed"


@pytest.mark.parametrize("call", [None, "renameat2"], ids=["RENAME_NOREPLACE", "under a lock"])
def test_a_file_moves_without_replacing(scratch: Path, call: str | None) -> None:
    program = """
from pgkeep.adapters import durable
base = Path(sys.argv[1])
fd = os.open(base, os.O_DIRECTORY)
(base / "source").write_bytes(b"new")
(base / "taken").write_bytes(b"older")
(base / "dangling").symlink_to("nowhere")
names = ("taken", "dangling", "free")
seen = [errors_of(lambda: durable._move_without_replacing(fd, "source", fd, name)) for name in names]
print(json.dumps([error[:1] for error in seen]))
"""
    filtered = forbidding(call, errno.EINVAL) + program if call else program
    assert run_python(filtered, scratch) == [["FileExistsError"], ["FileExistsError"], []]
    assert (scratch / "taken").read_bytes() == b"older"
    assert (scratch / "free").read_bytes() == b"new"
    assert not (scratch / "source").exists()


# Small files, written atomically


def test_a_small_file_is_replaced_whole(place: Place) -> None:
    durable.write_atomically(place.active_fd, "state.json", b"old")
    with opened(place.active / "state.json") as reader:
        durable.write_atomically(place.active, "state.json", b"newer", 0o640)
        assert os.read(reader, 100) == b"old"
    assert (place.active / "state.json").read_bytes() == b"newer"
    assert os.listdir(place.active) == ["state.json"]
    if place.has_flags:
        assert (place.active / "state.json").stat().st_mode & 0o777 == 0o640


def test_a_link_under_the_name_is_replaced_and_not_followed(scratch: Path) -> None:
    (scratch / "victim").write_bytes(b"precious")
    (scratch / "state.json").symlink_to("victim")
    durable.write_atomically(scratch, "state.json", b"new")
    assert (scratch / "victim").read_bytes() == b"precious"
    assert not (scratch / "state.json").is_symlink()


def test_a_full_disk_keeps_the_old_content_and_no_temporary_file() -> None:
    with clusters.mounted_filesystem("tmpfs", 1) as place:
        durable.write_atomically(place, "state.json", b"old")
        with pytest.raises(StorageError) as caught:
            durable.write_atomically(place, "state.json", b"x" * 2 * MIB)
        assert (place / "state.json").read_bytes() == b"old"
        assert os.listdir(place) == ["state.json"]
    assert "the disk is full" in caught.value.message
    assert "bytes and" in caught.value.message
    assert str(place / "state.json") in caught.value.message
    assert "pgkeep cleanup" in caught.value.hint


def test_a_failed_rename_leaves_no_temporary_file(scratch: Path) -> None:
    (scratch / "state.json").mkdir()
    with pytest.raises(StorageError, match="writing the file failed"):
        durable.write_atomically(scratch, "state.json", b"new")
    assert os.listdir(scratch) == ["state.json"]


def test_a_missing_directory_and_a_name_with_a_slash_are_explained(scratch: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        durable.write_atomically(scratch / "missing", "state.json", b"new")
    with pytest.raises(RefusedError, match="plain file name"):
        durable.write_atomically(scratch, "../state.json", b"new")


def test_what_a_killed_writer_leaves_is_recognised(place: Place) -> None:
    program = """
import signal
from pgkeep.adapters import durable
real = os.fsync
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
durable.write_atomically(Path(sys.argv[1]), "state.json", b"new")
"""
    environment = os.environ | {"PYTHONPATH": str(filesystems.SOURCE)}
    command = [sys.executable, "-c", filesystems.PREAMBLE + program, str(place.active)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    (left,) = os.listdir(place.active)
    assert durable.is_temporary(left)
    assert not durable.is_temporary("state.json")


def test_a_disk_that_fails_at_the_fsync_is_an_error() -> None:
    """An ext4 whose image lies on a full tmpfs: writes reach the page cache, and only the fsync learns of it."""
    with clusters.mounted_filesystem("tmpfs", 8) as below, filesystems.image_on(below, size_mib=64) as place:
        durable.write_atomically(place, "state.json", b"old")
        with opened(place / "large", os.O_RDWR | os.O_CREAT) as fd:
            durable.write_all(fd, os.urandom(16 * MIB))
            with pytest.raises(OSError) as caught:
                durable.fsync_file(fd)
            assert caught.value.errno in {errno.ENOSPC, errno.EIO}
        with pytest.raises(StorageError):
            durable.write_atomically(place, "state.json", os.urandom(16 * MIB))
        assert (place / "state.json").read_bytes() == b"old"
        assert sorted(os.listdir(place)) == ["large", "lost+found", "state.json"]


def test_fsync_raises_what_the_kernel_says() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            durable.fsync_file(writer)
    finally:
        os.close(reader)
        os.close(writer)
    with pytest.raises(NotADirectoryError):
        durable.fsync_directory(Path("/dev/null"))


def test_fsync_works_everywhere(place: Place) -> None:
    durable.fsync_directory(place.active)
    durable.fsync_directory(place.active_fd)
    with opened(place.active / "file", os.O_RDWR | os.O_CREAT) as fd:
        durable.fsync_file(fd)


# Opening what others wrote

HOSTILE = """
from pgkeep.adapters import durable
import socket
base = Path(sys.argv[1])
(base / "staging/inner").mkdir(parents=True)
(base / "secret").write_bytes(b"secret")
(base / "outside").mkdir()
(base / "outside/file").write_bytes(b"secret")
staging = base / "staging"
(staging / "inner/file").write_bytes(b"fine")
(staging / "plain").write_bytes(b"fine")
(staging / "to-plain").symlink_to("plain")
(staging / "to-secret").symlink_to("../secret")
(staging / "to-shadow").symlink_to("/etc/shadow")
(staging / "to-inner").symlink_to("inner")
(staging / "to-outside").symlink_to("../outside")
(staging / "to-nowhere").symlink_to("nowhere")
os.mkfifo(staging / "fifo")
unix = socket.socket(socket.AF_UNIX)
os.chdir(staging)
unix.bind("socket")
fd = os.open(staging, os.O_DIRECTORY)

def tried(path, flags=os.O_RDONLY):
    try:
        opened = durable.open_beneath(fd, path, flags)
    except Exception as error:
        return type(error).__name__
    content = os.read(opened, 100).decode()
    os.close(opened)
    return content

paths = ["plain", "inner/file", "to-plain", "to-secret", "to-shadow", "to-inner/file", "to-outside/file", "to-nowhere",
         "fifo", "socket", "inner", "plain/below", "missing", "missing/file", "../secret", "inner/../plain",
         "/etc/passwd", "", ".", "inner//file", "a\\0b"]
answers = {path: tried(path) for path in paths}
answers["fifo for writing"] = tried("fifo", os.O_WRONLY)
answers["descriptors left"] = len(os.listdir("/proc/self/fd"))
answers["again"] = [tried(path) for path in paths] and len(os.listdir("/proc/self/fd"))
print(json.dumps(answers))
"""
FINE = {"plain", "inner/file"}
MISSING = {"missing", "missing/file"}


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EPERM], ids=["openat2", "old kernel", "old runtime"])
def test_only_regular_files_beneath_the_directory_are_opened(scratch: Path, code: int | None) -> None:
    program = HOSTILE if code is None else forbidding("openat2", code) + HOSTILE
    answers = run_python(program, scratch)
    assert answers.pop("again") == answers.pop("descriptors left")
    for path, answer in answers.items():
        wanted = "fine" if path in FINE else "NotFoundError" if path in MISSING else "RefusedError"
        assert answer == wanted, path


def test_a_device_is_no_regular_file(scratch: Path, directory: int) -> None:
    clusters.need_root("making a device node")
    os.mknod(scratch / "device", 0o20666, os.makedev(1, 5))
    with pytest.raises(RefusedError, match="not a regular file"):
        durable.open_beneath(directory, "device")


def test_a_file_that_may_not_be_read_is_explained(scratch: Path, directory: int) -> None:
    (scratch / "private").write_bytes(b"")
    (scratch / "private").chmod(0)
    with filesystems.as_ordinary_user(), pytest.raises(StorageError, match="permission denied"):
        durable.open_beneath(directory, "private")


def test_the_opened_file_does_not_leak_into_children(scratch: Path, directory: int) -> None:
    (scratch / "plain").touch()
    fd = durable.open_beneath(directory, "plain")
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    with pytest.raises(NotFoundError, match="plain2 does not exist"):
        durable.open_beneath(directory, "plain2")


# Copying, holes, the cache


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same filesystem", "another"])
@pytest.mark.parametrize("flags", [0, os.O_APPEND], ids=["plain", "appending"])
def test_a_range_is_copied(place: Place, scratch: Path, elsewhere: bool, flags: int) -> None:
    data = os.urandom(3 * MIB + 17)
    source_path = (scratch if elsewhere else place.incoming) / "source"
    source_path.write_bytes(data)
    target_path = place.active / "target"
    with opened(source_path) as source, opened(target_path, os.O_RDWR | os.O_CREAT | flags) as target:
        durable.write_all(target, b"head")
        durable.copy_range(source, 5, target, 2 * MIB + 1)
        durable.copy_range(source, 0, target, 0)
        durable.copy_range(source, len(data) - 3, target, 3)
    assert target_path.read_bytes() == b"head" + data[5 : 2 * MIB + 6] + data[-3:]


def test_a_short_source_is_an_error(place: Place) -> None:
    (place.incoming / "source").write_bytes(b"x" * 10)
    with opened(place.incoming / "source") as source, opened(place.active / "target", os.O_RDWR | os.O_CREAT) as target:
        with pytest.raises(IntegrityError, match="source ends 5 bytes too soon"):
            durable.copy_range(source, 0, target, 15)
        with pytest.raises(IntegrityError, match="ends 2 bytes too soon"):
            durable.copy_range(source, 1000, target, 2)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_copying_works_without_the_kernel_s_help(scratch: Path, code: int) -> None:
    program = """
from pgkeep.adapters import durable
base = Path(sys.argv[1])
data = os.urandom((1 << 20) * 2 + 5)
(base / "source").write_bytes(data)
source, target = os.open(base / "source", os.O_RDONLY), os.open(base / "target", os.O_RDWR | os.O_CREAT)
assert errors_of(lambda: os.copy_file_range(source, target, 1, 0)), "the filter does nothing"
durable.copy_range(source, 3, target, len(data) - 3)
short = errors_of(lambda: durable.copy_range(source, 3, target, len(data)))
print(json.dumps([(base / "target").read_bytes()[: len(data) - 3] == data[3:], short[0]]))
"""
    assert run_python(forbidding("copy_file_range", code) + program, scratch) == [True, "IntegrityError"]


def test_a_full_target_is_an_error_of_the_system(scratch: Path) -> None:
    (scratch / "source").write_bytes(b"x" * 2 * MIB)
    with (
        clusters.mounted_filesystem("tmpfs", 1) as small,
        opened(scratch / "source") as source,
        opened(small / "target", os.O_RDWR | os.O_CREAT) as target,
        pytest.raises(OSError) as caught,
    ):
        durable.copy_range(source, 0, target, 2 * MIB)
    assert caught.value.errno == errno.ENOSPC


def test_a_hole_gives_blocks_back_and_keeps_the_size(place: Place) -> None:
    path = place.active / "file"
    path.write_bytes(b"x" * 4 * MIB)
    with opened(path, os.O_RDWR) as fd:
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        assert durable.punch_hole(fd, MIB, 2 * MIB) == place.has_flags
        assert durable.punch_hole(fd, 0, 0)
        os.fsync(fd)
        after = os.fstat(fd)
    content = path.read_bytes()
    assert after.st_size == len(content) == 4 * MIB
    assert content[:MIB] == content[3 * MIB :] == b"x" * MIB
    if place.has_flags:
        assert content[MIB : 3 * MIB] == bytes(2 * MIB)
        assert before - after.st_blocks >= 2 * MIB // 512
    else:
        assert content == b"x" * 4 * MIB


def test_a_hole_in_a_file_open_for_reading_is_an_error(scratch: Path) -> None:
    (scratch / "file").write_bytes(b"x" * 8192)
    with opened(scratch / "file") as fd, pytest.raises(OSError, match="Bad file descriptor"):
        durable.punch_hole(fd, 0, 4096)


def test_the_cache_is_dropped(scratch: Path) -> None:
    path = scratch / "file"
    path.write_bytes(b"x" * 4 * MIB)

    def cached_bytes() -> int:
        command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    with opened(path) as fd:
        os.fsync(fd)
        assert cached_bytes() == 4 * MIB
        durable.drop_cache(fd)
        assert cached_bytes() == 0


# Facts about the place


def test_the_filesystem_is_named(place: Place) -> None:
    wanted = TYPES.get(place.kind, place.kind)
    assert durable.filesystem_type(place.active) == wanted
    assert durable.filesystem_type(place.active_fd) == wanted


def test_overlayfs_and_subvolumes_are_recognised() -> None:
    with filesystems.overlay() as merged:
        assert durable.filesystem_type(merged) == "overlay"
    with filesystems.mounted("btrfs") as place:
        subprocess.run(["btrfs", "-q", "subvolume", "create", place / "subvolume"], check=True)
        assert durable.filesystem_type(place / "subvolume") == "btrfs"


def test_free_space_is_what_an_ordinary_user_has(place: Place) -> None:
    before = durable.free_bytes(place.active)
    (place.active / "file").write_bytes(os.urandom(4 * MIB))
    os.sync()
    assert before - durable.free_bytes(place.active_fd) >= 3 * MIB
    assert 0 < before < 2**40
    with pytest.raises(StorageError, match="does not exist"):
        durable.free_bytes(place.active / "missing")


def test_a_read_only_filesystem_is_explained() -> None:
    with filesystems.mounted("ext4") as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(StorageError, match="filesystem is read-only") as caught:
            durable.write_atomically(place, "state.json", b"new")
    assert "mount it read-write" in caught.value.hint


def test_causes_have_words_and_remedies(scratch: Path) -> None:
    for code, words in {errno.EDQUOT: "quota", errno.ENOSPC: "full", errno.EROFS: "read-only"}.items():
        with pytest.raises(StorageError, match=words) as caught, durable.explain(scratch / "missing", "sealing"):
            raise OSError(code, os.strerror(code))
        assert caught.value.message.startswith(f"sealing failed at {scratch}/missing: ")
        assert caught.value.hint
        assert isinstance(caught.value.__cause__, OSError)
        assert ("bytes and" in caught.value.message) == (code in {errno.EDQUOT, errno.ENOSPC})
    with pytest.raises(StorageError, match="Too many links"), durable.explain(scratch, "linking"):
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
    with pytest.raises(IntegrityError), durable.explain(scratch, "sealing"):
        raise IntegrityError("of its own")


# The lock

HOLDER = """
import time
from pgkeep.adapters import durable
with durable.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start_holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(filesystems.SOURCE)}
    command = [sys.executable, "-c", filesystems.PREAMBLE + HOLDER, str(path), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate(timeout=10)


def test_the_lock_says_who_holds_it_and_goes_with_a_killed_holder(place: Place) -> None:
    path = place.active / "lock"
    holder = start_holder(path, 60)
    told: list[str] = []
    try:
        with pytest.raises(BusyError) as caught, durable.locked(path, 0.3, told.append):
            pytest.fail("two hold the lock")
    finally:
        end(holder)
    assert f"{path} is held by process {holder.pid} on {socket.gethostname()} (-c" in caught.value.message
    assert told == [caught.value.message.partition("held by ")[2]]
    with durable.locked(path):
        assert path.exists()


def test_a_waiter_gets_the_lock_when_it_is_free(scratch: Path) -> None:
    holder = start_holder(scratch / "lock", 0.4)
    told: list[str] = []
    try:
        started = time.monotonic()
        with durable.locked(scratch / "lock", 30, told.append):
            assert time.monotonic() - started < 10
            with pytest.raises(BusyError, match=f"process {os.getpid()} "), durable.locked(scratch / "lock"):
                pytest.fail("two hold the lock")
    finally:
        end(holder)
    assert len(told) == 1


def test_the_lock_is_free_after_an_error(scratch: Path) -> None:
    with pytest.raises(RuntimeError), durable.locked(scratch / "lock"):
        raise RuntimeError
    with durable.locked(scratch / "lock"):
        pass


def test_a_lock_file_with_rubbish_in_it_still_locks(scratch: Path) -> None:
    (scratch / "lock").write_bytes(b'["\xff not a record')
    with opened(scratch / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="held by another process"), durable.locked(scratch / "lock"):
            pytest.fail("two hold the lock")
    with durable.locked(scratch / "lock"):
        pass


def test_a_full_disk_does_not_keep_anybody_from_locking() -> None:
    with clusters.mounted_filesystem("tmpfs", 1) as place:
        with pytest.raises(OSError):
            (place / "filler").write_bytes(b"x" * 2 * MIB)
        with durable.locked(place / "lock"), pytest.raises(BusyError), durable.locked(place / "lock"):
            pytest.fail("two hold the lock")


def test_a_lock_file_that_can_not_be_made_is_explained(scratch: Path) -> None:
    (scratch / "lock").symlink_to("elsewhere")
    with pytest.raises(StorageError, match="symbolic link"), durable.locked(scratch / "lock"):
        pytest.fail("locked through a link")
    assert not (scratch / "elsewhere").exists()
    with pytest.raises(StorageError, match="does not exist"), durable.locked(scratch / "missing" / "lock"):
        pytest.fail("locked nothing")
