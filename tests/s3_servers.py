"""Real S3 servers on ports of their own: SeaweedFS, whose Object Lock holds, and rclone's, which only pretends.

A module that needs one imports the fixture ``seaweed``; the server is shared by the whole session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import boto3
import botocore.config
import pytest

from pgkeep.adapters.destinations import Content, Destination
from pgkeep.adapters.destinations.s3 import Options
from pgkeep.progress import Progress, Silent
from tests import clusters

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "destinations" / "s3.md"
DOCUMENTED_BUCKET: Final = "my-backups"
LOCKED, VERSIONED, PLAIN = "copies", "versioned", "plain"
_READY_SECONDS = 30.0
# A port that is 10 000 higher is opened too; both are below those that the kernel gives to clients.
_PORTS = range(11_000, 21_900)
_numbers = itertools.count()
_SHARED = pytest.StashKey["SeaweedFS"]()


def secret_of(name: str) -> str:
    """Of an identity; its access key is its name."""
    return f"{name}-secret-0123456789"


class SeaweedFS:
    """A server of its own, with the buckets ``copies`` (Object Lock), ``versioned`` and ``plain``.

    Identities: ``admin``; ``owner`` (may delete, may not lift locks); ``bypasser`` (may lift those of GOVERNANCE);
    ``writer``, ``putter`` (no List) and ``restorer`` with the documented policies.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ports = _free_ports(4)
        self._running: subprocess.Popen[bytes] | None = None
        self._clients: dict[str, S3Client] = {}

    @property
    def port(self) -> int:
        return self._ports[0]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        assert self._running is None
        identities = self.directory / "identities.json"
        identities.write_text(json.dumps(_identities()))
        s3, master, filer, volume = self._ports
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        command = [
            *(_program("weed"), "-logtostderr", "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-master.telemetry=false", "-admin.ui=false", "-webdav=false", f"-s3.config={identities}"),
            *(f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-master.port={master}"),
            *(f"-filer.port={filer}", f"-volume.port={volume}"),
        ]
        with (self.directory / "log").open("ab") as log:
            self._running = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not _is_healthy(self.port):
            assert self._running is not None
            assert self._running.poll() is None, (self.directory / "log").read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, "SeaweedFS does not answer"
            time.sleep(0.05)

    def make_buckets(self) -> None:
        admin = self.client("admin")
        admin.create_bucket(Bucket=LOCKED, ObjectLockEnabledForBucket=True)
        for name in (VERSIONED, PLAIN):
            admin.create_bucket(Bucket=name)
        admin.put_bucket_versioning(Bucket=VERSIONED, VersioningConfiguration={"Status": "Enabled"})

    def stop(self) -> None:
        """At once, as a power cut would."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None

    def pause(self) -> None:
        """It takes connections, and never answers."""
        assert self._running is not None
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._running is not None
        self._running.send_signal(signal.SIGCONT)

    def client(self, name: str) -> S3Client:
        """boto3's own, for hands that reach around the adapter."""
        if name not in self._clients:
            self._clients[name] = boto3.client(
                "s3",
                endpoint_url=self.endpoint,
                aws_access_key_id=name,
                aws_secret_access_key=secret_of(name),
                region_name="us-east-1",
                config=botocore.config.Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
            )
        return self._clients[name]

    def options(self, name: str = "owner", bucket: str = LOCKED, **more: Any) -> Options:
        """In a folder of its own, unless told otherwise; with little patience."""
        usual: dict[str, Any] = {
            "prefix": new_prefix(),
            "endpoint": self.endpoint,
            "access_key_id": name,
            "secret_access_key": secret_of(name),
            "path_style": True,
            "attempts": 2,
            "timeout_seconds": 20.0,
        }
        return Options(bucket=bucket, **{**usual, **more})


class Rclone:
    """``rclone serve s3``: takes every lock, and keeps none."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = _free_ports(1)[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (self._directory / "copies").mkdir(parents=True)
        keys = f"owner,{secret_of('owner')}"
        command = [_program("rclone"), "serve", "s3", "--auth-key", keys, "--addr", f"127.0.0.1:{self.port}"]
        with (self._directory / "log").open("wb") as log:
            self._running = subprocess.Popen([*command, str(self._directory)], stdout=log, stderr=log)
        deadline = time.monotonic() + _READY_SECONDS
        while not _listens(self.port):
            assert self._running.poll() is None, (self._directory / "log").read_text()
            assert time.monotonic() < deadline, "rclone does not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.wait()


@pytest.fixture(scope="session")
def seaweed(request: pytest.FixtureRequest) -> SeaweedFS:
    """One for the session, whichever modules import this."""
    session = request.session
    if _SHARED not in session.stash:
        directory = Path(tempfile.mkdtemp(prefix="pgkeep-seaweed-"))
        server = SeaweedFS(directory)
        session.addfinalizer(lambda: shutil.rmtree(directory, ignore_errors=True))
        session.addfinalizer(server.stop)
        server.start()
        server.make_buckets()
        session.stash[_SHARED] = server
    return session.stash[_SHARED]


@contextlib.contextmanager
def own_seaweed() -> Iterator[SeaweedFS]:
    """One that may be stopped and started again."""
    with tempfile.TemporaryDirectory(prefix="pgkeep-seaweed-", ignore_cleanup_errors=True) as directory:
        server = SeaweedFS(Path(directory))
        try:
            server.start()
            server.make_buckets()
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def own_rclone() -> Iterator[Rclone]:
    with tempfile.TemporaryDirectory(prefix="pgkeep-rclone-") as directory:
        server = Rclone(Path(directory))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def new_prefix() -> str:
    return f"test-{os.getpid()}-{next(_numbers)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Hands:
    """What somebody with all rights sees and does in a destination's folder."""

    client: S3Client
    bucket: str
    prefix: str

    def put(self, path: str, data: bytes) -> str:
        answer = self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=data)
        return str(answer.get("VersionId", ""))

    def get(self, path: str, version: str = "") -> bytes:
        more: dict[str, Any] = {"VersionId": version} if version else {}
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", **more)["Body"].read()

    def versions(self, path: str = "") -> list[str]:
        """Of every key that begins so, the newest first; delete markers are not among them."""
        found = self.client.list_object_versions(Bucket=self.bucket, Prefix=f"{self.prefix}/{path}")
        return [each["VersionId"] for each in found.get("Versions", [])]

    def previous(self, path: str) -> bytes:
        return self.get(path, self.versions(path)[1])

    def names(self, folder: str) -> set[str]:
        prefix = f"{self.prefix}/{folder}/".replace("//", "/")
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
        return {each["Key"].removeprefix(prefix) for each in found.get("Contents", [])}

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return [each["UploadId"] for each in found.get("Uploads", [])]

    def head(self, path: str, version: str = "") -> Mapping[str, Any]:
        more: dict[str, Any] = {"VersionId": version} if version else {}
        return self.client.head_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", **more)


