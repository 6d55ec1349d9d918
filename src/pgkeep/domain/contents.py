"""The index against pg_dump's own table of contents: do both speak of the same data, under the same names?"""

from __future__ import annotations

from collections.abc import Iterator

from pgkeep.domain.artifact import Index
from pgkeep.domain.toc import Toc


def disagreements(index: Index, toc: Toc) -> Iterator[str]:
    """Each disagreement in words; none: every data file is there, once, and is what ``toc.dat`` says it is."""
    listed = {entry.filename: entry for entry in toc.entries if entry.is_table_data}
    tables = {table.file: table for table in index.tables}
    for name in sorted(listed.keys() - tables.keys(), key=str):
        yield f"the data of {listed[name].schema}.{listed[name].name} ({name}) is missing"
    for name in sorted(tables.keys() - listed.keys()):
        yield f"table {tables[name].schema}.{tables[name].name} ({name}) is not in the archive's contents"
    for name in sorted(tables.keys() & listed.keys()):
        table, entry = tables[name], listed[name]
        if (table.dump_id, table.schema, table.name) != (entry.dump_id, entry.schema or "", entry.name):
            named = f"table {table.schema}.{table.name} ({name})"
            yield f"{named} is {entry.schema}.{entry.name} in the archive's contents"
    yield from _large_objects(index, toc)


def _large_objects(index: Index, toc: Toc) -> Iterator[str]:
    listed = {entry.filename for entry in toc.entries if entry.is_large_objects}
    present = {part.file for part in index.large_objects}
    for name in sorted(listed - present, key=str):
        yield f"the large objects of {name} are missing"
    for name in sorted(present - listed):
        yield f"the large objects of {name} are not in the archive's contents"
