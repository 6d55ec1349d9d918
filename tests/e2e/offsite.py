"""A place that is not this machine: a real S3 server in a container and on a network of its own, with locked copies."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import process
from tests.e2e.engine import Engine
from tests.e2e.stack import wait_until
from tests.s3_servers import documented_policy

# As docs/worst-day.md calls them: what stands there is typed as it stands there.
HOST, PORT, BUCKET, PREFIX = "s3.example.com", 8333, "my-backups", "db1"
ENDPOINT = f"http://{HOST}:{PORT}"
SETTINGS = {"S3_BUCKET": BUCKET, "S3_PREFIX": PREFIX, "S3_ENDPOINT": ENDPOINT, "S3_PATH_STYLE": "true"}
NAME = "offsite-elsewhere"
_POLICIES = {"writer": "The writer", "restorer": "The restorer"}
_SERVER = (
    *("weed", "-logtostderr", "mini", "-dir=/srv", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-master.telemetry=false"),
    *("-admin.ui=false", "-webdav=false", "-s3.config=/identities.json", f"-s3.port={PORT}"),
    *("-s3.port.iceberg=0", "-s3.port.lance=0"),
)
# Runs in the server's container, as the owner of the bucket.
_OWNER = f"""
import boto3, json, sys
secret, code = sys.stdin.read().split("\\n", 1)
client = boto3.client("s3", endpoint_url="http://127.0.0.1:{PORT}", region_name="us-east-1",
                      aws_access_key_id="owner", aws_secret_access_key=secret)
exec(code)
"""
_LIST = f"""
found = []
for page in client.get_paginator("list_object_versions").paginate(Bucket="{BUCKET}"):
    assert not page.get("DeleteMarkers"), page
    for each in page.get("Versions", []):
        head = client.head_object(Bucket="{BUCKET}", Key=each["Key"], VersionId=each["VersionId"])
        until = head.get("ObjectLockRetainUntilDate")
        found.append([each["Key"], head["ContentLength"], head.get("ObjectLockMode"), until and until.isoformat()])
print(json.dumps(found))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """``key`` and ``secret`` of an access key; the writer's can be found by their random middle, as all secrets."""

    key: str
    secret: str


@dataclasses.dataclass(frozen=True, slots=True)
class Locked:
    """A version of an object: ``mode`` and ``until`` (RFC 3339) of its lock, None where there is none."""

    size_bytes: int
    mode: str | None
    until: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Elsewhere:
    """The server, with the accounts that docs/destinations/s3.md describes."""

    engine: Engine
    accounts: dict[str, Account]

    def make_bucket(self) -> None:
        """With Object Lock, once the server answers."""
        wait_until(lambda: self._owner("client.list_buckets()").return_code == 0, "the S3 server", 30.0, say=self.log)
        made = self._owner(f'client.create_bucket(Bucket="{BUCKET}", ObjectLockEnabledForBucket=True)')
        assert made.return_code == 0, made.stderr

    def objects(self) -> dict[str, Locked]:
        """What is in the bucket, by path below the prefix. Fails where anything was written twice, or hidden."""
        done = self._owner(_LIST)
        assert done.return_code == 0, done.stderr
        listed: list[list[Any]] = json.loads(done.stdout)
        found = {key.removeprefix(f"{PREFIX}/"): Locked(*facts) for key, *facts in listed}
        assert len(found) == len(listed)
        return found

    def dumps(self, tier: str) -> list[str]:
        """The copies of a tier that have a manifest, by name, oldest first."""
        suffix = ".manifest.json"
        paths = [path for path in self.objects() if path.startswith(f"{tier}/") and path.endswith(suffix)]
        return sorted(Path(path).name.removesuffix(suffix) for path in paths)

    def address(self, network: str) -> str:
        form = f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}'
        return self.engine.output("inspect", "--format", form, NAME)

    def attach(self, network: str) -> None:
        """Under its own name there."""
        self.engine.docker("network", "connect", "--alias", HOST, network, NAME)

    def detach(self, network: str) -> None:
        self.engine.docker("network", "disconnect", "--force", network, NAME, check=False)

    def stop(self) -> None:
        """At once, as a power cut would. The address stays, and refuses connections."""
        self.engine.docker("exec", NAME, "sh", "-c", "kill -9 $(cat /weed.pid)")

    def start(self) -> None:
        script = 'echo $$ >/weed.pid && exec "$@" >>/weed.log 2>&1'
        self.engine.docker("exec", "--detach", NAME, "sh", "-c", script, "sh", *_SERVER)

    def log(self) -> str:
        return self.engine.docker("exec", NAME, "tail", "/weed.log", check=False).stdout.decode()

    def _owner(self, code: str) -> process.Completed:
        command = ("exec", "--interactive", NAME, "/opt/pgkeep/bin/python", "-c", _OWNER)
        given = f"{self.accounts['owner'].secret}\n{code}".encode()
        return self.engine.docker(*command, input_bytes=given, check=False)


@contextlib.contextmanager
def running(engine: Engine, folder: Path) -> Iterator[Elsewhere]:
    """The server with an empty bucket, on the network ``NAME``. ``folder`` is for its configuration."""
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        pytest.fail("needs the program weed (the extra `dev`)")
    keys = {"owner": "owner", "writer": _random(), "restorer": "restorer"}
    accounts = {name: Account(key, _random()) for name, key in keys.items()}
    folder.mkdir()
    shutil.copy(program, folder / "weed")
    (folder / "identities.json").write_text(json.dumps(_identities(accounts)))
    engine.docker("network", "create", NAME)
    try:
        engine.docker(
            *("run", "--detach", "--name", NAME, "--network", NAME, "--network-alias", HOST, "--user", "0"),
            *("--volume", f"{folder / 'weed'}:/usr/local/bin/weed:ro", "--no-healthcheck"),
            *("--volume", f"{folder / 'identities.json'}:/identities.json:ro", "pgkeep-extractor:local"),
            *("sleep", "infinity"),
        )
        made = Elsewhere(engine, accounts)
        made.start()
        made.make_bucket()
        yield made
    finally:
        engine.docker("rm", "--force", NAME, check=False)
        engine.docker("network", "rm", NAME)
        shutil.rmtree(folder)


def _random() -> str:
    return f"e2e-{secrets.token_hex(12)}"


def _identities(accounts: dict[str, Account]) -> dict[str, Any]:
    owner = {"actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    rights: dict[str, dict[str, Any]] = {"owner": owner, **{name: {"policyNames": [name]} for name in _POLICIES}}
    return {
        "identities": [
            {"name": name, "credentials": [{"accessKey": each.key, "secretKey": each.secret}], **rights[name]}
            for name, each in accounts.items()
        ],
        "policies": [
            {"name": name, "content": json.dumps(documented_policy(heading))} for name, heading in _POLICIES.items()
        ],
    }
