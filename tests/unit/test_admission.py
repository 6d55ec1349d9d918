"""Which tiers a dump gets: whatever an agent asks for is bounded, and an honest one never loses a tier."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgkeep.domain import admission, schedule
from pgkeep.domain.admission import MANUAL_PRESENT, Policy, assign
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.manifest import Kind, Manifest
from pgkeep.domain.names import Tier
from pgkeep.domain.request import Request

NOW = dt.datetime(2026, 7, 1, 12, 30, tzinfo=dt.UTC)
HOUR, DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
SCHEDULE = {Tier.HOURLY: "0 */1 * * *", Tier.DAILY: "0 0 * * *", Tier.WEEKLY: "0 0 * * 0"}
FULL = {**SCHEDULE, Tier.MONTHLY: "0 0 1 * *", Tier.YEARLY: "0 0 1 1 *"}
POLICY = Policy.of(SCHEDULE, "UTC", NOW, 64)


def identifier(number: int) -> str:
    return f"20260101T000000Z-{number:06x}"


def request(*tiers: Tier, number: int = 0xFFFFFF, database: str = "app", kind: Kind = "database") -> Request:
    return Request(
        id=identifier(number),
        kind=kind,
        tiers=tiers,
        database=database,
        created_at=NOW - 300 * DAY,
        system_identifier="7",
        server_version="16.1",
        dump_version="16.1",
        dump_seconds=1.0,
    )


def sealed(
    tier: Tier, moment: dt.datetime, number: int = 0, database: str = "app", kind: Kind = "database", staged: int = -1
) -> SealedBackup:
    manifest = Manifest(
        version="1.0",
        id=identifier(number),
        staged_id=identifier(number if staged < 0 else staged),
        kind=kind,
        filename="x.sql.gz",
        timestamp="x",
        type=tier,
        database=database,
        size_bytes=1,
        sha256="0" * 64,
        # The agent's word, and far from true.
        created_at=NOW - 1000 * DAY,
        sealed_at=moment,
        retain_until=None,
        immutable=True,
        protection="chattr",
        system_identifier="7",
        server_version="16.1",
        dump_version="16.1",
        pgkeep_version="0",
    )
    return SealedBackup(manifest, tier.value)


def several(tier: Tier, moments: Iterable[dt.datetime], **more: str) -> list[SealedBackup]:
    return [sealed(tier, moment, number, **more) for number, moment in enumerate(moments)]  # type: ignore[arg-type]


# ---------------------------------------------------------------- single decisions


def test_what_is_due_is_granted() -> None:
    decision = assign(request(Tier.HOURLY, Tier.DAILY, Tier.WEEKLY), NOW, [], POLICY)
    assert decision.tiers == (Tier.HOURLY, Tier.DAILY, Tier.WEEKLY)
    assert decision.notes == ()


def test_a_tier_asked_for_twice_is_granted_once() -> None:
    assert assign(request(Tier.DAILY, Tier.DAILY), NOW, [], POLICY).tiers == (Tier.DAILY,)


@pytest.mark.parametrize("tier", [Tier.MONTHLY, Tier.YEARLY])
def test_a_tier_that_is_switched_off_becomes_manual(tier: Tier) -> None:
    decision = assign(request(tier), NOW, [], POLICY)
    assert decision.tiers == (Tier.MANUAL,)
    assert decision.notes == (f"{tier}: the vault's schedule has it switched off",)
    beside = assign(request(tier, Tier.HOURLY), NOW, [], POLICY)
    assert set(beside.tiers) == {Tier.HOURLY, Tier.MANUAL}


def test_a_quota_is_for_runs_by_hand() -> None:
    """Four dailies since midnight; the fifth at noon is manual; what midnight brings is daily again."""
    own = several(Tier.DAILY, (NOW - hours * HOUR for hours in (1, 2, 3, 4)))
    by_hand = assign(request(Tier.DAILY), NOW, own, POLICY)
    assert by_hand.tiers == (Tier.MANUAL,)
    assert by_hand.notes == ("daily: 4 in 24 hours already",)
    assert assign(request(Tier.DAILY), NOW, own[:3], POLICY).tiers == (Tier.DAILY,)
    midnight = NOW.replace(hour=0, minute=1) + DAY
    assert assign(request(Tier.DAILY), midnight, own, POLICY).tiers == (Tier.DAILY,)


def test_manual_is_bounded_twice_and_then_it_is_refused() -> None:
    today = several(Tier.MANUAL, (NOW - minutes * dt.timedelta(minutes=1) for minutes in range(10)))
    refused = assign(request(Tier.MANUAL), NOW, today, POLICY)
    assert (refused.tiers, refused.refusal) == ((), "manual: 10 in 24 hours already")
    assert assign(request(Tier.MANUAL), NOW, today[1:], POLICY).tiers == (Tier.MANUAL,)
    old = several(Tier.MANUAL, (NOW - (2 + day) * DAY for day in range(MANUAL_PRESENT)))
    assert assign(request(Tier.MANUAL), NOW, old, POLICY).refusal == "manual: 30 are here already"
    assert assign(request(Tier.YEARLY), NOW, old, POLICY).refusal.endswith("; manual: 30 are here already")
    # It is not refused where another tier is granted.
    beside = assign(request(Tier.YEARLY, Tier.HOURLY), NOW, old, POLICY)
    assert (beside.tiers, beside.refusal) == ((Tier.HOURLY,), "")
    assert len(beside.notes) == 2


def test_what_was_sealed_before_the_clock_was_set_back_counts_for_a_while_only() -> None:
    near = several(Tier.MANUAL, [NOW + 2 * HOUR] * 10)
    assert assign(request(Tier.MANUAL), NOW, near, POLICY).refusal
    far = several(Tier.MANUAL, [NOW + 400 * DAY] * 10)
    assert assign(request(Tier.MANUAL), NOW, far, POLICY).tiers == (Tier.MANUAL,)
    # What lies in the future is no reason not to make today's.
    assert assign(request(Tier.DAILY), NOW, several(Tier.DAILY, [NOW + 400 * DAY] * 9), POLICY).tiers == (Tier.DAILY,)


def test_after_the_clock_was_set_back_a_quota_holds_for_each_of_the_lives_of_that_time() -> None:
    """Two dailies were made a little ahead: the limit of four is now three times four, and no more."""
    ahead = [NOW + 2 * HOUR, NOW + 3 * HOUR]
    twice = several(Tier.DAILY, [*ahead, *(NOW - hours * HOUR for hours in (1, 2, 3, 4))])
    assert assign(request(Tier.DAILY), NOW, twice, POLICY).tiers == (Tier.DAILY,)
    full = several(Tier.DAILY, [*ahead, *(NOW - minutes * HOUR / 60 for minutes in range(1, 11))])
    assert assign(request(Tier.DAILY), NOW, full, POLICY).tiers == (Tier.MANUAL,)


def test_every_database_has_quotas_of_its_own_but_only_so_many_are_taken() -> None:
    full = several(Tier.MANUAL, [NOW] * 10)
    assert assign(request(Tier.MANUAL, database="other"), NOW, full, POLICY).tiers == (Tier.MANUAL,)
    many = [sealed(Tier.HOURLY, NOW - DAY, number, f"invented-{number}") for number in range(64)]
    refused = assign(request(Tier.HOURLY, database="one more"), NOW, many, POLICY)
    assert "64 different databases" in refused.refusal
    assert assign(request(Tier.HOURLY, database="invented-5"), NOW, many, POLICY).tiers == (Tier.HOURLY,)


def test_the_globals_of_a_server_are_one_subject_whatever_database_they_name() -> None:
    own = [sealed(Tier.MANUAL, NOW, number, f"invented-{number}", "globals") for number in range(10)]
    assert assign(request(Tier.MANUAL, database="another", kind="globals"), NOW, own, POLICY).refusal


def test_a_dump_that_is_sealed_already_gets_what_it_lacks() -> None:
    first = sealed(Tier.HOURLY, NOW, 5)
    again = request(Tier.HOURLY, Tier.DAILY, number=5)
    decision = assign(again, NOW, [first], POLICY)
    assert (decision.tiers, decision.present) == ((Tier.DAILY,), (first,))
    both = [first, sealed(Tier.DAILY, NOW, 6, staged=5)]
    assert assign(again, NOW, both, POLICY).tiers == ()
    assert assign(again, NOW, both, POLICY).refusal == ""
    assert len(assign(again, NOW, both, POLICY).present) == 2


def test_globals_that_are_sealed_already_lack_nothing() -> None:
    """They have one name, under the longest of the tiers."""
    present = sealed(Tier.DAILY, NOW, 5, kind="globals")
    decision = assign(request(Tier.HOURLY, Tier.DAILY, number=5, kind="globals"), NOW, [present], POLICY)
    assert (decision.tiers, decision.present, decision.refusal) == ((), (present,), "")


def test_an_identifier_of_another_backup_is_refused() -> None:
    """Two backups of one name would make the honest one hard to restore; manifests can be read by everybody."""
    of_another = sealed(Tier.HOURLY, NOW, 5, "victim")
    assert "another backup's" in assign(request(Tier.HOURLY, number=5), NOW, [of_another], POLICY).refusal
    second_name = sealed(Tier.DAILY, NOW, 6, staged=5)
    assert "another backup's" in assign(request(Tier.HOURLY, number=6), NOW, [second_name], POLICY).refusal


def test_an_hourly_schedule_of_minutes_has_room() -> None:
    often = Policy.of({Tier.HOURLY: "*/5 * * * *"}, "UTC", NOW, 64)
    assert often.quotas[Tier.HOURLY].count == 288 + 12
    assert POLICY.quotas[Tier.HOURLY].count == 24 + 12


def test_the_newest_of_each_tier() -> None:
    backups = [
        sealed(Tier.DAILY, NOW - DAY, 1),
        sealed(Tier.DAILY, NOW, 2),
        sealed(Tier.DAILY, NOW + DAY, 3),
        sealed(Tier.HOURLY, NOW, 4, kind="globals"),
    ]
    assert {tier: each.manifest.id for tier, each in admission.newest_by_tier(backups, NOW).items()} == {
        Tier.DAILY: identifier(2)
    }


# ---------------------------------------------------------------- any agent


TIERS = st.lists(st.sampled_from(Tier), min_size=1, max_size=6).map(tuple)
STEPS = st.lists(
    st.tuples(st.integers(0, 40 * 24 * 60), TIERS, st.sampled_from(["app", "b", "c", "d"]), st.integers(0, 30)),
    max_size=60,
)


def play(steps: Sequence[tuple[int, tuple[Tier, ...], str, int]], policy: Policy) -> list[SealedBackup]:
    """What a hostile agent gets, asking whenever and for whatever it likes; nothing expires."""
    held: list[SealedBackup] = []
    now = NOW
    for minutes, tiers, database, number in steps:
        now += dt.timedelta(minutes=minutes)
        asked = request(*tiers, number=number, database=database)
        decision = assign(asked, now, held, policy)
        assert not (decision.tiers and decision.refusal)
        assert len(set(decision.tiers)) == len(decision.tiers)
        assert not {each.manifest.type for each in decision.present} & set(decision.tiers)
        held += [sealed(tier, now, 1000 + len(held), database, staged=number) for tier in decision.tiers]
    return held


@settings(max_examples=60)
@given(STEPS, st.sampled_from([SCHEDULE, FULL]))
def test_whatever_is_asked_for_what_is_granted_is_bounded(
    steps: list[tuple[int, tuple[Tier, ...], str, int]], expressions: Mapping[Tier, str]
) -> None:
    policy = Policy.of(expressions, "UTC", NOW, subjects=3)
    held = play(steps, policy)
    assert len({backup.manifest.database for backup in held}) <= 3
    for database in {backup.manifest.database for backup in held}:
        for tier in Tier:
            moments = [b.manifest.sealed_at for b in held if (b.manifest.database, b.manifest.type) == (database, tier)]
            _assert_bounded(tier, moments, policy)


def _assert_bounded(tier: Tier, moments: list[dt.datetime], policy: Policy) -> None:
    if tier is not Tier.MANUAL and tier not in policy.expressions:
        assert moments == []
        return
    quota = policy.quotas[tier]
    for start in moments:
        inside = [moment for moment in moments if start <= moment < start + quota.window]
        slots = _slots(policy.expressions.get(tier), start - dt.timedelta(minutes=1), start + quota.window)
        assert len(inside) <= quota.count + slots, (tier, inside)
    if tier is Tier.MANUAL:
        assert len(moments) <= MANUAL_PRESENT


def _slots(expression: str | None, start: dt.datetime, end: dt.datetime) -> int:
    """One may have been due before the window as well."""
    count = 1
    while expression is not None and (start := schedule.next_slot(expression, "UTC", start)) < end:
        count += 1
    return 0 if expression is None else count


def test_the_greediest_agent() -> None:
    """Everything, every ten minutes for three days, in the names of ever new databases."""
    held: list[SealedBackup] = []
    policy = Policy.of(FULL, "UTC", NOW, subjects=2)
    for step in range(3 * 24 * 6):
        now = NOW + step * dt.timedelta(minutes=10)
        asked = request(*Tier, number=step, database=f"invented-{step % 7}")
        decision = assign(asked, now, held, policy)
        held += [sealed(tier, now, 10**6 + len(held), asked.database, staged=step) for tier in decision.tiers]
    each = {tier: sum(backup.manifest.type is tier for backup in held) / 2 for tier in Tier}
    assert each[Tier.YEARLY] <= 1
    assert each[Tier.MONTHLY] <= 2
    assert each[Tier.WEEKLY] <= 2 + 1
    assert each[Tier.DAILY] <= 3 * (4 + 1)
    assert each[Tier.MANUAL] <= MANUAL_PRESENT
    assert each[Tier.HOURLY] <= 3 * 24 * 6 / 7 + 1


# ---------------------------------------------------------------- an honest agent


HANDS = st.lists(st.tuples(st.integers(0, 16 * 24 * 60), st.sampled_from([*FULL, Tier.MANUAL])), max_size=8)


@settings(max_examples=12)
@given(HANDS, st.integers(0, 45), st.sampled_from([0, 7, 31]))
def test_an_honest_agent_on_schedule_with_some_runs_by_hand_never_loses_a_tier(
    by_hand: list[tuple[int, Tier]], slow_minutes: int, offset_days: int
) -> None:
    """For two weeks, over the turn of a year or a month: all that is due, sealed after the time that a dump takes."""
    start = dt.datetime(2026, 12, 20, 0, 5, tzinfo=dt.UTC) + offset_days * DAY
    policy = Policy.of(FULL, "UTC", start, subjects=1)
    moments = {start + hours * HOUR: None for hours in range(0, 16 * 24, 4)}
    asked = [(moment, None) for moment in moments] + [(start + m * dt.timedelta(minutes=1), t) for m, t in by_hand]
    held = _year_before(start)
    for number, (moment, hand) in enumerate(sorted(asked, key=lambda each: each[0])):
        newest = {tier: each.manifest.sealed_at for tier, each in admission.newest_by_tier(held, moment).items()}
        tiers = [hand] if hand else list(schedule.due(FULL, "UTC", newest, {}, moment))
        sealed_at = moment + dt.timedelta(minutes=slow_minutes)
        if tiers:
            decision = assign(request(*tiers, number=number), sealed_at, held, policy)
            assert decision.tiers or hand
            if not hand:
                assert decision.tiers == tuple(tiers)
                assert decision.notes == ()
            held += [sealed(tier, sealed_at, 10**5 + len(held), staged=number) for tier in decision.tiers]


def _year_before(start: dt.datetime) -> list[SealedBackup]:
    """The yearly and the monthlies of a year that went as it should, the yearly a little late."""
    year = dt.datetime(start.year - (start.month < 12), 1, 1, 0, 40, tzinfo=dt.UTC)
    return [sealed(Tier.YEARLY, year, 1), sealed(Tier.MONTHLY, start - 20 * DAY, 2)]
