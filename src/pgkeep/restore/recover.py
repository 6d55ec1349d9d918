"""Restore an artifact into PostgreSQL: preflight, rebuild, pg_restore, statistics, and the count of every row."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pgkeep.adapters import durable, lock, pgbinaries, postgres, process
from pgkeep.adapters.artifact_reader import ArtifactReader, File
from pgkeep.domain import loading
from pgkeep.domain import selection as selections
from pgkeep.domain import toc as tocs
from pgkeep.domain.artifact import LargeObjectsPart, Part, TablePart, codec
from pgkeep.domain.contents import disagreements
from pgkeep.domain.manifest import DatabaseFacts
from pgkeep.domain.selection import Selection
from pgkeep.errors import FormatError, RefusedError, RestoreError, ToolError
from pgkeep.progress import Progress
from pgkeep.restore import rows
from pgkeep.restore import target as targets
from pgkeep.restore.rebuild import Placed, batches, rebuild

POLL_SECONDS = 0.05
_ARCHIVE_PREFIX = "restore-"
_FINISHED = re.compile(r"finished item (\d+) TABLE DATA")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What to restore and how. ``tables`` as written by a person; none means all."""

    create: bool = False
    jobs: int | None = None
    tables: tuple[str, ...] = ()
    schema_only: bool = False
    data_only: bool = False
    no_owner: bool = False
    no_privileges: bool = False
    allow_non_empty: bool = False
    allow_missing_parents: bool = False

    @property
    def parallel_jobs(self) -> int:
        return self.jobs or min(len(os.sched_getaffinity(0)) * 2, 8)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, in seconds, and what a person should know of it."""

    database: str
    tables: int
    rows: int
    seconds: dict[str, float]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that was found out before anything is changed."""

    toc: tocs.Toc
    pg_restore: Path
    facts: targets.TargetFacts
    selection: Selection | None
    chosen_data: frozenset[int]

    def wants(self, part: Part) -> bool:
        """Whether the part's data is restored."""
        if self.selection is None:
            return True
        return isinstance(part, TablePart) and part.dump_id in self.chosen_data


def restore(
    file: File,
    target: postgres.Target,
    facts: DatabaseFacts | None,
    options: Options,
    scratch: Path,
    progress: Progress,
) -> Outcome:
    """Restore ``file`` into ``target``; ``facts`` are needed for ``create``. ``scratch`` holds the rebuilt archive.

    Raises ``RefusedError``, ``ToolError`` and ``FormatError`` (a damaged artifact) before anything is changed (a
    database made by ``create`` is gone again), ``RestoreError`` with the server's words after; ``DatabaseError``.
    """
    seconds: dict[str, float] = {}
    started = time.monotonic()
    reader = ArtifactReader(file)
    with scratch_directory(scratch) as directory, contextlib.ExitStack() as undo:
        plan = _prepare(reader, target, facts, options, progress, undo)

        def wanted(part: Part) -> bool:
            return not options.schema_only and plan.wants(part)

        with _timed(seconds, "rebuild"):
            _require_space(scratch, file, batches(reader, wanted))
            rebuild(reader, file, directory, wanted)
        progress.step("restore.rebuilt")
        undo.pop_all()
        with _timed(seconds, "load"):
            _load(directory, target, plan, options, reader, progress)
        progress.step("restore.loaded")
    notes = [] if options.data_only else list(_left_out(plan))
    parts = [part for part in reader.index.tables if plan.wants(part)]
    if not options.schema_only:
        with _timed(seconds, "analyze"):
            _analyze(target, plan, parts, options.parallel_jobs)
        with _timed(seconds, "count"):
            rows.check(target, rows.expectations(plan.toc, parts), options.parallel_jobs)
        progress.step("restore.counted")
    if options.create and facts is not None:
        # Last: one like default_transaction_read_only would be in our own way.
        notes += targets.apply_settings(target, facts)
    seconds["total"] = round(time.monotonic() - started, 3)
    restored = 0 if options.schema_only else sum(part.rows for part in parts)
    return Outcome(plan.facts.database, len(parts), restored, seconds, tuple(notes))


def sweep(scratch: Path) -> list[str]:
    """Remove what killed restores left there; what one under way holds stays. Returns the removed names."""
    left = [path for path in sorted(scratch.glob(_ARCHIVE_PREFIX + "*")) if path.is_dir() and not path.is_symlink()]
    removed = [path for path in left if lock.is_abandoned(path)]
    for path in removed:
        shutil.rmtree(path)
    return [path.name for path in removed]


@contextlib.contextmanager
def scratch_directory(scratch: Path) -> Iterator[Path]:
    """An empty directory for the block; :func:`sweep` removes it if the process is killed."""
    with tempfile.TemporaryDirectory(prefix=_ARCHIVE_PREFIX, dir=scratch) as directory, lock.in_use(Path(directory)):
        yield Path(directory)


