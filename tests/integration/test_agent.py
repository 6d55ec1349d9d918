"""The agent as it is deployed: real runs against a real server, beside the real vault."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgkeep.adapters import clock, lock, postgres
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.agent import blocking
from pgkeep.domain import mailbox
from tests import clusters
from tests.clusters import Database, NewDatabase
from tests.integration.keeper import Keeper, reach
from tests.integration.services import Service, serving, serving_vault, wait_for

IDLE_LIMIT_BYTES = 60 * 1000 * 1000


@pytest.fixture
def database(cluster15: ScratchCluster, new_database: NewDatabase) -> Database:
    made = new_database(cluster15)
    made.execute("CREATE TABLE first (n int); CREATE TABLE second (n int); INSERT INTO first VALUES (1), (2)")
    return made


@pytest.fixture
def keeper(scratch: Path, cluster15: ScratchCluster, database: Database) -> Keeper:
    variables = {"BACKUP_GLOBALS": "off", "PGKEEP_RESERVE": "0"}
    (scratch / "backups").mkdir()
    return Keeper(scratch / "backups", {**reach(cluster15, database.name), **variables})


@pytest.fixture
def vault(keeper: Keeper) -> Iterator[Service]:
    """The service beside which the agent works."""
    clusters.need_root("the vault sets flags")
    with serving_vault(keeper.environment, keeper.root) as running:
        yield running


def staged(keeper: Keeper) -> list[str]:
    """What lies in staging but for the agent's own files."""
    return sorted(path.name for path in (keeper.root / "staging").iterdir() if not path.name.startswith("."))


def audit(keeper: Keeper, *events: str) -> list[dict[str, Any]]:
    """What the vault has recorded by now; nothing where it has not written anything yet."""
    path = keeper.root / "logs" / "backup_audit.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in records if record["event"] in events]


