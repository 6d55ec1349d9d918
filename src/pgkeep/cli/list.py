"""``pgkeep list``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from pgkeep.cli import elsewhere, render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.domain import catalog
from pgkeep.domain.names import GLOBALS_DIRECTORY, Tier

if TYPE_CHECKING:
    from pgkeep.restore.copies import Copy


@click.command()
@click.option("--tier", type=click.Choice([tier.value for tier in Tier]), help="Only this tier.")
@click.option("--database", metavar="NAME", help="Only this database.")
@click.option("--globals", "with_globals", is_flag=True, help="Roles and tablespaces too.")
@elsewhere.FROM
@common_options
@pass_context
def command(context: Context, tier: str | None, database: str | None, with_globals: bool, source: str | None) -> None:
    """List the sealed backups, oldest first.

    \b
    Examples:
      pgkeep list
      pgkeep list --tier daily --json | jq -r '.[-1].id'
      pgkeep list --from s3://backups/db1

    Exits with 7 if anything that is listed is not whole or not protected as it was, or can't be read.
    """

    def is_wanted(backup: catalog.SealedBackup) -> bool:
        return (
            (with_globals or backup.manifest.kind == "database")
            and tier in (None, backup.manifest.type.value)
            and database in (None, backup.manifest.database)
        )

    if source is not None:
        _list_copies(context, source, tier, is_wanted)
        return
    found = context.services.catalog()
    backups = [backup for backup in catalog.ordered(found.backups) if is_wanted(backup)]
    if context.json:
        active = context.services.layout.active
        render.print_json([render.backup_object(backup, active) for backup in backups])
    else:
        _print(backups)
    _warn([f"{backup.path_in_vault}: {problem}" for backup in backups for problem in backup.problems], found.defects)


def _list_copies(
    context: Context, source: str, tier: str | None, is_wanted: Callable[[catalog.SealedBackup], bool]
) -> None:
    from pgkeep.restore.copies import FOLDERS, read_copies

    folders = FOLDERS if tier is None else (tier, GLOBALS_DIRECTORY)
    destination = elsewhere.destination(context, source)
    with render.progress(quiet=context.json) as progress, destination.opened(to_read=True) as place:
        found = read_copies(place, progress, folders)
        elsewhere.warn(place.warnings)
    copies = [copy for copy in found.found if is_wanted(copy.backup)]
    if context.json:
        render.print_json([elsewhere.copy_object(copy, destination.label) for copy in copies])
    else:
        _print_copies(copies)
    _warn([f"{copy.path}: {problem}" for copy in copies for problem in copy.backup.problems], found.defects)


def _warn(problems: Sequence[str], defects: Sequence[str]) -> None:
    for text in (*problems, *defects):
        click.echo(f"pgkeep: warning: {render.printable(text)}", err=True)
    if problems or defects:
        raise click.exceptions.Exit(7)


def _print(backups: Sequence[catalog.SealedBackup]) -> None:
    headings = ("ID", "TIER", "DATABASE", "SEALED", "SIZE", "TABLES", "ROWS", "PROTECTION", "STATE", "KEPT UNTIL")
    rows = [
        (*_cells(backup), backup.manifest.protection, backup.state, render.moment(backup.manifest.retain_until))
        for backup in backups
    ]
    _print_table(headings, rows)


def _print_copies(copies: Sequence[Copy]) -> None:
    """Without the protection in the vault: it does not reach there."""
    headings = ("ID", "TIER", "DATABASE", "SEALED", "SIZE", "TABLES", "ROWS", "STATE", "KEPT IN THE VAULT UNTIL")
    rows = [
        (*_cells(copy.backup), elsewhere.state(copy), render.moment(copy.backup.manifest.retain_until))
        for copy in copies
    ]
    _print_table(headings, rows)


def _cells(backup: catalog.SealedBackup) -> tuple[str, ...]:
    manifest = backup.manifest
    return (
        manifest.id,
        manifest.type.value,
        manifest.database if manifest.kind == "database" else "(globals)",
        render.moment(manifest.sealed_at),
        render.size(manifest.size_bytes),
        str(len(manifest.tables)),
        str(manifest.rows),
    )


def _print_table(headings: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    if rows:
        render.print_table(headings, rows, frozenset({4, 5, 6}))
    else:
        click.echo("pgkeep: no backups yet", err=True)