def choose_pg_restore(dump_version: str, target_major: int) -> Path:
    """One that reads the dump and speaks the server's language: not older than the dump's, not newer than the server.

    Raises ``RefusedError`` for a server older than the dump, ``ToolError`` where no such program is installed.
    """
    leading = re.match(r"\d{1,4}", dump_version, re.ASCII)
    if leading is None:
        raise FormatError(f"{dump_version[:80]!r} is no version of pg_dump", "verify the backup")
    dump_major = int(leading[0])
    if dump_major > target_major:
        raise RefusedError(
            f"the backup was made by pg_dump {dump_version}; a server of version {target_major} can't read it",
            f"restore into PostgreSQL {dump_major} or later",
        )
    found = [each for each in pgbinaries.find_installations() if dump_major <= each.major <= target_major]
    fitting = sorted((each for each in found if each.has("pg_restore")), key=lambda each: each.major)
    if not fitting:
        raise ToolError(
            f"restoring needs a pg_restore of version {dump_major} to {target_major}, and none is installed",
            f"install postgresql-client-{target_major}",
        )
    return fitting[-1].tool("pg_restore")


def _prepare(
    reader: ArtifactReader,
    target: postgres.Target,
    facts: DatabaseFacts | None,
    options: Options,
    progress: Progress,
    undo: contextlib.ExitStack,
) -> _Plan:
    """Find out all that can be; what is made for that on the server is in ``undo``."""
    data = reader.toc()
    if data is None:
        raise FormatError("this is a backup of roles and tablespaces", "gunzip -c FILE | psql -d postgres")
    toc = tocs.read(data, codec(reader.index.header.encoding))
    lies = list(itertools.islice(disagreements(reader.index, toc), 5))
    if lies:
        raise FormatError("the backup contradicts itself: " + "; ".join(lies), "restore from another copy")
    server = targets.inspect_target(targets.maintenance(target) if options.create else target)
    pg_restore = choose_pg_restore(toc.dump_version, server.major)
    if options.create:
        if facts is None:
            raise RefusedError("without its manifest the database's encoding and locale are not known", _NO_FACTS_HINT)
        targets.create_database(target, facts)
        undo.callback(targets.drop_database, target)
        server = targets.inspect_target(target)
        progress.step("restore.database-created")
    elif not options.allow_non_empty and not options.data_only:
        targets.require_empty(target)
    selection = _select(toc, target, options)
    _require_roles(target, toc, selection, options)
    chosen_data = frozenset(selection.data_dump_ids if selection else ())
    return _Plan(toc, pg_restore, server, selection, chosen_data)


_NO_FACTS_HINT = "create the database yourself, then restore without --create"


def _require_roles(target: postgres.Target, toc: tocs.Toc, selection: Selection | None, options: Options) -> None:
    if options.no_owner or options.data_only:
        return
    chosen = toc.entries if selection is None else [toc.by_dump_id[dump_id] for dump_id in selection.dump_ids]
    missing = targets.missing_roles(target, (entry.owner for entry in chosen if entry.owner))
    if missing:
        raise RefusedError(
            f"the server lacks roles that own what is restored: {', '.join(missing[:10])}",
            "restore the roles first (active/globals/, gunzip -c FILE | psql -d postgres), or say --no-owner",
        )


def _select(toc: tocs.Toc, target: postgres.Target, options: Options) -> Selection | None:
    if not options.tables:
        return None
    wanted = [selections.parse_table_name(text) for text in options.tables]
    existing = targets.existing_objects(target, sorted(selections.questions(toc, wanted)))
    chosen = selections.select(toc, wanted, exists=existing.__contains__)
    in_the_way = [str(name) for name in chosen.tables if selections.DatabaseObject("table", str(name)) in existing]
    if in_the_way and not options.data_only:
        raise RefusedError(f"the target has {', '.join(in_the_way)} already", "drop or rename it, or restore elsewhere")
    if not options.data_only:
        _require_roots(toc, chosen)
    if chosen.orphaned_foreign_keys and not options.allow_missing_parents:
        named = "; ".join(
            f"{key.constraint} of {key.child} refers to {key.parent}" for key in chosen.orphaned_foreign_keys
        )
        parents = " ".join(f"--table '{key.parent}'" for key in chosen.orphaned_foreign_keys)
        raise RefusedError(
            f"foreign keys would be left without their parents: {named}",
            f"add {parents}, or say --allow-missing-parents to leave these keys out",
        )
    return chosen


def _require_roots(toc: tocs.Toc, chosen: Selection) -> None:
    """Rows that pg_dump sends through the root of a tree (hashed by an enum) have no other way into a partition."""
    tables = set(chosen.tables)
    for entry in map(toc.by_dump_id.__getitem__, chosen.data_dump_ids):
        loaded = entry.copy_target or entry.table_name
        if loaded != entry.table_name and loaded not in tables:
            raise RefusedError(
                f"the rows of {entry.table_name} are loaded through {loaded}, of which it is a partition",
                f"ask for --table '{loaded}': it brings all of its partitions",
            )


