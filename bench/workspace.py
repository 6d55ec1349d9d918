"""The scratch directory: one run at a time, everything gone at the end, flags included."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from pgkeep.adapters import durable, process
from pgkeep.errors import BusyError, RefusedError

DEFAULT = Path(__file__).with_name(".scratch")
MARK = "pgkeep-bench"


class Workspace:
    """A directory of our own, from ``with`` to its end. What a killed run left in it is cleared first.

    Raises ``RefusedError`` for a directory with other things in it, ``BusyError`` while another run has it.
    """

    def __init__(self, directory: Path = DEFAULT) -> None:
        self.directory = directory.absolute()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workspace:
        with contextlib.ExitStack() as stack:
            if self.directory.is_dir() and any(self.directory.iterdir()) and not (self.directory / MARK).exists():
                raise RefusedError(f"{self.directory} is not empty", "name a directory that does not exist yet")
            self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock(stack)
            stack.callback(remove, self.directory)
            for path in self.directory.iterdir():
                remove(path)
            (self.directory / MARK).touch()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def place(self, prefix: str) -> Iterator[Path]:
        """A new and empty directory, gone at the end of the block."""
        path = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=self.directory))
        try:
            yield path
        finally:
            remove(path)

    def require_space(self, needed_bytes: int) -> None:
        """Raises ``RefusedError``."""
        free_bytes = durable.free_bytes(self.directory)
        needed, free = f"{needed_bytes / 1e9:.0f} GB", f"{free_bytes / 1e9:.0f} GB"
        if free_bytes < needed_bytes:
            raise RefusedError(
                f"this run needs {needed} or so; {self.directory} has {free} free",
                "choose a smaller --scale or --memory-scales, or another --scratch",
            )

    def _lock(self, stack: contextlib.ExitStack) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another run uses {self.directory}", "wait for it, or name another --scratch") from error


def remove(path: Path) -> None:
    """Remove a file or a tree with sealed files in it. Raises ``OSError`` where something stays."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    unseal(path)
    shutil.rmtree(path)


def unseal(path: Path) -> None:
    """Every file of a tree may be removed or replaced afterwards. Raises ``OSError``."""
    if os.geteuid() == 0:
        # Its code says nothing: it is non-zero for sockets and for filesystems without flags.
        process.run(["chattr", "-R", "-f", "-i", "-a", path])
    else:
        for directory, _, _ in os.walk(path):
            os.chmod(directory, 0o700)


def settle() -> None:
    """Wait until everything is on the disk, so that nobody pays for who ran before."""
    os.sync()
