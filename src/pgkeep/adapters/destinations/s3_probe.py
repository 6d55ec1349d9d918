"""A trial of a bucket: what the server does, rather than what it says. Small objects, locked for minutes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
from typing import Final, Literal

from botocore.exceptions import ClientError

from pgkeep.adapters import clock, durable
from pgkeep.adapters.destinations import Content, Lock, Probe, s3_locks, s3_upload
from pgkeep.adapters.destinations.s3 import Options
from pgkeep.adapters.destinations.s3_bucket import Bucket, Facts, LockConfiguration
from pgkeep.adapters.destinations.s3_client import DeniedError, code, explained
from pgkeep.adapters.destinations.s3_upload import Errand
from pgkeep.adapters.destinations.s3_uploads import Uploads
from pgkeep.errors import StorageError
from pgkeep.progress import Progress

FOLDER: Final = ".pgkeep-trial"
_BYTES: Final = 1024


def probe(bucket: Bucket, options: Options, progress: Progress) -> Probe:
    """Raises ``StorageError`` where nothing can be put or read back."""
    trial = _Trial(bucket, options, progress)
    trial.remove_leftovers()
    trial.look_at_bucket()
    may_delete = trial.try_unlocked()
    lock = trial.try_locked(may_delete=may_delete) if options.lock_mode is not None else "none"
    trial.remove_leftovers()
    ok = lock != "none" or options.lock_mode is None
    return Probe(ok=ok, lock=lock, findings=tuple(trial.findings))


@dataclasses.dataclass(frozen=True, slots=True)
class _Object:
    """What the trial put."""

    path: str
    data: bytes
    facts: Facts

    @property
    def version(self) -> str:
        return self.facts.version


class _Trial:
    """Collects findings, sentence by sentence."""

    def __init__(self, bucket: Bucket, options: Options, progress: Progress) -> None:
        self.findings: list[str] = []
        self._bucket = bucket
        self._options = options
        self._progress = progress
        self._versions: bool | None = None

    def remove_leftovers(self) -> None:
        """Of this trial and of earlier ones: what locks and rights allow."""
        try:
            for each in list(self._bucket.versions(FOLDER)):
                self._try_to_delete(each.path, each.version)
        except DeniedError:
            text = "these credentials may not list: sizes are asked for object by object, and only others can restore"
            if text not in self.findings:
                self.findings.append(text)

    # The bucket

    def look_at_bucket(self) -> None:
        self._versions = self._bucket.versioning()
        if self._versions is False:
            self.findings.append("the bucket keeps no versions: what is written over a copy, takes its place")
        if self._options.lock_mode is None:
            self.findings.append("locks are turned off for this destination: nothing keeps copies from being removed")
            return
        configuration = self._bucket.lock_configuration()
        if configuration.enabled is False:
            self.findings.append("the bucket has no Object Lock: nothing keeps copies from being removed")
        elif configuration.enabled is None:
            self.findings.append("these credentials may not ask for the bucket's lock settings; only trying tells")
        else:
            self._look_at_default(configuration)

    def _look_at_default(self, configuration: LockConfiguration) -> None:
        days = self._options.lock_days
        if configuration.default is None:
            self.findings.append("the bucket has no default retention: only copies that come with a lock have one")
        elif days is not None and configuration.default[1] < days:
            self.findings.append(
                f"the bucket's default retention ({configuration.default[1]} days) is below the {days} days of this "
                f"destination: a server that drops a copy's own lock leaves it with that"
            )
        elif configuration.default[0] != self._options.lock_mode:
            self.findings.append(f"the bucket's default retention has the mode {configuration.default[0]}")

    # Without a lock

    def try_unlocked(self) -> bool:
        """May these credentials delete a version that nothing locks? Raises ``StorageError``."""
        put = self._put(None)
        self._progress.step("probe.put")
        self._check_round_trip(put)
        self._try_condition(put)
        self._try_checksum(put)
        may_delete = self._may_delete(put)
        self._progress.step("probe.deleted")
        return may_delete

    def _check_round_trip(self, put: _Object) -> None:
        with explained(f"reading {self._bucket.where(put.path, put.version)}"):
            found = b"".join(self._bucket.blocks(put.path, put.version))
        if found != put.data:
            raise StorageError(f"{self._bucket.where(put.path)} gave back other bytes than were written")
        self.findings.append(f"{_BYTES} bytes were put to {self._bucket.label} and read back")
        if not put.facts.checksum:
            self.findings.append("the server gives no SHA-256 of what it holds: every copy is read back in full")

    def _try_condition(self, put: _Object) -> None:
        try:
            version = self._bucket.put(put.path, put.data, _content(put.data), None, "absent")
        except ClientError as error:
            if code(error) not in ("PreconditionFailed", "412"):
                self.findings.append(f"the server has no conditional requests ({code(error)}): it is asked before")
            return
        self.findings.append("the server ignores If-None-Match: it is asked before each upload what stands there")
        if version:
            self._try_to_delete(put.path, version)

    def _try_checksum(self, put: _Object) -> None:
        path = _new_path()
        try:
            version = self._bucket.put(path, put.data[::-1], _content(put.data), None)
        except ClientError:
            return
        self.findings.append(
            "the server takes bytes that don't match the SHA-256 sent with them, so that what it says of copies proves "
            "nothing: have them read in full now and then (the setting of days for it)"
        )
        self._try_to_delete(path, version)

    def _may_delete(self, put: _Object) -> bool:
        if put.facts.lock is None:
            return self._try_to_delete(put.path, put.version) and self._bucket.find(put.path, put.version) is None
        # The bucket's default locks everything. But a delete marker is a version that is never locked, and to remove
        # it takes the same right.
        try:
            marker = self._bucket.delete(put.path)
        except ClientError:
            return False
        return bool(marker) and self._try_to_delete(put.path, marker)

    # With a lock

    def try_locked(self, *, may_delete: bool) -> Literal["proven", "asserted", "none"]:
        """Raises ``StorageError``."""
        asked = s3_locks.at_most(self._options, clock.now(), clock.now())
        if asked is None:
            return "none"
        try:
            put = self._put(asked)
            s3_locks.ensure(self._bucket, put.path, put.facts, asked)
            self._progress.step("probe.locked")
            self._try_parts(asked)
        except StorageError as error:
            self.findings.append(f"copies can't be locked: {error.message}")
            return "none"
        held = self._try_to_break(put, asked)
        self._try_marker(put)
        if held == "proven" and not may_delete:
            self.findings.append(
                "the lock was read back, but these credentials may not delete anything: that they were refused "
                "proves nothing; try once with credentials that may"
            )
            return "asserted"
        return held

    def _try_parts(self, asked: Lock) -> None:
        """Some servers take a lock with a single request only. Raises ``StorageError`` where it can't be mended."""
        path, data = _new_path(), os.urandom(_BYTES)
        with open(os.memfd_create("pgkeep-trial"), "wb") as source:
            durable.write_all(source.fileno(), data)
            errand = Errand(path, source.fileno(), _content(data), asked, "absent")
            sent = s3_upload.send_in_parts(self._bucket, errand, self._options, Uploads(None), self._progress)
        put = self._found(path, data, sent.version)
        if not s3_locks.holds(s3_locks.found_lock(self._bucket, path, put.facts), asked):
            s3_locks.ensure(self._bucket, path, put.facts, asked)
            self.findings.append("the server drops the lock of uploads in parts: it is set afterwards each time")

    def _try_to_break(self, put: _Object, asked: Lock) -> Literal["proven", "asserted", "none"]:
        """Delete it, delete it with the bypass of GOVERNANCE, and shorten the lock."""
        if self._shortens(put, asked):
            self.findings.append("the server lets the same credentials shorten a lock: it keeps nothing")
            return "none"
        if self._is_gone_after_delete(put):
            self.findings.append("the server deleted a locked version: its locks keep nothing")
            return "none"
        if self._is_gone_after_delete(put, bypass=True):
            if asked.mode == "COMPLIANCE":
                self.findings.append("the server deleted a version under a COMPLIANCE lock: its locks keep nothing")
                return "none"
            self.findings.append("these credentials can bypass a GOVERNANCE lock: it keeps copies from others only")
            return "asserted"
        self.findings.append(f"a version locked with {asked.mode} was kept when it was to be deleted")
        return "proven"

    def _shortens(self, put: _Object, asked: Lock) -> bool:
        sooner = Lock(asked.mode, asked.until - s3_locks.SHORTEST / 2)
        try:
            self._bucket.retain(put.path, put.version, sooner)
        except ClientError:
            return False
        facts = self._bucket.head(put.path, put.version)
        return facts is None or not s3_locks.holds(s3_locks.found_lock(self._bucket, put.path, facts), asked)

    def _is_gone_after_delete(self, put: _Object, *, bypass: bool = False) -> bool:
        self._try_to_delete(put.path, put.version, bypass=bypass)
        return self._bucket.find(put.path, put.version) is None

    def _try_marker(self, put: _Object) -> None:
        if self._versions is False:
            return
        try:
            marker = self._bucket.delete(put.path)
        except ClientError:
            return
        self.findings.append("these credentials can hide copies behind delete markers; pgkeep asks for its own version")
        if marker:
            self._try_to_delete(put.path, marker)

    # Requests

    def _put(self, lock: Lock | None) -> _Object:
        path, data = _new_path(), os.urandom(_BYTES)
        with explained(f"putting {self._bucket.where(path)}"):
            version = self._bucket.put(path, data, _content(data), lock, "anything")
        return self._found(path, data, version)

    def _found(self, path: str, data: bytes, version: str) -> _Object:
        facts = self._bucket.head(path, version)
        if facts is None:
            raise StorageError(f"{self._bucket.where(path, version)} was put and is not there")
        return _Object(path, data, facts)

    def _try_to_delete(self, path: str, version: str, *, bypass: bool = False) -> bool:
        """Was it accepted? Raises ``StorageError`` without an answer."""
        with explained(f"deleting {self._bucket.where(path, version)}"):
            try:
                self._bucket.delete(path, version, bypass=bypass)
            except ClientError:
                return False
        return True


def _new_path() -> str:
    return f"{FOLDER}/{secrets.token_hex(8)}"


def _content(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest())
