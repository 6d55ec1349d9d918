"""Anchors as documents, and what they say of a log: the head is there, or it was cut off, or rewritten."""

from __future__ import annotations

import datetime as dt
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgkeep.domain import anchors, audit
from pgkeep.domain.anchors import Anchor, Head, Placed
from pgkeep.errors import FormatError
from tests.unit.test_audit import FIELDS, TORN, UNCHAINED, log

NOW = dt.datetime(2026, 1, 31, 23, 59, 59, 42, tzinfo=dt.UTC)
VAULT = "0123456789abcdef" * 2


def head_at(lines: list[bytes], sequence: int) -> Head:
    """Of the log as it was when that record was its last."""
    end = sum(len(line) + 1 for line in lines[:sequence])
    found = anchors.head_of(lines[sequence - 1], end)
    assert found is not None
    return found


def anchor(head: Head, moment: dt.datetime = NOW) -> Anchor:
    return Anchor(vault=VAULT, anchored_at=moment, head=head)


def placed(lines: list[bytes], *sequences: int) -> list[Placed]:
    return [Placed(f"anchors/{sequence}.json", anchor(head_at(lines, sequence))) for sequence in sequences]


def contradictions(found: list[Placed], lines: list[bytes]) -> list[tuple[int, str]]:
    digests = {audit.sequence_of(line): audit.line_digest(line) for line in lines}
    known = {sequence: digest for sequence, digest in digests.items() if sequence is not None}
    compared = anchors.compare(found, known, audit.examine(lines).sequence)
    return [(each.anchor.anchor.head.sequence, each.kind) for each in compared]


def test_the_document() -> None:
    """As docs/format.md shows it."""
    lines = log(3)
    made = anchor(head_at(lines, 3))
    assert json.loads(anchors.encode(made)) == {
        "format": 1,
        "vault": VAULT,
        "anchored_at": "2026-01-31T23:59:59.000042Z",
        "head": {
            "sequence": 3,
            "sha256": hashlib.sha256(lines[2]).hexdigest(),
            "time": "2026-01-31T00:00:00Z",
            "log_bytes": len(b"\n".join(lines)) + 1,
        },
    }
    assert anchors.encode(made).endswith(b"}\n")
    assert anchors.decode(anchors.encode(made)) == made
    assert anchors.path_of(made) == "anchors/2026-01/20260131T235959.000042Z-3.json"


def test_the_path_is_of_the_day_in_utc() -> None:
    late = dt.datetime(2026, 2, 1, 1, 30, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    assert anchors.path_of(anchor(head_at(log(1), 1), late)).startswith("anchors/2026-01/20260131T233000.000000Z-1")


def test_fields_of_a_later_pgkeep_are_passed_over() -> None:
    made = anchor(head_at(log(1), 1))
    later = json.loads(anchors.encode(made)) | {"signature": "x", "key": {"id": 1}}
    assert anchors.decode(json.dumps(later).encode()) == made


def _with(**changes: object) -> bytes:
    return json.dumps(json.loads(anchors.encode(anchor(head_at(log(1), 1)))) | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[" * 10_000,
        b"\xff",
        _with(format=2),
        _with(format="1"),
        _with(vault="../../etc"),
        _with(anchored_at="2026-01-31T00:00:00"),
        _with(head=None),
        _with(head={"sequence": 0, "sha256": "0" * 64, "time": "2026-01-31T00:00:00Z", "log_bytes": 1}),
        _with(head={"sequence": 1, "sha256": "0" * 63 + "\n", "time": "2026-01-31T00:00:00Z", "log_bytes": 1}),
        _with(head={"sequence": 1, "sha256": "0" * 64, "time": "2026-01-31T00:00:00Z", "log_bytes": 0}),
    ],
)
def test_what_is_no_anchor(data: bytes) -> None:
    with pytest.raises(FormatError):
        anchors.decode(data)


@pytest.mark.parametrize(
    "line",
    [b"", TORN, UNCHAINED, b"{}", b'{"sequence":1,"previous":"' + b"0" * 64 + b'"}', log(1)[0] + b"x", log(1)[0][:-1]],
)
def test_what_is_no_head(line: bytes) -> None:
    assert anchors.head_of(line, 100) is None


def test_a_log_that_has_grown_since() -> None:
    lines = log(8)
    assert contradictions(placed(lines[:5], 1, 3, 5), lines) == []


def test_over_torn_lines() -> None:
    lines = log(6, begin=[*log(3), TORN])
    heads = [anchors.head_of(line, 1) for line in (lines[2], lines[4], lines[-1])]
    found = [Placed("x", anchor(head)) for head in heads if head is not None]
    assert [each.anchor.head.sequence for each in found] == [3, 4, 9]
    assert contradictions(found, lines) == []


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_each_way_to_deceive_shows_where_it_was_anchored(count: int, place: int, data: st.DataObject) -> None:
    """A record is changed and the chain recomputed, the end is cut off, or another record is put in."""
    place = min(place, count)
    lines = log(count)
    anchored = data.draw(st.lists(st.integers(1, count), min_size=1, unique=True))
    found = placed(lines, *anchored)
    rewritten = log(place - 1)
    for number in range(place - 1, count):
        rewritten = _grown(rewritten, f"backup {number}" if number >= place else "nothing to see")
    assert audit.examine(rewritten).problems == ()
    expected = sorted((sequence, "rewritten") for sequence in anchored if sequence >= place)
    assert contradictions(found, rewritten) == expected
    cut = lines[: place - 1]
    assert contradictions(found, cut) == sorted((each, "cut off") for each in anchored if each >= place)


def _grown(lines: list[bytes], identifier: str) -> list[bytes]:
    return [*lines, audit.encode(audit.link(reversed(lines)), FIELDS, {"id": identifier})[:-1]]


def test_the_sentences() -> None:
    lines = log(5)
    (cut,) = anchors.compare(placed(lines, 5), {}, 3)
    assert cut.message == (
        "the log ends with record 3, but record 5 was anchored at 2026-01-31 23:59:59 UTC (anchors/5.json): "
        "its end was cut off, or it is an older log"
    )
    (changed,) = anchors.compare(placed(lines, 2), {2: "0" * 64}, 5)
    assert changed.message == (
        "record 2 was anchored at 2026-01-31 23:59:59 UTC (anchors/2.json) with another digest: "
        "it, or a record before it, was changed afterwards"
    )


def test_the_newest_is_the_one_that_vouches_for_the_most() -> None:
    lines = log(9)
    early = Placed("early", anchor(head_at(lines, 9), NOW - dt.timedelta(days=1)))
    assert anchors.newest([*placed(lines, 8, 3), early]) == early
    assert anchors.newest([]) is None
