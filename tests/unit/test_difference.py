"""What ``pgkeep diff`` says, from manifests alone."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.domain.difference import TableDifference, compare
from pgkeep.domain.manifest import Manifest, TableStatistics
from tests.unit.test_manifest import EXAMPLE

LATER = EXAMPLE.created_at + dt.timedelta(days=1)


def table(name: str, rows: int, raw_bytes: int, content: str = "0") -> TableStatistics:
    return TableStatistics(
        schema="public", name=name, rows=rows, raw_bytes=raw_bytes, compressed_bytes=raw_bytes // 3, digest=content * 64
    )


def manifest(*tables: TableStatistics, **fields: Any) -> Manifest:
    return msgspec.structs.replace(EXAMPLE, tables=tables, **fields)


def names(tables: tuple[TableDifference, ...]) -> list[str]:
    return [table.name for table in tables]


tables = st.lists(
    st.builds(table, st.sampled_from("abcdef"), st.integers(0, 9), st.integers(0, 99), st.sampled_from("01")),
    unique_by=lambda one: one.name,
)


def test_added_gone_changed_and_unchanged() -> None:
    a = manifest(table("same", 5, 50), table("grew", 1, 10), table("gone", 7, 70), size_bytes=100, large_objects=3)
    b = manifest(table("grew", 4, 45, "1"), table("same", 5, 50), table("new", 2, 20), size_bytes=90, large_objects=1)
    found = compare(a, b)
    assert (names(found.added), names(found.gone), names(found.changed)) == (["new"], ["gone"], ["grew"])
    assert found.unchanged_count == 1
    assert (found.rows_delta, found.raw_bytes_delta) == (3 + 2 - 7, 35 + 20 - 70)
    assert (found.size_bytes_delta, found.large_objects_delta) == (-10, -2)
    assert not found.tables_identical
    assert found.changed[0] == TableDifference("public", "grew", 1, 4, 3, 10, 45, 35, False)
    assert found.gone[0] == TableDifference("public", "gone", 7, 0, -7, 70, 0, -70, False)


def test_the_largest_change_comes_first_whichever_its_sign() -> None:
    a = manifest(table("a", 1, 100), table("b", 1, 100), table("c", 1, 100), table("d", 1, 100), table("e", 1, 100))
    b = manifest(table("a", 1, 101), table("b", 1, 10), table("c", 1, 150), table("d", 1, 100, "1"), table("e", 3, 100))
    assert names(compare(a, b).changed) == ["b", "c", "a", "e", "d"]


def test_other_content_of_the_same_size_is_a_change() -> None:
    found = compare(manifest(table("t", 3, 30, "0")), manifest(table("t", 3, 30, "1")))
    assert names(found.changed) == ["t"]
    assert found.changed[0].digest_only
    assert not found.tables_identical
    assert found.notes == ()


def test_another_compressor_is_named_where_only_digests_differ() -> None:
    newer = manifest(table("t", 3, 30, "1"), pgkeep_version="9.9")
    assert "different versions of pgkeep" in compare(manifest(table("t", 3, 30)), newer).notes[0]
    assert compare(manifest(table("t", 2, 20)), newer).notes == ()


def test_tables_of_one_name_in_two_schemas_are_two() -> None:
    other = msgspec.structs.replace(table("t", 3, 30), schema="archive")
    assert names(compare(manifest(table("t", 3, 30)), manifest(table("t", 3, 30), other)).added) == ["t"]


def test_comparing_what_does_not_belong_together_is_noted() -> None:
    a = manifest(created_at=LATER)
    b = manifest(database="shop\n", system_identifier="1", kind="globals")
    notes = "; ".join(compare(a, b).notes)
    for expected in ("'app_db' and 'shop\\n'", "different clusters", "different kinds", "the first is the newer"):
        assert expected in notes
    assert compare(a, a).notes == ()


def test_globals_have_no_tables_to_compare() -> None:
    roles = manifest(kind="globals")
    assert "no tables" in compare(roles, roles).notes[0]


def test_a_table_listed_twice_is_noted() -> None:
    assert "more than once" in compare(manifest(table("t", 1, 1), table("t", 2, 2)), manifest()).notes[0]


@given(tables, tables)
def test_back_is_the_reverse_of_forth(one: list[TableStatistics], other: list[TableStatistics]) -> None:
    forth, back = compare(manifest(*one), manifest(*other)), compare(manifest(*other), manifest(*one))
    assert (names(forth.added), names(forth.gone)) == (names(back.gone), names(back.added))
    assert names(forth.changed) == names(back.changed)
    assert (forth.rows_delta, forth.raw_bytes_delta) == (-back.rows_delta, -back.raw_bytes_delta)


@given(tables, tables)
def test_every_table_is_counted_once_and_deltas_add_up(
    one: list[TableStatistics], other: list[TableStatistics]
) -> None:
    found = compare(manifest(*one), manifest(*other))
    listed = (*found.added, *found.gone, *found.changed)
    assert len(listed) + found.unchanged_count == len({table.name for table in (*one, *other)})
    assert sum(table.rows_delta for table in listed) == found.rows_delta
    assert sum(table.raw_bytes_delta for table in listed) == found.raw_bytes_delta


@given(tables)
def test_a_backup_equals_itself_in_any_order(one: list[TableStatistics]) -> None:
    found = compare(manifest(*one), manifest(*reversed(one)))
    assert found.tables_identical
    assert found.unchanged_count == len(one)


def test_it_can_be_written_as_json() -> None:
    found = compare(manifest(table("t", 1, 10)), manifest(table("t", 2, 30)))
    plain = json.loads(msgspec.json.encode(found))
    assert plain["changed"][0]["rows_delta"] == 1
    assert plain["tables_identical"] is False
