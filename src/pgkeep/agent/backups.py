"""Which backups there are, from their names alone: all that the agent may and needs to know of the vault."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from pgkeep.adapters import durable
from pgkeep.domain import names
from pgkeep.domain.names import MANIFEST_SUFFIX, Tier
from pgkeep.errors import FormatError

# A tier of hourly backups of a hundred databases has fewer names; more would only be somebody's flood.
NAMES_READ_LIMIT = 200_000


def newest(active: Path, tiers: Iterable[Tier]) -> dict[Tier, dt.datetime | None]:
    """Each tier's newest backup of any database. Raises ``StorageError``."""
    return {tier: max((moment for moment, _ in _backups(active / tier.value)), default=None) for tier in tiers}


def is_backed_up(directory: Path, database: str | None, since: dt.datetime) -> bool:
    """Whether ``active/<tier>`` (or ``globals``) has a backup from ``since`` on. ``database`` None: of whatever.

    Raises ``StorageError``.
    """
    # A name tells whole seconds.
    since = since.replace(microsecond=0)
    return any(moment >= since and database in (None, of) for moment, of in _backups(directory))


def _backups(directory: Path) -> Iterator[tuple[dt.datetime, str | None]]:
    """Moment and database of everything with a manifest, which is what makes it a backup."""
    for name in _names(directory):
        if name.endswith(MANIFEST_SUFFIX):
            try:
                yield names.parse_dump_name(name.removesuffix(MANIFEST_SUFFIX))
            except FormatError:
                continue  # not a name that pgkeep gives: the vault reports it


def _names(directory: Path) -> list[str]:
    with durable.explain(directory, "listing the backups"):
        try:
            with os.scandir(directory) as scan:
                return [entry.name for entry in islice(scan, NAMES_READ_LIMIT)]
        except FileNotFoundError:
            return []  # the vault has not made it yet
