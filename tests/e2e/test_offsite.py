"""Copies that leave the machine for object storage whose server enforces locks; and the day when only they are left.

In order, on one stack: the last test loses it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime as dt
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import clock
from tests.e2e import offsite, source, stack
from tests.e2e.engine import Engine
from tests.e2e.offsite import ENDPOINT, Account, Elsewhere
from tests.e2e.stack import SERVICES, VOLUMES, Stack, wait_until

EXTRACTOR, OUT = "offsite-backup-extractor-1", "offsite_backend_net"
PAGE = source.PROJECT / "docs" / "worst-day.md"
STEPS = ("1. ", "2. ", "3. ", "4. ", "5. ")
NEW_DATABASE, NEW_NETWORK = "new-db", "worst-day"
# The page's table and the application's own.
SHOP = "CREATE SCHEMA shop; CREATE TABLE shop.orders AS SELECT * FROM orders"
CONTENT = """
SELECT 'users ' || count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY id)) FROM users AS t UNION ALL
SELECT 'orders ' || count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY id)) FROM orders AS t UNION ALL
SELECT 'shop.orders ' || count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY id)) FROM shop.orders AS t UNION ALL
SELECT 'owner ' || string_agg(DISTINCT tableowner, ',') FROM pg_tables WHERE schemaname IN ('public', 'shop')
ORDER BY 1
"""
# The client tries a request eight times, with pauses of up to 20 s, before it gives up.
PATIENCE_SECONDS = 150.0


@pytest.fixture(scope="module")
def elsewhere(engine: Engine, context: Path, projects: Path) -> Iterator[Elsewhere]:
    with offsite.running(engine, projects / "elsewhere") as running:
        yield running


@pytest.fixture(scope="module", name="keeper")
def offsite_stack(engine: Engine, context: Path, projects: Path, elsewhere: Elsewhere) -> Iterator[Stack]:
    """The whole stack with the keys as deploy/README.md lays them out, its first backup sealed and in the directory."""
    files = "docker-compose.yml:pgkeep/deploy/compose.s3.yaml"
    settings = {"COMPOSE_FILE": files, "BACKUP_SCHEDULE": "off", "PGKEEP_REQUIRED_DESTINATIONS": "s3"}
    made = stack.lay_out(engine, context, projects / "offsite", {**settings, **offsite.SETTINGS})
    writer = elsewhere.accounts["writer"]
    made.said(
        f"printf %s {writer.key} > secrets/s3_access_key_id.txt"
        f" && printf %s {writer.secret} > secrets/s3_secret_access_key.txt\n"
        "chown 10003 secrets/s3_*.txt && chmod 0400 secrets/s3_*.txt"
    )
    try:
        made.start_application()
        made.psql(SHOP)
        elsewhere.attach(OUT)
        made.start()
        yield made
    finally:
        if made.directory.exists():
            lose(made, elsewhere)


def lose(stack: Stack, elsewhere: Elsewhere) -> None:
    """The machine: its containers, volumes, project directory, secrets. What is elsewhere stays."""
    elsewhere.detach(OUT)
    stack.remove()


class TestCopies:
    def test_the_first_backup_is_there_and_locked(self, keeper: Stack, elsewhere: Elsewhere) -> None:
        (daily,) = keeper.sealed("daily")
        wait_until(lambda: daily in elsewhere.dumps("daily"), "the first copy", say=keeper.trouble)
        wait_until(lambda: any(path.startswith("anchors/") for path in elsewhere.objects()), "an anchor")
        found = elsewhere.objects()
        original = f"/backups/active/daily/{daily}"
        manifest = json.loads(keeper.execute("backup-extractor", "cat", f"{original}.manifest.json").stdout)
        kept_until = dt.datetime.fromisoformat(manifest["retain_until"])
        for suffix in ("", ".sha256", ".manifest.json"):
            copy = found[f"daily/{daily[:10]}/{daily}{suffix}"]
            size = keeper.execute("backup-extractor", "stat", "-c", "%s", f"{original}{suffix}").stdout
            assert copy.size_bytes == int(size)
            assert copy.mode == "COMPLIANCE"
            assert copy.until is not None
            assert dt.datetime.fromisoformat(copy.until) >= kept_until.replace(microsecond=0)
        assert any(path.startswith("globals/") for path in found)
        anchors = [copy for path, copy in found.items() if path.startswith("anchors/")]
        assert {copy.mode for copy in anchors} == {"COMPLIANCE"}
        assert all(copy.until and dt.datetime.fromisoformat(copy.until) > clock.now() for copy in anchors)

    def test_the_extractor_says_so_and_is_well(self, keeper: Stack) -> None:
        probe = json.loads(keeper.said(f"docker exec {EXTRACTOR} pgkeep destination test s3 --json"))
        # Its key may delete nothing at all, so that nobody has tried.
        assert (probe["ok"], probe["lock"]) == (True, "asserted"), probe
        listed = json.loads(keeper.said(f"docker exec {EXTRACTOR} pgkeep list --from s3 --json"))
        daily = [backup for backup in listed if backup["tier"] == "daily"]
        assert [(each["state"], Path(each["path"]).name) for each in daily] == [("whole", *keeper.sealed("daily"))]
        keeper.said(f"docker exec {EXTRACTOR} pgkeep verify latest --from s3")
        keeper.said(f"docker exec {EXTRACTOR} pgkeep verify latest --from s3 --deep")
        keeper.said(f"docker exec {EXTRACTOR} pgkeep audit verify --against s3")
        keeper.said(f"docker exec {EXTRACTOR} pgkeep doctor")
        wait_for_health(keeper, "healthy")

    def test_the_way_out_leads_to_no_database(self, keeper: Stack, elsewhere: Elsewhere) -> None:
        """Addresses: what the names lead to is asked elsewhere."""
        database = keeper.inspect("db", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
        storage = elsewhere.address(OUT)
        assert connects(keeper, "backup-agent", database, 5432)
        assert not connects(keeper, "backup-extractor", database, 5432)
        assert connects(keeper, "backup-extractor", storage, offsite.PORT)
        assert not connects(keeper, "backup-agent", storage, offsite.PORT)


class TestOutage:
    def test_it_is_told_and_passes(self, keeper: Stack, elsewhere: Elsewhere) -> None:
        elsewhere.stop()
        keeper.said("docker exec offsite-backup-agent-1 backup.py manual")
        (manual,) = keeper.sealed("manual")
        wait_until(lambda: keeper.extracted("manual"), "its copy in the directory", say=keeper.trouble)
        # While the client still tries: what the last test needs anyway.
        keeper.said(f"DOCKER_BUILDKIT=0 {section('With Docker', 'sh')[0]}", timeout_seconds=600)
        wait_for_health(keeper, "unhealthy")
        said = keeper.execute("backup-extractor", "pgkeep", "health", "extractor", check=False).stdout.decode()
        assert said.startswith("s3: "), said
        assert "s3.example.com" in said
        assert "external" not in said
        assert {record["destination_name"] for record in failures(keeper)} == {"s3"}

        elsewhere.start()
        wait_for_health(keeper, "healthy")
        assert elsewhere.dumps("manual") == [manual]


class TestKeys:
    """After the outage: what failed is on record too."""

    def test_they_are_in_two_files_and_nowhere_else(self, keeper: Stack, elsewhere: Elsewhere) -> None:
        writer = elsewhere.accounts["writer"]
        mounted = keeper.execute("backup-extractor", "sh", "-c", "cat /run/secrets/s3_*").stdout
        assert shows(mounted, writer), "the search itself"
        for service in ("backup-agent", "backup-vault"):
            names = keeper.execute(service, "sh", "-c", "ls /run/secrets || true", user=0).stdout.decode()
            assert "s3" not in names
        for service in SERVICES:
            assert not shows(keeper.inspect(service, "{{json .}}").encode(), writer), service
            assert not shows(keeper.logs(service).encode(), writer), service
        assert not shows(keeper.engine.output("history", "--no-trunc", "pgkeep-extractor:local").encode(), writer)
        volumes = [keeper.volume(volume) for volume in VOLUMES]
        files = [path for folder in (*volumes, keeper.external) for path in folder.rglob("*") if path.is_file()]
        assert any("extracted" in str(path) for path in files)
        assert not [path for path in files if shows(read(path), writer)]

    def test_no_process_shows_them(self, keeper: Stack, elsewhere: Elsewhere) -> None:
        keeper.engine.docker("exec", "--detach", EXTRACTOR, "pgkeep", "verify", "latest", "--from", "s3", "--deep")
        seen: set[bytes] = set()

        def verifies() -> bool:
            seen.update(processes(keeper, "backup-extractor"))
            return any(b"pgkeep\0verify" in text for text in seen)

        wait_until(verifies, "the command's process", 10.0)
        assert any(b"pgkeep\0extractor" in text for text in seen)
        assert any(b"S3_SECRET_ACCESS_KEY_FILE=/run/secrets/" in text for text in seen)
        assert not [text for text in seen if shows(text, elsewhere.accounts["writer"])]


class TestWorstDay:
    def test_the_bucket_is_all_that_is_left(self, keeper: Stack, elsewhere: Elsewhere, projects: Path) -> None:
        """docs/worst-day.md with Docker, as it stands there: but for the server's address, and a terminal."""
        engine, sources, before = keeper.engine, (keeper.directory / "pgkeep").resolve(), keeper.psql(CONTENT)
        assert "owner app" in before.splitlines()
        lose(keeper, elsewhere)
        *preparations, enter = section("With Docker", "sh")
        steps = "".join(f"{line}\n" for number in STEPS for line in section(number, "bash"))
        assert "https://s3.example.com" in steps
        assert " -it " in enter
        with new_machine(engine, elsewhere, projects / "new-machine", sources) as machine:
            machine.run("\n".join(preparations))
            elsewhere.attach(NEW_NETWORK)
            wait_until(machine.database_answers, "the new database", 30.0)
            machine.run(enter.replace(" -it ", " -i ") + " bash -eu", steps.replace("https://s3.example.com", ENDPOINT))
            for database in ("app_db", "app_db_2"):
                assert machine.psql(database, CONTENT) == before
            assert machine.psql("first_aid", "SELECT count(*) FROM shop.orders") == "20000"


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Nothing but Docker, the sources and the restorer's secret."""

    engine: Engine
    directory: Path
    password: str

    def run(self, commands: str, typed: str = "") -> None:
        done = self.engine.run(
            ["bash", "-eu", "-c", commands],
            check=False,
            directory=self.directory,
            # The builder that made the other images: all but the last steps are done.
            environment={"PGPASSWORD": self.password, "DOCKER_BUILDKIT": "0"},
            input_bytes=typed.encode(),
        )
        assert done.return_code == 0, f"{done.stdout.decode()}{done.stderr}"

    def database_answers(self) -> bool:
        ready = ("pg_isready", "-q", "-h", "127.0.0.1", "-U", "postgres")
        return self.engine.docker("exec", NEW_DATABASE, *ready, check=False).return_code == 0

    def psql(self, database: str, statement: str) -> str:
        options = ("-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database)
        return self.engine.output("exec", NEW_DATABASE, "psql", *options, "-c", statement)


@contextlib.contextmanager
def new_machine(engine: Engine, elsewhere: Elsewhere, directory: Path, sources: Path) -> Iterator[Machine]:
    directory.mkdir()
    (directory / "pgkeep").symlink_to(sources)
    (directory / "s3_secret").write_text(f"{elsewhere.accounts['restorer'].secret}\n")
    try:
        yield Machine(engine, directory, secrets.token_hex(8))
    finally:
        engine.docker("rm", "--force", "--volumes", NEW_DATABASE, check=False)
        engine.docker("network", "disconnect", "--force", NEW_NETWORK, offsite.NAME, check=False)
        engine.docker("network", "rm", NEW_NETWORK, check=False)
        shutil.rmtree(directory)


def section(heading: str, kind: str) -> list[str]:
    """The lines of that section's blocks of that kind."""
    text = PAGE.read_text().split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    lines = "".join(re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    assert lines, heading
    return lines


def shows(data: bytes, account: Account) -> bool:
    """Key or secret, as they are, in any quoting, or as Base64."""
    for text in (account.key, account.secret):
        (middle,) = re.findall("[0-9a-f]{24}", text)
        encoded = (base64.b64encode(middle[skip:].encode())[:-4] for skip in range(3))
        if any(form in data for form in (middle.encode(), *encoded)):
            return True
    return False


def connects(stack: Stack, service: str, address: str, port: int) -> bool:
    attempt = f"import socket; socket.create_connection(('{address}', {port}), timeout=2)"
    return stack.execute(service, "python3", "-c", attempt, check=False).return_code == 0


def wait_for_health(stack: Stack, wanted: str) -> None:
    wait_until(lambda: stack.health("backup-extractor") == wanted, wanted, PATIENCE_SECONDS, say=stack.trouble)


def processes(stack: Stack, service: str) -> set[bytes]:
    """Environments and arguments of every process in the service's container."""
    container, found = stack.inspect(service, "{{.Id}}"), set()
    for process in Path("/proc").glob("[0-9]*"):
        # Gone meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if container in (process / "cgroup").read_text():
                found.update({(process / "cmdline").read_bytes(), (process / "environ").read_bytes()})
    return found


def failures(stack: Stack) -> list[dict[str, Any]]:
    lines = (stack.volume("backup-logs") / "extraction_audit.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "extraction failed"]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        # A heartbeat that was just replaced.
        return b""
