"""Large objects as SQL: the calls that pg_restore itself prints, written and read as a stream.

pg_restore prints a list of large objects as one run of ``lo_open``, ``lowrite`` and ``lo_close`` calls.
Given a list with only its first object, holding a marker, its output can be split at the marker's hex
digits; what :func:`encode` yields goes there and makes up the whole list.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from pgkeep.errors import FormatError

WRITE_BYTES = 256 * 1024
LINE_LIMIT_BYTES = 2 * WRITE_BYTES + 1024
OPENING_BYTES = 100
"""The call that :func:`first_number` looks for is shorter."""

_WRITE_END = b"');\n"
_CLOSE = b"SELECT pg_catalog.lo_close(0);\n\n"
_OPEN = b"SELECT pg_catalog.lo_open('%d', 131072);\n"
_WRITE = b"SELECT pg_catalog.lowrite(0, "
_OPEN_LINE = re.compile(rb"SELECT pg_catalog\.lo_open\('(\d{1,10})', 131072\);\n")
_WRITE_LINE = re.compile(rb"SELECT pg_catalog\.lowrite\(0, '\\{1,2}x([0-9a-f]*)(?:'\);\n)?")
_OPENING = re.compile(
    rb"SELECT pg_catalog\.lo_open\('(\d{1,10})', 131072\);\nSELECT pg_catalog\.lowrite\(0, '\\{1,2}x\Z"
)
_FIRST_LINE = re.compile(rb"([0-9a-f]*)(?:'\);\n)?")


def first_number(before: bytes) -> int | None:
    """The number in the call that opens the first object, which ends the SQL before it; None where it does not."""
    match = _OPENING.search(before[-OPENING_BYTES:])
    return int(match[1]) if match else None


def encode(objects: Iterable[tuple[int, Iterable[bytes]]], quote: bytes) -> Iterator[bytes]:
    r"""SQL for ``(number, content in blocks)``, from inside the first object's first ``lowrite`` on.

    It ends inside the last ``lowrite``. ``quote`` is ``'\x``, or ``'\\x`` where the dump was made without
    standard_conforming_strings; every block becomes one call, so blocks are at most ``WRITE_BYTES`` long.
    """
    for position, (number, blocks) in enumerate(objects):
        if position:
            yield _WRITE_END + _CLOSE + _OPEN % number + _WRITE + quote
        for count, block in enumerate(blocks):
            yield (_WRITE_END + _WRITE + quote if count else b"") + block.hex().encode("ascii")


def decode(lines: Iterable[bytes], first: int) -> Iterator[tuple[int, bytes]]:
    """The reverse of :func:`encode`: ``(number, block)``, at least one (maybe empty) block for each object.

    ``lines`` keep their line ends. Raises ``FormatError``, also for an object that comes twice.
    """
    iterator = iter(lines)
    number: int | None = first
    seen = {first}
    yield first, _unhex(_FIRST_LINE, next(iterator, b""))
    for line in iterator:
        opened = _OPEN_LINE.fullmatch(line)
        if opened:
            number = int(opened[1])
            if number in seen:
                raise FormatError(f"large object {number} occurs twice")
            seen.add(number)
        elif line.startswith(_WRITE) and number is not None:
            yield number, _unhex(_WRITE_LINE, line)
        elif line == _CLOSE[:-1]:
            number = None
        elif line != b"\n":
            raise FormatError("the large objects hold a line that pgkeep did not write")


def count(lines: Iterable[bytes], first: int) -> int:
    """How many large objects the lines of :func:`encode` hold; all of them are checked. Raises ``FormatError``."""
    numbers = (number for number, _ in decode(lines, first))
    return sum(1 for _ in itertools.groupby(numbers))


def _unhex(pattern: re.Pattern[bytes], line: bytes) -> bytes:
    match = pattern.fullmatch(line)
    if match is None or len(match[1]) % 2:
        raise FormatError("the large objects hold a line that pgkeep did not write")
    return bytes.fromhex(match[1].decode("ascii"))