def store(destination: Destination, data: bytes, path: str, progress: Progress | None = None, **more: Any) -> str:
    """Copy these bytes there, in a pass of its own. The version."""
    content = Content(len(data), hashlib.sha256(data).hexdigest())
    with memory_file(data) as source, destination.opened() as place:
        return place.store(path, source, content, progress or Silent(), **more)


@contextlib.contextmanager
def memory_file(data: bytes) -> Iterator[int]:
    """A descriptor of a file that holds that."""
    with open(os.memfd_create("pgkeep-test"), "wb") as file:
        file.write(data)
        file.flush()
        yield file.fileno()


def hands(server: SeaweedFS, options: Options) -> Hands:
    return Hands(server.client("admin"), options.bucket, options.prefix)


def documented_policy(heading: str) -> dict[str, Any]:
    """The policy under that heading of the document, for every bucket."""
    section = DOCUMENT.read_text().split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    found = re.search(r"```json\n(.*?)```", section, re.DOTALL)
    assert found is not None
    policy: dict[str, Any] = json.loads(found[1].replace(DOCUMENTED_BUCKET, "*"))
    return policy


def _identities() -> dict[str, Any]:
    actions = {
        "admin": ["Admin", "Read", "Write", "List", "Tagging"],
        "owner": [
            "Read",
            "Write",
            "List",
            "PutObjectRetention",
            "GetObjectRetention",
            "GetBucketObjectLockConfiguration",
        ],
        "bypasser": ["Read", "Write", "List", "PutObjectRetention", "GetObjectRetention", "BypassGovernanceRetention"],
    }
    policies = {"writer": "The writer", "putter": "The writer, without listing", "restorer": "The restorer"}
    return {
        "identities": [
            *({**_credentials(name), "actions": allowed} for name, allowed in actions.items()),
            *({**_credentials(name), "policyNames": [name]} for name in policies),
        ],
        "policies": [
            {"name": name, "content": json.dumps(documented_policy(heading))} for name, heading in policies.items()
        ],
    }


def _credentials(name: str) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret_of(name)}]}


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return str(beside)
    return shutil.which(name) or clusters.skip(f"needs the program {name} (the extra `dev`)")


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, 500):
        if len(found) < count and not _listens(port) and not _listens(port + 10_000):
            found.append(port)
    return found


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
