"""Filesystems to try, and the ways in which a process may be weaker than root: all real."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import clusters

SOURCE = Path(__file__).parents[2] / "src"
KINDS: tuple[clusters.FilesystemKind, ...] = ("ext4", "xfs", "btrfs", "tmpfs", "ntfs", "exfat")
WITH_FLAGS: tuple[clusters.FilesystemKind, ...] = ("ext4", "xfs", "btrfs", "tmpfs")
FUSE_PROGRAMS = {
    "ntfs": (("mkfs.ntfs", "-F", "-Q", "-q"), "ntfs-3g"),
    "exfat": (("mkfs.exfat",), "mount.exfat-fuse"),
}
NOBODY = 65534
WITHOUT_CAPABILITY = ("setpriv", "--bounding-set=-linux_immutable", "--inh-caps=-linux_immutable")
IN_USER_NAMESPACE = ("unshare", "--user", "--map-root-user")
WITHOUT_PROC = ("unshare", "--mount", "sh", "-c", 'umount --lazy /proc && exec "$0" "$@"')
# asm/unistd_64.h
CALLS = {"copy_file_range": 326, "openat2": 437, "renameat2": 316}


@contextlib.contextmanager
def mounted(kind: clusters.FilesystemKind) -> Iterator[Path]:
    """A filesystem of that kind, as small as may be but with room for some MiB."""
    if kind in FUSE_PROGRAMS:
        with _fuse(kind) as path:
            yield path
        return
    with clusters.mounted_filesystem(kind, max(32, clusters.SMALLEST_MIB[kind])) as path:
        yield path


@contextlib.contextmanager
def _fuse(kind: str) -> Iterator[Path]:
    """Mounted by plain subprocess: the process adapter ends a finished program's group, and with it the daemon."""
    clusters.need_root("mounting a filesystem")
    maker, mounter = FUSE_PROGRAMS[kind]
    for program in (maker[0], mounter):
        if shutil.which(program) is None or not Path("/dev/loop-control").exists():
            clusters.skip(f"needs {program} and loop devices: a {kind} filesystem", could_run_here=False)
    with tempfile.TemporaryDirectory(prefix="pgkeep-mount-") as base, contextlib.ExitStack() as stack:
        image, place = Path(base, "image"), Path(base, "mount")
        place.mkdir()
        Path(base).chmod(0o755)
        with image.open("wb") as file:
            file.truncate(32 << 20)
        command = ["losetup", "--find", "--show", str(image)]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        stack.callback(_must, "losetup", "--detach", device)
        subprocess.run([*maker, device], check=True, capture_output=True)
        subprocess.run([mounter, device, place], check=True, capture_output=True, timeout=30)
        stack.callback(_must, "umount", str(place))
        yield place


def _must(*command: str) -> None:
    subprocess.run(command, check=True)


@contextlib.contextmanager
def overlay() -> Iterator[Path]:
    """An overlay mount whose layers are on a tmpfs."""
    with mounted("tmpfs") as base:
        for name in ("lower", "upper", "work", "merged"):
            (base / name).mkdir()
        layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, base / "merged"], check=True)
        try:
            yield base / "merged"
        finally:
            subprocess.run(["umount", base / "merged"], check=True)


@contextlib.contextmanager
def image_on(below: Path, size_mib: int) -> Iterator[Path]:
    """A mounted ext4 in a sparse image that promises more than the filesystem below it can hold."""
    image, place = below / "image", below / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def cleared(*paths: Path) -> Iterator[None]:
    """Whatever flags the body leaves on these are cleared, by stock chattr."""
    try:
        yield
    finally:
        subprocess.run(["chattr", "-f", "-i", "-a", *(path for path in paths if path.exists())], check=False)


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """The body runs with nobody's effective identity; leaving 0 clears the effective capabilities."""
    clusters.need_root("becoming an ordinary user")
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def remount(place: Path) -> None:
    """Unmount and mount the same device again: nothing is left but what is on it."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    device, kind = next((line[0], line[2]) for line in lines if line[1] == str(place))
    subprocess.run(["umount", place], check=True)
    subprocess.run(["mount", "-t", kind, device, place], check=True)


def stock_flags(path: Path) -> str:
    """What lsattr shows, e.g. ``----i---------e-------``."""
    return subprocess.run(["lsattr", "-d", path], check=True, capture_output=True, text=True).stdout.split()[0]


def run_python(text: str, *arguments: str | Path, under: tuple[str, ...] = (), fds: tuple[int, ...] = ()) -> Any:
    """Run a program that prints one JSON value; the text may use ``errors_of(call)`` for what a call raised."""
    if under:
        clusters.need_root("running with fewer rights")
        if subprocess.run([*under, "true"], capture_output=True).returncode != 0:
            clusters.skip(f"needs to be allowed `{' '.join(under[:2])}`", could_run_here=False)
    command = [*under, sys.executable, "-W", "error", "-c", PREAMBLE + text, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, pass_fds=fds, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def forbidding(call: str, code: int) -> str:
    """Program text after which the kernel answers that system call with this errno (seccomp(2), a real filter)."""
    if platform.machine() != "x86_64":
        clusters.skip("needs x86-64: the system calls' numbers are its own", could_run_here=False)
    rules = [
        (0x20, 0, 0, 0),  # load the call's number
        (0x15, 0, 1, CALLS[call]),  # another: skip one
        (0x06, 0, 0, 0x00050000 | code),  # return the errno
        (0x06, 0, 0, 0x7FFF0000),  # allow
    ]
    return FILTER.replace("RULES", repr(b"".join(struct.pack("=HBBI", *rule) for rule in rules)))


def parametrized(kinds: tuple[str, ...]) -> Any:
    """A fixture ``place``: a mounted filesystem of each kind in turn, one for all tests of the module."""

    @pytest.fixture(scope="module", params=kinds, name="mount")
    def mount(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
        with mounted(request.param) as path:
            yield request.param, path

    return mount


PREAMBLE = """
import json, os, sys
from pathlib import Path

def errors_of(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "hint", "")]
    return []

"""

FILTER = """
import ctypes
rules = ctypes.create_string_buffer(RULES)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_void_p)]
program = Program(4, ctypes.addressof(rules))
prctl = ctypes.CDLL(None, use_errno=True).prctl
zero = ctypes.c_ulong(0)
assert prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0
assert prctl(22, ctypes.c_ulong(2), ctypes.byref(program), zero, zero) == 0

"""
