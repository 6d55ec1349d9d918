"""The host's root rewrites the audit log so that it hangs together again: what lies elsewhere contradicts it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgkeep.domain import audit
from tests.anchored import Anchored, chained_anew
from tests.faults.machine import PROJECT

INTEGRITY, NOT_FOUND = 7, 10


@pytest.fixture
def anchored(scratch: Path) -> Anchored:
    """Nine records; the heads after the third and after the ninth are at the destination."""
    own = Anchored(scratch)
    own.record(count=3)
    own.publish()
    own.record(count=6)
    own.publish()
    return own


def pgkeep(own: Anchored, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "DB_", "BACKUP"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pgkeep", *arguments],
        env={**inherited, "PYTHONPATH": str(PROJECT / "src"), "PGKEEP_ROOT": str(own.root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def verified(own: Anchored, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = pgkeep(own, "audit", "verify", "--json", *arguments)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"] == (code == 0)
    return found


def against(own: Anchored, code: int = 0) -> dict[str, Any]:
    found = verified(own, "--against", str(own.external), code=code)
    compared: dict[str, Any] = found["against"]
    return compared


def contradictions(own: Anchored) -> list[str]:
    return [each["kind"] for each in against(own, INTEGRITY)["contradictions"]]


def test_an_honest_log(anchored: Anchored) -> None:
    assert verified(anchored)["records"] == 9
    anchored.record(count=2)
    found = against(anchored)
    assert (found["anchors"], found["contradictions"], found["unreadable"]) == (2, [], [])
    assert found["newest"]["head"]["sequence"] == 9
    said = pgkeep(anchored, "audit", "verify", "--against", str(anchored.external))
    assert said.returncode == 0
    assert "2 anchors" in said.stderr


def _one_changed(own: Anchored) -> None:
    lines = own.lines()
    own.rewrite(chained_anew([*lines[:5], lines[5].replace(b"sealed", b"tended"), *lines[6:]]))


def _one_left_out(own: Anchored) -> None:
    lines = own.lines()
    own.rewrite(chained_anew([*lines[:5], *lines[6:]]))
    own.record()


def _one_put_in(own: Anchored) -> None:
    lines = own.lines()
    own.rewrite(chained_anew([*lines[:5], lines[1], *lines[5:]]))


def _made_of_one_piece(own: Anchored) -> None:
    own.rewrite(chained_anew([line.replace(b"backup", b"secret") for line in own.lines()]))
    own.record(count=20)


REWRITINGS: dict[Callable[[Anchored], None], list[str]] = {
    _one_changed: ["rewritten"],
    _one_left_out: ["rewritten"],
    _one_put_in: ["rewritten"],
    _made_of_one_piece: ["rewritten", "rewritten"],
}


@pytest.mark.parametrize("attack", REWRITINGS)
def test_a_rewritten_log_with_a_chain_that_holds(anchored: Anchored, attack: Callable[[Anchored], None]) -> None:
    attack(anchored)
    # By itself it can't be told from an honest one: that is what the anchors are for.
    assert verified(anchored)["problems"] == []
    assert contradictions(anchored) == REWRITINGS[attack]
    said = pgkeep(anchored, "audit", "verify", "--against", str(anchored.external))
    assert said.returncode == INTEGRITY
    assert "record 9 was anchored at" in said.stderr


def test_it_stays_detected_when_the_extractor_anchors_what_was_forged(anchored: Anchored) -> None:
    _one_changed(anchored)
    assert anchored.publish().alarm
    for _ in range(3):
        anchored.record()
        anchored.publish()
    assert contradictions(anchored) == ["rewritten"]


@pytest.mark.parametrize("left", [0, 2, 8])
def test_a_log_that_was_cut_off(anchored: Anchored, left: int) -> None:
    anchored.rewrite(anchored.lines()[:left])
    expected = ["cut off"] * (2 if left < 3 else 1)
    assert contradictions(anchored) == expected
    assert verified(anchored, code=0 if left else NOT_FOUND)["lines"] == left


def test_an_older_log_in_place_of_the_newer(scratch: Path) -> None:
    """A replay: it is authentic, down to the last byte."""
    own = Anchored(scratch)
    own.record(count=4)
    own.publish()
    older = own.log.read_bytes()
    own.record(count=4)
    own.publish()
    own.log.write_bytes(older)
    assert contradictions(own) == ["cut off"]
    # And when it has grown to the same length again.
    own.record("cleanup asked", count=9)
    assert contradictions(own) == ["rewritten"]


def test_a_log_that_is_gone(anchored: Anchored) -> None:
    anchored.log.unlink()
    assert contradictions(anchored) == ["cut off", "cut off"]
    assert "there is no audit log" in pgkeep(anchored, "audit", "verify").stderr


def test_a_change_that_breaks_the_chain_is_named_by_its_line(anchored: Anchored) -> None:
    lines = anchored.lines()
    anchored.rewrite([*lines[:4], lines[4].replace(b"sealed", b"tended"), *lines[5:]])
    found = verified(anchored, code=INTEGRITY)
    assert [each["line"] for each in found["problems"]] == [6]
    said = pgkeep(anchored, "audit", "verify")
    assert said.returncode == INTEGRITY
    assert re.search(r"line 6 BREAKS THE CHAIN: the line before it is not the one", said.stderr)


def test_anchors_that_were_forged_are_no_reason_to_be_silent(anchored: Anchored) -> None:
    """Whoever can write there but not here can raise the alarm, and nothing else."""
    honest = anchored.external / anchored.files()[0]
    forged = honest.with_name("20991231T000000.000000Z-77.json")
    forged.write_text(honest.read_text().replace('"sequence":3', '"sequence":77'))
    assert contradictions(anchored) == ["cut off"]
    forged.write_text("{")
    assert len(against(anchored, INTEGRITY)["unreadable"]) == 1


def test_another_vaults_destination_is_no_comparison(anchored: Anchored, scratch: Path) -> None:
    (scratch / "second").mkdir()
    other = Anchored(scratch / "second")
    other.record(count=3)
    shutil.rmtree(other.external)
    shutil.copytree(anchored.external, other.external)
    found = against(other, NOT_FOUND)
    assert (found["anchors"], found["of_other_vaults"]) == (0, 2)
    said = pgkeep(other, "audit", "verify", "--against", str(other.external))
    assert (said.returncode, "no anchor of this vault" in said.stderr) == (NOT_FOUND, True)


# ---------------------------------------------------------------- reading the log


def test_show(anchored: Anchored) -> None:
    anchored.record("backup failed", of="app", reason="pg_dump: \x1b[31merror\n")
    shown = pgkeep(anchored, "audit", "show")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(
        r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC  10  backup failed  by=uid \d+, pid \d+  id=backup 0  of=app  "
        r"reason=pg_dump: \\x1b\[31merror\\n",
        lines[-1],
    )
    document = json.loads(pgkeep(anchored, "audit", "show", "--json").stdout)
    assert [each["line"] for each in document] == list(range(1, 11))
    assert document[-1]["event"] == "backup failed"


def test_show_since(anchored: Anchored) -> None:
    lines = anchored.lines()
    old = [line.replace(b'"time":"20', b'"time":"19') for line in lines[:6]]
    anchored.rewrite([*old[:4], b"torn \xff\x1b", *old[4:], *lines[6:], b"[]"])
    everything = json.loads(pgkeep(anchored, "audit", "show", "--json").stdout)
    assert len(everything) == 11
    assert everything[4] == {"line": 5, "unreadable": "torn \\xff\x1b\n"}
    recent = json.loads(pgkeep(anchored, "audit", "show", "--json", "--since", "2h").stdout)
    assert [each["line"] for each in recent] == [8, 9, 10, 11]
    assert len(pgkeep(anchored, "audit", "show", "--since", "2000-01-01").stdout.splitlines()) == 4
    assert pgkeep(anchored, "audit", "show", "--since", "2000-01-01T00:00+02:00", "--json").returncode == 0
    assert pgkeep(anchored, "audit", "show", "--since", "9999-01-01", "--json").stdout.strip() == "[]"
    for nonsense in ("yesterday", "0d", "7y", "999999w", "0001-01-01T00:00+23:00"):
        assert pgkeep(anchored, "audit", "show", "--since", nonsense).returncode == 2, nonsense


def test_show_without_a_log(anchored: Anchored) -> None:
    anchored.log.unlink()
    assert pgkeep(anchored, "audit", "show").stdout == ""
    assert json.loads(pgkeep(anchored, "audit", "show", "--json").stdout) == []
    assert verified(anchored, code=NOT_FOUND)["head"] == audit.GENESIS
