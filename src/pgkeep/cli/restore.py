"""``pgkeep restore``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from pgkeep.adapters.postgres import Target
    from pgkeep.domain.catalog import SealedBackup
    from pgkeep.domain.manifest import DatabaseFacts
    from pgkeep.progress import Progress
    from pgkeep.restore.recover import Options, Outcome


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
    password_file: Path | None,
) -> None:
    """Restore a backup into an empty or a new database, in parallel, and count every table's rows afterwards.

    \b
    Examples:
      pgkeep restore latest --to 'host=db user=app dbname=restored' --create
      pgkeep restore 20260131T00 --to postgresql://app@db/scratch --table shop.orders --table shop.customers
      pgkeep restore /mnt/usb/2026-01-31_00-00-00.sql.gz --to dbname=empty --no-owner

    One failing statement is a failure: exit code 8, with the server's words.
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
        _restore(context, reference, database, _target(to, password_file, progress), options, progress)


def _restore(
    context: Context, reference: str, database: str | None, target: Target, options: Options, progress: Progress
) -> None:
    from pgkeep.adapters.artifact_reader import LocalFile
    from pgkeep.restore.recover import restore

    path, backup = context.services.locate(reference, database)
    for problem in backup.problems if backup else ():
        progress.warn(f"{path.name}: {problem}")
    progress.note(f"restoring {path.name}")
    with LocalFile.open(path) as file:
        facts = _facts(path, backup) if options.create else None
        outcome = restore(file, target, facts, options, _scratch(context), progress)
    for note in outcome.notes:
        progress.warn(note)
    if context.json:
        render.print_json({"ok": True, "path": str(path), **_object(outcome)})
    summary = (
        f"{outcome.tables} tables, {outcome.rows} rows, counted and equal"
        if not options.schema_only
        else "definitions only"
    )
    text = f"restored {path.name} into {outcome.database} in {outcome.seconds['total']:.1f} s ({summary})"
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


def _scratch(context: Context) -> Path:
    """Where the archive is rebuilt: TMPDIR if it is set, else the staging area, which is made for large files."""
    staging = context.services.layout.staging
    if os.environ.get("TMPDIR") or not os.access(staging, os.W_OK | os.X_OK):
        return Path(tempfile.gettempdir())
    return staging


def _object(outcome: Outcome) -> dict[str, object]:
    return {
        "database": outcome.database,
        "tables": outcome.tables,
        "rows": outcome.rows,
        "duration_seconds": outcome.seconds["total"],
        "seconds": outcome.seconds,
        "notes": list(outcome.notes),
    }
