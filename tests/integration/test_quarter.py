"""A quarter of a year in a minute: the services' own decisions, dumps and seals, against a clock that is turned.

Real are the database and its dumps, the flags, agent and vault. Each runs within the test, except where it is killed:
that happens to a process of its own, by SIGKILL at a step drawn by lot. What must have come of it is said by a model
that shares no code with what decides.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from pgkeep import config
from pgkeep.adapters import clock, lock
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.agent import child, entries, run
from pgkeep.agent import service as agent_service
from pgkeep.agent.child import Child, Ended
from pgkeep.domain import mailbox
from pgkeep.domain.names import Tier
from pgkeep.domain.request import FILE_NAME, Request
from pgkeep.errors import PgkeepError
from pgkeep.progress import Silent
from pgkeep.vault import audit_log, intake, outcomes, seal, store, verify
from pgkeep.vault import service as vault_service
from pgkeep.vault.condition import Heartbeat, Pulse
from pgkeep.vault.layout import Layout, open_vault
from pgkeep.wiring import Services
from tests import clusters
from tests.clusters import NewDatabase
from tests.integration.keeper import reach
from tests.integration.quarter_model import (
    DAY,
    HOUR,
    KEEP_MINIMUM,
    LAST_OUTAGE,
    MINUTE,
    OUTAGES,
    RETENTION,
    SHIFTS,
    SLOT,
    START,
    STEPS,
    Fault,
    Handed,
    draw_faults,
    expected_dumps,
    latest,
    names_for,
    remaining,
)
from tests.vault_daemon import DRIVER, PROJECT, Daemon

CONFIGURATION = {
    "BACKUP_SCHEDULE": "0 */12 * * *",
    "BACKUP_SCHEDULE_MONTHLY": "0 0 1 * *",
    "BACKUP_GLOBALS": "off",
    "BACKUP_RETENTION_KEEP_MINIMUM": str(KEEP_MINIMUM),
    **{f"BACKUP_RETENTION_{tier.name}_DAYS": str(days) for tier, days in RETENTION.items()},
}
# The services do not wake in the very second.
LATE = dt.timedelta(seconds=5)
PATIENCE_SECONDS = 60.0
# Longer than the agent pauses between two tries.
OUTAGE_STEP = 3 * HOUR


class Noting(Silent):
    """Progress of a run or of the vault: what is handed over is written down before the vault's answer lets it go."""

    def __init__(self, world: World) -> None:
        self._world = world

    def step(self, name: str) -> None:
        if name in ("dump.handed-over", "vault.admitted") and self._world.vault is not None:
            self._world.take_note()


class Run:
    """In place of a run's process: the same work, in a thread."""

    def __init__(self, world: World, arguments: Sequence[str]) -> None:
        self.pid = os.getpid()
        self._world = world
        self._ended: Ended | None = None
        self._thread = threading.Thread(target=self._run, args=(arguments,))
        self._thread.start()

    def poll(self) -> Ended | None:
        if self._thread.is_alive():
            return None
        self._thread.join()
        assert self._ended is not None
        return self._ended

    def stop(self) -> None:
        self._world.is_cutting_off = True
        self._thread.join()
        self._world.is_cutting_off = False

    def _run(self, arguments: Sequence[str]) -> None:
        try:
            code, error = self._work(list(arguments))
        except PgkeepError as failure:
            code, error = failure.exit_code, failure.message
        except SystemExit as ending:
            code, error = int(str(ending.code)), "cut off"
        self._ended = Ended(code, {"error": error}, 0.0)

    def _work(self, arguments: list[str]) -> tuple[int, str]:
        setup = self._world.services.agent()
        if arguments[1] == "check":
            run.check_database(setup)
            return 0, ""
        tiers = [Tier(each) for each in arguments[2 : arguments.index("--json")]]
        since = dt.datetime.fromisoformat(arguments[-1]) if "--since" in arguments else None
        failures = run.back_up(setup, tiers, Noting(self._world), 10.0, since).failures
        return (failures[0].error.exit_code, failures[0].error.message) if failures else (0, "")


class Words:
    """The agent's log."""

    def __init__(self, world: World) -> None:
        self.lines: list[str] = []
        self.note = self.warn = self.error = lambda text: self.lines.append(f"{world.now:%m-%d %H:%M:%S} {text}")


