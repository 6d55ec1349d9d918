"""``pgkeep destination``: how the places for copies stand, and what they really do."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import pytest

from tests.cli.pair import Two
from tests.integration.keeper import Keeper

CONFIGURATION = """
[destinations.external]
path = "{directory}/external"

[destinations.second]
kind = "directory"
path = "{directory}/second"
required = false

[destinations.second.retention]
daily_days = 30
"""


@pytest.fixture
def keeper(two: Two, scratch: Path) -> Keeper:
    """The vault of ``two``, with two destinations of its own; the extractor's memory goes with the test."""
    (scratch / "external").mkdir()
    (scratch / "pgkeep.toml").write_text(CONFIGURATION.format(directory=scratch))
    root = scratch / "root"
    shutil.copytree(two.keeper.root, root)
    return Keeper(root, {**two.keeper.environment, "PGKEEP_ROOT": str(root), "PGKEEP_CONFIG": f"{scratch}/pgkeep.toml"})


def test_before_the_first_pass_everything_waits(keeper: Keeper, two: Two) -> None:
    first, second = keeper.json("destination", "list")
    assert (first["name"], first["kind"], first["required"]) == ("external", "directory", True)
    assert (second["name"], second["required"]) == ("second", False)
    waiting = len(list((keeper.root / "active").glob("*/*.manifest.json")))
    assert (first["copies"], first["waiting"]) == (0, waiting)
    assert first["newest_copied_at"] is None
    since = dt.datetime.fromisoformat(first["waiting_since"])
    assert dt.timedelta(0) <= dt.datetime.now(dt.UTC) - since < dt.timedelta(hours=1)
    shown = keeper.run("destination", "list")
    assert shown.code == 0
    assert f"{waiting}, since " in shown.stdout


def test_after_a_pass_the_copies_are_counted_and_trouble_is_told(keeper: Keeper, scratch: Path) -> None:
    keeper.run("extractor", "once")
    first, second = keeper.json("destination", "list")
    copied = sorted((scratch / "external").glob("*/*/*.sql.gz*"))
    assert first["copies"] == len([path for path in copied if path.name.endswith(".sql.gz")])
    assert first["size_bytes"] == sum(path.stat().st_size for path in copied)
    assert (first["waiting"], first["bad"], first["failing_since"]) == (0, 0, None)
    assert first["outlook"] == "too early to tell how it grows"
    assert second["copies"] == 0
    assert second["failing_since"] is not None, "its directory does not exist"
    told = keeper.run("destination", "list").stderr
    assert "second: nothing has gone well since" in told
    assert "external:" not in told


def test_what_can_not_be_read_is_said(keeper: Keeper) -> None:
    keeper.run("extractor", "once")
    (keeper.root / "extracted" / "external" / "memory.json").write_text("{")
    first, _ = keeper.json("destination", "list")
    assert "memory.json can't be read" in first["trouble"]
    answer = keeper.run("destination", "list")
    assert answer.code == 0
    assert "external: " in answer.stderr


def test_a_trial_leaves_nothing_and_says_what_a_directory_is_worth(keeper: Keeper, scratch: Path) -> None:
    shown = keeper.json("destination", "test", "external")
    assert (shown["ok"], shown["lock"], shown["where"]) == (True, "none", str(scratch / "external"))
    assert "whoever has these credentials" in shown["meaning"]
    assert list((scratch / "external").iterdir()) == []
    assert keeper.json("destination", "test", str(scratch / "external"))["findings"]
    text = keeper.run("destination", "test", "external").stderr
    assert "copies can be made and read back" in text
    assert "lock: none" in text


def test_a_trial_of_what_is_not_there_names_it(keeper: Keeper, scratch: Path) -> None:
    assert str(scratch / "second") in keeper.fails(6, "destination", "test", "second")
    assert "no destination is called 'third'" in keeper.fails(10, "destination", "test", "third")
    keeper.fails(2, "destination", "test", "ftp://somewhere/x")
    keeper.fails(2, "destination", "test")


def test_a_configured_name_is_a_place_to_read_from(keeper: Keeper, two: Two) -> None:
    keeper.run("extractor", "once")
    assert [each["id"] for each in keeper.json("list", "--from", "external")] == [two.first["id"], two.second["id"]]
