"""Durable files on real filesystems: written atomically, opened only where they belong, copied whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pgkeep.adapters import durable
from pgkeep.errors import IntegrityError, NotFoundError, RefusedError, StorageError
from tests import clusters
from tests.contract import filesystems
from tests.contract.filesystems import forbidding, opened, run_python
from tests.contract.places import Place

MIB = 1 << 20
TYPES = {"ntfs": "fuseblk", "exfat": "fuseblk"}
mount = filesystems.parametrized(filesystems.KINDS)


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
