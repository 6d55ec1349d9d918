"""The audit log's chain: what is chained to what, and that no change in the middle goes unnoticed."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.domain import audit
from pgkeep.domain.audit import GENESIS, Examination, Link

TORN = b'{"time":"2026-01-31T23:59:59Z","event":"sea'
UNCHAINED = b'{"time":"2026-01-31T23:59:59Z","event":"sealed","id":"20260131T235959Z-1f2e3d"}'
FIELDS: dict[str, Any] = {"time": dt.datetime(2026, 1, 31, tzinfo=dt.UTC), "event": "sealed", "by": "uid 0, pid 1"}


def grown(lines: list[bytes], **details: Any) -> list[bytes]:
    """The log with one more record, as the vault would write it. Lines are without newlines."""
    return [*lines, audit.encode(audit.link(reversed(lines)), FIELDS, details)[:-1]]


def log(count: int, begin: list[bytes] | None = None) -> list[bytes]:
    lines = begin or []
    for number in range(count):
        lines = grown(lines, id=f"backup {number}")
    return lines


def digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def whole(lines: list[bytes]) -> Examination:
    found = audit.examine(lines)
    assert found.problems == ()
    assert found.lines == len(lines)
    return found


# writing


def test_the_first_record_follows_nothing() -> None:
    assert audit.link([]) == Link(1, "0" * 64)
    (line,) = log(1)
    assert list(json.loads(line))[:5] == ["sequence", "previous", "time", "event", "by"]


def test_each_record_holds_the_digest_of_the_line_before() -> None:
    lines = log(4)
    assert [json.loads(line)["sequence"] for line in lines] == [1, 2, 3, 4]
    assert [json.loads(line)["previous"] for line in lines] == [GENESIS, *map(digest, lines[:-1])]
    assert whole(lines) == Examination(4, 4, 4, digest(lines[-1]), (), ())


@pytest.mark.parametrize(
    "torn", [TORN, b"", b"\0" * 4096, b"\xff\xfe", b"[1]", b"7", b"[" * 50_000, b'{"sequence":1}', b'{"sequence":"x"}',
             b'{"sequence":0,"previous":"' + b"0" * 64 + b'"}', b'{"sequence":1,"previous":"0"}', b"x" * 2_000_000]
)  # fmt: skip
def test_what_is_no_record_is_chained_over(torn: bytes) -> None:
    lines = grown([*log(2), torn, torn])
    last = json.loads(lines[-1])
    assert (last["sequence"], last["torn"]) == (3, True)
    assert last["previous"] == digest(torn[-audit.LINE_LIMIT_BYTES :])
    found = whole(grown(lines))
    assert (found.lines, found.records, found.sequence) == (6, 4, 4)
    assert [note.line for note in found.notes] == [4]


def test_records_from_before_the_chain_are_chained_over() -> None:
    lines = grown([UNCHAINED] * 3)
    last = json.loads(lines[-1])
    assert (last["sequence"], last["previous"], last["unchained"]) == (1, digest(UNCHAINED), True)
    found = whole(log(2, lines))
    assert (found.records, found.sequence) == (3, 3)
    assert [note.line for note in found.notes] == [3]
    assert "without a place" in found.notes[0].message


def test_an_older_version_that_wrote_in_between_does_not_start_the_count_again() -> None:
    lines = grown([*log(2), UNCHAINED, TORN, UNCHAINED])
    assert json.loads(lines[-1])["sequence"] == 3
    whole(lines)


def test_an_end_that_nothing_follows_yet_is_a_note() -> None:
    for end, words in ((TORN, "cut off"), (UNCHAINED, "without a place")):
        (note,) = whole([*log(2), end]).notes
        assert note.line == 3
        assert words in note.message


def test_newlines_do_not_count() -> None:
    lines = log(3)
    assert audit.examine([line + b"\n" for line in lines]) == audit.examine(lines)


def test_an_empty_log_is_whole() -> None:
    assert whole([]) == Examination(0, 0, 0, GENESIS, (), ())


# noticing


def damage(lines: list[bytes], change: Callable[[bytes], bytes]) -> bytes:
    return change(b"\n".join(lines) + b"\n")


LOGS = {
    "plain": log(4),
    "torn": log(2, [*log(2), TORN]),
    "unchained": log(2, [UNCHAINED, UNCHAINED]),
    "both": log(2, [UNCHAINED, TORN, UNCHAINED, TORN, TORN]),
    "twice": grown(grown([*grown([*log(1), TORN]), UNCHAINED])),
}


@pytest.mark.parametrize("name", LOGS)
@given(data=st.data())
def test_every_changed_byte_before_the_last_line_is_noticed(name: str, data: st.DataObject) -> None:
    text = b"\n".join(LOGS[name])
    place = data.draw(st.integers(0, text.rindex(b"\n")))
    value = data.draw(st.integers(0, 255).filter(lambda each: each != text[place]))
    changed = text[:place] + bytes([value]) + text[place + 1 :]
    assert audit.examine(changed.split(b"\n")).problems


@pytest.mark.parametrize("name", LOGS)
@given(data=st.data())
def test_every_removed_or_added_byte_before_the_last_line_is_noticed(name: str, data: st.DataObject) -> None:
    text = b"\n".join(LOGS[name])
    place = data.draw(st.integers(0, text.rindex(b"\n")))
    added = data.draw(st.binary(max_size=3))
    changed = text[:place] + added + text[place + (not added) :]
    if changed != text:
        assert audit.examine(changed.split(b"\n")).problems


@given(st.data())
def test_every_removed_doubled_or_swapped_line_in_the_middle_is_noticed(data: st.DataObject) -> None:
    lines = log(6)
    place = data.draw(st.integers(0, 4))
    other = data.draw(st.integers(0, 5).filter(lambda each: each != place))
    swapped = list(lines)
    swapped[place], swapped[other] = swapped[other], swapped[place]
    for changed in (lines[:place] + lines[place + 1 :], [*lines[:place], lines[place], *lines[place:]], swapped):
        assert audit.examine(changed).problems


@given(st.binary(max_size=80), st.integers(0, 3))
def test_every_added_line_is_noticed(line: bytes, place: int) -> None:
    lines = log(4)
    assert audit.examine([*lines[:place], line.replace(b"\n", b""), *lines[place:]]).problems


def test_problems_name_their_lines() -> None:
    lines = log(5)
    lines[2] = lines[2].replace(b"backup 2", b"backup 9")
    (problem,) = audit.examine(lines).problems
    assert problem.line == 4
    gap = audit.examine(log(5)[:2] + log(5)[3:]).problems
    assert [each.line for each in gap] == [3, 3]
    assert "sequence is 4, 3 was to come" in gap[0].message


def test_a_log_that_was_cut_short_shows_in_its_head_only() -> None:
    lines = log(5)
    assert whole(lines[:3]).head != whole(lines).head
    assert whole(lines[:3]).records == 3


def test_a_changed_last_line_shows_in_the_head() -> None:
    lines = log(3)
    changed = [*lines[:2], lines[2].replace(b"backup 2", b"backup 9")]
    assert whole(changed).head != whole(lines).head


def test_a_torn_line_that_no_record_admits_is_a_problem() -> None:
    """A forger can compute digests; the record that would have to say ``torn`` is not the vault's then."""
    forged = log(2)
    after = {"sequence": 3, "previous": digest(TORN), **FIELDS, "time": "2026"}
    (problem,) = audit.examine([*forged, TORN, json.dumps(after).encode()]).problems
    assert "not so" in problem.message


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_noise_is_examined_in_peace(lines: list[bytes]) -> None:
    found = audit.examine(lines)
    assert found.lines == len(lines)
    assert audit.examine(grown(lines)).records == found.records + 1


