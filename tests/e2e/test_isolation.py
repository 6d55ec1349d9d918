"""Who can reach what: networks, backups, volumes, secrets. Every refusal has a control that shows the way is real."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.stack import AGENT_UID, SERVICES, VAULT_UID, VOLUMES, Stack, wait_until

# {host: can a connection be had}; all at once, because a packet that is thrown away is waited for.
CONNECT = """
import concurrent.futures, json, socket, sys
port, *hosts = sys.argv[1:]
def connects(host):
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True
with concurrent.futures.ThreadPoolExecutor() as pool:
    print(json.dumps(dict(zip(hosts, pool.map(connects, hosts)))))
"""
LISTEN = """
import socket
listening = socket.create_server(("0.0.0.0", 8099))
listening.settimeout(30)
while True:
    listening.accept()[0].close()
"""
PORT = 5432
LISTENING_PORT = 8099
HOLD_SECONDS = 3


class TestNetworks:
    @pytest.mark.parametrize("user", [None, 0], ids=["service", "root"])
    @pytest.mark.parametrize("service", ["backup-extractor", "backup-vault"])
    def test_no_way_to_the_database(self, stack: Stack, service: str, user: int | None) -> None:
        """By its name, its container's name or its address, by which the agent gets there."""
        hosts = ("db", stack.container("db"), _address(stack, "db"))
        assert _connections(stack, "backup-agent", PORT, hosts) == dict.fromkeys(hosts, True)
        assert _connections(stack, service, PORT, hosts, user) == dict.fromkeys(hosts, False)

    def test_the_vault_has_no_network(self, stack: Stack) -> None:
        interfaces = stack.execute("backup-vault", "ls", "/sys/class/net").stdout.decode().split()
        assert interfaces == ["lo"]

    @pytest.mark.parametrize("user", [None, 0], ids=["service", "root"])
    def test_no_way_from_the_agent_to_the_extractor(self, stack: Stack, user: int | None) -> None:
        hosts = ("backup-extractor", _address(stack, "backup-extractor"))
        with _listening(stack):
            assert _connections(stack, "backup-extractor", LISTENING_PORT, hosts) == dict.fromkeys(hosts, True)
            assert _connections(stack, "backup-agent", LISTENING_PORT, hosts, user) == dict.fromkeys(hosts, False)

    def test_the_databases_network_is_internal(self, stack: Stack) -> None:
        """The engine lets nothing out of it, to wherever the agent would send."""
        internal = {
            network: stack.engine.output("network", "inspect", "--format", "{{.Internal}}", f"{stack.name}_{network}")
            for network in ("data_net", "backend_net")
        }
        assert internal == {"data_net": "true", "backend_net": "false"}


class TestBackups:
    @pytest.mark.parametrize("user", [AGENT_UID, 0], ids=["agent", "root"])
    def test_the_agent_reads_no_old_dump(self, stack: Stack, user: int) -> None:
        dump = f"/backups/active/daily/{stack.sealed('daily')[0]}"
        read = stack.execute("backup-extractor", "cat", dump).stdout
        assert b"CREATE TABLE public.users" in gzip.decompress(read)
        refused = stack.execute("backup-agent", "cat", dump, user=user, check=False)
        assert refused.return_code != 0
        assert "Permission denied" in refused.stderr
        assert refused.stdout == b""


