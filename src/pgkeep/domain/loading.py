"""In which runs of pg_restore an archive is loaded: one, or two where one could deadlock with itself.

pg_restore with several jobs knows which tables a foreign key locks, but not that attaching an index to a
partitioned one takes an exclusive lock on the partition's index. A foreign key of or to a partitioned table, made at
the same time, reads the partitions with their indexes, in the other order: about one restore in twelve of such a
database failed with "deadlock detected" (PostgreSQL 15). So the indexes are attached in a first run, and what may
come after them waits for a second.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pgkeep.domain.toc import Entry, Toc

_ATTACHES = "INDEX ATTACH"
# What pg_restore itself leaves to the end of a run (pg_backup_archiver.c, _tocEntryRestorePass), and what deadlocks.
_LATE = frozenset(
    {
        "ACL",
        "ACL LANGUAGE",
        "DEFAULT ACL",
        "EVENT TRIGGER",
        "FK CONSTRAINT",
        "MATERIALIZED VIEW DATA",
        "STATISTICS DATA",
    }
)


def runs(toc: Toc, wanted: Collection[int] | None) -> list[tuple[int, ...]]:
    """The dump ids for each run, in the archive's order; no runs at all: let pg_restore take everything in one.

    ``wanted`` None means all.
    """
    entries = [entry for entry in toc.entries if wanted is None or entry.dump_id in wanted]
    attached = max((place for place, entry in enumerate(entries) if entry.description == _ATTACHES), default=-1)
    if attached < 0 or not any(entry.description == "FK CONSTRAINT" for entry in entries):
        return [] if wanted is None else [tuple(entry.dump_id for entry in entries)]
    late = _with_dependents(toc, [entry for entry in entries[: attached + 1] if entry.description in _LATE])
    late |= {entry.dump_id for entry in entries[attached + 1 :]}
    ids = [entry.dump_id for entry in entries]
    return [tuple(each for each in ids if each not in late), tuple(each for each in ids if each in late)]


def list_file(dump_ids: Sequence[int]) -> str:
    """For ``pg_restore -L``: the dump id at the line's start is all that it reads; ``;`` begins a comment."""
    return "".join(f"{dump_id};\n" for dump_id in dump_ids)


def _with_dependents(toc: Toc, entries: list[Entry]) -> set[int]:
    found: set[int] = set()
    while entries:
        entry = entries.pop()
        if entry.dump_id not in found:
            found.add(entry.dump_id)
            entries += toc.dependents.get(entry.dump_id, ())
    return found
