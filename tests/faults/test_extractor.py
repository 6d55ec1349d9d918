"""Whatever cuts a pass off at whatever named step: never half a copy to be seen, and the next pass completes it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import durable
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.progress import Silent
from tests import clusters, outside
from tests.faults.machine import finish, paused
from tests.outside import Outside, Template, spoil

# What the copying of one file passes through, before it has its name.
UNNAMED = ("store.created", "store.written", "store.flushed", "store.compared")


@pytest.fixture(scope="module")
def made(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made


@contextlib.contextmanager
def noted(text: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(text)
        raise


def steps_of(made: Template, *, damaged: bool) -> list[str]:
    """``name#number`` of every step of a pass with one backup to copy, or one damaged copy to mend."""
    with clusters.scratch_directory() as directory:
        own = Outside(made, directory, None, "daily")
        if damaged:
            damage(own)
        return own.machine.steps("extractor", "once", record=directory / "steps")


def damage(own: Outside) -> None:
    """The dump's copy is too short, the manifest's has a wrong bit; the state is lost, so that both are read."""
    own.extractor().run_pass(Silent())
    copy = own.copy(own.source("daily"))
    copy.write_bytes(copy.read_bytes()[:-1])
    spoil(copy.with_name(copy.name + ".manifest.json"))
    subprocess.run(["rm", "-r", own.extracted], check=True)


def temporaries(own: Outside) -> set[str]:
    return {name for name in own.files() if durable.is_temporary(name.rpartition("/")[2])}


def killed_at_each(made: Template, scratch: Path, *, damaged: bool) -> None:
    steps = steps_of(made, damaged=damaged)
    assert len(steps) > 20, steps
    for place, step in enumerate(steps):
        with noted(step):
            (scratch / str(place)).mkdir()
            own = Outside(made, scratch / str(place), None, "daily")
            path = own.source("daily")
            if damaged:
                damage(own)
            name, _, number = step.partition("#")
            assert own.machine.run("extractor", "once", action="kill", at=name, nth=int(number)).code == -9
            if not damaged:
                own.assert_no_half_file()
            own.extractor().run_pass(Silent())
            aside = {name for name in own.files() if ".damaged-" in name}
            assert len(aside) == (2 if damaged else 0)
            assert own.files() - aside == own.expected(path)
            own.assert_no_half_file()
            told = own.events(path)
            assert set(told) & {"extracted", "repaired", "adopted"}, told
            again = own.extractor().run_pass(Silent())
            assert [*again.extracted, *again.repaired, *again.adopted] == []
            assert own.events(path) == told


def test_killed_at_every_step_the_next_pass_completes_it(made: Template, scratch: Path) -> None:
    killed_at_each(made, scratch, damaged=False)


def test_killed_at_every_step_of_a_repair(made: Template, scratch: Path) -> None:
    """The damaged files are kept, each once; at no time is there less than before."""
    killed_at_each(made, scratch, damaged=True)


@pytest.mark.parametrize("step", ["check.damaged", "extract.damage-told", "store.moved-aside", "extract.audited"])
def test_killed_when_a_wrong_bit_is_found(made: Template, scratch: Path, step: str) -> None:
    """What was found out is not forgotten: the next pass mends the copy without reading all others again."""
    own = Outside(made, scratch, None, "daily")
    own.extractor().run_pass(Silent())
    path = own.source("daily")
    spoil(own.copy(path))
    for file in own.extracted.rglob("*.json"):
        file.write_text(
            re.sub(r'("(?:checked_at|rechecked_until)":)"[^"]+"', r'\1"2020-01-01T00:00:00Z"', file.read_text())
        )
    assert own.machine.run("extractor", "once", action="kill", at=step).code == -9
    own.extractor().run_pass(Silent())
    own.assert_no_half_file()
    assert {name.partition(".damaged-")[0] for name in own.files()} == own.expected(path)
    assert sum(".damaged-" in name for name in own.files()) == 1
    assert "repaired" in own.events(path)


def test_killed_while_it_adopts(made: Template, scratch: Path) -> None:
    own = Outside(made, scratch, None, "daily")
    own.extractor().run_pass(Silent())
    (own.external / ".pgkeep-destination.json").unlink()
    assert own.machine.run("extractor", "adopt", action="kill", at="pass.marker-written").code == -9
    assert "adopt" in own.run("once", code=6)
    own.run("adopt", "external")
    own.once()
    own.assert_whole()
    assert own.events().count("destination adopted") == 2


