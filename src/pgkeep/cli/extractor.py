"""``pgkeep extractor``: the service that copies sealed backups outside, and its single passes."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Any

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import NotFoundError, PgkeepError, UsageError

if TYPE_CHECKING:
    from pgkeep.extractor.extract import Extractor
    from pgkeep.extractor.work import Report
    from pgkeep.progress import Progress

_DONE = ("extracted", "repaired", "adopted", "rechecked", "expired")
_WAIT = click.option("--wait", "wait_seconds", type=click.FloatRange(0), default=600.0, show_default=True,
                     metavar="SECONDS", help="How long to wait for a pass that is under way.")  # fmt: skip


@click.group(invoke_without_command=True)
@common_options
@click.pass_context
def command(click_context: click.Context) -> None:
    """Copy sealed backups to every destination, and look after the copies. Runs until it is stopped.

    Each copy is verified against its manifest while it is made, read back from the destination, and appears there
    as TIER/YYYY-MM-DD/FILE when it is whole. Copies that go missing or are damaged are made anew as long as the
    vault has the original. Nothing outside is ever overwritten, nor deleted unless that destination has a retention
    policy of its own. A destination that fails keeps no other from being served.

    \b
    Examples:
      pgkeep extractor                            the service: a pass every CHECK_INTERVAL seconds
      pgkeep extractor once                       one pass to each destination, then return
      pgkeep extractor once --destination s3
      EXTERNAL_DIRECTORY=/mnt/nas pgkeep extractor once --json | jq '.destinations[].extracted'
      pgkeep extractor adopt external             this destination is new, on purpose
    """
    if click_context.invoked_subcommand is None:
        _serve(click_context.ensure_object(Context))


@command.command()
@click.option("--destination", "names", multiple=True, metavar="NAME", help="Only this one; may be given repeatedly.")
@_WAIT
@click.option("--quiet", is_flag=True, help="Warnings and errors only.")
@common_options
@pass_context
def once(context: Context, names: tuple[str, ...], wait_seconds: float, quiet: bool) -> None:
    """Run one pass to each destination and return; while the service is in one, wait for its end first.

    Exits with 0, or with the code of the first thing that went wrong, once all destinations were tried.

    \b
    Examples:
      pgkeep extractor once
      pgkeep extractor once --destination s3 --destination external
      pgkeep extractor once --json | jq -r '.destinations[] | .name + ": " + (.troubles[].message)'
    """
    with render.progress(quiet=quiet) as progress:
        passes = [_pass(each, progress, wait_seconds) for each in _chosen(context, names)]
    errors = [(each, path, error) for each in passes for path, error, _ in each.troubles]
    if context.json:
        render.print_json({"ok": not errors, "destinations": [_document(each) for each in passes]})
        if errors:
            # The document says it all; an error would print a second one.
            raise click.exceptions.Exit(errors[0][2].exit_code)
        return
    if not quiet:
        for each in passes:
            _print(each)
    for made, path, error in errors[1:]:
        where = f"{made.name}: " if len(passes) > 1 else ""
        click.echo(f"pgkeep: {render.printable(where + (f'{path}: ' if path else '') + error.message)}", err=True)
    if errors:
        raise errors[0][2]


@command.command()
@click.argument("name", required=False)
@_WAIT
@common_options
@pass_context
def adopt(context: Context, name: str | None, wait_seconds: float) -> None:
    """Take what is mounted at the destination NAME now for that destination, as it is.

    For a disk that was replaced, a share that is deliberately a new one, or one of several that take turns. Copies
    there are recognised by their digests. Copies that are missing or damaged for good (the vault has no original any
    more) are accepted as lost. Recorded in the audit log. NAME may be left out where there is one destination only.

    \b
    Examples:
      pgkeep extractor adopt external && pgkeep extractor once
    """
    with render.progress(quiet=context.json) as progress:
        extractors = _chosen(context, (name,) if name else ())
        if len(extractors) > 1:
            known = ", ".join(each.settings.name for each in extractors)
            raise UsageError(f"there are several destinations: {known}", "name the one that is to be adopted")
        extractor = extractors[0]
        identifier = extractor.adopt(progress, wait_seconds)
    label, name = extractor.destination.label, extractor.settings.name
    if context.json:
        render.print_json({"ok": True, "name": name, "destination": label, "id": identifier})
    else:
        click.echo(f"pgkeep: {render.printable(label)} is the destination {name} now ({identifier})", err=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pass:
    """What came of a pass to one destination: a report, or the error that ended it."""

    name: str
    destination: str
    report: Report | None
    error: PgkeepError | None

    @property
    def troubles(self) -> list[tuple[str, PgkeepError, bool]]:
        """The backup's path (empty for all of the destination), what went wrong, and whether the copy is lost."""
        if self.error is not None:
            return [("", self.error, False)]
        assert self.report is not None
        lost = self.report.lost
        return [(failure.path, failure.error, failure in lost) for failure in self.report.troubles]


def _chosen(context: Context, names: tuple[str, ...]) -> list[Extractor]:
    found = context.services.extractors(names)
    if not found:
        raise NotFoundError("there is no destination", "set EXTERNAL_DIRECTORY, S3_BUCKET or RSYNC_TARGET")
    return found


def _pass(extractor: Extractor, progress: Progress, wait_seconds: float) -> _Pass:
    """The other destinations have their turn whatever becomes of this one."""
    from pgkeep.adapters.durable import explain

    name, label = extractor.settings.name, extractor.destination.label
    try:
        with explain(label, "copying"):
            return _Pass(name, label, extractor.run_pass(progress, wait_seconds), None)
    except PgkeepError as error:
        return _Pass(name, label, None, error)


def _serve(context: Context) -> None:
    from pgkeep.cli.log import ServiceLog
    from pgkeep.extractor.daemon import Service
    from pgkeep.watch import rights

    settings = context.services.settings
    log = ServiceLog("extractor", settings.log.format)
    for warning in rights.warnings("extractor", context.services.layout.active):
        log.warn(warning)
    service = Service(_chosen(context, ()), log, settings.root / "extracted")
    try:
        service.run()
    except SystemExit as ending:
        if ending.code != 128 + signal.SIGTERM:
            raise
        # Asked to stop, and stopped as it should: no failure for whoever started it.
        log.note("stopped")
        if service.hangs:
            # Python would wait for every thread; all that such a one leaves is swept by the next pass.
            os._exit(0)


def _document(made: _Pass) -> dict[str, Any]:
    return {
        "name": made.name,
        "ok": not made.troubles,
        "destination": made.destination,
        **{
            kind: getattr(made.report, kind, [])
            for kind in ("extracted", "repaired", "adopted", "rechecked", "expired")
        },
        "troubles": [
            {
                "path": path or None,
                "message": error.message,
                "hint": error.hint,
                "exit_code": error.exit_code,
                "lost": is_lost,
            }
            for path, error, is_lost in made.troubles
        ],
    }


def _print(made: _Pass) -> None:
    report = made.report
    if report is None:
        said = "the pass failed"
    else:
        counts = {
            "copied": len(report.extracted),
            "repaired": len(report.repaired),
            "recognised": len(report.adopted),
            "read again": len(report.rechecked),
            "removed": len(report.expired),
            "failed": len(report.failures),
            "lost": len(report.lost),
        }
        said = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "nothing to do"
    click.echo(f"pgkeep: {render.printable(made.destination)}: {said}", err=True)
