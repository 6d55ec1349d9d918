"""``python -m bench.run``: measure pgkeep against stock tools on this machine, in one run.

The page goes to bench/RESULTS.md if the run was whole and of full scale, else to the terminal only.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench import (
    backing_up,
    databases,
    extracting,
    fetching,
    figures,
    footprint,
    machine,
    object_storage,
    programs,
    report,
    restoring,
    starting,
    workspace,
)
from bench.databases import KINDS, Databases
from bench.figures import DatabaseFigures, Fetch, Race, RatioTarget, Verdict
from bench.report import Results, Setting
from bench.workspace import Workspace
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.errors import PgkeepError, UsageError

PARTS = ("backup", "restore", "table", "extraction", "upload", "fetch", "startup", "memory", "peaks")
RESULTS = Path(__file__).with_name("RESULTS.md")
REMARKS = Path(__file__).with_name("REMARKS.md")
# Those that restore from backups of the databases.
OF_BACKUPS = frozenset({"restore", "table", "fetch"})
# Room on the disk: write-ahead log and the like, then for each unit of scale both databases, one of them restored
# and every contender's output; and for the largest database of the memory's part itself, its backup, its copy.
BASE_BYTES = 5_000_000_000
RACES_BYTES = 7_000_000_000
MEMORY_BYTES = 6_500_000_000
INTERRUPTED = 130
TERMINATED = 143


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. ``memory_scales`` multiply ``scale``."""

    parts: frozenset[str]
    kinds: tuple[str, ...]
    scale: float
    rounds: int
    memory_scales: tuple[float, ...]

    @property
    def needed_bytes(self) -> int:
        largest = max(self.memory_scales) if self.parts & {"memory", "peaks"} else 0.0
        return int(BASE_BYTES * min(1, self.scale) + max(RACES_BYTES, MEMORY_BYTES * largest) * self.scale)

    @property
    def whole(self) -> bool:
        """Fit to be published."""
        return self.parts == frozenset(PARTS) and self.kinds == KINDS and self.scale >= 1