def _left_out(plan: _Plan) -> Iterator[str]:
    if plan.selection is None:
        return
    for key in plan.selection.orphaned_foreign_keys:
        yield f"left out: foreign key {key.constraint} of {key.child}, because {key.parent} is not there"
    for each in plan.selection.detached:
        yield f"{each.partition} is no partition of {each.parent} now; to attach it: {each.statement}"


def _require_space(scratch: Path, file: File, groups: Sequence[Sequence[Placed]]) -> None:
    """Tables are copied as they are; large objects become files of their own."""
    parts = [part for group in groups for _, part in group]
    needed_bytes = sum(part.raw_bytes if isinstance(part, LargeObjectsPart) else part.length for part in parts)
    if file.is_remote:
        needed_bytes += max((sum(part.length for _, part in group) for group in groups), default=0)
    if durable.free_bytes(scratch) < needed_bytes:
        raise RefusedError(
            f"rebuilding the archive takes {needed_bytes} bytes; {scratch} has {durable.free_bytes(scratch)} free",
            "set TMPDIR to a roomier place, or restore with gunzip -c FILE | psql",
        )


def _load(
    directory: Path,
    target: postgres.Target,
    plan: _Plan,
    options: Options,
    reader: ArtifactReader,
    progress: Progress,
) -> None:
    raw_bytes = {part.dump_id: part.raw_bytes for part in reader.index.tables if plan.wants(part)}
    command = _command(target, plan, options)
    for number, use_list in enumerate(_lists(directory, plan)):
        # All rows are loaded by the first run.
        _load_once([*command, *use_list, directory], target, plan, {} if number else raw_bytes, progress)


def _lists(directory: Path, plan: _Plan) -> Iterator[list[str]]:
    """The options that choose the entries of each run of pg_restore; they are one run or two."""
    chosen = loading.runs(plan.toc, plan.selection.dump_ids if plan.selection else None)
    if not chosen:
        yield []
    for number, dump_ids in enumerate(chosen):
        listing = directory / f"selection-{number}"
        listing.write_text(loading.list_file(dump_ids), encoding="ascii")
        yield [f"--use-list={listing}"]


def _load_once(
    command: Sequence[str | Path],
    target: postgres.Target,
    plan: _Plan,
    raw_bytes: Mapping[int, int],
    progress: Progress,
) -> None:
    with (
        postgres.tool_access(target) as (environment, descriptors),
        process.start(
            command,
            environment=environment,
            descriptors=descriptors,
            stdout=process.DEVNULL,
            death_signal=signal.SIGTERM,
        ) as running,
    ):
        done_bytes = position = 0
        while running.poll() is None:
            time.sleep(POLL_SECONDS)
            text, position = running.messages_from(position)
            done_bytes += sum(raw_bytes.get(int(number), 0) for number in _FINISHED.findall(text))
            if raw_bytes:
                progress.advance(done_bytes, sum(raw_bytes.values()))
        if running.wait() != 0:
            raise RestoreError(
                f"pg_restore failed: {_words(running.messages())}",
                f"the database {plan.facts.database!r} now holds part of the backup: drop it before another try",
            )


def _command(target: postgres.Target, plan: _Plan, options: Options) -> list[str | Path]:
    command: list[str | Path] = [
        plan.pg_restore,
        f"--dbname={_for_loading(target, plan, options).conninfo}",
        f"--jobs={options.parallel_jobs}",
        "--exit-on-error",
        "--no-password",
        "--verbose",
    ]
    flags = {
        "--schema-only": options.schema_only,
        "--data-only": options.data_only,
        "--no-owner": options.no_owner,
        "--no-privileges": options.no_privileges,
    }
    return command + [flag for flag, wanted in flags.items() if wanted]


def _for_loading(target: postgres.Target, plan: _Plan, options: Options) -> postgres.Target:
    """Rows alone must not meet triggers and foreign keys that are there already, where our rights allow that.

    Not --disable-triggers: that one enables afterwards what was disabled before, and forgets ENABLE ALWAYS.
    """
    if options.data_only and plan.facts.is_superuser:
        return target.with_setting("session_replication_role", "replica")
    return target


def _words(messages: str) -> str:
    """The error and what the server says of it, without the progress around it."""
    position = messages.find("pg_restore: error:")
    return messages[position:][:4000] if position >= 0 else messages[-2000:]


def _analyze(target: postgres.Target, plan: _Plan, parts: Sequence[TablePart], jobs: int) -> None:
    """Not needed where the planner's statistics came along with the dump (PostgreSQL 18)."""
    if any(entry.description == "STATISTICS DATA" for entry in plan.toc.entries):
        return
    only = None if plan.selection is None else [tocs.TableName(part.schema, part.name) for part in parts]
    targets.analyze(target, only, jobs)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block takes."""
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 3)
