"""Choosing entries, on archives written by hand: the rules one by one. The real servers' turn is in integration."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.domain import selection
from pgkeep.domain.loading import list_file
from pgkeep.domain.selection import DatabaseObject, DetachedPartition, OrphanedForeignKey, Selection, parse_table_name
from pgkeep.domain.toc import Entry, Section, TableName, Toc, qualify
from pgkeep.errors import NotFoundError, UsageError

_SECTIONS = {"TABLE DATA": Section.DATA, "SEQUENCE SET": Section.DATA, "ACL": Section.NONE, "COMMENT": Section.NONE}


def _entry(
    dump_id: int, description: str, name: str, *dependencies: int, schema: str | None = "public", definition: str = ""
) -> Entry:
    return Entry(
        dump_id=dump_id,
        catalog=(0, 0),
        description=description,
        schema=schema,
        name=name,
        owner="postgres",
        section=_SECTIONS.get(description, Section.PRE_DATA),
        definition=definition,
        copy_statement=None,
        dependencies=dependencies,
        filename=f"{dump_id}.dat" if description == "TABLE DATA" else None,
        had_dumper=description == "TABLE DATA",
    )


def _toc(*entries: Entry) -> Toc:
    return Toc((1, 16), "18.0", "18.0", "db", entries)


def _nothing(_: DatabaseObject) -> bool:
    return False


def _select(toc: Toc, *wanted: str, exists: Callable[[DatabaseObject], bool] = _nothing) -> Selection:
    return selection.select(toc, [parse_table_name(text) for text in wanted], exists=exists)


_FUNCTION = "CREATE FUNCTION public.{}("


@pytest.mark.parametrize(
    ("text", "schema", "name"),
    [
        ("orders", None, "orders"),
        ("Sales.ORDERS", "sales", "orders"),
        ('"Sales".orders', "Sales", "orders"),
        ('"Sch ema"."We.ird"', "Sch ema", "We.ird"),
        ('"say ""hi"""', None, 'say "hi"'),
        (" a . b ", "a", "b"),
        ("straße.ÄRGER", "straße", "Ärger"),
        ("_x$1", None, "_x$1"),
        ('"a\nb"', None, "a\nb"),
    ],
)
def test_spellings_of_a_table(text: str, schema: str | None, name: str) -> None:
    assert parse_table_name(text) == TableName(schema, name)


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "a.", ".a", "a.b.c", "a b", "my-table", "1a", '""', '"a', 'a"', '"a"b', "a;b", "a\0", '"a\0"'],
)
def test_what_is_no_table_s_name(text: str) -> None:
    with pytest.raises(UsageError, match="is not a table's name"):
        parse_table_name(text)


_NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(st.none() | _NAMES, _NAMES)
def test_what_is_quoted_parses_to_itself(schema: str | None, name: str) -> None:
    assert parse_table_name(qualify(schema, name)) == TableName(schema, name)
    always = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, name) if part is not None)
    assert parse_table_name(always) == TableName(schema, name)


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        found = parse_table_name(text)
    except UsageError:
        return
    assert parse_table_name(str(found)) == found


def test_hostile_quotes_take_no_time() -> None:
    started = time.process_time()
    with pytest.raises(UsageError):
        parse_table_name('"' * 50_001 + "x")
    toc = _toc(
        _entry(1, "TABLE", "t"),
        _entry(2, "FK CONSTRAINT", "t k", 1, definition='"' * 50_001 + " REFERENCES"),
    )
    _select(toc, "t")
    assert time.process_time() - started < 1


class TestFinding:
    toc = _toc(
        _entry(1, "TABLE", "orders", schema="sales"),
        _entry(2, "TABLE", "orders", schema="archive"),
        _entry(3, "TABLE", "items", schema="sales"),
        _entry(4, "TABLE", "items"),
        _entry(5, "TABLE", "MyTable"),
        _entry(6, "VIEW", "summary"),
        _entry(7, "TABLE DATA", "settings", schema="ext"),
        _entry(8, "FOREIGN TABLE", "remote"),
    )

    def test_public_comes_first(self) -> None:
        assert _select(self.toc, "items").dump_ids == (4,)

    def test_a_schema_decides(self) -> None:
        assert _select(self.toc, "sales.items").dump_ids == (3,)

    def test_an_ambiguous_name_names_the_candidates(self) -> None:
        with pytest.raises(UsageError, match=r"archive\.orders, sales\.orders"):
            _select(self.toc, "orders")

    def test_asking_twice_is_asking_once(self) -> None:
        assert _select(self.toc, "items", "public.items", "remote").dump_ids == (4, 8)

    @pytest.mark.parametrize(
        ("text", "hint"),
        [
            ("sales.order", "did you mean sales.orders"),
            ("sale.items", "items?"),
            ("mytable", 'did you mean public."MyTable"?'),
            ("itmes", "items"),
            ("nowhere.orders", "orders"),
            ("summary", "public.summary is a view"),
            ("ext.settings", "an extension's"),
            ("zzzzzzzzzzzzzzzzzzzzzzz", "pgkeep show"),
        ],
    )
    def test_a_missing_table_gives_a_hint(self, text: str, hint: str) -> None:
        with pytest.raises(NotFoundError, match="the backup has no table") as caught:
            _select(self.toc, text)
        assert hint in caught.value.hint


