"""What the images are built from: a copy of the tree with wheels and packages, for builds without a network."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.e2e import images, packages
from tests.e2e.engine import Engine, cache_folder

PROJECT = Path(__file__).parents[2]
LOCKS = tuple(PROJECT / "requirements" / f"{name}.lock" for name in ("runtime", "extractor", "build"))
# Of Debian's, for the extractor's image.
PACKAGES = ("openssh-client", "rsync")
TARGETS = ("agent", "vault", "extractor")
_FILES = (".dockerignore", "LICENSE", "README.md", "pyproject.toml")
_FOLDERS = ("deploy", "requirements", "src")
_BUILD_SECONDS = 900.0


def copy_with_wheels(engine: Engine, folder: Path) -> Path:
    """The build context in ``folder``: sources as they are now, wheels and packages. Raises ``ToolError``."""
    for name in _FOLDERS:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.whl", "*.deb"))
    for name in _FILES:
        shutil.copy2(PROJECT / name, folder)
    with _wheels() as wheels, _packages(engine) as debs:
        for wheel in wheels.iterdir():
            shutil.copy(wheel, folder / "deploy" / "docker" / "wheels")
        for package in debs.glob("*.deb"):
            shutil.copy(package, folder / "deploy" / "docker" / "packages")
    return folder


def build(engine: Engine, context: Path) -> None:
    """The three images, under the names that Compose gives them. Raises ``ToolError``."""
    for target in TARGETS:
        engine.docker(
            *("build", "--file", context / "deploy" / "docker" / "Dockerfile", "--target", target),
            *("--tag", f"pgkeep-{target}:local", context),
            timeout_seconds=_BUILD_SECONDS,
            # The builder that docker-compose 1.29 uses: its builds then find all layers made.
            environment={"DOCKER_BUILDKIT": "0"},
        )


@contextlib.contextmanager
def _wheels() -> Iterator[Path]:
    """The locks' wheels, from the cache or fetched now: for the Python of the stand-in, on this kind of processor.

    Under a lock to the end of the block: tests of another state of the sources would put theirs in their place.
    """
    digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in LOCKS) + images.PYTHON_VERSION.encode())
    folder = cache_folder() / f"wheels-{digest.hexdigest()[:12]}"
    with (cache_folder() / "wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(folder)
        yield folder


@contextlib.contextmanager
def _packages(engine: Engine) -> Iterator[Path]:
    """What the extractor's image has beyond the stand-in of the Python image, in the same way."""
    status = engine.output("run", "--rm", "--network", "none", images.PYTHON, "cat", "/var/lib/dpkg/status") + "\n"
    digest = hashlib.sha256(f"{PACKAGES}{status}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"packages-{digest}"
    with (cache_folder() / "packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for older in cache_folder().glob("packages-*"):
                shutil.rmtree(older)
            with tempfile.TemporaryDirectory(prefix="packages-", dir=cache_folder()) as name:
                apt = packages.PrivateApt(Path(name) / "apt", packages.debian_sources(), status)
                apt.download(*PACKAGES).rename(folder)
        yield folder


def _fetch(folder: Path) -> None:
    for older in cache_folder().glob("wheels-*"):
        shutil.rmtree(older)
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=cache_folder()) as name:
        fetched = Path(name) / "wheels"
        only = ("--only-binary=:all:", "--python-version", images.PYTHON_VERSION, "--require-hashes")
        for lock in LOCKS:
            packages.must(sys.executable, "-m", "pip", "download", "-q", *only, "--dest", fetched, "-r", lock)
        fetched.rename(folder)