class TestVolumesAndSecrets:
    def test_each_service_mounts_its_own(self, stack: Stack) -> None:
        """What is mounted where, and whether it can be written to."""
        active, logs, staging = "/backups/active", "/backups/logs", "/backups/staging"
        assert {service: _mounts(stack, service) for service in SERVICES} == {
            "backup-agent": {staging: True, active: True, logs: True, "/run/secrets/db_password": False},
            "backup-vault": {staging: False, active: True, logs: True, "/backups/state": True},
            "backup-extractor": {active: False, "/backups/extracted": True, logs: True, "/external": True},
        }

    @pytest.mark.parametrize("service", ["backup-vault", "backup-extractor"])
    def test_no_secret_but_the_agents(self, stack: Stack, service: str) -> None:
        assert stack.password in stack.execute("backup-agent", "cat", "/run/secrets/db_password").stdout.decode()
        for user in (None, 0):
            looked = stack.execute(service, "ls", "/run/secrets", user=user, check=False)
            assert looked.return_code != 0
            assert "No such file or directory" in looked.stderr

    @pytest.mark.parametrize("service", ["backup-agent", "backup-extractor"])
    def test_the_vaults_state_is_nobody_elses(self, stack: Stack, service: str) -> None:
        """What the image has under that name is another, empty directory."""
        listing = ("python3", "-c", "import os; print(os.listdir('/backups/state'))")
        assert "journal" in stack.execute("backup-vault", *listing, user=VAULT_UID).stdout.decode()
        assert stack.execute(service, *listing, user=VAULT_UID).stdout.decode() == "[]\n"

    def test_root_in_the_agent_reads_nobody_elses_logs_but_the_public_ones(self, stack: Stack) -> None:
        """The daemons' health and work are in the volumes of their own."""
        for path in ("/backups/extracted", "/backups/state", "/backups/active/.incoming"):
            looked = stack.execute("backup-agent", "ls", path, user=0, check=False)
            assert "Permission denied" in looked.stderr, path


class TestPassword:
    """It is in no form anywhere that others look at: its random middle is the same in every quoting."""

    def test_inspect_and_logs(self, stack: Stack) -> None:
        assert _shows(stack, json.dumps(stack.password).encode()), "the search itself"
        for service in ("db", *SERVICES):
            assert not _shows(stack, stack.inspect(service, "{{json .}}").encode()), service
            assert not _shows(stack, stack.logs(service).encode()), service
        for service in SERVICES:
            image = stack.inspect(service, "{{.Image}}")
            history = stack.engine.output("history", "--no-trunc", image) + stack.engine.output("inspect", image)
            assert not _shows(stack, history.encode()), service

    def test_files(self, stack: Stack) -> None:
        """Manifests, audit logs, cron.log, the services' state, what is at the destination, the dumps themselves."""
        stack.said(f"docker exec {stack.container('backup-agent')} /usr/local/bin/backup.py manual")
        folders = [*(stack.volume(volume) for volume in VOLUMES), stack.external]
        files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
        names = {path.name for path in files}
        assert {"backup_audit.jsonl", "cron.log", "extraction_audit.jsonl", "vault.json"} <= names
        assert any(name.endswith(".manifest.json") for name in names)
        assert any(path.parent.name == "globals" for path in files)
        assert [path for path in (stack.directory / "secrets").iterdir() if _file_shows(stack, path)], (
            "the search itself"
        )
        assert not [path for path in files if _file_shows(stack, path)]

    def test_processes(self, stack: Stack) -> None:
        """Environment and arguments of all of them, while pg_dump waits for a table."""
        with _background(stack, "db", _holding_users()):
            _wait_until_held(stack)
            with _background(stack, "backup-agent", ["/usr/local/bin/backup.py", "hourly"]):
                seen = _watched(stack, until=lambda texts: any(b"pg_dump\0" in text for text in texts))
        assert any(b"/usr/local/bin/pgkeep\0" in text or b"pgkeep\0agent" in text for text in seen)
        assert not [text for text in seen if _shows(stack, text)]
        wait_until(lambda: not _is_under_way(stack), "the end of the backup", say=stack.trouble)

    def test_processes_would_be_seen(self, stack: Stack) -> None:
        """Control: a process that has it among its arguments, and one that has it in its environment."""
        marked = f"SECRET={stack.password}"
        for service, command in (
            ("backup-agent", ["sh", "-c", "sleep 2; true", marked]),
            ("backup-extractor", ["env", marked, "sleep", "2"]),
        ):
            with _background(stack, service, command):
                wait_until(lambda: [text for text in _processes(stack) if _shows(stack, text)], "the process", 5.0)
        wait_until(lambda: not [text for text in _processes(stack) if _shows(stack, text)], "its end", 10.0)


