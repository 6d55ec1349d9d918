"""The extractor as a service: pass after pass, with a word on its health in between."""

from __future__ import annotations

import os
import time
from typing import Final, NoReturn, Protocol

from pgkeep.adapters import clock, durable
from pgkeep.domain import health
from pgkeep.errors import BusyError, NotFoundError, PgkeepError
from pgkeep.extractor.extract import Extractor
from pgkeep.extractor.work import Report
from pgkeep.progress import Progress

HEALTH_NAME: Final = ".health.json"
_BEAT_SECONDS: Final = health.INTERVAL_SECONDS * 2 / 3
# When another pass is under way, or the vault is yet to be made.
_SOON_SECONDS: Final = 10.0
# A new deployment is watched: its first backup is copied when it is sealed, not an interval later.
_BEGINNING_SECONDS: Final = 900.0
# Of many troubles of one kind, so many are named.
_NAMED_AT_MOST: Final = 10


class Log(Progress, Protocol):
    """A listener that also takes errors."""

    def error(self, text: str) -> None:
        """Something failed."""


class Service:
    """Runs passes of ``extractor`` every ``check_interval_seconds``; listens to them itself, to give signs of life."""

    def __init__(self, extractor: Extractor, log: Log, check_interval_seconds: float) -> None:
        self._extractor = extractor
        self._log = log
        self._interval_seconds = check_interval_seconds
        self._problems: tuple[str, ...] = ()
        self._last_beat: float | None = None
        self._beginning_ends = time.monotonic() + _BEGINNING_SECONDS

    def run(self) -> NoReturn:
        """Until a signal ends the process."""
        self._log.note(
            f"copying {self._extractor.settings.active} to {self._extractor.destination.label}, "
            f"with a look every {self._interval_seconds:g} s"
        )
        while True:
            self._beat()
            self._sleep(self._pass())

    def step(self, name: str) -> None:
        self._log.step(name)
        self._beat_if_due()

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        self._log.advance(done_bytes, total_bytes)
        self._beat_if_due()

    def note(self, text: str) -> None:
        self._log.note(text)

    def warn(self, text: str) -> None:
        self._log.warn(text)

    def _pass(self) -> float:
        """Seconds to the next one."""
        pause_seconds = self._interval_seconds
        try:
            report = self._extractor.run_pass(self, try_all=False)
        except BusyError as error:
            self._log.note(f"{error.message}: this pass is put off")
            return min(_SOON_SECONDS, self._interval_seconds)
        except (PgkeepError, OSError) as error:
            known = error if isinstance(error, PgkeepError) else _explained(error)
            self._log.error(f"{known.message}. {known.hint}")
            self._problems = (known.message,)
            if isinstance(error, NotFoundError):
                pause_seconds = min(_SOON_SECONDS, self._interval_seconds)
        else:
            self._report(report)
            if report.extracted:
                self._beginning_ends = 0.0
            elif time.monotonic() < self._beginning_ends:
                pause_seconds = min(_SOON_SECONDS, self._interval_seconds)
        self._beat()
        return pause_seconds

    def _report(self, report: Report) -> None:
        done = {"copied": report.extracted, "repaired": report.repaired, "recognised": report.adopted}
        for word, paths in done.items():
            for path in paths:
                self._log.note(f"{word} {path}")
        if report.rechecked:
            self._log.note(f"read {len(report.rechecked)} copies again: they are whole")
        for failure in report.troubles[:_NAMED_AT_MOST]:
            self._log.error(f"{failure.path or report.destination}: {failure.error.message}. {failure.error.hint}")
        self._problems = problems(report)
        if len(report.troubles) > _NAMED_AT_MOST:
            self._log.error(self._problems[-1])

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left_seconds := deadline - time.monotonic()) > 0:
            time.sleep(min(left_seconds, _BEAT_SECONDS))
            self._beat_if_due()

    def _beat_if_due(self) -> None:
        if self._last_beat is None or time.monotonic() - self._last_beat >= _BEAT_SECONDS:
            self._beat()

    def _beat(self) -> None:
        self._last_beat = time.monotonic()
        word = health.Health(role="extractor", pid=os.getpid(), time=clock.now(), problems=self._problems)
        directory = self._extractor.settings.state
        try:
            with durable.explain(directory, "making the extractor's directory"):
                directory.mkdir(mode=0o700, exist_ok=True)
            durable.write_atomically(directory, HEALTH_NAME, health.encode(word))
        except PgkeepError as error:
            # Copying goes on; the health check hears of it by the silence.
            self._log.error(f"the health file could not be written: {error.message}. {error.hint}")


def problems(report: Report) -> tuple[str, ...]:
    """What is wrong, in sentences; of many, some and their number."""
    troubles = report.troubles
    named = [f"{failure.path or report.destination}: {failure.error.message}" for failure in troubles[:_NAMED_AT_MOST]]
    more = len(troubles) - len(named)
    return (*named, *([f"and {more} more of this kind"] if more else []))


def _explained(error: OSError) -> PgkeepError:
    return durable.storage_error(error, str(error.filename or "a file"), "copying")