def processes_of(text: str) -> list[str]:
    """Command lines that mention it, but for the server's own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line and not line.startswith("postgres:"):
                found.append(line)
    return found


@contextlib.contextmanager
def locked_table(database: Database, table: str) -> Iterator[None]:
    """Nobody else may even read it: pg_dump waits."""
    with psycopg.connect(database.conninfo) as connection:
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield


@contextlib.contextmanager
def waiting(database: Database, statement: str) -> Iterator[None]:
    """A session that waits for a lock with this statement; at the end of the block it must have got it."""
    thread = threading.Thread(target=database.execute, args=(statement,))
    thread.start()
    query = f"SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query = '{statement}'"
    wait_for(lambda: database.value(query))
    try:
        yield
    finally:
        thread.join()


def waits_for_a_lock(database: Database) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^pgkeep-' AND wait_event_type = 'Lock'"
    return bool(database.value(query))


@contextlib.contextmanager
def under_way(keeper: Keeper, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", "-m", "pgkeep", *arguments]
    with subprocess.Popen(
        command, env=keeper.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


# ---------------------------------------------------------------- one run


def test_one_dump_for_all_tiers_and_nothing_left_behind(keeper: Keeper, vault: Service) -> None:
    shown = keeper.json("agent", "backup", "weekly", "hourly", "daily")
    assert [each["tier"] for each in shown["backups"]] == ["hourly", "daily", "weekly"]
    assert shown["path"] == shown["backups"][0]["path"]
    files = [Path(each["path"]) for each in shown["backups"]]
    assert len({file.stat().st_ino for file in files}) == 1
    assert all(str(file).startswith(str(keeper.root / "active")) for file in files)
    assert shown["rows"] == 2
    assert staged(keeper) == []
    wait_for(lambda: not list((keeper.root / "active" / ".outcomes").iterdir()))


def test_what_was_sealed_is_said_to_people(keeper: Keeper, vault: Service) -> None:
    answer = keeper.run("agent", "backup", "daily")
    assert (answer.code, answer.stdout) == (0, "")
    assert "sealed" in answer.stderr
    assert "as daily/" in answer.stderr


def test_one_database_that_fails_does_not_keep_the_others_from_their_backup(
    keeper: Keeper, vault: Service, database: Database
) -> None:
    several = Keeper(
        keeper.root,
        {name: value for name, value in keeper.environment.items() if name != "DB_NAME"}
        | {"DB_NAMES": f"nowhere,{database.name}", "BACKUP_GLOBALS": "auto"},
    )
    answer = several.run("agent", "backup", "daily", "--json")
    shown = answer.json()
    assert (answer.code, shown["ok"], shown["exit_code"]) == (4, False, 4)
    assert [failure["subject"] for failure in shown["failures"]] == ["nowhere"]
    assert {each["database"] for each in shown["backups"]} == {database.name, ""}
    # The vault knows nothing of the agent's databases; that there are several shows in the files' names.
    assert [each["path"] for each in shown["backups"] if each["path"].endswith(f".{database.name}.sql.gz")]
    # The reason reaches the audit log, and what carried it there goes with the next run.
    wait_for(lambda: audit(keeper, "backup failed"))
    assert "nowhere" in json.dumps(audit(keeper, "backup failed"))
    keeper.json("agent", "backup")
    wait_for(lambda: keeper.json("agent", "backup") and staged(keeper) == [])


def test_a_run_made_good_leaves_out_what_has_its_backup(keeper: Keeper, vault: Service) -> None:
    started = clock.now() - dt.timedelta(seconds=1)
    keeper.json("agent", "backup", "daily")
    again = keeper.json("agent", "backup", "daily", "--since", started.isoformat())
    assert (again["backups"], again["skipped"]) == ([], [keeper.environment["DB_NAME"]])
    both = keeper.json("agent", "backup", "daily", "hourly", "--since", started.isoformat())
    assert len(both["backups"]) == 2, "one of its tiers had none"


def test_cleanup_is_the_vaults_work(keeper: Keeper, vault: Service) -> None:
    keeper.json("agent", "backup", "daily")
    answer = keeper.run("agent", "cleanup")
    assert answer.code == 0, answer.stderr
    assert answer.stdout.strip()
    assert staged(keeper) == []


def test_a_vault_that_is_away_loses_nothing_and_is_not_flooded(keeper: Keeper) -> None:
    hasty = keeper.of(BACKUP_VAULT_TIMEOUT="1")
    for _ in range(4):
        assert "has not answered" in hasty.fails(12, "agent", "backup")
    assert "does not take what is there: 4 dumps wait" in hasty.fails(12, "agent", "backup")
    assert [name.partition(".")[2] for name in staged(keeper)].count("ready") == 4
    clusters.need_root("the vault sets flags")
    with serving_vault(keeper.environment, keeper.root):
        manual = keeper.root / "active" / "manual"
        wait_for(lambda: len(list(manual.glob("*.manifest.json"))) == 4)
        answer = keeper.run("agent", "backup")
        assert answer.code == 0, answer.stderr
        assert answer.stderr.count("which an earlier run had left") == 4
        assert [name for name in staged(keeper) if name.endswith(".ready")] == []


@pytest.mark.parametrize(("state", "code"), [("refused", 11), ("failed", 6)])
def test_the_vaults_no_is_the_runs(keeper: Keeper, state: str, code: int) -> None:
    """The vault is played here: its own reasons are its own tests' matter."""
    outcomes = keeper.root / "active" / mailbox.OUTCOMES_DIRECTORY
    outcomes.mkdir(parents=True)

    def answer() -> None:
        wait_for(lambda: list((keeper.root / "staging").glob("*.ready")))
        identifier = next((keeper.root / "staging").glob("*.ready")).stem
        outcome = mailbox.Outcome(id=identifier, state=state, time=clock.now(), message="so not", hint="do so")  # type: ignore[arg-type]
        (outcomes / "new").write_bytes(mailbox.encode(outcome))
        (outcomes / "new").rename(outcomes / f"{identifier}.json")

    (keeper.root / "staging").mkdir()
    thread = threading.Thread(target=answer)
    thread.start()
    said = keeper.fails(code, "agent", "backup", "daily")
    thread.join()
    assert "so not" in said
    assert "do so" in said
    assert staged(keeper) == []


