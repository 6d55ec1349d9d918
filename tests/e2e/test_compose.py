"""The Compose files: the same in both of them, for both Composes, and what they make of the images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pgkeep import config
from tests.e2e import images, source
from tests.e2e.engine import COMPOSE_VERSIONS, ComposeVersion, Engine
from tests.e2e.stack import QUICK, SERVICES

DEPLOY = source.PROJECT / "deploy"
POLICY = ("BACKUP_SCHEDULE", "BACKUP_RETENTION", "BACKUP_TIMEZONE")
# An application as there are many: a version line, networks and a secret of its own.
APPLICATION = """
version: "3.8"
services:
  db:
    image: postgres:16-bookworm
    container_name: beside-db-1
    environment: {POSTGRES_USER: app, POSTGRES_DB: app_db, POSTGRES_PASSWORD_FILE: /run/secrets/db_password}
    networks: [data_net]
    secrets: [db_password]
  web:
    image: python:3.13-slim-bookworm
    networks: [data_net, backend_net]
networks:
  data_net: {internal: true}
  backend_net: {driver_opts: {com.docker.network.driver.mtu: "1400"}}
secrets:
  db_password: {file: ./secrets/db_password.txt}
"""


def test_the_example_says_what_compose_yaml_says() -> None:
    """One text in two files; a repair of one is to be made in the other."""
    alone, example = ((DEPLOY / name).read_text() for name in ("compose.yaml", "compose.example.yaml"))
    own = re.sub(r"  db:\n.*?\n\n(?=  backup-agent:)", "", example, flags=re.DOTALL).replace("  db_data:\n", "")
    own = own[: own.index("\nnetworks:\n")]
    assert _without_heading(own) == _without_heading(alone)


def test_the_locks_of_the_images_hold_the_versions_that_are_tested() -> None:
    tested = _pinned(source.PROJECT / "requirements" / "dev.lock")
    for lock in source.LOCKS:
        pinned = _pinned(lock)
        assert pinned
        assert pinned <= tested


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
def test_the_example_is_valid(engine: Engine, tmp_path: Path, version: ComposeVersion) -> None:
    services = _services(engine, version, _project(tmp_path, (DEPLOY / "compose.example.yaml").read_text()))
    assert set(services) == {"db", *SERVICES}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert service["mem_limit"]
        assert service["pids_limit"]


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
def test_beside_an_application_nothing_of_it_changes(engine: Engine, tmp_path: Path, version: ComposeVersion) -> None:
    project = _project(tmp_path, APPLICATION)
    before = _document(engine, version, project)
    after = _document(engine, version, project, "-f", "docker-compose.yml", "-f", DEPLOY / "compose.yaml")
    assert set(after["services"]) == {*before["services"], *SERVICES}
    for part in ("services", "networks", "secrets"):
        assert before[part] == {name: after[part][name] for name in before[part]}


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
def test_variables_reach_both_who_make_backups_and_who_keep_them(
    engine: Engine, tmp_path: Path, version: ComposeVersion
) -> None:
    settings = {"BACKUP_SCHEDULE": "*/5 * * * *", "BACKUP_RETENTION_DAYS": "14", "PGKEEP_NAME": "shop", **QUICK}
    project = _project(tmp_path, (DEPLOY / "compose.example.yaml").read_text(), settings)
    services = _services(engine, version, project)
    for name in ("backup-agent", "backup-vault"):
        assert services[name]["environment"]["BACKUP_SCHEDULE"] == "*/5 * * * *"
        assert services[name]["environment"]["BACKUP_RETENTION_DAYS"] == "14"
        assert services[name]["container_name"] == f"shop-{name}-1"
        assert services[name]["healthcheck"] == {"interval": "2s"}
    policies = [
        {key: value for key, value in services[name]["environment"].items() if key.startswith(POLICY)}
        for name in ("backup-agent", "backup-vault")
    ]
    assert len(policies[0]) == 13
    assert policies[0] == policies[1]


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
def test_without_flags_the_agent_reads_only(engine: Engine, tmp_path: Path, version: ComposeVersion) -> None:
    project = _project(tmp_path, APPLICATION)
    files = ["docker-compose.yml", DEPLOY / "compose.yaml", DEPLOY / "compose.no-flags.yaml"]
    services = _services(engine, version, project, *(f"--file={file}" for file in files))
    modes = {target: mode for name in SERVICES for target, mode in _modes(name, services[name]).items()}
    assert modes["backup-agent", "/backups/active"] == "ro"
    assert modes["backup-agent", "/backups/staging"] == "rw"
    assert modes["backup-vault", "/backups/active"] == "rw"


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
def test_only_the_extractor_hears_of_destinations(engine: Engine, tmp_path: Path, version: ComposeVersion) -> None:
    settings = {"S3_BUCKET": "backups", "RSYNC_TARGET": "me@host:/srv", "PGKEEP_REQUIRED_DESTINATIONS": "s3,rsync"}
    project = _project(tmp_path, (DEPLOY / "compose.example.yaml").read_text(), settings)
    for name in ("s3_access_key_id.txt", "s3_secret_access_key.txt", "rsync_key", "rsync_known_hosts"):
        (project / "secrets" / name).write_text("x\n")
    files = ["docker-compose.yml", DEPLOY / "compose.s3.yaml", DEPLOY / "compose.rsync.yaml"]
    services = _services(engine, version, project, *(f"--file={file}" for file in files))
    environments = {name: services[name]["environment"] for name in SERVICES}
    assert environments["backup-extractor"]["S3_BUCKET"] == "backups"
    assert environments["backup-extractor"]["RSYNC_TARGET"] == "me@host:/srv"
    assert environments["backup-extractor"]["RSYNC_KEY_FILE"] == "/run/secrets/rsync_key"
    assert environments["backup-vault"]["PGKEEP_REQUIRED_DESTINATIONS"] == "s3,rsync"
    for name in ("backup-agent", "backup-vault"):
        assert [key for key in environments[name] if key.startswith(("S3_", "RSYNC_", "EXTERNAL_"))] == []
    assert "PGKEEP_REQUIRED_DESTINATIONS" not in environments["backup-agent"]
    secrets = {name: _secrets(services[name]) for name in SERVICES}
    assert secrets["backup-extractor"] == {
        "s3_access_key_id",
        "s3_secret_access_key",
        "rsync_key",
        "rsync_known_hosts",
    }
    assert secrets["backup-agent"] == {"db_password"}
    assert secrets["backup-vault"] == set()


def test_the_compose_file_passes_every_setting_of_a_destination_on() -> None:
    """But for keys, which are files, and what depends on files that only a Compose file of one's own can mount."""
    files = ("compose.yaml", "compose.s3.yaml", "compose.rsync.yaml")
    passed = set(re.findall(r"^      (\w+): ", "".join((DEPLOY / name).read_text() for name in files), re.MULTILINE))
    left_out = {"S3_SESSION_TOKEN", "S3_PROFILE", "S3_CA_FILE"}
    for row in config.destinations.known_rows():
        assert passed & set(row.all_variables()) or left_out & set(row.variables), row.key


