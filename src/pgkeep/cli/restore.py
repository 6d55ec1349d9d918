"""``pgkeep restore``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgkeep.cli import elsewhere, render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from pgkeep.adapters.artifact_reader import File
    from pgkeep.adapters.postgres import Target
    from pgkeep.domain.catalog import SealedBackup
    from pgkeep.domain.manifest import DatabaseFacts
    from pgkeep.progress import Progress
    from pgkeep.restore.recover import Options, Outcome
    from pgkeep.restore.sparse import SparseCopy


@dataclasses.dataclass(frozen=True, slots=True)
class _Chosen:
    """A backup that is open. ``name`` for people, ``path`` where it lies; ``facts`` what ``--create`` needs."""

    name: str
    path: str
    file: File
    facts: DatabaseFacts | None
    remote: SparseCopy | None = None


@click.command()
@click.argument("reference", metavar="ID|latest|PATH")
@click.option("--to", "to", required=True, metavar="TARGET",
              help="The database to restore into: a libpq URI or keyword string. What it leaves out comes from the"
              " environment (PGHOST, PGUSER, passfile, service file).")  # fmt: skip
@click.option(
    "--create",
    is_flag=True,
    help="Make the database that TARGET names, with the recorded encoding, locale and settings.",
)
@click.option(
    "--table",
    "tables",
    multiple=True,
    metavar="SCHEMA.NAME",
    help="Only this table, with its partitions, sequences, indexes and constraints. Repeatable; quote as in SQL.",
)
@click.option("--schema-only", is_flag=True, help="Definitions, no rows.")
@click.option("--data-only", is_flag=True, help="Rows, into tables that are there already.")
@click.option("--no-owner", is_flag=True, help="Everything belongs to the restoring role.")
@click.option("--no-privileges", is_flag=True, help="No GRANT, no REVOKE.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    help="Tables restored at the same time (default: twice the processors, at most 8).",
)
@click.option("--allow-non-empty", is_flag=True, help="Into a database that holds something already.")
@click.option("--allow-missing-parents", is_flag=True, help="Leave out foreign keys whose parent table is not there.")
@click.option("--database", metavar="NAME", help="Whose latest, where the vault holds several.")
@elsewhere.FROM
@click.option(
    "--password-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="The target's password."
)
@common_options
@pass_context
def command(
    context: Context,
    reference: str,
    to: str,
    create: bool,
    tables: tuple[str, ...],
    schema_only: bool,
    data_only: bool,
    no_owner: bool,
    no_privileges: bool,
    jobs: int | None,
    allow_non_empty: bool,
    allow_missing_parents: bool,
    database: str | None,
    source: str | None,
    password_file: Path | None,
) -> None:
    """Restore a backup into an empty or a new database, in parallel, and count every table's rows afterwards.

    \b
    Examples:
      pgkeep restore latest --to 'host=db user=app dbname=restored' --create
      pgkeep restore 20260131T00 --to postgresql://app@db/scratch --table shop.orders --table shop.customers
      pgkeep restore /mnt/usb/2026-01-31_00-00-00.sql.gz --to dbname=empty --no-owner
      pgkeep restore latest --from s3://backups/db1 --to dbname=scratch --create --table shop.orders

    From a destination (--from), only what is restored is fetched. One failing statement is a failure: exit code 8,
    with the server's words.
    """
    if schema_only and data_only:
        raise UsageError("--schema-only and --data-only exclude each other")
    if create and data_only:
        raise UsageError("--create makes an empty database: there is nothing for --data-only to fill")
    from pgkeep.restore.recover import Options

    options = Options(
        create=create,
        jobs=jobs,
        tables=tables,
        schema_only=schema_only,
        data_only=data_only,
        no_owner=no_owner,
        no_privileges=no_privileges,
        allow_non_empty=allow_non_empty,
        allow_missing_parents=allow_missing_parents,
    )
    with render.progress(quiet=context.json) as progress:
        target = _target(to, password_file, progress)
        opened = (
            _copy(context, source, reference, database, progress)
            if source is not None
            else _local(context, reference, database, with_facts=create, progress=progress)
        )
        with opened as chosen:
            _restore(context, chosen, target, options, progress)


@contextlib.contextmanager
def _local(
    context: Context, reference: str, database: str | None, *, with_facts: bool, progress: Progress
) -> Iterator[_Chosen]:
    """A backup of the vault, or a file anywhere."""
    from pgkeep.adapters.artifact_reader import LocalFile

    path, backup = context.services.locate(reference, database)
    for problem in backup.problems if backup else ():
        progress.warn(f"{path.name}: {problem}")
    with LocalFile.open(path) as file:
        yield _Chosen(path.name, str(path), file, _facts(path, backup) if with_facts else None)


@contextlib.contextmanager
def _copy(context: Context, source: str, reference: str, database: str | None, progress: Progress) -> Iterator[_Chosen]:
    """A copy at a destination, of which only what is looked at is fetched."""
    from pgkeep.restore import copies, fetch

    destination = elsewhere.destination(context, source)
    with destination.opened(to_read=True) as place:
        copy, defects = copies.find(place, reference, database, progress)
        elsewhere.warn((*place.warnings, *defects, *copy.backup.problems))
        with fetch.opened(place, copy, elsewhere.scratch(context), progress) as file:
            manifest = copy.backup.manifest
            path = elsewhere.place_of(destination.label, copy)
            yield _Chosen(manifest.filename, path, file, manifest.facts, file)


def _restore(context: Context, chosen: _Chosen, target: Target, options: Options, progress: Progress) -> None:
    from pgkeep.restore.recover import restore

    progress.note(f"restoring {chosen.name}")
    outcome = restore(chosen.file, target, chosen.facts, options, elsewhere.scratch(context), progress)
    for note in outcome.notes:
        progress.warn(note)
    if context.json:
        fetched = {} if chosen.remote is None else {"fetched_bytes": chosen.remote.fetched_bytes}
        render.print_json({"ok": True, "path": chosen.path, **_object(outcome), **fetched})
    summary = (
        f"{outcome.tables} tables, {outcome.rows} rows, counted and equal"
        if not options.schema_only
        else "definitions only"
    )
    text = f"restored {chosen.name} into {outcome.database} in {outcome.seconds['total']:.1f} s ({summary})"
    if chosen.remote is not None:
        text += f"; {render.size(chosen.remote.fetched_bytes)} fetched"
    click.echo(f"pgkeep: {render.printable(text)}", err=True)


def _target(to: str, password_file: Path | None, progress: Progress) -> Target:
    from pgkeep.adapters.durable import explain
    from pgkeep.adapters.postgres import Target

    password = None
    if password_file is not None:
        with explain(password_file, "reading the password"):
            password = password_file.read_text(encoding="utf-8").rstrip("\n")
    target = Target.parse(to, password)
    if target.password is not None and password is None and os.environ.get("PGPASSWORD") != target.password:
        progress.warn("the password in --to shows in the process list: use --password-file or a passfile")
    return target


def _facts(path: Path, backup: SealedBackup | None) -> DatabaseFacts | None:
    """What ``--create`` needs: from the catalog, or from a manifest beside the file."""
    from pgkeep.adapters.sidecars import read_sidecar
    from pgkeep.domain import manifest, names

    if backup is not None:
        return backup.manifest.facts
    try:
        sidecar = read_sidecar(path.with_name(path.name + names.MANIFEST_SUFFIX), manifest.SIZE_LIMIT_BYTES)
    except NotFoundError:
        return None
    return manifest.decode(sidecar).facts


def _object(outcome: Outcome) -> dict[str, object]:
    return {
        "database": outcome.database,
        "tables": outcome.tables,
        "rows": outcome.rows,
        "duration_seconds": outcome.seconds["total"],
        "seconds": outcome.seconds,
        "notes": list(outcome.notes),
    }
