"""``pgkeep list``."""

from __future__ import annotations

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.domain import catalog
from pgkeep.domain.names import Tier


@click.command()
@click.option("--tier", type=click.Choice([tier.value for tier in Tier]), help="Only this tier.")
@click.option("--database", metavar="NAME", help="Only this database.")
@click.option("--globals", "with_globals", is_flag=True, help="Roles and tablespaces too.")
@common_options
@pass_context
def command(context: Context, tier: str | None, database: str | None, with_globals: bool) -> None:
    """List the sealed backups, oldest first.

    \b
    Examples:
      pgkeep list
      pgkeep list --tier daily --json | jq -r '.[-1].id'

    Exits with 7 if anything that is listed is not whole or not protected as it was, or can't be read.
    """
    found = context.services.catalog()
    backups = [
        backup
        for backup in catalog.ordered(found.backups)
        if (with_globals or backup.manifest.kind == "database")
        and tier in (None, backup.manifest.type.value)
        and database in (None, backup.manifest.database)
    ]
    if context.json:
        active = context.services.layout.active
        render.print_json([render.backup_object(backup, active) for backup in backups])
    else:
        _print(backups)
    problems = [f"{backup.path_in_vault}: {problem}" for backup in backups for problem in backup.problems]
    for text in (*problems, *found.defects):
        click.echo(f"pgkeep: warning: {render.printable(text)}", err=True)
    if problems or found.defects:
        raise click.exceptions.Exit(7)


def _print(backups: list[catalog.SealedBackup]) -> None:
    headings = ("ID", "TIER", "DATABASE", "SEALED", "SIZE", "TABLES", "ROWS", "PROTECTION", "STATE", "KEPT UNTIL")
    rows = [
        (
            backup.manifest.id,
            backup.manifest.type.value,
            backup.manifest.database if backup.manifest.kind == "database" else "(globals)",
            render.moment(backup.manifest.sealed_at),
            render.size(backup.manifest.size_bytes),
            str(len(backup.manifest.tables)),
            str(backup.manifest.rows),
            backup.manifest.protection,
            backup.state,
            render.moment(backup.manifest.retain_until),
        )
        for backup in backups
    ]
    if rows:
        render.print_table(headings, rows, frozenset({4, 5, 6}))
    else:
        click.echo("pgkeep: no backups yet", err=True)