def test_killed_pass_after_pass(made: Template, scratch: Path) -> None:
    """No pass ever comes to its end, and all is copied in the end."""
    own = Outside(made, scratch)
    for step in ("store.published", "extract.copied", "extract.audited", "extract.recorded") * 4:
        own.machine.run("extractor", "once", action="kill", at=step)
        own.assert_no_half_file()
    own.once()
    own.assert_whole()
    assert {path: bool({"extracted", "adopted"} & set(own.events(path))) for path in own.sources()} == dict.fromkeys(
        own.sources(), True
    )


@pytest.mark.parametrize("step", UNNAMED)
def test_what_a_killed_pass_leaves_without_unnamed_files_is_removed(
    made: Template, scratch: Path, loop_filesystem: clusters.LoopFilesystem, step: str
) -> None:
    """On exFAT a file under way has a name, which must not be a copy's; the next pass removes it, and says so."""
    own = Outside(made, scratch, loop_filesystem("exfat", 16), "daily")
    for number in (1, 3):
        assert own.machine.run("extractor", "once", action="kill", at=step, nth=number).code == -9
        assert len(temporaries(own)) == 1
        own.assert_no_half_file()
    own.once()
    own.assert_whole()
    removed = [record for record in own.audit() if record["event"] == "temporary files removed"]
    assert [len(record["paths"]) for record in removed] == [1, 1]


@pytest.mark.parametrize("kind", ["ext4", "exfat"])
@pytest.mark.parametrize("signal", ["term", "int"])
def test_a_pass_that_is_stopped_leaves_nothing_half(
    made: Template, scratch: Path, loop_filesystem: clusters.LoopFilesystem, kind: clusters.FilesystemKind, signal: str
) -> None:
    own = Outside(made, scratch, loop_filesystem(kind, 16), "daily")
    for step in UNNAMED:
        with noted(step):
            result = own.machine.run("extractor", "once", action=signal, at=step)
            assert result.code == (143 if signal == "term" else 130)
            assert result.seconds < 10
            assert own.files() - {"lost+found"} == set()
    own.once()
    own.assert_whole()


@pytest.mark.parametrize("step", ["store.flushed", "store.published", "extract.audited"])
def test_an_error_in_the_middle_is_told_and_the_next_pass_completes_it(
    made: Template, scratch: Path, step: str
) -> None:
    own = Outside(made, scratch, None, "daily")
    path = own.source("daily")
    shown = own.once(6, action="full", at=step)
    assert "the disk is full" in shown["troubles"][0]["message"]
    assert "extraction failed" in own.events(path)
    assert temporaries(own) == set()
    own.assert_no_half_file()
    own.once()
    own.assert_whole()


def test_what_expires_while_it_is_copied_is_copied_all_the_same(made: Template, scratch: Path) -> None:
    """The vault removes the files under the extractor's hands: it holds all of them open."""
    own = Outside(made, scratch, None, "daily")
    path = own.source("daily")
    whole = own.expected(path)
    with paused(own.machine, scratch / "gate", "extractor", "once", "--json", at="extract.opened") as running:
        own.expire(path)
    finish(running).must()
    assert own.files() == whole
    subprocess.run(["sha256sum", "--quiet", "-c", f"{own.copy(path)}.sha256"], cwd=own.copy(path).parent, check=True)
    assert own.once()["ok"]


def test_what_expires_just_before_is_passed_over(made: Template, scratch: Path) -> None:
    own = Outside(made, scratch, None, "daily")
    with paused(own.machine, scratch / "gate", "extractor", "once", "--json", at="pass.compared") as running:
        own.expire(own.source("daily"))
    assert finish(running).must().json["ok"]
    assert own.files() == set()
    assert own.events() == ["destination adopted"]


def test_a_torn_line_of_the_audit_log_stays_alone(made: Template, scratch: Path) -> None:
    own = Outside(made, scratch, None, "daily")
    own.log.write_text('{"time":"2026-')
    own.once()
    first, *others = own.log.read_text().splitlines()
    assert first == '{"time":"2026-'
    assert len(others) == 2
    assert all(line.startswith("{") and line.endswith("}") for line in others)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_an_audit_log_that_is_no_file_fails_clearly(made: Template, scratch: Path, kind: str) -> None:
    own = Outside(made, scratch, None, "daily")
    (scratch / "victim").write_text("precious\n")
    if kind == "link":
        own.log.symlink_to(scratch / "victim")
    elif kind == "fifo":
        os.mkfifo(own.log)
    else:
        own.log.mkdir()
    stderr = own.run("once", code=11 if kind == "fifo" else 6)
    assert str(own.log) in stderr
    assert (scratch / "victim").read_text() == "precious\n"
