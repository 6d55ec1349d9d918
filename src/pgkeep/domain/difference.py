"""What changed between two backups, read from their manifests alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pgkeep.domain.manifest import Manifest, TableStatistics


@dataclass(frozen=True, slots=True)
class TableDifference:
    """One table before and after; zeros stand for a table that is not there. Deltas are after less before.

    ``raw_bytes`` count COPY text. ``digest_only``: as many rows and bytes, other content (or another compressor).
    """

    schema: str
    name: str
    rows_before: int
    rows_after: int
    rows_delta: int
    raw_bytes_before: int
    raw_bytes_after: int
    raw_bytes_delta: int
    digest_only: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """From backup ``before_id`` to ``after_id``. Each list has the largest change first; sizes are in bytes.

    The totals are sums over tables, but for ``size_bytes_delta``, which is of the sealed files.
    ``tables_identical`` speaks of table content and the number of large objects, not of the schema around them.
    """

    before_id: str
    after_id: str
    tables_identical: bool
    added: tuple[TableDifference, ...]
    gone: tuple[TableDifference, ...]
    changed: tuple[TableDifference, ...]
    unchanged_count: int
    rows_delta: int
    raw_bytes_delta: int
    size_bytes_delta: int
    large_objects_delta: int
    notes: tuple[str, ...]


_Tables = dict[tuple[str, str], TableStatistics]


def compare(a: Manifest, b: Manifest) -> Difference:
    """How to get from ``a`` to ``b``. Any two may be compared; ``notes`` say where that means little."""
    before, after = _by_name(a), _by_name(b)
    common = before.keys() & after.keys()
    added = _largest_first(_from(None, after[key]) for key in after.keys() - common)
    gone = _largest_first(_from(before[key], None) for key in before.keys() - common)
    changed = _largest_first(_from(before[key], after[key]) for key in common if _differ(before[key], after[key]))
    large_objects_delta = b.large_objects - a.large_objects
    return Difference(
        before_id=a.id,
        after_id=b.id,
        tables_identical=not (added or gone or changed or large_objects_delta),
        added=added,
        gone=gone,
        changed=changed,
        unchanged_count=len(common) - len(changed),
        rows_delta=b.rows - a.rows,
        raw_bytes_delta=_raw_bytes(b) - _raw_bytes(a),
        size_bytes_delta=b.size_bytes - a.size_bytes,
        large_objects_delta=large_objects_delta,
        notes=_notes(a, b, any(table.digest_only for table in changed)),
    )


def _by_name(manifest: Manifest) -> _Tables:
    return {(table.schema, table.name): table for table in manifest.tables}


def _raw_bytes(manifest: Manifest) -> int:
    return sum(table.raw_bytes for table in manifest.tables)


def _differ(before: TableStatistics, after: TableStatistics) -> bool:
    return (before.rows, before.raw_bytes, before.digest) != (after.rows, after.raw_bytes, after.digest)


def _from(before: TableStatistics | None, after: TableStatistics | None) -> TableDifference:
    named = after or before
    if named is None:
        raise ValueError("a table is there before or after")
    rows_before, raw_bytes_before = (before.rows, before.raw_bytes) if before else (0, 0)
    rows_after, raw_bytes_after = (after.rows, after.raw_bytes) if after else (0, 0)
    return TableDifference(
        schema=named.schema,
        name=named.name,
        rows_before=rows_before,
        rows_after=rows_after,
        rows_delta=rows_after - rows_before,
        raw_bytes_before=raw_bytes_before,
        raw_bytes_after=raw_bytes_after,
        raw_bytes_delta=raw_bytes_after - raw_bytes_before,
        digest_only=bool(before and after) and (rows_before, raw_bytes_before) == (rows_after, raw_bytes_after),
    )


def _largest_first(tables: Iterable[TableDifference]) -> tuple[TableDifference, ...]:
    return tuple(sorted(tables, key=_size_of_change))


def _size_of_change(table: TableDifference) -> tuple[int, int, str, str]:
    return -abs(table.raw_bytes_delta), -abs(table.rows_delta), table.schema, table.name


def _notes(a: Manifest, b: Manifest, some_differ_by_digest_only: bool) -> tuple[str, ...]:
    notes = []
    if a.kind != b.kind:
        notes.append(f"different kinds: {a.kind} and {b.kind}")
    elif a.kind == "globals":
        notes.append("roles and tablespaces have no tables: nothing but the sizes is compared")
    if a.database != b.database:
        notes.append(f"different databases: {a.database!r} and {b.database!r}")
    if a.system_identifier != b.system_identifier:
        notes.append(f"different clusters: {a.system_identifier} and {b.system_identifier}")
    if a.created_at > b.created_at:
        notes.append("the first is the newer one: what was added since shows as gone")
    if some_differ_by_digest_only and a.pgkeep_version != b.pgkeep_version:
        notes.append("made by different versions of pgkeep: a digest may differ where the content does not")
    notes.extend(_repetitions(manifest) for manifest in (a, b) if len(_by_name(manifest)) != len(manifest.tables))
    return tuple(notes)


def _repetitions(manifest: Manifest) -> str:
    return f"{manifest.id} lists a table more than once: only the last entry of each is compared"