def test_remarks_are_bounded() -> None:
    found = audit.examine([log(1)[0]] * 5000)
    assert len(found.problems) == audit.REMARKS_LIMIT


# sizes


def test_long_text_is_cut_with_a_mark() -> None:
    record = json.loads(grown([], id="x", reason="é" * 5000, short="é" * 4096)[0])
    assert record["reason"] == "é" * 4096 + "…[cut]"
    assert record["short"] == "é" * 4096


HOSTILE = st.recursive(
    st.one_of(st.text(st.characters(codec=None), max_size=5000), st.none(), st.booleans(), st.integers(0, 2**60)),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(st.characters(codec=None)), inner)),
)


@given(HOSTILE)
def test_whatever_the_details_are_the_record_is_one_bounded_line(value: Any) -> None:
    lines = grown(log(1), id="known", reason=value)
    assert b"\n" not in lines[1]
    assert len(lines[1]) < audit.RECORD_LIMIT_BYTES
    assert json.loads(lines[1])["id"] == "known"
    whole(lines)


@pytest.mark.parametrize(
    "value",
    ["\0" * 10**6, ["x" * 10**5] * 10**4, {f"key {number}": "\0" * 5000 for number in range(200)}, "\udcff" * 9000],
    ids=["text", "list", "mapping", "surrogates"],
)
def test_what_is_large_beyond_measure_leaves_what_the_record_is_about(value: Any) -> None:
    lines = grown([], id="known", path="daily/x", reason=value)
    assert len(lines[0]) < audit.RECORD_LIMIT_BYTES
    assert (json.loads(lines[0])["id"], json.loads(lines[0])["path"]) == ("known", "daily/x")
    whole(grown(lines))


def test_deep_nesting_is_cut() -> None:
    value: Any = "end"
    for _ in range(5000):
        value = [value]
    assert "[cut]" in json.dumps(json.loads(grown([], reason=value)[0]), ensure_ascii=False)


def test_details_take_no_field_of_the_records_own() -> None:
    record = json.loads(grown([], sequence=9, previous="x", by="somebody", torn=True, time="never")[0])
    assert (record["sequence"], record["previous"], record["by"]) == (1, GENESIS, "uid 0, pid 1")
    assert "torn" not in record


# finding


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"event":"sealed","id":"x"}\n', True),
        (b'{"event":"sealed","id":"x"}', False),
        (b'{"event":"expired","id":"x"}\n', False),
        (b'{"event":"sealed","id":"y","of":"\\"id\\":\\"x\\""}\n', False),
        (b'{"event":"quarantined","details":{"event":"sealed","id":"x"}}\n', False),
        (b'sealed","id":"x"}\n', False),
        (b"\xff}\n", False),
    ],
)
def test_what_a_record_is_about(line: bytes, expected: bool) -> None:
    assert audit.is_about(line, "sealed", "x") is expected
