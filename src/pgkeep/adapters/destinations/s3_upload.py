"""Bringing one file into a bucket: in one request if it is small, otherwise in parts, with little memory.

The source is read once from its disk: one thread digests the whole and lets the others, which digest and send the
parts, follow closely, so that these find the bytes in the kernel's cache.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from botocore.exceptions import ClientError

from pgkeep.adapters import clock, durable
from pgkeep.adapters.destinations import Content, Lock
from pgkeep.adapters.destinations.s3 import Options
from pgkeep.adapters.destinations.s3_bucket import Bucket, Condition, Facts, conditional, encoded
from pgkeep.adapters.destinations.s3_client import code, explained, is_unsupported
from pgkeep.adapters.destinations.s3_uploads import Part, Upload, Uploads
from pgkeep.errors import IntegrityError, StorageError
from pgkeep.progress import Progress

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# The service's own limit of parts.
PARTS: Final = 10_000
# Parts that are on their way at a time.
LANES: Final = 4
_MIB: Final = 1024 * 1024
_BLOCK_BYTES: Final = _MIB
_GONE: Final = frozenset({"NoSuchUpload", "InvalidPart", "InvalidPartOrder"})
_TAKEN: Final = frozenset({"PreconditionFailed", "412"})


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """Where it lies now. ``version`` empty: the server told none. ``checksum``: what it must say of the bytes, when
    they went in parts."""

    version: str
    checksum: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Errand:
    """One file to bring. ``condition``: what may stand there."""

    path: str
    source: int
    content: Content
    lock: Lock | None
    condition: Condition


class TakenError(Exception):
    """Something stands there already. It may be this very upload, whose answer was lost."""

    def __init__(self, checksum: str = "") -> None:
        super().__init__()
        self.checksum = checksum


class _GoneError(Exception):
    """The server does not know the upload, or parts of it."""


class _StoppedError(Exception):
    """The other parts need not be sent any more."""


def send(bucket: Bucket, errand: Errand, options: Options, uploads: Uploads, progress: Progress) -> Sent:
    """Raises ``TakenError``, ``IntegrityError`` (the source is not what it should be), ``StorageError``."""
    at_once_bytes = options.part_size_bytes if options.at_once_bytes is None else options.at_once_bytes
    # There is no upload in parts of nothing.
    if errand.content.size_bytes <= max(0, at_once_bytes):
        return _send_at_once(bucket, errand, progress)
    return send_in_parts(bucket, errand, options, uploads, progress)


def send_in_parts(bucket: Bucket, errand: Errand, options: Options, uploads: Uploads, progress: Progress) -> Sent:
    """Whatever its size. Raises as :func:`send`."""
    for _ in range(2):
        with contextlib.suppress(_GoneError):  # begun anew, once
            return _Multipart(bucket, errand, options, uploads, progress).run()
    raise StorageError(
        f"{bucket.where(errand.path)} could not be uploaded: the server forgets uploads that are under way",
        "does a lifecycle rule of the bucket, or another program, abort them?",
    )


def part_size(wanted_bytes: int, size_bytes: int) -> int:
    """So many that there are not too many parts; in whole MiB where it is more than was asked for."""
    least = -(-size_bytes // PARTS)
    return wanted_bytes if least <= wanted_bytes else -(-least // _MIB) * _MIB


def _send_at_once(bucket: Bucket, errand: Errand, progress: Progress) -> Sent:
    content, path = errand.content, errand.path
    with durable.explain(path, "reading the source"):
        data = b"".join(_blocks(errand.source, 0, content.size_bytes + 1))
        durable.drop_cache(errand.source)
    _require(Content(len(data), hashlib.sha256(data).hexdigest()), content)
    progress.step("store.created")
    with explained(f"uploading {bucket.where(path)}"):
        try:
            version = bucket.put(path, data, content, errand.lock, errand.condition)
        except ClientError as error:
            if code(error) in _TAKEN:
                raise TakenError from error
            if not (is_unsupported(error) and errand.condition == "absent"):
                raise
            # A server without conditional requests; that nothing stood there was seen just before.
            version = bucket.put(path, data, content, errand.lock)
    progress.advance(content.size_bytes, content.size_bytes)
    progress.step("store.completed")
    return Sent(version)


class _Multipart:
    """An upload in parts, new or continued."""

    def __init__(self, bucket: Bucket, errand: Errand, options: Options, uploads: Uploads, progress: Progress) -> None:
        self._bucket = bucket
        self._errand = errand
        self._endpoint = options.endpoint or ""
        self._uploads = uploads
        self._progress = progress
        self._size_bytes = part_size(options.part_size_bytes, errand.content.size_bytes)
        self._client = bucket.part_client
        self._stopped = threading.Event()
        self._parts: dict[int, Part] = {}
        self._upload_id = ""

    def run(self) -> Sent:
        """Raises as :func:`send`, and ``_GoneError``."""
        self._upload_id = self._continued() or self._begun()
        self._progress.step("store.created")
        try:
            found = self._send_all()
            self._progress.step("store.sent")
            _require(found, self._errand.content)
        except (_GoneError, IntegrityError):
            self._give_up()
            raise
        version = self._complete()
        self._progress.step("store.completed")
        return Sent(version, self._checksum())

    def _continued(self) -> str | None:
        remembered, errand = self._uploads.find(self._errand.path), self._errand
        if remembered is None:
            return None
        upload = remembered.upload
        same = Content(upload.size_bytes, upload.sha256) == errand.content
        there = (upload.label, upload.endpoint, upload.path) == (self._bucket.label, self._endpoint, errand.path)
        if not (same and there and upload.part_size_bytes == self._size_bytes):
            if there:
                abort(self._bucket, errand.path, upload.upload_id)
            return None
        self._parts = dict(remembered.parts)
        self._progress.note(f"continuing the upload of {errand.path}: {len(self._parts)} parts are there")
        return upload.upload_id

    def _begun(self) -> str:
        errand = self._errand
        with explained(f"uploading {self._bucket.where(errand.path)}"):
            answer = self._bucket.client.create_multipart_upload(
                **self._bucket.named(errand.path),
                **self._bucket.created_with(errand.content, errand.lock),
                ChecksumAlgorithm="SHA256",
            )
        self._progress.step("store.begun")
        upload = Upload(
            label=self._bucket.label,
            endpoint=self._endpoint,
            path=errand.path,
            size_bytes=errand.content.size_bytes,
            sha256=errand.content.sha256,
            part_size_bytes=self._size_bytes,
            upload_id=answer["UploadId"],
            started=clock.now(),
        )
        self._uploads.begin(upload)
        return upload.upload_id

    def _give_up(self) -> None:
        abort(self._bucket, self._errand.path, self._upload_id)
        self._uploads.forget(self._errand.path)

    def _send_all(self) -> Content:
        """What the source holds. Parts that arrived are remembered, however this ends."""
        pool = concurrent.futures.ThreadPoolExecutor(LANES, thread_name_prefix="pgkeep-part")
        pending: set[concurrent.futures.Future[Part]] = set()
        try:
            found = self._read_and_send(pool, pending)
            while pending:
                self._collect(pending)
            return found
        except BaseException:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
            for each in pending:
                if not each.cancelled() and each.exception() is None:
                    self._remember(each.result())
            raise
        finally:
            pool.shutdown()

    def _read_and_send(
        self, pool: concurrent.futures.Executor, pending: set[concurrent.futures.Future[Part]]
    ) -> Content:
        whole = hashlib.sha256()
        done_bytes, total_bytes = 0, self._errand.content.size_bytes
        for number in range(1, -(-total_bytes // self._size_bytes) + 1):
            start, end = done_bytes, min(done_bytes + self._size_bytes, total_bytes)
            with durable.explain(self._errand.path, "reading the source"):
                for block in _blocks(self._errand.source, start, end):
                    whole.update(block)
                    done_bytes += len(block)
            self._progress.advance(done_bytes, total_bytes)
            if done_bytes < end:  # it is too short: told when it is compared
                break
            if number in self._parts:
                os.posix_fadvise(self._errand.source, start, end - start, os.POSIX_FADV_DONTNEED)
                continue
            pending.add(pool.submit(self._send_part, number, start, end))
            while len(pending) >= LANES:
                self._collect(pending)
        return Content(done_bytes + self._surplus(total_bytes), whole.hexdigest())

    def _surplus(self, total_bytes: int) -> int:
        """One where the source goes on after its promised end."""
        with durable.explain(self._errand.path, "reading the source"):
            return len(os.pread(self._errand.source, 1, total_bytes))

    def _collect(self, pending: set[concurrent.futures.Future[Part]]) -> None:
        """Wait for a part at least. Raises what stopped one."""
        done, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
        for each in done:
            part = each.result()
            pending.discard(each)
            self._remember(part)
            self._progress.step("store.part-sent")

    def _remember(self, part: Part) -> None:
        self._parts[part.number] = part
        self._uploads.add(self._errand.path, part)

    def _send_part(self, number: int, start: int, end: int) -> Part:
        """In a thread of its own."""
        digest = hashlib.sha256()
        for block in _blocks(self._errand.source, start, end):
            digest.update(block)
        checksum = base64.b64encode(digest.digest()).decode()
        body = io.BufferedReader(_Section(self._errand.source, start, end, self._stopped), _BLOCK_BYTES)
        with explained(f"uploading part {number} of {self._bucket.where(self._errand.path)}"):
            try:
                answer = self._client.upload_part(
                    **self._bucket.named(self._errand.path),
                    UploadId=self._upload_id,
                    PartNumber=number,
                    Body=body,
                    ContentLength=end - start,
                    ChecksumSHA256=checksum,
                )
            except ClientError as error:
                if code(error) in _GONE:
                    raise _GoneError from error
                raise
        os.posix_fadvise(self._errand.source, start, end - start, os.POSIX_FADV_DONTNEED)
        return Part(number=number, tag=answer["ETag"], checksum=checksum)

    def _complete(self, condition: Condition | None = None) -> str:
        condition = condition or self._errand.condition
        parts = [self._parts[number] for number in sorted(self._parts)]
        named = [{"PartNumber": part.number, "ETag": part.tag, "ChecksumSHA256": part.checksum} for part in parts]
        with explained(f"completing the upload of {self._bucket.where(self._errand.path)}"):
            try:
                answer = self._bucket.client.complete_multipart_upload(
                    **self._bucket.named(self._errand.path),
                    **conditional(condition),
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": named},  # type: ignore[typeddict-item]
                )
            except ClientError as error:
                if is_unsupported(error) and condition == "absent":
                    return self._complete("anything")
                self._interpret(error)
                raise
        found = answer.get("VersionId")
        return "" if found in (None, "null") else str(found)

    def _interpret(self, error: ClientError) -> None:
        """Raises ``TakenError`` also where the upload is gone because it was completed; ``_GoneError``."""
        if code(error) in _TAKEN:
            raise TakenError(self._checksum()) from error
        if code(error) in _GONE:
            there = self._bucket.find(self._errand.path)
            if there is not None and is_same(there, self._errand.content, self._checksum()):
                raise TakenError(self._checksum()) from error
            self._give_up()
            raise _GoneError from error

    def _checksum(self) -> str:
        """The digest of the parts' digests, as the service makes it."""
        digests = [base64.b64decode(self._parts[number].checksum) for number in sorted(self._parts)]
        return f"{base64.b64encode(hashlib.sha256(b''.join(digests)).digest()).decode()}-{len(digests)}"


