"""``pgkeep destination``: which places copies go to, how they stand, and what they really do."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pgkeep.cli import elsewhere, render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import FormatError, NotFoundError, PgkeepError, StorageError

if TYPE_CHECKING:
    from pgkeep.adapters.destinations import Probe
    from pgkeep.domain.forecast import Copy as CopyAhead
    from pgkeep.domain.forecast import Forecast
    from pgkeep.extractor.extract import Extractor
    from pgkeep.extractor.plan import Record

_MEANING = {
    "proven": "a credential that may delete tried to, and was refused: until its lock ends, a copy survives whoever"
    " steals the credentials",
    "asserted": "the server says that copies are locked; nobody who might delete them has tried. Test it once with"
    " credentials that may delete",
    "none": "nothing there keeps copies from being changed or removed by whoever has these credentials",
}
_RECORD_LIMIT_BYTES = 64 * 1024
_MEMORY_LIMIT_BYTES = 64 * 1024 * 1024
_UNKNOWN = "-"


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A destination and its copies, by what the extractor remembers. Times in UTC, None where there is none.

    ``newest_copied_at``: when the last copy was made; ``waiting``: backups of the vault without a copy there, the
    oldest of them since ``waiting_since``; ``bad``: copies that are missing or damaged; ``failing_since``: the first of
    the passes that went wrong without a good one since. ``trouble``: why nothing is known of it here.
    """

    name: str
    kind: str
    where: str
    required: bool
    copies: int = 0
    size_bytes: int = 0
    newest_copied_at: dt.datetime | None = None
    waiting: int = 0
    waiting_since: dt.datetime | None = None
    bad: int = 0
    failing_since: dt.datetime | None = None
    locked_until: dt.datetime | None = None
    growth_bytes_per_day: int | None = None
    full_at: dt.datetime | None = None
    outlook: str = ""
    trouble: str = ""


@click.group(no_args_is_help=True)
@common_options
def command() -> None:
    """The places that copies go to.

    \b
    Examples:
      pgkeep destination list
      pgkeep destination test s3
    """


@command.command(name="list")
@common_options
@pass_context
def list_(context: Context) -> None:
    """List the configured destinations: how many copies are there, how many wait, how long there will be room.

    By what the extractor remembers: nothing is asked over the network (`pgkeep list --from NAME` does that).

    \b
    Examples:
      pgkeep destination list
      pgkeep destination list --json | jq '.[] | select(.waiting > 0)'
    """
    from pgkeep.adapters import clock

    standings = [_standing(each, clock.now()) for each in context.services.extractors()]
    if context.json:
        render.print_json(standings)
        return
    headings = ("NAME", "KIND", "WHERE", "REQUIRED", "COPIES", "SIZE", "NEWEST COPY", "WAITING", "OUTLOOK")
    rows = [
        (
            each.name,
            each.kind,
            each.where,
            "yes" if each.required else "no",
            str(each.copies),
            render.size(each.size_bytes),
            _UNKNOWN if each.newest_copied_at is None else render.moment(each.newest_copied_at),
            _waiting(each),
            each.outlook,
        )
        for each in standings
    ]
    if rows:
        render.print_table(headings, rows, frozenset({4, 5}))
    else:
        click.echo("pgkeep: no destinations: docs/destinations/README.md tells how to add one", err=True)
    elsewhere.warn(tuple(text for each in standings for text in _warnings(each)))


@command.command()
@click.argument("name", metavar="NAME|DEST")
@common_options
@pass_context
def test(context: Context, name: str) -> None:
    """Try out a destination: write, read back, and see whether a lock holds. Leaves nothing but what a lock keeps.

    NAME as configured, or the place itself (s3://BUCKET/PREFIX, ssh://[USER@]HOST/PATH, an absolute path). The lock is
    `proven` only where a credential that may delete was refused, `asserted` where the server says so, else `none`.
    Exits with 0 only if copies can be made and read back as configured.

    \b
    Examples:
      pgkeep destination test s3
      pgkeep destination test s3://backups/db1 --json | jq -r .lock
    """
    destination = elsewhere.destination(context, name)
    with render.progress(quiet=context.json) as progress:
        progress.note(f"trying out {destination.label}")
        probe = destination.probe(progress)
    if context.json:
        document = {
            "ok": probe.ok,
            "destination": name,
            "kind": destination.kind,
            "where": destination.label,
            "lock": probe.lock,
            "meaning": _MEANING[probe.lock],
            "findings": probe.findings,
        }
        render.print_json(document)
    _print_probe(destination.label, probe)
    if not probe.ok:
        raise click.exceptions.Exit(StorageError.exit_code)


