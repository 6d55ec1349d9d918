"""What somebody does to a bucket who has the extractor's own credentials: what was copied before still restores.

Two kinds of credentials: with the documented policy, and with far more than that (they may delete what is not locked).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pgkeep.adapters.destinations import Content, Lock, Place
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.errors import RefusedError
from pgkeep.progress import Silent
from tests.s3_servers import LOCKED, Hands, SeaweedFS, hands, seaweed, store

__all__ = ["seaweed"]

FOLDER = "daily/2026-11-23"
NAME = f"{FOLDER}/2026-11-23_00-00-00.sql.gz"
DUMP, MANIFEST = os.urandom(5000), b'{"filename": "2026-11-23_00-00-00.sql.gz"}'
FILES = {NAME: DUMP, f"{NAME}.sha256": b"digest", f"{NAME}.manifest.json": MANIFEST}


class Copied:
    """A backup that was copied, whose versions the extractor knows; and an attacker's client."""

    def __init__(self, server: SeaweedFS, name: str, uploads: Path) -> None:
        self.options: Options = server.options(name)
        self.destination = S3Destination(self.options, uploads)
        self.until = dt.datetime.now(dt.UTC) + dt.timedelta(days=30)
        self.versions = {
            path: store(self.destination, data, path, retain_until=self.until) for path, data in FILES.items()
        }
        self.attacker = Hands(server.client(name), LOCKED, self.options.prefix)
        self.admin = hands(server, self.options)

    def key(self, path: str) -> str:
        return f"{self.options.prefix}/{path}"

    def named(self, path: str, version: str = "") -> dict[str, Any]:
        return {"Bucket": LOCKED, "Key": self.key(path), **({"VersionId": version} if version else {})}

    def assert_restores(self) -> None:
        """By version, whatever stands there now; and found again by somebody who knows no version."""
        with self.destination.opened(to_read=True) as place:
            assert place.sizes(self.versions) == {path: len(data) for path, data in FILES.items()}
            for path, data in FILES.items():
                version = self.versions[path]
                digest = hashlib.sha256(data).hexdigest()
                assert place.content(path, Silent(), version) == Content(len(data), digest)
                assert place.read(path, 10_000, version) == data
                with place.opened_file(path, version) as file:
                    assert file.size_bytes == len(data)
                    assert file.read(3, 10) == data[3:13]
                self._assert_locked(place.lock(path, version))
            listed = [(each.path, each.version) for each in place.files(["daily"])]
            # Of versions of one path the first is the oldest: the one that was copied.
            firsts = dict(reversed(listed))
            assert firsts == self.versions

    def _assert_locked(self, lock: Lock | None) -> None:
        assert lock is not None
        assert lock.mode == "COMPLIANCE"
        assert lock.until > self.until - dt.timedelta(seconds=2)


@pytest.fixture(params=["writer", "owner"])
def copied(request: pytest.FixtureRequest, seaweed: SeaweedFS, tmp_path: Path) -> Copied:
    made = Copied(seaweed, request.param, tmp_path)
    made.assert_restores()
    return made


def refused(call: Callable[..., object], **parameters: Any) -> None:
    with pytest.raises(ClientError):
        call(**parameters)


def test_everything_overwritten(copied: Copied) -> None:
    for path, data in FILES.items():
        copied.attacker.put(path, bytes(len(data)))
        copied.attacker.put(path, b"")
    assert copied.admin.get(NAME) == b""
    copied.assert_restores()


def test_a_manifest_replaced(copied: Copied) -> None:
    """The forged one is listed after the one that was copied."""
    forged = copied.attacker.put(f"{NAME}.manifest.json", MANIFEST.replace(b"00-00-00", b"11-11-11"))
    with copied.destination.opened(to_read=True) as place:
        found = [each.version for each in place.files(["daily"]) if each.path.endswith(".manifest.json")]
    assert found == [copied.versions[f"{NAME}.manifest.json"], forged]
    copied.assert_restores()


