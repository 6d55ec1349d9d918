"""Destinations from the configuration, or from what is typed instead of a name; each adapter only when it is used."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from pgkeep.adapters import destinations as adapter
from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.config import Secret, Settings
from pgkeep.domain import retention
from pgkeep.domain.names import Tier
from pgkeep.errors import ConfigurationError, NotFoundError, UsageError
from pgkeep.settings import Destination, RsyncDestination, S3Destination
from pgkeep.settings import DirectoryDestination as Directory

_S3: Final = re.compile(r"s3://(?P<bucket>[^/\s]+)(?:/(?P<prefix>\S*))?")
_SSH: Final = re.compile(
    r"ssh://(?P<login>(?:[^@/\s]+@)?(?:\[[^\]\s]+\]|[^:/@\s\[]+))(?::(?P<port>[0-9]{1,5}))?(?P<path>/.*)"
)
# What is about a destination, not about how to reach it.
_NOT_OPTIONS: Final = frozenset({"name", "required", "interval_seconds", "recheck_days", "retention"})


def find(settings: Settings, name: str) -> Destination:
    """Raises ``NotFoundError``."""
    known = {each.name: each for each in settings.extractor.destinations}
    if name not in known:
        names = ", ".join(known) or "none"
        hint = "`pgkeep config show` prints them; a place itself: s3://BUCKET/PREFIX, ssh://HOST/PATH, an absolute path"
        raise NotFoundError(f"no destination is called {name!r}; configured: {names}", hint)
    return known[name]


def resolve(settings: Settings, reference: str) -> adapter.Destination:
    """As ``Services.destination``. What is typed is looked at from elsewhere: nothing is remembered of it here."""
    if reference.startswith("/"):
        return build(settings.root, Directory(path=Path(reference)))
    if "://" in reference:
        return _build(_typed(settings, reference), settings.root, None)
    return build(settings.root, find(settings, reference))


def build(root: Path, chosen: Destination) -> adapter.Destination:
    """Raises ``ConfigurationError`` (rsync's target names no directory)."""
    return _build(chosen, root, state_of(root, chosen) / "uploads")


def state_of(root: Path, chosen: Destination) -> Path:
    """What the extractor remembers of it."""
    return root / "extracted" / chosen.name


def policy_of(chosen: Destination) -> retention.Policy | None:
    """What may leave it; None: nothing ever does."""
    if isinstance(chosen, RsyncDestination) or chosen.retention is None:
        return None
    days = {tier: chosen.retention.days(tier) for tier in Tier}
    return retention.Policy(days, chosen.retention.keep_minimum)


def longest_lock_of(chosen: Destination) -> dt.timedelta | None:
    """How far from now locks may be extended; None: they are left alone."""
    if not isinstance(chosen, S3Destination) or not chosen.prolong_locks or chosen.lock_mode is None:
        return None
    return dt.timedelta(days=chosen.lock_days_maximum)


def _build(chosen: Destination, root: Path, uploads: Path | None) -> adapter.Destination:
    if isinstance(chosen, Directory):
        return DirectoryDestination(chosen.path, int(chosen.mode, 8), root / "active")
    if isinstance(chosen, S3Destination):
        from pgkeep.adapters.destinations import s3

        return s3.S3Destination(s3.Options(**_options(chosen)), uploads)
    from pgkeep.adapters.destinations import rsync

    return rsync.RsyncDestination(rsync.Options(**_options(chosen)))


def _options(chosen: S3Destination | RsyncDestination) -> dict[str, Any]:
    """The adapter's options have the names of the settings; secrets are revealed here and nowhere else."""
    found = {name: getattr(chosen, name) for name in chosen.__struct_fields__ if name not in _NOT_OPTIONS}
    return {name: value.reveal() if isinstance(value, Secret) else value for name, value in found.items()}


def _typed(settings: Settings, reference: str) -> Destination:
    if (match := _S3.fullmatch(reference)) is not None:
        prefix = (match["prefix"] or "").strip("/")
        return msgspec.structs.replace(settings.extractor.s3_defaults, bucket=match["bucket"], prefix=prefix)
    if (match := _SSH.fullmatch(reference)) is not None:
        base = settings.extractor.rsync_defaults
        if base is None:
            hint = "set RSYNC_KEY_FILE and RSYNC_KNOWN_HOSTS_FILE"
            raise ConfigurationError(f"{reference} needs a key and the server's public key", hint)
        port = int(match["port"] or base.port)
        return msgspec.structs.replace(base, target=f"{match['login']}:{match['path']}", port=port)
    raise UsageError(
        f"{reference!r} is no place for copies", "write s3://BUCKET/PREFIX or ssh://[USER@]HOST[:PORT]/PATH"
    )
