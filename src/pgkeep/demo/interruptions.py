"""Ctrl-C, SIGTERM and a closed terminal, so that they end the demo and never its clearing up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruptions:
    """While entered, the first of these signals raises an exception, and the later ones are ignored.

    SIGINT raises ``KeyboardInterrupt``, the others ``SystemExit`` with 128 plus their number. A signal that was
    ignored before (nohup) stays ignored. For the main thread only.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending: int | None = None
        self._over = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruptions:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal during the block is raised at its end: for what must not stop half way."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and self._pending is not None:
                number, self._pending = self._pending, None
                self._raise(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._over:
            return
        if self._depth:
            self._pending = self._pending or number
        else:
            self._raise(number)

    def _raise(self, number: int) -> NoReturn:
        # Not SIG_IGN: Python complains on stderr of a signal that arrives while that is being set.
        self._over = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
