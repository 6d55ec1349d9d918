"""``pgkeep vault move``."""

from __future__ import annotations

from pathlib import Path

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context


@click.command("move")
@click.argument("new_root", type=click.Path(path_type=Path, file_okay=False), metavar="NEW_ROOT")
@click.option("--allow-weaker", is_flag=True, help="Accept a filesystem that protects less than the present one.")
@click.option("--remove-old", is_flag=True, help="Lift the old place's flags and remove it, once all is done.")
@click.option("--wait", "wait_seconds", type=click.FloatRange(0), default=0.0, show_default=True, metavar="SECONDS",
              help="How long to wait for the vault to be stopped.")  # fmt: skip
@common_options
@pass_context
def command(context: Context, new_root: Path, allow_weaker: bool, remove_old: bool, wait_seconds: float) -> None:
    """Move the vault to NEW_ROOT, on any filesystem: backups, quarantine, state and logs, with its identity.

    Stop the services first. Every file is copied and read back, and protected as NEW_ROOT's filesystem can; then the
    vault is there, and the old place stays sealed but is no vault any more (--remove-old removes it). A move that was
    cut off is finished, or begun again, by the same command. staging/ and extracted/ are not the vault's and stay.

    \b
    Examples:
      pgkeep vault move /srv/new-disk/backups
      pgkeep vault move /srv/new-disk/backups --remove-old --json | jq -r .to
    """
    with render.progress(quiet=context.json) as progress:
        done = context.services.move_vault(
            new_root,
            allow_weaker=allow_weaker,
            remove_old=remove_old,
            progress=progress,
            wait_seconds=wait_seconds,
        )
    if context.json:
        render.print_json(
            {
                "ok": True,
                "id": done.id,
                "origin": str(done.origin),
                "to": str(done.to),
                "protection": done.protection,
                "left_behind": list(done.left_behind),
                "removed": done.removed,
                "left": list(done.left),
            }
        )
        return
    for text in done.left:
        _say(text)
    _say(f"the vault {done.id} is at {done.to} now (protection: {done.protection})")
    if not done.removed:
        _say(f"the old place stays sealed; `pgkeep vault move {done.to} --remove-old` removes it")
    _say(f"set PGKEEP_ROOT to {done.to}, or mount it where the old place was mounted")


def _say(text: str) -> None:
    click.echo(render.printable(f"pgkeep: {text}"), err=True)
