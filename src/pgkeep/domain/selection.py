"""What a restore of single tables must bring: the archive's entries for them, and what these stand on.

An asked table comes whole: partitions, defaults, owned sequences, indexes, constraints, triggers, rules,
policies, statistics, comments, grants, rows. A *prerequisite* is anything else that one of these needs
(schema, type, function, ...), found by dependency; those that the target already has are left out. A table
that is only a prerequisite (an inheritance parent, a table that a policy reads) comes with its structure and
without its rows or partitions. What merely depends on an asked table (views, other tables) is not brought.

The dependencies are pg_dump's: what a PL/pgSQL body or a text in quotes refers to is in none of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pgkeep.domain.toc import Entry, TableName, Toc, qualify, quote_identifier
from pgkeep.errors import NotFoundError, UsageError

_SUGGESTIONS = 3
_SUGGESTION_LENGTH_DIFFERENCE = 4

# Possessive quantifiers: hostile text must not make the matching slow.
_PART = r'(?:"(?:[^"\x00]|"")++"|[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*+)'
_BLANK = r"[ \t\r\n\f\v]*+"
_NAME = rf"(?:({_PART}){_BLANK}\.{_BLANK})?({_PART})"
_WANTED = re.compile(rf"{_BLANK}{_NAME}{_BLANK}")
_FOLD = str.maketrans({chr(code): chr(code + 32) for code in range(ord("A"), ord("Z") + 1)})


@dataclass(frozen=True, order=True)
class DatabaseObject:
    """Something that a target may or may not have.

    ``kind``: schema, extension, type, function, table (views too), sequence, index, collation, operator, language,
    ... (else pg_dump's own word in lower case). ``name``: qualified and quoted as SQL, a function's with its
    argument types, an operator class's with its access method. ``existence_query`` looks them up.
    """

    kind: str
    name: str


@dataclass(frozen=True)
class Prerequisite:
    """Something that an asked table needs, absent from the target; with its own comments and grants."""

    object: DatabaseObject
    dump_ids: tuple[int, ...]


@dataclass(frozen=True, order=True)
class OrphanedForeignKey:
    """A foreign key of an asked table whose parent is neither asked for nor in the target. Left out."""

    constraint: str
    child: TableName
    parent: TableName


@dataclass(frozen=True, order=True)
class DetachedPartition:
    """An asked table whose parent is not restored with it: it comes as a table of its own.

    It then lacks what it has only as a partition (foreign keys and triggers of the parent); ``statement`` attaches it.
    """

    partition: TableName
    parent: TableName
    statement: str


@dataclass(frozen=True)
class Selection:
    """What to restore, in the archive's order.

    ``dump_ids``: all of it. ``data_dump_ids``: those of them with rows. ``tables``: asked for, and their partitions.
    ``present``: needed, but in the target already.
    """

    dump_ids: tuple[int, ...]
    data_dump_ids: tuple[int, ...]
    tables: tuple[TableName, ...]
    prerequisites: tuple[Prerequisite, ...]
    present: tuple[DatabaseObject, ...]
    detached: tuple[DetachedPartition, ...]
    orphaned_foreign_keys: tuple[OrphanedForeignKey, ...]


def parse_table_name(text: str) -> TableName:
    """``name``, ``schema.name``, ``"Sch ema"."We.ird"``: as in SQL, unquoted letters are folded to lower case.

    Raises ``UsageError``.
    """
    match = _WANTED.fullmatch(text)
    if match is None:
        hint = 'write schema.name; quote each part that is not a plain name: \'"My Schema"."my.table"\''
        raise UsageError(f"{text!r} is not a table's name", hint)
    return _matched_name(match)


def questions(toc: Toc, wanted: Iterable[TableName]) -> frozenset[DatabaseObject]:
    """Everything that :func:`select` may ask about, to be looked up in the target with one query.

    ``select(toc, wanted, exists=found.__contains__)`` then needs no further look. The asked tables are among them:
    one that is found would be in the restore's way. Raises as ``select`` does.
    """
    asked: set[DatabaseObject] = set()

    def note(thing: DatabaseObject) -> bool:
        asked.add(thing)
        return False

    tables = select(toc, wanted, exists=note).tables
    return frozenset(asked) | {DatabaseObject("table", str(name)) for name in tables}


def select(toc: Toc, wanted: Iterable[TableName], *, exists: Callable[[DatabaseObject], bool]) -> Selection:
    """Choose what the asked tables need; ``exists`` says whether the target has something already.

    Raises ``NotFoundError`` for a table that the archive does not hold, ``UsageError`` for an ambiguous name.
    """
    return _Chooser(toc, _with_partitions(toc, _resolve(toc, wanted)), exists).choose()


def describe(entry: Entry) -> DatabaseObject:
    """What to ask a target about an entry."""
    kind = _KINDS.get(entry.description, entry.description.lower())
    if kind == "function":
        return DatabaseObject(kind, _function_signature(entry))
    if kind == "operator":
        arguments = (re.search(rf"^ +{side} = (.+?),?$", entry.definition, re.M) for side in ("LEFTARG", "RIGHTARG"))
        types = ",".join(found.group(1) if found else "NONE" for found in arguments)
        return DatabaseObject(kind, f"{quote_identifier(entry.schema or 'public')}.{entry.name}({types})")
    if kind in ("operator class", "operator family"):
        method = re.search(rf"\bUSING ({_PART})", entry.definition)
        return DatabaseObject(kind, f"{qualify(entry.schema, entry.name)} USING {method.group(1) if method else '?'}")
    return DatabaseObject(kind, qualify(entry.schema, entry.name))


# What an object of each kind is called in ``existence_query``.
_KINDS = {
    "DOMAIN": "type",
    "SHELL TYPE": "type",
    "PROCEDURE": "function",
    "AGGREGATE": "function",
    "FOREIGN TABLE": "table",
    "VIEW": "table",
    "MATERIALIZED VIEW": "table",
    "PROCEDURAL LANGUAGE": "language",
}
_RELATIONS = frozenset({"TABLE", "FOREIGN TABLE", "VIEW", "MATERIALIZED VIEW"})
_OWNERS = _RELATIONS | {"DOMAIN"}

# Entries that belong to whatever they depend on.
_ADORNMENTS = frozenset({"COMMENT", "ACL", "SECURITY LABEL", "SEQUENCE SET"})
# Entries that belong to one table, and may mention others.
_TAGGED_BY_TABLE = frozenset(
    {"CONSTRAINT", "CHECK CONSTRAINT", "FK CONSTRAINT", "DEFAULT", "TRIGGER", "RULE", "POLICY"}
)
_PARTS = _TAGGED_BY_TABLE | {"INDEX", "STATISTICS", "ROW SECURITY", "SEQUENCE"}
_ROWS = frozenset({"TABLE DATA", "STATISTICS DATA", "EXTENDED STATISTICS DATA"})
# Never needed for themselves: they come with their table, or not at all.
_NEVER_NEEDED = (_PARTS - {"SEQUENCE"}) | _ADORNMENTS | _ROWS | {
    "TABLE ATTACH",
    "INDEX ATTACH",
    "SEQUENCE OWNED BY",
    "MATERIALIZED VIEW DATA",
    "BLOB",
    "BLOB METADATA",
    "BLOBS",
    "DATABASE",
}  # fmt: skip

# kind -> catalog, its columns' prefix; those with a schema, those without.
_IN_SCHEMA = {
    "type": ("pg_type", "typ"),
    "table": ("pg_class", "rel"),
    "sequence": ("pg_class", "rel"),
    "index": ("pg_class", "rel"),
    "function": ("pg_proc", "pro"),
    "collation": ("pg_collation", "coll"),
    "conversion": ("pg_conversion", "con"),
    "operator class": ("pg_opclass", "opc"),
    "operator family": ("pg_opfamily", "opf"),
    "text search configuration": ("pg_ts_config", "cfg"),
    "text search dictionary": ("pg_ts_dict", "dict"),
    "text search parser": ("pg_ts_parser", "prs"),
    "text search template": ("pg_ts_template", "tmpl"),
}
_WITHOUT_SCHEMA = {
    "schema": ("pg_namespace", "nsp"),
    "extension": ("pg_extension", "ext"),
    "language": ("pg_language", "lan"),
    "access method": ("pg_am", "am"),
    "server": ("pg_foreign_server", "srv"),
    "foreign data wrapper": ("pg_foreign_data_wrapper", "fdw"),
}
# Not to_regprocedure() and to_regoperator(): before version 16 they raise where an argument's type is missing.
_FURTHER = {
    "function": "reverse(asked.name) ^@ reverse('(' || oidvectortypes(proargtypes) || ')')",
    "operator class": "split_part(asked.name, ' USING ', 2) = (SELECT amname FROM pg_am WHERE oid = opcmethod)",
    "operator family": "split_part(asked.name, ' USING ', 2) = (SELECT amname FROM pg_am WHERE oid = opfmethod)",
}
_OPERATOR_EXISTS = (
    "EXISTS (SELECT FROM pg_operator WHERE asked.name = oprnamespace::regnamespace::text || '.' || oprname"
    " || '(' || CASE oprleft WHEN 0 THEN 'NONE' ELSE format_type(oprleft, NULL) END"
    " || ',' || format_type(oprright, NULL) || ')')"
)


def existence_query() -> str:
    """SQL that returns (kind, name) of those that the database has, for PostgreSQL 13 and later.

    Two parameters ``%s``: the kinds and the names, as arrays of equal length. Run it with an **empty search_path**:
    types are named relative to it. A kind that it does not know counts as absent.
    """
    found = {"operator": _OPERATOR_EXISTS}
    for kind, (catalog, prefix) in _IN_SCHEMA.items():
        conditions = f"{prefix}name = part[2] AND {prefix}namespace = to_regnamespace(quote_ident(part[1]))"
        further = f" AND {_FURTHER[kind]}" if kind in _FURTHER else ""
        found[kind] = f"EXISTS (SELECT FROM {catalog} WHERE {conditions}{further})"
    for kind, (catalog, prefix) in _WITHOUT_SCHEMA.items():
        found[kind] = f"EXISTS (SELECT FROM {catalog} WHERE {prefix}name = part[1])"
    cases = " ".join(f"WHEN '{kind}' THEN {condition}" for kind, condition in found.items())
    rows = "unnest(%s::text[], %s::text[]) AS asked(kind, name)"
    parts = "LATERAL (SELECT CASE WHEN asked.kind <> 'operator' THEN parse_ident(asked.name, false) END AS part) AS p"
    return " ".join(
        ("SELECT asked.kind, asked.name FROM", rows, "CROSS JOIN", parts, "WHERE CASE asked.kind", cases, "END")
    )


class _Chooser:
    """The state of one choice. ``_home`` maps each chosen entry to the table or prerequisite it came with."""

    def __init__(self, toc: Toc, asked: dict[int, Entry], exists: Callable[[DatabaseObject], bool]) -> None:
        self._toc = toc
        self._asked = asked
        self._attachments = {
            child.dump_id: (attach, toc.by_dump_id[parent])
            for parent, pairs in toc.partitions.items()
            for attach, child in pairs
            if attach is not child
        }
        self._exists = exists
        self._home: dict[int, int] = {}
        self._pending: list[Entry] = []
        self._needed: dict[int, DatabaseObject] = {}
        self._present: dict[int, DatabaseObject] = {}
        self._foreign_keys: list[tuple[Entry, Entry]] = []
        self._altered_triggers: list[tuple[Entry, Entry]] = []

    def choose(self) -> Selection:
        for table in self._asked.values():
            self._bring(table, table.dump_id)
        self._follow()
        detached = [alone for child in self._attachments if (alone := self._attach(child)) is not None]
        orphans = [orphan for key, child in self._foreign_keys if (orphan := self._tie(key, child)) is not None]
        return self._selection(detached, orphans)

    def _bring(self, entry: Entry, home: int) -> None:
        if entry.dump_id not in self._home:
            self._home[entry.dump_id] = home
            self._pending.append(entry)

    def _follow(self) -> None:
        while self._pending:
            entry = self._pending.pop()
            for dependent in self._toc.dependents.get(entry.dump_id, ()):
                self._consider(entry, dependent)
            for dump_id in dict.fromkeys(entry.dependencies):
                self._need(entry, dump_id)

    def _consider(self, entry: Entry, dependent: Entry) -> None:
        """Bring what belongs to a chosen entry."""
        home = self._home[entry.dump_id]
        if dependent.description in _ADORNMENTS:
            self._bring(dependent, home)
        elif dependent.description in _ROWS:
            if home in self._asked and (not dependent.is_table_data or _belongs(self._toc, dependent, entry)):
                self._bring(dependent, home)
        elif dependent.description in _PARTS and _belongs(self._toc, dependent, entry):
            self._bring_part(dependent, entry)

    def _bring_part(self, part: Entry, table: Entry) -> None:
        home = self._home[table.dump_id]
        if part.description == "FK CONSTRAINT":
            self._foreign_keys.append((part, table))
        elif part.description == "TRIGGER" and part.definition.lstrip().startswith("ALTER "):
            # A partition's trigger that differs from its parent's in being enabled: it exists once attached.
            self._altered_triggers.append((part, table))
        else:
            self._bring(part, home)
        if part.description == "SEQUENCE":
            for dependent in self._toc.dependents.get(part.dump_id, ()):
                if dependent.description == "SEQUENCE OWNED BY":
                    self._bring(dependent, home)

    def _need(self, entry: Entry, dump_id: int) -> None:
        """Bring what a chosen entry depends on, unless the target has it; then nothing below it is needed either."""
        needed = self._toc.by_dump_id.get(dump_id)
        if needed is None or dump_id in self._home or dump_id in self._present:
            return
        if needed.description in _NEVER_NEEDED or self._stands_alone(entry, needed):
            return
        found = describe(needed)
        if self._exists(found):
            self._present[dump_id] = found
        else:
            self._needed[dump_id] = found
            self._bring(needed, dump_id)

    def _stands_alone(self, entry: Entry, needed: Entry) -> bool:
        """Whether pg_dump recorded an order only: a partition's parent, the table that owns a sequence."""
        if entry.description == "SEQUENCE":
            return needed.description in _RELATIONS and not entry.definition.lstrip().startswith("ALTER TABLE")
        attachment = self._attachments.get(entry.dump_id)
        return attachment is not None and attachment[1].dump_id == needed.dump_id

    def _attach(self, child_id: int) -> DetachedPartition | None:
        """Attach a chosen partition to its parent, with its indexes, if that is restored, too."""
        if child_id not in self._home:
            return None
        attach, parent = self._attachments[child_id]
        child = self._toc.by_dump_id[child_id]
        if parent.dump_id not in self._home:
            # Not even to one in the target: attaching makes the indexes that the list makes later, and the rows live.
            statement = attach.definition.strip()
            return (
                DetachedPartition(child.table_name, parent.table_name, statement) if child_id in self._asked else None
            )
        self._add(attach, child_id)
        for dependent in self._toc.dependents[child_id]:
            if dependent.description == "INDEX ATTACH" and parent.dump_id in dependent.dependencies:
                self._add(dependent, child_id)
        for trigger, table in self._altered_triggers:
            if table is child:
                self._add(trigger, child_id)
        return None

    def _tie(self, key: Entry, child: Entry) -> OrphanedForeignKey | None:
        """Bring a foreign key whose parent will have its rows, else name it."""
        parent = _parent_of(self._toc, key, child)
        ids = [table.dump_id for table in self._toc.tables_among(key) if table.table_name == parent]
        found = any(dump_id in self._asked for dump_id in ids) or self._exists(DatabaseObject("table", str(parent)))
        # Two tables without rows can be tied, too.
        if found or (child.dump_id not in self._asked and any(dump_id in self._home for dump_id in ids)):
            self._add(key, self._home[child.dump_id])
            return None
        if child.dump_id not in self._asked:
            return None
        return OrphanedForeignKey(key.name.removeprefix(child.name + " "), child.table_name, parent)

    def _add(self, entry: Entry, home: int) -> None:
        """Bring something whose dependencies are settled, with its comments."""
        self._home[entry.dump_id] = home
        for dependent in self._toc.dependents.get(entry.dump_id, ()):
            if dependent.description in _ADORNMENTS:
                self._home[dependent.dump_id] = home

    def _selection(self, detached: list[DetachedPartition], orphans: list[OrphanedForeignKey]) -> Selection:
        chosen = [entry for entry in self._toc.entries if entry.dump_id in self._home]
        together: dict[int, list[int]] = {}
        for entry in chosen:
            together.setdefault(self._home[entry.dump_id], []).append(entry.dump_id)
        return Selection(
            dump_ids=tuple(entry.dump_id for entry in chosen),
            data_dump_ids=tuple(entry.dump_id for entry in chosen if entry.filename is not None),
            tables=tuple(entry.table_name for entry in chosen if entry.dump_id in self._asked),
            prerequisites=tuple(
                Prerequisite(self._needed[entry.dump_id], tuple(together[entry.dump_id]))
                for entry in chosen
                if entry.dump_id in self._needed
            ),
            present=tuple(sorted(self._present.values())),
            detached=tuple(sorted(detached)),
            orphaned_foreign_keys=tuple(sorted(orphans)),
        )


def _with_partitions(toc: Toc, tables: Iterable[Entry]) -> dict[int, Entry]:
    found: dict[int, Entry] = {}
    pending = list(tables)
    while pending:
        table = pending.pop()
        if table.dump_id not in found:
            found[table.dump_id] = table
            pending.extend(child for _, child in toc.partitions.get(table.dump_id, ()))
    return found


def _belongs(toc: Toc, part: Entry, table: Entry) -> bool:
    """Whether ``part``, which depends on ``table``, is that table's and not another's that it depends on, too."""
    owners = [
        owner
        for dump_id in dict.fromkeys(part.dependencies)
        if (owner := toc.by_dump_id.get(dump_id)) is not None and owner.description in _OWNERS and _may_own(owner, part)
    ]
    if len(owners) > 1:
        # Names with blanks ("a" and "a b") fit both: the table that a statement is about is mentioned first.
        owners.sort(key=lambda owner: _first_mention(part.definition, owner))
    return bool(owners) and owners[0] is table


def _may_own(owner: Entry, part: Entry) -> bool:
    if part.description in _TAGGED_BY_TABLE:
        return part.schema == owner.schema and part.name.startswith(owner.name + " ")
    if part.description in ("TABLE DATA", "ROW SECURITY"):
        return part.schema == owner.schema and part.name == owner.name
    return owner.description != "DOMAIN"


def _first_mention(definition: str, table: Entry) -> int:
    match = re.search(rf"(?<![\w$\".]){re.escape(str(table.table_name))}(?![\w$\"])", definition)
    return match.start() if match else len(definition)


def _parent_of(toc: Toc, key: Entry, child: Entry) -> TableName:
    """The table that a foreign key refers to: the other one among its dependencies, else by its definition."""
    others = [table for table in toc.tables_among(key) if table is not child]
    if len(others) == 1:
        return others[0].table_name
    for match in _REFERENCES.finditer(key.definition):
        if match.group(2) is not None:
            return _matched_name(match)
    return child.table_name


# Quoted names are stepped over, so that one that holds the word is not taken for it.
_REFERENCES = re.compile(rf'"(?:[^"]|"")*+"|\bREFERENCES {_NAME}')


def _matched_name(match: re.Match[str]) -> TableName:
    return TableName(None if match[1] is None else _unquote(match[1]), _unquote(match[2]))


def _unquote(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part.translate(_FOLD)


def _function_signature(entry: Entry) -> str:
    """The tag is name(types) with the name unquoted; the definition tells where the name ends."""
    match = re.match(rf"CREATE (?:OR REPLACE )?(?:FUNCTION|PROCEDURE|AGGREGATE) {_NAME}\(", entry.definition)
    name = _matched_name(match).name if match else entry.name.partition("(")[0]
    arguments = entry.name[len(name) :]
    return qualify(entry.schema, name) + ("()" if arguments == "(*)" else arguments)


def _resolve(toc: Toc, wanted: Iterable[TableName]) -> list[Entry]:
    tables: dict[str, dict[str | None, Entry]] = {}
    for entry in toc.entries:
        if entry.is_table:
            tables.setdefault(entry.name, {})[entry.schema] = entry
    return [_find(toc, tables, name) for name in wanted]


def _find(toc: Toc, tables: dict[str, dict[str | None, Entry]], wanted: TableName) -> Entry:
    schemas = tables.get(wanted.name, {})
    if wanted.schema is not None:
        schemas = {wanted.schema: schemas[wanted.schema]} if wanted.schema in schemas else {}
    if "public" in schemas:
        return schemas["public"]
    if not schemas:
        raise NotFoundError(f"the backup has no table {wanted}", _why_missing(toc, tables, wanted))
    if len(schemas) > 1:
        names = ", ".join(sorted(qualify(schema, wanted.name) for schema in schemas))
        raise UsageError(f"several tables are called {wanted}: {names}", "name the schema, too")
    return next(iter(schemas.values()))


def _why_missing(toc: Toc, tables: dict[str, dict[str | None, Entry]], wanted: TableName) -> str:
    for entry in toc.entries:
        if entry.name == wanted.name and wanted.schema in (None, entry.schema):
            if entry.description in ("VIEW", "MATERIALIZED VIEW", "SEQUENCE"):
                return f"{entry.table_name} is a {entry.description.lower()}: name the tables that it belongs to"
            if entry.is_table_data:
                return f"{entry.table_name} is an extension's: create the extension, its rows come with a full restore"
    near = _near_misses([str(TableName(schema, name)) for name in tables for schema in tables[name]], wanted)
    return f"did you mean {' or '.join(near)}?" if near else "pgkeep show lists the tables of a backup"


def _near_misses(names: Sequence[str], wanted: TableName) -> list[str]:
    """The most alike; difflib is slow, so that only names of about the same length are compared."""
    asked = str(wanted).replace('"', "").lower()
    forms: dict[str, str] = {}
    for name in names:
        plain = name.replace('"', "").lower()
        for form in (plain, plain.rpartition(".")[2]) if wanted.schema is None else (plain,):
            if abs(len(form) - len(asked)) <= _SUGGESTION_LENGTH_DIFFERENCE:
                forms.setdefault(form, name)
    close = difflib.get_close_matches(asked, forms, _SUGGESTIONS)
    if not close and wanted.schema is not None:
        return _near_misses(names, TableName(None, wanted.name))
    return list(dict.fromkeys(forms[form] for form in close))
