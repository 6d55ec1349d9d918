"""The page of results: Markdown from figures. Pure."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Mapping, Sequence

from bench.figures import PGKEEP, DatabaseFigures, Fetch, Footprint, Peak, Race, Ratio, Timing, Verdict

GENERATED = "<!-- Written by `make bench`: the next run replaces this page. Remarks belong into REMARKS.md. -->"
Row = Sequence[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What is known before a run. ``machine``, ``versions`` and ``server`` are names and values for people;
    ``busy``: others worked on the machine when it began."""

    started_at: dt.datetime
    busy: bool
    scale: float
    rounds: int
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    server: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """One run; parts that were left out are empty."""

    setting: Setting
    seconds: float
    databases: tuple[DatabaseFigures, ...] = ()
    races: tuple[Race, ...] = ()
    footprints: tuple[Footprint, ...] = ()
    peaks: tuple[Peak, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    starts: Race | None = None
    verdicts: tuple[Verdict, ...] = ()


def page(results: Results, remarks: str) -> str:
    """The whole page; ``remarks`` are Markdown of a person's, taken over as they are."""
    sections = [
        _head(results.setting, results.seconds),
        _targets(results.verdicts),
        _databases(results.databases),
        *(_race(race) for race in results.races),
        _fetches(results.fetches),
        _footprints(results.footprints),
        _peaks(results.peaks),
        _starts(results.starts),
        _setting(results.setting),
        remarks,
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def _head(setting: Setting, seconds: float) -> str:
    warning = "\n\n**Others were at work on the machine when this run began: the figures are rough.**"
    return (
        f"{GENERATED}\n\n# Measurements\n\n"
        f"One run of {_duration(seconds)}, begun on {setting.started_at:%Y-%m-%d at %H:%M} UTC, at scale"
        f" {setting.scale:g}, {_rounds(setting.rounds)}. Contenders take turns within each round; seconds are medians"
        " of the rounds; a ratio is taken round by round, and its median is shown with the lowest and highest."
        " In the backup races only pgkeep and `pg_dump > /dev/null` run in every round, the slow ones in the first."
    ) + (warning if setting.busy else "")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _rounds(count: int) -> str:
    return "in one round" if count == 1 else f"in {count} rounds"


def _targets(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    rows = [
        (each.what, f"≤ {_value(each.limit, each.unit)}", _value(each.actual, each.unit), _met(each))
        for each in verdicts
    ]
    missed = sum(not each.met for each in verdicts)
    summary = "All targets are met." if not missed else f"{missed} of {len(verdicts)} targets are missed."
    return f"## Targets\n\n{summary}\n\n" + table(("target", "limit", "measured", ""), rows)


def _met(verdict: Verdict) -> str:
    return "met" if verdict.met else "**missed**"


def _databases(databases: Sequence[DatabaseFigures]) -> str:
    rows = [
        (each.name, megabytes(each.text_bytes), megabytes(each.size_bytes), str(each.tables), f"{each.rows:,}")
        for each in databases
    ]
    headings = ("database", "text of pg_dump, MB", "size in the server, MB", "tables", "rows")
    return "## Databases\n\n" + table(headings, rows) if rows else ""


def _race(race: Race) -> str:
    headings = ("", "seconds", "lowest–highest", "MB/s", "output, MB", "pgkeep's time in this one's")
    rows = [_race_row(race, timing) for timing in race.timings]
    # A column that nobody has anything for is left out.
    kept = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    columns = table([headings[place] for place in kept], [[row[place] for place in kept] for row in rows])
    return "\n\n".join([f"## {race.title[0].upper()}{race.title[1:]}", columns, *race.remarks])


def _race_row(race: Race, timing: Timing) -> Row:
    return (
        f"`{timing.contender}`",
        f"{timing.median_seconds:.2f}",
        f"{min(timing.seconds):.2f}–{max(timing.seconds):.2f}",
        f"{race.text_bytes / timing.median_seconds / 1e6:.0f}" if race.text_bytes else "",
        "" if timing.size_bytes is None else megabytes(timing.size_bytes),
        "" if timing.contender == PGKEEP else ratio(race.ratio(timing.contender)),
    )


def _footprints(footprints: Sequence[Footprint]) -> str:
    rows = [
        (
            f"pgkeep {each.verb}, {each.database}",
            megabytes(each.text_bytes),
            megabytes(each.memory_bytes),
            megabytes(each.staging_bytes),
            megabytes(each.disk_bytes),
            f"{each.seconds:.1f}",
        )
        for each in footprints
    ]
    headings = ("", "text, MB", "memory, MB", "staging, MB", "staging and vault, MB", "seconds")
    explained = (
        "Peaks while the command runs: resident memory of pgkeep's own process (VmHWM), and blocks allocated on the"
        " disk, looked at every 20 ms, files without a name included."
    )
    return f"## Memory and disk\n\n{explained}\n\n{table(headings, rows)}" if rows else ""


def _peaks(peaks: Sequence[Peak]) -> str:
    rows = [
        (each.what, megabytes(each.size_bytes), megabytes(each.memory_bytes), f"{each.seconds:.1f}") for each in peaks
    ]
    return "## Memory of extraction\n\n" + table(("", "backup, MB", "memory, MB", "seconds"), rows) if rows else ""


def _fetches(fetches: Sequence[Fetch]) -> str:
    rows = [
        (
            f"`{each.table}` of {each.database}",
            megabytes(each.table_bytes),
            megabytes(each.fetched_bytes),
            megabytes(each.received_bytes),
            megabytes(each.received_bytes - each.table_bytes),
            str(each.requests),
        )
        for each in fetches
    ]
    headings = ("table", "its bytes, MB", "fetched of the dump, MB", "received in all, MB", "beyond its own, MB",
                "requests")  # fmt: skip
    explained = (
        "Its bytes are its compressed rows in the backup. What is received in all was counted between server and"
        " pgkeep: lists, manifest, index and every other answer's body."
    )
    return f"## One table from S3: bytes\n\n{explained}\n\n{table(headings, rows)}" if rows else ""


def _starts(race: Race | None) -> str:
    if race is None:
        return ""
    rows = [_start_row(each) for each in race.timings]
    explained = f"{len(race.timings[0].seconds)} starts of each, in turns."
    return f"## Start-up\n\n{explained}\n\n{table(('', 'median, ms', 'lowest, ms', 'highest, ms'), rows)}"


def _start_row(timing: Timing) -> Row:
    seconds = (timing.median_seconds, min(timing.seconds), max(timing.seconds))
    return (f"`{timing.contender}`", *(f"{value * 1000:.0f}" for value in seconds))


def _setting(setting: Setting) -> str:
    server = ", ".join(f"`{name} = {value}`" for name, value in setting.server.items())
    rows = [*setting.machine.items(), *setting.versions.items(), ("Server", f"durable; {server}")]
    return "## Machine and versions\n\n" + table(("", ""), rows)


def table(headings: Row, rows: Iterable[Row]) -> str:
    """A Markdown table; the first column is to the left, the others too where they are not numbers."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def megabytes(size_bytes: float) -> str:
    """Powers of 1000; small ones with decimals."""
    value = size_bytes / 1e6
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def ratio(found: Ratio) -> str:
    return f"{found.median:.2f} ({found.lowest:.2f}–{found.highest:.2f})"


def _value(value: float, unit: str) -> str:
    if unit == "MB":
        return f"{megabytes(value)} MB"
    return f"{value * 1000:.0f} ms" if unit == "ms" else f"{value:.2f} {unit}"
