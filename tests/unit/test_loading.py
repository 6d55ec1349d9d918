"""Which runs of pg_restore an archive is split into."""

from __future__ import annotations

import pytest

from pgkeep.domain import loading
from pgkeep.domain.toc import Entry, Section, Toc


def _toc(*lines: tuple[int, str, tuple[int, ...]]) -> Toc:
    return Toc((1, 16), "18.0", "18.0", "db", tuple(_entry(*line) for line in lines))


def _entry(dump_id: int, description: str, dependencies: tuple[int, ...]) -> Entry:
    return Entry(
        dump_id=dump_id,
        catalog=(0, 0),
        description=description,
        schema="public",
        name=f"thing {dump_id}",
        owner="",
        section=Section.POST_DATA,
        definition="",
        copy_statement=None,
        dependencies=dependencies,
        filename=None,
        had_dumper=False,
    )


PARTITIONED = _toc(
    (9, "TABLE", ()),
    (8, "ACL", (9,)),
    (7, "TABLE DATA", (9,)),
    (6, "INDEX", (9,)),
    (5, "INDEX ATTACH", (6,)),
    (4, "TRIGGER", (9,)),
    (3, "FK CONSTRAINT", (6,)),
    (2, "EVENT TRIGGER", ()),
)


def test_foreign_keys_wait_until_every_index_is_attached() -> None:
    assert loading.runs(PARTITIONED, None) == [(9, 7, 6, 5), (8, 4, 3, 2)]


def test_what_stands_on_something_late_is_late_too() -> None:
    toc = _toc((1, "EVENT TRIGGER", ()), (2, "COMMENT", (1,)), (3, "INDEX ATTACH", ()), (4, "FK CONSTRAINT", ()))
    assert loading.runs(toc, None) == [(3,), (1, 2, 4)]


@pytest.mark.parametrize("missing", [{3}, {5}], ids=["no foreign key", "nothing to attach"])
def test_one_run_where_nothing_can_deadlock(missing: set[int]) -> None:
    kept = [entry for entry in PARTITIONED.entries if entry.dump_id not in missing]
    assert loading.runs(Toc((1, 16), "18.0", "18.0", "db", tuple(kept)), None) == []
    wanted = {entry.dump_id for entry in kept}
    assert loading.runs(PARTITIONED, wanted) == [tuple(entry.dump_id for entry in kept)]


def test_a_choice_is_split_as_well() -> None:
    assert loading.runs(PARTITIONED, {9, 7, 6, 5, 3}) == [(9, 7, 6, 5), (3,)]
