"""After a restore: does every table hold as many rows as the backup says?"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from pgkeep.adapters import postgres
from pgkeep.domain.artifact import TablePart
from pgkeep.domain.toc import Entry, TableName, Toc
from pgkeep.errors import RestoreError


@dataclasses.dataclass(frozen=True, slots=True)
class Expectation:
    """How many rows ``table`` has to hold.

    ``with_partitions``: pg_dump loads some partitions through their root (those hashed by an enum, whose
    values another server may sort into other partitions): then only the sum over all of the root's can be compared.
    ``at_least``: there may be more (an extension's own rows; partitions that were not restored now).
    """

    table: TableName
    rows: int
    with_partitions: bool = False
    at_least: bool = False


def expectations(toc: Toc, parts: Sequence[TablePart]) -> list[Expectation]:
    """What the index promises, for the restored parts."""
    direct: list[Expectation] = []
    roots: set[TableName] = set()
    for part in parts:
        own = TableName(part.schema, part.name)
        loaded = toc.by_dump_id[part.dump_id].copy_target or own
        if loaded == own:
            direct.append(Expectation(own, part.rows, at_least=part.extension))
        else:
            roots.add(loaded)
    rows = {TableName(part.schema, part.name): part.rows for part in parts}
    return direct + [_of_tree(toc, root, rows) for root in sorted(roots)]


def _of_tree(toc: Toc, root: TableName, rows: Mapping[TableName, int]) -> Expectation:
    """All of a root's partitions together: its own rows may stand beside those that went through it."""
    with_rows = {entry.table_name for entry in toc.entries if entry.is_table_data}
    names = {entry.table_name for entry in _below(toc, root)} & with_rows
    total = sum(rows.get(name, 0) for name in names)
    return Expectation(root, total, with_partitions=True, at_least=not names <= rows.keys())


def _below(toc: Toc, root: TableName) -> Iterator[Entry]:
    """The partitions of a table, of these, and so on."""
    pending = [entry for entry in toc.entries if entry.is_table and entry.table_name == root]
    while pending:
        children = [child for _, child in toc.partitions.get(pending.pop().dump_id, ())]
        yield from children
        pending += children


def check(target: postgres.Target, expected: Sequence[Expectation], jobs: int) -> None:
    """Count, ``jobs`` tables at a time. Raises ``RestoreError`` naming what differs, ``DatabaseError``."""
    groups = [expected[start::jobs] for start in range(min(jobs, len(expected)))]
    with concurrent.futures.ThreadPoolExecutor(max(1, len(groups))) as threads:
        found = threads.map(lambda group: _differing(target, group), groups)
        differing = [text for texts in found for text in texts]
    if differing:
        raise RestoreError(
            "restored tables differ from the backup: " + "; ".join(differing[:10]),
            "a trigger, a rule or another session may have changed them",
        )


def _differing(target: postgres.Target, group: Sequence[Expectation]) -> list[str]:
    texts = []
    with postgres.connect(target) as connection:
        # A policy that hides rows would make the count a lie; this turns it into an error.
        connection.execute("SET row_security = off")
        any_bytes = postgres.accept_any_bytes(connection)
        for expected in group:
            scope = b"" if expected.with_partitions else b"ONLY "
            table = expected.table
            name = postgres.quoted_name(table.schema or "public", table.name, any_bytes=any_bytes)
            row = connection.execute(b"SELECT count(*) FROM " + scope + name).fetchone()
            rows = int(row[0]) if row else 0
            if rows < expected.rows if expected.at_least else rows != expected.rows:
                texts.append(f"{expected.table} has {rows} rows, the backup {expected.rows}")
    return texts
