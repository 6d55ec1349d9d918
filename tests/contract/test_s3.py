"""Buckets as destinations: what all kinds must do, with each set of rights and each kind of bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.errors import StorageError
from tests import s3_servers
from tests.contract.destination_contract import PATH, DestinationContract, Subject
from tests.s3_servers import LOCKED, PLAIN, VERSIONED, SeaweedFS, seaweed

__all__ = ["seaweed"]

BEFORE_IT_APPEARS = ("store.created", "store.part-sent", "store.sent")
KINDS = ("writer", "in-one-piece", "unversioned")


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, seaweed: SeaweedFS, tmp_path: Path) -> Subject:
    return s3_subject(request.param, seaweed, tmp_path)


def s3_subject(kind: str, server: SeaweedFS, directory: Path) -> Subject:
    directory.mkdir(exist_ok=True)
    options = options_of(kind, server)
    reach = s3_servers.hands(server, options)
    versions = options.bucket != PLAIN

    def put(path: str, data: bytes) -> None:
        reach.put(path, data)

    return Subject(
        kind=kind,
        destination=S3Destination(options, directory / "uploads"),
        put=put,
        get=reach.get,
        names=reach.names,
        source=directory / "source",
        before_it_appears=BEFORE_IT_APPEARS[:1] if kind == "in-one-piece" else BEFORE_IT_APPEARS,
        replaced="version" if versions else "refused",
        previous=reach.previous if versions else None,
        versions=versions,
        sweeps=False,
        removes=options.lock_mode is None,
        locks=options.lock_mode is not None,
        tells_free_bytes=False,
    )


def options_of(kind: str, server: SeaweedFS) -> Options:
    """All but one kind send everything in parts."""
    if kind == "in-one-piece":
        return server.options("owner", lock_mode="GOVERNANCE")
    if kind in ("unlocked", "unversioned"):
        bucket = VERSIONED if kind == "unlocked" else PLAIN
        return server.options("owner", bucket, lock_mode=None, at_once_bytes=0)
    return server.options(kind, LOCKED, at_once_bytes=0)


class TestContract(DestinationContract):
    pass


class TestContractWithoutListing(DestinationContract):
    """Put-only credentials: no List, no Delete."""

    @pytest.fixture
    def subject(self, seaweed: SeaweedFS, tmp_path: Path) -> Subject:
        return s3_subject("putter", seaweed, tmp_path)

    def test_what_is_not_there_is_no_error(self, subject: Subject) -> None:
        with subject.destination.opened() as place:
            assert place.sizes({f"daily/{number}": "" for number in range(30)}) == {}
            assert place.read_marker() is None

    def test_files_are_listed_by_path(self, subject: Subject) -> None:
        with subject.destination.opened() as place, pytest.raises(StorageError, match="denies it"):
            list(place.files(["daily"]))

    def test_every_version_is_listed_the_oldest_first(self, subject: Subject) -> None:
        self.test_files_are_listed_by_path(subject)

    def test_what_a_killed_run_left_is_swept_and_nothing_else(self, subject: Subject) -> None:
        """Nothing can be looked for, which is no error."""
        with subject.destination.opened() as place:
            assert place.sweep(["daily"]) == []


def test_what_is_over_is_removed_by_version(seaweed: SeaweedFS, tmp_path: Path) -> None:
    """Where nothing locks it, and without leaving a delete marker."""
    DestinationContract().test_what_is_over_is_removed(s3_subject("unlocked", seaweed, tmp_path / "contract"))
    subject = s3_subject("unlocked", seaweed, tmp_path)
    older, newer = subject.store(b"older"), subject.store(b"newer!", aside="unused")
    with subject.destination.opened() as place:
        place.remove(PATH, older)
        assert place.sizes({PATH: newer}) == {PATH: 6}
        assert place.sizes({PATH: older}) == {}
        place.remove(PATH)
        assert list(place.files(["daily"])) == []
    options = subject.destination._options  # type: ignore[attr-defined]
    listed = seaweed.client("admin").list_object_versions(Bucket=VERSIONED, Prefix=options.prefix)
    assert not listed.get("DeleteMarkers")
