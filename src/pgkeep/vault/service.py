"""The vault as a service: the only writer of ``active/``, of its lock and of the audit log, for months.

Once a second it looks at staging and at its inbox; all else happens when there is something to do. Nothing that lies
in staging stops it; what would make it write into the wrong place does.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from pgkeep.adapters import clock, durable
from pgkeep.domain import admission, retention
from pgkeep.domain.names import Tier
from pgkeep.domain.retention import Decision
from pgkeep.errors import FormatError, PgkeepError, RefusedError, StorageError
from pgkeep.vault import audit_log, condition, expire, inbox, moved, seal, staging, store
from pgkeep.vault.condition import Condition, Heartbeat, Pulse
from pgkeep.vault.confirmations import Confirmations
from pgkeep.vault.holdings import Holdings
from pgkeep.vault.inspector import InspectorGoneError
from pgkeep.vault.intake import Desk, Intake, Throttle
from pgkeep.vault.layout import Identity, Layout, Vault, give_up_reserve, keep_reserve, read_identity
from pgkeep.vault.outcomes import Outcomes
from pgkeep.vault.staging import Entry

POLL_SECONDS = 1.0
# A directory flooded with names costs the agent its backups, and the machine a tenth of a processor.
_PAUSE_PER_SCAN = 10.0
_ENTRIES_AT_ONCE = 64
_EXPIRE_SECONDS = 3600.0
_LOOK_SECONDS = 60.0
_MANY_NAMES = 1000
_FORGED_RECORD_SECONDS = 3600.0
_KNOWN_NAME = "known-vault.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What the configuration decides. ``inspect`` comes with ``rules``; ``expressions`` are the scheduled tiers.

    ``required_destinations``: the newest backups stay until these are known to have them.
    """

    rules: seal.Rules
    expressions: Mapping[Tier, str]
    zone: str
    subjects: int = admission.DEFAULT_SUBJECTS
    required_destinations: tuple[str, ...] = ()


