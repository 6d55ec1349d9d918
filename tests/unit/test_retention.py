"""Expiry: what may never go, what may, and the sentences that say why."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgkeep.domain.catalog import SealedBackup, State, ordered
from pgkeep.domain.names import Tier
from pgkeep.domain.retention import DEFAULT_DAYS, Decision, Policy, Rule, plan, retain_until
from pgkeep.errors import ConfigurationError
from tests.unit.test_manifest import EXAMPLE

NOW = dt.datetime(2026, 11, 29, 10, 0, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)
POLICY = Policy()
MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def backup(
    name: str, age: dt.timedelta, tier: Tier = Tier.DAILY, *, state: State = "sealed", **fields: Any
) -> SealedBackup:
    """A backup sealed so long ago, promised what the default policy promises."""
    sealed_at = NOW - age
    values: dict[str, Any] = {
        "id": name,
        "filename": f"{name}.sql.gz",
        "type": tier,
        "created_at": sealed_at,
        "sealed_at": sealed_at,
        "retain_until": retain_until(POLICY, tier, sealed_at),
        "findings": (),
        **fields,
    }
    directory = "globals" if fields.get("kind") == "globals" else tier.value
    return SealedBackup(msgspec.structs.replace(EXAMPLE, **values), directory, state)


def decide(backups: Iterable[SealedBackup], policy: Policy = POLICY, now: dt.datetime = NOW) -> dict[str, Decision]:
    return {decision.backup.manifest.id: decision for decision in plan(backups, policy, now)}


def kept(backups: Iterable[SealedBackup], policy: Policy = POLICY, now: dt.datetime = NOW) -> list[SealedBackup]:
    return [decision.backup for decision in plan(backups, policy, now) if decision.keep]


def paths(backups: Iterable[SealedBackup]) -> set[str]:
    return {backup.path_in_vault for backup in backups}


def removed_paths(backups: list[SealedBackup], policy: Policy = POLICY, now: dt.datetime = NOW) -> set[str]:
    return paths(backups) - paths(kept(backups, policy, now))


FRESH = [backup(f"fresh-{number}", number * HOUR) for number in range(3)]


# --- vaults as hypothesis makes them ---------------------------------------------------------------------------

hours = st.integers(-48, 24 * 500).map(lambda count: count * HOUR)
ends = st.none() | st.integers(-24, 24 * 500).map(lambda count: count * HOUR)


@st.composite
def dumps(draw: st.DrawFn, number: int, states: st.SearchStrategy[State]) -> list[SealedBackup]:
    """One dump under one to three names, of different tiers, promises and states."""
    age, kind = draw(hours), draw(st.sampled_from(["database", "database", "globals"]))
    shared = {
        "kind": kind,
        "database": "" if kind == "globals" else draw(st.sampled_from(["app", "shop"])),
        "system_identifier": draw(st.sampled_from(["1", "2"])),
        "sha256": f"{number:064x}",
        "created_at": NOW - age - draw(st.integers(-2, 30)) * HOUR,
    }
    names = []
    for tier in draw(st.lists(st.sampled_from(Tier), min_size=1, max_size=3, unique=True)):
        end = draw(ends)
        until = None if end is None else NOW - age + end
        findings = draw(st.sampled_from([(), (), (), ("rows collapsed",)]))
        name = f"{number}-{tier}"
        names.append(backup(name, age, tier, state=draw(states), retain_until=until, findings=findings, **shared))
    return names


mostly_sealed: st.SearchStrategy[State] = st.sampled_from(
    ["sealed", "sealed", "sealed", "unprotected", "incomplete", "suspect"]
)
junk_states: st.SearchStrategy[State] = st.sampled_from(["unprotected", "incomplete", "suspect"])


@st.composite
def vaults(
    draw: st.DrawFn, states: st.SearchStrategy[State] = mostly_sealed, first_number: int = 0
) -> list[SealedBackup]:
    count = draw(st.integers(0, 9))
    made = [draw(dumps(first_number + number, states)) for number in range(count)]
    return [name for names in made for name in names]


policies = st.builds(
    Policy,
    days=st.fixed_dictionaries({tier: st.none() | st.integers(0, 60) for tier in Tier}),
    keep_minimum=st.integers(1, 4),
)


@MANY
@given(vaults(), policies)
def test_nothing_goes_before_the_end_that_was_fixed_at_sealing(vault: list[SealedBackup], policy: Policy) -> None:
    for decision in plan(vault, policy, NOW):
        if not decision.keep:
            end = decision.backup.manifest.retain_until
            assert end is not None
            assert end <= NOW
            assert decision.backup.manifest.sealed_at <= NOW


@MANY
@given(vaults(), policies)
def test_the_newest_good_dumps_of_each_database_stay(vault: list[SealedBackup], policy: Policy) -> None:
    """Dumps, not names: three tiers' names of one dump are no three backups. Recounted here the slow way."""
    left = paths(kept(vault, policy))
    groups: dict[tuple[str, ...], dict[str, list[SealedBackup]]] = defaultdict(lambda: defaultdict(list))
    for one in vault:
        if one.state == "sealed" and not one.manifest.findings:
            group = (one.manifest.system_identifier, one.manifest.kind, one.manifest.database)
            groups[group][one.manifest.sha256].append(one)
    for of_group in groups.values():
        newest = sorted(
            of_group.values(), key=lambda names: max(name.manifest.sealed_at for name in names), reverse=True
        )
        oldest_that_counts = newest[: policy.keep_minimum][-1][0].manifest.sealed_at
        for names in newest:
            if names[0].manifest.sealed_at > oldest_that_counts:
                assert paths(names) <= left
        assert sum(bool(paths(names) & left) for names in newest) >= min(policy.keep_minimum, len(newest))
        good = [name for names in newest for name in names]
        assert len(paths(good) & left) >= min(policy.keep_minimum, len(good))


