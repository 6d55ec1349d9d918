"""``pgkeep uninstall``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import UsageError

if TYPE_CHECKING:
    from pgkeep.vault.unseal import Removal


@click.command()
@click.option("--confirm", "identifier", metavar="VAULT_ID", help="Really do it, to the vault of this id.")
@click.option("--delete", is_flag=True, help="Remove active/, state/ and staging/ too. The logs stay.")
@click.option("--wait", "wait_seconds", type=click.FloatRange(0), default=0.0, show_default=True, metavar="SECONDS",
              help="How long to wait for the vault to be stopped.")  # fmt: skip
@common_options
@pass_context
def command(context: Context, identifier: str | None, delete: bool, wait_seconds: float) -> None:
    """Lift every immutable and append-only flag, so that `docker volume rm` and `rm -rf` work.

    Stop the services first. Without --confirm it says what it would do, and exits with 2. It is written to the audit
    log, as the last record. After it the backups are there, but nothing protects them any more.

    \b
    Examples:
      pgkeep uninstall
      pgkeep uninstall --confirm 0f1e2d3c4b5a69788796a5b4c3d2e1f0
      pgkeep uninstall --confirm 0f1e2d3c4b5a69788796a5b4c3d2e1f0 --delete --json
    """
    from pgkeep.vault import unseal

    if identifier is None:
        _refuse(context, unseal.survey(context.services.layout, delete=delete), delete)
    else:
        with render.progress(quiet=context.json) as progress:
            _report(
                context,
                context.services.uninstall(identifier, delete=delete, progress=progress, wait_seconds=wait_seconds),
            )


def _refuse(context: Context, planned: Removal, delete: bool) -> None:
    """Raises ``UsageError`` that says how to go on."""
    root = context.services.layout.root
    if not context.json:
        click.echo(f"The vault {planned.id} under {root} holds {planned.backups} backups. This would")
        click.echo(f"  lift every flag in {_named(planned.cleared)}")
        if planned.removed:
            click.echo(f"  remove {_named(planned.removed)} with all that is in them")
    again = f"pgkeep --root {root} uninstall --confirm {planned.id}{' --delete' if delete else ''}"
    raise UsageError(f"nothing was done: the vault {planned.id} is to be named", again)


def _report(context: Context, done: Removal) -> None:
    if context.json:
        document = {
            "ok": True,
            "id": done.id,
            "backups": done.backups,
            "cleared": [str(path) for path in done.cleared],
            "removed": [str(path) for path in done.removed],
            "left": list(done.left),
        }
        render.print_json(document)
        return
    for text in done.left:
        click.echo(render.printable(f"pgkeep: {text}"), err=True)
    what = (
        f"removed {_named(done.removed)}" if done.removed else f"nothing protects its {done.backups} backups any more"
    )
    click.echo(render.printable(f"pgkeep: vault {done.id}: {what}"), err=True)


def _named(paths: tuple[object, ...]) -> str:
    return render.printable(", ".join(map(str, paths)))