def test_a_run_waits_for_another_and_says_whose(keeper: Keeper) -> None:
    (keeper.root / "staging").mkdir()
    with lock.locked(keeper.root / "staging" / ".lock"):
        said = keeper.fails(9, "agent", "backup", "--wait", "0.3")
    assert f"waiting for process {os.getpid()}" in said
    assert "is held by" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_takes_everything_with_it(
    keeper: Keeper, vault: Service, database: Database, number: signal.Signals, code: int
) -> None:
    with locked_table(database, "second"), under_way(keeper, "agent", "backup", "daily") as running:
        wait_for(lambda: waits_for_a_lock(database))
        started = time.monotonic()
        running.send_signal(number)
        _, stderr = running.communicate(timeout=20)
        assert (running.returncode, "Traceback" in stderr) == (code, False), stderr
        assert time.monotonic() - started < 5
        assert processes_of(f"dbname={database.name}") == []
    assert [name for name in staged(keeper) if not name.endswith(".failed")] == []
    wait_for(lambda: audit(keeper, "backup failed", "backup interrupted"))


# ---------------------------------------------------------------- who waits for the dump


def test_sessions_that_wait_for_the_dump_are_seen_by_a_role_without_any_right(database: Database) -> None:
    """Those behind the one that waits for us too; not our own, and nobody who waits for somebody else."""
    role = f"plain_{database.name}"
    database.execute(f"CREATE ROLE {role} LOGIN")
    target = postgres.Target.parse(database.conninfo.replace("user=postgres", f"user={role}"))
    try:
        with contextlib.ExitStack() as stack:
            dump, other = (
                stack.enter_context(psycopg.connect(database.conninfo, application_name=name))
                for name in ("pgkeep-x", "somebody")
            )
            dump.execute("LOCK TABLE first IN ACCESS SHARE MODE")
            other.execute("LOCK TABLE second IN ACCESS SHARE MODE")
            for statement in ("ALTER TABLE first ADD m int", "SELECT * FROM first", "ALTER TABLE second ADD m int"):
                stack.enter_context(waiting(database, statement))
            with blocking.sampled(target, "pgkeep-x") as sampler:
                wait_for(lambda: sampler.failure or sampler.longest_seconds > 1)
                assert (sampler.failure, sampler.sessions) == ("", 2)
                assert sampler.notes() == []
            dump.rollback()
            other.rollback()
    finally:
        database.execute(f"DROP ROLE {role}")


def test_sampling_that_fails_is_noted_and_harms_nothing(database: Database) -> None:
    target = postgres.Target.parse(database.conninfo).database("nowhere")
    with blocking.sampled(target, "pgkeep-x") as sampler:
        wait_for(lambda: sampler.failure)
    (note,) = sampler.notes()
    assert "not measured" in note


def test_a_dump_that_holds_others_up_warns_and_says_so_in_the_manifest(
    keeper: Keeper, vault: Service, database: Database
) -> None:
    with psycopg.connect(database.conninfo) as holder, under_way(keeper, "agent", "backup", "--json") as running:
        holder.execute("LOCK TABLE second IN ACCESS EXCLUSIVE MODE")
        wait_for(lambda: waits_for_a_lock(database))
        with waiting(database, "ALTER TABLE first ADD m int"):
            time.sleep(blocking.WARNING_SECONDS + 2 * blocking.SAMPLE_SECONDS)
            holder.rollback()
        stdout, stderr = running.communicate(timeout=30)
    assert running.returncode == 0, stderr
    assert "hold up other sessions" in stderr
    notes = json.loads(stdout)["notes"]
    assert any("held up other sessions (1)" in note for note in notes), notes


# ---------------------------------------------------------------- the service


@contextlib.contextmanager
def serving_agent(keeper: Keeper, **variables: str) -> Iterator[Service]:
    with serving({**keeper.environment, **variables}, keeper.root.with_name("agent.log"), "agent") as running:
        yield running


def wait_for_starts(agent: Service, count: int) -> None:
    agent.wait_for(lambda: agent.log.count("has started") == count)


def healthy(keeper: Keeper) -> bool:
    return keeper.run("health", "agent").code == 0


def manifests(keeper: Keeper) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in (keeper.root / "active").glob("*/*.manifest.json"))


