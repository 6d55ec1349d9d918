"""``pgkeep backup``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.domain.names import Tier

if TYPE_CHECKING:
    from pgkeep.domain.catalog import SealedBackup
    from pgkeep.progress import Progress


@click.command()
@click.argument("tiers", type=click.Choice([tier.value for tier in Tier]), nargs=-1, metavar="[TIER]...")
@click.option("--wait", "wait_seconds", type=click.FloatRange(0), default=600.0, show_default=True, metavar="SECONDS",
              help="How long to wait for another run to end.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Warnings and errors only.")
@common_options
@pass_context
def command(context: Context, tiers: tuple[str, ...], wait_seconds: float, quiet: bool) -> None:
    """Dump every configured database, check the dump, and seal it under TIER: hourly, daily, weekly, monthly, yearly
    or manual (the default). For several tiers it is dumped once, and the one file gets a name in each.

    Roles and tablespaces are sealed beside it under active/globals/. What has expired is removed afterwards.

    \b
    Examples:
      DB_HOST=db DB_NAME=app_db DB_USER=app DB_PASSWORD_FILE=/run/secrets/db_password pgkeep backup daily
      pgkeep backup daily weekly
      pgkeep backup manual --json | jq -r .path

    With --json: one object, the backup's; "backups" in it lists all that the run sealed.
    """
    chosen = [Tier(tier) for tier in dict.fromkeys(tiers)] or [Tier.MANUAL]
    with render.progress(quiet=quiet) as progress:
        run = context.services.backup(chosen, progress, wait_seconds)
        if context.services.settings.dump.verify_after:
            _verify(context, run.sealed, progress)
    if context.json and not run.failures:
        active = context.services.layout.active
        objects = [render.backup_object(backup, active) for backup in run.sealed]
        render.print_json({**objects[0], "backups": objects})
    for backup in run.sealed:
        click.echo(f"pgkeep: {render.printable(render.sealed_as(backup))}", err=True)
    for failure in run.failures[1:]:
        click.echo(f"pgkeep: {render.printable(f'{failure.subject}: {failure.error.message}')}", err=True)
    if run.failures:
        raise run.failures[0].error


def _verify(context: Context, sealed: tuple[SealedBackup, ...], progress: Progress) -> None:
    from pgkeep.errors import IntegrityError
    from pgkeep.vault.verify import verify_backup

    for backup in sealed:
        progress.note(f"verifying {backup.path_in_vault}")
        report = verify_backup(context.services.layout.active, backup, "content")
        if not report.ok:
            raise IntegrityError(f"{backup.path_in_vault} was sealed and is damaged: {report.findings[0].message}")
