"""The extractor as a service: a thread for every destination, and a word on the health of all in between."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from pgkeep.adapters import clock, durable
from pgkeep.domain import health
from pgkeep.errors import PgkeepError
from pgkeep.extractor.extract import Extractor
from pgkeep.extractor.worker import Log, Worker

HEALTH_NAME: Final = ".health.json"
_BEAT_SECONDS: Final = health.INTERVAL_SECONDS * 2 / 3
# For passes to end when the service is asked to. What does not by then (a share that hangs) is left to the system.
_ENDING_SECONDS: Final = 10.0


class Service:
    """Passes of every one of ``extractors``, none in the way of another. ``state``: where the health file goes."""

    def __init__(self, extractors: Sequence[Extractor], log: Log, state: Path) -> None:
        self._log = log
        self._state = state
        self._stop = threading.Event()
        self._news = threading.Event()
        # Set at the end: a request that waits for its answer would hold the process up for minutes more.
        self.hangs = False
        self._workers = [Worker(each, log, self._stop, self._news, is_named=len(extractors) > 1) for each in extractors]

    def run(self) -> NoReturn:
        """Until a signal ends the process, or a thread dies of what should never happen."""
        try:
            for worker in self._workers:
                worker.start()
            while True:
                self._beat()
                self._news.wait(_BEAT_SECONDS)
                self._news.clear()
                for worker in self._workers:
                    worker.raise_death()
        finally:
            self._stop.set()
            deadline = time.monotonic() + _ENDING_SECONDS
            for worker in self._workers:
                worker.end(deadline - time.monotonic())
            self.hangs = any(worker.is_alive for worker in self._workers)

    def _beat(self) -> None:
        problems = tuple(problem for worker in self._workers for problem in worker.problems())
        word = health.Health(role="extractor", pid=os.getpid(), time=clock.now(), problems=problems)
        try:
            with durable.explain(self._state, "making the extractor's directory"):
                self._state.mkdir(mode=0o700, exist_ok=True)
            durable.write_atomically(self._state, HEALTH_NAME, health.encode(word))
        except PgkeepError as error:
            # Copying goes on; the health check hears of it by the silence.
            self._log.error(f"the health file could not be written: {error.message}. {error.hint}")
