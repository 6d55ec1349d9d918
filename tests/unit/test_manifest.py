"""The manifest's reader: what it writes it reads back, and nothing else gets past it."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgkeep.domain import manifest as manifests
from pgkeep.domain.manifest import DatabaseFacts, Manifest, TableStatistics, decode, encode
from pgkeep.domain.names import Tier
from pgkeep.errors import FormatError

EXAMPLE = Manifest(
    version=manifests.VERSION,
    id="20260131T235959Z-1f2e3d",
    kind="database",
    filename="2026-01-31_23-59-59.sql.gz",
    timestamp="2026-01-31_23-59-59",
    type=Tier.DAILY,
    database="app_db",
    size_bytes=4096,
    sha256="a1" * 32,
    created_at=dt.datetime(2026, 1, 31, 23, 59, 59, tzinfo=dt.UTC),
    sealed_at=dt.datetime(2026, 2, 1, 0, 0, 7, 123456, tzinfo=dt.UTC),
    retain_until=dt.datetime(2026, 2, 8, 0, 0, 7, 123456, tzinfo=dt.UTC),
    immutable=True,
    protection="chattr",
    system_identifier="7301234567890123456",
    server_version="15.8",
    dump_version="15.8",
    pgkeep_version="0.1.0",
    dump_seconds=1.25,
    facts=DatabaseFacts(
        encoding="UTF8",
        collate="C.UTF-8",
        ctype="C.UTF-8",
        settings=(("", "search_path", '"$user", public'), ("owner", "work_mem", "64MB")),
        extensions=(("plpgsql", "1.0"),),
    ),
    tables=(
        TableStatistics(
            schema="public", name="Größe \n 😀", rows=3, raw_bytes=30, compressed_bytes=40, digest="0f" * 32
        ),
    ),
    large_objects=2,
    raw_bytes=2048,
    recipients=("age1example",),
    findings=("rows collapsed",),
    notes=("one job",),
)
PLAIN: dict[str, Any] = json.loads(encode(EXAMPLE))
REQUIRED = sorted(field.name for field in msgspec.structs.fields(Manifest) if field.required)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=3, max_size=20)
counts = st.integers(0, 2**63 - 1)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
moments = st.datetimes(timezones=st.just(dt.UTC))
tables = st.builds(
    TableStatistics, schema=texts, name=texts, rows=counts, raw_bytes=counts, compressed_bytes=counts, digest=digests
)
facts = st.builds(
    DatabaseFacts,
    encoding=texts,
    collate=texts,
    ctype=texts,
    locale_provider=texts,
    icu_locale=st.none() | texts,
    icu_rules=st.none() | texts,
    settings=st.lists(st.tuples(texts, texts, texts), max_size=2).map(tuple),
    extensions=st.lists(st.tuples(texts, texts), max_size=2).map(tuple),
)
valid_manifests = st.builds(
    Manifest,
    version=st.just(manifests.VERSION),
    id=names,
    kind=st.sampled_from(["database", "globals"]),
    filename=names,
    timestamp=names,
    type=st.sampled_from(Tier),
    database=texts,
    size_bytes=counts,
    sha256=digests,
    created_at=moments,
    sealed_at=moments,
    retain_until=st.none() | moments,
    immutable=st.booleans(),
    protection=st.sampled_from(["chattr", "mode", "none"]),
    system_identifier=texts,
    server_version=texts,
    dump_version=texts,
    pgkeep_version=texts,
    dump_seconds=st.floats(0, 1e9),
    facts=st.none() | facts,
    tables=st.lists(tables, max_size=2).map(tuple),
    large_objects=counts,
    raw_bytes=counts,
    recipients=st.lists(texts, max_size=2).map(tuple),
    findings=st.lists(texts, max_size=2).map(tuple),
    notes=st.lists(texts, max_size=2).map(tuple),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def changed(**fields: Any) -> bytes:
    """The example's JSON with some fields replaced or added."""
    return json.dumps({**PLAIN, **fields}).encode()


def never_anything_but_a_format_error(data: bytes) -> None:
    """Whatever is accepted can be written again and means the same; whatever is not is one kind of error."""
    try:
        found = decode(data)
    except FormatError:
        return
    assert decode(encode(found)) == found


@given(valid_manifests)
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    assert decode(encode(manifest)) == manifest


def test_bytes_are_canonical() -> None:
    written = encode(EXAMPLE)
    assert encode(decode(written)) == written
    assert written.endswith(b"}\n")
    assert not written.endswith(b"\n\n")
    assert written.startswith(b'{\n  "version": "1.0",\n  "id": "20260131T235959Z-1f2e3d",\n')


def test_the_guides_fields_are_there() -> None:
    first = {"filename", "timestamp", "type", "size_bytes", "sha256"}
    assert first | {"database", "created_at", "immutable", "version"} <= PLAIN.keys()
    assert PLAIN["type"] == "daily"
    assert PLAIN["immutable"] is True


def test_rows_are_the_sum_over_tables() -> None:
    twice = msgspec.structs.replace(EXAMPLE, tables=EXAMPLE.tables * 2)
    assert (EXAMPLE.rows, twice.rows) == (3, 6)