def test_the_extractor_s_image_has_the_clients_and_nothing_that_lends_rights(engine: Engine, context: Path) -> None:
    asked = "command -v rsync; command -v ssh; pgkeep --version >&2; /opt/pgkeep/bin/python -c 'import boto3'"
    assert _in_image(engine, "extractor", asked, user="").splitlines() == ["/usr/bin/rsync", "/usr/bin/ssh"]
    lending = "find / -xdev -perm /6000 -type f \\( -name 'ssh*' -o -name 'rsync*' \\)"
    assert _in_image(engine, "extractor", lending) == ""
    for other in ("agent", "vault"):
        absent = "/opt/pgkeep/bin/python -c 'import boto3' 2>/dev/null || echo absent"
        assert _in_image(engine, other, absent).strip() == "absent"


def test_images_agree_on_owners_and_carry_only_their_own_commands(engine: Engine, context: Path) -> None:
    """An empty volume takes owners and modes from whichever image comes first."""
    listing = "stat -c '%n %u:%g %a' /backups /backups/* /external; stat -c '%n %u:%g %a %s' /backups/logs/*; id -G {}"
    users = ("pgkeep-agent", "pgkeep-vault", "pgkeep-extractor")
    script = "; ".join([listing.format(users[0]), *(f"id -G {user}" for user in users[1:])])
    seen = {target: _in_image(engine, target, script) for target in source.TARGETS}
    assert seen["agent"] == seen["vault"] == seen["extractor"]
    assert seen["agent"].splitlines() == [
        "/backups 0:0 755",
        "/backups/active 10002:10002 755",
        "/backups/extracted 10003:10003 700",
        "/backups/logs 10002:10002 755",
        "/backups/staging 10001:10001 750",
        "/backups/state 10002:10002 700",
        "/external 10003:10003 755",
        "/backups/logs/backup_audit.jsonl 10002:10002 644 0",
        "/backups/logs/cron.log 10001:10001 644 0",
        "/backups/logs/extraction_audit.jsonl 10003:10003 644 0",
        "10001",
        "10002 10001",
        "10003 10002",
    ]
    commands = {target: _in_image(engine, target, "cd /usr/local/bin && ls *.py || true") for target in source.TARGETS}
    assert commands == {"agent": "backup.py", "vault": "", "extractor": "extractor.py"}


