"""One dump: pg_dump in parallel into the staging area, compressed behind its back, assembled, handed over."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pgkeep.adapters import clock, durable, pgbinaries, postgres, process
from pgkeep.adapters.artifact_writer import ArtifactWriter
from pgkeep.agent import blocking
from pgkeep.agent.assemble import RawDump, assemble
from pgkeep.agent.compress import Compressor, Pool
from pgkeep.agent.handover import Staged
from pgkeep.domain.manifest import DatabaseFacts
from pgkeep.domain.names import Tier
from pgkeep.domain.request import Request
from pgkeep.errors import DatabaseError, PgkeepError
from pgkeep.progress import Progress

POLL_SECONDS = 0.01
RETRY_PAUSE_SECONDS = 2.0
# Raw data may pile up when compression falls behind; beyond this share of the free space pg_dump compresses.
PLAIN_SPOOL_SHARE = 0.7
WARNING_SHARE_OF_INTERVAL = 0.5
# pg_dump's messages, under LC_MESSAGES=C, that another try may cure.
_LOST_LOCK = "could not obtain lock on relation"
# --lock-wait-timeout is a statement_timeout around LOCK TABLE, and is off for all other statements.
_LOCK_TIMEOUT = "canceling statement due to statement timeout"
_PASSING = (
    _LOST_LOCK,
    "canceling statement due to conflict with recovery",
    _LOCK_TIMEOUT,
    # Dropped by another session after pg_dump had read the catalog.
    '" does not exist',
    "could not open relation with OID",
    "cache lookup failed",
)
_REMEDIES = {
    _LOCK_TIMEOUT: "another session held a table for longer than BACKUP_LOCK_TIMEOUT: see pg_locks",
    "permission denied for large object": "only its owner and superusers may read it, unless the database has"
    " lo_compat_privileges on",
    "permission denied": "grant the role what it reads, e.g. pg_read_all_data",
    "row-level security policy": "give the role BYPASSRLS: with policies in force a dump would have holes",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How to dump. ``jobs`` None: as many as there are processors, four at the most.

    ``interval_seconds``: the time between two such dumps, to be warned when one takes up more than half of it.
    ``watch_blocking``: find out whether other sessions wait for the dump's locks.
    ``is_one_of_several``: the vault names files by their database too.
    """

    jobs: int | None = None
    spool_compression: Literal["auto", "always", "never"] = "auto"
    lock_timeout_seconds: int = 60
    retries: int = 2
    connect_timeout_seconds: int = 10
    interval_seconds: float | None = None
    watch_blocking: bool = False
    is_one_of_several: bool = False

    @property
    def parallel_jobs(self) -> int:
        return self.jobs or min(processors(), 4)


@dataclasses.dataclass(frozen=True, slots=True)
class _Subject:
    """The database to dump, as it was when asked."""

    target: postgres.Target
    application_name: str
    server: postgres.Server
    facts: DatabaseFacts
    pg_dump: pgbinaries.Choice
    watch: blocking.Sampler | None = None


def processors() -> int:
    """How many this process may use (a container's or taskset's share)."""
    return len(os.sched_getaffinity(0))


def dump_database(
    staged: Staged, target: postgres.Target, tiers: Sequence[Tier], options: Options, progress: Progress
) -> Request:
    """Dump ``target`` into ``staged`` and hand it over. Raises ``DatabaseError``, ``ToolError``, ``StorageError``."""
    started = time.monotonic()
    created_at = clock.now()
    subject = _inspect(target, f"pgkeep-{staged.identifier}", options)
    notes = _concerns(subject)
    for note in notes:
        progress.warn(note)
    with _watched(subject, options) as watch:
        notes += _with_retries(staged, dataclasses.replace(subject, watch=watch), options, progress)
    notes += watch.notes() if watch else []
    if late := _lateness(time.monotonic() - started, options.interval_seconds):
        progress.warn(late)
        notes.append(late)
    progress.step("dump.assembled")
    request = Request(
        id=staged.identifier,
        kind="database",
        tiers=tuple(tiers),
        database=subject.server.database,
        created_at=created_at,
        system_identifier=subject.server.system_identifier,
        server_version=subject.server.version,
        dump_version=subject.pg_dump.installation.version,
        dump_seconds=time.monotonic() - started,
        facts=subject.facts,
        notes=tuple(notes),
        is_one_of_several=options.is_one_of_several,
    )
    staged.hand_over(request)
    progress.step("dump.handed-over")
    return request


