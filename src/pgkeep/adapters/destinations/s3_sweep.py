"""Uploads that nobody will continue, ended: the server keeps their parts, and lets them be paid for."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Final

from botocore.exceptions import ClientError

from pgkeep.adapters import clock
from pgkeep.adapters.destinations import s3_upload, s3_uploads
from pgkeep.adapters.destinations.s3_bucket import Bucket
from pgkeep.adapters.destinations.s3_client import explained, is_denied, is_unsupported
from pgkeep.adapters.destinations.s3_uploads import Uploads

# A remembered one is continued when its backup's turn comes again.
ABANDONED: Final = dt.timedelta(days=7)
# One that is not remembered was lost between the server's answer and the disk; or is another program's, at work.
UNKNOWN: Final = dt.timedelta(days=1)


def sweep(bucket: Bucket, uploads: Uploads, folders: tuple[str, ...]) -> list[str]:
    """The paths of the uploads that were ended. Raises ``StorageError``, but not where the credentials may not."""
    ended, continued = [], set()
    for remembered in list(uploads.all()):
        upload = remembered.upload
        if s3_uploads.age(upload) < ABANDONED:
            continued.add(upload.upload_id)
            continue
        if s3_upload.abort(bucket, upload.path, upload.upload_id):
            ended.append(upload.path)
        uploads.forget(upload.path)
    for path, upload_id in list(_unknown(bucket, folders)):
        if upload_id not in continued and s3_upload.abort(bucket, path, upload_id):
            ended.append(path)
    return ended


def _unknown(bucket: Bucket, folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    latest = clock.now() - UNKNOWN
    with explained(f"listing the unfinished uploads to {bucket.label}"):
        try:
            for path, upload_id, started in bucket.uploads():
                if path.partition("/")[0] in folders and started < latest:
                    yield path, upload_id
        except ClientError as error:
            # Housekeeping only: the documented rule of the bucket does the same.
            if not is_denied(error) and not is_unsupported(error):
                raise