@pytest.mark.parametrize("target", source.TARGETS)
def test_images_run_as_they_should(engine: Engine, context: Path, target: str) -> None:
    expected = {"agent": "10001 10001", "vault": "0 0", "extractor": "10003 10003 10002"}[target]
    asked = "echo $(id -u) $(id -G); command -v pgkeep; pgkeep --version"
    ids, path, version = _in_image(engine, target, asked, user="").splitlines()
    assert ids == expected
    assert path == "/usr/local/bin/pgkeep"
    assert version.startswith("pgkeep, version ")
    configuration = json.loads(engine.output("image", "inspect", "--format", "{{json .Config}}", _image(target)))
    assert configuration["Cmd"] == ["pgkeep", target]
    assert configuration["Entrypoint"] is None
    assert configuration["Healthcheck"]["Test"] == ["CMD", "pgkeep", "health", target]
    assert configuration.get("StopSignal", "SIGTERM") == "SIGTERM"


def test_the_agent_has_the_programs_of_the_servers_major(engine: Engine, context: Path) -> None:
    dockerfile = context / "deploy" / "docker" / "Dockerfile"
    for major in images.POSTGRES_MAJORS:
        chosen = ("--target", "agent", "--build-arg", f"PG_MAJOR={major}", "--tag", f"agent:{major}")
        engine.docker("build", "--file", dockerfile, *chosen, context, environment={"DOCKER_BUILDKIT": "0"})
        printed = engine.output("run", "--rm", "--network", "none", f"agent:{major}", "pg_dump", "--version")
        assert printed.startswith(f"pg_dump (PostgreSQL) {major}.")


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("agent", "backup.py"),
        ("agent", "backup.py sometimes"),
        ("agent", "backup.py daily cleanup"),
        ("extractor", "extractor.py now"),
        ("extractor", "extractor.py once more"),
    ],
)
def test_the_guides_commands_refuse_what_they_do_not_know(
    engine: Engine, context: Path, target: str, command: str
) -> None:
    done = engine.docker("run", "--rm", "--network", "none", _image(target), *command.split(), check=False)
    assert done.return_code == 2
    assert f"usage: {command.split()[0]} " in done.stderr


def _secrets(service: dict[str, Any]) -> set[str]:
    return {each if isinstance(each, str) else each["source"] for each in service.get("secrets") or ()}


def _without_heading(text: str) -> str:
    return text[text.index("x-pgkeep-policy:") :].strip()


def _pinned(lock: Path) -> set[str]:
    return set(re.findall(r"^[A-Za-z0-9_.-]+==[^ ;\\]+", lock.read_text(), flags=re.MULTILINE))


def _image(target: str) -> str:
    return f"pgkeep-{target}:local"


def _in_image(engine: Engine, target: str, script: str, user: str = "0") -> str:
    whom = ("--user", user) if user else ()
    return engine.output("run", "--rm", "--network", "none", *whom, _image(target), "sh", "-c", script)


def _project(folder: Path, compose: str, settings: dict[str, str] | None = None) -> Path:
    (folder / "docker-compose.yml").write_text(compose)
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in (settings or {}).items()))
    # docker-compose 1.29 looks whether there is something to build from.
    (folder / "pgkeep").mkdir()
    (folder / "secrets").mkdir()
    (folder / "secrets" / "db_password.txt").write_text("x\n")
    return folder


def _document(engine: Engine, version: ComposeVersion, project: Path, *options: str | Path) -> dict[str, Any]:
    """What Compose makes of the files. Version 1.29 prints YAML only; its own Python reads that."""
    printed = engine.compose(version, *options, "config", directory=project).stdout
    to_json = "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))"
    text = engine.run(["/usr/bin/python3", "-c", to_json], input_bytes=printed).stdout.decode()
    # Nothing said and nothing to say are one, and are written either way.
    document: dict[str, Any] = json.loads(text.replace(": null", ": {}"))
    return document


def _services(engine: Engine, version: ComposeVersion, project: Path, *options: str | Path) -> dict[str, Any]:
    services: dict[str, Any] = _document(engine, version, project, *options)["services"]
    return services


def _modes(name: str, service: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(service, path in it) to ``rw`` or ``ro``, of either Compose's way to write volumes."""
    modes = {}
    for volume in service["volumes"]:
        if isinstance(volume, str):
            _, target, mode = volume.rsplit(":", 2)
        else:
            target, mode = volume["target"], "ro" if volume.get("read_only") else "rw"
        modes[name, target] = mode
    return modes
