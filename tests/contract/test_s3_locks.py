"""Object Lock: what is asked for, read back, mended and proven; servers that only pretend are found out."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pgkeep.adapters.destinations import Lock
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.errors import NotFoundError, RefusedError, StorageError
from pgkeep.progress import Silent
from tests import s3_servers
from tests.s3_proxy import Answer, Rule, error, proxy_to
from tests.s3_servers import LOCKED, PLAIN, VERSIONED, Rclone, SeaweedFS, seaweed, store

__all__ = ["seaweed"]

PATH = "daily/2026-11-23/2026-11-23_00-00-00.sql.gz"
PARTS: dict[str, Any] = {"at_once_bytes": 0}
SECOND = dt.timedelta(seconds=1)


@pytest.fixture(scope="module")
def rclone() -> Iterator[Rclone]:
    with s3_servers.own_rclone() as server:
        yield server


def in_days(days: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)


def lock_of(options: Options, version: str) -> Lock | None:
    with S3Destination(options, None).opened(to_read=True) as place:
        return place.lock(PATH, version)


# What is asked for


@pytest.mark.parametrize("in_parts", [{}, PARTS], ids=["at-once", "in-parts"])
@pytest.mark.parametrize(
    ("settings", "kept_days", "wanted_days"),
    [
        ({}, 7.0, 7.0),
        ({}, None, 400.0),
        ({"lock_days_maximum": 30}, None, 30.0),
        ({"lock_days_maximum": 30}, 365.0, 30.0),
        ({"lock_days": 14}, 7.0, 14.0),
        ({"lock_days": 14}, None, 14.0),
        ({"lock_days": 14, "lock_days_maximum": 5}, None, 5.0),
    ],
)
def test_a_copy_is_locked_as_long_as_it_is_kept_within_the_limit(
    seaweed: SeaweedFS, settings: dict[str, Any], kept_days: float | None, wanted_days: float, in_parts: dict[str, Any]
) -> None:
    options = seaweed.options("writer", **settings, **in_parts)
    retain_until = None if kept_days is None else in_days(kept_days)
    version = store(S3Destination(options, None), b"ours", PATH, retain_until=retain_until)
    found = lock_of(options, version)
    assert found is not None
    assert found.mode == "COMPLIANCE"
    assert abs(found.until - in_days(wanted_days)) < 30 * SECOND


def test_what_is_over_already_is_locked_for_minutes(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer")
    found = lock_of(options, store(S3Destination(options, None), b"ours", PATH, retain_until=in_days(-3)))
    assert found is not None
    assert in_days(0) < found.until < in_days(0) + dt.timedelta(minutes=3)


def test_the_mode_is_a_choice(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer", lock_mode="GOVERNANCE")
    found = lock_of(options, store(S3Destination(options, None), b"ours", PATH))
    assert found is not None
    assert found.mode == "GOVERNANCE"


def test_without_a_mode_nothing_is_locked_which_is_said(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer", lock_mode=None)
    destination = S3Destination(options, None)
    version = store(destination, b"ours", PATH)
    assert lock_of(options, version) is None
    with destination.opened() as place:
        assert "not locked" in " ".join(place.warnings)
        place.prolong(PATH, in_days(5), version)
        assert place.lock(PATH, version) is None


def test_a_lock_is_prolonged_within_the_limit_and_never_shortened(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer", lock_days_maximum=20)
    destination = S3Destination(options, None)
    version = store(destination, b"ours", PATH, retain_until=in_days(2))
    for days, wanted_days in ((10, 10), (5, 10), (300, 20)):
        with destination.opened() as place:
            place.prolong(PATH, in_days(days), version)
            found = place.lock(PATH, version)
        assert found is not None
        assert abs(found.until - in_days(wanted_days)) < 30 * SECOND


def test_what_was_put_without_a_lock_gets_one(seaweed: SeaweedFS) -> None:
    """What stands there whole already, and what is prolonged."""
    options = seaweed.options("writer")
    version = s3_servers.hands(seaweed, options).put(PATH, b"ours")
    assert lock_of(options, version) is None
    assert store(S3Destination(options, None), b"ours", PATH, retain_until=in_days(3)) == version
    found = lock_of(options, version)
    assert found is not None
    assert found.until > in_days(2.9)


def test_locks_of_nothing(seaweed: SeaweedFS) -> None:
    with S3Destination(seaweed.options("writer"), None).opened() as place:
        with pytest.raises(NotFoundError):
            place.lock(PATH)
        with pytest.raises(NotFoundError):
            place.prolong(PATH, in_days(1))


# Read back


def without_lock(answer: Answer) -> Answer:
    return answer.without("x-amz-object-lock-mode", "x-amz-object-lock-retain-until-date")


def with_a_day(answer: Answer) -> Answer:
    return answer.having("X-Amz-Object-Lock-Retain-Until-Date", f"{in_days(1):%Y-%m-%dT%H:%M:%SZ}")


def with_governance(answer: Answer) -> Answer:
    return answer.having("X-Amz-Object-Lock-Mode", "GOVERNANCE")


@pytest.mark.parametrize("lie", [without_lock, with_a_day, with_governance])
def test_a_lock_that_is_missing_or_short_is_mended(seaweed: SeaweedFS, lie: Any) -> None:
    """As Ceph's of an upload in parts: there is less than was asked for, until it is asked for once more."""
    rules = [
        Rule("get retention", instead=error(404, "NoSuchObjectLockConfiguration")),
        # The first one finds nothing there.
        Rule("head", times=2, answer=lie),
    ]
    with proxy_to(seaweed.port, rules) as proxy:
        options = seaweed.options("writer", endpoint=proxy.endpoint, **PARTS)
        store(S3Destination(options, None), b"ours", PATH, retain_until=in_days(3))
        assert proxy.kinds().count("put retention") == 1


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (without_lock, "the server says no lock"),
        (with_a_day, "the server says COMPLIANCE until"),
        (with_governance, "the server says GOVERNANCE until"),
    ],
)
@pytest.mark.parametrize("in_parts", [{}, PARTS], ids=["at-once", "in-parts"])
def test_a_lock_that_stays_missing_or_short_is_an_error(
    seaweed: SeaweedFS, lie: Any, told: str, in_parts: dict[str, Any]
) -> None:
    rules = [
        Rule("get retention", times=-1, instead=error(404, "NoSuchObjectLockConfiguration")),
        Rule("head", times=-1, answer=lie),
    ]
    with proxy_to(seaweed.port, rules) as proxy:
        options = seaweed.options("writer", endpoint=proxy.endpoint, **in_parts)
        with pytest.raises(StorageError, match="not locked as it must be") as caught:
            store(S3Destination(options, None), b"ours", PATH, retain_until=in_days(3))
        assert told in caught.value.message
        assert "Object Lock" in caught.value.hint
        assert proxy.kinds().count("put retention") == 1


