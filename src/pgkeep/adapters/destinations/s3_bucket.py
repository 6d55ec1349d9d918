"""One bucket: every request that pgkeep makes there, its answers as facts and its errors as ours."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from botocore.exceptions import BotoCoreError, ClientError

from pgkeep.adapters.destinations import Content, Listed, Lock, s3_client
from pgkeep.adapters.destinations.s3 import Options
from pgkeep.adapters.destinations.s3_client import DeniedError, code, explained, is_denied, is_missing, is_unsupported
from pgkeep.errors import StorageError

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3.client import S3Client

# The whole content's digest, in the object's metadata: `x-amz-meta-sha256`, in hexadecimal.
DIGEST_NAME: Final = "sha256"
_BLOCK_BYTES: Final = 1024 * 1024
# A stream that breaks is continued where it broke; so often without having got further.
_BREAKS: Final = 4
_UNLOCKED: Final = frozenset(
    {"NoSuchObjectLockConfiguration", "ObjectLockConfigurationNotFoundError", "InvalidRequest", "404"}
)

Condition = Literal["absent", "anything"]


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What the server says of one version. ``checksum``: its SHA-256 in base64, of the whole or (``-N`` at the end)
    of the N parts' digests; empty where it gives none. ``digest``: what was written beside it by whoever put it."""

    size_bytes: int
    version: str
    tag: str
    checksum: str
    digest: str
    lock: Lock | None


@dataclasses.dataclass(frozen=True, slots=True)
class LockConfiguration:
    """``enabled`` None: the credentials may not ask. ``default``: of what is put without a lock of its own."""

    enabled: bool | None
    default: tuple[str, int] | None = None


