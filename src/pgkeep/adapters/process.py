"""The one place that starts programs.

Arguments are lists, never a shell's text. Children run under ``LC_ALL=C.UTF-8`` with English messages,
in a process group of their own that is killed whole, and die with us even after ``kill -9`` where
util-linux's ``setpriv --pdeathsig`` is there (an orphaned pg_dump would go on writing).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from pgkeep.errors import ToolError

# The last part of a program's messages is what explains a failure; more would only fill memory.
MESSAGE_LIMIT_BYTES = 64 * 1024
TERMINATE_GRACE_SECONDS = 5.0


_MESSAGES_IN_ENGLISH = {"LC_ALL": "C.UTF-8", "LC_MESSAGES": "C", "LANGUAGE": ""}
# Given to a program on purpose or not at all: its environment can be read in /proc.
_SECRET_VARIABLES = frozenset({"PGPASSWORD", "DB_PASSWORD"})


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """The user and group that a child runs as, without supplementary groups."""

    uid: int
    gid: int


@dataclasses.dataclass(frozen=True, slots=True)
class Completed:
    """A finished program: its return code (negative: the signal), its output, its messages' tail."""

    return_code: int
    stdout: bytes
    stderr: str


class Running:
    """A program under way. Use as a context manager: leaving it kills what still runs."""

    def __init__(self, child: subprocess.Popen[bytes], messages: IO[bytes]) -> None:
        self._child = child
        self._messages = messages

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def stdout(self) -> IO[bytes]:
        assert self._child.stdout is not None, "started without a pipe"
        return self._child.stdout

    @property
    def stdin(self) -> IO[bytes]:
        assert self._child.stdin is not None, "started without a pipe"
        return self._child.stdin

    def poll(self) -> int | None:
        """The return code, or None while it runs."""
        return self._child.poll()

    def wait(self, timeout_seconds: float | None = None) -> int:
        """The return code. Raises ``TimeoutError``."""
        try:
            return self._child.wait(timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"still running after {timeout_seconds} s") from error

    def messages(self) -> str:
        """The tail of what it wrote to stderr so far."""
        size_bytes = os.fstat(self._messages.fileno()).st_size
        tail = os.pread(self._messages.fileno(), MESSAGE_LIMIT_BYTES, max(0, size_bytes - MESSAGE_LIMIT_BYTES))
        return tail.decode(errors="replace").strip()

    def messages_from(self, position: int) -> tuple[str, int]:
        """What it wrote to stderr since ``position``, up to the last whole line, and the position after that."""
        data = os.pread(self._messages.fileno(), MESSAGE_LIMIT_BYTES, position)
        end = data.rfind(b"\n") + 1
        return data[:end].decode(errors="replace"), position + end

    def stop(self) -> None:
        """Ask the whole group to end, then make it."""
        if self._child.poll() is None:
            self._signal_group(signal.SIGTERM)
            try:
                self._child.wait(TERMINATE_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._signal_group(signal.SIGKILL)
                self._child.wait()
        self._signal_group(signal.SIGKILL)

    def close(self) -> None:
        self.stop()
        for stream in (self._child.stdout, self._child.stdin):
            if stream is not None:
                # A broken pipe at close says only that the child ended before it read all.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._messages.close()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)


@contextlib.contextmanager
def start(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    identity: Identity | None = None,
    directory: str | os.PathLike[str] | None = None,
    descriptors: Sequence[int] = (),
    death_signal: signal.Signals = signal.SIGKILL,
) -> Iterator[Running]:
    """Start a program; ``environment`` is added to ours. ``stdin``/``stdout``: a descriptor or PIPE/DEVNULL;
    ``descriptors``: what else it inherits, under the same numbers. ``death_signal`` is what it gets when we are
    killed: SIGTERM for a program that has workers of its own, which SIGKILL would leave behind.

    Raises ``ToolError`` where the program can't be started.
    """
    messages = tempfile.TemporaryFile()
    command = [*_dying_with_us(identity, death_signal), *(os.fspath(argument) for argument in arguments)]
    try:
        child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=messages,
            env={**_inherited(), **_MESSAGES_IN_ENGLISH, **(environment or {})},
            cwd=directory,
            start_new_session=True,
            pass_fds=descriptors,
        )
    except OSError as error:
        messages.close()
        raise ToolError(f"can't start {command[0]}: {error.strerror}", "install it, or mend PATH") from error
    running = Running(child, messages)
    try:
        yield running
    finally:
        running.close()


def run(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    environment: Mapping[str, str] | None = None,
    input_bytes: bytes | None = None,
    timeout_seconds: float | None = None,
    identity: Identity | None = None,
    directory: str | os.PathLike[str] | None = None,
    descriptors: Sequence[int] = (),
) -> Completed:
    """Run a program to its end with small input and output. Raises ``ToolError``, ``TimeoutError``."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
        given.write(input_bytes or b"")
        given.seek(0)
        with start(
            arguments,
            environment=environment,
            stdin=given.fileno(),
            stdout=output.fileno(),
            identity=identity,
            directory=directory,
            descriptors=descriptors,
        ) as running:
            return_code = running.wait(timeout_seconds)
            messages = running.messages()
        output.seek(0)
        return Completed(return_code, output.read(), messages)


PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _SECRET_VARIABLES}


@functools.cache
def _setpriv() -> str | None:
    path = shutil.which("setpriv")
    if path is None:
        return None
    helped = subprocess.run([path, "--help"], capture_output=True, check=False)
    return path if b"--pdeathsig" in helped.stdout else None


def _dying_with_us(identity: Identity | None, death_signal: signal.Signals) -> list[str]:
    """The prefix of the command: ``setpriv`` sets the parent-death signal and the identity, then execs."""
    path, option = _setpriv(), f"--pdeathsig={death_signal.name.removeprefix('SIG')}"
    if identity is not None and identity.uid != os.geteuid():
        if path is None:
            raise ToolError("setpriv of util-linux is missing", "install util-linux")
        user = [f"--reuid={identity.uid}", f"--regid={identity.gid}", "--clear-groups"]
        return [path, option, *user, "--"]
    return [path, option, "--"] if path else []
