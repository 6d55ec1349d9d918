"""An opened directory on a server that is reached by rsync."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import NOT_A_FILE, Content, Listed, Lock
from pgkeep.adapters.destinations.rsync_command import Entry, Rsync, Tick, done_bytes, ending_with, only
from pgkeep.adapters.destinations.rsync_errors import error_of
from pgkeep.adapters.destinations.rsync_received import Received
from pgkeep.adapters.destinations.rsync_ssh import require_free
from pgkeep.adapters.process import Completed
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import names
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, PgkeepError, RefusedError, StorageError
from pgkeep.progress import Progress, Silent

MARKER_NAME: Final = ".pgkeep-destination.json"
# One name for ever: what is tried out here can't be removed again.
PROBE_PATH: Final = ".pgkeep-probe/trial"
_MARKER_LIMIT_BYTES: Final = 64 * 1024
_PROBE_BYTES: Final = 4096
_BLOCK_BYTES: Final = 1024 * 1024
_FLUSH_BYTES: Final = 32 * 1024 * 1024
# rsync(1), EXIT VALUES: something was not sent; it has gone since it was listed.
_PARTIAL: Final = frozenset({23, 24})
# Of the medium there: the file itself can't be had.
_DEFECTS: Final = ("Input/output error", "read errors mapping", "vanished")
# What comes in great numbers, and is all read when somebody looks what there is.
_SMALL_SUFFIXES: Final = (*names.SIDECAR_SUFFIXES, ".json")
_NOT_COMPARED: Final = "does not compare what it has with what was sent: every copy is sent back to be compared here"
_NEVER_DELETED: Final = "whoever runs the server removes what is over, or has its snapshots expire"


class RsyncPlace:
    """Nothing here is ever deleted, so nothing of a copy that failed either: a file appears, is then compared, and
    counts as a copy only with the manifest, which comes last."""

    def __init__(self, rsync: Rsync, label: str, directory: Path, *, to_read: bool) -> None:
        self._rsync = rsync
        self._label = label
        self._directory = directory
        self._to_read = to_read
        self._tops: set[str] = set()
        # By the first name of the path: everything below it, as it was at the first look and as we changed it.
        self._listings: dict[str, dict[str, Entry]] = {}
        self._fetched: set[tuple[str, str]] = set()
        self._reading = threading.Lock()
        self._compares = True

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self._rsync.warnings, *(() if self._compares else (f"{self._label} {_NOT_COMPARED}",)))

    def read_marker(self) -> bytes | None:
        try:
            return self.read(MARKER_NAME, _MARKER_LIMIT_BYTES)
        except NotFoundError:
            return None

    def write_marker(self, data: bytes) -> None:
        if not self._write_over(MARKER_NAME, data):
            raise StorageError(
                f"{self._label}/{MARKER_NAME} can't be replaced by this account",
                "rename it on the server, if another destination is to be there",
            )

    def sizes(self, files: Mapping[str, str]) -> Mapping[str, int]:
        entries = self._entries({path.partition("/")[0] for path in files})
        return {path: _size(entries[path]) for path in files if path in entries}

    def files(self, folders: Iterable[str]) -> Iterator[Listed]:
        chosen = sorted(folders)
        entries = self._entries({folder.partition("/")[0] for folder in chosen})
        for folder in chosen:
            inside = (entry for path, entry in entries.items() if path.startswith(f"{folder}/") and _is_ours(entry))
            for entry in sorted(inside, key=lambda entry: entry.path):
                yield Listed(entry.path, entry.size_bytes)

    def read(self, path: str, limit_bytes: int, version: str = "") -> bytes:
        """When the place was opened to read: with the first small file of a kind all of its kind are fetched, as each
        costs a run of rsync. Of several threads one reads at a time."""
        _require_beneath(path)
        with self._reading:
            fetched = self._fetch(path, limit_bytes) if self._to_read else None
            if fetched is not None and fetched.is_file():
                return read_sidecar(fetched, limit_bytes)
            with self._incoming() as directory:
                self._receive(only([path]), directory, limit_bytes)
                if os.path.lexists(directory / path):
                    return read_sidecar(directory / path, limit_bytes)
            raise self._why_not(path, limit_bytes)

    def content(self, path: str, progress: Progress, version: str = "") -> Content | None:
        """The whole file comes here to be read: rsync has no SHA-256 to ask the server for. Little of it is on a disk
        here at any time, where the filesystem lets go of parts of a file."""
        _require_beneath(path)
        known = self._listings.get(path.partition("/")[0], {}).get(path)
        total_bytes = known.size_bytes if known is not None else None
        with self._incoming() as directory, Received(directory / path, progress, total_bytes) as received:
            completed = self._rsync.receive(only([path]), directory, total_bytes or 0, received.tick)
            if completed.return_code == 0:
                return received.content(completed.stderr)
        is_ours = "[receiver]" in completed.stderr
        if completed.return_code in _PARTIAL and not is_ours and any(word in completed.stderr for word in _DEFECTS):
            return None
        raise self._failed(completed, f"reading {path}")

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
        """Compared three times: the source's SHA-256 with ``content`` before anything is sent; what was received with
        what was sent, by rsync itself (MD5); the file under its name with the source (MD5, both read anew).

        A server that does not compare sends the file back, and its SHA-256 is taken here.
        """
        _require_beneath(path)
        _require_content(source, content, progress)
        progress.step("store.hashed")
        more = self._setting_aside(path, aside)
        self._require_folders(path)
        top = path.partition("/")[0]
        listing = self._listings[top]
        self._forget(path)
        sent = self._rsync.send(path, source, content.size_bytes, more, _telling(progress, content.size_bytes))
        if not sent:
            raise RefusedError(f"{self._label}/{path} exists already and is never overwritten")
        self._listings[top] = listing | _entries_on_the_way(path, content.size_bytes)
        progress.step("store.published")
        is_whole = self._is_whole(path, source, content, progress)
        durable.drop_cache(source)
        if not is_whole:
            hint = "check the disk there (dmesg, smartctl) before anything else"
            raise StorageError(f"{self._label}/{path} gave back other bytes than were written", hint)
        progress.step("store.compared")
        return ""

    def sweep(self, folders: Iterable[str]) -> list[str]:
        """Nothing: rsync keeps what was cut off, and goes on with it."""
        return []

    @contextlib.contextmanager
    def opened_file(self, path: str, version: str = "") -> Iterator[RsyncFile]:
        """The whole file comes here first, to a temporary directory: rsync does not read parts of one."""
        _require_beneath(path)
        entry = self._rsync.one(path)
        if entry is None or entry.kind != "-":
            raise self._not_a_file(path, entry)
        require_free(self._directory, entry.size_bytes, f"{self._label}/{path}")
        with self._incoming() as directory:
            self._receive(only([path]), directory, entry.size_bytes)
            with durable.explain(directory / path, "reading the file that was fetched"):
                descriptor = os.open(directory / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                yield RsyncFile(f"{self._label}/{path}", descriptor)
            finally:
                os.close(descriptor)

    def lock(self, path: str, version: str = "") -> Lock | None:
        return None

    def prolong(self, path: str, until: dt.datetime, version: str = "") -> None:
        """Nothing is locked here."""

    def secure(self, path: str, retain_until: dt.datetime | None, version: str = "") -> None:
        """There are no locks."""

    def remove(self, path: str, version: str = "") -> None:
        raise RefusedError(f"{self._label}/{path} stays: nothing is ever deleted by rsync", _NEVER_DELETED)

    def free_bytes(self) -> int | None:
        return None

    def look(self) -> None:
        """What is there at all. Raises ``StorageError``, ``RefusedError``: no directory, or we are not let in."""
        self._tops = {entry.path for entry in self._rsync.top_level()}

    def try_out(self, progress: Progress) -> tuple[bool, bool]:
        """Was a new file written, and was one written over? Read back in full either way. Raises ``StorageError``."""
        first, second = (secrets.token_bytes(_PROBE_BYTES) for _ in range(2))
        written = self._write_over(PROBE_PATH, first)
        progress.step("probe.written")
        found = self.content(PROBE_PATH, progress)
        if found is None or (written and found != _content_of(first)):
            raise StorageError(f"{self._label}/{PROBE_PATH} gave back other bytes than were written")
        return written, self._write_over(PROBE_PATH, second)

    def _entries(self, tops: set[str]) -> dict[str, Entry]:
        new = sorted(tops - self._listings.keys())
        if new:
            self._listings |= {top: {} for top in new}
            there = [top for top in new if top in self._tops]
            for entry in self._rsync.below(there) if there else ():
                self._listings[entry.path.partition("/")[0]][entry.path] = entry
        return {path: entry for top in tops for path, entry in self._listings[top].items()}

    def _forget(self, path: str) -> None:
        """Something changes there: another look is needed."""
        top = path.partition("/")[0]
        self._listings.pop(top, None)
        self._tops.add(top)

    def _fetch(self, path: str, limit_bytes: int) -> Path | None:
        """Where the file is if it was fetched, now or before; None for one that does not come in great numbers."""
        top, below, _ = path.partition("/")
        suffix = next((each for each in _SMALL_SUFFIXES if path.endswith(each)), None)
        if not below or suffix is None:
            return None
        directory = self._directory / "fetched"
        if (top, suffix) not in self._fetched:
            # What could not be had is asked for by itself when it is wanted, and the reason told then.
            self._receive(ending_with(suffix, top), directory, limit_bytes, allowed=_PARTIAL)
            self._fetched.add((top, suffix))
        return directory / path

    def _receive(
        self, rules: Sequence[str], directory: Path, limit_bytes: int, allowed: frozenset[int] = frozenset()
    ) -> None:
        """Files up to that size. Raises ``StorageError``."""
        completed = self._rsync.receive(rules, directory, 0, lambda _: None, [f"--max-size={limit_bytes}"])
        if completed.return_code not in {0, *allowed}:
            raise self._failed(completed, "reading")

    def _failed(self, completed: Completed, doing: str) -> PgkeepError:
        """The full disk may be our own."""
        if "[receiver]" in completed.stderr and "No space left on device" in completed.stderr:
            return StorageError(f"{doing}: {self._directory.parent} is full", "name a larger directory in TMPDIR")
        return error_of(self._rsync.server, completed, doing)

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Path]:
        with durable.explain(self._directory, "making a temporary directory"):
            directory = Path(tempfile.mkdtemp(prefix="incoming-", dir=self._directory))
        try:
            yield directory
        finally:
            shutil.rmtree(directory)

    def _why_not(self, path: str, limit_bytes: int) -> PgkeepError:
        entry = self._rsync.one(path)
        if entry is not None and entry.kind == "-" and entry.size_bytes > limit_bytes:
            return FormatError(f"{self._label}/{path} is larger than {limit_bytes} bytes")
        return self._not_a_file(path, entry)

    def _not_a_file(self, path: str, entry: Entry | None) -> PgkeepError:
        if entry is None:
            return NotFoundError(f"{self._label}/{path} does not exist")
        if entry.kind == "-":
            return StorageError(f"{self._label}/{path} changed while it was read")
        return FormatError(f"{self._label}/{path} is not a regular file")

    def _require_folders(self, path: str) -> None:
        """rsync would follow a link there when it writes, and not when it lists: the copy would never be seen."""
        entries = self._entries({path.partition("/")[0]})
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder in entries and entries[folder].kind != "d":
                raise StorageError(
                    f"{self._label}/{folder} is not a directory", "move it away; to use another disk, mount it there"
                )

    def _is_whole(self, path: str, source: int, content: Content, progress: Progress) -> bool:
        if self._compares:
            found = self._rsync.is_equal(path, source, content.size_bytes, _telling(progress, content.size_bytes))
            if found is not None:
                return found
            self._compares = False
        return self.content(path, progress) == content

    def _setting_aside(self, path: str, aside: str | None) -> list[str]:
        """rsync itself renames what stands there, by its way of making backups, just before the new file appears."""
        if aside is None:
            # What appears under the name while rsync sends would be replaced all the same; only we write there.
            return ["--ignore-existing"]
        folder, _, name = path.rpartition("/")
        durable.require_plain(aside)
        suffix = aside.removeprefix(name)
        if suffix in ("", aside):
            raise RefusedError(f"{aside!r} can't be the name of what is set aside for {name!r}: it must begin so")
        if self._rsync.one(f"{folder}/{aside}".lstrip("/")) is not None:
            raise StorageError(f"{self._label}/{folder}/{aside} exists already", "move it out of the way")
        return ["--ignore-times", "--backup", f"--suffix={suffix}"]

    def _write_over(self, path: str, data: bytes) -> bool:
        """Write a small file, whatever stands there. False: the account may not."""
        with open(os.memfd_create("pgkeep-small"), "wb") as file:
            durable.write_all(file.fileno(), data)
            sent = self._rsync.send(path, file.fileno(), len(data), ["--ignore-times"], lambda _: None)
            self._forget(path)
            if sent and not self._is_whole(path, file.fileno(), _content_of(data), Silent()):
                raise StorageError(f"{self._label}/{path} gave back other bytes than were written")
        return sent


class RsyncFile:
    """A file that was fetched, open for reading at any offset."""

    def __init__(self, label: str, descriptor: int) -> None:
        self._label = label
        self._descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        with durable.explain(self._label, "reading the copy"):
            return os.pread(self._descriptor, length, offset)


def _size(entry: Entry) -> int:
    return entry.size_bytes if entry.kind == "-" else NOT_A_FILE


def _is_ours(entry: Entry) -> bool:
    """rsync's own temporary files, and the directory of what was cut off, have names that begin with a dot."""
    return entry.kind == "-" and not any(name.startswith(".") for name in entry.path.split("/"))


