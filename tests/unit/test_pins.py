"""What a required destination has not got yet stays here: the newest of it, and never more."""

from __future__ import annotations

import datetime as dt
import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.domain.catalog import SealedBackup, sealing_order
from pgkeep.domain.names import Tier
from pgkeep.domain.retention import Policy, Rule, plan
from tests.unit.test_retention import DAY, FRESH, HOUR, MANY, NOW, POLICY, backup, kept, paths, policies, vaults

Missing = Mapping[str, frozenset[str]]


def decided(vault: list[SealedBackup], policy: Policy, unconfirmed: Missing) -> dict[str, tuple[bool, Rule]]:
    return {each.backup.path_in_vault: (each.keep, each.rule) for each in plan(vault, policy, NOW, unconfirmed)}


def nothing_at(*destinations: str, vault: list[SealedBackup]) -> Missing:
    return {name: frozenset(paths(vault)) for name in destinations}


@st.composite
def vaults_and_missing(draw: st.DrawFn) -> tuple[list[SealedBackup], Missing]:
    vault = draw(vaults())
    some = st.frozensets(st.sampled_from(sorted(paths(vault)))) if vault else st.just(frozenset[str]())
    return vault, draw(st.dictionaries(st.sampled_from(["s3", "nas"]), some, max_size=2))


@MANY
@given(vaults_and_missing(), policies)
def test_pins_are_the_newest_good_ones_of_each_tier_and_database_at_most(
    drawn: tuple[list[SealedBackup], Missing], policy: Policy
) -> None:
    vault, missing = drawn
    pinned = [each.backup for each in plan(vault, policy, NOW, missing) if each.rule is Rule.NOT_YET_COPIED]
    groups = Counter((b.manifest.system_identifier, b.manifest.kind, b.manifest.database, b.manifest.type)
                     for b in pinned)  # fmt: skip
    assert all(count <= policy.keep_minimum * len(missing) for count in groups.values())
    assert paths(pinned) <= frozenset().union(*missing.values())
    assert all(each.is_good for each in pinned)


@MANY
@given(vaults_and_missing(), policies)
def test_of_what_is_missing_the_newest_good_ones_stay(
    drawn: tuple[list[SealedBackup], Missing], policy: Policy
) -> None:
    """Recounted the slow way: nothing below so many is ever removed."""
    vault, missing = drawn
    left = paths(kept_with(vault, policy, missing))
    for awaited in missing.values():
        groups: dict[tuple[str, ...], list[SealedBackup]] = defaultdict(list)
        for one in vault:
            if one.path_in_vault in awaited and one.is_good:
                manifest = one.manifest
                group = manifest.system_identifier, manifest.kind, manifest.database, manifest.type
                groups[group].append(one)
        for of_group in groups.values():
            newest = sorted(of_group, key=sealing_order, reverse=True)[: policy.keep_minimum]
            assert paths(newest) <= left


@MANY
@given(vaults_and_missing(), policies)
def test_a_destination_that_is_missing_something_never_lets_more_go(
    drawn: tuple[list[SealedBackup], Missing], policy: Policy
) -> None:
    vault, missing = drawn
    assert paths(kept(vault, policy)) <= paths(kept_with(vault, policy, missing))


@MANY
@given(vaults_and_missing(), policies, st.randoms())
def test_the_order_does_not_matter(
    drawn: tuple[list[SealedBackup], Missing], policy: Policy, shuffler: random.Random
) -> None:
    vault, missing = drawn
    before = plan(vault, policy, NOW, missing)
    shuffler.shuffle(vault)
    assert plan(vault, policy, NOW, dict(sorted(missing.items(), reverse=True))) == before


def kept_with(vault: list[SealedBackup], policy: Policy, missing: Missing) -> list[SealedBackup]:
    return [each.backup for each in plan(vault, policy, NOW, missing) if each.keep]


def months_of(database: str, tier: Tier, step: dt.timedelta, count: int) -> list[SealedBackup]:
    """Backups without end, and without a copy; no two of the same bytes."""
    return [
        backup(
            f"{database}-{tier}-{number}", number * step, tier, database=database, sha256=os.urandom(32).hex(),
            retain_until=NOW - number * step,
        )
        for number in range(count)
    ]  # fmt: skip