class Bucket:
    """The bucket's folder (prefix) of the options; paths are relative to that."""

    def __init__(self, options: Options) -> None:
        self.client = s3_client.connect(options)
        self.label = options.label
        self._options = options
        self._name = options.bucket
        self._prefix = f"{options.prefix.strip('/')}/".lstrip("/")
        self._extras = _extras(options)
        # Set by the first listing that may not show them.
        self.hides_versions = False

    def close(self) -> None:
        self.client.close()
        if "part_client" in self.__dict__:
            self.part_client.close()

    @functools.cached_property
    def part_client(self) -> S3Client:
        """For what has a checksum in its header."""
        return s3_client.connect(self._options, signs_bodies=False)

    def key(self, path: str) -> str:
        return self._prefix + path

    def where(self, path: str, version: str = "") -> str:
        """For messages."""
        return f"{self.label}/{path}" + (f" (version {version})" if version else "")

    def named(self, path: str, version: str = "") -> dict[str, Any]:
        """The parameters that name an object."""
        return {"Bucket": self._name, "Key": self.key(path), **({"VersionId": version} if version else {})}

    # What is there

    def head(self, path: str, version: str = "") -> Facts | None:
        """None: it is not there. Raises ``StorageError``, ``DeniedError`` (or it is not there)."""
        with explained(f"looking for {self.where(path, version)}"):
            try:
                answer = self.client.head_object(**self.named(path, version), ChecksumMode="ENABLED")
            except ClientError as error:
                # The answer to HEAD has no body, and so no cause: the same as GET names it.
                if is_missing(error) or self._get_finds_nothing(path, version):
                    return None
                raise
            return _facts(dict(answer))

    def find(self, path: str, version: str = "") -> Facts | None:
        """As :meth:`head`, for credentials that may not list: to those "denied" is how "not there" looks."""
        try:
            return self.head(path, version)
        except DeniedError:
            return None

    def _get_finds_nothing(self, path: str, version: str) -> bool:
        """Raises ``ClientError`` for any other trouble."""
        try:
            self.client.get_object(**self.named(path, version), Range="bytes=0-0")["Body"].close()
        except ClientError as error:
            if not is_missing(error):
                raise
            return True
        return False

    def read(self, path: str, version: str = "", offset: int = 0, end: int | None = None, tag: str = "") -> Body:
        """The bytes from there on, to the end or before ``end``. Raises ``ClientError``, ``BotoCoreError``."""
        parameters = self.named(path, version)
        if offset or end is not None:
            parameters["Range"] = f"bytes={offset}-{'' if end is None else end - 1}"
        if tag and not version:
            parameters["IfMatch"] = tag
        answer = self.client.get_object(**parameters)
        body = Body(answer["Body"], int(answer["ContentLength"]), str(answer.get("ETag", "")))
        partial = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
        if "Range" in parameters and not partial:
            body.stream.close()
            raise StorageError(f"{self.where(path)} can't be read in parts: the server gives the whole")
        return body

    def blocks(self, path: str, version: str = "") -> Iterator[bytes]:
        """All of it; where the stream breaks, it is taken up again.

        Raises ``ClientError``, ``BotoCoreError``, ``StorageError``.
        """
        body = self.read(path, version)
        done_bytes, total_bytes, tag, breaks = 0, body.size_bytes, body.tag, 0
        while True:
            try:
                for block in body.stream.iter_chunks(_BLOCK_BYTES):
                    done_bytes, breaks = done_bytes + len(block), 0
                    yield block
            except BotoCoreError:
                breaks += 1
                if breaks > _BREAKS:
                    raise
            if done_bytes >= total_bytes:
                return
            body = self.read(path, version, done_bytes, None, tag)

    def versions(self, folder: str) -> Iterator[Listed]:
        """Every version below a folder (empty: all of the prefix), by path, the oldest first; no delete markers.

        Where versions can't be listed, what stands there now. Raises ``StorageError``, ``DeniedError``.
        """
        prefix = self.key(f"{folder}/" if folder else "")
        with explained(f"listing {self.where(folder)}"):
            try:
                yield from self._all_versions(prefix)
            except ClientError as error:
                if not is_denied(error) and not is_unsupported(error):
                    raise
                self.hides_versions = True
                yield from self._latest(prefix)

    def _all_versions(self, prefix: str) -> Iterator[Listed]:
        pages = self.client.get_paginator("list_object_versions").paginate(Bucket=self._name, Prefix=prefix)
        entries = itertools.chain.from_iterable(page.get("Versions", []) for page in pages)
        for key, group in itertools.groupby(entries, key=lambda entry: entry["Key"]):
            # The newest comes first. Times say less: that of an upload in parts is the one of its beginning.
            for entry in reversed(list(group)):
                yield Listed(key.removeprefix(self._prefix), entry["Size"], _version(entry.get("VersionId")))

    def _latest(self, prefix: str) -> Iterator[Listed]:
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix):
            for entry in page.get("Contents", []):
                yield Listed(entry["Key"].removeprefix(self._prefix), entry["Size"])

    def uploads(self) -> Iterator[tuple[str, str, dt.datetime]]:
        """Path, id and time of every unfinished upload below the prefix. Raises ``ClientError``, ``BotoCoreError``."""
        paginator = self.client.get_paginator("list_multipart_uploads")
        for page in paginator.paginate(Bucket=self._name, Prefix=self._prefix):
            for each in page.get("Uploads", []):
                yield each["Key"].removeprefix(self._prefix), each["UploadId"], each["Initiated"]

    # The bucket

    def versioning(self) -> bool | None:
        """None: the credentials may not ask. Raises ``StorageError``."""
        with explained(f"asking whether {self.label} keeps versions"):
            try:
                return self.client.get_bucket_versioning(Bucket=self._name).get("Status") == "Enabled"
            except ClientError as error:
                if is_denied(error) or is_unsupported(error):
                    return None
                raise

    def lock_configuration(self) -> LockConfiguration:
        """Raises ``StorageError``."""
        with explained(f"asking whether {self.label} has Object Lock"):
            try:
                answer = self.client.get_object_lock_configuration(Bucket=self._name)
            except ClientError as error:
                if is_denied(error) or is_unsupported(error):
                    return LockConfiguration(None)
                if code(error) in _UNLOCKED:
                    return LockConfiguration(False)
                raise
            found: dict[str, Any] = dict(answer.get("ObjectLockConfiguration", {}))
            rule = found.get("Rule", {}).get("DefaultRetention", {})
            days = int(rule.get("Days") or 365 * int(rule.get("Years") or 0))
            return LockConfiguration(
                found.get("ObjectLockEnabled") == "Enabled", (str(rule.get("Mode")), days) if days else None
            )

    # Changes

    def put(
        self, path: str, data: bytes, content: Content | None, lock: Lock | None, condition: Condition = "anything"
    ) -> str:
        """A small object. The version (empty: the server tells none). Raises ``ClientError``, ``BotoCoreError``."""
        answer = self.client.put_object(
            **self.named(path),
            **self.created_with(content, lock),
            **conditional(condition),
            Body=data,
            ContentLength=len(data),
            ChecksumSHA256=encoded(content.sha256) if content else encoded_of(data),
        )
        return _version(answer.get("VersionId"))

    def created_with(self, content: Content | None, lock: Lock | None) -> dict[str, Any]:
        """The parameters that every new object gets."""
        parameters = dict(self._extras)
        if content is not None:
            parameters["Metadata"] = {DIGEST_NAME: content.sha256}
        if lock is not None:
            parameters |= {"ObjectLockMode": lock.mode, "ObjectLockRetainUntilDate": lock.until}
        return parameters

    def retention(self, path: str, version: str) -> Lock | None:
        """For servers that don't say it with HEAD. None: there is none, or it may not be asked for.

        Raises ``StorageError``.
        """
        with explained(f"reading the lock of {self.where(path, version)}"):
            try:
                found = self.client.get_object_retention(**self.named(path, version)).get("Retention", {})
            except ClientError as error:
                if is_denied(error) or is_missing(error) or is_unsupported(error) or code(error) in _UNLOCKED:
                    return None
                raise
            return _lock(found.get("Mode"), found.get("RetainUntilDate"))

    def retain(self, path: str, version: str, lock: Lock) -> None:
        """Raises ``ClientError``, ``BotoCoreError``."""
        self.client.put_object_retention(
            **self.named(path, version), Retention={"Mode": lock.mode, "RetainUntilDate": lock.until}
        )

    def delete(self, path: str, version: str = "", *, bypass: bool = False) -> str:
        """That version; without one, a bucket with versions gets a delete marker, whose version is returned.

        Raises ``ClientError``, ``BotoCoreError``.
        """
        more: dict[str, Any] = {"BypassGovernanceRetention": True} if bypass else {}
        answer = self.client.delete_object(**self.named(path, version), **more)
        return _version(answer.get("VersionId")) if answer.get("DeleteMarker") else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """What is being read: ``size_bytes`` of it come, of the version that ``tag`` (ETag) names."""

    stream: StreamingBody
    size_bytes: int
    tag: str