def dump_globals(
    staged: Staged, target: postgres.Target, tiers: Sequence[Tier], options: Options, progress: Progress
) -> Request:
    """Roles and tablespaces, which belong to no database; without password hashes where we may not read them."""
    started = time.monotonic()
    created_at = clock.now()
    notes = []
    with postgres.connect(target, timeout_seconds=options.connect_timeout_seconds) as connection:
        server = postgres.inspect_server(connection)
        pg_dumpall = pgbinaries.choose("pg_dumpall", server.major)
        # From --dbname pg_dumpall takes all but the name: it would connect to "postgres", where we may have no right.
        database = postgres.Target((("dbname", server.database),)).conninfo
        arguments = ["--globals-only", f"--database={database}", f"--lock-wait-timeout={options.lock_timeout_seconds}s"]
        if not postgres.may_read_passwords(connection):
            arguments.append("--no-role-passwords")
            notes.append("roles are without their passwords: the backup's role may not read pg_authid")
    completed = postgres.run_tool(pg_dumpall.path, arguments, target)
    if completed.return_code != 0:
        raise DatabaseError(f"pg_dumpall failed: {completed.stderr}")
    with staged.new_dump() as descriptor:
        writer = ArtifactWriter(descriptor)
        writer.add_sql([completed.stdout])
        writer.finish("globals", "UTF8")
    progress.step("dump.globals-written")
    request = Request(
        id=staged.identifier,
        kind="globals",
        tiers=tuple(tiers),
        database="",
        created_at=created_at,
        system_identifier=server.system_identifier,
        server_version=server.version,
        dump_version=pg_dumpall.installation.version,
        dump_seconds=time.monotonic() - started,
        notes=tuple(notes),
    )
    staged.hand_over(request)
    return request


def _inspect(target: postgres.Target, application_name: str, options: Options) -> _Subject:
    with postgres.connect(target, timeout_seconds=options.connect_timeout_seconds) as connection:
        postgres.refuse_transaction_pooling(target, connection)
        server = postgres.inspect_server(connection)
        facts = postgres.read_facts(connection, server.major)
    named = dict(target.database(server.database).parameters) | {"application_name": application_name}
    target = dataclasses.replace(target, parameters=tuple(named.items()))
    return _Subject(target, application_name, server, facts, pgbinaries.choose("pg_dump", server.major))


def _concerns(subject: _Subject) -> list[str]:
    concerns = []
    if subject.pg_dump.newer:
        version = subject.pg_dump.installation.version
        concerns.append(
            f"pg_dump {version} is newer than the server ({subject.server.version}):"
            f" the backup may not restore into a server older than {version.split('.')[0]}"
        )
    if subject.server.in_recovery:
        concerns.append("taken from a standby: unlogged tables have no rows there")
    return concerns


def _lateness(seconds: float, interval_seconds: float | None) -> str:
    if interval_seconds is None or seconds <= WARNING_SHARE_OF_INTERVAL * interval_seconds:
        return ""
    share = 100 * seconds / interval_seconds
    return f"the dump took {seconds:.0f} s: {share:.0f} % of the {interval_seconds:.0f} s between two that are due"