def test_a_lock_that_may_not_be_mended_says_so(seaweed: SeaweedFS) -> None:
    rules = [
        Rule("get retention", times=-1, instead=error(403, "AccessDenied")),
        Rule("put retention", times=-1, instead=error(403, "AccessDenied")),
        Rule("head", times=-1, answer=without_lock),
    ]
    with proxy_to(seaweed.port, rules) as proxy:
        options = seaweed.options("writer", endpoint=proxy.endpoint)
        with pytest.raises(StorageError, match=r"refused \(AccessDenied\)"):
            store(S3Destination(options, None), b"ours", PATH)


def test_a_bucket_without_object_lock_is_refused_before_anything_is_sent(seaweed: SeaweedFS) -> None:
    for bucket in (PLAIN, VERSIONED):
        destination = S3Destination(seaweed.options("writer", bucket), None)
        with pytest.raises(StorageError, match="has no Object Lock") as caught, destination.opened():
            pass
        assert "docs/destinations/s3.md" in caught.value.hint
        with destination.opened(to_read=True):
            pass


@pytest.mark.parametrize("in_parts", [{}, PARTS], ids=["at-once", "in-parts"])
def test_credentials_that_may_not_ask_find_out_when_they_put(seaweed: SeaweedFS, in_parts: dict[str, Any]) -> None:
    options = seaweed.options("putter", PLAIN, **in_parts)
    with pytest.raises(StorageError) as caught:
        store(S3Destination(options, None), b"ours", PATH)
    assert "Object Lock" in caught.value.hint
    assert s3_servers.hands(seaweed, options).versions() == []


# Servers that only pretend


ENABLED = Answer(
    200,
    (("Content-Type", "application/xml"),),
    b"<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled></ObjectLockConfiguration>",
)


