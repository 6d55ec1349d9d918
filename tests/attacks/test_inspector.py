"""The process that reads hostile dumps: what it may, and that the vault believes nothing of what it says."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import privileges
from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.errors import IntegrityError, ToolError
from pgkeep.vault import inspector, inspector_process
from pgkeep.vault.inspect import inspect
from pgkeep.vault.inspector import Inspector, InspectorGoneError
from tests import clusters
from tests.attacks import captured_inspector, forge
from tests.vault_daemon import PROJECT


@pytest.fixture
def dump(tmp_path: Path) -> Iterator[LocalFile]:
    """As the vault's private copy is: its own, and open for writing."""
    path = tmp_path / "dump"
    path.write_bytes(forge.build())
    path.chmod(0o440)
    descriptor = os.open(path, os.O_RDWR)
    with LocalFile(descriptor) as file:
        yield file


@pytest.fixture
def python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}/src:{PROJECT}")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch, python_path: None, request: pytest.FixtureRequest) -> Iterator[Inspector]:
    monkeypatch.setenv("DEED", request.param)
    with Inspector(module=captured_inspector.__name__) as own:
        yield own


def test_it_finds_what_a_look_by_ourselves_finds(dump: LocalFile, python_path: None) -> None:
    ticks: list[None] = []
    with Inspector(lambda: ticks.append(None)) as own:
        assert own.inspect(dump) == inspect(dump, "content")
        os.pwrite(dump.descriptor, b"\0\0\0", 200)
        damaged = own.inspect(dump)
        assert damaged == inspect(dump, "content")
        assert damaged.defects
    assert ticks


def test_started_by_root_it_is_nobody_without_any_right(python_path: None) -> None:
    clusters.need_root("starting a process as nobody")
    with Inspector() as own:
        what = privileges.standing(own.pid)
        assert set(what.uids) == set(what.gids) == {privileges.NOBODY}
        assert what.groups == ()
        assert (what.permitted, what.effective, what.inheritable, what.ambient, what.bounding) == (0, 0, 0, 0, 0)
        assert what.no_new_privileges


@pytest.mark.parametrize("captured", ["escape"], indirect=True)
def test_a_captured_look_gets_nowhere(dump: LocalFile, captured: Inspector) -> None:
    clusters.need_root("starting a process as nobody")
    found = captured.inspect(dump)
    assert found.defects == ("tried",)
    # It is as it was, and there to look again.
    assert captured.inspect(dump).defects == ("tried",)


@pytest.mark.parametrize(
    ("captured", "message"),
    [
        ("nothing", "makes no sense"),
        ("nonsense", "makes no sense"),
        ("another form", "makes no sense"),
        ("talk", "too large to be true"),
        ("swell", "more memory"),
        ("crash", "ended by SIGSEGV"),
        ("give up", "broke off (exit 9)"),
        ("spin", "ended by SIGXCPU"),
    ],
    indirect=["captured"],
)
def test_a_look_that_lies_or_dies_is_the_dumps_defect(dump: LocalFile, captured: Inspector, message: str) -> None:
    for _ in range(2):
        with pytest.raises(IntegrityError) as caught:
            captured.inspect(dump)
        assert message in caught.value.message


@pytest.mark.parametrize("captured", ["hang"], indirect=True)
def test_a_look_that_never_ends(dump: LocalFile, captured: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector_process, "wall_seconds", lambda size_bytes: 0.2)
    monkeypatch.setattr(inspector, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(inspector, "_TICK_SECONDS", 0.1)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="took too long"):
            captured.inspect(dump)
        # The next question ends the one before.
        assert len(_children(captured.pid)) == 1


def test_a_bomb_is_stopped_by_the_limits(tmp_path: Path, python_path: None) -> None:
    """An index that inflates a thousandfold."""
    path = tmp_path / "bomb"
    path.write_bytes(forge.with_compressed_index(b"", forge.zeros_member(256 << 20, b"-")))
    with LocalFile.open(path) as file, Inspector() as own:
        started = time.monotonic()
        found = own.inspect(file)
        assert found.defects
        assert found.contents is None
        assert time.monotonic() - started < 10


def test_a_dead_inspector_is_replaced_by_one_with_as_few_rights_or_not_at_all(
    dump: LocalFile, python_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Inspector() as own:
        first = own.pid
        before = privileges.standing(first)
        os.kill(first, signal.SIGKILL)
        _wait_for_end(own)
        assert own.inspect(dump).defects == ()
        assert own.pid != first
        assert privileges.standing(own.pid) == before
        os.kill(own.pid, signal.SIGKILL)
        _wait_for_end(own)
        # The vault has become another user in between.
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(InspectorGoneError):
            own.inspect(dump)


def test_killed_while_it_looks(dump: LocalFile, python_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEED", "hang")
    with Inspector(module=captured_inspector.__name__) as own:
        own.alive = lambda: os.kill(own.pid, signal.SIGKILL)
        with pytest.raises((InspectorGoneError, IntegrityError)):
            own.inspect(dump)


def test_it_ends_with_its_line(python_path: None) -> None:
    with Inspector() as own:
        pid = own.pid
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_does_not_start_is_said_so(python_path: None) -> None:
    with pytest.raises(ToolError, match=r"did not start.*No module named"):
        Inspector(module="pgkeep.there_is_none")


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _wait_for_end(own: Inspector) -> None:
    deadline = time.monotonic() + 5
    while own._started.running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