def abort(bucket: Bucket, path: str, upload_id: str) -> bool:
    """Let go of an upload's parts. False where these credentials may not, or it is gone: the bucket's lifecycle rule
    ends it then. Raises ``StorageError`` without an answer."""
    with explained(f"ending the upload of {bucket.where(path)}"):
        try:
            bucket.client.abort_multipart_upload(**bucket.named(path), UploadId=upload_id)
        except ClientError:
            return False
    return True


def drop(bucket: Bucket, path: str, uploads: Uploads) -> None:
    """Let go of a remembered upload. Raises ``StorageError``."""
    remembered = uploads.find(path)
    if remembered is not None:
        abort(bucket, path, remembered.upload.upload_id)
        uploads.forget(path)


def is_same(facts: Facts, content: Content, checksum: str) -> bool:
    """Does the server say that this is what was sent? ``checksum`` empty: in one piece."""
    if (facts.size_bytes, facts.digest) != (content.size_bytes, content.sha256):
        return False
    return facts.checksum in ("", encoded(content.sha256), checksum)


class _Section(io.RawIOBase):
    """A part of the source as a file of its own."""

    def __init__(self, source: int, start: int, end: int, stopped: threading.Event) -> None:
        self._source = source
        self._start = start
        self._end = end
        self._position = 0
        self._stopped = stopped

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._stopped.is_set():
            raise _StoppedError
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end - self._start}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._stopped.is_set():
            raise _StoppedError
        room = memoryview(buffer).cast("B")
        length = min(len(room), max(0, self._end - self._start - self._position))
        count = os.preadv(self._source, [room[:length]], self._start + self._position)
        self._position += count
        return count


def _blocks(source: int, start: int, end: int) -> Iterator[bytes]:
    """Up to the end, or the source's own. Raises ``OSError``."""
    while start < end:
        block = os.pread(source, min(_BLOCK_BYTES, end - start), start)
        if not block:
            return
        yield block
        start += len(block)


def _require(found: Content, content: Content) -> None:
    if found != content:
        raise IntegrityError(
            f"the source is not what its manifest says: {found.size_bytes} bytes or more with sha256 {found.sha256} "
            f"instead of {content.size_bytes}, {content.sha256}",
            "`pgkeep verify --all` looks at every backup of the vault; the copies made before are untouched",
        )