def _with_retries(staged: Staged, subject: _Subject, options: Options, progress: Progress) -> list[str]:
    """Dump, again if the failure is of a kind that passes; what had to be done differently comes back."""
    notes: list[str] = []
    for attempt in range(options.retries + 1):
        try:
            _dump_once(staged, subject, options, progress)
            return notes
        except DatabaseError as error:
            if attempt == options.retries or not any(words in error.message for words in _PASSING):
                raise
            if _LOST_LOCK in error.message:
                options = dataclasses.replace(options, jobs=1)
                notes.append("a parallel dump lost a lock to another session; it was made again with one job")
            else:
                notes.append("the first try failed and was repeated: " + error.message[:300])
            progress.warn(notes[-1])
            staged.clear()
            time.sleep(RETRY_PAUSE_SECONDS * (attempt + 1))
    raise AssertionError("unreachable")


def _dump_once(staged: Staged, subject: _Subject, options: Options, progress: Progress) -> None:
    raw = staged.directory / "raw"
    pool = Pool(staged.directory / "pool")
    try:
        with Compressor(raw, pool, processors()) as compressor:
            _run_pg_dump(raw, compressor, subject, options, progress)
            progress.step("dump.pg_dump-ended")
            tables = compressor.finish()
        progress.step("dump.compressed")
        pg_restore = subject.pg_dump.installation.tool("pg_restore")
        with staged.new_dump() as descriptor:
            assemble(RawDump(raw, pool, tables, subject.facts.encoding), pg_restore, descriptor)
    finally:
        pool.close()


def _run_pg_dump(raw: Path, compressor: Compressor, subject: _Subject, options: Options, progress: Progress) -> None:
    with postgres.tool_access(subject.target) as (environment, descriptors):
        command = _pg_dump_command(raw, subject, options)
        raw.mkdir(mode=0o700)
        with process.start(
            command,
            environment=environment,
            descriptors=descriptors,
            stdout=process.DEVNULL,
            death_signal=signal.SIGTERM,
        ) as running:
            progress.step("dump.pg_dump-started")
            for _ in _until_ended(running):
                compressor.sweep()
                progress.advance(compressor.taken_bytes, subject.server.data_bytes)
                if subject.watch and (alarm := subject.watch.alarm()):
                    progress.warn(alarm)
            if running.wait() != 0:
                raise _failure(running, raw)


def _watched(subject: _Subject, options: Options) -> contextlib.AbstractContextManager[blocking.Sampler | None]:
    if options.watch_blocking:
        return blocking.sampled(subject.target, subject.application_name)
    return contextlib.nullcontext()


def _until_ended(running: process.Running) -> Iterator[None]:
    while running.poll() is None:
        yield
        time.sleep(POLL_SECONDS)


def _failure(running: process.Running, raw: Path) -> PgkeepError:
    code, words = running.wait(), running.messages()
    # Only what pg_dump itself could not write: the server's own full disk comes with its word ERROR.
    if any(os.strerror(errno.ENOSPC) in line and "ERROR:" not in line for line in words.splitlines()):
        return durable.storage_error(OSError(errno.ENOSPC, ""), raw, "pg_dump's writing")
    how = f"was killed by signal {-code}" if code < 0 else f"failed (exit {code})"
    hint = next((remedy for part, remedy in _REMEDIES.items() if part in words), "the server's log may say more")
    return DatabaseError(f"pg_dump {how}: {words or 'without a word'}", hint)


def _pg_dump_command(raw: Path, subject: _Subject, options: Options) -> list[str | Path]:
    command: list[str | Path] = [
        subject.pg_dump.path,
        "--format=directory",
        f"--file={raw}",
        f"--jobs={options.parallel_jobs}",
        f"--compress={1 if _compresses_spool(raw.parent, subject, options) else 0}",
        f"--lock-wait-timeout={options.lock_timeout_seconds}s",
        "--no-sync",
        "--no-password",
        f"--dbname={subject.target.conninfo}",
    ]
    if subject.pg_dump.installation.major >= 18:
        command.append("--statistics")
    if subject.server.in_recovery:
        command.append("--no-unlogged-table-data")
    return command


def _compresses_spool(staging: Path, subject: _Subject, options: Options) -> bool:
    if options.spool_compression != "auto":
        return options.spool_compression == "always"
    return subject.server.data_bytes > PLAIN_SPOOL_SHARE * durable.free_bytes(staging)