@pytest.mark.parametrize("in_parts", [{}, PARTS], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("settings", [ENABLED, error(403, "AccessDenied")], ids=["told", "denied"])
def test_a_server_that_takes_locks_and_keeps_none_is_no_destination_for_locked_copies(
    rclone: Rclone, seaweed: SeaweedFS, in_parts: dict[str, Any], settings: Answer
) -> None:
    """Whatever it says of its settings, and though it repeats every lock (and checksum) that it was told."""
    options = seaweed.options("owner", LOCKED, endpoint=rclone.endpoint, **in_parts)
    with pytest.raises(StorageError, match="has no Object Lock"):
        store(S3Destination(options, None), b"ours", PATH)
    with proxy_to(rclone.port, [Rule("get object-lock", times=-1, instead=settings)]) as proxy:
        lying = dataclasses.replace(options, endpoint=proxy.endpoint)
        with pytest.raises(StorageError, match="keeps no versions"):
            store(S3Destination(lying, None), b"ours", PATH)
        assert "put" in proxy.kinds() or "complete" in proxy.kinds()
        found = S3Destination(lying, None).probe(Silent())
        assert (found.ok, found.lock) == (False, "none")


def test_a_server_that_takes_locks_and_keeps_none_is_reported(rclone: Rclone, seaweed: SeaweedFS) -> None:
    found = S3Destination(seaweed.options("owner", LOCKED, endpoint=rclone.endpoint), None).probe(Silent())
    assert (found.ok, found.lock) == (False, "none")
    assert "copies can't be locked" in " ".join(found.findings)


def test_without_locks_it_takes_copies(rclone: Rclone, seaweed: SeaweedFS) -> None:
    options = seaweed.options("owner", LOCKED, endpoint=rclone.endpoint, lock_mode=None)
    destination = S3Destination(options, None)
    store(destination, b"ours", PATH)
    with destination.opened() as place:
        assert place.read(PATH, 10) == b"ours"
        assert place.sizes({PATH: ""}) == {PATH: 4}
    found = destination.probe(Silent())
    assert (found.ok, found.lock) == (True, "none")
    assert "don't match the SHA-256" in " ".join(found.findings)


# The trial


def test_a_lock_is_proven_by_credentials_that_may_delete(seaweed: SeaweedFS) -> None:
    options = seaweed.options("owner")
    found = S3Destination(options, None).probe(Silent())
    assert (found.ok, found.lock) == (True, "proven")
    told = " ".join(found.findings)
    assert "was kept when it was to be deleted" in told
    assert "delete markers" in told
    assert "no default retention" in told
    # What is left is under lock, for minutes.
    reach = s3_servers.hands(seaweed, options)
    left = reach.versions()
    assert 1 <= len(left) <= 2
    listed = reach.client.list_object_versions(Bucket=LOCKED, Prefix=options.prefix)
    assert not listed.get("DeleteMarkers")
    for each in listed["Versions"]:
        until = reach.head(each["Key"].removeprefix(f"{options.prefix}/"))["ObjectLockRetainUntilDate"]
        assert until < in_days(0) + dt.timedelta(minutes=3)


@pytest.mark.parametrize("name", ["writer", "putter"])
def test_being_refused_proves_nothing_where_nothing_may_be_deleted(seaweed: SeaweedFS, name: str) -> None:
    found = S3Destination(seaweed.options(name), None).probe(Silent())
    assert (found.ok, found.lock) == (True, "asserted")
    assert "proves nothing" in " ".join(found.findings)


def test_a_bucket_with_a_default_retention_is_tried_with_a_delete_marker(seaweed: SeaweedFS) -> None:
    bucket = "locked-by-default"
    admin = seaweed.client("admin")
    admin.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    admin.put_object_lock_configuration(
        Bucket=bucket,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}},
        },
    )
    found = S3Destination(seaweed.options("owner", bucket, lock_days=30), None).probe(Silent())
    assert (found.ok, found.lock) == (True, "proven")
    assert "default retention (1 days) is below the 30 days" in " ".join(found.findings)
    assert S3Destination(seaweed.options("putter", bucket), None).probe(Silent()).lock == "asserted"


