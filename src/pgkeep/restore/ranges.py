"""Ranges of bytes: which of a file's are here, which are missing, and how missing ones are best asked for."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""From and to, in bytes; the end is not part of it."""


class Ranges:
    """A set of bytes, kept as ranges that neither touch nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[Range]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def add(self, start: int, end: int) -> None:
        """Take these bytes in."""
        if start >= end:
            return
        first = bisect.bisect_left(self._ends, start)
        after = bisect.bisect_right(self._starts, end)
        if first < after:
            start, end = min(start, self._starts[first]), max(end, self._ends[after - 1])
        self._starts[first:after] = [start]
        self._ends[first:after] = [end]

    def remove(self, start: int, end: int) -> None:
        """Let these bytes go."""
        for kept_start, kept_end in [each for each in self if each[0] < end and each[1] > start]:
            position = bisect.bisect_left(self._starts, kept_start)
            del self._starts[position], self._ends[position]
            self.add(kept_start, min(kept_end, start))
            self.add(max(kept_start, end), kept_end)

    def missing(self, start: int, end: int) -> list[Range]:
        """What of ``start`` to ``end`` is not in the set, in order."""
        found = []
        position = bisect.bisect_right(self._ends, start)
        while start < end:
            known = position < len(self._starts)
            next_start = min(self._starts[position], end) if known else end
            if start < next_start:
                found.append((start, next_start))
            start = self._ends[position] if known else end
            position += 1
        return found


def merged(ranges: Iterable[Range], gap_bytes: int, spare_bytes: int) -> list[Range]:
    """Neighbours as one, also across gaps of at most ``gap_bytes``, as long as all such gaps take no more than
    ``spare_bytes``: a request more costs more than a few bytes that nobody asked for."""
    found: list[Range] = []
    for start, end in sorted(each for each in ranges if each[0] < each[1]):
        gap = start - found[-1][1] if found else gap_bytes + 1
        if gap <= 0:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif gap <= min(gap_bytes, spare_bytes):
            spare_bytes -= gap
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def pieces(ranges: Iterable[Range], limit_bytes: int) -> Iterator[Range]:
    """The same bytes in ranges of at most ``limit_bytes``."""
    for start, end in ranges:
        for at in range(start, end, limit_bytes):
            yield at, min(at + limit_bytes, end)
