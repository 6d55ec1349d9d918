"""After a restore: does every table hold as many rows as the backup says?"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence

from pgkeep.adapters import postgres
from pgkeep.domain.artifact import TablePart
from pgkeep.domain.toc import TableName, Toc
from pgkeep.errors import RestoreError


@dataclasses.dataclass(frozen=True, slots=True)
class Expectation:
    """How many rows ``table`` has to hold.

    ``with_partitions``: pg_dump loads some partitions through their root (those hashed by an enum, whose
    values another server may sort into other partitions): then only the root's sum can be compared.
    ``at_least``: an extension brings rows of its own beside those that were dumped.
    """

    table: TableName
    rows: int
    with_partitions: bool = False
    at_least: bool = False


def expectations(toc: Toc, parts: Sequence[TablePart]) -> list[Expectation]:
    """What the index promises, for the restored parts."""
    entries = {entry.dump_id: entry for entry in toc.entries if entry.is_table_data}
    direct: list[Expectation] = []
    through_root: dict[TableName, int] = {}
    for part in parts:
        own = TableName(part.schema, part.name)
        loaded = entries[part.dump_id].copy_target or own
        if loaded == own:
            direct.append(Expectation(own, part.rows, at_least=part.extension))
        else:
            through_root[loaded] = through_root.get(loaded, 0) + part.rows
    return direct + [Expectation(root, rows, with_partitions=True) for root, rows in through_root.items()]


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
    from psycopg import sql

    texts = []
    with postgres.connect(target) as connection:
        # A policy that hides rows would make the count a lie; this turns it into an error.
        connection.execute("SET row_security = off")
        for expected in group:
            scope = sql.SQL("" if expected.with_partitions else "ONLY ")
            name = sql.Identifier(expected.table.schema or "public", expected.table.name)
            row = connection.execute(sql.SQL("SELECT count(*) FROM {}{}").format(scope, name)).fetchone()
            rows = int(row[0]) if row else 0
            if rows < expected.rows if expected.at_least else rows != expected.rows:
                texts.append(f"{expected.table} has {rows} rows, the backup {expected.rows}")
    return texts
