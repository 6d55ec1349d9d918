"""The agent's word: read back as written, and refused in words where it is none."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.domain import request as requests
from pgkeep.domain.manifest import DatabaseFacts
from pgkeep.domain.names import Tier
from pgkeep.domain.request import Request, decode, encode
from pgkeep.errors import FormatError

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
valid = st.builds(
    Request,
    id=st.from_regex(r"\A[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}\Z"),
    kind=st.sampled_from(["database", "globals"]),
    tiers=st.lists(st.sampled_from(Tier), min_size=1, max_size=6).map(tuple),
    database=texts,
    created_at=st.datetimes(timezones=st.just(dt.UTC)),
    system_identifier=texts,
    server_version=texts,
    dump_version=texts,
    dump_seconds=st.floats(0, 1e9),
    facts=st.none()
    | st.builds(
        DatabaseFacts,
        encoding=texts,
        collate=texts,
        ctype=texts,
        settings=st.lists(st.tuples(texts, texts, texts), max_size=3).map(tuple),
    ),
    notes=st.lists(texts, max_size=3).map(tuple),
)
PLAIN = {
    "id": "20260131T235959Z-1f2e3d", "kind": "database", "tiers": ["daily"], "database": "app",
    "created_at": "2026-01-31T23:59:59Z", "system_identifier": "7", "server_version": "15.8", "dump_version": "15.8",
    "dump_seconds": 1.5,
}  # fmt: skip


@given(valid)
def test_a_request_is_read_back_as_it_was_written(request: Request) -> None:
    assert decode(encode(request)) == request


def test_a_plain_one_is_read() -> None:
    assert decode(json.dumps(PLAIN).encode()).tiers == (Tier.DAILY,)


@pytest.mark.parametrize("field", PLAIN)
def test_no_field_may_be_left_out(field: str) -> None:
    with pytest.raises(FormatError, match=field):
        decode(json.dumps({name: value for name, value in PLAIN.items() if name != field}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "../../../../etc/cron.d/x"), ("id", "20260131T235959Z-1f2e3d\n"), ("id", "20260131T235959Z-1F2E3D"),
        ("id", "٢0260131T235959Z-1f2e3d"), ("id", ""), ("id", None), ("kind", "everything"), ("tiers", ["eternal"]),
        ("tiers", ["globals"]), ("tiers", []), ("tiers", ["daily"] * 7), ("tiers", "daily"),
        ("database", "a\0b"), ("database", "x" * 1025), ("created_at", "yesterday"),
        ("created_at", "2026-01-31T23:59:59"), ("created_at", 1769903999), ("dump_seconds", -1),
        ("dump_seconds", "1"), ("facts", {}), ("facts", []), ("notes", "one"), ("notes", ["x" * 1025]),
        ("retain_until", "2026-01-31T23:59:59Z"), ("sha256", "0" * 64),
    ],
)  # fmt: skip
def test_a_value_out_of_place_is_refused(field: str, value: object) -> None:
    with pytest.raises(FormatError, match="the request is malformed"):
        decode(json.dumps({**PLAIN, field: value}).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"id":"\xff\xff"}',
        b'{"id":"\\ud800"}', b"{}" * 2, json.dumps(PLAIN).encode("utf-16"), json.dumps(PLAIN).encode() + b"x",
        json.dumps(PLAIN).replace("1.5", "NaN").encode(), json.dumps(PLAIN).replace("1.5", "1e999").encode(),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data)


def test_too_large_a_request_is_refused_before_it_is_read() -> None:
    with pytest.raises(FormatError, match="larger than"):
        decode(b" " * (requests.SIZE_LIMIT_BYTES + 1))


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(FormatError):
        decode(noise)


@given(st.integers(0, 300), st.integers(0, 255))
def test_any_byte_changed_is_refused_or_is_another_request(position: int, value: int) -> None:
    data = bytearray(json.dumps(PLAIN).encode())
    data[position % len(data)] = value
    try:
        found = decode(bytes(data))
    except FormatError:
        return
    assert found.kind in ("database", "globals")
    assert len(found.id) == len("20260131T235959Z-1f2e3d")