@MANY
@given(vaults(), policies, st.randoms())
def test_the_order_of_the_input_does_not_matter(vault: list[SealedBackup], policy: Policy, random: Any) -> None:
    shuffled = vault.copy()
    random.shuffle(shuffled)
    planned = plan(vault, policy, NOW)
    assert planned == plan(shuffled, policy, NOW)
    assert [decision.backup for decision in planned] == ordered(vault)


@MANY
@given(vaults(), policies)
def test_a_second_run_removes_nothing(vault: list[SealedBackup], policy: Policy) -> None:
    left = kept(vault, policy)
    again = plan(left, policy, NOW)
    assert all(decision.keep for decision in again)


@MANY
@given(vaults(), policies, st.data())
def test_a_run_that_stops_halfway_leads_to_the_same_end(
    vault: list[SealedBackup], policy: Policy, data: st.DataObject
) -> None:
    going = [decision.backup for decision in plan(vault, policy, NOW) if not decision.keep]
    gone = paths(going[: data.draw(st.integers(0, len(going)))])
    rest = [one for one in vault if one.path_in_vault not in gone]
    assert paths(kept(rest, policy)) == paths(kept(vault, policy))


@MANY
@given(vaults(), vaults(junk_states, first_number=100), policies)
def test_bad_backups_never_push_out_good_ones(
    vault: list[SealedBackup], junk: list[SealedBackup], policy: Policy
) -> None:
    good = paths(one for one in vault if one.is_good)
    assert good & removed_paths([*vault, *junk], policy) <= removed_paths(vault, policy)


@MANY
@given(vaults(), policies, policies)
def test_a_longer_policy_never_removes_more(vault: list[SealedBackup], one: Policy, other: Policy) -> None:
    days: dict[Tier, int | None] = {}
    for tier in Tier:
        short, long = one.days[tier], other.days[tier]
        days[tier] = None if short is None or long is None else max(short, long)
    longer = Policy(days, max(one.keep_minimum, other.keep_minimum))
    assert removed_paths(vault, longer) <= removed_paths(vault, one)


@MANY
@given(vaults(), policies)
def test_every_kept_database_backup_keeps_its_globals(vault: list[SealedBackup], policy: Policy) -> None:
    left = kept(vault, policy)
    good_globals = [one for one in vault if one.manifest.kind == "globals" and one.is_good]
    for one in left:
        if one.manifest.kind != "database":
            continue
        cluster, created_at = one.manifest.system_identifier, one.manifest.created_at
        of_cluster = [roles.manifest for roles in good_globals if roles.manifest.system_identifier == cluster]
        before = [roles.created_at for roles in of_cluster if roles.created_at <= created_at]
        if not of_cluster:
            continue
        wanted = max(before) if before else min(roles.created_at for roles in of_cluster)
        assert any(
            roles.manifest.created_at == wanted and roles.manifest.system_identifier == cluster and roles.is_good
            for roles in left
            if roles.manifest.kind == "globals"
        )


