"""``pgkeep agent``: the service that makes backups when they are due, and its single runs."""

from __future__ import annotations

import datetime as dt
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.domain.names import Tier
from pgkeep.errors import ConfigurationError, PgkeepError, RefusedError, UsageError

if TYPE_CHECKING:
    from pgkeep.agent.run import Failed, Result
    from pgkeep.agent.service import Service, Setup

_TERMINATED = 143
# A program does not hand these to its children by itself.
_SECRETS = ("DB_PASSWORD", "PGPASSWORD")
# Another try won't help against these: what may pass decides how a run with several failures ends.
_LASTING = (RefusedError, ConfigurationError, UsageError)


@click.group(invoke_without_command=True)
@common_options
@click.pass_context
def command(click_context: click.Context) -> None:
    """Make backups when they are due and hand them over to the vault. Runs until it is stopped.

    Tiers that are due at the same time share one dump. What was missed is made up for once; what fails is tried
    again after 1, 2, 4 … minutes. Each run is a process of its own.

    \b
    Examples:
      pgkeep agent                          the service
      pgkeep agent backup daily             one run, now
      pgkeep agent cleanup                  let the vault remove what has expired
    """
    if click_context.invoked_subcommand is None:
        _serve(click_context.ensure_object(Context))


@command.command()
@click.argument("tiers", type=click.Choice([tier.value for tier in Tier]), nargs=-1, metavar="[TIER]...")
@click.option("--wait", "wait_seconds", type=click.FloatRange(0), default=600.0, show_default=True, metavar="SECONDS",
              help="How long to wait for another run to end.")  # fmt: skip
@click.option("--since", type=click.DateTime(["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S.%f%z"]), hidden=True,
              help="Leave out what has a backup since then.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Warnings and errors only.")
@common_options
@pass_context
def backup(
    context: Context, tiers: tuple[str, ...], wait_seconds: float, since: dt.datetime | None, quiet: bool
) -> None:
    """Dump every configured database, hand the dumps over, and wait until the vault has sealed them.

    TIER: hourly, daily, weekly, monthly, yearly or manual (the default). The vault may give a backup another tier
    than asked for, and says why. If it does not answer in time (exit 12), the dump stays there for it.

    \b
    Examples:
      pgkeep agent backup daily
      pgkeep agent backup --json | jq -r '.backups[].path'
    """
    from pgkeep.agent import run

    chosen = [tier for tier in Tier if tier.value in tiers] or [Tier.MANUAL]
    with render.progress(quiet=quiet) as progress:
        try:
            result = run.back_up(context.services.agent(), chosen, progress, wait_seconds, since)
        except PgkeepError as error:
            if not context.json:
                raise
            result = run.Result((), (run.Failed("backup", error),), ())
    _show(context, result)


@command.command()
@common_options
@pass_context
def cleanup(context: Context) -> None:
    """Ask the vault to remove what has expired, and say what it did."""
    from pgkeep.agent import run

    with render.progress(quiet=context.json) as progress:
        outcome = run.ask_for_cleanup(context.services.agent(), progress)
    if context.json:
        render.print_json({"message": outcome.message})
    else:
        click.echo(render.printable(outcome.message))


@command.command(hidden=True)
@common_options
@pass_context
def check(context: Context) -> None:
    """Exit with 0 if the database lets us in."""
    from pgkeep.agent import run

    try:
        run.check_database(context.services.agent())
    except PgkeepError as error:
        # To the service, which says it in its log.
        render.print_json({"ok": False, "error": error.message, "hint": error.hint, "exit_code": error.exit_code})
        raise click.exceptions.Exit(error.exit_code) from None


def _serve(context: Context) -> None:
    try:
        _service(context).run()
    except SystemExit as ended:
        # To be stopped is how a service ends well.
        if ended.code != _TERMINATED:
            raise


def _service(context: Context) -> Service:
    from pgkeep.agent.cron_log import CronLog
    from pgkeep.agent.service import Service
    from pgkeep.cli.log import ServiceLog
    from pgkeep.watch import rights

    layout, form = context.services.layout, context.services.settings.log.format
    cron_log = CronLog(layout.logs / "cron.log", ServiceLog("agent", form).warn)
    log = ServiceLog("agent", form, cron_log.append)
    for warning in rights.warnings("agent", layout.active):
        log.warn(warning)
    return Service(_setup(context), log)


def _setup(context: Context) -> Setup:
    options = [("--root", context.root), ("--config", context.file)]
    given = [text for name, value in options if value is not None for text in (name, os.fspath(value))]
    secrets = {name: os.environ[name] for name in _SECRETS if name in os.environ}
    return context.services.agent_service([sys.executable, "-m", "pgkeep", *given], secrets)


def _show(context: Context, result: Result) -> None:
    failures = sorted(result.failures, key=lambda failed: isinstance(failed.error, _LASTING))
    if context.json:
        render.print_json(_document(context, result, failures))
        if failures:
            # The document says it all; an error would print a second one.
            raise click.exceptions.Exit(failures[0].error.exit_code)
    for sealed in result.sealed:
        _say(render.sealed_as(sealed))
    for label in result.skipped:
        _say(f"{label} has its backup already")
    for failed in failures[1:]:
        _say(f"{failed.subject}: {failed.error.message}")
    if failures:
        raise failures[0].error


def _document(context: Context, result: Result, failures: list[Failed]) -> dict[str, Any]:
    active = context.services.layout.active
    objects = [render.backup_object(sealed, active) for sealed in result.sealed]
    document: dict[str, Any] = {**(objects[0] if objects else {}), "backups": objects, "skipped": list(result.skipped)}
    if failures:
        error = failures[0].error
        document |= {"ok": False, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        document["failures"] = [
            {"subject": failed.subject, "error": failed.error.message, "exit_code": failed.error.exit_code}
            for failed in failures
        ]
    return document


def _say(text: str) -> None:
    click.echo(f"pgkeep: {render.printable(text)}", err=True)