class TestPrerequisites:
    toc = _toc(
        _entry(1, "SCHEMA", "lib", schema=None),
        _entry(2, "EXTENSION", "uuid-ossp", 1, schema=None),
        _entry(3, "TYPE", "mood", 1, 2, schema="lib"),
        _entry(4, "COMMENT", "TYPE mood", 3, schema="lib"),
        _entry(5, "TABLE", "t", 3, 3, 999),
        _entry(6, "TABLE DATA", "t", 5),
        _entry(7, "VIEW", "v", 5),
        _entry(8, "ACL", "TABLE t", 5),
    )

    def test_all_are_brought_with_their_comments(self) -> None:
        chosen = _select(self.toc, "t")
        assert chosen.dump_ids == (1, 2, 3, 4, 5, 6, 8)
        assert chosen.data_dump_ids == (6,)
        assert [(need.object, need.dump_ids) for need in chosen.prerequisites] == [
            (DatabaseObject("schema", "lib"), (1,)),
            (DatabaseObject("extension", '"uuid-ossp"'), (2,)),
            (DatabaseObject("type", "lib.mood"), (3, 4)),
        ]

    def test_nothing_is_needed_for_what_is_there(self) -> None:
        there = DatabaseObject("type", "lib.mood")
        chosen = _select(self.toc, "t", exists={there}.__contains__)
        assert chosen.dump_ids == (5, 6, 8)
        assert (chosen.prerequisites, chosen.present) == ((), (there,))

    def test_questions_hold_all_that_may_be_asked(self) -> None:
        asked = selection.questions(self.toc, [TableName(None, "t")])
        assert asked == {
            DatabaseObject("schema", "lib"),
            DatabaseObject("extension", '"uuid-ossp"'),
            DatabaseObject("type", "lib.mood"),
            DatabaseObject("table", "public.t"),
        }

    def test_the_list_is_what_pg_restore_reads(self) -> None:
        assert list_file(_select(self.toc, "t", exists=lambda _: True).dump_ids) == "5;\n6;\n8;\n"


def test_a_function_of_the_table_s_own_rows_is_no_endless_loop() -> None:
    toc = _toc(
        _entry(1, "TABLE", "t", 2),
        _entry(2, "FUNCTION", "f(public.t)", 1, definition=_FUNCTION.format("f")),
        _entry(3, "CHECK CONSTRAINT", "t c", 1, 2),
        _entry(4, "FUNCTION", "merely(public.t)", 1, definition=_FUNCTION.format("merely")),
    )
    assert _select(toc, "t").dump_ids == (1, 2, 3)


def test_a_table_that_is_only_needed_comes_without_rows() -> None:
    toc = _toc(
        _entry(1, "TABLE", "base"),
        _entry(2, "TABLE", "t", 1),
        _entry(3, "TABLE DATA", "base", 1),
        _entry(4, "TABLE DATA", "t", 2),
        _entry(5, "STATISTICS DATA", "base", 1),
        _entry(6, "POLICY", "base p", 1),
        _entry(7, "ROW SECURITY", "base", 1),
        _entry(8, "TABLE", "cousin", 1),
    )
    chosen = _select(toc, "t")
    assert chosen.dump_ids == (1, 2, 4, 6, 7)
    assert chosen.tables == (TableName("public", "t"),)
    assert chosen.prerequisites[0].dump_ids == (1, 6, 7)