@MANY
@given(vaults(), policies)
def test_every_decision_explains_itself(vault: list[SealedBackup], policy: Policy) -> None:
    for decision in plan(vault, policy, NOW):
        assert decision.reason.startswith("kept: " if decision.keep else "removed: ")
        assert decision.keep == (decision.rule is not Rule.EXPIRED)
        assert decision.reason.isprintable()


# --- one rule at a time ----------------------------------------------------------------------------------------


def test_within_its_time() -> None:
    found = decide([backup("one", DAY, Tier.HOURLY)])["one"]
    assert (found.keep, found.rule) == (True, Rule.RETAINED)
    assert found.reason == "kept: until 2026-11-30 10:00 UTC (hourly, 2 days)"


def test_expired_with_enough_newer_good_ones() -> None:
    found = decide([*FRESH, backup("old", 2 * DAY + 3 * HOUR, Tier.HOURLY)])["old"]
    assert (found.keep, found.rule) == (False, Rule.EXPIRED)
    assert found.reason == "removed: expired 3 h ago"


def test_the_moment_itself_is_past_and_the_one_before_is_not() -> None:
    vault = [*FRESH, backup("edge", 2 * DAY, Tier.HOURLY)]
    assert not decide(vault)["edge"].keep
    assert decide(vault, now=NOW - dt.timedelta(microseconds=1))["edge"].keep


def test_for_ever() -> None:
    vault = [*FRESH, backup("yearly", 4000 * DAY, Tier.YEARLY)]
    assert decide(vault)["yearly"].reason == "kept: for ever (yearly)"
    limited = Policy({**DEFAULT_DAYS, Tier.YEARLY: 1})
    assert decide(vault, limited)["yearly"].rule is Rule.FOR_EVER


def test_a_shorter_policy_takes_nothing_back() -> None:
    vault = [*FRESH, backup("daily", 3 * DAY)]
    found = decide(vault, Policy({**DEFAULT_DAYS, Tier.DAILY: 1}))["daily"]
    assert found.reason == "kept: until 2026-12-03 10:00 UTC (daily, fixed at sealing)"


def test_a_longer_policy_extends() -> None:
    vault = [*FRESH, backup("daily", 8 * DAY)]
    assert not decide(vault)["daily"].keep
    found = decide(vault, Policy({**DEFAULT_DAYS, Tier.DAILY: 14}))["daily"]
    assert found.reason == "kept: until 2026-12-05 10:00 UTC (daily, 14 days)"
    assert decide(vault, Policy({**DEFAULT_DAYS, Tier.DAILY: None}))["daily"].rule is Rule.FOR_EVER


def test_the_newest_good_ones_outlive_their_time() -> None:
    vault = [backup(f"b{number}", (30 + number) * DAY) for number in range(5)]
    found = decide(vault)
    assert [found[f"b{number}"].keep for number in range(5)] == [True, True, True, False, False]
    assert found["b2"].reason == "kept: one of the newest 3 good backups of app_db"
    assert found["b2"].rule is Rule.NEWEST_GOOD


@pytest.mark.parametrize(
    "other", [{"database": "shop"}, {"system_identifier": "other"}, {"kind": "globals"}], ids=lambda other: str(*other)
)
def test_each_database_of_each_cluster_has_its_own_newest(other: dict[str, Any]) -> None:
    ours = [backup(f"ours{number}", (30 + number) * DAY, sha256="a" * 64) for number in range(4)]
    theirs = [backup(f"theirs{number}", (40 + number) * DAY, sha256="b" * 64, **other) for number in range(4)]
    found = decide([*ours, *theirs])
    assert [name for name in found if not found[name].keep] == ["theirs3", "ours3"]


def test_the_names_of_one_dump_are_one_backup() -> None:
    """Otherwise the newest dump, under three tiers, would leave nothing older of a database."""
    made = NOW - 40 * DAY
    newest = [backup(f"new-{tier}", 40 * DAY, tier, created_at=made) for tier in (Tier.HOURLY, Tier.DAILY, Tier.WEEKLY)]
    older = [backup(f"old-{number}", (50 + number) * DAY) for number in range(3)]
    assert removed_paths([*newest, *older]) == {"daily/old-2.sql.gz"}


