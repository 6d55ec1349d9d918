"""File names: every legal database name fits into one, comes back out, and stays inside its directory."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgkeep.domain.names import (
    DUMP_SUFFIX,
    SIDECAR_SUFFIXES,
    Tier,
    dump_name,
    format_timestamp,
    is_identifier,
    new_identifier,
    parse_dump_name,
    parse_timestamp,
)
from pgkeep.errors import FormatError

MOMENT = dt.datetime(2026, 1, 31, 23, 59, 59, tzinfo=dt.UTC)
# PostgreSQL's NAMEDATALEN less the final NUL; Linux's NAME_MAX.
DATABASE_NAME_LIMIT_BYTES = 63
FILE_NAME_LIMIT_BYTES = 255
AWKWARD = [
    "a/../b",
    "../../etc/passwd",
    "/",
    ".",
    "..",
    ".hidden",
    "-rf",
    "it's",
    '"quoted"',
    "new\nline",
    "tab\t",
    "\x7f\x01",
    "back\\slash",
    "100%",
    "%2F",
    "a.b",
    "~",
    "app.sql.gz",
    "app.sql.gz.manifest.json",
    " ",
    "*?[a]",
    "Größe",
    "data😀base",
    "e\u0301",
    "\u202egnp",
    "😀" * 15 + "abc",
    "x" * 63,
]

# Whole seconds from 1970 to the end of 9999.
moments = st.integers(0, 253_402_300_000).map(lambda seconds: dt.datetime.fromtimestamp(seconds, dt.UTC))
database_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=63).filter(
    lambda name: len(name.encode()) <= DATABASE_NAME_LIMIT_BYTES
)


def stays_in_its_directory(name: str) -> bool:
    return name.isascii() and name.isprintable() and not set(name) & set("/\\ '\"*?[]$`~") and name[0].isdigit()


@given(moments, st.none() | database_names)
def test_round_trip(moment: dt.datetime, database: str | None) -> None:
    name = dump_name(moment, database)
    assert parse_dump_name(name) == (moment, database)
    assert stays_in_its_directory(name)
    assert name not in (".", "..")


@pytest.mark.parametrize("database", AWKWARD)
def test_awkward_database_names(database: str) -> None:
    name = dump_name(MOMENT, database)
    assert parse_dump_name(name) == (MOMENT, database)
    assert stays_in_its_directory(name)
    # Only the suffix and the separator before the database bring dots: sidecars can't be taken for dumps.
    assert name.count(".") == 3


@given(database_names)
@example("\U0010ffff" * 15 + "\uffff")
@example("/" * 63)
def test_every_sidecar_fits_the_filesystem(database: str) -> None:
    for suffix in SIDECAR_SUFFIXES:
        assert len(dump_name(MOMENT, database) + suffix) <= FILE_NAME_LIMIT_BYTES


@given(database_names, database_names)
@example("a/b", "a%2Fb")
@example("a.b", "a%2Eb")
def test_two_databases_never_share_a_name(one: str, other: str) -> None:
    assert (dump_name(MOMENT, one) == dump_name(MOMENT, other)) == (one == other)


def test_the_one_database_of_the_guide_has_no_middle() -> None:
    assert dump_name(MOMENT, None) == "2026-01-31_23-59-59.sql.gz"
    assert dump_name(MOMENT, "app_db") == "2026-01-31_23-59-59.app_db.sql.gz"


@pytest.mark.parametrize(
    "name",
    [
        "",
        DUMP_SUFFIX,
        "2026-01-31_23-59-59",
        "2026-01-31_23-59-59.sql",
        "2026-01-31_23-59-59.sql.gz.sha256",
        "2026-01-31_23-59-59.sql.gz\n",
        "2026-01-31_23-59-59..sql.gz",
        "2026-01-31-23-59-59.sql.gz",
        "2026-13-31_23-59-59.sql.gz",
        "2026-02-30_23-59-59.sql.gz",
        "2026-01-31_24-00-00.sql.gz",
        "٢٠٢٦-01-31_23-59-59.sql.gz",
        " 2026-01-31_23-59-59.sql.gz",
        "./2026-01-31_23-59-59.sql.gz",
        # Not as dump_name writes them: two names would then mean one backup, or lead elsewhere.
        "2026-01-31_23-59-59.a/../b.sql.gz",
        "2026-01-31_23-59-59.a.b.sql.gz",
        "2026-01-31_23-59-59.%2e.sql.gz",
        "2026-01-31_23-59-59.%61.sql.gz",
        "2026-01-31_23-59-59.%.sql.gz",
        "2026-01-31_23-59-59.%FF.sql.gz",
        "2026-01-31_23-59-59.%00.sql.gz",
        "2026-01-31_23-59-59.ä.sql.gz",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        parse_dump_name(name)


@given(st.text(max_size=30))
def test_arbitrary_text_is_a_backups_name_or_a_format_error(text: str) -> None:
    for name in (text, f"2026-01-31_23-59-59.{text}.sql.gz"):
        try:
            moment, database = parse_dump_name(name)
        except FormatError:
            continue
        assert dump_name(moment, database) == name


@given(moments)
def test_timestamps_round_trip_and_sort(moment: dt.datetime) -> None:
    assert parse_timestamp(format_timestamp(moment)) == moment
    later = moment + dt.timedelta(seconds=1)
    assert format_timestamp(moment) < format_timestamp(later)


def test_timestamps_are_in_utc() -> None:
    east = dt.timezone(dt.timedelta(hours=5, minutes=30))
    assert format_timestamp(MOMENT.astimezone(east)) == "2026-01-31_23-59-59"
    assert parse_timestamp("2026-01-31_23-59-59").tzinfo is dt.UTC


@given(moments)
def test_identifiers_are_recognised_and_sort_by_time(moment: dt.datetime) -> None:
    identifier = new_identifier(moment)
    assert is_identifier(identifier)
    assert identifier < new_identifier(moment + dt.timedelta(seconds=1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latest",
        "20260131T235959Z",
        "20260131T235959Z-1F2E3D",
        "20260131T235959Z-1f2e3d\n",
        "x20260131T235959Z-1f2e3d",
    ],
)
def test_what_is_no_identifier(text: str) -> None:
    assert not is_identifier(text)


def test_identifiers_of_one_second_differ() -> None:
    assert len({new_identifier(MOMENT) for _ in range(50)}) == 50


def test_tiers_go_from_the_shortest_lived_to_the_longest() -> None:
    assert [tier.value for tier in Tier][:5] == ["hourly", "daily", "weekly", "monthly", "yearly"]