def conditional(condition: Condition) -> dict[str, Any]:
    return {"IfNoneMatch": "*"} if condition == "absent" else {}


def encoded(sha256: str) -> str:
    """A digest as the service writes it."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()


def encoded_of(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _extras(options: Options) -> dict[str, Any]:
    wanted = {
        "StorageClass": options.storage_class,
        "ServerSideEncryption": options.encryption,
        "SSEKMSKeyId": options.kms_key,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _facts(answer: dict[str, Any]) -> Facts:
    return Facts(
        size_bytes=int(answer["ContentLength"]),
        version=_version(answer.get("VersionId")),
        tag=str(answer.get("ETag", "")),
        checksum=str(answer.get("ChecksumSHA256", "")),
        digest=str(answer.get("Metadata", {}).get(DIGEST_NAME, "")),
        lock=_lock(answer.get("ObjectLockMode"), answer.get("ObjectLockRetainUntilDate")),
    )


def _lock(mode: Any, until: dt.datetime | None) -> Lock | None:
    if mode not in ("COMPLIANCE", "GOVERNANCE") or until is None:
        return None
    return Lock("COMPLIANCE" if mode == "COMPLIANCE" else "GOVERNANCE", until.astimezone(dt.UTC))


def _version(told: str | None) -> str:
    """What was put where no versions are kept is called ``null``: it has no version to insist on."""
    return "" if told in (None, "null") else str(told)