def test_a_dump_is_as_new_as_the_newest_of_its_names() -> None:
    made = NOW - 60 * DAY
    names = [backup(f"linked{days}", days * DAY, created_at=made) for days in (30, 60)]
    assert removed_paths([*names, backup("between", 45 * DAY)], Policy(keep_minimum=1)) == {"daily/between.sql.gz"}


def test_equal_bytes_of_different_days_are_different_backups() -> None:
    """Roles seldom change: a dump of them is often the same, byte for byte, and must expire all the same."""
    vault = [backup(f"b{number}", (30 + number) * DAY, kind="globals", database="") for number in range(5)]
    assert len({one.manifest.sha256 for one in vault}) == 1
    assert removed_paths(vault) == {"globals/b3.sql.gz", "globals/b4.sql.gz"}


@pytest.mark.parametrize("state", ["unprotected", "incomplete", "suspect"])
def test_what_is_not_good_counts_for_nothing(state: State) -> None:
    bad = [backup(f"bad{number}", number * HOUR, state=state) for number in range(5)]
    good = [backup(f"good{number}", (30 + number) * DAY) for number in range(3)]
    assert removed_paths([*bad, *good]) == set()


def test_what_is_not_good_goes_when_enough_good_ones_are_there() -> None:
    bad = backup("bad", 30 * DAY, state="incomplete")
    found = decide([*FRESH, bad])["bad"]
    assert (found.keep, found.reason) == (False, "removed: expired 23 days ago (incomplete)")
    found = decide([*FRESH[:2], bad])["bad"]
    assert (found.keep, found.rule) == (True, Rule.TOO_FEW_GOOD)
    assert found.reason == "kept: incomplete, but app_db has too few good backups (2 good of 3 wanted)"


def test_what_is_not_good_stays_its_time_like_any_other() -> None:
    assert decide([*FRESH, backup("bad", DAY, state="suspect")])["bad"].rule is Rule.RETAINED


def test_a_finding_alone_makes_a_backup_count_for_nothing() -> None:
    found = decide([*FRESH, backup("bad", 30 * DAY, findings=("rows collapsed",))])["bad"]
    assert found.reason == "removed: expired 23 days ago (with findings)"
    doubtful = [backup(f"doubtful{number}", number * HOUR, findings=("x",)) for number in range(3)]
    assert decide([*doubtful, backup("good", 30 * DAY)])["good"].rule is Rule.NEWEST_GOOD


def test_a_clock_that_went_back_keeps_everything_newer() -> None:
    past = NOW - 3000 * DAY
    found = decide([*FRESH, backup("old", 30 * DAY)], now=past)["old"]
    assert (found.keep, found.rule) == (True, Rule.CLOCK_WENT_BACK)
    assert found.reason == "kept: the clock shows 2018-09-12 10:00 UTC, before it was sealed at 2026-10-30 10:00 UTC"


def test_a_promise_that_ended_before_it_began_is_no_way_round_the_clock() -> None:
    forged = backup("forged", -DAY, retain_until=NOW - 100 * DAY)
    assert decide([*FRESH, forged], Policy(dict.fromkeys(Tier, 0)))["forged"].keep


def test_globals_stay_with_the_backups_that_need_them() -> None:
    roles = [backup(f"roles{number}", number * 10 * DAY, kind="globals", database="") for number in range(1, 9)]
    yearly = backup("yearly", 65 * DAY, Tier.YEARLY)
    found = decide([*roles, yearly, backup("goes", 45 * DAY), *FRESH])
    assert not found["goes"].keep
    assert [name for name in found if name.startswith("roles") and not found[name].keep] == [
        "roles8",
        "roles6",
        "roles5",
        "roles4",
    ]
    assert found["roles7"].rule is Rule.NEEDED_GLOBALS
    assert found["roles7"].reason == "kept: yearly/yearly.sql.gz of app_db needs these roles and tablespaces"