class Service:
    """Runs with the vault's lock held. ``standing``: problems that last as long as the process."""

    def __init__(self, vault: Vault, options: Options, pulse: Pulse, standing: tuple[str, ...] = ()) -> None:
        self._vault = vault
        self._layout = vault.layout
        self._options = options
        self._pulse = pulse
        self._identity = read_identity(vault.layout)
        self._remember()
        self._places = tuple(_place(path) for path in self._watched())
        self._holdings = Holdings(vault.layout)
        self._confirmations = Confirmations(vault.layout, options.required_destinations)
        self._outcomes = Outcomes(vault)
        self._condition = Condition(standing)
        self._throttle = Throttle(vault)
        policy = admission.Policy.of(options.expressions, options.zone, clock.now(), options.subjects)
        self._intake = Intake(
            Desk(
                vault=vault,
                rules=options.rules,
                policy=policy,
                holdings=self._holdings,
                condition=self._condition,
                throttle=self._throttle,
                clean_up=self._clean_up_for_agent,
                progress=pulse,
            )
        )
        self._scan_trouble = ""
        self._names = 0
        self._forged = 0
        self._next_forged_record = 0.0
        self._next_expiry = 0.0
        self._next_look = 0.0
        inbox.prepare(vault.layout)

    def run(self) -> None:
        """Until a signal ends it, as an exception; or until the vault is not there any more. Raises ``PgkeepError``."""
        with Heartbeat(self._layout, self._pulse) as heartbeat:
            self._pulse.note(f"the vault {self._identity.id} is open, protection {self._vault.protection}")
            while True:
                pause_seconds = self.turn(heartbeat)
                time.sleep(pause_seconds)

    def turn(self, heartbeat: Heartbeat) -> float:
        """One look at everything; how long to rest after it."""
        self._pulse.alive()
        self._require_same_place()
        self._answer_inbox()
        scan = self._scan() if self._is_mended() else staging.Scan((), 0, 0.0)
        sealed = [self._take(entry) for entry in scan.entries]
        if any(sealed) or time.monotonic() >= self._next_expiry:
            self._expire()
        self._tidy()
        if scan.entries or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            heartbeat.problems = self._problems()
            heartbeat.beat()
        return max(POLL_SECONDS, _PAUSE_PER_SCAN * scan.seconds)

    # ------------------------------------------------------------ staging

    def _scan(self) -> staging.Scan:
        try:
            scan = staging.scan(self._layout.staging, _ENTRIES_AT_ONCE, self._outcomes.is_open)
        except StorageError as error:
            if error.message != self._scan_trouble:
                self._pulse.warn(error.message)
            self._scan_trouble = error.message
            return staging.Scan((), 0, 0.0)
        self._scan_trouble = ""
        self._names = scan.names
        self._notice_forged(scan)
        return scan

    def _notice_forged(self, scan: staging.Scan) -> None:
        """On the record once an hour at most, however they come and go; a problem for as long as they are there."""
        self._forged = scan.forged
        if not scan.forged or time.monotonic() < self._next_forged_record:
            return
        self._next_forged_record = time.monotonic() + _FORGED_RECORD_SECONDS
        self._next_look = 0.0  # the health check hears of it now
        self._pulse.warn(f"{scan.forged} in {self._layout.staging} are no directories, e.g. {scan.example}: left alone")
        try:
            audit_log.record(self._vault, "entries forged", count=scan.forged, example=scan.example)
        except PgkeepError as error:
            self._trouble(f"what lies in staging could not be recorded: {error.message}")

    def _is_mended(self) -> bool:
        """Nothing new before what a failure left in the journal is finished or undone."""
        try:
            if os.listdir(self._layout.journal):
                store.recover(self._vault, self._pulse)
                self._holdings.read()
        except (OSError, PgkeepError) as error:
            self._trouble(f"what a failure left could not be cleared up: {error}")
            return False
        return True

    def _take(self, entry: Entry) -> bool:
        """True where it was sealed. One entry's trouble is not another's; without an inspector, it is everybody's."""
        outcome = None
        try:
            outcome = self._intake.take(entry)
            if outcome is not None:
                self._pulse.step("vault.decided")
                self._outcomes.publish(outcome)
                self._pulse.step("vault.answered")
        except InspectorGoneError:
            raise
        except PgkeepError as error:
            self._trouble(f"{entry.name} could not be answered: {error.message}")
        self._answer_inbox()
        return outcome is not None and outcome.state == "sealed"

    # ------------------------------------------------------------ wishes

    def _answer_inbox(self) -> None:
        for wish in inbox.pending(self._layout):
            try:
                answer = inbox.Answer(id=wish.id, decisions=inbox.lines(self._clean_up()))
                audit_log.record(self._vault, "cleanup asked", id=wish.id, told_by="vault's user")
            except PgkeepError as error:
                self._pulse.warn(f"the wish {wish.id} was not fulfilled: {error.message}")
                answer = inbox.Answer(id=wish.id, error=error.message, hint=error.hint, exit_code=error.exit_code)
            inbox.answer(self._layout, answer)

    def _clean_up_for_agent(self) -> str:
        decisions = self._clean_up()
        removed = sum(not decision.keep for decision in decisions)
        return f"{removed} removed, {len(decisions) - removed} kept"

    def _expire(self) -> None:
        self._next_expiry = time.monotonic() + _EXPIRE_SECONDS
        try:
            self._clean_up()
        except PgkeepError as error:
            self._trouble(f"what has expired could not be removed: {error.message}")

    def _clean_up(self) -> list[Decision]:
        """Remove what has expired; a full disk must not stand in the way. Raises ``PgkeepError``."""
        self._holdings.read()
        awaited = self._confirmations.unconfirmed(self._holdings.backups)
        decisions = retention.plan(self._holdings.backups, self._options.rules.policy, clock.now(), awaited)
        try:
            if not all(decision.keep for decision in decisions):
                give_up_reserve(self._layout)
                expire.carry_out(self._vault, decisions, self._pulse)
                self._holdings.read()
        finally:
            keep_reserve(self._layout)
        return decisions

    # ------------------------------------------------------------ itself

    def _tidy(self) -> None:
        try:
            self._outcomes.tidy()
            self._throttle.tidy()
        except PgkeepError as error:
            self._trouble(f"what is done could not be cleared away: {error.message}")

    def _trouble(self, text: str) -> None:
        """Said once; it stays a problem until a backup is sealed."""
        if text != self._condition.last_failure:
            self._pulse.warn(text)
            self._next_look = 0.0  # the health check hears of it now
        self._condition.last_failure = text

    def _problems(self) -> tuple[str, ...]:
        checks: tuple[Callable[[], Iterator[str]], ...] = (
            self._overdue,
            lambda: condition.damaged(self._holdings.backups, self._holdings.defects),
            lambda: condition.short_of_space(self._layout, self._options.rules.reserve_bytes, self._holdings.backups),
            self._crowded,
            self._confirmations.problems,
        )
        return self._condition.problems(checks)

    def _overdue(self) -> Iterator[str]:
        since, now = self._identity.created_at, clock.now()
        return condition.overdue(self._options.expressions, self._options.zone, self._holdings.backups, since, now)

    def _crowded(self) -> Iterator[str]:
        if self._scan_trouble:
            yield self._scan_trouble
        if self._names > _MANY_NAMES:
            yield f"{self._names} names crowd {self._layout.staging}: is the agent itself?"
        if self._forged:
            yield f"{self._forged} of the names in {self._layout.staging} are no directories: is the agent itself?"
        if self._outcomes.is_full:
            yield "the agent takes none of the vault's answers: is it running?"

    def _watched(self) -> tuple[Path, ...]:
        return self._layout.active, self._layout.state, self._layout.logs

    def _require_same_place(self) -> None:
        """A volume that was unmounted, or mounted over, must not be written to. Raises ``RefusedError``."""
        for path, known in zip(self._watched(), self._places, strict=True):
            if _place(path) != known:
                message = f"{path} is not the directory any more that was opened: was something (un)mounted there?"
                raise RefusedError(message, "mount what was there, then start the vault again")

    def _remember(self) -> None:
        """For the next start: an empty directory where the vault was is then not taken for a new one."""
        if not (self._layout.state / _KNOWN_NAME).exists():
            durable.write_atomically(self._layout.state, _KNOWN_NAME, msgspec.json.encode(self._identity), 0o600)


def require_known(layout: Layout) -> None:
    """Raises ``RefusedError`` where ``active/`` is not, or not any more, the vault that the state belongs to."""
    moved.refuse(layout.state)
    path = layout.state / _KNOWN_NAME
    try:
        known = msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError:
        return
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path} is unreadable: {error}", f"compare it with {layout.active}, then remove it"
        ) from error
    found = read_identity(layout).id if layout.exists else None
    if found != known.id:
        what = f"holds the vault {found}" if found else "holds no vault"
        raise RefusedError(
            f"{layout.active} {what}, where {known.id} was: is it mounted?",
            f"mount it; to begin anew on purpose, remove {layout.state} too",
        )


def _place(path: Path) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def read_schedule_once(expressions: Mapping[Tier, str], zone: str) -> None:
    """Before rights are given up: what this loads may lie where the vault's own user can't read.

    Raises ``ConfigurationError`` for a schedule that never comes.
    """
    admission.Policy.of(expressions, zone, clock.now(), admission.DEFAULT_SUBJECTS)