class TestSequences:
    toc = _toc(
        _entry(1, "TABLE", "owner"),
        _entry(2, "SEQUENCE", "owner_id_seq", 1, definition="CREATE SEQUENCE public.owner_id_seq"),
        _entry(3, "SEQUENCE OWNED BY", "owner_id_seq", 2),
        _entry(4, "SEQUENCE SET", "owner_id_seq", 2),
        _entry(5, "TABLE", "borrower", 2),
        _entry(6, "TABLE", "identity"),
        _entry(7, "SEQUENCE", "i_seq", 6, definition="\nALTER TABLE public.identity ALTER COLUMN a ADD GENERATED"),
        _entry(8, "TABLE", "odd", 7),
        _entry(9, "DEFAULT", "owner id", 1, 2),
    )

    def test_an_owned_one_comes_with_its_table(self) -> None:
        assert _select(self.toc, "owner").dump_ids == (1, 2, 3, 4, 9)

    def test_a_borrowed_one_comes_without_its_owner(self) -> None:
        assert _select(self.toc, "borrower").dump_ids == (2, 4, 5)

    def test_a_borrowed_one_whose_owner_comes_too_is_owned(self) -> None:
        assert _select(self.toc, "borrower", "owner").dump_ids == (1, 2, 3, 4, 5, 9)

    def test_an_identity_s_needs_its_table(self) -> None:
        assert _select(self.toc, "odd").dump_ids == (6, 7, 8)


class TestForeignKeys:
    toc = _toc(
        _entry(1, "TABLE", "parent"),
        _entry(2, "TABLE", "child"),
        _entry(3, "CONSTRAINT", "parent pk", 1),
        _entry(4, "FK CONSTRAINT", "child to_parent", 2, 1, 3),
        _entry(5, "COMMENT", "CONSTRAINT to_parent ON child", 4),
        _entry(6, "FK CONSTRAINT", "child to_self", 2),
        _entry(
            7,
            "FK CONSTRAINT",
            "child to_unknown",
            2,
            definition='ALTER TABLE ONLY public.child ADD CONSTRAINT " REFERENCES x.y(" FOREIGN KEY (a) '
            'REFERENCES "Far"."away REFERENCES"(b);',
        ),
    )
    orphans = (
        OrphanedForeignKey("to_parent", TableName("public", "child"), TableName("public", "parent")),
        OrphanedForeignKey("to_unknown", TableName("public", "child"), TableName("Far", "away REFERENCES")),
    )

    def test_without_its_parent_it_is_named(self) -> None:
        chosen = _select(self.toc, "child")
        assert (chosen.dump_ids, chosen.orphaned_foreign_keys) == ((2, 6), self.orphans)

    def test_with_its_parent_it_is_brought(self) -> None:
        chosen = _select(self.toc, "child", "parent")
        assert (chosen.dump_ids, chosen.orphaned_foreign_keys) == ((1, 2, 3, 4, 5, 6), self.orphans[1:])

    def test_a_parent_in_the_target_will_do(self) -> None:
        chosen = _select(self.toc, "child", exists={DatabaseObject("table", "public.parent")}.__contains__)
        assert (chosen.dump_ids, chosen.orphaned_foreign_keys) == ((2, 4, 5, 6), self.orphans[1:])

    def test_the_parent_does_not_bring_its_children(self) -> None:
        assert _select(self.toc, "parent").dump_ids == (1, 3)

    def test_a_parent_without_rows_is_no_parent(self) -> None:
        toc = _toc(*self.toc.entries, _entry(8, "POLICY", "child p", 2, 1))
        assert _select(toc, "child").orphaned_foreign_keys == self.orphans


class TestPartitions:
    toc = _toc(
        _entry(1, "TABLE", "p"),
        _entry(2, "TABLE", "p1", 1, schema="other"),
        _entry(3, "TABLE", "p1a", 2),
        _entry(
            4, "TABLE ATTACH", "p1", 1, 2, schema="other", definition="ALTER TABLE ONLY public.p ATTACH PARTITION x;\n"
        ),
        _entry(5, "TABLE ATTACH", "p1a", 2, 3),
        _entry(6, "INDEX", "p_i", 1),
        _entry(7, "INDEX", "p1_i", 2, 6, schema="other"),
        _entry(8, "INDEX ATTACH", "p1_i", 1, 2, 6, 7, schema="other"),
        _entry(9, "TRIGGER", "p t", 1, definition="CREATE TRIGGER t"),
        _entry(10, "TRIGGER", "p1 t", 2, 9, schema="other", definition="\n\nALTER TABLE other.p1 DISABLE TRIGGER t"),
        _entry(11, "TABLE DATA", "p1a", 3),
    )

    def test_all_levels_come(self) -> None:
        chosen = _select(self.toc, "p")
        assert chosen.dump_ids == tuple(range(1, 12))
        assert [name.name for name in chosen.tables] == ["p", "p1", "p1a"]
        assert chosen.detached == ()

    @pytest.mark.parametrize("there", [True, False])
    def test_one_level_is_detached(self, there: bool) -> None:
        chosen = _select(self.toc, "p1", exists=lambda _: there)
        assert chosen.dump_ids == (2, 3, 5, 7, 11)
        (alone,) = chosen.detached
        assert alone == DetachedPartition(
            TableName("other", "p1"), TableName("public", "p"), "ALTER TABLE ONLY public.p ATTACH PARTITION x;"
        )


