"""``pgkeep health``: true to what the service says, and false when it says nothing."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pgkeep.adapters import clock
from pgkeep.cli.context import Context
from pgkeep.cli.main import cli
from pgkeep.domain import health
from pgkeep.domain.health import Role

FILES: dict[Role, str] = {
    "agent": "staging/.agent-health.json",
    "vault": "state/health.json",
    "extractor": "extracted/.health.json",
}


def ask(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["health", *arguments, "--root", str(root)], obj=Context())


def say(root: Path, role: Role, *problems: str, seconds_ago: float = 0) -> None:
    path = root / FILES[role]
    path.parent.mkdir(exist_ok=True)
    moment = clock.now() - dt.timedelta(seconds=seconds_ago)
    path.write_bytes(health.encode(health.Health(role=role, pid=1, time=moment, problems=problems)))


@pytest.mark.parametrize("role", FILES)
def test_before_the_first_word_a_service_has_not_started(tmp_path: Path, role: Role) -> None:
    result = ask(tmp_path, role)
    assert (result.exit_code, result.output) == (1, f"the {role} has not started yet\n")


@pytest.mark.parametrize("role", FILES)
def test_each_role_is_asked_in_its_own_place(tmp_path: Path, role: Role) -> None:
    say(tmp_path, role)
    result = ask(tmp_path, role)
    assert (result.exit_code, result.output) == (0, "healthy\n")


def test_problems_are_printed_one_a_line_and_nothing_in_them_steers_the_terminal(tmp_path: Path) -> None:
    say(tmp_path, "agent", "the last run failed: \x1b[2J", "the daily backup is overdue")
    result = ask(tmp_path, "agent")
    assert result.exit_code == 1
    assert result.output == "the last run failed: \\x1b[2J\nthe daily backup is overdue\n"


def test_as_json(tmp_path: Path) -> None:
    say(tmp_path, "vault", "no room")
    result = ask(tmp_path, "vault", "--json")
    assert result.exit_code == 1
    assert json.loads(result.output) == {"role": "vault", "healthy": False, "problems": ["no room"]}


def test_silence_is_a_problem(tmp_path: Path) -> None:
    say(tmp_path, "agent", seconds_ago=59)
    assert ask(tmp_path, "agent").exit_code == 0
    say(tmp_path, "agent", seconds_ago=90)
    result = ask(tmp_path, "agent")
    assert result.exit_code == 1
    assert "has not reported for" in result.output


def test_a_clock_that_was_set_back_is_none(tmp_path: Path) -> None:
    say(tmp_path, "agent", seconds_ago=-3600)
    assert ask(tmp_path, "agent").exit_code == 0


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b" " * (health.SIZE_LIMIT_BYTES + 1)])
def test_a_broken_word_is_no_good_one(tmp_path: Path, data: bytes) -> None:
    say(tmp_path, "agent")
    (tmp_path / FILES["agent"]).write_bytes(data)
    assert ask(tmp_path, "agent").exit_code == 1