def test_everything_deleted(copied: Copied) -> None:
    """By version, in one request for all, and with the bypass of the weaker mode."""
    client = copied.attacker.client
    for path, version in copied.versions.items():
        refused(client.delete_object, **copied.named(path, version))
        refused(client.delete_object, **copied.named(path, version), BypassGovernanceRetention=True)
    every: list[Any] = [{"Key": copied.key(path), "VersionId": version} for path, version in copied.versions.items()]
    try:
        answer = client.delete_objects(Bucket=LOCKED, Delete={"Objects": every})
    except ClientError:
        answer = None
    assert answer is None or len(answer["Errors"]) == len(every)
    copied.assert_restores()


def test_everything_hidden_behind_delete_markers(copied: Copied) -> None:
    """With the documented policy not even that."""
    for path in FILES:
        if copied.options.access_key_id == "writer":
            refused(copied.attacker.client.delete_object, **copied.named(path))
        else:
            copied.attacker.client.delete_object(**copied.named(path))
    expected = len(FILES) if copied.options.access_key_id == "writer" else 0
    assert len(copied.admin.names(FOLDER)) == expected
    copied.assert_restores()


def test_locks_shortened_weakened_and_taken_away(copied: Copied) -> None:
    client = copied.attacker.client
    tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    for path, version in copied.versions.items():
        named = copied.named(path, version)
        for mode, until in (("COMPLIANCE", tomorrow), ("GOVERNANCE", copied.until), ("GOVERNANCE", tomorrow)):
            retention = {"Mode": mode, "RetainUntilDate": until}
            refused(client.put_object_retention, **named, Retention=retention)
            refused(client.put_object_retention, **named, Retention=retention, BypassGovernanceRetention=True)
        refused(client.put_object_retention, **named, Retention={})
    copied.assert_restores()


def test_the_bucket_s_own_settings(copied: Copied) -> None:
    client = copied.attacker.client
    refused(client.put_bucket_versioning, Bucket=LOCKED, VersioningConfiguration={"Status": "Suspended"})
    refused(client.delete_bucket, Bucket=LOCKED)
    copied.assert_restores()


def test_the_adapter_itself_refuses_to_remove(copied: Copied) -> None:
    with copied.destination.opened() as place:
        for path, version in copied.versions.items():
            with pytest.raises(RefusedError, match="locked"):
                place.remove(path, version)
            with pytest.raises(RefusedError, match="locked"):
                place.remove(path)
    copied.assert_restores()


@pytest.mark.parametrize("hidden", [False, True], ids=["overwritten", "hidden"])
def test_a_copy_can_be_mended_in_front(copied: Copied, hidden: bool) -> None:
    """A whole one is put in front of what an attacker put there, and the old one stays."""
    if hidden and copied.options.access_key_id == "owner":
        copied.attacker.client.delete_object(Bucket=LOCKED, Key=copied.key(NAME))
    else:
        copied.attacker.put(NAME, b"junk")
    before = len(copied.admin.versions(NAME))
    version = store(copied.destination, DUMP, NAME, aside="unused", retain_until=copied.until)
    assert copied.admin.get(NAME) == DUMP
    assert version not in copied.versions.values()
    assert len(copied.admin.versions(NAME)) == before + 1
    copied.assert_restores()


def test_many_versions_do_not_hide_the_first(copied: Copied) -> None:
    for number in range(60):
        copied.attacker.put(NAME, bytes([number]))
    with copied.destination.opened(to_read=True) as place:
        _assert_oldest_first(place, copied)
    copied.assert_restores()


def _assert_oldest_first(place: Place, copied: Copied) -> None:
    found = [each for each in place.files(["daily"]) if each.path == NAME]
    assert [each.size_bytes for each in found] == [len(DUMP), *[1] * 60]
    assert found[0].version == copied.versions[NAME]
