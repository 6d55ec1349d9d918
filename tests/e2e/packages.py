"""What the end-to-end tests need from Debian, and packages taken from it without touching the system's own apt."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pgkeep.adapters import process
from pgkeep.errors import ToolError

REQUIRED = ("docker.io", "docker-compose", "iptables", "debootstrap", "e2fsprogs", "iproute2")
# Debian's engine has no client plugins; the next release's packages need only its C library, 2.34 or newer.
PLUGINS = {"docker-compose": "docker-compose", "docker-buildx": "docker-buildx"}
PLUGIN_SUITE = "trixie"
SUITE = "bookworm"
INSTALL_HINT = "as root: python -m tests.e2e.engine install"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_POLICY = Path("/usr/sbin/policy-rc.d")
_LOCK_WAIT = ("-o", "DPkg::Lock::Timeout=600")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A repository of Debian's that this machine's apt uses: where it is and which suite."""

    uri: str
    suite: str


def must(*arguments: str | Path, timeout_seconds: float = 1200.0, **environment: str) -> str:
    """Run, return what it printed. Raises ``ToolError`` with the end of its messages."""
    completed = process.run(arguments, environment=environment, timeout_seconds=timeout_seconds)
    if completed.return_code != 0:
        said = (completed.stderr or completed.stdout.decode(errors="replace"))[-4000:]
        raise ToolError(
            f"{' '.join(map(str, arguments[:4]))} … ended with {completed.return_code}: {said}", INSTALL_HINT
        )
    return completed.stdout.decode()


def missing_packages() -> list[str]:
    """Those of ``REQUIRED`` that dpkg does not call installed."""
    return [name for name in REQUIRED if not _is_installed(name)]


def missing_plugins(plugins: Path) -> list[str]:
    return [name for name in PLUGINS.values() if not (plugins / name).is_file()]


def install(plugins: Path) -> None:
    """Install what is missing, with no service started, and unpack the client's plugins into ``plugins``."""
    must("apt-get", "update", "-qq", *_LOCK_WAIT)
    missing = missing_packages()
    if missing:
        with _no_services():
            options = ("-qq", "-y", "--no-install-recommends", *_LOCK_WAIT)
            must("apt-get", "install", *options, *missing, DEBIAN_FRONTEND="noninteractive")
    if missing_plugins(plugins):
        _unpack_plugins(plugins)


def debian_sources() -> list[Source]:
    """The machine's own repositories of Debian ``SUITE``: its mirror and its security updates."""
    form = "$(ORIGIN) $(REPO_URI) $(CODENAME)"
    printed = must("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    fields = [line.split(" ") for line in printed.splitlines()]
    found = dict.fromkeys(Source(uri, suite) for origin, uri, suite in fields if origin == "Debian")
    if not any(source.suite == SUITE for source in found):
        raise ToolError(f"apt here knows no repository of Debian {SUITE}", "use Debian bookworm; run apt-get update")
    return list(found)


def mirror() -> str:
    """The repository that ``SUITE`` itself comes from."""
    return next(source.uri for source in debian_sources() if source.suite == SUITE)


class PrivateApt:
    """An apt with lists, sources and installed packages of its own, in ``folder``; the machine's settings else."""

    def __init__(self, folder: Path, sources: Sequence[Source], status: str = "") -> None:
        self._folder = folder
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "status").write_text(status)
        lines = [f"deb [signed-by={_KEYRING}] {source.uri} {source.suite} main\n" for source in sources]
        (folder / "sources.list").write_text("".join(lines))
        self._run("apt-get", "update", "-qq")

    def download(self, *names: str) -> Path:
        """The folder with these packages and what they depend on, beyond what ``status`` calls installed."""
        self._run("apt-get", "install", "-qq", "-y", "--no-install-recommends", "--download-only", *names)
        return self._folder / "cache" / "archives"

    def download_alone(self, *names: str) -> list[Path]:
        """These packages, without what they depend on."""
        self._run("apt-get", "download", "-qq", *names)
        return sorted(self._folder.glob("*.deb"))

    def _run(self, program: str, *arguments: str) -> None:
        settings = {
            "Dir::Etc::SourceList": self._folder / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": self._folder / "lists",
            "Dir::State::status": self._folder / "status",
            "Dir::State::extended_states": self._folder / "extended_states",
            "Dir::Cache": self._folder / "cache",
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "true",
        }
        options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
        ran = process.run([program, *options, *arguments], directory=self._folder, timeout_seconds=900.0)
        if ran.return_code != 0:
            raise ToolError(f"{program} {' '.join(arguments)}: {ran.stderr[-2000:]}", "is the mirror reachable?")


def _is_installed(name: str) -> bool:
    asked = process.run(["dpkg-query", "-W", "-f", "${db:Status-Status}", name])
    return asked.return_code == 0 and asked.stdout == b"installed"


def _unpack_plugins(plugins: Path) -> None:
    plugins.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pgkeep-e2e-apt-") as folder:
        apt = PrivateApt(Path(folder), [Source(mirror(), PLUGIN_SUITE)])
        for package in apt.download_alone(*PLUGINS):
            must("dpkg-deb", "--extract", package, Path(folder) / "tree")
        for name in PLUGINS.values():
            unpacked = Path(folder) / "tree/usr/libexec/docker/cli-plugins" / name
            shutil.copy(unpacked, plugins / f".{name}.new")
            (plugins / f".{name}.new").rename(plugins / name)


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Packages must not start a daemon of their own: it would use the machine's bridge and iptables."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
