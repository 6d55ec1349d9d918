"""The agent as a service: it looks what is due, starts one run at a time, and says how it fares.

Moments are the wall clock's, which may be set back and forth: nothing waits for long without looking again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pgkeep.adapters import clock, durable, lock
from pgkeep.agent import backups, entries, run, state
from pgkeep.agent.child import Child, Ended, Log
from pgkeep.agent.pauses import Pauses
from pgkeep.domain import health, schedule
from pgkeep.domain.names import Tier
from pgkeep.errors import BusyError, ConfigurationError, DatabaseError, PgkeepError, RefusedError, UsageError

LOCK_NAME = ".agent.lock"
HEALTH_NAME = ".agent-health.json"
IDLE_PAUSE_SECONDS = 1.0
BUSY_PAUSE_SECONDS = 0.2
LOOK_INTERVAL = dt.timedelta(seconds=60)
HEARTBEAT = dt.timedelta(seconds=10)
# A database that stays away for longer is reported to the vault as a failed run.
PATIENCE_WITH_DATABASE = dt.timedelta(seconds=60)
LONGEST_PROBE_PAUSE = dt.timedelta(seconds=60)
_TAKEOVER_SECONDS = 5.0
_LOCK_WAIT_SECONDS = 3600
# Another try of the same would end the same.
_PERMANENT_CODES = frozenset({UsageError.exit_code, ConfigurationError.exit_code, RefusedError.exit_code})


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """``command``: this program and its options, to which ``agent backup …`` is added; ``environment``: its secrets."""

    staging: Path
    active: Path
    schedule: Mapping[Tier, str]
    zone: str
    vault_timeout: dt.timedelta
    command: Sequence[str]
    environment: Mapping[str, str]


@dataclasses.dataclass(slots=True)
class _Database:
    """What is known of the server: doubtful until a probe says that it answers."""

    doubtful: bool = True
    failures: int = 0
    failing_since: dt.datetime | None = None
    probed_at: dt.datetime | None = None
    message: str = ""

    @property
    def probe_pause(self) -> dt.timedelta:
        return min(dt.timedelta(seconds=2 ** min(max(self.failures, 1) - 1, 10)), LONGEST_PROBE_PAUSE)


class Service:
    """Call :meth:`run`, or in a test :meth:`begin`, :meth:`tick` as often as time passes, and :meth:`stop`."""

    def __init__(self, setup: Setup, log: Log) -> None:
        self._setup = setup
        self._log = log
        self._state = state.State(first_started_at=clock.now())
        self._database = _Database()
        self._child: Child | None = None
        self._ended: Callable[[Ended, dt.datetime], None] = self._end_run
        self._failures = 0
        self._failed_at: dt.datetime | None = None
        self._looked_at: dt.datetime | None = None
        self._look_again_at: dt.datetime | None = None
        self._beaten_at: dt.datetime | None = None
        self._reported: tuple[str, ...] = ()
        self._troubles: dict[str, str] = {}
        self._ailments: list[str] = []

    @property
    def is_busy(self) -> bool:
        """Whether a run (or a probe) is under way."""
        return self._child is not None

    def run(self) -> NoReturn:
        """Until a signal ends it, as an exception. Raises ``BusyError`` where another agent is at work."""
        pauses = Pauses()
        entries.prepare(self._setup.staging)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock.locked(self._setup.staging / LOCK_NAME, _TAKEOVER_SECONDS))
            stack.callback(self.stop)
            self.begin()
            while True:
                self.tick()
                pauses.pause(BUSY_PAUSE_SECONDS if self._child else IDLE_PAUSE_SECONDS)

    def begin(self) -> None:
        """Raises ``StorageError``, ``ConfigurationError``."""
        now = clock.now()
        entries.sweep_unfinished(self._setup.staging)
        self._state = state.load(self._setup.staging, now)
        if self._state.unended > 1 and self._state.tried_at:
            # Whatever killed us in the middle of a run, more than once: not at once again.
            self._failures, self._failed_at = self._state.unended - 1, self._state.tried_at
        coming = ", ".join(
            f"{tier} at {schedule.next_slot(expression, self._setup.zone, now):%Y-%m-%d %H:%M} UTC"
            for tier, expression in self._setup.schedule.items()
        )
        self._log.note(f"the agent has started; next {coming}" if coming else "the agent has started; nothing is due")

    def tick(self) -> None:
        """Do what is to be done now. Never waits."""
        now = clock.now()
        if self._child is not None:
            self._attend(self._child, now)
        if self._is_time_to_look(now):
            self._guarded("looking what is due", lambda: self._look(now))
        problems = self._problems()
        if problems != self._reported or _is_past(self._beaten_at, HEARTBEAT, now):
            self._beat(problems, now)

    def stop(self) -> None:
        """End what is under way, and remember that it was not by accident."""
        if self._child is not None:
            self._child.stop()
            self._child = None
            self._state.unended = 0
            self._save()
        self._log.note("the agent has stopped")

    # ------------------------------------------------------------ what is due

    def _is_time_to_look(self, now: dt.datetime) -> bool:
        if self._looked_at is None or self._look_again_at is None:
            return True
        return not self._looked_at <= now < self._look_again_at

    def _look(self, now: dt.datetime) -> None:
        self._looked_at, self._look_again_at = now, now + LOOK_INTERVAL
        newest = self._newest(now)
        self._ailments = [*self._overdue(newest, now), *self._unanswered(now)]
        if self._child is not None:
            return
        self._tidy()
        due = self._due(newest, now)
        if due and self._is_worth_trying(now) and self._may_try(due, now):
            self._start_run(due, now)
        elif self._database.doubtful and _is_past(self._database.probed_at, self._database.probe_pause, now):
            self._start("probe", ["agent", "check"], self._end_probe)
        else:
            self._look_again_at = min([now + LOOK_INTERVAL, *self._coming(due, now)])

    def _tidy(self) -> None:
        """Remove what the vault has answered meanwhile; a run by hand does that itself."""
        if entries.waiting(self._setup.staging):
            with contextlib.suppress(BusyError), lock.locked(self._setup.staging / run.LOCK_NAME):
                run.tell_and_collect(self._setup.staging, self._setup.active, self._log)

    def _newest(self, now: dt.datetime) -> dict[Tier, dt.datetime | None]:
        """None too for what the clock was set back behind: when that time comes again, its slot is due all the same."""
        found: dict[Tier, dt.datetime | None] = {}

        def look() -> None:
            found.update(backups.newest(self._setup.active, self._setup.schedule))

        # Where the names can't be read, backups are made by the slots that were dealt with alone.
        self._guarded("listing the backups", look)
        self._state.ahead.update({tier: each for tier, each in found.items() if each and schedule.is_future(each, now)})
        return {tier: None if each == self._state.ahead.get(tier) else each for tier, each in found.items()}

    def _due(self, newest: Mapping[Tier, dt.datetime | None], now: dt.datetime) -> dict[Tier, dt.datetime]:
        expressions, zone = self._setup.schedule, self._setup.zone
        due = schedule.due(expressions, zone, newest, self._state.handled, now)
        for tier, slot in self._state.pending.items():
            # Of several databases some may have their backup already: the tier is due until all have.
            if tier in expressions and schedule.latest_slot(expressions[tier], zone, now) == slot:
                due[tier] = slot
        return due

    def _is_worth_trying(self, now: dt.datetime) -> bool:
        since = self._database.failing_since
        return not self._database.doubtful or (since is not None and abs(now - since) >= PATIENCE_WITH_DATABASE)

    def _may_try(self, due: Mapping[Tier, dt.datetime], now: dt.datetime) -> bool:
        if due.items() - self._state.pending.items():
            self._failures = 0  # a new slot has come
        return not self._failures or _is_past(self._failed_at, schedule.retry_delay(self._failures), now)

    def _coming(self, due: Mapping[Tier, dt.datetime], now: dt.datetime) -> list[dt.datetime]:
        """The moments at which there is something to do again."""
        found = [schedule.next_slot(each, self._setup.zone, now) for each in self._setup.schedule.values()]
        if due and self._failures and self._failed_at:
            found.append(self._failed_at + schedule.retry_delay(self._failures))
        if self._database.doubtful and self._database.probed_at:
            found.append(self._database.probed_at + self._database.probe_pause)
        return [moment for moment in found if moment > now]

    # ------------------------------------------------------------ runs

    def _start_run(self, due: Mapping[Tier, dt.datetime], now: dt.datetime) -> None:
        tiers = [tier for tier in Tier if tier in due]
        arguments = ["agent", "backup", *(tier.value for tier in tiers), "--json", "--wait", str(_LOCK_WAIT_SECONDS)]
        since = self._state.pending_since if dict(due) == self._state.pending else None
        if since is not None and not schedule.is_future(since, now):
            arguments += ["--since", since.isoformat()]
        else:
            since = now
        self._state.pending, self._state.tried_at, self._state.pending_since = dict(due), now, since
        self._state.unended += 1
        self._save()
        self._log.note(f"backing up: {', '.join(tiers)}")
        self._start("run", arguments, self._end_run)

    def _start(self, what: str, arguments: Sequence[str], ended: Callable[[Ended, dt.datetime], None]) -> None:
        def start() -> None:
            self._child = Child([*self._setup.command, *arguments], self._setup.environment, self._log)
            self._ended = ended

        self._guarded(f"starting a {what}", start)

    def _attend(self, child: Child, now: dt.datetime) -> None:
        ended = child.poll()
        if ended is not None:
            self._child = None
            self._look_again_at = now
            self._ended(ended, now)

    def _end_run(self, ended: Ended, now: dt.datetime) -> None:
        tiers = ", ".join(tier for tier in Tier if tier in self._state.pending)
        self._state.unended = 0
        if ended.code == 0:
            self._log.note(f"backed up: {tiers} in {ended.seconds:.0f} s")
            self._state.overrun = self._overrun(ended, now)
            self._settle("")
        elif ended.code in _PERMANENT_CODES:
            self._log.error(f"the backup ({tiers}) failed and is not tried again before the next slot: {ended.error}")
            self._settle(f"the last run ({tiers}) failed: {ended.error}")
        else:
            self._fail(tiers, ended, now)
        self._save()

    def _settle(self, failure: str) -> None:
        self._state.handled.update(self._state.pending)
        self._state.pending, self._state.pending_since = {}, None
        self._state.last_failure = failure
        self._failures, self._failed_at = 0, None

    def _fail(self, tiers: str, ended: Ended, now: dt.datetime) -> None:
        self._failures += 1
        self._failed_at = now
        self._state.last_failure = f"the last run ({tiers}) failed: {ended.error}"
        minutes = schedule.retry_delay(self._failures).total_seconds() / 60
        self._log.error(
            f"the backup ({tiers}) failed; next try in {minutes:.0f} min or at the next slot: {ended.error}"
        )
        if hint := ended.document.get("hint"):
            self._log.note(str(hint))
        if ended.code == DatabaseError.exit_code and not self._database.doubtful:
            self._database = _Database()

    def _overrun(self, ended: Ended, now: dt.datetime) -> str:
        ran = [self._setup.schedule[tier] for tier in self._state.pending if tier in self._setup.schedule]
        shortest = min((schedule.interval(each, self._setup.zone, now).total_seconds() for each in ran), default=0)
        if not shortest or ended.seconds <= shortest:
            return ""
        return f"the last run took {ended.seconds:.0f} s, longer than the {shortest:.0f} s between two that are due"

    def _end_probe(self, ended: Ended, now: dt.datetime) -> None:
        known = self._database
        if ended.code == 0:
            if known.failures:
                self._log.note("the database answers again")
                self._failed_at = None  # whatever failed meanwhile is tried at once
            self._database = _Database(doubtful=False)
            return
        known.failures += 1
        known.failing_since = known.failing_since or now
        known.probed_at, known.message = now, ended.error
        self._log.warn(f"waiting for the database: {ended.error}")

    # ------------------------------------------------------------ health

    def _overdue(self, newest: Mapping[Tier, dt.datetime | None], now: dt.datetime) -> list[str]:
        found = []
        if schedule.is_future(self._state.first_started_at, now):
            self._state.first_started_at = now
        for tier, expression in self._setup.schedule.items():
            known = newest.get(tier)
            handled = self._state.handled.get(tier)
            if known is None and tier in self._state.ahead and handled and not schedule.is_future(handled, now):
                known = handled
            since = max(filter(None, (known, self._state.first_started_at)))
            if schedule.is_overdue(expression, self._setup.zone, since, now):
                last = f"the last is of {known:%Y-%m-%d %H:%M} UTC" if known else "there is none"
                found.append(f"the {tier} backup is overdue: {last}")
        return found

    def _unanswered(self, now: dt.datetime) -> list[str]:
        silent = [each for each in entries.waiting(self._setup.staging) if now - each.since > self._setup.vault_timeout]
        if not silent:
            return []
        since = min(each.since for each in silent)
        return [f"the vault is silent: what was handed over waits since {since:%Y-%m-%d %H:%M} UTC ({len(silent)})"]

    def _problems(self) -> tuple[str, ...]:
        unreachable = f"the database can't be reached: {self._database.message}" if self._database.failures else ""
        found = (self._state.last_failure, unreachable, *self._ailments, self._state.overrun, *self._troubles.values())
        return tuple(problem for problem in found if problem)

    def _beat(self, problems: tuple[str, ...], now: dt.datetime) -> None:
        self._beaten_at = now
        for problem in problems:
            if problem not in self._reported:
                self._log.warn(f"unhealthy: {problem}")
        if self._reported and not problems:
            self._log.note("healthy again")
        self._reported = problems
        record = health.Health(role="agent", pid=os.getpid(), time=now, problems=problems)
        write = lambda: durable.write_atomically(self._setup.staging, HEALTH_NAME, health.encode(record))  # noqa: E731
        self._guarded("saying how the agent fares", write)

    def _save(self) -> None:
        self._guarded("remembering what was done", lambda: state.save(self._setup.staging, self._state))

    def _guarded(self, doing: str, work: Callable[[], None]) -> None:
        """Trouble with the disk is a reason to complain, not to end: the next look may go better."""
        try:
            work()
            self._troubles.pop(doing, None)
        except PgkeepError as error:
            if doing not in self._troubles:
                self._log.error(f"{doing} failed: {error.message}")
            self._troubles[doing] = f"{doing} failed: {error.message}"


def _is_past(since: dt.datetime | None, pause: dt.timedelta, now: dt.datetime) -> bool:
    """Whether the pause is over. A beginning that lies ahead was written before the clock was set back."""
    return since is None or not dt.timedelta(0) <= now - since < pause
