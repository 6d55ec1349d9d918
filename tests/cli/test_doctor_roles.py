"""``doctor`` of one service: what that one needs, and what it must not be able to do; on real processes and mounts."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pgkeep.adapters import clock, process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.domain import health
from pgkeep.vault.layout import Layout
from pgkeep.watch import rights
from tests import clusters
from tests.cli.test_doctor import of
from tests.clusters import NewDatabase
from tests.integration.keeper import Keeper, keeping
from tests.vault_daemon import PROJECT, USER, Daemon, daemon, system_python

NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
# The tests' root then reads what the extractor's group would.
ONLY_READING = ("setpriv", "--bounding-set=-all,+dac_read_search", "--inh-caps=-all")
ONLY_FLAGS = ("setpriv", "--bounding-set=-all,+linux_immutable", "--inh-caps=-all")
VAULTS_OWN = "-all,+linux_immutable,+setuid,+setgid,+setpcap"


@pytest.fixture(scope="module")
def vault() -> Iterator[Daemon]:
    """A vault at work, with a backup in it."""
    clusters.need_root("becoming another user")
    with daemon() as own:
        own.start()
        honest = own.stage()
        assert own.outcome(honest).state == "sealed"
        yield own


def doctor(
    environment: Mapping[str, str], *options: str, before: Sequence[str] = (), python: str = sys.executable
) -> tuple[int, list[dict[str, str]]]:
    """Exit code and checks, in a process that has been stripped of rights by ``before``."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    command = [*before, "env", "-i", *variables, python, "-W", "error", "-m", "pgkeep", "doctor", "--json"]
    done = process.run([*command, *options], timeout_seconds=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.return_code, json.loads(done.stdout)["checks"]


def names(checks: list[dict[str, str]]) -> set[str]:
    return {each["name"] for each in checks}


def failures(checks: list[dict[str, str]]) -> list[dict[str, str]]:
    return [each for each in checks if each["status"] == "fail"]


def environment(own: Daemon) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **own._environment({})}


