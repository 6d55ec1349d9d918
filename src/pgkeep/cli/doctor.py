"""``pgkeep doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import ConfigurationError

if TYPE_CHECKING:
    from pgkeep.adapters.privileges import Standing
    from pgkeep.watch.check import Check
    from pgkeep.watch.doctor import Role

FOUND_SOMETHING = 1
# The images set it, so that `docker exec CONTAINER pgkeep doctor` looks at what that container is for.
ROLE_VARIABLE = "BACKUP_ROLE"


@click.command()
@click.option("--role", type=click.Choice(["all", "agent", "vault", "extractor"]), default="all", show_default=True,
              envvar=ROLE_VARIABLE, show_envvar=True, help="The service to look at; all: in one process.")  # fmt: skip
@common_options
@pass_context
def command(context: Context, role: Role) -> None:
    """Look for what would keep a backup from being made, protected or restored, and say how to mend it.

    In a service's container it looks at what that service needs, and at what it must not be able to do.

    \b
    Examples:
      pgkeep doctor
      docker exec ontology-manager-backup-vault-1 pgkeep doctor
      DB_HOST=db DB_USER=app DB_NAME=app_db pgkeep doctor
      pgkeep doctor --json | jq -r '.checks[] | select(.status == "fail") | .message'

    Each line is ok, warn or fail. Exits with 1 if anything fails; warnings leave it at 0. Nothing is changed: the
    protection is tried on a file that is gone afterwards.
    """
    checks = _examine(context, role)
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    if context.json:
        render.print_json({"ok": not counts["fail"], "counts": counts, "checks": checks})
    else:
        for check in checks:
            _print(check)
    click.echo(f"pgkeep: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures", err=True)
    if counts["fail"]:
        raise click.exceptions.Exit(FOUND_SOMETHING)


def _examine(context: Context, role: Role) -> list[Check]:
    # All of it before rights are given up: the interpreter may lie where the vault's own user can't read.
    from pgkeep import wiring  # noqa: F401
    from pgkeep.adapters import privileges
    from pgkeep.watch import doctor

    started = privileges.standing()
    try:
        if role == "vault":
            return _examine_vault(context, started)
        services = context.services
    except ConfigurationError as error:
        return [doctor.configuration_fails(error), *doctor.machine_checks(role)]
    if role == "agent":
        return doctor.examine_agent(services.settings, services.target)
    if role == "extractor":
        return doctor.examine_extractor(services.settings, services.extractors())
    return doctor.examine(services.settings, services.target)


def _examine_vault(context: Context, started: Standing) -> list[Check]:
    """As the service does: its own user, with the right to set flags, which trying the protection takes."""
    from pgkeep.adapters import privileges
    from pgkeep.watch import doctor

    settings = context.loaded.settings
    if settings.vault.user is not None and started.uids[0] == 0:
        privileges.become(settings.vault.user)
    return doctor.examine_vault(settings, started)


def _print(check: Check) -> None:
    first, *others = check.message.splitlines() or [""]
    click.echo(f"{check.status:4}  {check.name}: {render.printable(first)}")
    for line in others:
        click.echo(f"      {render.printable(line)}")
    if check.remedy:
        click.echo(f"      -> {render.printable(check.remedy)}")