def _print_probe(label: str, probe: Probe) -> None:
    verdict = "copies can be made and read back" if probe.ok else "NOT FIT for copies as configured"
    click.echo(f"pgkeep: {render.printable(label)}: {verdict}", err=True)
    click.echo(f"        lock: {probe.lock}: {_MEANING[probe.lock]}", err=True)
    for finding in probe.findings:
        click.echo(f"        {render.printable(finding)}", err=True)


def _waiting(standing: Standing) -> str:
    if standing.waiting and standing.waiting_since is not None:
        return f"{standing.waiting}, since {render.moment(standing.waiting_since)}"
    return _UNKNOWN if standing.trouble else str(standing.waiting)


def _warnings(standing: Standing) -> Iterator[str]:
    if standing.trouble:
        yield f"{standing.name}: {standing.trouble}"
    if standing.failing_since is not None:
        yield f"{standing.name}: nothing has gone well since {render.moment(standing.failing_since)}"
    if standing.bad:
        yield f"{standing.name}: {standing.bad} copies are missing or damaged: `pgkeep health extractor` names them"


def _standing(extractor: Extractor, now: dt.datetime) -> Standing:
    settings, destination = extractor.settings, extractor.destination
    about = Standing(name=settings.name, kind=destination.kind, where=destination.label, required=settings.required)
    try:
        memory, records = _remembered(settings.state)
        waiting, since = _lag(settings.active, records)
    except PgkeepError as error:
        return msgspec.structs.replace(about, trouble=error.message, outlook=_UNKNOWN)
    held = [record for record in records.values() if record.expired_at is None]
    ahead = _forecast(extractor, held, now)
    return msgspec.structs.replace(
        about,
        copies=len(held),
        size_bytes=sum(record.size_bytes for record in held),
        newest_copied_at=max((record.copied_at for record in held), default=None),
        waiting=waiting,
        waiting_since=since,
        bad=sum(bool(record.problem) for record in held),
        failing_since=memory,
        locked_until=ahead.locked_until,
        growth_bytes_per_day=ahead.growth_bytes_per_day,
        full_at=ahead.full_at,
        outlook=_described(ahead),
    )


def _described(ahead: Forecast) -> str:
    from pgkeep.domain.forecast import describe

    return describe(ahead, render.size)


def _remembered(state: Path) -> tuple[dt.datetime | None, dict[str, Record]]:
    """Since when it fails, and every copy by its source's path. Read beside the extractor: nothing is changed.

    Raises ``StorageError``, ``FormatError``.
    """
    from pgkeep.adapters import durable
    from pgkeep.adapters.sidecars import read_sidecar
    from pgkeep.extractor.plan import Record
    from pgkeep.extractor.state import Memory

    with durable.explain(state, "reading what the extractor remembers"):
        try:
            memory = msgspec.json.decode(read_sidecar(state / "memory.json", _MEMORY_LIMIT_BYTES), type=Memory)
        except NotFoundError:
            return None, {}
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise FormatError(f"{state}/memory.json can't be read: {error}") from error
        records = {}
        for path in sorted((state / (memory.destination or "none")).glob("*/*.json")):
            # One that is just being replaced, or is no record: the extractor looks after those.
            with contextlib.suppress(NotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
                if not durable.is_temporary(path.name):
                    record = msgspec.json.decode(read_sidecar(path, _RECORD_LIMIT_BYTES), type=Record)
                    records[f"{path.parent.name}/{path.name.removesuffix('.json')}"] = record
    return memory.failing_since, records


def _lag(active: Path, records: dict[str, Record]) -> tuple[int, dt.datetime | None]:
    """How many backups of the vault have no copy, and since when the oldest of these is there."""
    from pgkeep.extractor.source import list_backups

    if not os.path.lexists(active):
        return 0, None
    waiting = {path: signature for path, signature in list_backups(active).items() if path not in records}
    # A manifest's time of change is when it was sealed.
    since = min((signature[2] for signature in waiting.values()), default=None)
    return len(waiting), None if since is None else dt.datetime.fromtimestamp(since / 1e9, dt.UTC)


def _forecast(extractor: Extractor, held: list[Record], now: dt.datetime) -> Forecast:
    from pgkeep.adapters import durable
    from pgkeep.domain.forecast import forecast

    room_bytes = None
    if extractor.destination.kind == "directory":
        with contextlib.suppress(StorageError):  # not mounted now: then there is no telling
            room_bytes = durable.free_bytes(Path(extractor.destination.label))
    return forecast([_ahead(extractor, record) for record in held], now, room_bytes)


def _ahead(extractor: Extractor, record: Record) -> CopyAhead:
    from pgkeep.domain import retention
    from pgkeep.domain.forecast import Copy

    policy, origin = extractor.settings.policy, record.origin
    leaves_at = None
    if policy is not None and origin is not None:
        leaves_at = retention.retain_until(policy, origin.type, origin.sealed_at)
    locked_until = None if record.locked is None else record.locked.until
    return Copy(record.copied_at, record.size_bytes, locked_until, leaves_at)
