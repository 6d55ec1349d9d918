"""``pgkeep verify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from pgkeep.cli import elsewhere, render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from pgkeep.cli.verify_copies import CopyReport
    from pgkeep.vault.inspect import Depth
    from pgkeep.vault.verify import Report


@click.command()
@click.argument("reference", required=False, metavar="[ID|latest|PATH]")
@click.option("--all", "everything", is_flag=True, help="Every backup, roles included.")
@click.option("--quick", is_flag=True, help="Compare digests and structure only; decompress nothing.")
@click.option("--database", metavar="NAME", help="Whose latest, where the vault holds several.")
@elsewhere.FROM
@click.option("--deep", is_flag=True, help="With --from: fetch the dump and check every member, not only its end.")
@common_options
@pass_context
def command(
    context: Context,
    reference: str | None,
    everything: bool,
    quick: bool,
    database: str | None,
    source: str | None,
    deep: bool,
) -> None:
    """Read a backup from the disk and check all of it: digest, every member, index, trailer, sidecars, flags.

    At a destination (--from) sidecars, sizes, the dump's index and the lock are checked; with --deep everything.

    \b
    Examples:
      pgkeep verify latest
      pgkeep verify --all --json
      pgkeep verify /mnt/usb/2026-01-31_00-00-00.sql.gz
      pgkeep verify latest --from s3://backups/db1 --deep

    Every defect is named. Exits with 7 on any.
    """
    if (reference is None) == (not everything):
        raise UsageError("say what to verify: an id, latest, a path, or --all")
    if source is None and deep:
        raise UsageError("--deep belongs to --from: without it everything is read anyway")
    if source is not None and quick:
        raise UsageError("--quick does not go with --from: there the quick look is what is done without --deep")
    if source is not None:
        from pgkeep.cli.verify_copies import verify_copies

        copies, defects = verify_copies(context, source, reference, database, deep=deep)
        _tell(context, copies, defects)
        return
    depth: Depth = "digests" if quick else "content"
    reports = _verify_all(context, depth) if everything else [_verify_one(context, str(reference), database, depth)]
    _tell(context, reports, context.services.catalog().defects if everything else ())


def _verify_one(context: Context, reference: str, database: str | None, depth: Depth) -> Report:
    from pgkeep.vault.verify import verify_backup, verify_path

    path, backup = context.services.locate(reference, database)
    if backup is None:
        return verify_path(path, depth)
    return verify_backup(context.services.layout.active, backup, depth)


def _verify_all(context: Context, depth: Depth) -> list[Report]:
    from pgkeep.domain.catalog import ordered
    from pgkeep.vault.verify import verify_backup

    with render.progress(quiet=context.json) as progress:
        reports = []
        for backup in ordered(context.services.catalog().backups):
            progress.note(f"verifying {backup.path_in_vault}")
            reports.append(verify_backup(context.services.layout.active, backup, depth))
        return reports


def _tell(context: Context, reports: Sequence[Report | CopyReport], defects: Sequence[str]) -> None:
    """Print what was found. Raises what makes the exit code 7 if anything is not whole."""
    ok = all(report.ok for report in reports) and not defects
    if context.json:
        findings = [finding for report in reports for finding in report.findings]
        findings_of_all = [{"code": "manifest", "message": text} for text in defects]
        render.print_json({"ok": ok, "findings": [*findings, *findings_of_all], "backups": reports})
    for report in reports:
        _print(report)
    for text in defects:
        click.echo(f"pgkeep: {render.printable(text)}", err=True)
    if not ok and context.json:
        # The document above says it all; an error would print a second one.
        raise click.exceptions.Exit(IntegrityError.exit_code)
    if not ok:
        raise IntegrityError(f"{sum(not report.ok for report in reports) + len(defects)} of {len(reports)} not whole")


def _print(report: Report | CopyReport) -> None:
    verdict = "ok" if report.ok else "NOT WHOLE"
    about = [render.size(report.size_bytes), *getattr(report, "remarks", ())]
    click.echo(f"pgkeep: {render.printable(report.path)}: {verdict} ({', '.join(about)})", err=True)
    for finding in report.findings:
        click.echo(f"        {finding.code}: {render.printable(finding.message)}", err=True)
