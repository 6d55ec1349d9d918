"""The measurements' arithmetic and their page: a wrong median would be believed for years."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import figures, report, restoring, run
from bench.backing_up import digest_in_small_blocks
from bench.databases import KINDS
from bench.figures import DatabaseFigures, Footprint, Race, RatioTarget, Timing, Verdict
from bench.race import Contender, race
from bench.report import Results, Setting
from bench.workspace import MARK, Workspace
from pgkeep.errors import BusyError, RefusedError

SETTING = Setting(
    started_at=dt.datetime(2026, 1, 31, 12, 30, tzinfo=dt.UTC),
    busy=False,
    scale=1.0,
    rounds=3,
    machine={"Processor": "one of a kind"},
    versions={"gzip": "1.12"},
    server={"autovacuum": "off"},
)
BACKUP = Race(
    "backup of mixed",
    (
        Timing("pgkeep", (2.0, 9.0, 4.0), 340_000_000),
        Timing("a | b", (4.0, 6.0, 16.0), 350_400_000),
        Timing("c", (1.0, 1.0, 1.0)),
    ),
    text_bytes=900_000_000,
    remarks=("Said by hand.",),
)
EMPTY = Results(SETTING, 600)


def footprint(verb: str, text_bytes: int, memory_bytes: int) -> Footprint:
    return Footprint(verb, "mixed", text_bytes, 1.0, memory_bytes, 20_000_000, 30_000_000)


def test_the_median_is_not_the_mean() -> None:
    assert BACKUP.timing("pgkeep").median_seconds == 4.0
    assert Timing("even", (1.0, 2.0, 4.0, 100.0)).median_seconds == 3.0


def test_ratios_are_taken_round_by_round() -> None:
    found = BACKUP.ratio("a | b")
    assert (found.median, found.lowest, found.highest) == (0.5, 0.25, 1.5)
    assert BACKUP.timing("pgkeep").median_seconds / BACKUP.timing("a | b").median_seconds > found.median


def test_a_baseline_that_ran_once_is_compared_with_the_first_round() -> None:
    once = Race("once", (Timing("pgkeep", (1.0, 9.0)), Timing("slow", (4.0,))))
    assert once.ratio("slow").median == 0.25


def test_rounds_that_do_not_match_have_no_ratio() -> None:
    unequal = Race("odd", (Timing("pgkeep", (1.0,)), Timing("other", (1.0, 2.0))))
    with pytest.raises(ValueError, match="longer"):
        unequal.ratio("other")
    with pytest.raises(KeyError):
        unequal.ratio("nobody")


@pytest.mark.parametrize(("limit", "met"), [(0.4999, False), (0.5, True), (0.6, True)])
def test_a_target_is_met_up_to_its_limit(limit: float, met: bool) -> None:
    verdict = RatioTarget("a | b", limit).judge(BACKUP)
    assert (verdict.actual, verdict.met) == (0.5, met)


def test_memory_is_judged_by_its_highest_peak_and_its_growth() -> None:
    peaks = [footprint("backup", 4000, 120), footprint("backup", 1000, 100), footprint("restore", 1000, 50)]
    backup, growth, restore = figures.judge_footprints(peaks, limit_bytes=110, limit_growth=1.25)
    assert (backup.actual, backup.met) == (120, False)
    assert (growth.actual, growth.met) == (1.2, True)
    assert "4.0-fold" in growth.what
    assert (restore.actual, restore.met) == (50, True)


def test_memory_that_shrinks_as_the_data_grows_is_flat() -> None:
    peaks = [footprint("backup", 1000, 100), footprint("backup", 4000, 90)]
    assert [verdict.met for verdict in figures.judge_footprints(peaks, 160, 1.1)] == [True, True]


def test_a_start_is_judged_in_seconds_and_shown_in_milliseconds() -> None:
    starts = Race("start-up", (Timing("pgkeep --version", (0.09, 0.12, 0.11)),))
    verdict = figures.judge_start(starts, "pgkeep --version", 0.1)
    assert not verdict.met
    assert "| `pgkeep --version` | ≤ 100 ms | 110 ms | **missed** |" in report.page(
        Results(SETTING, 1, verdicts=(verdict,)), ""
    )


def test_contenders_take_turns_and_begin_in_turn() -> None:
    order: list[str] = []
    arenas: list[str] = []

    @contextlib.contextmanager
    def arena() -> Iterator[int]:
        arenas.append("made")
        yield len(arenas)
        arenas.append("cleared")

    def contender(name: str, size_bytes: int | None) -> Contender[int]:
        def work(_: int) -> int | None:
            order.append(name)
            return size_bytes

        return Contender(name, work)

    said: list[str] = []
    timings = race("trial", [contender("a", 1), contender("b", None), contender("c", 3)], 2, arena, said.append)
    assert order == ["a", "b", "c", "b", "c", "a"]
    assert [(each.contender, len(each.seconds), each.size_bytes) for each in timings] == [
        ("a", 2, 1), ("b", 2, None), ("c", 2, 3)
    ]  # fmt: skip
    assert arenas == ["made", "cleared"] * 6
    assert said[-1].startswith("trial, round 2 of 2: a: ")


def test_the_page_shows_seconds_speeds_sizes_and_ratios() -> None:
    page = report.page(Results(SETTING, 600, races=(BACKUP,)), "")
    assert "## Backup of mixed" in page
    assert "| `pgkeep` | 4.00 | 2.00–9.00 | 225 | 340 |  |" in page
    assert "| `a \\| b` | 6.00 | 4.00–16.00 | 150 | 350 | 0.50 (0.25–1.50) |" in page
    assert "| `c` | 1.00 | 1.00–1.00 | 900 |  | 4.00 (2.00–9.00) |" in page
    assert "Said by hand." in page


def test_columns_without_anything_in_them_are_left_out() -> None:
    page = report.page(Results(SETTING, 1, races=(Race("small", (Timing("pgkeep", (1.0,)),)),)), "")
    assert "|  | seconds | lowest–highest |\n" in page


def test_the_page_says_how_many_targets_are_missed() -> None:
    verdicts = (Verdict("good", 160e6, 60e6, "MB"), Verdict("bad", 0.75, 0.76, "×"))
    page = report.page(Results(SETTING, 600, verdicts=verdicts), "")
    assert "1 of 2 targets are missed." in page
    assert "| good | ≤ 160 MB | 60 MB | met |" in page
    assert "| bad | ≤ 0.75 × | 0.76 × | **missed** |" in page
    assert "All targets are met." in report.page(Results(SETTING, 600, verdicts=verdicts[:1]), "")


def test_what_was_not_measured_has_no_section() -> None:
    page = report.page(EMPTY, "")
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings == ["# Measurements", "## Machine and versions"]


def test_the_page_has_the_setting_and_a_person_s_remarks() -> None:
    page = report.page(
        Results(SETTING, 600, databases=(DatabaseFigures("mixed", 10**9, 2 * 10**9, 3, 1234567),)),
        "## Remarks\n\nOurs.\n",
    )
    assert "One run of 10 minutes, begun on 2026-01-31 at 12:30 UTC, at scale 1, in 3 rounds." in page
    assert "| mixed | 1000 | 2000 | 3 | 1,234,567 |" in page
    assert "| Processor | one of a kind |" in page
    assert "`autovacuum = off`" in page
    assert page.endswith("## Remarks\n\nOurs.\n")


def test_a_busy_machine_is_mentioned() -> None:
    busy = Setting(SETTING.started_at, True, 1.0, 1, {}, {}, {})
    assert "figures are rough" in report.page(Results(busy, 60), "")
    assert "figures are rough" not in report.page(EMPTY, "")


def test_what_a_restore_s_parts_leave_is_named_too() -> None:
    phases = [{"load": 3.0, "count": 1.0, "total": 4.5}, {"load": 5.0, "count": 2.0, "total": 8.0}]
    assert restoring.of_which(phases).endswith(": load 4.00 s, count 1.50 s, all else 0.75 s.")


@pytest.mark.parametrize("size_bytes", [0, 1, 8191, 8192, 8193, 20_000])
def test_the_guides_digest_is_a_sha256(tmp_path: Path, size_bytes: int) -> None:
    content = bytes(number % 251 for number in range(size_bytes))
    (tmp_path / "file").write_bytes(content)
    assert digest_in_small_blocks(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_only_a_whole_run_of_full_scale_is_published() -> None:
    whole = run.Plan(frozenset(run.PARTS), KINDS, 1.0, 3, (1.0, 4.0))
    assert whole.whole
    assert not run.Plan(frozenset(run.PARTS), KINDS, 0.99, 3, (1.0,)).whole
    assert not run.Plan(frozenset(run.PARTS) - {"table"}, KINDS, 1.0, 3, (1.0,)).whole
    assert not run.Plan(frozenset(run.PARTS), ("mixed",), 1.0, 3, (1.0,)).whole


def test_the_workspace_clears_what_a_killed_run_left_and_goes_at_the_end(tmp_path: Path) -> None:
    directory = tmp_path / "scratch"
    (directory / "left-over").mkdir(parents=True)
    (directory / MARK).touch()
    with Workspace(directory) as space:
        assert [path.name for path in directory.iterdir()] == [MARK]
        with space.place("trial") as place:
            (place / "file").touch()
        assert not place.exists()
        with pytest.raises(BusyError), Workspace(directory):
            pass
        with pytest.raises(RefusedError, match="GB free"):
            space.require_space(10**18)
    assert not directory.exists()


def test_the_workspace_leaves_somebody_elses_directory_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(RefusedError), Workspace(tmp_path):
        pass
    assert (tmp_path / "precious").exists()
