"""What the verbs that read from a destination share: the option ``--from``, and how its copies are shown."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context

if TYPE_CHECKING:
    from pgkeep.adapters.destinations import Destination
    from pgkeep.restore.copies import Copy

FROM = click.option(
    "--from",
    "source",
    metavar="DEST",
    help="Read from a destination instead of the vault, which need not be there: a configured name,"
    " s3://BUCKET/PREFIX, ssh://[USER@]HOST/PATH, or a directory's absolute path.",
)
# What a copy that is whole is called: whether anything protects it there is the destination's affair.
WHOLE = "whole"


def destination(context: Context, source: str) -> Destination:
    """Raises ``NotFoundError`` (no such name), ``UsageError``, ``ConfigurationError``."""
    return context.services.destination(source)


def scratch(context: Context) -> Path:
    """Where large files go meanwhile: TMPDIR if it is set, else the staging area, which is made for them."""
    staging = context.services.layout.staging
    if os.environ.get("TMPDIR") or not os.access(staging, os.W_OK | os.X_OK):
        return Path(tempfile.gettempdir())
    return staging


def state(copy: Copy) -> str:
    return WHOLE if copy.backup.state == "sealed" else copy.backup.state


def place_of(label: str, copy: Copy) -> str:
    """Where the dump lies, for people and programs."""
    return f"{label.rstrip('/')}/{copy.path}"


def copy_object(copy: Copy, label: str) -> dict[str, Any]:
    """As :func:`render.backup_object`, and what there is to say of a copy. ``version``: the dump's, where there are."""
    return {
        **render.backup_object(copy.backup, Path("/")),
        "path": place_of(label, copy),
        "state": state(copy),
        "destination": label,
        "version": copy.dumps[0].version if copy.dumps else "",
    }


def warn(texts: Iterable[str]) -> None:
    """What is not as it should be at a destination, for people."""
    for text in texts:
        click.echo(f"pgkeep: warning: {render.printable(text)}", err=True)
