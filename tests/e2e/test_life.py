"""What a deployment lives through: a database that is absent or goes away, kills, storms of restarts, full disks.

Nothing corrupt, nothing lost, each failure in the audit log and the health check, and the next good run recovers. The
tests share two stacks: ``patient`` begins without its database, ``life`` is put through the rest. Each test leaves its
stack well.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import process
from pgkeep.vault import audit_log
from tests.e2e import life as lives
from tests.e2e import stack as stacks
from tests.e2e.engine import Engine
from tests.e2e.life import (
    BOOKS,
    MIB,
    TOTAL,
    Life,
    children,
    cpu_seconds,
    filled_disk,
    hold_dump,
    kill,
    main_process,
    memory_mib,
    soon,
)
from tests.e2e.stack import SERVICES, Stack, wait_until

LIMITS_MIB = {"backup-agent": 60, "backup-vault": 50, "backup-extractor": 50}
IDLE_SECONDS = 20.0


@pytest.fixture(scope="module")
def patient(engine: Engine, context: Path, projects: Path) -> Iterator[Stack]:
    """pgkeep's services, and no database."""
    settings = {"COMPOSE_FILE": "docker-compose.yml:impatient.yml"}
    own = stacks.lay_out(engine, context, projects / "patient", settings)
    # Two minutes are too long for a test.
    agent = {"healthcheck": {"start_period": "1s"}, **lives.QUICK_NAMES}
    override = {"services": {"backup-agent": agent}}
    (own.directory / "impatient.yml").write_text(json.dumps(override))
    with stacks.removed_afterwards(own):
        own.compose("up", "-d", "--no-deps", *SERVICES)
        yield own


@pytest.fixture(scope="module")
def life(engine: Engine, context: Path, projects: Path) -> Iterator[Life]:
    with lives.begun(engine, context, projects) as made:
        yield made


class TestDatabaseThatComesLater:
    def test_the_agent_waits_and_says_so(self, patient: Stack) -> None:
        wait_until(lambda: "waiting for the database" in patient.logs("backup-agent"), "the agent's word")
        wait_until(lambda: patient.health("backup-agent") == "unhealthy", "the health check", 30.0)
        last = json.loads(patient.inspect("backup-agent", "{{json .State.Health.Log}}"))[-1]
        assert "the database can't be reached" in last["Output"]
        assert patient.sealed("daily") == []

    def test_a_run_by_hand_fails_and_is_on_the_record(self, patient: Stack) -> None:
        failed = patient.execute("backup-agent", "backup.py", "daily", check=False)
        assert failed.return_code == 4
        assert "failed to resolve host 'db'" in failed.stderr
        wait_until(lambda: _records(patient, "backup failed"), "the record", 10.0, say=patient.trouble)
        assert {record["of"] for record in _records(patient, "backup failed")} >= {"app_db"}
        said = patient.execute("backup-vault", "pgkeep", "health", "vault", check=False).stdout.decode()
        assert "backup failed: app_db" in said
        patient.start_application()


def _records(stack: Stack, event: str) -> list[dict[str, Any]]:
    log = stack.volume("backup-logs") / "backup_audit.jsonl"
    return [record for record in map(json.loads, audit_log.lines_of(log)) if record["event"] == event]


def _is_healthy(stack: Stack, service: str) -> bool:
    return stack.health(service) == "healthy"


