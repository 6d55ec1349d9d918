"""What the images are built from: a copy of the tree with the wheels of the locks, for builds without a network."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from tests.e2e import images, packages
from tests.e2e.engine import Engine, cache_folder

PROJECT = Path(__file__).parents[2]
LOCKS = (PROJECT / "requirements" / "runtime.lock", PROJECT / "requirements" / "build.lock")
TARGETS = ("agent", "vault", "extractor")
_FILES = (".dockerignore", "LICENSE", "README.md", "pyproject.toml")
_FOLDERS = ("deploy", "requirements", "src")
_BUILD_SECONDS = 900.0


def copy_with_wheels(folder: Path) -> Path:
    """The build context in ``folder``: sources as they are now, and wheels. Raises ``ToolError``."""
    for name in _FOLDERS:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.whl"))
    for name in _FILES:
        shutil.copy2(PROJECT / name, folder)
    for wheel in _wheels().iterdir():
        shutil.copy(wheel, folder / "deploy" / "docker" / "wheels")
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


def _wheels() -> Path:
    """The locks' wheels, from the cache or fetched now: for the Python of the stand-in, on this kind of processor."""
    digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in LOCKS) + images.PYTHON_VERSION.encode())
    folder = cache_folder() / f"wheels-{digest.hexdigest()[:12]}"
    with (cache_folder() / "wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    for older in cache_folder().glob("wheels-*"):
        shutil.rmtree(older)
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=cache_folder()) as name:
        fetched = Path(name) / "wheels"
        only = ("--only-binary=:all:", "--python-version", images.PYTHON_VERSION, "--require-hashes")
        for lock in LOCKS:
            packages.must(sys.executable, "-m", "pip", "download", "-q", *only, "--dest", fetched, "-r", lock)
        fetched.rename(folder)
