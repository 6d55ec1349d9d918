"""Large objects as SQL: any content, in any blocks, under either way of quoting, and nothing but them."""

from __future__ import annotations

import itertools
import operator
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgkeep.adapters.artifact_reader import split_lines
from pgkeep.domain.large_objects import LINE_LIMIT_BYTES, WRITE_BYTES, count, decode, encode
from pgkeep.errors import FormatError

Objects = list[tuple[int, list[bytes]]]
QUOTES = (rb"'\x", rb"'\\x")
objects = st.lists(
    st.tuples(st.integers(1, 2**32 - 1), st.lists(st.binary(min_size=1, max_size=60), max_size=4)),
    min_size=1,
    max_size=5,
    unique_by=operator.itemgetter(0),
)


def text_of(given_objects: Objects, quote: bytes) -> bytes:
    return b"".join(encode(given_objects, quote))


def read(text: bytes, first: int, step: int = 1 << 20) -> list[tuple[int, bytes]]:
    """Decoded from pieces cut anywhere, joined to whole objects."""
    pieces = (text[start : start + step] for start in range(0, len(text), step))
    found = decode(split_lines(pieces, LINE_LIMIT_BYTES), first)
    return [(n, b"".join(b for _, b in g)) for n, g in itertools.groupby(found, key=operator.itemgetter(0))]


@given(objects, st.sampled_from(QUOTES), st.integers(1, 50))
@example([(1, [])], QUOTES[0], 1)
@example([(1, []), (2, [])], QUOTES[1], 3)
@example([(1, [b""]), (2, [b"", b"x", b""])], QUOTES[0], 3)
def test_objects_come_back(given_objects: Objects, quote: bytes, step: int) -> None:
    text = text_of(given_objects, quote)
    whole = [(number, b"".join(blocks)) for number, blocks in given_objects]
    assert read(text, given_objects[0][0], step) == whole
    lines = list(split_lines([text], LINE_LIMIT_BYTES))
    assert count(lines, given_objects[0][0]) == len(given_objects)


@given(objects, st.sampled_from(QUOTES))
def test_with_what_stands_around_it_the_text_is_calls_of_three_functions_and_nothing_else(
    given_objects: Objects, quote: bytes
) -> None:
    """The statement before and the rest after are pg_restore's own."""
    opened = b"SELECT pg_catalog.lo_open('%d', 131072);\n" % given_objects[0][0]
    whole = (
        opened + b"SELECT pg_catalog.lowrite(0, " + quote + text_of(given_objects, quote)
        + b"');\nSELECT pg_catalog.lo_close(0);\n\n"
    )  # fmt: skip
    call = re.compile(
        rb"SELECT pg_catalog\.(lo_open\('\d+', 131072\)|lowrite\(0, '\\{1,2}x[0-9a-f]*'\)|lo_close\(0\));\n\n?"
    )
    assert call.sub(b"", whole) == b""
    assert whole.count(b"lo_open") == whole.count(b"lo_close") == len(given_objects)


def test_the_largest_block_fits_a_line() -> None:
    block = bytes(range(256)) * (WRITE_BYTES // 256)
    for quote in QUOTES:
        text = text_of([(4294967295, [block, block]), (4294967294, [block])], quote)
        assert max(map(len, text.splitlines(keepends=True))) <= LINE_LIMIT_BYTES
        assert read(text, 4294967295) == [(4294967295, block * 2), (4294967294, block)]


FOREIGN = [
    b"DROP TABLE t;\n",
    b"00');\nDROP TABLE t;\n",
    b"00'); DROP TABLE t; --\n",
    b"00\n',\n",
    b"0\n",
    b"zz\n",
    b"00');\n\\! id\n",
    b"00');\nSELECT pg_catalog.lowrite(1, '\\x00');\n",
    b"00');\nSELECT pg_catalog.lowrite(0, '\\\\\\x00');\n",
    b"00');\nSELECT pg_catalog.lowrite(0, E'\\x00');\n",
    b"00');\nSELECT pg_catalog.lo_close(0); SELECT 1;\n",
    b"00');\nSELECT pg_catalog.lo_open('1', 131072); SELECT 1;\n",
    b"00');\nSELECT pg_catalog.lo_open('1''', 131072);\n",
    b"00');\nSELECT pg_catalog.lo_open('\xd9\xa1', 131072);\n",
    b"00');\nSELECT pg_catalog.lo_open('12345678901', 131072);\n",
    b"00');\r\n",
    b"00');\n \n",
    b"00');\n-- a comment\n",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_line_that_is_not_ours_is_refused(text: bytes) -> None:
    with pytest.raises(FormatError, match="did not write"):
        read(text, 7)


def test_a_write_after_the_close_is_refused() -> None:
    closed = b"00');\nSELECT pg_catalog.lo_close(0);\n\nSELECT pg_catalog.lowrite(0, '\\x00');\n"
    with pytest.raises(FormatError, match="did not write"):
        read(closed, 7)


def test_an_object_that_comes_twice_is_refused() -> None:
    for again in ([(7, [b"a"]), (7, [b"b"])], [(7, [b"a"]), (8, [b"b"]), (7, [b"c"])]):
        with pytest.raises(FormatError, match="large object 7 occurs twice"):
            read(text_of(again, QUOTES[0]), 7)


@given(objects, st.data())
def test_any_changed_byte_is_refused_or_changes_nothing_but_content(
    given_objects: Objects, data: st.DataObject
) -> None:
    text = bytearray(text_of(given_objects, QUOTES[0]) or b"\n")
    position = data.draw(st.integers(0, len(text) - 1))
    text[position] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(text), given_objects[0][0])
    except FormatError:
        return
    assert len({number for number, _ in found}) == len(found)
    assert sum(len(content) for _, content in found) <= len(text) // 2