def _entries_on_the_way(path: str, size_bytes: int) -> dict[str, Entry]:
    """What a listing would show of a file that was just made."""
    parts = path.split("/")
    folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    return {folder: Entry(folder, "d", 0) for folder in folders} | {path: Entry(path, "-", size_bytes)}


def _require_beneath(path: str) -> None:
    for name in path.split("/"):
        durable.require_plain(name)


def _telling(progress: Progress, total_bytes: int) -> Tick:
    reached = 0

    def tick(output: bytes) -> None:
        nonlocal reached
        reached = max(reached, min(done_bytes(output) or 0, total_bytes))
        progress.advance(reached, total_bytes)

    return tick


def _content_of(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest())


def _require_content(source: int, content: Content, progress: Progress | None = None) -> None:
    """Read from the disk, not from memory. Raises ``IntegrityError``, ``StorageError``."""
    digest, done = hashlib.sha256(), 0
    with durable.explain("the source", "reading"):
        durable.drop_cache(source)
        while block := os.pread(source, min(_BLOCK_BYTES, content.size_bytes + 1 - done), done):
            digest.update(block)
            done += len(block)
            if done % _FLUSH_BYTES == 0:
                durable.drop_cache(source)
            (progress or Silent()).advance(done, content.size_bytes)
        durable.drop_cache(source)
    if Content(done, digest.hexdigest()) != content:
        raise IntegrityError(
            f"the source is not what its manifest says: {done} bytes with sha256 {digest.hexdigest()} instead of "
            f"{content.size_bytes}, {content.sha256}",
            "`pgkeep verify --all` looks at every backup of the vault; the copies made before are untouched",
        )
