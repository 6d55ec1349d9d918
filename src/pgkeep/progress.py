"""How long work reports on itself, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener. Calls are cheap and may come from the thread that does the work only."""

    def step(self, name: str) -> None:
        """A named point of the work was reached, e.g. ``seal.manifest-linked``.

        Fault tests stop the process at each of these: name every point where a crash matters.
        """

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        """So many bytes of the present phase are done; the total where it is known."""

    def note(self, text: str) -> None:
        """Something that a person would want to read."""

    def warn(self, text: str) -> None:
        """Something that a person must read."""


class Silent:
    """The listener that does nothing."""

    def step(self, name: str) -> None:
        pass

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass
