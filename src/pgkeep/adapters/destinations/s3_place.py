"""A bucket that is open for copies: what the extractor and a restore do there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from botocore.exceptions import BotoCoreError, ClientError

from pgkeep.adapters import clock, durable
from pgkeep.adapters.destinations import Content, Listed, Lock, s3_locks, s3_sweep, s3_upload
from pgkeep.adapters.destinations.directory import MARKER_NAME
from pgkeep.adapters.destinations.s3 import Options
from pgkeep.adapters.destinations.s3_bucket import Bucket, Facts, encoded
from pgkeep.adapters.destinations.s3_client import DeniedError, explained, is_denied, is_missing
from pgkeep.adapters.destinations.s3_upload import Errand, Sent, TakenError
from pgkeep.adapters.destinations.s3_uploads import Uploads
from pgkeep.errors import FormatError, NotFoundError, RefusedError, StorageError
from pgkeep.progress import Progress

_MARKER_LIMIT_BYTES: Final = 64 * 1024
# So few are asked for one by one; for more a listing costs less.
_FEW: Final = 16
_ASKING_THREADS: Final = 8
_READING_TRIES: Final = 4


class S3Place:
    """The opened bucket."""

    def __init__(self, bucket: Bucket, options: Options, uploads: Path | None) -> None:
        self._bucket = bucket
        self._options = options
        self._uploads = Uploads(uploads)
        self._warnings: list[str] = []
        self._listed: dict[tuple[str, str], int] | None = None
        self._may_list = True
        self._keeps_versions: bool | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def require_fit(self, *, to_read: bool) -> None:
        """Raises ``StorageError`` for what would make every copy fail: the bucket, its lock."""
        if to_read:
            return
        self._keeps_versions = self._bucket.versioning()
        if self._options.lock_mode is None:
            self._warn("copies are not locked: whoever has credentials that may, can remove them")
            if self._keeps_versions is False:
                self._warn("the bucket keeps no versions: who can write there can overwrite copies")
        elif self._bucket.lock_configuration().enabled is False:
            raise StorageError(
                f"{self._bucket.label} has no Object Lock, and copies there are to be locked",
                "most servers set it only when a bucket is made: make a new one with it (docs/destinations/s3.md), "
                "or turn locks off for this destination (S3_OBJECT_LOCK_MODE=off)",
            )

    # The marker

    def read_marker(self) -> bytes | None:
        try:
            return self._read(MARKER_NAME, _MARKER_LIMIT_BYTES, "")
        except (NotFoundError, DeniedError):  # which of both it is, credentials that may not list aren't told
            return None

    def write_marker(self, data: bytes) -> None:
        with explained(f"writing {self._bucket.where(MARKER_NAME)}"):
            version = self._bucket.put(MARKER_NAME, data, None, None)
        if self._read(MARKER_NAME, _MARKER_LIMIT_BYTES, version) != data:
            raise StorageError(f"{self._bucket.where(MARKER_NAME)} gave back other bytes than were written")

    # What is there

    def sizes(self, files: Mapping[str, str]) -> Mapping[str, int]:
        if self._listed is None and self._may_list and len(files) > _FEW:
            self._listed = self._listing()
        listed = self._listed or {}
        found = {path: listed[path, version] for path, version in files.items() if (path, version) in listed}
        others = {path: version for path, version in files.items() if path not in found}
        return found | self._ask(others)

    def _listing(self) -> dict[tuple[str, str], int]:
        """Sizes by path and version (empty: what stands there now); empty where listing is not allowed."""
        sizes: dict[tuple[str, str], int] = {}
        try:
            for each in self._bucket.versions(""):
                sizes[each.path, each.version] = each.size_bytes
        except DeniedError:
            self._may_list = False
        return sizes

    def _ask(self, files: Mapping[str, str]) -> dict[str, int]:
        with concurrent.futures.ThreadPoolExecutor(_ASKING_THREADS) as pool:
            found = pool.map(self._find, files.keys(), files.values())
        return {path: facts.size_bytes for path, facts in zip(files, found, strict=True) if facts is not None}

    def _find(self, path: str, version: str) -> Facts | None:
        """Raises ``StorageError``, also ``DeniedError`` for a version that was there and now can't be looked at."""
        try:
            return self._bucket.head(path, version)
        except DeniedError as error:
            self._require_readable(version, error)
            return None

    def _require_readable(self, version: str, error: DeniedError) -> None:
        """To credentials that may not list, "denied" is how "not there" looks.

        Raises the error where they can't read what certainly is there.
        """
        if version and self.read_marker() is None:
            raise error

    def read(self, path: str, limit_bytes: int, version: str = "") -> bytes:
        try:
            return self._read(path, limit_bytes, version)
        except DeniedError as error:
            self._require_readable(version, error)
            raise NotFoundError(f"{self._bucket.where(path, version)} is not there, or may not be read") from error

    def _read(self, path: str, limit_bytes: int, version: str) -> bytes:
        data = bytearray()
        with self._finding(path, version):
            for block in self._bucket.blocks(path, version):
                data += block
                if len(data) > limit_bytes:
                    raise FormatError(f"{self._bucket.where(path, version)} is larger than {limit_bytes} bytes")
        return bytes(data)

    @contextlib.contextmanager
    def _finding(self, path: str, version: str) -> Iterator[None]:
        where = self._bucket.where(path, version)
        with explained(f"reading {where}"):
            try:
                yield
            except ClientError as error:
                if is_missing(error):
                    raise NotFoundError(f"{where} is not there") from error
                raise

    def content(self, path: str, progress: Progress, version: str = "") -> Content | None:
        try:
            return self._content(path, progress, version)
        except NotFoundError:
            return None
        except DeniedError as error:
            self._require_readable(version, error)
            return None

    def _content(self, path: str, progress: Progress, version: str) -> Content:
        digest = hashlib.sha256()
        done_bytes = 0
        with self._finding(path, version):
            for block in self._bucket.blocks(path, version):
                digest.update(block)
                done_bytes += len(block)
                progress.advance(done_bytes, None)
        return Content(done_bytes, digest.hexdigest())

    def files(self, folders: Iterable[str]) -> Iterator[Listed]:
        for folder in sorted(set(folders)):
            for each in self._bucket.versions(folder):
                name = each.path.rpartition("/")[2]
                if name and not durable.is_temporary(name):
                    yield each
        if self._bucket.hides_versions:
            self._warn(
                "older versions can't be listed (s3:ListBucketVersions): what somebody wrote over a copy shows instead"
            )

    @contextlib.contextmanager
    def opened_file(self, path: str, version: str = "") -> Iterator[S3File]:
        facts = self._find(path, version)
        if facts is None:
            raise NotFoundError(f"{self._bucket.where(path, version)} is not there")
        yield S3File(self._bucket, path, facts)

    def free_bytes(self) -> int | None:
        return None

    # Copies

    def store(
        self,
        path: str,
        source: int,
        content: Content,
        progress: Progress,
        *,
        aside: str | None = None,
        retain_until: dt.datetime | None = None,
    ) -> str:
        """What stood there stays as an older version; ``aside`` only says that it may be followed by a newer one."""
        lock = s3_locks.wanted(self._options, retain_until, clock.now())
        there = self._bucket.find(path)
        if there is not None and aside is None:
            return self._take_over(path, there, content, lock, progress)
        if there is not None and not (self._keeps_versions or there.version):
            raise self._in_the_way(path)
        errand = Errand(path, source, content, lock, "anything" if there is not None else "absent")
        facts = self._compared(path, self._send(errand, progress), content, progress)
        progress.step("store.compared")
        self._secure(path, facts, lock)
        progress.step("store.published")
        return facts.version

    def _send(self, errand: Errand, progress: Progress) -> Sent:
        try:
            return s3_upload.send(self._bucket, errand, self._options, self._uploads, progress)
        except TakenError as taken:
            there = self._bucket.find(errand.path)
            if there is None or not s3_upload.is_same(there, errand.content, taken.checksum):
                s3_upload.drop(self._bucket, errand.path, self._uploads)
                raise self._in_the_way(errand.path) from taken
            return Sent(there.version, taken.checksum)

    def _take_over(self, path: str, there: Facts, content: Content, lock: Lock | None, progress: Progress) -> str:
        """What is there may be what an interrupted run brought. Raises ``RefusedError`` where it is not."""
        if there.size_bytes != content.size_bytes or self._content(path, progress, there.version) != content:
            raise self._in_the_way(path)
        self._secure(path, there, lock)
        return there.version

    def _in_the_way(self, path: str) -> RefusedError:
        return RefusedError(
            f"{self._bucket.where(path)} exists already and is never overwritten",
            "do two vaults copy to the same place? Give each a prefix of its own"
            if self._keeps_versions is not False
            else "turn versioning on for the bucket: a newer version can then stand in front of a damaged one",
        )

    def _compared(self, path: str, sent: Sent, content: Content, progress: Progress) -> Facts:
        """What the server says of what it took. Raises ``StorageError`` where that is not what was sent."""
        facts = self._bucket.head(path, sent.version)
        if facts is None:
            raise StorageError(f"{self._bucket.where(path, sent.version)} was uploaded and is not there")
        if facts.checksum in ("", *self._foreign(facts, sent)):
            self._warn("the server gives no SHA-256 of what it holds: every copy is read back in full")
            found = self._content(path, progress, facts.version)
        else:
            matches = facts.checksum in (encoded(content.sha256), sent.checksum)
            found = Content(facts.size_bytes, content.sha256 if matches else f"(base64) {facts.checksum}")
        if found != content:
            raise StorageError(
                f"{self._bucket.where(path, facts.version)} gave back other bytes than were written: "
                f"{found.size_bytes} with sha256 {found.sha256} instead of {content.size_bytes}, {content.sha256}",
                "look at the server and at what is between here and there; the next run uploads it again",
            )
        return facts

    @staticmethod
    def _foreign(facts: Facts, sent: Sent) -> tuple[str, ...]:
        """A checksum of parts, where nothing went in parts, says nothing that could be compared."""
        return (facts.checksum,) if "-" in facts.checksum and not sent.checksum else ()

    def _secure(self, path: str, facts: Facts, lock: Lock | None) -> None:
        if lock is not None:
            # A long upload may have used a short lock up.
            asked = s3_locks.at_most(self._options, lock.until, clock.now())
            s3_locks.ensure(self._bucket, path, facts, asked or lock)
        self._uploads.forget(path)

    def sweep(self, folders: Iterable[str]) -> list[str]:
        """Uploads that nobody continues; where these credentials may not end them, the bucket's own rule must."""
        return s3_sweep.sweep(self._bucket, self._uploads, tuple(folders))

    # Locks, and the end

    def lock(self, path: str, version: str = "") -> Lock | None:
        """Raises ``NotFoundError``, ``StorageError``."""
        return s3_locks.in_force(s3_locks.found_lock(self._bucket, path, self._require(path, version)))

    def prolong(self, path: str, until: dt.datetime, version: str = "") -> None:
        """Raises ``NotFoundError``, ``StorageError``."""
        self._ensure(path, s3_locks.at_most(self._options, until, clock.now()), version)

    def secure(self, path: str, retain_until: dt.datetime | None, version: str = "") -> None:
        """Raises ``NotFoundError``, ``StorageError``."""
        self._ensure(path, s3_locks.wanted(self._options, retain_until, clock.now()), version)

    def _ensure(self, path: str, asked: Lock | None, version: str) -> None:
        if asked is not None:
            s3_locks.ensure(self._bucket, path, self._require(path, version), asked)

    def _require(self, path: str, version: str) -> Facts:
        facts = self._find(path, version)
        if facts is None:
            raise NotFoundError(f"{self._bucket.where(path, version)} is not there")
        return facts

    def remove(self, path: str, version: str = "") -> None:
        facts = self._find(path, version)
        if facts is None:
            return
        where = self._bucket.where(path, facts.version)
        lock = s3_locks.in_force(facts.lock)
        if lock is not None:
            raise RefusedError(f"{where} is locked: {s3_locks.shown(lock)}", "nobody can remove it before")
        with explained(f"removing {where}"):
            try:
                self._bucket.delete(path, facts.version)
            except ClientError as error:
                if not is_denied(error):
                    raise
                hint = "that is how it should be for the writer; a rule of the bucket can remove what is over"
                raise RefusedError(f"{where} may not be removed with these credentials (or is locked)", hint) from error

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)


class S3File:
    """A version that is read in parts."""

    def __init__(self, bucket: Bucket, path: str, facts: Facts) -> None:
        self._bucket = bucket
        self._path = path
        self._facts = facts

    @property
    def size_bytes(self) -> int:
        return self._facts.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self._facts.size_bytes)
        if offset >= end:
            return b""
        with explained(f"reading {self._bucket.where(self._path, self._facts.version)}"):
            for _ in range(_READING_TRIES - 1):
                with contextlib.suppress(BotoCoreError):  # the connection broke: once more
                    return self._read(offset, end)
            return self._read(offset, end)

    def _read(self, offset: int, end: int) -> bytes:
        body = self._bucket.read(self._path, self._facts.version, offset, end, self._facts.tag)
        with contextlib.closing(body.stream):
            # Of what was asked for: an answer that goes on says more than there is.
            return body.stream.read(end - offset)
