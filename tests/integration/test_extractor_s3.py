"""The extractor with a real S3 server: versions, locks, and hands that have the extractor's own keys."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import clock
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.extractor.extract import Extractor
from pgkeep.progress import Silent
from tests import outside, s3_servers
from tests.outside import SUFFIXES, Outside, Template
from tests.s3_servers import LOCKED, VERSIONED, Hands, SeaweedFS, seaweed, secret_of

__all__ = ["seaweed"]
HOUR = dt.timedelta(hours=1)
DAY = 24 * HOUR


@pytest.fixture(scope="module")
def made(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made


class InBucket:
    """One vault whose copies go to a folder of its own in a bucket, and nowhere else."""

    def __init__(self, made: Template, scratch: Path, server: SeaweedFS, bucket: str, **more: str) -> None:
        self.own = Outside(made, scratch)
        self.hands = Hands(server.client("admin"), bucket, s3_servers.new_prefix())
        self.server = server
        keys = {"S3_ACCESS_KEY_ID": "owner", "S3_SECRET_ACCESS_KEY": secret_of("owner")}
        self.own.machine.environment |= {
            "EXTERNAL_DIRECTORY": "off",
            "S3_BUCKET": bucket,
            "S3_PREFIX": self.hands.prefix,
            "S3_ENDPOINT": server.endpoint,
            "S3_REGION": "us-east-1",
            "S3_PATH_STYLE": "true",
            **keys,
            **more,
        }

    def extractor(self, **more: str) -> Extractor:
        return self.own.extractor(**more)

    def key(self, path: str) -> str:
        return str(self.own.copy(path).relative_to(self.own.external))

    def assert_whole(self) -> None:
        for path in self.own.sources():
            for suffix in SUFFIXES:
                assert self.hands.get(self.key(path) + suffix) == (self.own.active / (path + suffix)).read_bytes()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in (self.own.extracted / "s3").glob("*/*/*.json")]


@pytest.fixture
def locked(made: Template, scratch: Path, seaweed: SeaweedFS) -> InBucket:
    return InBucket(made, scratch, seaweed, LOCKED, S3_OBJECT_LOCK_DAYS="2", S3_PROLONG_LOCKS="true")


@pytest.fixture
def unlocked(made: Template, scratch: Path, seaweed: SeaweedFS) -> InBucket:
    return InBucket(made, scratch, seaweed, VERSIONED, S3_OBJECT_LOCK_MODE="off")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> dict[str, dt.timedelta]:
    ahead = {"by": dt.timedelta(0)}
    real = clock.now
    monkeypatch.setattr(clock, "now", lambda: real() + ahead["by"])
    return ahead


def test_everything_is_copied_once_and_remembered_by_its_version(locked: InBucket) -> None:
    shown = locked.own.once()
    assert sorted(shown["extracted"]) == locked.own.sources()
    locked.assert_whole()
    versions = {file["version"] for record in locked.records() for file in record["files"].values()}
    assert versions == {
        each for tier in ("daily", "hourly", "manual", "globals") for each in locked.hands.versions(tier)
    }
    assert len(versions) == 3 * 4
    assert locked.own.once()["extracted"] == []
    assert len(locked.hands.versions("daily")) == 3
    assert len(locked.hands.versions("anchors")) == 1
    assert all(record["destination_name"] == "s3" for record in locked.own.audit())
    assert secret_of("owner") not in "".join(file.read_text() for file in locked.own.extracted.rglob("*.json"))


def test_what_is_written_over_a_copy_changes_nothing(locked: InBucket) -> None:
    """With the extractor's own keys: another version, and a delete marker."""
    locked.own.once()
    client, path = locked.server.client("owner"), locked.key(locked.own.source("daily"))
    client.put_object(Bucket=LOCKED, Key=f"{locked.hands.prefix}/{path}", Body=b"forged")
    client.delete_object(Bucket=LOCKED, Key=f"{locked.hands.prefix}/{path}.manifest.json")
    before = locked.hands.versions("daily")
    shown = locked.own.once()
    assert (shown["ok"], shown["repaired"], shown["extracted"]) == (True, [], [])
    assert locked.hands.versions("daily") == before


def test_copies_are_recognised_with_their_versions_when_the_state_is_lost(locked: InBucket) -> None:
    locked.own.once()
    before = sorted(locked.records(), key=lambda record: str(record["path"]))
    shutil.rmtree(locked.own.extracted)
    shown = locked.own.once()
    assert (sorted(shown["adopted"]), shown["extracted"]) == (locked.own.sources(), [])
    after = sorted(locked.records(), key=lambda record: str(record["path"]))
    assert [record["files"] for record in after] == [record["files"] for record in before]


