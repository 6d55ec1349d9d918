"""The inode flags on real filesystems, as root and as processes with fewer rights."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pgkeep.adapters import fsflags
from pgkeep.adapters.fsflags import APPEND, IMMUTABLE
from pgkeep.errors import ProtectionError
from tests import clusters
from tests.contract import filesystems
from tests.contract.filesystems import as_ordinary_user, cleared, opened, run_python, stock_flags

NODUMP = 0x40
mount = filesystems.parametrized(filesystems.WITH_FLAGS)

SET_IMMUTABLE = """
from pgkeep.adapters import fsflags
fd = os.open(sys.argv[1], os.O_RDONLY)
print(json.dumps([errors_of(lambda: fsflags.set_flag(fd, fsflags.IMMUTABLE, True)), fsflags.get_flags(fd) & 0x10]))
"""


@pytest.fixture
def subject(mount: tuple[str, Path], tmp_path: Path) -> Path:
    """A directory of the test's own on the filesystem."""
    path = mount[1] / tmp_path.name
    path.mkdir()
    return path


def make(path: Path, directory: bool) -> Path:
    if directory:
        path.mkdir()
    else:
        path.write_bytes(b"sealed")
    return path


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize(("flag", "letter"), [(IMMUTABLE, "i"), (APPEND, "a")])
def test_a_flag_is_set_and_cleared_as_stock_tools_see_it(
    subject: Path, directory: bool, flag: int, letter: str
) -> None:
    path = make(subject / "subject", directory)
    with cleared(path), opened(path, os.O_DIRECTORY if directory else 0) as fd:
        assert not fsflags.has_flag(fd, flag)
        fsflags.set_flag(fd, flag, True)
        fsflags.set_flag(fd, flag, True)
        assert fsflags.has_flag(fd, flag)
        assert letter in stock_flags(path)
        fsflags.set_flag(fd, flag, False)
        assert not fsflags.has_flag(fd, flag)
        assert letter not in stock_flags(path)


def test_other_flags_stay(subject: Path) -> None:
    path = make(subject / "subject", directory=False)
    with cleared(path), opened(path) as fd:
        fsflags.set_flag(fd, NODUMP, True)
        before = fsflags.get_flags(fd)
        fsflags.set_flag(fd, IMMUTABLE, True)
        assert fsflags.get_flags(fd) == before | IMMUTABLE
        fsflags.set_flag(fd, IMMUTABLE, False)
        assert fsflags.get_flags(fd) == before


def test_root_can_neither_alter_rename_nor_remove(subject: Path) -> None:
    path = make(subject / "subject", directory=False)
    attacks: list[Callable[[], object]] = [
        lambda: path.open("ab"),
        lambda: path.rename(subject / "other"),
        lambda: (subject / "other").hardlink_to(path),
        lambda: path.chmod(0o666),
        lambda: os.truncate(path, 0),
        path.unlink,
    ]
    with cleared(path), opened(path) as fd:
        fsflags.set_flag(fd, IMMUTABLE, True)
        for attack in attacks:
            with pytest.raises(PermissionError) as caught:
                attack()
            assert caught.value.errno == errno.EPERM
        assert path.read_bytes() == b"sealed"


def test_the_flag_survives_a_remount() -> None:
    clusters.need_root("mounting a filesystem")
    with filesystems.mounted("ext4") as place:
        path = make(place / "subject", directory=False)
        with cleared(path):
            with opened(path) as fd:
                fsflags.set_flag(fd, IMMUTABLE, True)
                os.fsync(fd)
            filesystems.remount(place)
            with opened(path) as fd:
                assert fsflags.has_flag(fd, IMMUTABLE)


@pytest.mark.parametrize("kind", ["ntfs", "exfat"])
def test_a_filesystem_without_flags_is_told_apart(kind: clusters.FilesystemKind) -> None:
    with filesystems.mounted(kind) as place, opened(make(place / "subject", directory=False)) as fd:
        with pytest.raises(fsflags.UnsupportedFlagsError) as caught:
            fsflags.set_flag(fd, IMMUTABLE, True)
        assert "no such flags" in caught.value.message
        assert "ext4, xfs or btrfs" in caught.value.hint


