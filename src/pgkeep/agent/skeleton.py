"""The SQL around the data, written by pg_restore itself.

pg_restore prints a *shadow* of the archive: the same ``toc.dat``, and in place of every data file a marker
that nobody can guess. Splitting its output at the markers gives each piece of SQL before, between and
after the data, for any PostgreSQL version, without a line of SQL of ours.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pgkeep.adapters import process
from pgkeep.errors import DatabaseError, FormatError

BLOCK_BYTES = 1024 * 1024
LARGE_OBJECT_LISTS = "blobs*.toc"
_MARKER_DIGITS = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Hole:
    """Where a data file's content belongs; ``quote`` opened the literal of a large object's hex digits.

    The quote itself is the last thing in the piece of SQL before the hole.
    """

    file: str
    quote: bytes = b""


class Shadow:
    """The directory that pg_restore reads, and what tells its markers apart."""

    def __init__(self, directory: Path, toc: Path, data_files: Iterable[str]) -> None:
        """Make it: ``toc`` is copied (exFAT has no links), ``data_files`` are the tables' (``NNNN.dat``)."""
        self.directory = directory
        self._token = secrets.token_hex(16).encode("ascii")
        self._files: list[str] = []
        directory.mkdir(mode=0o700)
        shutil.copyfile(toc, directory / "toc.dat")
        for name in data_files:
            (directory / name).write_bytes(self._marker(name) + b"\n")

    def add_large_objects(self, list_name: str, first_line: str) -> None:
        """Stand-in for a list of large objects: its first one only, holding a marker."""
        (self.directory / list_name).write_text(first_line, encoding="ascii")
        (self.directory / first_line.split()[1]).write_bytes(self._marker(list_name))

    def split(self, output: IO[bytes]) -> Iterator[bytes | Hole]:
        """What pg_restore printed: pieces of SQL, and the holes between them.

        A hole stands for a file's whole content. Raises ``FormatError`` unless each occurs exactly once.
        """
        pattern, width = self._pattern()
        seen: set[str] = set()
        rest = b""
        while block := output.read(BLOCK_BYTES):
            rest += block
            position = 0
            for match in pattern.finditer(rest):
                hole = self._hole(match)
                if hole.file in seen:
                    raise FormatError(f"pg_restore printed {hole.file} twice")
                seen.add(hole.file)
                yield rest[position : match.start("hole")]
                yield hole
                position = match.end()
            keep = max(position, len(rest) - width)
            yield rest[position:keep]
            rest = rest[keep:]
        yield rest
        missing = set(self._files) - seen
        if missing:
            raise FormatError(f"pg_restore printed nothing for {min(missing)}")

    def _marker(self, name: str) -> bytes:
        self._files.append(name)
        return self._token + f"{len(self._files) - 1:0{_MARKER_DIGITS}d}".encode("ascii")

    def _pattern(self) -> tuple[re.Pattern[bytes], int]:
        """Both faces of a marker: a line of its own, or hex digits in a ``lowrite``'s literal; and the longest."""
        digits = b"{%d}" % _MARKER_DIGITS
        plain = self._token + b"(?P<plain>[0-9]" + digits + b")\n"
        hexed = self._token.hex().encode("ascii") + b"(?P<hex>(?:3[0-9])" + digits + b")"
        pattern = rb"(?P<quote>'\\{1,2}x)?(?P<hole>" + plain + b"|" + hexed + b")"
        return re.compile(pattern), 2 * (len(self._token) + _MARKER_DIGITS) + 8

    def _hole(self, match: re.Match[bytes]) -> Hole:
        digits = match["plain"] or bytes.fromhex(match["hex"].decode("ascii"))
        return Hole(self._files[int(digits)], match["quote"] or b"")


def print_sql(pg_restore: Path, shadow: Shadow) -> Iterator[bytes | Hole]:
    """Run ``pg_restore -f -`` over the shadow and split what it prints. Raises ``DatabaseError``."""
    with process.start([pg_restore, "--file=-", "--no-password", shadow.directory]) as running:
        yield from shadow.split(running.stdout)
        if running.wait() != 0:
            raise DatabaseError(f"pg_restore could not print the dump's SQL: {running.messages()}")
