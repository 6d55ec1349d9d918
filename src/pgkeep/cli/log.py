"""What a service says on stdout: one record a line, at once, as text or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Literal

from pgkeep.adapters import clock
from pgkeep.cli import render

Format = Literal["text", "json"]
Level = Literal["info", "warning", "error"]


class ServiceLog:
    """A ``Progress`` that writes records. Steps and bytes are not worth one."""

    def __init__(self, role: str, form: Format = "text", also: Callable[[str], None] | None = None) -> None:
        self._role = role
        self._form = form
        self._also = also

    def step(self, name: str) -> None:
        pass

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        pass

    def note(self, text: str) -> None:
        self.write("info", text)

    def warn(self, text: str) -> None:
        self.write("warning", text)

    def error(self, text: str) -> None:
        self.write("error", text)

    def write(self, level: Level, text: str) -> None:
        moment = clock.now().strftime("%Y-%m-%dT%H:%M:%SZ")
        if self._form == "json":
            record = {"time": moment, "level": level, "role": self._role, "message": text}
            line = json.dumps(record, ensure_ascii=False)
        else:
            line = f"{moment} {level} {self._role}: {render.printable(text)}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self._also is not None:
            self._also(line)
