"""What was measured, and what follows from it. Pure: nothing here reads a clock or a file."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

PGKEEP = "pgkeep"


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """One contender's seconds, one a round, in the order of the rounds; and the bytes it left in the last of them.

    ``size_bytes`` None: it leaves nothing whose size would say something.
    """

    contender: str
    seconds: tuple[float, ...]
    size_bytes: int | None = None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """The median over the rounds, and the lowest and highest round."""

    median: float
    lowest: float
    highest: float


@dataclasses.dataclass(frozen=True, slots=True)
class Race:
    """Contenders that took turns, in one run. ``text_bytes``: of COPY text that each of them moved."""

    title: str
    timings: tuple[Timing, ...]
    text_bytes: int | None = None
    remarks: tuple[str, ...] = ()

    def timing(self, contender: str) -> Timing:
        """Raises ``KeyError``."""
        for timing in self.timings:
            if timing.contender == contender:
                return timing
        raise KeyError(contender)

    def ratio(self, baseline: str, contender: str = PGKEEP) -> Ratio:
        """The contender's time in the baseline's, round by round: what slows the machine slows both of a pair.

        Rounds that the baseline sat out count for nothing.

        Raises ``KeyError``.
        """
        baselines = self.timing(baseline).seconds
        pairs = zip(self.timing(contender).seconds[: len(baselines)], baselines, strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """The peaks of one command: of its own process's resident memory, and of what it held allocated on the disk.

    ``disk_bytes`` counts staging and vault together, files without a name included.
    """

    verb: str
    database: str
    text_bytes: int
    seconds: float
    memory_bytes: int
    staging_bytes: int
    disk_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Peak:
    """An extraction's peak of resident memory, in bytes, with a backup of ``size_bytes``."""

    what: str
    size_bytes: int
    seconds: float
    memory_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fetch:
    """What was fetched to restore one table from afar.

    ``table_bytes``: of its compressed rows. ``fetched_bytes``: of the dump, by pgkeep's own account.
    ``received_bytes``: of all answers' bodies, seen on the way.
    """

    database: str
    table: str
    table_bytes: int
    fetched_bytes: int
    received_bytes: int
    requests: int


@dataclasses.dataclass(frozen=True, slots=True)
class DatabaseFigures:
    """A generated database: its COPY text and data files in bytes, its tables and rows."""

    name: str
    text_bytes: int
    size_bytes: int
    tables: int
    rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what was measured. Bytes, seconds or a ratio; ``unit`` says how to print them."""

    what: str
    limit: float
    actual: float
    unit: str

    @property
    def met(self) -> bool:
        return self.actual <= self.limit


@dataclasses.dataclass(frozen=True, slots=True)
class RatioTarget:
    """pgkeep's time is to be at most ``limit`` of that contender's."""

    baseline: str
    limit: float

    def judge(self, race: Race) -> Verdict:
        """Raises ``KeyError`` where the contender did not run."""
        what = f"{race.title}: pgkeep's time in that of `{self.baseline}`"
        return Verdict(what, self.limit, race.ratio(self.baseline).median, "×")


def judge_start(race: Race, contender: str, limit_seconds: float) -> Verdict:
    return Verdict(f"`{contender}`", limit_seconds, race.timing(contender).median_seconds, "ms")


def judge_footprints(footprints: Sequence[Footprint], limit_bytes: int, limit_growth: float) -> list[Verdict]:
    """For each verb and database: the highest peak of memory, and its growth from the least text to the most."""
    verdicts = []
    for verb, database in dict.fromkeys((each.verb, each.database) for each in footprints):
        same = [each for each in footprints if (each.verb, each.database) == (verb, database)]
        same.sort(key=lambda each: each.text_bytes)
        what = f"pgkeep {verb}, {database}: peak memory"
        verdicts.append(Verdict(what, limit_bytes, max(each.memory_bytes for each in same), "MB"))
        if len(same) > 1:
            times = same[-1].text_bytes / same[0].text_bytes
            growth = same[-1].memory_bytes / same[0].memory_bytes
            verdicts.append(Verdict(f"{what}, growth when the data grows {times:.1f}-fold", limit_growth, growth, "×"))
    return verdicts


def judge_peaks(peaks: Sequence[Peak], limit_bytes: int) -> list[Verdict]:
    """For each way outside: the highest peak at any size."""
    highest: dict[str, int] = {}
    for each in peaks:
        highest[each.what] = max(each.memory_bytes, highest.get(each.what, 0))
    return [Verdict(f"{what}: peak memory", limit_bytes, memory_bytes, "MB") for what, memory_bytes in highest.items()]


def judge_fetches(fetches: Sequence[Fetch], limit_bytes: int) -> list[Verdict]:
    """For each table: what came beyond its own bytes."""
    return [
        Verdict(
            f"`{each.table}` of {each.database} from S3: bytes received beyond the table's",
            limit_bytes,
            each.received_bytes - each.table_bytes,
            "MB",
        )
        for each in fetches
    ]
