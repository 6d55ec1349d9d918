"""``pgkeep fetch``."""

from __future__ import annotations

from pathlib import Path

import click

from pgkeep.cli import elsewhere, render
from pgkeep.cli.context import Context, common_options, pass_context


@click.command()
@click.argument("reference", metavar="ID|latest")
@click.option("--from", "source", metavar="DEST", required=True,
              help="The destination: a configured name, s3://BUCKET/PREFIX, ssh://[USER@]HOST/PATH, or a directory's"
              " absolute path.")  # fmt: skip
@click.option("--to", "directory", metavar="DIRECTORY", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Where to put it; made if it is not there.")  # fmt: skip
@click.option("--database", metavar="NAME", help="Whose latest, where the destination holds several.")
@common_options
@pass_context
def command(context: Context, reference: str, source: str, directory: Path, database: str | None) -> None:
    """Bring a backup here from a destination: the dump and the files that describe it, under their plain names.

    The dump is compared with its manifest's digest while it comes, and gets its name when it is whole. Nothing is
    overwritten. Interrupted, it goes on where it was when the same command is given again. Stock tools do the rest:
    `sha256sum -c`, `gunzip`, `psql`.

    \b
    Examples:
      pgkeep fetch latest --from s3://backups/db1 --to /srv/restore
      pgkeep fetch 20260131T00 --from nas --to . --json | jq -r .path
    """
    from pgkeep.restore import copies, fetch

    destination = elsewhere.destination(context, source)
    with render.progress(quiet=context.json) as progress, destination.opened(to_read=True) as place:
        copy, defects = copies.find(place, reference, database, progress)
        elsewhere.warn((*place.warnings, *defects, *copy.backup.problems))
        progress.note(f"fetching {elsewhere.place_of(destination.label, copy)}")
        fetched = fetch.fetch(place, copy, directory.absolute(), progress)
    if context.json:
        document = {
            **elsewhere.copy_object(copy, destination.label),
            "ok": True,
            "path": str(fetched.path),
            "files": [str(path) for path in fetched.files],
            "fetched_bytes": fetched.fetched_bytes,
        }
        render.print_json(document)
    text = f"{fetched.path} is whole ({render.size(copy.backup.manifest.size_bytes)}), its digest is the manifest's"
    click.echo(f"pgkeep: {render.printable(text)}", err=True)
