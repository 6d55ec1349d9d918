"""What a reference means, and what is said when it means nothing or too much."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.domain.catalog import SealedBackup, ordered, resolve
from pgkeep.domain.names import Tier
from pgkeep.errors import NotFoundError, UsageError
from tests.unit.test_manifest import EXAMPLE

START = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)


def backup(identifier: str, hour: int, tier: Tier = Tier.DAILY, **fields: Any) -> SealedBackup:
    """A good backup, sealed so many hours after the start."""
    moment = START + dt.timedelta(hours=hour)
    values: dict[str, Any] = {
        "id": identifier,
        "type": tier,
        "database": "app",
        "filename": f"{moment:%Y-%m-%d_%H-%M-%S}.sql.gz",
        "created_at": moment,
        "sealed_at": moment,
        "findings": (),
        **fields,
    }
    directory = "globals" if fields.get("kind") == "globals" else tier.value
    return SealedBackup(msgspec.structs.replace(EXAMPLE, **values), directory)


FIRST = backup("20260301T000000Z-aaaaaa", 0)
SECOND = backup("20260301T060000Z-bbbbbb", 6, Tier.HOURLY)
# One dump under two tiers: two names, two ids, one file name.
THIRD_DAILY = backup("20260301T120000Z-cccccc", 12)
THIRD_WEEKLY = backup("20260301T120000Z-dddddd", 12, Tier.WEEKLY)
LAST = backup("20260301T180000Z-eeeeee", 18, Tier.HOURLY)
ROLES = backup("20260301T190000Z-ffffff", 19, kind="globals", database="")
ONE_DATABASE = [THIRD_WEEKLY, LAST, FIRST, ROLES, THIRD_DAILY, SECOND]
SHOP = backup("20260301T150000Z-121212", 15, database="shop", filename="2026-03-01_15-00-00.shop.sql.gz")
SEVERAL = [*ONE_DATABASE, SHOP]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("20260301T060000Z-bbbbbb", SECOND),
        ("20260301T06", SECOND),
        ("20260301T120000Z-d", THIRD_WEEKLY),
        ("2026-03-01_00-00-00.sql.gz", FIRST),
        ("weekly/2026-03-01_12-00-00.sql.gz", THIRD_WEEKLY),
        ("daily/2026-03-01_12-00-00.sql.gz", THIRD_DAILY),
        ("globals/2026-03-01_19-00-00.sql.gz", ROLES),
        ("latest", LAST),
        ("latest:daily", THIRD_DAILY),
        ("latest:weekly", THIRD_WEEKLY),
        ("latest:globals", ROLES),
    ],
)
def test_what_a_reference_means(reference: str, expected: SealedBackup) -> None:
    assert resolve(ONE_DATABASE, reference) is expected
    assert resolve(reversed(ONE_DATABASE), reference) is expected


@pytest.mark.parametrize("reference", ["2026-03-01_01-00-00.sql.gz", "20270101", "yearly/x", "latest:yearly", "Latest"])
def test_nothing_fits(reference: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        resolve(ONE_DATABASE, reference)
    assert "pgkeep list" in caught.value.hint


def test_an_empty_vault() -> None:
    with pytest.raises(NotFoundError, match="no backup"):
        resolve([], "latest")


def test_a_prefix_that_fits_several_names_them() -> None:
    with pytest.raises(UsageError, match="fits 2 backups") as caught:
        resolve(ONE_DATABASE, "20260301T12")
    for candidate in (THIRD_DAILY, THIRD_WEEKLY):
        assert candidate.manifest.id in caught.value.message
        assert candidate.path_in_vault in caught.value.message


def test_a_file_name_in_several_tiers_names_them() -> None:
    with pytest.raises(UsageError, match=r"daily/.*weekly/"):
        resolve(ONE_DATABASE, "2026-03-01_12-00-00.sql.gz")


def test_an_id_that_two_backups_claim_is_not_guessed() -> None:
    twin = backup(FIRST.manifest.id, 3)
    with pytest.raises(UsageError, match="fits 2"):
        resolve([FIRST, twin], FIRST.manifest.id)


def test_a_whole_id_wins_over_being_the_beginning_of_another() -> None:
    longer = backup(FIRST.manifest.id + "0", 3)
    assert resolve([longer, FIRST], FIRST.manifest.id) is FIRST


def test_many_candidates_are_counted_not_listed() -> None:
    many = [backup(f"20260302T000000Z-{number:06x}", 24 + number) for number in range(20)]
    with pytest.raises(UsageError, match=r"fits 20 backups.*and 12 more"):
        resolve(many, "20260302")


@pytest.mark.parametrize("reference", ["", "2", "202"])
def test_too_short(reference: str) -> None:
    with pytest.raises(UsageError, match="too short"):
        resolve(ONE_DATABASE, reference)


def test_an_unknown_tier_names_the_known() -> None:
    with pytest.raises(UsageError, match="'dayly'") as caught:
        resolve(ONE_DATABASE, "latest:dayly")
    assert "daily" in caught.value.hint


def test_latest_of_several_databases_is_not_guessed() -> None:
    with pytest.raises(UsageError, match="'app', 'shop'"):
        resolve(SEVERAL, "latest")
    assert resolve(SEVERAL, "latest", database="app") is LAST
    assert resolve(SEVERAL, "latest", database="shop") is SHOP
    assert resolve(SEVERAL, "latest:weekly") is THIRD_WEEKLY
    with pytest.raises(NotFoundError, match="hourly of the database 'shop'"):
        resolve(SEVERAL, "latest:hourly", database="shop")


def test_the_database_narrows_every_reference() -> None:
    assert resolve(SEVERAL, "20260301T15", database="shop") is SHOP
    with pytest.raises(NotFoundError, match="'shop'"):
        resolve(SEVERAL, FIRST.manifest.id, database="shop")


def test_latest_does_not_hide_a_doubtful_backup() -> None:
    doubtful = SealedBackup(backup("20260301T230000Z-999999", 23).manifest, "daily", "suspect", ("rows collapsed",))
    assert resolve([*ONE_DATABASE, doubtful], "latest") is doubtful


def test_good_means_sealed_and_undoubted() -> None:
    assert FIRST.is_good
    assert not SealedBackup(FIRST.manifest, "daily", "unprotected").is_good
    assert not SealedBackup(FIRST.manifest, "daily", "sealed", ("digest differs",)).is_good
    assert not backup("20260301T000000Z-aaaaaa", 0, findings=("rows collapsed",)).is_good


@given(st.permutations(SEVERAL))
def test_order_is_by_sealing_whatever_the_input(shuffled: list[SealedBackup]) -> None:
    assert ordered(shuffled) == [FIRST, SECOND, THIRD_DAILY, THIRD_WEEKLY, SHOP, LAST, ROLES]
