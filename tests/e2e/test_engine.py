"""The test bed itself: what later tests lean on is tried here first."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import process
from tests.e2e import engine as engines
from tests.e2e import images
from tests.e2e.engine import COMPOSE_VERSIONS, ComposeVersion, Engine

SERVER_SECONDS = 60.0
TWO_SERVICES = f"""
version: "2.4"
services:
  server:
    image: {images.PYTHON}
    command: ["python3", "-u", "-m", "http.server", "8000"]
    networks: [inside]
    stop_signal: SIGKILL
    healthcheck:
      test: ["CMD", "python3", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000', timeout=2)"]
      interval: 1s
      retries: 30
  client:
    image: {images.PYTHON}
    command: ["sleep", "infinity"]
    networks: [inside]
    stop_signal: SIGKILL
    depends_on:
      server:
        condition: service_healthy
networks:
  inside:
    internal: true
"""


@pytest.fixture(params=images.POSTGRES_MAJORS, ids=lambda major: f"pg{major}")
def postgres(request: pytest.FixtureRequest, engine: Engine, tmp_path: Path) -> Iterator[str]:
    """The name of a container with a server that took its password from a file, on a network of its own."""
    name = f"postgres-{request.param}"
    password = tmp_path / "password"
    password.write_text('it\'s a "secret"')
    password.chmod(0o600)
    engine.docker("network", "create", "--internal", name)
    try:
        engine.docker(
            *("run", "--detach", "--name", name, "--network", name, "--volume", f"{password}:/run/secrets/password:ro"),
            *("--env", "POSTGRES_PASSWORD_FILE=/run/secrets/password", "--env", "POSTGRES_USER=keeper"),
            *("--env", "POSTGRES_DB=shop", f"postgres:{request.param}-bookworm"),
        )
        _wait_for_server(engine, name)
        yield name
    finally:
        engine.docker("rm", "--force", "--volumes", name)
        engine.docker("network", "rm", name)


def test_postgres_serves_with_scram_on_every_address(engine: Engine, postgres: str) -> None:
    image = engine.output("inspect", "--format", "{{.Config.Image}}", postgres)
    ask = (
        "psql",
        "--no-psqlrc",
        "-h",
        postgres,
        "-U",
        "keeper",
        "-d",
        "shop",
        "-Atc",
        "select current_setting('port')",
    )
    client = ("run", "--rm", "--network", postgres)

    allowed = engine.output(*client, "--env", 'PGPASSWORD=it\'s a "secret"', image, *ask)
    refused = engine.docker(*client, "--env", "PGPASSWORD=guessed", image, *ask, check=False)

    assert allowed == "5432"
    assert refused.return_code == 2
    assert "password authentication failed" in refused.stderr
    assert engine.output("exec", postgres, "stat", "-c", "%U", "/proc/1") == "postgres"
    assert engine.output("exec", postgres, "id", "-u", "postgres") == "999"


def test_postgres_dumps_and_stops_at_once_under_a_client(engine: Engine, postgres: str) -> None:
    major = engine.output("exec", postgres, "printenv", "PG_MAJOR")
    dumped = engine.output("exec", "-u", "postgres", postgres, "pg_dump", "-U", "keeper", "shop")
    assert f"Dumped by pg_dump version {major}." in dumped

    engine.docker("exec", "-d", postgres, "psql", "-U", "keeper", "-d", "shop", "-c", "select pg_sleep(60)")
    begun = time.monotonic()
    engine.docker("stop", "--time", "20", postgres)
    assert time.monotonic() - begun < 10.0
    assert engine.output("inspect", "--format", "{{.State.ExitCode}}", postgres) == "0"


def test_python_makes_an_environment_without_a_network(engine: Engine) -> None:
    program = "import sys, ssl, sqlite3, ctypes, zlib, lzma; print('%d.%d' % sys.version_info[:2], sys.prefix)"
    script = f'python3 -m venv /tmp/e && /tmp/e/bin/pip --version >/dev/null && /tmp/e/bin/python -c "{program}"'
    printed = engine.output("run", "--rm", "--network", "none", images.PYTHON, "sh", "-c", script)
    assert printed == f"{images.PYTHON_VERSION} /tmp/e"


def test_python_installs_where_the_original_does(engine: Engine) -> None:
    program = "import sysconfig as s, pip; print(s.get_path('purelib'), s.get_path('platlib'), s.get_path('scripts'))"
    purelib, platlib, scripts = engine.output("run", "--rm", images.PYTHON, "python3", "-c", program).split(" ")
    assert purelib == platlib == f"/usr/local/lib/python{images.PYTHON_VERSION}/site-packages"
    assert scripts == "/usr/local/bin"


@pytest.mark.parametrize("buildkit", ["0", "1"], ids=["classic", "buildkit"])
def test_a_build_takes_python_to_the_other_image(engine: Engine, tmp_path: Path, buildkit: str) -> None:
    """Neither builder may ask a registry for the images, nor need a network."""
    (tmp_path / "Dockerfile").write_text(
        f"FROM {images.PYTHON} AS build\n"
        "RUN python3 -m venv --without-pip /opt/pgkeep\n"
        "FROM postgres:15-bookworm\n"
        "COPY --from=build /usr/local /usr/local\n"
        "COPY --from=build /opt/pgkeep /opt/pgkeep\n"
        "RUN ldconfig && /opt/pgkeep/bin/python -c 'import ssl, ctypes'\n"
    )
    tag = f"taken:{buildkit}"
    engine.docker("build", "--tag", tag, tmp_path, environment={"DOCKER_BUILDKIT": buildkit})
    script = "psql --version && /opt/pgkeep/bin/python -c 'import sys; print(sys.prefix)'"
    version, prefix = engine.output("run", "--rm", "--entrypoint", "sh", tag, "-c", script).splitlines()
    assert version.startswith("psql (PostgreSQL) 15.")
    assert prefix == "/opt/pgkeep"


def test_the_flag_needs_its_capability(engine: Engine) -> None:
    engine.docker("volume", "create", "flagged")
    run = ("run", "--rm", "--volume", "flagged:/v", "--network", "none")
    script = "echo kept >/v/file; chattr +i /v/file && ! echo more >>/v/file && ! rm -f /v/file && cat /v/file"
    try:
        without = engine.docker(*run, images.PYTHON, "sh", "-c", script, check=False)
        with_it = engine.docker(*run, "--cap-add", "LINUX_IMMUTABLE", images.PYTHON, "sh", "-c", script)
        lost = engine.docker("volume", "rm", "flagged", check=False)
    finally:
        clear = ("chattr", "-R", "-i", "/v")
        engine.docker(*run, "--cap-add", "LINUX_IMMUTABLE", images.PYTHON, *clear)
        engine.docker("volume", "rm", "--force", "flagged")
    assert "Operation not permitted while setting flags" in without.stderr
    assert with_it.stdout == b"kept\n"
    assert lost.return_code != 0


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
def test_compose_brings_two_services_up_and_down(engine: Engine, tmp_path: Path, version: ComposeVersion) -> None:
    (tmp_path / "compose.yaml").write_text(TWO_SERVICES)
    project = f"two{version.replace('.', '')}"
    compose = ("--project-name", project, "--file", tmp_path / "compose.yaml")
    fetch = "import urllib.request as r; print(r.urlopen('http://server:8000', timeout=5).status)"
    try:
        engine.compose(version, *compose, "up", "--detach")
        client = f"{project}{'_' if version == '1.29' else '-'}client{'_' if version == '1.29' else '-'}1"
        assert engine.output("exec", client, "python3", "-c", fetch) == "200"
        outside = "import socket; socket.create_connection(('192.0.2.1', 80), 3)"
        refused = engine.docker("exec", client, "python3", "-c", outside, check=False)
        assert "Network is unreachable" in refused.stderr
    finally:
        engine.compose(version, *compose, "down", "--volumes")
    assert engine.output("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={project}") == ""
    assert engine.output("network", "ls", "--quiet", "--filter", f"name={project}") == ""


def test_without_a_network_there_is_only_loopback(engine: Engine) -> None:
    program = "import os; print(sorted(os.listdir('/sys/class/net')))"
    printed = engine.output("run", "--rm", "--network", "none", images.PYTHON, "python3", "-c", program)
    assert "eth0" not in printed
    assert "'lo'" in printed


def test_a_killed_run_leaves_nothing_alive_and_the_next_sweeps(tmp_path: Path, engine: Engine) -> None:
    """Killed with a container under way and a flagged file in a volume: no process, mount or group stays."""
    if engine.first_process_id is None:
        pytest.skip("another's engine is not ours to kill")
    program = (
        "import json, sys, time\n"
        "from tests.e2e import engine, images\n"
        "with engine.running() as own:\n"
        "    images.provide_one(own, images.recipes()[0])\n"
        "    flag = 'touch /v/x; chattr +i /v/x; exec sleep 1000'\n"
        "    own.docker('run', '-d', '-v', 'v:/v', '--cap-add', 'LINUX_IMMUTABLE', images.PYTHON, 'sh', '-c', flag)\n"
        "    own.docker('run', '-d', images.PYTHON, 'sleep', '1000')\n"
        "    print(json.dumps([str(own.run_folder), own.first_process_id]), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with process.start([sys.executable, "-c", program], environment={"PYTHONPATH": os.pathsep.join(sys.path)}) as other:
        line = other.stdout.readline()
        assert line, other.messages()
        folder, first_process_id = json.loads(line)
        members = _members_of_namespace(first_process_id)
        assert len(members) > 3
        os.kill(other.pid, signal.SIGKILL)
        other.wait(10)
        assert Path(folder).exists()
        _wait_until_gone(members)

    assert Path(folder) in engines.sweep()
    assert not Path(folder).exists()
    assert folder not in Path("/proc/self/mountinfo").read_text()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{Path(folder).name}"))
    assert engine.output("version", "--format", "{{.Server.Os}}") == "linux"


def _members_of_namespace(first_process_id: int) -> list[int]:
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [each for each in everyone if _descends(each, first_process_id)]


def _descends(process_id: int, ancestor: int) -> bool:
    while process_id > 1:
        if process_id == ancestor:
            return True
        try:
            process_id = int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return False
    return False


def _wait_until_gone(process_ids: list[int]) -> None:
    deadline = time.monotonic() + 20.0
    while alive := [each for each in process_ids if Path(f"/proc/{each}").exists()]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)


def _wait_for_server(engine: Engine, name: str) -> None:
    """Over TCP: the server that makes the cluster listens on its socket only."""
    deadline = time.monotonic() + SERVER_SECONDS
    while engine.docker("exec", name, "pg_isready", "-q", "-h", "127.0.0.1", check=False).return_code != 0:
        assert time.monotonic() < deadline, engine.docker("logs", name).stderr
        time.sleep(0.2)
