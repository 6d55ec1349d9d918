"""A run in a process of its own: its memory goes back when it ends, and its words come through as they are said."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pgkeep.adapters import process
from pgkeep.adapters.durable import explain

DOCUMENT_LIMIT_BYTES = 16 * 1024 * 1024
_SPEAKER = "pgkeep: "
_WARNING = "warning: "


class Log(Protocol):
    """Where records go."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def error(self, text: str) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How it ended. ``code`` is negative for a signal; ``document`` is what it printed, {} where it printed none."""

    code: int
    document: Mapping[str, Any]
    seconds: float

    @property
    def error(self) -> str:
        """Why it failed, in its own words if it found any."""
        said = self.document.get("error")
        if isinstance(said, str) and said:
            return said
        return f"it was killed by signal {-self.code}" if self.code < 0 else f"it ended with exit code {self.code}"


class Child:
    """Under way from the start. :meth:`poll` it often; :meth:`stop` it, whatever comes."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Log) -> None:
        """Raises ``ToolError``, ``StorageError``."""
        self._log = log
        self._position = 0
        self._started = time.monotonic()
        with contextlib.ExitStack() as stack:
            with explain(tempfile.gettempdir(), "starting a run"):
                self._output = stack.enter_context(tempfile.TemporaryFile())
            self._running = stack.enter_context(
                process.start(
                    arguments,
                    environment=environment,
                    stdout=self._output.fileno(),
                    # It has children and a staging directory to clear when we are killed.
                    death_signal=signal.SIGTERM,
                )
            )
            self._stack = stack.pop_all()

    @property
    def pid(self) -> int:
        return self._running.pid

    def poll(self) -> Ended | None:
        """None while it runs. Passes on what it said since."""
        code = self._running.poll()
        self._pass_on()
        if code is None:
            return None
        ended = Ended(code, self._document(), time.monotonic() - self._started)
        self.stop()
        return ended

    def stop(self) -> None:
        """Ask it to end, and wait until it has cleared up. May be called twice."""
        with self._stack:
            if self._running.poll() is None:
                self._running.stop()
                self._pass_on()

    def _pass_on(self) -> None:
        text, self._position = self._running.messages_from(self._position)
        for line in filter(None, map(str.strip, text.splitlines())):
            said = line.removeprefix(_SPEAKER)
            if said.startswith(_WARNING):
                self._log.warn(said.removeprefix(_WARNING))
            else:
                self._log.note(said)

    def _document(self) -> Mapping[str, Any]:
        data = os.pread(self._output.fileno(), DOCUMENT_LIMIT_BYTES, 0)
        try:
            document = json.loads(data)
        except ValueError:
            return {}  # killed before it could say anything
        return document if isinstance(document, dict) else {}