def nobody(agent: Mapping[str, str], root: Path) -> tuple[int, list[dict[str, str]]]:
    """As a user without any group of pgkeep's."""
    uid = pwd.getpwnam("nobody").pw_uid
    before = (*NO_CAPABILITIES, f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    path = f"{PROJECT}/src:{sysconfig.get_path('purelib')}"
    variables = {**agent, "PYTHONPATH": path, "PGKEEP_ROOT": str(root)}
    return doctor(variables, before=before, python=system_python())


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Mounted over itself."""
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        yield
    finally:
        subprocess.run(["umount", place], check=True)


# ---------------------------------------------------------------- vault


def test_a_vault_needs_no_server_and_no_programs(vault: Daemon) -> None:
    variables = {**environment(vault), "BACKUP_ROLE": "vault", "DB_HOST": "/nonexistent", "PGKEEP_PG_BIN": "/nowhere"}
    caps = ("setpriv", f"--bounding-set={VAULTS_OWN}", f"--inh-caps={VAULTS_OWN}")
    code, checks = doctor(variables, before=caps)
    assert failures(checks) == []
    assert code == 0
    assert names(checks) == {"configuration", "version", "capabilities", "network", "staging", "state", "logs", "vault",
                             "protection", "journal", "quarantine", "audit log", "newest backup", "space", "clock",
                             "service"}  # fmt: skip
    assert all(each["remedy"] for each in checks if each["status"] != "ok")
    assert of(checks, "capabilities")["status"] == "ok"
    assert of(checks, "protection")["message"].startswith("chattr: ")
    assert "says that all is well" in of(checks, "service")["message"]
    # As the service's own user, and not the wiser for it.
    uid = pwd.getpwnam(USER).pw_uid
    assert Path(vault.layout.state).stat().st_uid == uid


def test_a_vault_with_more_rights_and_a_way_out_is_warned(vault: Daemon) -> None:
    code, checks = doctor(environment(vault), "--role", "vault")
    assert code == 0
    assert "needs none of these capabilities: CHOWN, DAC_OVERRIDE" in of(checks, "capabilities")["message"]
    with_route = len(Path("/proc/net/route").read_text().splitlines()) > 1
    assert of(checks, "network")["status"] == ("warn" if with_route else "ok")


def test_a_vault_without_a_network_is_told_so(vault: Daemon) -> None:
    _, checks = doctor(environment(vault), "--role", "vault", before=("unshare", "--net"))
    assert of(checks, "network")["status"] == "ok"


def test_a_vault_without_the_capability_fails(vault: Daemon) -> None:
    lacking = "-linux_immutable"
    before = ("setpriv", f"--bounding-set={lacking}", f"--inh-caps={lacking}")
    code, checks = doctor(environment(vault), "--role", "vault", before=before)
    finding = of(checks, "capabilities")
    assert (code, finding["status"]) == (1, "fail")
    assert "cap_add: [LINUX_IMMUTABLE]" in finding["remedy"]


def test_a_changed_audit_log_and_an_ill_service_are_named(tmp_path: Path) -> None:
    clusters.need_root("becoming another user")
    with daemon() as own:
        own.start()
        own.outcome(own.stage())
        own.stop()
        subprocess.run(["chattr", "-a", own.layout.audit], check=True)
        own.layout.audit.write_text(own.layout.audit.read_text().replace('"sequence":1,', '"sequence":7,'))
        code, checks = doctor(environment(own), "--role", "vault")
        assert code == 1
        assert "line 1: its sequence is 7" in of(checks, "audit log")["message"]
        silent = health.Health(role="vault", pid=1, time=clock.now(), problems=("a disk is ill",))
        own.layout.health.write_bytes(health.encode(silent))
        finding = of(doctor(environment(own), "--role", "vault")[1], "service")
        assert (finding["status"], finding["message"]) == ("warn", "a disk is ill")


# ---------------------------------------------------------------- agent


@pytest.fixture
def agent(vault: Daemon, cluster15: ScratchCluster, new_database: NewDatabase) -> Iterator[Keeper]:
    """The configuration of an agent beside that vault."""
    # The images bring it along: only the vault may make files there.
    (vault.layout.logs / "cron.log").touch()
    # Without capabilities root is like any other user there.
    own = cluster15.socket_directory
    for path in (own.parent, own, *own.glob(".s.PGSQL.[0-9]*[0-9]")):
        path.chmod(0o777 if path.is_socket() else path.stat().st_mode | 0o011)
    with keeping(cluster15, new_database(cluster15).name) as keeper:
        yield Keeper(vault.root, {**keeper.environment, "PGKEEP_ROOT": str(vault.root), "BACKUP_ROLE": "agent"})


def test_an_agent_looks_at_server_programs_and_staging_and_leaves_the_vaults_own_alone(agent: Keeper) -> None:
    code, checks = doctor(agent.environment, before=NO_CAPABILITIES)
    assert failures(checks) == []
    assert code == 0
    assert names(checks) == {"configuration", "version", "tools", "setpriv", "capabilities", "backups' mount", "server",
                             "pg_dump", "server clock", "globals", "privileges", "staging", "vault", "log", "space",
                             "clock", "service"}  # fmt: skip
    assert of(checks, "capabilities")["message"] == "none, for root neither"
    assert "protected by flags" in of(checks, "backups' mount")["message"]


@pytest.mark.parametrize("before", [(), ONLY_FLAGS], ids=["privileged", "LINUX_IMMUTABLE"])
def test_an_agent_that_could_lift_the_protection_is_a_failure(agent: Keeper, before: Sequence[str]) -> None:
    code, checks = doctor(agent.environment, before=before)
    finding = of(checks, "capabilities")
    assert (code, finding["status"]) == (1, "fail")
    assert "the capability LINUX_IMMUTABLE was given, and the backups are mounted read-write" in finding["message"]
    assert "cap_drop: [ALL]" in finding["remedy"]


def test_an_agent_that_can_only_read_the_backups_is_warned_of_spare_capabilities(agent: Keeper) -> None:
    with read_only(agent.root / "active"):
        code, checks = doctor(agent.environment, before=ONLY_FLAGS)
        assert code == 0
        finding = of(checks, "capabilities")
        assert (finding["status"], finding["message"]) == (
            "warn", "the agent needs none of its capabilities: LINUX_IMMUTABLE")  # fmt: skip
        assert "is mounted read-only" in of(checks, "backups' mount")["message"]
        code, checks = doctor(agent.environment)
        assert (code, "SYS_ADMIN" in of(checks, "capabilities")["message"]) == (1, True)


def test_an_agent_without_staging_or_a_vault_says_what_to_mount(agent: Keeper, scratch: Path) -> None:
    code, checks = doctor({**agent.environment, "PGKEEP_ROOT": str(scratch)}, before=NO_CAPABILITIES)
    assert code == 1
    assert of(checks, "staging")["status"] == "fail"
    assert "there is no vault" in of(checks, "vault")["message"]
    assert "mount the vault's volume" in of(checks, "backups' mount")["remedy"]


def test_backups_without_flags_are_to_be_mounted_read_only(agent: Keeper, scratch: Path) -> None:
    scratch.chmod(0o755)
    (scratch / "active").mkdir(mode=0o555)
    finding = of(nobody(agent.environment, scratch)[1], "backups' mount")
    assert finding["status"] == "warn"
    assert "compose.no-flags.yaml" in finding["remedy"]
    uid = pwd.getpwnam("nobody").pw_uid
    os.chown(scratch / "active", uid, uid)
    (scratch / "active").chmod(0o755)
    finding = of(nobody(agent.environment, scratch)[1], "backups' mount")
    assert (finding["status"], f"user id {uid} may write" in finding["message"]) == ("fail", True)


# ---------------------------------------------------------------- extractor


@pytest.fixture
def extractor(vault: Daemon, scratch: Path) -> dict[str, str]:
    destination = scratch / "external"
    destination.mkdir()
    (vault.root / "extracted").mkdir(mode=0o700, exist_ok=True)
    (vault.layout.logs / "extraction_audit.jsonl").touch()
    own = {name: value for name, value in environment(vault).items() if name != "PGKEEP_VAULT_USER"}
    return {**own, "EXTERNAL_DIRECTORY": str(destination), "BACKUP_ROLE": "extractor"}


def test_an_extractor_looks_at_its_destination_and_reads_only(vault: Daemon, extractor: dict[str, str]) -> None:
    with read_only(vault.layout.active):
        code, checks = doctor(extractor, before=ONLY_READING)
        assert failures(checks) == []
        assert code == 0
        assert names(checks) == {"configuration", "version", "capabilities", "backups' mount", "vault", "backups",
                                 "destination external", "state", "log", "clock", "service"}  # fmt: skip
        shown = [each["message"] for each in checks if each["name"] == "destination external"]
        assert any("no copy was made there yet" in message for message in shown), shown
        assert list(Path(extractor["EXTERNAL_DIRECTORY"]).iterdir()) == [], "nothing is left there"
    checks = doctor(extractor, before=ONLY_READING)[1]
    assert "mount it `:ro`" in of(checks, "backups' mount")["remedy"]


def test_an_extractor_without_its_destination_or_the_vaults_group_fails(
    vault: Daemon, extractor: dict[str, str]
) -> None:
    gone = {**extractor, "EXTERNAL_DIRECTORY": "/nowhere"}
    code, checks = doctor(gone, before=NO_CAPABILITIES)
    assert code == 1
    assert "/nowhere does not exist" in of(checks, "destination external")["message"]
    checks = nobody(extractor, vault.root)[1]
    assert "must be in the vault's group" in of(checks, "backups")["remedy"]
    assert of(checks, "state")["status"] == "fail"


def test_an_extractor_at_another_vaults_destination_fails(vault: Daemon, extractor: dict[str, str]) -> None:
    marker = {"format": 1, "id": "ab" * 16, "vault": "cd" * 16, "made_at": "2026-01-01T00:00:00Z"}
    (Path(extractor["EXTERNAL_DIRECTORY"]) / ".pgkeep-destination.json").write_text(json.dumps(marker))
    code, checks = doctor(extractor, before=NO_CAPABILITIES)
    assert (code, "another vault" in of(checks, "destination external")["message"]) == (1, True)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("role", ["agent", "extractor"])
def test_services_say_at_their_start_that_they_could_lift_the_protection(role: rights.Reader, vault: Daemon) -> None:
    (said,) = rights.warnings(role, vault.layout.active)
    assert "LINUX_IMMUTABLE was given" in said
    assert f"backup-{role}" in said


def test_capabilities_are_named_as_the_compose_file_spells_them() -> None:
    assert rights.capability_names(0) == []
    assert rights.capability_names(1 << 9 | 1 << 21 | 1) == ["LINUX_IMMUTABLE", "CHOWN", "SYS_ADMIN"]
    assert rights.capability_names(1 << 40 | 1 << 41) == ["CHECKPOINT_RESTORE", "CAP_41"]


def test_a_role_that_is_none_is_a_usage_error(vault: Daemon) -> None:
    variables = [f"{name}={value}" for name, value in environment(vault).items()]
    done = process.run(["env", "-i", *variables, "BACKUP_ROLE=kitchen", sys.executable, "-m", "pgkeep", "doctor"])
    assert done.return_code == 2
    assert "BACKUP_ROLE" in done.stderr
    assert Layout(vault.root).exists