def _connections(
    stack: Stack, service: str, port: int, hosts: Sequence[str], user: int | None = None
) -> dict[str, bool]:
    quick = ("env", "RES_OPTIONS=timeout:1 attempts:1")
    done = stack.execute(service, *quick, "python3", "-c", CONNECT, str(port), *hosts, user=user)
    connections: dict[str, bool] = json.loads(done.stdout)
    return connections


def _address(stack: Stack, service: str) -> str:
    (address,) = stack.inspect(service, "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}").split()
    return address


def _mounts(stack: Stack, service: str) -> dict[str, bool]:
    mounts = json.loads(stack.inspect(service, "{{json .Mounts}}"))
    return {mount["Destination"]: mount["RW"] for mount in mounts if mount["Type"] != "tmpfs"}


@contextlib.contextmanager
def _background(stack: Stack, service: str, command: list[str]) -> Iterator[None]:
    """Begun in the container and left to end by itself."""
    stack.engine.docker("exec", "--detach", stack.container(service), *command)
    yield


@contextlib.contextmanager
def _listening(stack: Stack) -> Iterator[None]:
    """A port of the extractor's that answers; it has none by itself. Whoever listens leaves half a minute later."""
    address = _address(stack, "backup-extractor")
    with _background(stack, "backup-extractor", ["python3", "-c", LISTEN]):

        def answers() -> bool:
            return _connections(stack, "backup-extractor", LISTENING_PORT, [address])[address]

        wait_until(answers, "the listener", 10.0)
        yield


def _holding_users() -> list[str]:
    statement = f"BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep({HOLD_SECONDS}); COMMIT"
    return ["psql", "-X", "-q", "-U", "app", "-d", "app_db", "-c", statement]


def _wait_until_held(stack: Stack) -> None:
    held = "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = 'users'::regclass"
    wait_until(lambda: stack.psql(held) == "1", "the lock", 10.0)


def _is_under_way(stack: Stack) -> bool:
    listed = stack.execute("backup-agent", "ls", "/backups/staging").stdout.decode().split()
    return any(name.endswith((".partial", ".ready")) for name in listed)


def _watched(stack: Stack, until: Callable[[set[bytes]], bool]) -> set[bytes]:
    """All that processes showed until they showed that, and for a second more."""
    seen: set[bytes] = set()
    deadline = time.monotonic() + 20.0
    while not until(seen):
        assert time.monotonic() < deadline, sorted(seen)
        seen |= _processes(stack)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        seen |= _processes(stack)
    return seen


def _processes(stack: Stack) -> set[bytes]:
    """Environments and arguments of every process in pgkeep's containers; arguments alone in the database's."""
    containers = {stack.inspect(service, "{{.Id}}"): service for service in ("db", *SERVICES)}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        # Gone meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            groups = set(re.findall(r"[0-9a-f]{64}", (process / "cgroup").read_text()))
            for service in (containers[each] for each in groups & containers.keys()):
                found.add((process / "cmdline").read_bytes())
                if service != "db":
                    found.add((process / "environ").read_bytes())
    return found


def _file_shows(stack: Stack, path: Path) -> bool:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        # A heartbeat that was just replaced, or an answer that was taken.
        return False
    return _shows(stack, gzip.decompress(data) if path.suffix == ".gz" else data)


def _shows(stack: Stack, data: bytes) -> bool:
    """In whatever quoting (of a shell, a URL, JSON, a conninfo, a passfile), or as Base64."""
    (middle,) = re.findall("[0-9a-f]{24}", stack.password)
    # Three beginnings, for where the whole may begin in what was encoded.
    encoded = (base64.b64encode(middle[skip:].encode())[:-4] for skip in range(3))
    return any(form in data for form in (middle.encode(), *encoded))
