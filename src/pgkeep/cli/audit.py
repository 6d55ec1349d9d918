"""``pgkeep audit``."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import IntegrityError, NotFoundError, PgkeepError, UsageError

if TYPE_CHECKING:
    from pgkeep.domain.anchors import Contradiction
    from pgkeep.domain.audit import Examination
    from pgkeep.extractor.anchors import Collected

_SPAN = re.compile(r"([1-9]\d{0,5})([mhdw])", re.ASCII)
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_UNREADABLE_SHOWN_BYTES = 200


@click.group(no_args_is_help=True)
@common_options
def command() -> None:
    """The vault's audit log: what was sealed, refused and removed, each record chained to the one before it.

    \b
    Examples:
      pgkeep audit verify
      pgkeep audit verify --against s3
      pgkeep audit show --since 7d
    """


@command.command()
@click.option("--against", metavar="DEST", help="Compare with the anchors there: a configured name, a URL or a path.")
@common_options
@pass_context
def verify(context: Context, against: str | None) -> None:
    """Follow the chain from the first record to the last, and name every place where it breaks.

    A log that was rewritten as a whole, cut off at its end, or replaced by an older one still hangs together: that
    shows only --against what the extractor has taken to a destination meanwhile. Exits with 7 on any of it, and with
    10 where there is nothing to look at.
    """
    collected = None if against is None else _collect(context, against)
    result = _examine(context.services.layout.audit, against, collected)
    trouble = result.trouble
    if context.json:
        render.print_json(_document(result))
        # The document says it all; an error would print a second one.
        raise click.exceptions.Exit(trouble.exit_code if trouble else 0)
    _print(result)
    if trouble:
        raise trouble


@command.command()
@click.option("--since", metavar="MOMENT", help="Only from then on: 2026-01-31, 2026-01-31T12:00, or 90m, 12h, 7d, 2w.")
@common_options
@pass_context
def show(context: Context, since: str | None) -> None:
    """Print the records, the oldest first. Whether they can be believed is what `verify` says."""
    begin = None if since is None else _moment(since)
    shown = _records(context.services.layout.audit, begin)
    if context.json:
        render.print_json(list(shown))
        return
    for record in shown:
        click.echo(render.printable(_line(record)))


# ---------------------------------------------------------------- verify


@dataclasses.dataclass(frozen=True, slots=True)
class _Result:
    """What came out; ``collected`` is None where nothing was compared with."""

    log: Path
    found: Examination
    against: str | None
    collected: Collected | None
    contradictions: Sequence[Contradiction]

    @property
    def trouble(self) -> PgkeepError | None:
        """Why it is not well, if it is not."""
        unreadable = self.collected.unreadable if self.collected else ()
        broken = len(self.found.problems) + len(self.contradictions) + len(unreadable)
        if broken:
            hint = "keep it as it is, and find out who could write it"
            return IntegrityError(f"the audit log can't be relied on: {broken} findings", hint)
        if self.found.lines == 0:
            return NotFoundError(f"there is no audit log at {self.log}", "the vault makes it")
        if self.collected is not None and not self.collected.anchors:
            return NotFoundError(
                f"{self.against} holds no anchor of this vault: there is nothing to compare with",
                "the extractor stores one after each backup; is it running, and is this its destination?",
            )
        return None


def _collect(context: Context, against: str) -> Collected:
    from pgkeep.extractor import anchors
    from pgkeep.vault.layout import read_identity

    vault = read_identity(context.services.layout).id
    with render.progress(quiet=context.json) as progress:
        progress.note(f"reading the anchors of {against}")
        with context.services.destination(against).opened(to_read=True) as place:
            return anchors.collect(place, vault, progress)


def _examine(log: Path, against: str | None, collected: Collected | None) -> _Result:
    from pgkeep.domain import anchors, audit
    from pgkeep.vault import audit_log

    placed = collected.anchors if collected else ()
    wanted = {each.anchor.head.sequence for each in placed}
    digests: dict[int, str] = {}

    def noted(lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            record = line.removesuffix(b"\n")
            if wanted and (sequence := audit.sequence_of(record)) in wanted and sequence is not None:
                digests.setdefault(sequence, audit.line_digest(record))
            yield line

    found = audit.examine(noted(audit_log.lines_of(log)))
    return _Result(log, found, against, collected, anchors.compare(placed, digests, found.sequence))


def _document(result: _Result) -> dict[str, Any]:
    found = result.found
    return {
        "ok": result.trouble is None,
        "lines": found.lines,
        "records": found.records,
        "sequence": found.sequence,
        "head": found.head,
        "problems": found.problems,
        "notes": found.notes,
        "against": _comparison(result),
    }


def _comparison(result: _Result) -> dict[str, Any] | None:
    from pgkeep.domain import anchors

    if result.collected is None:
        return None
    last = anchors.newest(result.collected.anchors)
    return {
        "destination": result.against,
        "anchors": len(result.collected.anchors),
        "newest": last and {"path": last.label, **msgspec.to_builtins(last.anchor)},
        "contradictions": [
            {"anchor": each.anchor.label, "kind": each.kind, "message": each.message} for each in result.contradictions
        ],
        "unreadable": result.collected.unreadable,
        "of_other_vaults": result.collected.foreign,
    }


def _print(result: _Result) -> None:
    found, collected = result.found, result.collected
    _say(f"{found.records} records in {found.lines} lines; the head is record {found.sequence}, {found.head}")
    for note in found.notes:
        _say(f"line {note.line}: {note.message}")
    for problem in found.problems:
        _say(f"line {problem.line} BREAKS THE CHAIN: {problem.message}")
    if collected is None:
        return
    _say(f"{len(collected.anchors)} anchors at {result.against}; the log contradicts {len(result.contradictions)}")
    if collected.foreign:
        _say(f"{collected.foreign} more anchors there are of other vaults")
    for text in (*(each.message for each in result.contradictions), *collected.unreadable):
        _say(text)


def _say(text: str) -> None:
    click.echo(f"pgkeep: {render.printable(text)}", err=True)


# ---------------------------------------------------------------- show


def _moment(text: str) -> dt.datetime:
    """Raises ``UsageError``."""
    from pgkeep.adapters import clock

    try:
        if span := _SPAN.fullmatch(text):
            return clock.now() - dt.timedelta(**{_UNITS[span[2]]: int(span[1])})
        return _utc(text)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--since {text!r} is no moment", "e.g. 2026-01-31, 2026-01-31T12:00, 12h, 7d") from error


def _records(path: Path, begin: dt.datetime | None) -> Iterator[dict[str, Any]]:
    """Each record as it stands, with its line's number; of a line that is none, its beginning."""
    from pgkeep.vault import audit_log

    is_shown = begin is None
    for number, line in enumerate(audit_log.lines_of(path), 1):
        record, time = _decoded(line)
        if time is not None:
            is_shown = begin is None or time >= begin
        # What can't be read has no time of its own: it goes with the record before it.
        if is_shown:
            yield {"line": number, **record}


def _decoded(line: bytes) -> tuple[dict[str, Any], dt.datetime | None]:
    try:
        record = json.loads(line)
        return record, _utc(record["time"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {"unreadable": line[:_UNREADABLE_SHOWN_BYTES].decode(errors="backslashreplace")}, None


def _line(record: dict[str, Any]) -> str:
    if "unreadable" in record:
        return f"(line {record['line']} is no record: {record['unreadable']})"
    left_out = {"line", "time", "event", "previous", "covers", "sequence"}
    details = (f"{name}={_plain(value)}" for name, value in record.items() if name not in left_out)
    event = record.get("event", "")
    return "  ".join(
        [f"{_utc(record['time']):%Y-%m-%d %H:%M:%S} UTC", str(record.get("sequence", "-")), str(event), *details]
    )


def _utc(text: str) -> dt.datetime:
    """What names no zone is meant so. Raises ``ValueError``, ``TypeError``, ``OverflowError``."""
    moment = dt.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).astimezone(dt.UTC)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
