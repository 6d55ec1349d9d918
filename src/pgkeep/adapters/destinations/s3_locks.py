"""How long an object is to be locked, whether the server really does it, and mending where it does not."""

from __future__ import annotations

import datetime as dt
from typing import Final

from botocore.exceptions import ClientError

from pgkeep.adapters import clock
from pgkeep.adapters.destinations import Lock
from pgkeep.adapters.destinations.s3 import Options
from pgkeep.adapters.destinations.s3_bucket import Bucket, Facts
from pgkeep.adapters.destinations.s3_client import code, explained
from pgkeep.errors import StorageError

# A lock must end in the server's future: what is over for the vault already is locked that long.
SHORTEST: Final = dt.timedelta(minutes=2)
# Servers keep whole seconds.
_TOLERANCE: Final = dt.timedelta(seconds=1)


def wanted(options: Options, retain_until: dt.datetime | None, now: dt.datetime) -> Lock | None:
    """The lock of a new copy; ``retain_until`` None: the vault keeps the backup for ever."""
    longest = now + dt.timedelta(days=options.lock_days_maximum)
    if options.lock_days is not None:
        return at_most(options, now + dt.timedelta(days=options.lock_days), now)
    return at_most(options, retain_until or longest, now)


def at_most(options: Options, until: dt.datetime, now: dt.datetime) -> Lock | None:
    """A lock to that moment, but no longer than is allowed: nobody can shorten one that was a mistake."""
    if options.lock_mode is None:
        return None
    longest = now + dt.timedelta(days=options.lock_days_maximum)
    bounded = min(max(until, now + SHORTEST), longest)
    return Lock(options.lock_mode, _whole_seconds(bounded))


def holds(found: Lock | None, asked: Lock) -> bool:
    """Is what the server says as strong and as long as what was asked for?"""
    if found is None or found.until < asked.until - _TOLERANCE:
        return False
    return found.mode in (asked.mode, "COMPLIANCE")


def ensure(bucket: Bucket, path: str, facts: Facts, asked: Lock) -> None:
    """Read the lock of a version, and mend it where it is missing or short. Raises ``StorageError``: it stays so."""
    if not facts.version:
        # What has no version is replaced by the next that is put there; servers exist that repeat the lock they were
        # told all the same.
        raise StorageError(
            f"{bucket.where(path)} is not locked as it must be: the server keeps no versions, and those are locked",
            "use a bucket that was made with Object Lock (docs/destinations/s3.md), or S3_OBJECT_LOCK_MODE=off",
        )
    found = found_lock(bucket, path, facts)
    if holds(found, asked):
        return
    refusal = _retain(bucket, path, facts.version, _never_less(found, asked))
    again = bucket.head(path, facts.version)
    given = found_lock(bucket, path, again) if again is not None else None
    if holds(given, asked):
        return
    because = f", and to lock it afterwards was refused ({code(refusal)})" if refusal is not None else ""
    raise StorageError(
        f"{bucket.where(path, facts.version)} is not locked as it must be: asked for {shown(asked)}, "
        f"the server says {shown(given)}{because}",
        "`pgkeep destination test` shows what the server does; Object Lock must be on for the bucket, and the "
        "credentials need s3:PutObjectRetention and s3:GetObjectRetention",
    ) from refusal


def found_lock(bucket: Bucket, path: str, facts: Facts) -> Lock | None:
    """What the server says with HEAD; asked for by itself where it says nothing there. Raises ``StorageError``."""
    return facts.lock or bucket.retention(path, facts.version)


def in_force(lock: Lock | None) -> Lock | None:
    """None for one that is over."""
    return lock if lock is not None and lock.until > clock.now() else None


def shown(lock: Lock | None) -> str:
    return f"{lock.mode} until {lock.until:%Y-%m-%dT%H:%M:%SZ}" if lock is not None else "no lock"


def _retain(bucket: Bucket, path: str, version: str, lock: Lock) -> ClientError | None:
    """A refusal is returned: what the server keeps instead says more. Raises ``StorageError`` without an answer."""
    with explained(f"locking {bucket.where(path, version)}"):
        try:
            bucket.retain(path, version, lock)
        except ClientError as error:
            return error
    return None


def _never_less(found: Lock | None, asked: Lock) -> Lock:
    if found is None:
        return asked
    return Lock(
        "COMPLIANCE" if "COMPLIANCE" in (found.mode, asked.mode) else "GOVERNANCE", max(found.until, asked.until)
    )


def _whole_seconds(moment: dt.datetime) -> dt.datetime:
    """Rounded up."""
    cut = moment.replace(microsecond=0)
    return cut if cut == moment else cut + dt.timedelta(seconds=1)