def test_fields_of_a_newer_minor_version_are_passed_over() -> None:
    assert decode(changed(version="1.7", holds=[{"until": 3}])) == msgspec.structs.replace(EXAMPLE, version="1.7")


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "", "one", "-1.0"])
def test_an_unknown_major_version_is_named(version: str) -> None:
    with pytest.raises(FormatError, match="version") as caught:
        decode(changed(version=version))
    assert repr(version) in caught.value.message
    assert "newer pgkeep" in caught.value.hint


@pytest.mark.parametrize("name", REQUIRED)
def test_every_required_field_is_missed(name: str) -> None:
    without = {key: value for key, value in PLAIN.items() if key != name}
    with pytest.raises(FormatError, match=f"`{name}`"):
        decode(json.dumps(without).encode())


@pytest.mark.parametrize(
    "data",
    [
        b'{"id": "a", "id": "a"}',
        encode(EXAMPLE).replace(b'"kind"', b'"id": "x", "kind"', 1),
        encode(EXAMPLE).replace(b'"rows"', b'"rows": 9, "rows"', 1),
        encode(EXAMPLE).replace(b'"rows"', b'"\\u0072ows": 9, "rows"', 1),
        changed(later=0).replace(b'"later": 0', b'"later": {"a": 1, "a": 1}'),
    ],
    ids=["alone", "at the top", "in a table", "escaped", "in an unknown field"],
)
def test_a_key_given_twice_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="twice"):
        decode(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 1.0),
        ("version", None),
        ("id", ""),
        ("id", "x" * 1025),
        ("kind", "tablespace"),
        ("type", "fortnightly"),
        ("size_bytes", -1),
        ("size_bytes", "4096"),
        ("size_bytes", 4096.0),
        ("size_bytes", True),
        ("size_bytes", 2**63),
        ("sha256", "A1" * 32),
        ("sha256", "a1" * 31),
        ("sha256", "a1" * 32 + "\n"),
        ("created_at", 1769903999),
        ("created_at", "yesterday"),
        ("created_at", "2026-02-30T00:00:00Z"),
        ("immutable", "true"),
        ("immutable", 1),
        ("protection", "immutable"),
        ("dump_seconds", -0.5),
        ("dump_seconds", float("nan")),
        ("dump_seconds", float("inf")),
        ("facts", []),
        ("tables", {}),
        ("tables", [{}]),
        ("tables", [{**PLAIN["tables"][0], "rows": -1}]),
        ("findings", "none"),
        ("findings", [1]),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        decode(changed(**{field: value}))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("field", ["created_at", "sealed_at", "retain_until"])
@pytest.mark.parametrize("moment", ["2026-01-31T23:59:59", "2026-01-31 23:59:59"])
def test_a_time_without_a_zone_is_refused(field: str, moment: str) -> None:
    with pytest.raises(FormatError, match=field):
        decode(changed(**{field: moment}))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "/", ".", "..", "a\0b"])
def test_a_file_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="filename"):
        decode(changed(filename=name))


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc00\ud800"])
def test_half_a_character_is_refused(text: str) -> None:
    """It could be read, but never written again."""
    with pytest.raises(FormatError):
        decode(changed(database=text))


def test_only_utf8_is_read() -> None:
    """One manifest is one sequence of bytes: no other encoding of the same text passes."""
    text = encode(EXAMPLE).decode()
    for other in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"):
        with pytest.raises(FormatError):
            decode(text.encode(other, errors="replace"))


def test_an_oversized_manifest_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(EXAMPLE)
    monkeypatch.setattr(manifests, "SIZE_LIMIT_BYTES", len(data))
    assert decode(data) == EXAMPLE
    with pytest.raises(FormatError, match="larger than"):
        decode(data + b" ")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"version":"1.0","later":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        changed(later=0).replace(b'"later": 0', b'"later": ' + b"9" * 5000),
        changed(dump_seconds=0).replace(b'"dump_seconds": 0', b'"dump_seconds": 1e999999'),
    ],
    ids=["lists", "objects", "closed", "digits", "exponent"],
)
def test_depth_and_digits_without_end(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data)


@pytest.mark.parametrize("data", [b"", b" ", b"null", b"[]", b"{}", b'"x"', b"\xff", encode(EXAMPLE) + b"x"])
def test_what_is_no_manifest_at_all(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data)


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    never_anything_but_a_format_error(data)


@given(json_values)
def test_arbitrary_json(value: Any) -> None:
    never_anything_but_a_format_error(json.dumps(value).encode())


@given(st.sampled_from(sorted(PLAIN)), json_values)
@example("dump_seconds", float("inf"))
@example("database", "\ud800")
def test_one_field_replaced(field: str, value: Any) -> None:
    never_anything_but_a_format_error(changed(**{field: value}))


@given(
    st.lists(st.tuples(st.integers(0, len(encode(EXAMPLE)) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 40),
)
def test_bytes_replaced_or_cut(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(encode(EXAMPLE))
    for position, value in changes:
        data[position] = value
    never_anything_but_a_format_error(bytes(data[: len(data) - cut]))


@given(st.integers(0, len(encode(EXAMPLE))), st.integers(0, 60), st.binary(max_size=12))
def test_a_stretch_exchanged(start: int, length: int, new: bytes) -> None:
    data = encode(EXAMPLE)
    never_anything_but_a_format_error(data[:start] + new + data[start + length :])