def test_a_destination_down_for_months_pins_the_newest_of_each_tier_and_database_and_no_more() -> None:
    """Else whoever keeps it down fills the disk, and the backups end."""
    every = {
        (database, tier): months_of(database, tier, step, 60)
        for database in ("app", "shop")
        for tier, step in ((Tier.HOURLY, HOUR), (Tier.DAILY, DAY), (Tier.WEEKLY, 7 * DAY))
    }
    vault = [one for of_tier in every.values() for one in of_tier]
    policy = Policy(dict.fromkeys(Tier, 0))
    left = paths(kept_with(vault, policy, nothing_at("s3", vault=vault)))
    assert left == {one.path_in_vault for of_tier in every.values() for one in of_tier[: policy.keep_minimum]}
    # Without the destination, three hourly ones of each database are all that stays.
    assert len(kept(vault, policy)) == 2 * policy.keep_minimum
    assert paths(kept_with(vault, policy, nothing_at("s3", "nas", vault=vault))) == left


def test_each_destination_pins_what_it_lacks_itself() -> None:
    vault = [*FRESH, *months_of("app_db", Tier.WEEKLY, 60 * DAY, 9)[2:]]
    old = [one.path_in_vault for one in vault[len(FRESH) :]]
    found = {
        each.backup.path_in_vault: each
        for each in plan(vault, POLICY, NOW, {"s3": frozenset(old), "nas": frozenset(old[4:])})
    }
    assert [found[path].keep for path in old] == [True, True, True, False, True, True, True]
    assert found[old[0]].reason == ("kept: not yet at s3 (one of the newest 3 weekly backups of app_db that are not)")
    both = plan(vault, POLICY, NOW, nothing_at("s3", "nas", vault=vault[len(FRESH) :]))
    assert "kept: not yet at nas and s3 (" in both[-4].reason


def test_what_is_not_good_is_not_waited_for_and_takes_no_place() -> None:
    vault = months_of("app_db", Tier.DAILY, 30 * DAY, 5)[1:]
    bad = [backup(f"bad{number}", (10 + number) * DAY, findings=("rows collapsed",)) for number in range(5)]
    everything = [*FRESH, *bad, *vault]
    found = decided(everything, POLICY, nothing_at("s3", vault=[*bad, *vault]))
    assert [found[one.path_in_vault] for one in vault] == [(True, Rule.NOT_YET_COPIED)] * 3 + [(False, Rule.EXPIRED)]
    assert {found[one.path_in_vault][0] for one in bad} == {False}


def test_what_has_arrived_goes_in_its_time() -> None:
    vault = [*FRESH, *months_of("app_db", Tier.DAILY, 30 * DAY, 5)[1:]]
    missing = {"s3": frozenset([vault[-1].path_in_vault])}
    assert paths(vault) - paths(kept_with(vault, POLICY, missing)) == paths(vault[len(FRESH) : -1])


def test_the_roles_that_a_pinned_backup_needs_stay_too() -> None:
    roles = [backup(f"roles{number}", number * 10 * DAY, kind="globals", database="") for number in range(1, 9)]
    pinned = backup("pinned", 65 * DAY)
    found = decided([*roles, *FRESH, pinned], POLICY, {"s3": frozenset([pinned.path_in_vault])})
    assert found["daily/pinned.sql.gz"] == (True, Rule.NOT_YET_COPIED)
    assert found["globals/roles7.sql.gz"] == (True, Rule.NEEDED_GLOBALS)
    assert found["globals/roles8.sql.gz"] == (False, Rule.EXPIRED)


@pytest.mark.parametrize("unconfirmed", [{}, {"s3": frozenset()}, {"s3": frozenset(["daily/unheard-of.sql.gz"])}])
def test_where_nothing_is_missing_nothing_is_pinned(unconfirmed: Missing) -> None:
    vault = [*FRESH, *months_of("app_db", Tier.DAILY, 30 * DAY, 5)[1:]]
    assert paths(kept_with(vault, POLICY, unconfirmed)) == paths(FRESH)
