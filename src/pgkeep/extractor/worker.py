"""One destination's thread of the service: pass after pass, and what is wrong with it at the moment."""

from __future__ import annotations

import datetime as dt
import threading
import time
from typing import Final, Protocol

from pgkeep.adapters import clock, durable
from pgkeep.errors import BusyError, NotFoundError, PgkeepError, StorageError
from pgkeep.extractor.extract import Extractor
from pgkeep.extractor.work import Report
from pgkeep.progress import Progress

# When another pass is under way, or the vault is yet to be made; and the first pause after a failure.
_SOON_SECONDS: Final = 10.0
# A new deployment is watched: its first backup is copied when it is sealed, not an interval later.
_BEGINNING_SECONDS: Final = 900.0
# A slow share may hold one call up for long; what takes longer than this hangs.
_SILENCE_SECONDS: Final = 600.0
# Trouble with a destination that is not required is a problem of the service's after so long.
_PATIENCE: Final = dt.timedelta(days=1)
# Of many troubles of one kind, so many are named.
_NAMED_AT_MOST: Final = 10


class Log(Progress, Protocol):
    """A listener that also takes errors; several threads tell it."""

    def error(self, text: str) -> None:
        """Something failed."""


class Worker:
    """Runs passes of ``extractor`` until ``stop`` is set, and sets ``news`` when there is something to say of it.

    Listens to the passes itself: a pass that is told to stop ends at its next sign of life, leaving nothing half.
    ``is_named``: there are others, so what it says begins with the destination's name.
    """

    def __init__(
        self, extractor: Extractor, log: Log, stop: threading.Event, news: threading.Event, *, is_named: bool
    ) -> None:
        self._extractor = extractor
        self._settings = extractor.settings
        self._log = log
        self._stop = stop
        self._news = news
        self._prefix = f"{extractor.settings.name}: " if is_named else ""
        self._thread = threading.Thread(target=self._live, name=extractor.settings.name, daemon=True)
        self._death: BaseException | None = None
        self._problems: tuple[str, ...] = ()
        self._is_urgent = False
        self._failures_in_a_row = 0
        self._moved_at: float | None = None
        self._beginning_ends = time.monotonic() + _BEGINNING_SECONDS

    def start(self) -> None:
        self._log.note(
            f"{self._prefix}copying {self._settings.active} to {self._extractor.destination.label}, "
            f"with a look every {self._settings.interval_seconds:g} s"
        )
        self._thread.start()

    def end(self, seconds: float) -> None:
        """Wait so long for the thread to end. ``stop`` must be set."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, seconds))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def raise_death(self) -> None:
        """What the thread died of, in the thread that calls."""
        if self._death is not None:
            raise self._death

    def problems(self) -> tuple[str, ...]:
        """What is wrong with the destination now, in sentences; nothing for one that may be away for a while."""
        moved_at = self._moved_at
        if moved_at is not None and (silence_seconds := time.monotonic() - moved_at) > _SILENCE_SECONDS:
            hangs = f"nothing has moved for {silence_seconds:.0f} s: does {self._extractor.destination.label} hang?"
            return (f"{self._prefix}{hangs}",)
        since = self._extractor.failing_since
        is_patient = not (self._settings.required or self._is_urgent)
        if is_patient and since is not None and since <= clock.now() < since + _PATIENCE:
            return ()
        return tuple(f"{self._prefix}{problem}" for problem in self._problems)

    def step(self, name: str) -> None:
        self._log.step(name)
        self._move()

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        self._log.advance(done_bytes, total_bytes)
        self._move()

    def note(self, text: str) -> None:
        self._log.note(f"{self._prefix}{text}")

    def warn(self, text: str) -> None:
        self._log.warn(f"{self._prefix}{text}")

    def _move(self) -> None:
        self._moved_at = time.monotonic()
        if self._stop.is_set():
            # As the signal itself would end it: every file in the making is removed on the way out.
            raise SystemExit

    def _live(self) -> None:
        try:
            while not self._stop.is_set():
                self._moved_at = time.monotonic()
                pause_seconds = self._pass()
                self._moved_at = None
                self._news.set()
                self._stop.wait(pause_seconds)
        except SystemExit:
            return
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that looks after this one
            self._death = error
            self._news.set()

    def _pass(self) -> float:
        """Seconds to the next one."""
        try:
            report = self._extractor.run_pass(self, try_all=False)
        except BusyError as error:
            self.note(f"{error.message}: this pass is put off")
            return self._soon()
        except NotFoundError as error:
            self._fail(error, is_urgent=True)
            return self._soon()
        except (PgkeepError, OSError) as error:
            self._fail(error if isinstance(error, PgkeepError) else _explained(error), is_urgent=False)
            return self._retry_seconds()
        except Exception as error:  # noqa: BLE001 - the other destinations go on whatever an answer of this one's does
            text = f"an internal error: {type(error).__name__}: {error}"
            self._fail(PgkeepError(text, "please report it; this destination is tried again"), is_urgent=True)
            return self._retry_seconds()
        self._report(report)
        if any(isinstance(failure.error, StorageError) for failure in report.failures):
            return self._retry_seconds()
        self._failures_in_a_row = 0
        if report.extracted:
            self._beginning_ends = 0.0
        return self._soon() if time.monotonic() < self._beginning_ends else self._settings.interval_seconds

    def _soon(self) -> float:
        return min(_SOON_SECONDS, self._settings.interval_seconds)

    def _retry_seconds(self) -> float:
        """Twice as long after each failure, up to the interval."""
        self._failures_in_a_row += 1
        # The exponent is bounded: years of failures must not make a number that no float holds.
        return min(_SOON_SECONDS * 2.0 ** min(self._failures_in_a_row - 1, 20), self._settings.interval_seconds)

    def _fail(self, error: PgkeepError, *, is_urgent: bool) -> None:
        self._log.error(f"{self._prefix}{error.message}. {error.hint}")
        # Without a memory of its own (its directory can't be written) there is nobody to be patient with.
        self._is_urgent = is_urgent or self._extractor.failing_since is None
        self._problems = (error.message,)

    def _report(self, report: Report) -> None:
        done = {
            "copied": report.extracted,
            "repaired": report.repaired,
            "recognised": report.adopted,
            "removed, as its time was over,": report.expired,
        }
        for word, paths in done.items():
            for path in paths:
                self.note(f"{word} {path}")
        if report.rechecked:
            self.note(f"read {len(report.rechecked)} copies again: they are whole")
        for failure in report.troubles[:_NAMED_AT_MOST]:
            subject = failure.path or report.destination
            self._log.error(f"{self._prefix}{subject}: {failure.error.message}. {failure.error.hint}")
        self._is_urgent = bool(report.alarm)
        self._problems = problems(report)
        if len(report.troubles) > _NAMED_AT_MOST:
            self._log.error(f"{self._prefix}{self._problems[-1]}")


def problems(report: Report) -> tuple[str, ...]:
    """What is wrong, in sentences; of many, some and their number."""
    troubles = report.troubles
    named = [f"{failure.path or report.destination}: {failure.error.message}" for failure in troubles[:_NAMED_AT_MOST]]
    more = len(troubles) - len(named)
    return (*named, *([f"and {more} more of this kind"] if more else []))


def _explained(error: OSError) -> PgkeepError:
    return durable.storage_error(error, str(error.filename or "a file"), "copying")
