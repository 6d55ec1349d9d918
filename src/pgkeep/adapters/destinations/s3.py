"""Copies in a bucket of object storage (AWS, SeaweedFS, Ceph, MinIO, R2 and the like), locked by the server's rules.

Imports without boto3; whatever talks to a server is loaded when a destination is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pgkeep.adapters.destinations import Probe
from pgkeep.errors import ToolError
from pgkeep.progress import Progress

if TYPE_CHECKING:
    from pgkeep.adapters.destinations.s3_bucket import Bucket
    from pgkeep.adapters.destinations.s3_place import S3Place


# Of the first request of a pass.
_FIRST_ATTEMPTS: Final = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A bucket, the folder in it, and how it is spoken to. Without keys botocore's own ways are used
    (environment, role).

    ``lock_mode`` None: objects are not locked by us. A lock lasts as long as the vault keeps the backup (for ever:
    ``lock_days_maximum``), or ``lock_days`` if that is set; never longer than ``lock_days_maximum``.
    ``prolong_locks`` is for the extractor: the place itself prolongs what it is told to.
    ``at_once_bytes``: the largest file that goes in one request and not in parts (None: of a part's size).
    ``attempts``: tries of each request; ``timeout_seconds``: without an answer, or without a byte of one.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = dataclasses.field(default=None, repr=False)
    secret_access_key: str | None = dataclasses.field(default=None, repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)
    profile: str | None = None
    path_style: bool = False
    ca_file: Path | None = None
    lock_mode: Literal["COMPLIANCE", "GOVERNANCE"] | None = "COMPLIANCE"
    lock_days: int | None = None
    lock_days_maximum: int = 400
    prolong_locks: bool = False
    storage_class: str | None = None
    encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key: str | None = None
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    part_size_bytes: int = 16 * 1024 * 1024
    at_once_bytes: int | None = None
    attempts: int = 8
    timeout_seconds: float = 60.0

    @property
    def label(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


class S3Destination:
    """The destination of these options. ``uploads``: where unfinished uploads are remembered (None: nowhere), to be
    used under a lock of the caller's."""

    kind = "s3"

    def __init__(self, options: Options, uploads: Path | None) -> None:
        self._options = options
        self._uploads = uploads

    @property
    def label(self) -> str:
        return self._options.label

    @contextlib.contextmanager
    def opened(self, *, to_read: bool = False) -> Iterator[S3Place]:
        with _needing_boto3():
            from pgkeep.adapters.destinations import s3_place
        # The way there and the credentials: what is wrong is told in seconds, work under way is more patient.
        with self._bucket(min(_FIRST_ATTEMPTS, self._options.attempts)) as bucket:
            s3_place.S3Place(bucket, self._options, self._uploads).read_marker()
        with self._bucket() as bucket:
            place = s3_place.S3Place(bucket, self._options, self._uploads)
            place.require_fit(to_read=to_read)
            yield place

    def probe(self, progress: Progress) -> Probe:
        """Puts a few small objects below ``.pgkeep-trial/``; two of them stay until their locks end, in minutes."""
        with _needing_boto3():
            from pgkeep.adapters.destinations import s3_probe
        with self._bucket() as bucket:
            return s3_probe.probe(bucket, self._options, progress)

    @contextlib.contextmanager
    def _bucket(self, attempts: int | None = None) -> Iterator[Bucket]:
        from pgkeep.adapters.destinations import s3_bucket

        options = dataclasses.replace(self._options, attempts=attempts or self._options.attempts)
        with contextlib.closing(s3_bucket.Bucket(options)) as bucket:
            yield bucket


@contextlib.contextmanager
def _needing_boto3() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"boto3", "botocore"}:
            raise
        raise ToolError("copies to S3 need boto3, which is not installed", "`pip install 'pgkeep[s3]'`") from error
