"""The probe on real filesystems and with fewer rights; the choice as a table."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from pgkeep.adapters import fsflags, protection
from pgkeep.adapters.protection import Choice, Probe
from pgkeep.domain.manifest import Protection
from pgkeep.errors import ProtectionError, StorageError
from tests import clusters
from tests.contract import filesystems
from tests.contract.filesystems import as_ordinary_user, cleared, opened, run_python

mount = filesystems.parametrized(filesystems.KINDS)
LEFTOVER = f"{protection.CANARY_PREFIX}0123456789abcdef"

PROBE = """
from pgkeep.adapters import protection
import dataclasses
try:
    print(json.dumps(dataclasses.asdict(protection.probe(Path(sys.argv[1])))))
except Exception as error:
    print(json.dumps([type(error).__name__, error.message, error.hint]))
"""


@pytest.fixture
def subject(mount: tuple[str, Path], tmp_path: Path) -> tuple[str, Path]:
    path = mount[1] / tmp_path.name
    path.mkdir()
    return mount[0], path


@pytest.fixture
def ext4(scratch: Path) -> Path:
    """A directory of our own where root can set flags."""
    return scratch


def test_each_filesystem_is_known_by_what_it_does(subject: tuple[str, Path]) -> None:
    kind, path = subject
    found = protection.probe(path)
    with opened(path, os.O_DIRECTORY) as fd:
        assert protection.probe(fd) == found
    has_flags = kind in filesystems.WITH_FLAGS
    assert found.protection == ("chattr" if has_flags else "none")
    assert found.append_only == found.unnamed_files == has_flags
    assert found.hard_links == (kind != "exfat")
    assert found.filesystem == (kind if has_flags else "fuseblk")
    assert not found.capability_missing
    assert ("the kernel refused: write, chmod, link, rename, unlink" in found.why) == has_flags
    assert ("file modes are not honoured either" in found.why) != has_flags
    assert protection.CANARY_PREFIX not in found.why
    assert os.listdir(path) == []


def test_without_the_capability_the_mode_is_what_is_left(subject: tuple[str, Path]) -> None:
    kind, path = subject
    found = run_python(PROBE, path, under=filesystems.WITHOUT_CAPABILITY)
    has_flags = kind in filesystems.WITH_FLAGS
    assert found["protection"] == ("mode" if has_flags else "none")
    assert found["capability_missing"] == has_flags
    assert not found["append_only"]
    assert ("lacks the capability CAP_LINUX_IMMUTABLE" in found["why"]) == has_flags
    assert os.listdir(path) == []


def test_a_user_namespace_counts_as_a_missing_capability(subject: tuple[str, Path]) -> None:
    kind, path = subject
    if kind not in filesystems.WITH_FLAGS:
        pytest.skip(f"{kind} has no flags, with or without a user namespace")
    found = run_python(PROBE, path, under=filesystems.IN_USER_NAMESPACE)
    assert (found["protection"], found["capability_missing"]) == ("mode", True)
    assert "user namespace" in found["why"]
    assert os.listdir(path) == []


def test_an_ordinary_user_gets_the_mode(subject: tuple[str, Path]) -> None:
    kind, path = subject
    if kind not in filesystems.WITH_FLAGS:
        pytest.skip(f"{kind} knows no owners")
    os.chown(path, filesystems.NOBODY, filesystems.NOBODY)
    with opened(path, os.O_DIRECTORY) as fd, as_ordinary_user():
        found = protection.probe(fd)
    assert (found.protection, found.capability_missing) == ("mode", True)
    assert found.hard_links
    assert found.unnamed_files
    assert os.listdir(path) == []


def test_whoever_runs_the_tests_gets_a_protection_that_holds(scratch: Path) -> None:
    found = protection.probe(scratch)
    assert found.protection == ("mode" if found.capability_missing else "chattr")
    assert protection.choose(found, "auto", is_root=False).protection == found.protection
    assert os.listdir(scratch) == []


def test_overlayfs_is_refused_with_the_way_out() -> None:
    with filesystems.overlay() as merged:
        with pytest.raises(ProtectionError, match="is on overlay") as caught:
            protection.probe(merged)
        assert "volume" in caught.value.hint
        assert os.listdir(merged) == []


@pytest.mark.parametrize("flag", [0, fsflags.IMMUTABLE, fsflags.APPEND])
@pytest.mark.parametrize("suffix", ["", ".other"])
def test_what_a_killed_probe_left_is_removed(subject: tuple[str, Path], flag: int, suffix: str) -> None:
    kind, path = subject
    leftover = path / f"{LEFTOVER}{suffix}"
    leftover.touch()
    with cleared(leftover):
        if flag and kind in filesystems.WITH_FLAGS:
            with opened(leftover) as fd:
                fsflags.set_flag(fd, flag, True)
        protection.probe(path)
        assert os.listdir(path) == []


def test_a_killed_probe_is_cleaned_up_by_the_next(ext4: Path) -> None:
    """Killed for real, with the flag set: at the first attack."""
    clusters.need_root("setting the immutable flag")
    program = """
