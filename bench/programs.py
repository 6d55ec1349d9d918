"""The programs that are measured: pipelines of stock tools, and pgkeep as anybody runs it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgkeep.adapters import process, scratch_cluster
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.errors import ToolError

Command = Sequence[str | os.PathLike[str]]
SOURCE = Path(__file__).parents[1] / "src"
SAMPLE_SECONDS = 0.02
# Whatever the caller's environment says of databases, vaults and destinations must not reach a measured program.
FOREIGN_PREFIXES = ("PGKEEP_", "DB_", "BACKUP_", "PG", "EXTERNAL_", "S3_", "RSYNC_", "AWS_", "RCLONE_")
KEPT = "PGKEEP_PG_BIN"


def forget_environment() -> None:
    """Take everything out of our own environment that would change what is measured."""
    for name in [name for name in os.environ if name.startswith(FOREIGN_PREFIXES) and name != KEPT]:
        del os.environ[name]


def run(command: Command, environment: Mapping[str, str] | None = None) -> bytes:
    """Run to the end; its output. Raises ``ToolError``."""
    completed = process.run(command, environment=environment)
    if completed.return_code != 0:
        # With --json pgkeep says there what went wrong.
        told = completed.stderr + completed.stdout.decode(errors="replace")
        raise _failure(command, completed.return_code, told)
    return completed.stdout


def pipeline(commands: Sequence[Command], target: Path | None) -> None:
    """Run ``a | b > target`` without a shell; None discards the output. Raises ``ToolError`` if any of them fails."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(target.open("xb")).fileno() if target else process.DEVNULL
        source, running = process.DEVNULL, []
        for command in commands[:-1]:
            reader, writer = os.pipe()
            with _closing(source, writer):
                running.append(stack.enter_context(process.start(command, stdin=source, stdout=writer)))
            source = reader
        with _closing(source):
            running.append(stack.enter_context(process.start(commands[-1], stdin=source, stdout=output)))
        for command, each in zip(commands, running, strict=True):
            if each.wait() != 0:
                raise _failure(command, each.wait(), each.messages())


def run_sampled(command: Command, environment: Mapping[str, str], sample: Callable[[int], None]) -> float:
    """Run to the end and look at the process every few milliseconds; the seconds it took. Raises ``ToolError``."""
    started = time.monotonic()
    with process.start(command, environment=environment, stdout=process.DEVNULL) as running:
        while running.poll() is None:
            sample(running.pid)
            time.sleep(SAMPLE_SECONDS)
        if running.wait() != 0:
            raise _failure(command, running.wait(), running.messages())
    return time.monotonic() - started


def pgkeep_command() -> list[str]:
    """The installed console script where there is one, else the module."""
    script = Path(sys.executable).with_name("pgkeep")
    return [os.fspath(script)] if script.exists() else [sys.executable, "-m", "pgkeep"]


class Pgkeep:
    """The command line on one root and one database."""

    def __init__(self, root: Path, cluster: ScratchCluster, database: str) -> None:
        self.root = root
        configuration = root / "pgkeep.toml"
        configuration.touch()
        self.environment = {
            # The machine's own configuration stays out of it.
            "PGKEEP_CONFIG": os.fspath(configuration),
            "PGKEEP_ROOT": os.fspath(root),
            "DB_HOST": os.fspath(cluster.socket_directory),
            "DB_PORT": str(scratch_cluster.PORT),
            "DB_USER": scratch_cluster.SUPERUSER,
            "DB_NAME": database,
            "PYTHONPATH": os.pathsep.join([os.fspath(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }

    def command(self, *arguments: str) -> list[str]:
        return [*pgkeep_command(), *arguments]

    def run(self, *arguments: str) -> Any:
        """Run with ``--json``; what it printed. Raises ``ToolError``."""
        return json.loads(run(self.command(*arguments, "--json"), self.environment))


@contextlib.contextmanager
def _closing(*descriptors: int) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def _failure(command: Command, return_code: int, messages: str) -> ToolError:
    name = " ".join(os.fspath(word) for word in command[:3])
    return ToolError(f"{name} … failed ({return_code}): {messages[-2000:]}", "the figures would mean nothing")
