"""``pgkeep cleanup``."""

from __future__ import annotations

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go and what would stay, and why.")
@click.option("--wait", "wait_seconds", type=click.FloatRange(0), default=600.0, show_default=True, metavar="SECONDS",
              help="How long to wait for another run to end.")  # fmt: skip
@common_options
@pass_context
def command(context: Context, dry_run: bool, wait_seconds: float) -> None:
    """Remove expired backups. Nothing goes before its time, and never the newest good ones, nor the newest that a
    required destination (PGKEEP_REQUIRED_DESTINATIONS) has not got yet.

    \b
    Examples:
      pgkeep cleanup --dry-run
      pgkeep cleanup --json | jq '.[] | select(.keep | not)'
    """
    with render.progress(quiet=context.json) as progress:
        services = context.services
        decisions = services.plan_cleanup() if dry_run else services.cleanup(progress, wait_seconds)
    if context.json:
        render.print_json(
            [
                {
                    "id": decision.backup.manifest.id,
                    "path": str(services.layout.active.absolute() / decision.backup.path_in_vault),
                    "keep": decision.keep,
                    "rule": decision.rule.value,
                    "reason": decision.reason,
                }
                for decision in decisions
            ]
        )
        return
    for decision in decisions:
        click.echo(render.printable(f"{decision.backup.path_in_vault}  {decision.reason}"))
    removed = sum(not decision.keep for decision in decisions)
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"pgkeep: {removed} {verb}, {len(decisions) - removed} kept", err=True)