def test_what_is_no_file_has_no_flags() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(fsflags.UnsupportedFlagsError):
            fsflags.get_flags(reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_closed_descriptor_is_neither_unsupported_nor_denied() -> None:
    with pytest.raises(ProtectionError) as caught:
        fsflags.get_flags(10**6)
    assert type(caught.value) is ProtectionError


def test_a_missing_capability_names_the_line_to_mend(subject: Path) -> None:
    path = make(subject / "subject", directory=False)
    (kind, message, hint), flag = run_python(SET_IMMUTABLE, path, under=filesystems.WITHOUT_CAPABILITY)
    assert kind == "MissingCapabilityError"
    assert "setting the immutable flag" in message
    assert str(path) in message
    assert "lacks the capability CAP_LINUX_IMMUTABLE" in message
    assert "cap_add: [LINUX_IMMUTABLE]" in hint
    assert "run as root" in hint
    assert flag == 0


def test_without_the_capability_the_flag_can_not_be_cleared_either(subject: Path) -> None:
    path = make(subject / "subject", directory=False)
    with cleared(path), opened(path) as fd:
        fsflags.set_flag(fd, IMMUTABLE, True)
        program = SET_IMMUTABLE.replace(", True)", ", False)")
        (kind, message, _), flag = run_python(program, path, under=filesystems.WITHOUT_CAPABILITY)
        assert (kind, flag) == ("MissingCapabilityError", IMMUTABLE)
        assert "clearing the immutable flag" in message


def test_a_user_namespace_is_named_as_the_reason(subject: Path) -> None:
    path = make(subject / "subject", directory=False)
    (kind, message, hint), flag = run_python(SET_IMMUTABLE, path, under=filesystems.IN_USER_NAMESPACE)
    assert (kind, flag) == ("MissingCapabilityError", 0)
    assert "user namespace" in message
    assert "can never be set" in hint


def test_an_ordinary_user_is_refused_on_a_file_of_their_own(subject: Path) -> None:
    path = make(subject / "subject", directory=False)
    os.chown(path, filesystems.NOBODY, filesystems.NOBODY)
    with opened(path) as fd:
        with as_ordinary_user(), pytest.raises(fsflags.MissingCapabilityError, match="lacks the capability"):
            fsflags.set_flag(fd, IMMUTABLE, True)
        assert not fsflags.has_flag(fd, IMMUTABLE)


def test_lifted_opens_the_directory_for_the_body_only(subject: Path) -> None:
    with cleared(subject), opened(subject, os.O_DIRECTORY) as fd:
        fsflags.set_flag(fd, IMMUTABLE, True)
        with fsflags.lifted(fd, IMMUTABLE):
            (subject / "inside").touch()
        assert fsflags.has_flag(fd, IMMUTABLE)
        with pytest.raises(PermissionError):
            (subject / "outside").touch()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_lifted_restores_after_an_error_of_the_body(subject: Path, error: type[BaseException]) -> None:
    with cleared(subject), opened(subject, os.O_DIRECTORY) as fd:
        fsflags.set_flag(fd, IMMUTABLE, True)
        with pytest.raises(error), fsflags.lifted(fd, IMMUTABLE):
            raise error
        assert fsflags.has_flag(fd, IMMUTABLE)


def test_lifted_closes_what_a_killed_process_left_open(subject: Path) -> None:
    with cleared(subject), opened(subject, os.O_DIRECTORY) as fd:
        with fsflags.lifted(fd, IMMUTABLE):
            assert not fsflags.has_flag(fd, IMMUTABLE)
        assert fsflags.has_flag(fd, IMMUTABLE)


def test_lifted_fails_where_it_can_not_close_again(subject: Path) -> None:
    os.chown(subject, filesystems.NOBODY, filesystems.NOBODY)
    with opened(subject, os.O_DIRECTORY) as fd, as_ordinary_user():
        with pytest.raises(fsflags.MissingCapabilityError) as caught, fsflags.lifted(fd, IMMUTABLE):
            raise RuntimeError("the body's own")
        assert isinstance(caught.value.__context__, RuntimeError)
        assert not fsflags.has_flag(fd, IMMUTABLE)


def test_lifted_never_runs_the_body_when_the_flag_can_not_be_lifted(subject: Path) -> None:
    with cleared(subject), opened(subject, os.O_DIRECTORY) as fd:
        fsflags.set_flag(fd, IMMUTABLE, True)
        ran = False
        with as_ordinary_user(), pytest.raises(fsflags.MissingCapabilityError), fsflags.lifted(fd, IMMUTABLE):
            ran = True
        assert not ran
        assert fsflags.has_flag(fd, IMMUTABLE)


def test_a_flag_is_set_by_path_and_links_are_not_followed(subject: Path) -> None:
    path = make(subject / "subject", directory=False)
    (subject / "link").symlink_to("subject")
    with cleared(path):
        with pytest.raises(OSError, match="symbolic links"):
            fsflags.set_path_flag(subject / "link", IMMUTABLE, True)
        assert "i" not in stock_flags(path)
        fsflags.set_path_flag(path, IMMUTABLE, True)
        assert "i" in stock_flags(path)
