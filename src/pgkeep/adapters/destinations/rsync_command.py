"""rsync's command lines: building, running and reading them.

Only rsync's own protocol is spoken, never a command of the remote shell's: so it also works with an account that
``rrsync`` restricts. Names of files go through the protocol, as filters or in the list of files; the remote command
line holds nothing of theirs to quote.

Nothing is ever deleted: no option here can remove a file, or replace one without keeping it (the marker excepted).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import select
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pgkeep.adapters import process
from pgkeep.adapters.destinations.rsync_errors import Server, error_of
from pgkeep.adapters.destinations.rsync_ssh import Connection
from pgkeep.adapters.process import Completed, Running
from pgkeep.errors import StorageError, ToolError

PARTIAL_DIRECTORY: Final = ".pgkeep-partial"
# Older ones leave it to the remote shell to split what they send (rsync's NEWS for 3.2.4).
_OLDEST: Final = (3, 2, 4)
# The hash that both sides compare whole files by. MD5 is the strongest one that every rsync since 3.0 has and computes
# rightly: xxh128, the usual choice, is no cryptographic hash, and SHA-1 overflowed a buffer before 3.3.0.
_ENVIRONMENT: Final = {"RSYNC_CHECKSUM_LIST": "md5", "RSYNC_OLD_ARGS": "0", "RSYNC_PROTECT_ARGS": "0"}
# Silence that ends it: while either side reads or flushes a file, it says nothing. Dead connections are ssh's matter.
_SILENCE_SECONDS: Final = 300
_SLOWEST_BYTES_PER_SECOND: Final = 10 * 1024 * 1024
_TICK_SECONDS: Final = 0.5
_DOWNLOAD_TICK_SECONDS: Final = 0.02
_OUTPUT_BLOCK_BYTES: Final = 64 * 1024
# rrsync allows one rsync at a time, and ours before may not have quite ended there.
_BUSY_TRIES: Final = 20
_BUSY_SECONDS: Final = 0.25
_BUSY: Final = "Another instance of rrsync"
_DONE: Final = re.compile(rb"^\s*(\d+)\s+\d+%", re.MULTILINE)
_LISTED: Final = re.compile(rb"([-a-zA-Z?])\S{9,10}\s+(\d+) \d+/\d\d/\d\d \d\d:\d\d:\d\d (.*)", re.DOTALL)
_ESCAPED: Final = re.compile(rb"\\#([0-7]{3})")
_UNKNOWN: Final = re.compile(r"option (--[a-z-]+)\S* has been disabled|(--[a-z-]+)\S*: unknown option")
_UNKNOWN_TO_RRSYNC: Final = "invalid rsync-command syntax"
# What can be done without, and what is lost with it.
_OPTIONAL: Final = {
    "--fsync": "has no `rsync --fsync` (3.2.4 or newer): a copy may be lost if it crashes just after",
    "--partial-dir": "does not allow to keep what was cut off: an upload that was interrupted begins anew",
}

Tick = Callable[[bytes], None]
"""Told of output as it comes (as often empty): several times a second, so that others see that work goes on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What a listing says of one name. ``kind`` as ls(1) shows it: ``-`` a file, ``d`` a directory, ``l`` a link."""

    path: str
    kind: str
    size_bytes: int


class Rsync:
    """Runs rsync against one directory on a server, over one connection.

    Every method raises ``StorageError`` (or what :func:`error_of` makes of a failure).
    """

    def __init__(self, connection: Connection, path: str, bandwidth_limit_kib: int | None, directory: Path) -> None:
        self._connection = connection
        self._target = _target(connection.server.host, path)
        self._bandwidth = [f"--bwlimit={bandwidth_limit_kib}"] if bandwidth_limit_kib else []
        self._directory = directory
        self._missing: set[str] = set()

    @property
    def server(self) -> Server:
        return self._connection.server

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{self.server.label} {_OPTIONAL[option]}" for option in sorted(self._missing))

    def top_level(self) -> list[Entry]:
        """What lies in the directory itself."""
        return self._list(["--dirs"])

    def below(self, names: Iterable[str]) -> list[Entry]:
        """Everything of these names of the directory: the files, and the directories with all that they hold."""
        rules = [f"--include={pattern}" for name in names for pattern in (_rule(name), _rule_for_all_in(name))]
        return self._list(["--recursive", *rules, "--exclude=*"])

    def one(self, path: str) -> Entry | None:
        """What stands there now."""
        found = self._list(["--recursive", *only([path])])
        return next((entry for entry in found if entry.path == path), None)

    def send(self, path: str, source: int, size_bytes: int, more: Sequence[str], tick: Tick) -> bool:
        """Send an open file to a path there: under a temporary name, then renamed by rsync itself.

        False: it was not sent, for what stands there (``more`` says what is to happen to that).
        """
        optional = ["--fsync", f"--partial-dir={PARTIAL_DIRECTORY}"]
        arguments = ["--no-whole-file", "--chmod=F0400", "--info=progress2", "--outbuf=L", "--out-format=%i %n", *more]
        with self._as_tree(path, source) as tree:
            completed = self._run_with(optional, [*arguments, *tree], size_bytes, tick, (source,))
        self._require(completed, f"sending {path}")
        return any(line.startswith(b"<f") for line in _lines(completed.stdout))

    def is_equal(self, path: str, source: int, size_bytes: int, tick: Tick) -> bool | None:
        """Is the file there equal to the open one? Both sides read theirs in full and compare size and MD5.

        None: the server won't say (``rrsync -no-overwrite`` has it pass over whatever exists).
        """
        arguments = ["--dry-run", "--checksum", "-ii", "--out-format=%i %n"]
        with self._as_tree(path, source) as tree:
            completed = self._run([*arguments, *tree], size_bytes, tick, (source,))
        self._require(completed, f"comparing {path}")
        lines = [line for line in _lines(completed.stdout) if line[1:2] == b"f"]
        # `.f`: nothing to send. No line at all: nothing was compared.
        return all(line.startswith(b".f") for line in lines) if lines else None

    def receive(
        self, rules: Sequence[str], target: Path, size_bytes: int, tick: Tick, more: Sequence[str] = ()
    ) -> Completed:
        """Files that the rules let through, into a directory of ours. What is not there, or is no file, is left out."""
        arguments = ["--recursive", "--inplace", "--whole-file", "--chmod=D0700,F0600", *more, *rules]
        source = [self._target, f"{target}/"]
        return self._run([*arguments, *source], size_bytes, tick, (), _DOWNLOAD_TICK_SECONDS)

    def _list(self, more: list[str]) -> list[Entry]:
        completed = self._run(["--list-only", *more, self._target], 0, _ignore)
        self._require(completed, "listing")
        return [entry for line in completed.stdout.split(b"\n") if line and (entry := self._entry(line)).path != "."]

    def _entry(self, line: bytes) -> Entry:
        found = _LISTED.fullmatch(line)
        if found is None:
            raise StorageError(f"{self.server.label} lists what can't be understood: {line[:200]!r}")
        kind, size, name = found.groups()
        plain = _ESCAPED.sub(lambda code: bytes([int(code[1], 8)]), name)
        return Entry(os.fsdecode(plain), kind.decode(), int(size))

    @contextlib.contextmanager
    def _as_tree(self, path: str, source: int) -> Iterator[list[str]]:
        """Arguments that send the open file under this path: a link to it stands there in a directory of ours.

        ``--relative`` makes what folders are missing, with any rsync; ``--no-implied-dirs``: and changes none that is
        there. The file may have lost its name meanwhile.
        """
        tree = Path(tempfile.mkdtemp(prefix="outgoing-", dir=self._directory))
        link = tree / path
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"/proc/self/fd/{source}")
            yield ["--copy-links", "--relative", "--no-implied-dirs", f"{tree}/./{path}", self._target]
        finally:
            shutil.rmtree(tree, ignore_errors=True)

    def _run_with(
        self, optional: Sequence[str], arguments: Sequence[str], size_bytes: int, tick: Tick, descriptors: Sequence[int]
    ) -> Completed:
        """Once more without those of the optional arguments that the server does not know."""
        while True:
            chosen = [each for each in optional if each.partition("=")[0] not in self._missing]
            completed = self._run([*chosen, *arguments], size_bytes, tick, descriptors)
            missing = _missing(completed, chosen) if completed.return_code else set()
            if not missing:
                return completed
            self._missing |= missing

    def _run(
        self,
        arguments: Sequence[str],
        size_bytes: int,
        tick: Tick,
        descriptors: Sequence[int] = (),
        tick_seconds: float = _TICK_SECONDS,
    ) -> Completed:
        silence_seconds = _SILENCE_SECONDS + size_bytes // _SLOWEST_BYTES_PER_SECOND
        command = ["rsync", "-e", self._connection.command, f"--timeout={silence_seconds}", *self._bandwidth]
        command += ["--no-human-readable", "--8-bit-output", *arguments]
        # No aliases of popt's, and no other file of the user's.
        environment = {**_ENVIRONMENT, "HOME": str(self._directory)}
        tries = _BUSY_TRIES
        while True:
            with process.start(command, environment=environment, descriptors=descriptors) as running:
                completed = _finish(running, tick, tick_seconds)
            tries -= 1
            if completed.return_code == 0 or _BUSY not in completed.stderr or tries == 0:
                return completed
            time.sleep(_BUSY_SECONDS)

    def _require(self, completed: Completed, doing: str) -> None:
        if completed.return_code != 0:
            raise error_of(self.server, completed, doing)


def only(paths: Iterable[str]) -> list[str]:
    """Rules that let these files through and nothing else."""
    rules: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            rules[f"--include={_rule('/'.join(parts[:depth]))}/"] = None
        rules[f"--include={_rule(path)}"] = None
    return [*rules, "--exclude=*"]


def ending_with(suffix: str, name: str) -> list[str]:
    """Rules that let through all files below a name of the directory that end so."""
    below = f"/{_escaped(name)}"
    return [f"--include={below}/", f"--include={below}/**/", f"--include={below}/**{suffix}", "--exclude=*"]


@functools.cache
def require_rsync() -> None:
    """Raises ``ToolError`` where our own rsync is missing or too old."""
    install = f"install rsync {'.'.join(map(str, _OLDEST))} or newer"
    if shutil.which("rsync") is None:
        raise ToolError("rsync is missing", install)
    shown = process.run(["rsync", "--version"]).stdout.decode(errors="replace")
    found = re.search(r"rsync\s+version v?(\d+)\.(\d+)\.(\d+)", shown)
    if found is None or tuple(map(int, found.groups())) < _OLDEST:
        raise ToolError(f"this rsync is not fit for copies: {shown.partition(chr(10))[0]}", install)


def done_bytes(output: bytes) -> int | None:
    """How far rsync says it is, by ``--info=progress2``; None where it says nothing."""
    found = _DONE.findall(output.replace(b"\r", b"\n"))
    return int(found[-1]) if found else None


def _ignore(_: bytes) -> None:
    pass


def _lines(output: bytes) -> list[bytes]:
    return re.split(rb"[\r\n]+", output)


def _finish(running: Running, tick: Tick, tick_seconds: float) -> Completed:
    output = bytearray()
    descriptor = running.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        ready = poll.poll(tick_seconds * 1000)
        block = os.read(descriptor, _OUTPUT_BLOCK_BYTES) if ready else b""
        output += block
        tick(block)
        if ready and not block:
            return Completed(running.wait(), bytes(output), running.messages())


def _missing(completed: Completed, chosen: Sequence[str]) -> set[str]:
    names = {option.partition("=")[0] for option in chosen}
    found = {name for either in _UNKNOWN.findall(completed.stderr) for name in either}
    return names if _UNKNOWN_TO_RRSYNC in completed.stderr else names & found


def _target(host: str, path: str) -> str:
    """``host:path/``. An account that rrsync restricts takes ``/`` or ``.`` for its directory."""
    directory = (path or ".").removesuffix("/") + "/"
    return f"[{host}]:{directory}" if ":" in host else f"{host}:{directory}"


def _rule(path: str) -> str:
    """A pattern that is anchored at the directory; a backslash is plain where nothing else is a wildcard."""
    special = any(character in path for character in "*?[")
    return f"/{_escaped(path)}" if special else f"/{path}"


def _rule_for_all_in(path: str) -> str:
    return f"/{_escaped(path)}/***"


def _escaped(path: str) -> str:
    return re.sub(r"([\\*?\[])", r"\\\1", path)