def test_copies_that_are_recognised_get_the_lock_that_they_lack(locked: InBucket) -> None:
    """They come from a run that was killed before it locked them, or from a time without locks."""
    locked.extractor(S3_OBJECT_LOCK_MODE="off").run_pass(Silent())
    path = locked.key(locked.own.source("daily"))
    assert "ObjectLockRetainUntilDate" not in locked.hands.head(path)
    shutil.rmtree(locked.own.extracted)
    locked.extractor().run_pass(Silent())
    for suffix in ("", ".sha256", ".manifest.json"):
        assert locked.hands.head(path + suffix)["ObjectLockRetainUntilDate"] > clock.now(), suffix


def test_locks_are_extended_when_less_than_half_is_left(locked: InBucket, later: dict[str, dt.timedelta]) -> None:
    extractor = locked.extractor()
    began = clock.now()
    extractor.run_pass(Silent())
    path = locked.key(locked.own.source("daily"))
    for hours, days in ((20, 2), (30, 7)):
        later["by"] = hours * HOUR
        extractor.run_pass(Silent())
        lock = locked.hands.head(path)["ObjectLockRetainUntilDate"]
        assert abs(lock - (began + days * DAY)) < HOUR, hours
    assert "lock prolonged" in locked.own.events(locked.own.source("daily"))
    again = len(locked.own.audit())
    locked.extractor().run_pass(Silent())
    assert len(locked.own.audit()) == again


def test_locks_of_copies_that_were_made_before_are_learnt(locked: InBucket, later: dict[str, dt.timedelta]) -> None:
    locked.extractor(S3_PROLONG_LOCKS="false").run_pass(Silent())
    assert {record.get("locked") for record in locked.records()} == {None}
    later["by"] = 30 * HOUR
    locked.extractor().run_pass(Silent())
    prolonged = {record["path"] for record in locked.own.audit() if record["event"] == "lock prolonged"}
    # The others' locks last as long as the vault has promised to keep them.
    assert prolonged == {locked.own.source("daily"), locked.own.source("manual")}


def policy(days: int) -> str:
    return f"[destinations.s3]\n[destinations.s3.retention]\ndaily_days = {days}\nkeep_minimum = 1\n"


def test_what_is_over_leaves_by_its_version(unlocked: InBucket) -> None:
    unlocked.own.configure(policy(30))
    old = unlocked.own.source("daily")
    unlocked.own.sealed(old, 31 * DAY)
    unlocked.hands.put(unlocked.key(old) + ".manifest.json", b"somebody else's, older")
    shown = unlocked.own.once()
    assert shown["expired"] == [old]
    assert [unlocked.hands.get(unlocked.key(old) + ".manifest.json")] == [b"somebody else's, older"]
    assert len(unlocked.hands.versions("daily")) == 1
    assert unlocked.own.once()["extracted"] == []


def test_what_is_locked_is_not_asked_to_go(locked: InBucket) -> None:
    locked.own.configure(policy(1))
    old = locked.own.source("daily")
    locked.own.sealed(old, 31 * DAY)
    for _ in range(2):
        shown = locked.own.once()
        assert (shown["ok"], shown["expired"]) == (True, [])
    assert "copy expired" not in locked.own.events()
    assert len(locked.hands.versions("daily")) == 3


def test_keys_that_may_neither_list_nor_delete_are_enough(locked: InBucket) -> None:
    locked.own.machine.environment |= {"S3_ACCESS_KEY_ID": "putter", "S3_SECRET_ACCESS_KEY": secret_of("putter")}
    assert sorted(locked.own.once()["extracted"]) == locked.own.sources()
    locked.assert_whole()
    new = locked.own.bring_new(locked.own.source("daily"), DAY)
    shown = locked.own.once()
    assert (shown["ok"], shown["extracted"]) == (True, [new])
    shutil.rmtree(locked.own.extracted)
    assert sorted(locked.own.once()["adopted"]) == locked.own.sources()


def test_wrong_keys_are_told_without_a_secret_and_keep_no_other_from_being_served(locked: InBucket) -> None:
    wrong = "not-the-secret-0123456789"
    locked.own.machine.environment |= {"EXTERNAL_DIRECTORY": str(locked.own.external), "S3_SECRET_ACCESS_KEY": wrong}
    result = locked.own.machine.run("extractor", "once", "--json")
    external, bucket = result.json["destinations"]
    assert external["ok"]
    locked.own.assert_whole()
    assert (result.code, bucket["ok"], bucket["name"]) == (bucket["troubles"][0]["exit_code"], False, "s3")
    everywhere = result.stdout + result.stderr + locked.own.log.read_text()
    assert wrong not in everywhere
    assert bucket["troubles"][0]["hint"]
