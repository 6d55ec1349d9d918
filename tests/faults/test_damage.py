"""What root, a failing disk or a careless person did to the vault is named; nothing of it is made worse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.machine import Machine, names_in


def _unseal(*paths: Path) -> None:
    subprocess.run(["chattr", "-i", "-a", *paths], check=True)


def _dump(machine: Machine) -> Path:
    """A backup beside another; both whole."""
    machine.backup()
    return Path(machine.backup("daily")["path"])


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_the_flag_is_taken_away(machine: Machine) -> None:
    dump = _dump(machine)
    _unseal(dump)
    shown = machine.run("list", "--json").must(7)
    assert [each["state"] for each in shown.json] == ["sealed", "unprotected"]
    assert f"{dump.name} has lost its immutable flag" in shown.stderr
    report = machine.run("verify", "--all", "--json").must(7).json
    assert [finding["code"] for finding in report["findings"]] == ["unprotected"]


@pytest.mark.parametrize("suffix", ["", ".sha256", ".manifest.json"])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
def test_a_file_is_damaged(machine: Machine, suffix: str, damage: str) -> None:
    """Named by list where it shows at a glance, by verify always; the other backup stays good."""
    dump = _dump(machine)
    path = dump.with_name(dump.name + suffix)
    _unseal(dump.parent, path)
    path.chmod(0o600)
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        _flip(path, path.stat().st_size // 2)
    subprocess.run(["chattr", "+i", dump.parent, *([path] if path.exists() else [])], check=True)
    result = machine.run("verify", "--all", "--json")
    if damage == "deleted" and suffix == ".manifest.json":
        # Nothing says any more that this is a backup: the next run puts it aside.
        result.must(0)
        assert "was moved to" in machine.run("backup", "hourly").must().stderr
        assert len(names_in(machine.layout.quarantine)) == 2
        return
    result.must(7)
    told = " ".join(finding["message"] for finding in result.json["findings"]) + result.stderr
    assert dump.name in told
    # A new backup is made all the same, and touches nothing of this.
    before = names_in(dump.parent)
    machine.run("backup", "hourly").must()
    assert names_in(dump.parent) == before
    assert names_in(machine.layout.quarantine) == []


def test_strangers_are_put_aside(machine: Machine) -> None:
    """Files, directories and links that belong to no backup: moved, reported, never deleted or followed."""
    dump = _dump(machine)
    tier = dump.parent
    _unseal(tier)
    (tier / "notes.txt").write_text("keep me")
    (tier / f"{dump.name}.bak").write_bytes(b"x" * 100)
    (tier / "folder").mkdir()
    (tier / "folder" / "inside").write_text("me too")
    (tier / "link").symlink_to("/etc/passwd")
    (tier / ("ä" * 120)).write_text("a long name")
    (tier / os.fsdecode(b"not-utf-8-\xff")).write_text("bytes")
    (tier / "-line\nbreak").write_text("newline")
    (tier / "sealed").write_text("flagged")
    (tier / "appended").write_text("flagged")
    subprocess.run(["chattr", "+i", tier / "sealed"], check=True)
    subprocess.run(["chattr", "+a", tier / "appended"], check=True)
    result = machine.run("backup", "daily").must()
    assert result.stderr.count("belongs to no backup") == 9
    assert not any("\x1b" in line or "\udcff" in line for line in result.stderr.splitlines())
    moved = sorted(machine.layout.quarantine.iterdir())
    assert len(moved) == 9
    texts = {
        path.read_text() for path in moved if path.is_file() and not path.is_symlink() and path.stat().st_size < 50
    }
    assert texts == {"keep me", "a long name", "bytes", "newline", "flagged"}
    assert [path.readlink() for path in moved if path.is_symlink()] == [Path("/etc/passwd")]
    assert [record["event"] for record in machine.audit()].count("quarantined") == 9
    machine.assert_whole()
    for path in machine.layout.quarantine.iterdir():
        assert path.name.split("-", 1)[1].startswith("daily-")


def test_something_else_lives_there(machine: Machine) -> None:
    machine.layout.active.mkdir(parents=True)
    (machine.layout.active / "precious.txt").write_text("not ours")
    result = machine.run("backup").must(11)
    assert "precious.txt" in result.stderr
    assert names_in(machine.layout.active) == ["precious.txt"]


def test_the_identity_file_is_gone(machine: Machine) -> None:
    """A vault with backups and without its identity is not taken for a new one."""
    machine.backup()
    _unseal(machine.layout.active, machine.layout.active / "vault.json")
    (machine.layout.active / "vault.json").unlink()
    result = machine.run("backup").must(11)
    assert "identity file is missing" in result.stderr
    assert "there is no vault" in machine.run("list").must(10).stderr


@pytest.mark.parametrize(
    ("content", "code"), [('{"format": 2, "id": "x", "created_at": "2030-01-01T00:00:00Z"}', 11), ("{", 7), ("", 7)]
)
def test_an_identity_that_is_not_known(machine: Machine, content: str, code: int) -> None:
    machine.backup()
    identity = machine.layout.active / "vault.json"
    _unseal(identity)
    identity.chmod(0o644)
    identity.write_text(content)
    for verb in ("backup", "cleanup"):
        result = machine.run(verb).must(code)
        assert ("use a newer pgkeep" if code == 11 else "unreadable") in result.stderr
    assert len(machine.identifiers()) == 1


@pytest.mark.parametrize("content", ["garbage", "", '{"id": "x"}', "[]", '{"action": "format-the-disk"}'])
def test_a_journal_that_makes_no_sense(machine: Machine, content: str) -> None:
    """Nothing is done on its word; what can be read, can be read on."""
    machine.backup()
    (machine.layout.journal / "20260101T000000Z-abcdef.json").write_text(content)
    result = machine.run("backup").must(7)
    assert "journal" in result.stderr
    assert "nothing was changed" in result.stderr
    assert len(machine.run("list", "--json").must().json) == 1
    machine.assert_whole()


def place(directory: str, filename: str, inodes: dict[str, int]) -> dict[str, object]:
    return {"directory": directory, "filename": filename, "inodes": inodes}


def test_a_journal_that_lies(machine: Machine) -> None:
    """Names that hold other inodes than it speaks of are not touched; names that lead away are refused."""
    machine.backup()
    backup = machine.backups()[0]
    name = backup.manifest.filename
    entry = {"id": "20260101T000000Z-abcdef", "action": "expire"}
    path = machine.layout.journal / "20260101T000000Z-abcdef.json"
    path.write_text(json.dumps({**entry, "places": [place("manual", name, {name: 1, f"{name}.manifest.json": 2})]}))
    machine.run("backup").must()
    assert backup.manifest.id in machine.identifiers()
    machine.assert_whole()
    outside = machine.root / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    inode = (outside / "file").stat().st_ino
    for directory, lure in (("../outside", "file"), ("manual", "../../outside/file")):
        path.write_text(json.dumps({**entry, "places": [place(directory, lure, {lure: inode})]}))
        machine.run("backup").must(7)
        assert (outside / "file").read_text() == "mine"
    path.unlink()


def test_a_torn_audit_record(machine: Machine) -> None:
    """Half a line stays what it is: the next record begins on its own."""
    machine.backup()
    subprocess.run(["chattr", "-a", machine.layout.audit], check=True)
    with machine.layout.audit.open("a") as file:
        file.write('{"time": "2026-')
    machine.backup()
    lines = machine.layout.audit.read_text().splitlines()
    assert [json.loads(lines[place])["event"] for place in (0, 2)] == ["sealed", "sealed"]
    assert lines[1] == '{"time": "2026-'


def test_leftovers_in_staging(machine: Machine) -> None:
    """Only what is the agent's own by its name is cleared away; a link in its place is not followed."""
    machine.backup()
    outside = machine.root / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    staging = machine.layout.staging
    (staging / "20260101T000000Z-abcdef.partial" / "raw").mkdir(parents=True)
    (staging / "20260101T000000Z-abcdee.ready").mkdir()
    (staging / "20260101T000000Z-abcded.partial").symlink_to(outside)
    (staging / "something-else").write_text("stays")
    machine.run("backup").must()
    assert (outside / "file").read_text() == "mine"
    assert "something-else" in names_in(staging)
    assert "20260101T000000Z-abcdef.partial" not in names_in(staging)
    assert "20260101T000000Z-abcdee.ready" not in names_in(staging)
    shutil.rmtree(outside)
