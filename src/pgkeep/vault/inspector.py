"""The vault's side of the inspector: hostile structure is read by a process without rights, and that not believed.

Over a socket pair go ``NUMBER SIZE`` with two descriptors (the vault's private copy, read-only, and a pipe for the
answer), and back ``NUMBER STATUS`` when the fork that looked has ended. The pipe brings :class:`Findings` as JSON.
Size and digest of the copy are the vault's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import msgspec

from pgkeep.adapters import process
from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.errors import IntegrityError, PgkeepError, ToolError
from pgkeep.vault import inspector_process
from pgkeep.vault.inspect import Findings, Inspection, digest

_START_SECONDS = 30.0
_END_SECONDS = 2.0
_GRACE_SECONDS = 30.0
_TICK_SECONDS = 1.0
_PIECE_BYTES = 64 * 1024
# 170 000 tables. What it says is held in memory several times over before it is a manifest.
_ANSWER_LIMIT_BYTES = 32 * 1024 * 1024
_AGAIN_HINT = "make the dump again; if that ends the same way, report it"


class InspectorGoneError(PgkeepError):
    """The process that looks into dumps is gone and can't be started again with as few rights: nothing is sealed."""


def _nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class _Started:
    """A process that listens, and the user who started it."""

    stack: contextlib.ExitStack
    running: process.Running
    line: socket.socket
    uid: int


class Inspector:
    """Looks into dumps with another process's eyes. Use as a context manager, from before rights are given up.

    A process that died is replaced only by one with as few rights: as whoever started the first. A vault that has
    dropped to its own user since can't make one, and fails closed; restarted as root, it can.
    """

    def __init__(self, alive: Callable[[], None] = _nothing, module: str = inspector_process.__name__) -> None:
        """``alive`` is called while it works; ``module`` is what the process runs. Raises ``ToolError``."""
        self.alive = alive
        self._module = module
        self._number = 0
        self._started = _start(module)

    @property
    def pid(self) -> int:
        return self._started.running.pid

    def __enter__(self) -> Inspector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The process ends when its socket does."""
        self._started.line.close()
        # Of another user than we are by now: it can't be killed, and need not be.
        with contextlib.suppress(TimeoutError, PermissionError):
            self._started.running.wait(_END_SECONDS)
            self._started.stack.close()

    def inspect(self, file: LocalFile) -> Inspection:
        """Digest and size by ourselves; what the file holds in the words of the inspector.

        Raises ``IntegrityError`` where the look did not come to an end: killed, out of memory or of time, nonsense for
        an answer. Raises ``InspectorGoneError``.
        """
        self._replace_if_gone()
        self._number += 1
        size_bytes = file.size_bytes
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._send(file, size_bytes, writing)
            finally:
                os.close(writing)
            sha256, counted_bytes = digest(_Ticking(file.descriptor, self.alive))
            deadline = time.monotonic() + inspector_process.wall_seconds(size_bytes) + _GRACE_SECONDS
            answer = self._read(reading, deadline)
            self._require_end(deadline)
        finally:
            os.close(reading)
        findings = _decode(answer)
        return Inspection(counted_bytes, sha256, findings.contents, findings.defects)

    def _replace_if_gone(self) -> None:
        if self._started.running.poll() is None:
            return
        if os.geteuid() != self._started.uid:
            raise InspectorGoneError("the process that looks into dumps is gone", "restart the vault")
        self.close()
        self._started = _start(self._module)

    def _send(self, file: LocalFile, size_bytes: int, answer: int) -> None:
        # By way of /proc the same inode is opened anew, for reading only: a copy of our descriptor could write.
        readonly = os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _gone_if_broken():
                socket.send_fds(self._started.line, [b"%d %d" % (self._number, size_bytes)], [readonly, answer])
        finally:
            os.close(readonly)

    def _read(self, pipe: int, deadline: float) -> bytes:
        answer = bytearray()
        while len(answer) <= _ANSWER_LIMIT_BYTES:
            self._wait(pipe, deadline)
            piece = os.read(pipe, _PIECE_BYTES)
            if not piece:
                return bytes(answer)
            answer += piece
        raise IntegrityError("what the inspector says of the dump is too large to be true", _AGAIN_HINT)

    def _require_end(self, deadline: float) -> None:
        """The status of the fork that looked; answers to questions that were given up are passed over."""
        while True:
            self._wait(self._started.line.fileno(), deadline)
            with _gone_if_broken():
                message = self._started.line.recv(_PIECE_BYTES)
            if not message:
                raise InspectorGoneError("the process that looks into dumps ended", "restart the vault")
            number, status = map(int, message.split())
            if number == self._number:
                _require_success(status)
                return

    def _wait(self, descriptor: int, deadline: float) -> None:
        watched = select.poll()
        watched.register(descriptor, select.POLLIN)
        while not watched.poll(_TICK_SECONDS * 1000):
            self.alive()
            if time.monotonic() > deadline:
                raise IntegrityError("the look into the dump took too long", _AGAIN_HINT)


class _Ticking(LocalFile):
    """Says at every read that work goes on."""

    def __init__(self, descriptor: int, alive: Callable[[], None]) -> None:
        super().__init__(descriptor)
        self._alive = alive

    def read(self, offset: int, length: int) -> bytes:
        self._alive()
        return super().read(offset, length)


def _start(module: str) -> _Started:
    """Raises ``ToolError`` where it doesn't say in time that it is ready."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        with theirs:
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno())]
            running = stack.enter_context(process.start(command, stdout=process.DEVNULL, descriptors=[theirs.fileno()]))
        ours.settimeout(_START_SECONDS)
        try:
            greeting = ours.recv(_PIECE_BYTES)
        except OSError:
            greeting = b""
        if greeting != b"ready":
            raise ToolError(f"the process that looks into dumps did not start: {running.messages()}")
        ours.settimeout(None)
        return _Started(stack.pop_all(), running, ours, os.geteuid())


@contextlib.contextmanager
def _gone_if_broken() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"the process that looks into dumps can't be reached: {error.strerror}"
        raise InspectorGoneError(message, "restart the vault") from error


def _require_success(status: int) -> None:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        raise IntegrityError(f"the look into the dump was ended by {name}", _AGAIN_HINT)
    code = os.waitstatus_to_exitcode(status)
    if code == inspector_process.OUT_OF_MEMORY:
        raise IntegrityError("the dump takes more memory to look into than a whole one could", _AGAIN_HINT)
    if code != inspector_process.WHOLE:
        raise IntegrityError(f"the look into the dump broke off (exit {code})", _AGAIN_HINT)


def _decode(answer: bytes) -> Findings:
    try:
        return msgspec.json.decode(answer, type=Findings)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"what the inspector says of the dump makes no sense: {error}", _AGAIN_HINT) from error
