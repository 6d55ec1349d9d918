"""``pgkeep extractor``: the service that copies sealed backups outside, and its single passes."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import PgkeepError

if TYPE_CHECKING:
    from pgkeep.extractor.copies import Failure
    from pgkeep.extractor.work import Report

_WAIT = click.option("--wait", "wait_seconds", type=click.FloatRange(0), default=600.0, show_default=True,
                     metavar="SECONDS", help="How long to wait for a pass that is under way.")  # fmt: skip


@click.group(invoke_without_command=True)
@common_options
@click.pass_context
def command(click_context: click.Context) -> None:
    """Copy sealed backups to the external destination, and look after the copies. Runs until it is stopped.

    Each copy is verified against its manifest while it is made, read back from the destination, and appears there
    as TIER/YYYY-MM-DD/FILE when it is whole. Copies that go missing or are damaged are made anew as long as the
    vault has the original. Nothing outside is ever deleted or overwritten.

    \b
    Examples:
      pgkeep extractor                            the service: a pass every CHECK_INTERVAL seconds
      pgkeep extractor once                       one pass, then return
      EXTERNAL_DIRECTORY=/mnt/nas pgkeep extractor once --json | jq .extracted
      pgkeep extractor adopt                      this destination is new, on purpose
    """
    if click_context.invoked_subcommand is None:
        _serve(click_context.ensure_object(Context))


@command.command()
@_WAIT
@click.option("--quiet", is_flag=True, help="Warnings and errors only.")
@common_options
@pass_context
def once(context: Context, wait_seconds: float, quiet: bool) -> None:
    """Run one pass and return; while the service is in one, wait for its end first.

    Exits with 0, or with the code of the first thing that went wrong.

    \b
    Examples:
      pgkeep extractor once
      pgkeep extractor once --json | jq -r '.troubles[].message'
    """
    with render.progress(quiet=quiet) as progress:
        report = context.services.extractor().run_pass(progress, wait_seconds)
    first = next((failure.error for failure in report.troubles), None)
    if context.json:
        render.print_json(_document(report))
        if first is not None:
            # The document says it all; an error would print a second one.
            raise click.exceptions.Exit(first.exit_code)
        return
    if not quiet:
        _print(report)
    for failure in report.troubles[1:]:
        click.echo(f"pgkeep: {render.printable(_named(failure))}", err=True)
    if first is not None:
        raise first


@command.command()
@_WAIT
@common_options
@pass_context
def adopt(context: Context, wait_seconds: float) -> None:
    """Take what is mounted at the destination now for the destination, as it is.

    For a disk that was replaced, a share that is deliberately a new one, or one of several that take turns. Copies
    there are recognised by their digests. Copies that are missing or damaged for good (the vault has no original any
    more) are accepted as lost. Recorded in the audit log.

    \b
    Examples:
      pgkeep extractor adopt && pgkeep extractor once
    """
    with render.progress(quiet=context.json) as progress:
        extractor = context.services.extractor()
        identifier = extractor.adopt(progress, wait_seconds)
    if context.json:
        render.print_json({"ok": True, "destination": extractor.destination.label, "id": identifier})
    else:
        click.echo(f"pgkeep: {extractor.destination.label} is the destination now ({identifier})", err=True)


def _serve(context: Context) -> None:
    from pgkeep.cli.log import ServiceLog
    from pgkeep.extractor.daemon import Service
    from pgkeep.watch import rights

    settings = context.services.settings
    log = ServiceLog("extractor", settings.log.format)
    for warning in rights.warnings("extractor", context.services.layout.active):
        log.warn(warning)
    try:
        Service(context.services.extractor(), log, settings.extractor.check_interval_seconds).run()
    except SystemExit as ending:
        if ending.code != 128 + signal.SIGTERM:
            raise
        # Asked to stop, and stopped as it should: no failure for whoever started it.
        log.note("stopped")


def _document(report: Report) -> dict[str, Any]:
    return {
        "ok": not report.troubles,
        "destination": report.destination,
        "extracted": report.extracted,
        "repaired": report.repaired,
        "adopted": report.adopted,
        "rechecked": report.rechecked,
        "troubles": [
            {
                "path": failure.path or None,
                "message": failure.error.message,
                "hint": failure.error.hint,
                "exit_code": failure.error.exit_code,
                "lost": failure in report.lost,
            }
            for failure in report.troubles
        ],
    }


def _print(report: Report) -> None:
    counts = {
        "copied": len(report.extracted),
        "repaired": len(report.repaired),
        "recognised": len(report.adopted),
        "read again": len(report.rechecked),
        "failed": len(report.failures),
        "lost": len(report.lost),
    }
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "nothing to do"
    click.echo(f"pgkeep: {render.printable(report.destination)}: {said}", err=True)


def _named(failure: Failure) -> str:
    error: PgkeepError = failure.error
    return f"{failure.path}: {error.message}" if failure.path else error.message
