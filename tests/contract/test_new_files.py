"""New files on real filesystems: published whole or not at all, and never overwritten."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pgkeep.adapters import durable, fsflags
from pgkeep.adapters.durable import NewFile
from pgkeep.errors import RefusedError, StorageError
from tests.contract import filesystems
from tests.contract.filesystems import cleared, forbidding, opened, run_python
from tests.contract.places import Place, assert_empty_soon

mount = filesystems.parametrized(filesystems.KINDS)


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
