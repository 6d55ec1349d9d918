"""The real command line in a process of its own, with one fault at a named step.

``FAULT`` in the environment is a JSON object, see :class:`Plan`; the arguments are pgkeep's.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import errno
import fcntl
import functools
import json
import os
import signal
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgkeep.adapters import clock, pgbinaries
from pgkeep.cli import log, render
from pgkeep.cli.main import main
from pgkeep.errors import DatabaseError

# What counts as a step beside the named ones: the listener is told of bytes while pg_dump runs.
ADVANCE = "advance"
# And every call that changes something on the disk: just after it returned.
CALL = "call"
_CHANGING: tuple[tuple[types.ModuleType, str], ...] = (
    *(
        (os, name)
        for name in ("mkdir", "open", "write", "rename", "link", "unlink", "rmdir", "chmod", "fchmod", "fsync")
    ),
    (fcntl, "ioctl"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What goes wrong, and when. ``action``: kill, term, int, full, error, pause or nothing (only record)."""

    action: str = "nothing"
    at: str = ""
    nth: int = 1
    record: str = ""
    gate: str = ""
    days_ago: int = 0
    without_embedded: bool = False


def inject(plan: Plan) -> None:
    seen: list[str] = []

    def step(_: object, name: str, *__: object) -> None:
        seen.append(name)
        if plan.record and (name not in (ADVANCE, CALL) or name == plan.at):
            with Path(plan.record).open("a") as file:
                file.write(f"{name}\n")
        if name == plan.at and seen.count(name) == plan.nth:
            _act(plan)

    # The listeners of the command line and of the services: nothing of what works is replaced.
    render._Log.step = step  # type: ignore[assignment, method-assign]
    log.ServiceLog.step = step  # type: ignore[assignment, method-assign]
    render._Log.advance = lambda self, *sizes: step(self, ADVANCE)  # type: ignore[method-assign]
    if plan.at == CALL:
        for module, name in _CHANGING:
            setattr(module, name, _told_of(getattr(module, name), functools.partial(step, None, CALL)))
    if plan.days_ago:
        _turn_clock_back(plan.days_ago)
    if plan.without_embedded:
        pgbinaries.EMBEDDED_DIRECTORIES = ()  # type: ignore[assignment]


def _told_of(call: Callable[..., Any], tell: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(*arguments: Any, **more: Any) -> Any:
        result = call(*arguments, **more)
        tell()
        return result

    return wrapped


def _act(plan: Plan) -> None:
    if plan.action == "pause":
        Path(plan.gate).write_text("reached")
        while Path(plan.gate).exists():
            time.sleep(0.005)
    elif plan.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif plan.action == "error":
        raise DatabaseError("an error was injected", "none")
    elif plan.action != "nothing":
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[plan.action])


def _turn_clock_back(days: int) -> None:
    real = clock.now
    clock.now = lambda: real() - dt.timedelta(days=days)


if __name__ == "__main__":
    inject(Plan(**json.loads(os.environ.pop("FAULT", "{}"))))
    main()
