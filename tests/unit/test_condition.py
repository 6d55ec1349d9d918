"""What the vault's health check remembers of failures, and for how long."""

from __future__ import annotations

import datetime as dt

import pytest

from pgkeep.adapters import clock
from pgkeep.vault.condition import FAILURES_REMEMBERED, GLOBALS, NAMELESS, Condition


def test_a_failure_stays_until_the_same_is_sealed() -> None:
    condition = Condition()
    condition.failed("shop", "backup failed: shop")
    for other in (GLOBALS, "blog"):
        condition.sealed(other)
        assert condition.problems(()) == ("backup failed: shop",)
    condition.sealed("shop")
    assert condition.problems(()) == ()


@pytest.mark.parametrize("nameless", NAMELESS)
def test_what_has_no_name_is_made_good_by_any_database(nameless: str) -> None:
    condition = Condition()
    condition.failed(nameless, "backup failed")
    condition.sealed(GLOBALS)
    assert condition.problems(()) == ("backup failed",)
    condition.sealed("shop")
    assert condition.problems(()) == ()


def test_a_database_that_is_gone_is_forgotten_after_a_day() -> None:
    condition = Condition()
    condition.failed("shop", "backup failed: shop")
    assert condition.problems((), clock.now() + FAILURES_REMEMBERED - dt.timedelta(minutes=1))
    assert not condition.problems((), clock.now() + FAILURES_REMEMBERED)


def test_names_without_end_take_no_memory() -> None:
    condition = Condition()
    for number in range(1000):
        condition.failed(f"forged {number}", f"backup failed: forged {number}")
    assert len(condition.failures) == len(condition.problems(())) == 20
    assert condition.problems(())[-1] == "backup failed: forged 999"