def test_a_lock_that_these_credentials_can_bypass_is_not_proven(seaweed: SeaweedFS) -> None:
    found = S3Destination(seaweed.options("bypasser", lock_mode="GOVERNANCE"), None).probe(Silent())
    assert (found.ok, found.lock) == (True, "asserted")
    assert "bypass" in " ".join(found.findings)
    assert S3Destination(seaweed.options("owner", lock_mode="GOVERNANCE"), None).probe(Silent()).lock == "proven"
    assert S3Destination(seaweed.options("bypasser"), None).probe(Silent()).lock == "proven"


@pytest.mark.parametrize("bucket", [PLAIN, VERSIONED])
def test_a_bucket_without_locks_is_reported(seaweed: SeaweedFS, bucket: str) -> None:
    found = S3Destination(seaweed.options("owner", bucket), None).probe(Silent())
    assert (found.ok, found.lock) == (False, "none")
    assert "has no Object Lock" in " ".join(found.findings)
    found = S3Destination(seaweed.options("owner", bucket, lock_mode=None), None).probe(Silent())
    assert (found.ok, found.lock) == (True, "none")
    assert ("keeps no versions" in " ".join(found.findings)) == (bucket == PLAIN)


@pytest.mark.parametrize(
    ("lie", "finding"),
    [
        (Rule("put", path=".pgkeep-trial", times=0), "was kept"),
        (Rule("delete", times=-1, instead=Answer(204, (), b"")), "was kept"),
    ],
)
def test_only_what_is_there_afterwards_counts_as_kept(seaweed: SeaweedFS, lie: Rule, finding: str) -> None:
    """A server that says "deleted" and keeps it holds its lock; but nothing shows that it would have deleted."""
    with proxy_to(seaweed.port, [lie]) as proxy:
        found = S3Destination(seaweed.options("owner", endpoint=proxy.endpoint), None).probe(Silent())
    assert finding in " ".join(found.findings)
    assert found.lock == ("asserted" if lie.kind == "delete" else "proven")


def test_a_server_that_loses_what_is_locked_is_reported(seaweed: SeaweedFS) -> None:
    """It says that it locks, and after the delete the version is gone."""
    gone = error(404, "")
    with proxy_to(seaweed.port) as proxy:

        def deleted(answer: Answer) -> Answer:
            if answer.status == 403:
                proxy.rules.append(Rule("head", times=1, path=".pgkeep-trial", instead=gone))
            return answer

        proxy.rules.append(Rule("delete", times=-1, answer=deleted))
        found = S3Destination(seaweed.options("owner", endpoint=proxy.endpoint), None).probe(Silent())
    assert (found.ok, found.lock) == (False, "none")
    assert "keep nothing" in " ".join(found.findings)


# The document


def test_the_writer_s_policy_allows_no_deletion(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer", lock_mode=None)
    version = store(S3Destination(options, None), b"ours", PATH)
    with S3Destination(options, None).opened() as place, pytest.raises(RefusedError, match="may not be removed"):
        place.remove(PATH, version)
    writer = seaweed.client("writer")
    with pytest.raises(ClientError, match="AccessDenied"):
        writer.delete_object(Bucket=LOCKED, Key=f"{options.prefix}/{PATH}")


def test_the_restorer_s_policy_allows_to_read_and_nothing_else(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer")
    version = store(S3Destination(options, None), b"ours", PATH)
    reading = seaweed.options("restorer", prefix=options.prefix)
    with S3Destination(reading, None).opened(to_read=True) as place:
        assert [each.path for each in place.files(["daily"])] == [PATH]
        assert place.read(PATH, 10, version) == b"ours"
        assert place.lock(PATH, version) is not None
        with pytest.raises(RefusedError):
            place.remove(PATH, version)
        with pytest.raises(StorageError, match="denies it"):
            place.write_marker(b"mine")


def test_the_documented_settings_of_a_bucket_are_understood(seaweed: SeaweedFS) -> None:
    admin = seaweed.client("admin")
    bucket = "as-documented"
    admin.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    text = s3_servers.DOCUMENT.read_text()
    rules = re.search(r"^`lifecycle.json`.*?```json\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    default = re.search(r"--object-lock-configuration \\\n\s+'(.*?)'", text)
    assert rules is not None
    assert default is not None
    admin.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(rules[1]))
    admin.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=json.loads(default[1]))
    assert admin.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"] == json.loads(default[1])
    assert f"`S3_OBJECT_LOCK_DAYS_MAXIMUM` ({Options(bucket='b').lock_days_maximum})" in text
    assert text.count(f'"{Options(bucket="b").lock_days_maximum + 1}"') == 2
