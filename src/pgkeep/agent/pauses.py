"""A service's sleep, and the only moments at which a signal may end it: never between starting a run and knowing it."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import NoReturn

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Pauses:
    """From its making on, the ending signals are kept for the next pause. Later ones are ignored: one is enough."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._is_pausing = False
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def pause(self, seconds: float) -> None:
        """Raises ``SystemExit`` (128 + the signal), or ``KeyboardInterrupt`` for SIGINT."""
        self._is_pausing = True
        # What comes from here on ends us by itself; what came before does now.
        if self._received is not None:
            self._end(self._received)
        time.sleep(seconds)
        self._is_pausing = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._is_pausing:
            self._end(number)
        self._received = number

    def _end(self, number: int) -> NoReturn:
        for each in _ENDING:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