# A quarter, and half of one with other faults; further ones take a minute each.
SEEDS = ((1, 90), (2, 45), *(((seed, 90) for seed in range(3, 9)) if os.environ.get("TESTS_SLOW") == "1" else ()))
KINDS = (
    *("database", "run-killed", "clock", "vault", "vault-killed", "machine", "clock", "expiry-killed"),
    *("agent", "run-killed", "vault-killed"),
)


# ---------------------------------------------------------------- the world


class World:
    """Agent, vault, database, and the time, of which nothing passes by itself."""

    def __init__(self, root: Path, environment: Mapping[str, str], allow: Callable[[bool], None]) -> None:
        self.passed = dt.timedelta()  # what a clock shows that nobody sets
        self.shift = dt.timedelta()  # by how much the one on the wall is wrong
        self.allow = allow
        self.daemon = Daemon(root, user=None, **environment)
        self.layout = Layout(root)
        self.services = Services(config.load(None, self.daemon.environment, {}).settings)
        self.handed: dict[str, Handed] = {}
        self.words = Words(self)
        self.kills: Counter[str] = Counter()
        self.is_cutting_off = False
        self.kill_run_at = self.kill_vault_at = self.kill_expiry_at = ""
        self._waits = 0
        self._service = contextlib.ExitStack()
        self.vault: Callable[[], float] | None = None
        self.agent: agent_service.Service | None = None

    # ------------------------------------------------------------ time

    @property
    def time(self) -> SimpleNamespace:
        """In place of the module, where that is asked how long something took."""
        return SimpleNamespace(monotonic=lambda: self.passed.total_seconds(), sleep=self._wait)  # noqa: PLW0108

    def _wait(self, _: float) -> None:
        self._waits += 1
        if self.is_cutting_off:
            raise SystemExit(143)
        time.sleep(0.002)

    @property
    def right_time(self) -> dt.datetime:
        return START + self.passed

    @property
    def now(self) -> dt.datetime:
        """What the services are shown."""
        return self.right_time + self.shift

    def _plan(self, step: str) -> dict[str, Any]:
        """For the fault driver: its clock goes on from ours."""
        return {"action": "kill", "at": step, "days_ago": (dt.datetime.now(dt.UTC) - self.now) / DAY}

    # ------------------------------------------------------------ the services

    def start_agent(self) -> None:
        self.agent = agent_service.Service(self.services.agent_service(["pgkeep"], {}), self.words)
        self.agent.begin()

    def start_run(self, command: Sequence[str], _: Mapping[str, str], log: child.Log) -> Any:
        """What the agent takes for a process."""
        arguments = list(command)[1:]
        if "backup" not in arguments or not self.kill_run_at:
            return Run(self, arguments)
        environment = {
            **self.daemon.environment,
            "PYTHONPATH": f"{PROJECT}/src",
            "FAULT": json.dumps(self._plan(self.kill_run_at)),
        }
        self.kills[f"run at {self.kill_run_at}"] += 1
        self.kill_run_at = ""
        return Child([sys.executable, os.fspath(DRIVER), *arguments], environment, log)

    def open_vault(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock.locked(self.layout.lock, 10.0))
            vault = open_vault(self.layout, "chattr")
            store.recover(vault, Silent())
            pulse = Pulse(Noting(self))
            schedule = self.services.settings.schedule
            options = vault_service.Options(seal.Rules(self.services.policy, 0), schedule.expressions(), "UTC")
            service = vault_service.Service(vault, options, pulse)
            heartbeat = stack.enter_context(Heartbeat(self.layout, pulse))
            self.vault = lambda: service.turn(heartbeat)
            self._service = stack.pop_all()

    def close_vault(self) -> None:
        self.vault = None
        self._service.close()

    def crash(self) -> None:
        """The power goes: nobody says good-bye."""
        if self.agent is not None and self.agent._child is not None:
            self.agent._child.stop()
        self.agent = None
        self.close_vault()

    def close(self) -> None:
        self.crash()
        self.daemon.close()

    # ------------------------------------------------------------ what happens at a moment

    def settle(self) -> None:
        """Until nothing more comes of this moment, or all wait for a vault that is away."""
        deadline, waits = time.monotonic() + PATIENCE_SECONDS, self._waits
        self._serve(always=True)
        while self.agent is not None:
            self.agent.tick()
            self._serve(always=False)
            if not self.agent.is_busy or (self.vault is None and self._waits >= waits + 2):
                break
            assert time.monotonic() < deadline, self.words.lines[-20:]
            time.sleep(0.001)
        self._serve(always=True)

    def _serve(self, *, always: bool) -> None:
        if self.vault is None:
            return
        ready = self.take_note()
        if ready and self.kill_vault_at:
            self._kill_vault(self.kill_vault_at)
            self.kill_vault_at = ""
        if self.kill_expiry_at and self._has_something_expired():
            self._kill_vault(self.kill_expiry_at)
            self.kill_expiry_at = ""
        if always or any(self.layout.staging.glob("*.*")):
            self.vault()

    def take_note(self) -> list[str]:
        """The dumps that lie there unanswered; those seen first are written down."""
        found = []
        for path in sorted(self.layout.staging.glob(f"*{mailbox.READY_SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):
                request = msgspec.json.decode((path / FILE_NAME).read_bytes(), type=Request)
                dump = Handed(request.id, tuple(request.tiers), request.created_at, self.now)
                self.handed.setdefault(request.id, dump)
                found.append(path.stem)
        return [each for each in found if not (self.layout.outcomes / mailbox.outcome_name(each)).exists()]

    def _has_something_expired(self) -> bool:
        """Of what is there, beyond the newest."""
        held = [backup.manifest for backup in store.read_catalog(self.layout).backups]
        newest = sorted({(each.sealed_at, each.staged_id) for each in held})[-KEEP_MINIMUM:]
        old = [each for each in held if (each.sealed_at, each.staged_id) not in newest]
        return any(each.retain_until is not None and each.retain_until <= self.now for each in old)

    def _kill_vault(self, step: str) -> None:
        self.close_vault()
        self.daemon.start(**self._plan(step))
        assert self.daemon.wait() == -9, (step, self.daemon.said()[-2000:])
        self.kills[f"vault at {step}"] += 1
        self.open_vault()

    def begin(self, fault: Fault) -> None:
        if fault.kind == "database":
            self.allow(False)
        elif fault.kind == "vault":
            self.close_vault()
        elif fault.kind == "machine":
            self.crash()
        elif fault.kind == "agent":
            assert self.agent is not None
            self.agent.stop()
            self.start_agent()
        elif fault.kind == "run-killed":
            self.kill_run_at = fault.step
        elif fault.kind == "vault-killed":
            self.kill_vault_at = fault.step
        elif fault.kind == "expiry-killed":
            self.kill_expiry_at = fault.step
        elif fault.kind == "clock":
            self.shift = fault.shift

    def end(self, fault: Fault) -> None:
        if fault.kind == "database":
            self.allow(True)
        if fault.kind in ("vault", "machine"):
            self.open_vault()
        if fault.kind == "machine":
            self.start_agent()
        if fault.kind == "clock":
            self.shift = dt.timedelta()

    def is_unsettled(self) -> bool:
        agent = self.agent
        return agent is not None and (agent.is_busy or bool(agent._state.pending) or agent._database.doubtful)

    def live(self, faults: Sequence[Fault], end: dt.datetime) -> None:
        """From fault to slot to fault; while something is amiss, in small steps."""
        events = sorted(
            [(fault.begin, 1, fault, self.begin) for fault in faults]
            + [(fault.end, 0, fault, self.end) for fault in faults],
            key=lambda event: event[:2],
        )
        away: set[Fault] = set()
        self.settle()
        while self.right_time < end:
            steps = [end, latest(Tier.HOURLY, self.now - LATE) + SLOT + LATE - self.shift]
            if self.is_unsettled():
                steps.append(self.right_time + (OUTAGE_STEP if away else MINUTE))
            self.passed = min([*steps, *(event[0] for event in events[:1])]) - START
            while events and events[0][0] <= self.right_time:
                _, is_begin, fault, happen = events.pop(0)
                happen(fault)
                if fault.kind in OUTAGES:
                    (away.add if is_begin else away.discard)(fault)
            self.settle()


@pytest.fixture
def world(cluster15: ScratchCluster, new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    clusters.need_root("the vault sets flags")
    database = new_database(cluster15)
    database.execute("CREATE TABLE item (id int PRIMARY KEY, name text); INSERT INTO item VALUES (1, 'one')")
    postgres = clusters.Database(cluster15, "postgres")

    def allow(wanted: bool) -> None:
        postgres.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS {wanted}')

    with clusters.scratch_directory() as scratch, contextlib.ExitStack() as stack:
        own = World(scratch / "root", {**CONFIGURATION, **reach(cluster15, database.name)}, allow)
        stack.callback(own.close)
        # No power is cut here: what waits for the disk proves nothing, and takes as long as all the rest.
        monkeypatch.setattr(os, "fsync", lambda _: None)
        monkeypatch.setattr(clock, "now", lambda: own.now)
        monkeypatch.setattr(agent_service, "Child", own.start_run)
        for module in (entries, outcomes, intake, vault_service):
            monkeypatch.setattr(module, "time", own.time)
        own.open_vault()
        own.start_agent()
        yield own


# ---------------------------------------------------------------- the tests


def assert_every_slot_was_served(world: World, expected: Sequence[tuple[dt.datetime, set[Tier], bool]]) -> None:
    """One dump a slot, of all that was due. A vault that is silent is tried again, up to four dumps: not fewer."""
    made = [(latest(Tier.HOURLY, dump.created_at), set(dump.tiers)) for dump in world.handed.values()]
    for slot, due, is_vault_away in expected:
        found: list[set[Tier]] = []
        while made and made[0][0] == slot and (is_vault_away or not found):
            found.append(made.pop(0)[1])
        said = [line for line in world.words.lines if f"{slot:%m-%d}" in line]
        if is_vault_away:
            assert len(found) <= run.DUMPS_WAITING_LIMIT + 1, (slot, said)
        else:
            assert found == [due], (slot, found, due, made[:3], said)
    assert made == []


def assert_vault_holds(world: World, expected: set[tuple[str, Tier]]) -> None:
    """Exactly these, whole and flagged; and nothing lies about."""
    catalog = store.read_catalog(world.layout)
    assert catalog.defects == ()
    found = [(backup.manifest.staged_id, backup.manifest.type) for backup in catalog.backups]
    assert len(found) == len(set(found))
    assert set(found) == expected, (sorted(set(found) - expected), sorted(expected - set(found)))
    for backup in catalog.backups:
        assert (backup.state, backup.manifest.protection) == ("sealed", "chattr")
        assert verify.verify_backup(world.layout.active, backup, "digests").ok, backup.path_in_vault
    for directory in (world.layout.staging, world.layout.incoming):
        assert [path.name for path in directory.iterdir() if not path.name.startswith(".")] == []
    for directory in (world.layout.journal, world.layout.outcomes, world.layout.quarantine):
        assert os.listdir(directory) == [], directory


def assert_log_tells(world: World, sealed: int, expired: int) -> None:
    """The chain holds; each name was sealed once, and each that is gone was let go once, and not early."""
    examination = audit_log.examine(world.layout.audit)
    assert (examination.problems, examination.notes) == ((), ())
    records = [json.loads(line) for line in audit_log.lines_of(world.layout.audit)]
    told = {event: {r["id"]: r for r in records if r["event"] == event} for event in ("sealed", "expired")}
    counted = Counter(record["event"] for record in records)
    assert {event: len(of_event) for event, of_event in told.items()} == {"sealed": sealed, "expired": expired}
    assert (counted["sealed"], counted["expired"]) == (sealed, expired)
    for identifier, record in told["expired"].items():
        tier = Tier(record["path"].partition("/")[0])
        sealed_record = told["sealed"][identifier]
        age = _moment(record["time"]) - _moment(sealed_record["time"])
        assert age >= RETENTION[tier] * DAY - MINUTE, record
        assert _moment(record["time"]) >= _moment(sealed_record["retain_until"]), record


def _moment(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


def finish(world: World) -> None:
    """The last word: the services start anew, and have nothing left to do."""
    world.close_vault()
    world.open_vault()
    for _ in range(3):
        world.passed += MINUTE
        world.settle()


@pytest.mark.parametrize(("seed", "days"), SEEDS)
def test_a_quarter_with_faults_leaves_what_the_policy_says(world: World, seed: int, days: int) -> None:
    end = START + days * DAY
    faults = draw_faults(random.Random(seed), KINDS, end - LAST_OUTAGE - 4 * DAY)
    faults.append(Fault("database", latest(Tier.HOURLY, end) - LAST_OUTAGE + HOUR, end + DAY))
    world.live(faults, end)
    finish(world)
    expected = expected_dumps(faults, end)
    assert_every_slot_was_served(world, expected)
    ever = names_for(list(world.handed.values()))
    kept = remaining(ever, world.now)
    assert_vault_holds(world, kept)
    assert_log_tells(world, len(ever), len(ever) - len(kept))
    # The quarter was what it is called: slots were lost and made up for, and the killed were killed.
    wanted = Counter(fault.kind for fault in faults)
    assert sum(world.kills.values()) == sum(wanted[kind] for kind in STEPS) >= days / 10
    assert wanted["clock"] >= len(SHIFTS)
    assert len({slot for slot, _, _ in expected}) < days * DAY / SLOT - 5