import signal
from pgkeep.adapters import protection
protection._open_for_writing = lambda directory_fd, name: os.kill(os.getpid(), signal.SIGKILL)
protection.probe(Path(sys.argv[1]))
"""
    with pytest.raises(AssertionError):
        run_python(program, ext4)
    (left,) = os.listdir(ext4)
    with pytest.raises(PermissionError):
        (ext4 / left).unlink()
    assert protection.probe(ext4).protection == "chattr"
    assert os.listdir(ext4) == []


def test_a_probe_under_way_elsewhere_is_left_alone(ext4: Path) -> None:
    (ext4 / LEFTOVER).touch()
    with opened(ext4 / LEFTOVER) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        protection.probe(ext4)
        assert os.listdir(ext4) == [LEFTOVER]
    protection.probe(ext4)
    assert os.listdir(ext4) == []


def test_root_s_leftover_does_not_stop_an_ordinary_user(ext4: Path) -> None:
    clusters.need_root("setting the immutable flag")
    leftover = ext4 / LEFTOVER
    leftover.touch(0o600)
    ext4.chmod(0o777)
    with cleared(leftover), opened(leftover) as flagged, opened(ext4, os.O_DIRECTORY) as fd:
        fsflags.set_flag(flagged, fsflags.IMMUTABLE, True)
        with as_ordinary_user():
            assert protection.probe(fd).protection == "mode"
        assert os.listdir(ext4) == [LEFTOVER]


def test_an_error_in_the_middle_leaves_no_canary(ext4: Path) -> None:
    program = """
from pgkeep.adapters import protection
def broken(canary, flag, attacks):
    if os.geteuid() == 0:
        protection.set_flag(canary.fd, flag, True)
    raise OSError(5, "Input/output error")
protection._try_flag = broken
print(json.dumps(errors_of(lambda: protection.probe(Path(sys.argv[1])))))
"""
    kind, message, _ = run_python(program, ext4)
    assert kind == "StorageError"
    assert "input/output error" in message
    assert os.listdir(ext4) == []


def test_a_sealed_directory_can_not_be_probed_and_says_so(ext4: Path) -> None:
    clusters.need_root("setting the immutable flag")
    with cleared(ext4), opened(ext4, os.O_DIRECTORY) as fd:
        fsflags.set_flag(fd, fsflags.IMMUTABLE, True)
        with pytest.raises(StorageError, match="not permitted") as caught:
            protection.probe(ext4)
        assert "lsattr" in caught.value.hint
    with pytest.raises(StorageError, match="does not exist"):
        protection.probe(ext4 / "missing")


def test_a_read_only_filesystem_says_so() -> None:
    with filesystems.mounted("ext4") as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(StorageError, match="read-only"):
            protection.probe(place)


def found(holds: Protection, capability_missing: bool = False) -> Probe:
    return Probe(
        protection=holds,
        why="what was seen",
        capability_missing=capability_missing,
        hard_links=True,
        unnamed_files=True,
        filesystem="ext4",
        append_only=holds == "chattr",
    )


@pytest.mark.parametrize(
    ("probe", "wanted", "is_root", "protection_wanted", "warning"),
    [
        (found("chattr"), "auto", True, "chattr", ""),
        (found("chattr"), "auto", False, "chattr", ""),
        (found("chattr"), "chattr", True, "chattr", ""),
        (found("mode"), "auto", True, "mode", "read-only, not immutable"),
        (found("mode", True), "auto", False, "mode", "read-only, not immutable"),
        (found("mode", True), "mode", True, "mode", "read-only, not immutable"),
        (found("none"), "auto", True, "none", "not protected at all"),
        (found("none"), "none", False, "none", "not protected at all"),
        (found("chattr"), "mode", True, "mode", "weaker than 'chattr'"),
        (found("chattr"), "none", True, "none", "weaker than 'chattr'"),
        (found("mode"), "none", False, "none", "weaker than 'mode'"),
    ],
)
def test_the_choice_is_the_strongest_or_what_is_wanted(
    probe: Probe, wanted: protection.Wanted, is_root: bool, protection_wanted: Protection, warning: str
) -> None:
    choice = protection.choose(probe, wanted, is_root)
    assert choice.protection == protection_wanted
    assert warning in choice.warning
    assert bool(choice.warning) == bool(warning)
    assert choice == Choice(choice.protection, choice.warning)


@pytest.mark.parametrize(
    ("probe", "wanted", "is_root", "hint"),
    [
        (found("mode", True), "auto", True, "cap_add: [LINUX_IMMUTABLE]"),
        (found("none", True), "auto", True, "cap_add: [LINUX_IMMUTABLE]"),
        (found("mode", True), "chattr", True, "cap_add: [LINUX_IMMUTABLE]"),
        (found("mode", True), "chattr", False, "run as root"),
        (found("mode"), "chattr", True, "ext4, xfs or btrfs"),
        (found("none"), "chattr", False, "ext4, xfs or btrfs"),
        (found("none"), "mode", True, "ext4, xfs or btrfs"),
        (found("none", True), "mode", True, "ext4, xfs or btrfs"),
    ],
)
def test_what_can_not_be_had_is_an_error_with_the_remedy(
    probe: Probe, wanted: protection.Wanted, is_root: bool, hint: str
) -> None:
    with pytest.raises(ProtectionError, match="what was seen") as caught:
        protection.choose(probe, wanted, is_root)
    assert hint in caught.value.hint