def test_all_tiers_of_one_minute_are_one_consistent_snapshot(life: Life) -> None:
    """The first run, of the schedule: trade went on all the time."""
    tiers = ("hourly", "daily", "weekly")
    assert "backing up: hourly, daily, weekly" in life.stack.logs("backup-agent")
    (name,) = life.stack.sealed("daily")
    paths = [life.files("active") / tier / name for tier in tiers]
    assert {path.stat().st_ino for path in paths} == {paths[0].stat().st_ino}
    assert paths[0].stat().st_nlink == 3

    life.stack.psql("CREATE DATABASE restored")
    command = ("exec", "-i", life.stack.container("db"), "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "app")
    life.stack.engine.docker(*command, "-d", "restored", input_bytes=gzip.decompress(paths[0].read_bytes()))
    paid, received, moved, count = map(int, life.stack.psql(BOOKS, "restored").split("|"))
    assert (paid + received, received) == (TOTAL, moved)

    # It went on before, in the middle of it and after.
    manifest = json.loads(paths[0].with_name(f"{name}.manifest.json").read_text())
    begun, seconds = manifest["created_at"], manifest["dump_seconds"]
    during = f"at BETWEEN '{begun}' AND timestamptz '{begun}' + {seconds} * interval '1 second'"
    assert int(life.stack.psql(f"SELECT count(*) FROM transfers WHERE {during}")) > 5
    assert 100 < count < int(life.stack.psql("SELECT count(*) FROM transfers"))


@pytest.mark.parametrize("loss", ["restart", "kill"])
def test_the_database_goes_in_the_middle_of_a_dump(life: Life, loss: str) -> None:
    before, logged = life.stack.digests(), len(life.audit)
    database = life.stack.container("db")
    with life.backing_up("hourly") as running:
        held = hold_dump(life)
        if loss == "restart":
            life.stack.engine.docker("restart", "-t", "0", database)
        else:
            life.stack.engine.docker("kill", "--signal", "KILL", database)
        for number in held:
            os.kill(number, signal.SIGCONT)
        assert running.wait(60) == 4, running.messages()
        assert "pg_dump failed" in running.messages()
    life.assert_nothing_half_done()
    life.stack.assert_untouched(before)
    wait_until(lambda: life.failures(logged).get("app_db") == "backup failed", "the record", 10.0)
    wait_until(lambda: "backup failed: app_db" in str(life.ailments("backup-vault")), "the health check", 10.0)
    life.stack.engine.docker("start", database)
    ready = ("pg_isready", "-q", "-h", "127.0.0.1", "-U", "app", "-d", "app_db")
    wait_until(lambda: life.stack.execute("db", *ready, check=False).return_code == 0, "the database")
    life.assert_recovers(before)


class TestKilled:
    """With SIGKILL from outside, as the kernel does it when memory runs out: Docker starts it again."""

    def test_agent(self, life: Life) -> None:
        before, logged, names = life.stack.digests(), len(life.audit), life.names("manual")
        with life.backing_up("manual") as running:
            main = main_process(life.stack, "backup-agent")
            hold_dump(life)
            kill(main)
            assert running.wait(30) != 0
        main = main_process(life.stack, "backup-agent", main)
        with life.backing_up("manual") as running:
            soon(lambda: list(life.files("staging").glob("*.ready")), "what is handed over")
            kill(main)
            assert running.wait(30) != 0
        # What was cut off is on the record; what was handed over is sealed all the same.
        wait_until(lambda: len(life.names("manual") - names) == 3, "the backup", 30.0, say=life.stack.trouble)
        main_process(life.stack, "backup-agent", main)
        life.assert_recovers(before)
        assert life.failures(logged) == {"app_db": "backup interrupted"}

    def test_vault(self, life: Life) -> None:
        """At five moments of one and the same sealing; the run that waits for it notices nothing."""
        before, names, logged = life.stack.digests(), life.names("hourly"), len(life.audit)
        state, outcomes = life.files("state"), life.files("active") / ".outcomes"
        moments: dict[str, Callable[[], object]] = {
            "it is there": lambda: list(life.files("staging").glob("*.ready")),
            "work has begun": (state / "attempts.json").exists,
            "the journal names it": lambda: os.listdir(state / "journal"),
            "it is committed": lambda: any(name.endswith(".json") for name in life.names("hourly") - names),
            "it is answered": lambda: [name for name in os.listdir(outcomes) if not name.startswith(".")],
        }
        main = main_process(life.stack, "backup-vault")
        with life.backing_up("hourly", "manual") as running:
            for moment, has_come in moments.items():
                soon(has_come, moment)
                kill(main)
                main = main_process(life.stack, "backup-vault", main)
            assert running.wait(90) == 0, running.messages()
        assert len(life.names("hourly") - names) == 3
        paths = [record["path"] for record in life.audit[logged:] if record["event"] == "sealed"]
        assert len(set(paths)) == len(paths) == 3
        life.assert_recovers(before)

    def test_extractor(self, life: Life) -> None:
        """At several moments of a pass that has much to do."""
        before = life.stack.digests()
        done = life.back_up("manual")
        assert done.return_code == 0, done.stderr
        main = main_process(life.stack, "backup-extractor")
        for seconds in (0.0, 0.3, 0.45, 0.6):
            time.sleep(seconds)
            kill(main)
            main = main_process(life.stack, "backup-extractor", main)
        done = life.extract()
        assert done.return_code == 0, done.stderr
        life.assert_all_is_outside()
        life.assert_well(before)

    def test_all_again_and_again(self, life: Life) -> None:
        """A storm of restarts, and a run in it."""
        before, engine = life.stack.digests(), life.stack.engine
        restarts = [[engine.client, "restart", "-t", "0", life.stack.container(service)] for service in SERVICES]
        with life.backing_up("manual"):
            for _ in range(5):
                with contextlib.ExitStack() as storm:
                    begun = [storm.enter_context(process.start(each, environment=engine.environment))
                             for each in restarts]  # fmt: skip
                    assert [each.wait(60) for each in begun] == [0, 0, 0]
        life.assert_recovers(before)


class TestFullDisk:
    def test_staging(self, life: Life) -> None:
        before, logged = life.stack.digests(), len(life.audit)
        with filled_disk(life, "staging", 0):
            _assert_full(life.back_up("hourly"), "/backups/staging")
            life.assert_nothing_half_done()
        with filled_disk(life, "staging", MIB):
            _assert_full(life.back_up("hourly"), "/backups/staging")
            life.assert_nothing_half_done()
            wait_until(lambda: "app_db" in life.failures(logged), "the record", 10.0)
            wait_until(lambda: "the disk is full" in str(life.ailments("backup-vault")), "the health check", 10.0)
        life.assert_recovers(before)

    @pytest.mark.parametrize("place", ["active", "state"])
    def test_where_the_vault_writes(self, life: Life, place: str) -> None:
        """It says so at once, and when there is room again the dump that waits is sealed: the run ends well."""
        before, logged = life.stack.digests(), len(life.audit)
        said = {"active": "/backups/active has", "state": "/backups/state/attempts.json: the disk is full"}[place]
        with life.backing_up("hourly") as running:
            with filled_disk(life, place, {"active": 5 * MIB, "state": 0}[place]):
                told = functools.partial(life.told, logged, "sealing failed")
                wait_until(told, "the record", 30.0, say=life.stack.trouble)
                assert said in told()[0]["reason"]
                # Its own health file is in state/: where that can't be written, its age tells, a minute later.
                heard = life.stack.logs if place == "state" else life.ailments
                wait_until(lambda: said in str(heard("backup-vault")), "the word", 10.0)
                # The globals were sealed last, and are small: they don't count.
                assert place == "state" or "the next backup and the reserve take" in str(heard("backup-vault"))
                assert life.stack.digests() == before
            assert running.wait(60) == 0, running.messages()
        life.assert_well(before)

    def test_logs(self, life: Life) -> None:
        """What is sealed is sealed; the log hears of it when it can, and nothing more is sealed before that."""
        before, logged = life.stack.digests(), len(life.audit)
        with filled_disk(life, "logs", 0), contextlib.ExitStack() as stack:
            # More names than records that fit into the log's last block.
            running = stack.enter_context(life.backing_up("hourly", "daily", "manual"))
            full = "writing the audit log failed at /backups/logs/backup_audit.jsonl: the disk is full"
            wait_until(lambda: full in str(life.ailments("backup-vault")), "the health check", 30.0)
            later = stack.pop_all()
        with later:
            assert running.wait(60) == 0, running.messages()
        life.assert_well(before)
        paths = [f"./{record['path']}" for record in life.told(logged, "sealed")]
        assert sorted(paths) == sorted(path for path in set(life.stack.digests()) - set(before) if path.endswith("gz"))

    def test_outside(self, life: Life) -> None:
        before, extractor = life.stack.digests(), life.stack.container("backup-extractor")
        with filled_disk(life, "external", MIB):
            done = life.back_up("manual")
            assert done.return_code == 0, done.stderr
            done = life.extract()
            assert (done.return_code, "bytes free" in done.stderr) == (6, True), done.stderr
            log = (life.files("logs") / "extraction_audit.jsonl").read_text()
            assert '"extraction failed"' in log
            life.stack.engine.docker("restart", "-t", "0", extractor)
            wait_until(lambda: "bytes free" in str(life.ailments("backup-extractor")), "the health check", 20.0)
            name = life.stack.sealed("manual")[-1]
            assert not list(life.files("external").glob(f"manual/*/{name}*"))
            assert not list(life.files("external").rglob(".pgkeep-temporary-*"))
        life.stack.engine.docker("restart", "-t", "0", extractor)
        done = life.extract()
        assert done.return_code == 0, done.stderr
        life.assert_all_is_outside()
        life.assert_well(before)


def test_idle_services_are_small_and_quiet(life: Life) -> None:
    """Each daemon by itself: a health check costs a tenth of a second more, once a minute."""
    mains = {service: main_process(life.stack, service) for service in SERVICES}
    begun, before = time.monotonic(), {service: cpu_seconds(each) for service, each in mains.items()}
    time.sleep(IDLE_SECONDS)
    seconds = time.monotonic() - begun
    shares = {service: (cpu_seconds(each) - before[service]) / seconds for service, each in mains.items()}
    sizes = {service: memory_mib(each) for service, each in mains.items()}
    print(f"CPU {shares}, MiB {sizes}, inspector {[memory_mib(each) for each in children(mains['backup-vault'])]}")
    assert all(share < 0.005 for share in shares.values()), shares
    assert all(sizes[service] <= limit for service, limit in LIMITS_MIB.items()), sizes
    # The process that looks into dumps, for nobody.
    (inspector,) = children(mains["backup-vault"])
    assert memory_mib(inspector) <= 25


def test_a_database_that_came_later_is_backed_up(patient: Stack) -> None:
    """Nobody asked for it."""
    wait_until(lambda: patient.sealed("daily"), "the initial backup", say=patient.trouble)
    assert "backed up: " in patient.logs("backup-agent")
    assert [record["path"].partition("/")[0] for record in _records(patient, "sealed")][:3] == [
        "hourly",
        "daily",
        "weekly",
    ]
    for service in SERVICES:
        wait_until(functools.partial(_is_healthy, patient, service), f"{service} to be healthy", 30.0)


def _assert_full(done: process.Completed, place: str) -> None:
    assert done.return_code == 6, done.stderr
    assert "the disk is full" in done.stderr
    assert place in done.stderr
    assert "make room on it" in done.stderr