def test_globals_belong_by_creation_though_sealed_in_another_order() -> None:
    ages = [5, 4, 3, 80, 70]
    roles = [
        backup(f"roles{age}", (50 - number) * DAY, kind="globals", database="", created_at=NOW - age * DAY)
        for number, age in enumerate(ages)
    ]
    found = decide([*roles, backup("yearly", 75 * DAY, Tier.YEARLY)], Policy(keep_minimum=1))
    assert [name for name in found if found[name].keep] == ["yearly", "roles80", "roles70"]


def test_the_first_globals_after_stand_in_where_there_are_none_before() -> None:
    roles = [backup(f"roles{number}", number * 10 * DAY, kind="globals", database="") for number in range(1, 9)]
    found = decide([*roles, backup("yearly", 90 * DAY, Tier.YEARLY)])
    assert found["roles8"].rule is Rule.NEEDED_GLOBALS


def test_globals_of_another_cluster_are_no_use() -> None:
    roles = [
        backup(f"roles{number}", number * 10 * DAY, kind="globals", database="", system_identifier="other")
        for number in range(1, 9)
    ]
    assert not decide([*roles, backup("yearly", 75 * DAY, Tier.YEARLY)])["roles8"].keep


def test_bad_globals_do_not_take_the_place_of_good_ones() -> None:
    good = [backup(f"good{number}", number * 10 * DAY, kind="globals", database="") for number in range(1, 9)]
    bad = backup("bad", 66 * DAY, kind="globals", database="", state="suspect")
    found = decide([*good, bad, backup("yearly", 65 * DAY, Tier.YEARLY)])
    assert found["good7"].rule is Rule.NEEDED_GLOBALS
    assert not found["bad"].keep


def test_bad_globals_are_better_than_none() -> None:
    bad = backup("bad", 66 * DAY, kind="globals", database="", state="suspect")
    assert decide([bad, backup("yearly", 65 * DAY, Tier.YEARLY)])["bad"].keep


def test_a_name_with_control_characters_is_quoted() -> None:
    vault = [backup(f"b{number}", 30 * DAY, database="a\n\x1b[2J") for number in range(2)]
    assert decide(vault)["b1"].reason.endswith("good backups of 'a\\n\\x1b[2J'")


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        (dt.timedelta(), "less than a minute"),
        (dt.timedelta(minutes=1), "1 min"),
        (dt.timedelta(minutes=119), "119 min"),
        (dt.timedelta(hours=2), "2 h"),
        (dt.timedelta(hours=47, minutes=59), "47 h"),
        (dt.timedelta(hours=48), "2 days"),
    ],
)
def test_how_long_ago(since: dt.timedelta, expected: str) -> None:
    assert decide([*FRESH, backup("old", 7 * DAY + since)])["old"].reason == f"removed: expired {expected} ago"


def test_the_calendars_edges() -> None:
    end = dt.datetime.max.replace(tzinfo=dt.timezone(-23 * HOUR))
    assert decide([backup("far", DAY, retain_until=end)])["far"].keep
    assert retain_until(Policy({**DEFAULT_DAYS, Tier.DAILY: 10**7}), Tier.DAILY, NOW) is None
    assert retain_until(Policy({**DEFAULT_DAYS, Tier.DAILY: 10**12}), Tier.DAILY, NOW) is None


def test_what_the_policy_promises() -> None:
    assert retain_until(POLICY, Tier.WEEKLY, NOW) == NOW + 28 * DAY
    assert retain_until(POLICY, Tier.YEARLY, NOW) is None
    assert [POLICY.days[tier] for tier in Tier] == [2, 7, 28, 365, None, 30]


def test_an_empty_vault() -> None:
    assert plan([], POLICY, NOW) == []


@pytest.mark.parametrize(
    ("days", "keep_minimum", "expected"),
    [
        ({Tier.HOURLY: 2}, 3, "daily, weekly, monthly, yearly, manual"),
        ({**DEFAULT_DAYS, Tier.WEEKLY: -1}, 3, "weekly is -1 days"),
        (DEFAULT_DAYS, 0, "is 0"),
    ],
)
def test_a_policy_that_makes_no_sense(days: dict[Tier, int | None], keep_minimum: int, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        Policy(days, keep_minimum)


def test_a_policy_does_not_change_with_the_mapping_it_came_from() -> None:
    days = dict(DEFAULT_DAYS)
    policy = Policy(days)
    days[Tier.DAILY] = 0
    assert policy.days[Tier.DAILY] == 7