@pytest.mark.parametrize(
    "definition",
    [
        "CREATE TABLE public.p1 (\n    a integer\n);\nALTER TABLE ONLY public.p ATTACH PARTITION public.p1 DEFAULT;\n",
        "CREATE TABLE public.p1 PARTITION OF public.p\nDEFAULT;\n",
    ],
)
def test_a_partition_that_its_own_entry_attaches(definition: str) -> None:
    """As pg_dump wrote them before version 14."""
    toc = _toc(
        _entry(1, "TABLE", "p"),
        _entry(2, "TABLE", "p1", 1, definition=definition),
        _entry(3, "TABLE", "heir", 1, definition="CREATE TABLE public.heir (\n)\nINHERITS (public.p);\n"),
        _entry(4, "TABLE DATA", "p1", 2),
    )
    assert _select(toc, "p").dump_ids == (1, 2, 4)
    alone = _select(toc, "p1")
    assert (alone.dump_ids, alone.tables, alone.detached) == ((1, 2, 4), (TableName("public", "p1"),), ())
    assert _select(toc, "p1", exists=lambda _: True).dump_ids == (2, 4)


def test_parts_of_tables_whose_names_begin_alike() -> None:
    toc = _toc(
        _entry(1, "TABLE", "a"),
        _entry(2, "TABLE", "a b"),
        _entry(
            3, "RULE", "a b c", 1, 2, definition='CREATE RULE "b c" AS ON INSERT TO public.a DO ALSO ... public."a b"'
        ),
        _entry(4, "RULE", "a b c", 1, 2, definition='CREATE RULE c AS ON INSERT TO public."a b" DO ALSO ... public.a'),
        _entry(5, "POLICY", "a d", 1),
        _entry(6, "POLICY", "ax d", 1),
    )
    first, second = _select(toc, "a", exists=lambda _: True), _select(toc, '"a b"', exists=lambda _: True)
    assert (first.dump_ids, second.dump_ids) == ((1, 3, 5), (2, 4))


@pytest.mark.parametrize(
    ("description", "tag", "definition", "kind", "name"),
    [
        ("FUNCTION", "F (x(integer)", 'CREATE FUNCTION public."F (x"(a integer)', "function", '"F (x"(integer)'),
        ("AGGREGATE", "n(*)", "CREATE AGGREGATE public.n(*)", "function", "n()"),
        ("PROCEDURE", "p(text)", "CREATE OR REPLACE PROCEDURE public.p(", "function", "p(text)"),
        ("OPERATOR", "!", "CREATE OPERATOR public.! (\n    RIGHTARG = text\n);", "operator", "!(NONE,text)"),
        ("OPERATOR FAMILY", "f", "CREATE OPERATOR FAMILY public.f USING gin;", "operator family", "f USING gin"),
        ("MATERIALIZED VIEW", "m", "", "table", "m"),
        ("CONVERSION", "c", "", "conversion", "c"),
    ],
)
def test_what_to_ask_a_target(description: str, tag: str, definition: str, kind: str, name: str) -> None:
    entry = _entry(1, description, tag, definition=definition)
    assert selection.describe(entry) == DatabaseObject(kind, f"public.{name}")


def _large(count: int) -> Toc:
    tables = [_entry(number, "TABLE", f"t{number}", count + 1) for number in range(1, count + 1)]
    schema = _entry(count + 1, "SCHEMA", "public", schema=None)
    data = [_entry(count + 1 + number, "TABLE DATA", f"t{number}", number) for number in range(1, count + 1)]
    return _toc(*tables, schema, *data)


def _seconds(count: int) -> float:
    toc = _large(count)
    wanted = [entry.table_name for entry in toc.entries if entry.is_table]

    def once() -> float:
        started = time.process_time()
        selection.select(toc, wanted, exists=_nothing)
        return time.process_time() - started

    return min(once() for _ in range(3))


def test_time_grows_with_the_number_of_tables_and_not_with_its_square() -> None:
    assert _seconds(5_000) < 40 * max(_seconds(500), 0.001)
