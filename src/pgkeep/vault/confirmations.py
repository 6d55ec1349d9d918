"""Which copies the extractor says it has made: read from its log, which it only ever appends to.

A confirmation counts for one destination and only with the id and digest that the vault's own manifest has; a later
word on the same copy replaces it. Where the log can't be read, or is another than before, what it said is forgotten:
backups then stay longer, never shorter. Its writer is believed: a captured one can end a pin, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from pgkeep.domain.catalog import SealedBackup
from pgkeep.vault.layout import Layout

CONFIRMING: Final = frozenset({"extracted", "adopted", "repaired"})
# What is no longer there has to be brought again. A copy that expired was there, and has served its time.
REVOKING: Final = frozenset({"copy missing", "copy damaged"})
ADOPTING: Final = "destination adopted"
# Decades of a busy vault; more would hold the vault up, which does nothing else while it reads.
LOG_LIMIT_BYTES: Final = 512 * 1024**2
LINE_LIMIT_BYTES: Final = 256 * 1024
_BLOCK_BYTES: Final = 64 * 1024
# In every record that counts.
_MARK: Final = b'"destination_name"'
_ENDING_BYTES: Final = 4096
_NOTHING_READ: Final = (0, 0, 0, b"")

_Content = tuple[str, str]
"""The id and the SHA-256 of a backup."""


class _Event(msgspec.Struct, gc=False):
    """What is looked at of a record; it says much more."""

    event: str
    destination_name: str
    path: str = ""
    id: str = ""
    sha256: str = ""
    destination: str | None = None
    before: str | None = None


class Confirmations:
    """What is known of the ``required`` destinations; each look reads only what was appended since the last."""

    def __init__(self, layout: Layout, required: Sequence[str]) -> None:
        self._log = layout.extraction_audit
        self._required = tuple(dict.fromkeys(required))
        self._confirmed: dict[str, dict[str, _Content]] = {}
        # Device, inode, how far it was read, and the digest of the bytes before that place.
        self._read: tuple[int, int, int, bytes] = _NOTHING_READ
        self._trouble = ""
        self._forget()

    def unconfirmed(self, backups: Iterable[SealedBackup]) -> Mapping[str, frozenset[str]]:
        """By required destination, the paths of those backups that are not known to be there. Never raises for what
        the log is or holds: :meth:`problems` tells."""
        if not self._required:
            return {}
        known = {each.path_in_vault: (each.manifest.id, each.manifest.sha256) for each in backups}
        self._look(known)
        return {
            name: frozenset(path for path, content in known.items() if confirmed.get(path) != content)
            for name, confirmed in self._confirmed.items()
        }

    def problems(self) -> Iterator[str]:
        """Why nothing is confirmed, as the last look found it."""
        if self._trouble:
            yield f"no copy counts as confirmed, and the newest backups stay: {self._trouble}"

    def _look(self, known: Mapping[str, _Content]) -> None:
        self._trouble = ""
        try:
            log = os.open(self._log, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                self._read_on(log, known)
            finally:
                os.close(log)
        except FileNotFoundError:  # no extractor has run yet
            self._forget()
        except OSError as error:
            self._disbelieve(f"{self._log} can't be read: {error.strerror}")

    def _read_on(self, log: int, known: Mapping[str, _Content]) -> None:
        facts = os.fstat(log)
        if not stat.S_ISREG(facts.st_mode):
            self._disbelieve(f"{self._log} is not a regular file")
        elif facts.st_size > LOG_LIMIT_BYTES:
            self._disbelieve(f"{self._log} has {facts.st_size} bytes, more than {LOG_LIMIT_BYTES}")
        else:
            offset = self._take_from(log, self._begin(log, facts), facts.st_size, known)
            self._read = (facts.st_dev, facts.st_ino, offset, _ending(log, offset))

    def _begin(self, log: int, facts: os.stat_result) -> int:
        """Where to read on: the beginning, if it is not the same log, or not grown only."""
        device, inode, offset, ending = self._read
        same = (device, inode) == (facts.st_dev, facts.st_ino) and offset <= facts.st_size
        if same and ending == _ending(log, offset):
            return offset
        self._forget()
        return 0

    def _take_from(self, log: int, begin: int, end: int, known: Mapping[str, _Content]) -> int:
        """Where the next look begins: after the last whole line."""
        self._leave_out_all_but(known)
        reached = begin
        for lines, next_line in _lines(log, begin, end):
            for line in lines:
                self._take(line, known)
            reached = next_line
        return reached

    def _take(self, line: bytes, known: Mapping[str, _Content]) -> None:
        """Whatever is no record of the extractor's is passed over."""
        if _MARK not in line:
            return
        try:
            said = msgspec.json.decode(line, type=_Event)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return
        confirmed = self._confirmed.get(said.destination_name)
        if confirmed is None:
            return
        if said.event == ADOPTING and said.destination != said.before:
            # Another medium under the same name: whatever the last one held is not there.
            confirmed.clear()
        elif said.event in REVOKING:
            confirmed.pop(said.path, None)
        elif said.event in CONFIRMING:
            confirmed.pop(said.path, None)
            content = known.get(said.path)
            # The manifest's words are kept, not the log's, which may be of any length.
            if content == (said.id, said.sha256):
                confirmed[said.path] = content

    def _leave_out_all_but(self, known: Mapping[str, _Content]) -> None:
        """What has expired is not remembered: however long the log gets, this does not grow with it."""
        for name, confirmed in self._confirmed.items():
            self._confirmed[name] = {path: content for path, content in confirmed.items() if path in known}

    def _disbelieve(self, trouble: str) -> None:
        self._trouble = trouble
        self._forget()

    def _forget(self) -> None:
        self._confirmed = {name: {} for name in self._required}
        self._read = _NOTHING_READ


def _lines(log: int, start: int, end: int) -> Iterator[tuple[list[bytes], int]]:
    """Lines that are whole and may be worth reading, some at a time, and where the next one begins.

    One that is too long comes as none. A block full of lines that are not looked at costs no more than any other.
    """
    position, begun, too_long = start, b"", False
    while position < end and (block := os.pread(log, min(_BLOCK_BYTES, end - position), position)):
        position += len(block)
        whole, newline, rest = (begun + block).rpartition(b"\n")
        if newline:
            if too_long:
                whole = whole.partition(b"\n")[2]
            begun, too_long = rest, False
            yield whole.split(b"\n") if _MARK in whole else [], position - len(rest)
        else:
            begun = rest
        if len(begun) > LINE_LIMIT_BYTES:
            begun, too_long = b"", True


def _ending(log: int, offset: int) -> bytes:
    """Tells a log that has grown from one that was cut off and written anew."""
    begin = max(0, offset - _ENDING_BYTES)
    return hashlib.sha256(os.pread(log, offset - begin, begin)).digest()