def test_the_service_makes_the_first_backup_once_and_idles_lightly(keeper: Keeper, vault: Service) -> None:
    with serving_agent(keeper) as agent:
        agent.wait_for(lambda: "backed up: hourly, daily, weekly" in agent.log)
        assert healthy(keeper)
        cron_log = (keeper.root / "logs" / "cron.log").read_text()
        assert "sealed" in cron_log
        assert agent.log == cron_log
        made = manifests(keeper)
        assert [name.partition("/")[0] for name in made] == ["daily", "hourly", "weekly"]
        before = agent.cpu_seconds
        time.sleep(2)
        assert agent.cpu_seconds - before <= 0.05
        assert agent.rss_bytes <= IDLE_LIMIT_BYTES
        assert agent.stop()[0] == 0
    for starts in (2, 3):
        with serving_agent(keeper) as agent:
            wait_for_starts(agent, starts)
            code, seconds = agent.stop()
            assert (code, seconds < 2) == (0, True)
    assert manifests(keeper) == made


def test_the_log_can_be_json(keeper: Keeper, vault: Service) -> None:
    with serving_agent(keeper, PGKEEP_LOG_FORMAT="json") as agent:
        agent.wait_for(lambda: "backed up: " in agent.log)
        agent.stop()
    records = [json.loads(line) for line in agent.log.splitlines()]
    assert {record["role"] for record in records} == {"agent"}
    # The tests may be root with every capability, which the service says when it starts.
    assert {record["level"] for record in records if "LINUX_IMMUTABLE" not in record["message"]} == {"info"}


def test_a_database_that_comes_later_is_waited_for(
    keeper: Keeper, vault: Service, cluster15: ScratchCluster, new_database: NewDatabase
) -> None:
    later = f"{keeper.environment['DB_NAME']}_later"
    with serving_agent(keeper, DB_NAME=later) as agent:
        agent.wait_for(lambda: agent.log.count("waiting for the database") >= 2)
        answer = keeper.run("health", "agent")
        assert answer.code == 1
        assert "the database can't be reached" in answer.stdout
        assert manifests(keeper) == []
        new_database(cluster15, name=later)
        agent.wait_for(lambda: "backed up: " in agent.log)
        agent.wait_for(lambda: healthy(keeper))
    assert len(manifests(keeper)) == 3


def test_a_failing_run_is_told_to_the_health_check_and_to_the_audit_log(keeper: Keeper, vault: Service) -> None:
    with serving_agent(keeper, BACKUP_GLOBALS="auto", PGKEEP_PG_BIN="/nowhere") as agent:
        agent.wait_for(lambda: "failed; next try in 1 min" in agent.log)
        answer = keeper.run("health", "agent", "--json")
        assert answer.code == 1
        assert "/nowhere" in json.dumps(answer.json()["problems"])
        wait_for(lambda: audit(keeper, "backup failed"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_service_ended_in_the_middle_of_a_run(
    keeper: Keeper, vault: Service, database: Database, number: signal.Signals
) -> None:
    with locked_table(database, "second"), serving_agent(keeper) as agent:
        agent.wait_for(lambda: waits_for_a_lock(database))
        code, seconds = agent.stop(number)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        assert seconds < 5
        wait_for(lambda: processes_of(f"dbname={database.name}") == [])
        # Killed itself, its run still clears up after itself: it is told that its parent is gone.
        wait_for(lambda: [name for name in staged(keeper) if not name.endswith(".failed")] == [])
    wait_for(lambda: audit(keeper, "backup failed", "backup interrupted"))
    with serving_agent(keeper) as agent:
        agent.wait_for(lambda: "backed up: hourly, daily, weekly" in agent.log)
        agent.wait_for(lambda: healthy(keeper))
    assert len(manifests(keeper)) == 3


def test_a_second_service_on_the_same_staging_is_refused(keeper: Keeper, vault: Service) -> None:
    (keeper.root / "staging").mkdir(exist_ok=True)
    with serving_agent(keeper) as agent:
        agent.wait_for(lambda: "has started" in agent.log)
        said = keeper.fails(9, "agent")
    assert "is held by process" in said