def main() -> int:
    """Exit code 0 whatever the figures are: a target that is missed is a result."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    programs.forget_environment()
    try:
        plan = _plan(arguments)
        with Workspace(arguments.scratch) as space:
            results = measure(plan, space, arguments.major)
    except PgkeepError as error:
        print(f"bench: {error.message}\n       {error.hint}", file=sys.stderr)
        return error.exit_code
    _publish(results, arguments.output or (RESULTS if plan.whole else None))
    return 0


def measure(plan: Plan, space: Workspace, major: int | None) -> Results:
    """The whole run. Raises ``PgkeepError``."""
    space.require_space(plan.needed_bytes)
    installation = databases.choose_installation(major)
    setting = Setting(
        started_at=dt.datetime.now(dt.UTC),
        busy=machine.is_busy(),
        scale=plan.scale,
        rounds=plan.rounds,
        machine=machine.machine(space.directory),
        versions=machine.versions(installation),
        server=databases.settings(),
    )
    say(f"PostgreSQL {installation.version}, scratch in {space.directory}")
    with ScratchCluster(
        directory=space.directory, settings=setting.server, durable=True, installation=installation
    ) as cluster:
        return _measure_parts(plan, Databases(cluster, say), space, setting)


def _measure_parts(plan: Plan, made: Databases, space: Workspace, setting: Setting) -> Results:
    started = time.monotonic()
    sources: list[DatabaseFigures] = []
    if plan.parts & {"backup", *OF_BACKUPS}:
        sources = [made.provide(kind, plan.scale) for kind in plan.kinds]
    races: list[Race] = []
    if "backup" in plan.parts:
        races += [
            backing_up.run(made, source, plan.rounds, space, say, everybody=source is sources[0]) for source in sources
        ]
    fetches: list[Fetch] = []
    for source in sources:
        races += _restores(plan, made, source, space, fetches)
    races += _extractions(plan, made, space)
    starts = starting.run(made, space, say) if "startup" in plan.parts else None
    scales = [plan.scale * each for each in plan.memory_scales]
    footprints = footprint.run(made, plan.kinds, scales, space, say) if "memory" in plan.parts else []
    peaks = object_storage.peaks(made, [*map(_backup_bytes, scales)], space, say) if "peaks" in plan.parts else []
    verdicts = [
        *_verdicts(races, starts),
        *figures.judge_fetches(fetches, fetching.LIMIT_BYTES),
        *figures.judge_footprints(footprints, footprint.MEMORY_LIMIT_BYTES, footprint.GROWTH_LIMIT),
        *figures.judge_peaks(peaks, extracting.MEMORY_LIMIT_BYTES),
    ]
    return Results(
        setting=setting,
        seconds=time.monotonic() - started,
        databases=tuple(sources),
        races=tuple(races),
        footprints=tuple(footprints),
        peaks=tuple(peaks),
        fetches=tuple(fetches),
        starts=starts,
        verdicts=tuple(verdicts),
    )


def _restores(
    plan: Plan, made: Databases, source: DatabaseFigures, space: Workspace, fetches: list[Fetch]
) -> Iterator[Race]:
    """What is fetched for one table is added to ``fetches``."""
    if not plan.parts & OF_BACKUPS:
        return
    with restoring.prepared(made, source.name, space, say) as backups:
        if "restore" in plan.parts:
            yield restoring.run(backups, source, plan.rounds, say)
        if "table" in plan.parts:
            yield restoring.run_one_table(backups, source, plan.rounds, say)
        if "fetch" in plan.parts:
            timed, counted = fetching.run(backups, source, plan.rounds, space, say)
            fetches += counted
            yield timed


def _extractions(plan: Plan, made: Databases, space: Workspace) -> Iterator[Race]:
    if not plan.parts & {"extraction", "upload"}:
        return
    with extracting.vault(made, _backup_bytes(plan.scale), space, say) as sealed:
        if "extraction" in plan.parts:
            yield extracting.run(sealed, plan.rounds, space, say)
        if "upload" in plan.parts:
            yield object_storage.run(sealed, plan.rounds, space, say)


def _backup_bytes(scale: float) -> int:
    return int(extracting.BYTES_OF_SCALE * scale)


def _verdicts(races: Sequence[Race], starts: Race | None) -> Iterator[Verdict]:
    """Every target of time that this run can say something about."""
    ways_outside = (*extracting.TARGETS, *object_storage.TARGETS)
    targets: tuple[RatioTarget, ...] = (*backing_up.TARGETS, *restoring.TARGETS, *ways_outside)
    for race in races:
        present = {timing.contender for timing in race.timings}
        yield from (target.judge(race) for target in targets if target.baseline in present)
    if starts is not None:
        yield figures.judge_start(starts, starting.VERSION, starting.VERSION_LIMIT_SECONDS)


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{dt.datetime.now().astimezone():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def _publish(results: Results, output: Path | None) -> None:
    remarks = REMARKS.read_text(encoding="utf-8") if REMARKS.exists() else ""
    if output is None:
        print(report.page(results, ""))
        say("not written to a file: parts are left out, or the scale is below 1 (--output FILE writes it anyway)")
        return
    page = report.page(results, remarks)
    output.write_text(page, encoding="utf-8")
    print(page)
    say(f"written to {output}")


def _plan(arguments: argparse.Namespace) -> Plan:
    """Raises ``UsageError``."""
    parts = frozenset(arguments.only or PARTS)
    if arguments.scale <= 0 or arguments.rounds < 1 or min(arguments.memory_scales) <= 0:
        raise UsageError("--scale, --rounds and --memory-scales are above zero", "see --help")
    return Plan(parts, arguments.databases or KINDS, arguments.scale, arguments.rounds, arguments.memory_scales)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="1 is 1 GB of text in each database (default: 1)")
    parser.add_argument("--only", type=_some_of(PARTS), metavar="PART,…", help=f"of {','.join(PARTS)}")
    parser.add_argument("--databases", type=_some_of(KINDS), metavar="KIND,…", help=f"of {','.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each race (default: 3)")
    parser.add_argument("--memory-scales", type=_numbers, default=(1.0, 4.0), metavar="N,…",
                        help="multiples of the scale at which memory and disk are watched (default: 1,4)")  # fmt: skip
    parser.add_argument("--major", type=int, help="PostgreSQL's major version (default: 15 if it is installed)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page here, whatever was measured")
    parser.add_argument("--scratch", type=Path, default=workspace.DEFAULT, metavar="DIR",
                        help="a new directory for everything that is made (default: bench/.scratch)")  # fmt: skip
    return parser


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of lists with commas: the chosen ones, in the order of ``known``."""

    def parse(text: str) -> tuple[str, ...]:
        words = text.split(",")
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{min(unknown)} is not one of {', '.join(known)}")
        return tuple(each for each in known if each in words)

    return parse


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """As an exception, so that servers are stopped and everything is removed; a second signal can't cut that short."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    print("\nbench: stopping and removing everything", file=sys.stderr)
    raise SystemExit(INTERRUPTED if number == signal.SIGINT else TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
