"""The head of the audit log on its way to a real directory: how often, after faults, and what raises the alarm."""

from __future__ import annotations

import datetime as dt
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pgkeep.domain import audit
from pgkeep.extractor.anchors import HEARTBEAT, Memory
from tests import clusters
from tests.anchored import Anchored, Clock, chained_anew
from tests.clusters import LoopFilesystem
from tests.faults.machine import PROJECT
from tests.faults.test_storage import filled

DIES = """
import os, signal, sys
from pathlib import Path
from tests.anchored import Anchored, Listener

class Dying(Listener):
    def step(self, name):
        super().step(name)
        if len(self.steps) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

own = Anchored(Path(sys.argv[1]))
own.listener = Dying()
own.publish()
print(len(own.listener.steps))
"""


@pytest.fixture
def anchored(scratch: Path) -> Anchored:
    return Anchored(scratch)


def test_one_for_each_new_head_and_no_more(anchored: Anchored) -> None:
    anchored.record(count=3)
    for _ in range(3):
        anchored.publish()
    assert anchored.sequences() == [3]
    anchored.record()
    anchored.publish()
    assert anchored.sequences() == [3, 4]
    assert (anchored.listener.warnings, anchored.memory.trouble, anchored.memory.alarm) == ([], "", "")
    (first, _) = anchored.files()
    assert stat.S_IMODE((anchored.external / first).stat().st_mode) == 0o444


def test_it_says_what_the_examination_of_the_log_says(anchored: Anchored) -> None:
    anchored.record(count=5)
    head = anchored.publish().head
    assert head is not None
    found = audit.examine(anchored.lines())
    assert (head.sequence, head.sha256) == (found.sequence, found.head)
    assert head.log_bytes == anchored.log.stat().st_size
    assert anchored.collect().anchors[0].anchor.head == head


def test_stock_tools_can_compare_a_log_with_an_anchor(anchored: Anchored) -> None:
    """As docs/format.md says."""
    anchored.record(count=4)
    head = anchored.publish().head
    assert head is not None
    anchored.record(count=2)
    script = f"head -c {head.log_bytes} {anchored.log} | tail -n 1 | tr -d '\\n' | sha256sum"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == head.sha256


def test_a_heartbeat_each_day(anchored: Anchored, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    anchored.record()
    anchored.publish()
    clock.ahead = HEARTBEAT - dt.timedelta(minutes=1)
    anchored.publish()
    assert anchored.sequences() == [1]
    clock.ahead = HEARTBEAT + dt.timedelta(minutes=1)
    anchored.publish()
    assert anchored.sequences() == [1, 1]
    # A clock that was set back must not silence it for years.
    clock.ahead = dt.timedelta()
    anchored.publish()
    anchored.publish()
    assert anchored.sequences() == [1, 1, 1]


def test_what_is_remembered_survives_being_written_down(anchored: Anchored) -> None:
    assert msgspec.json.decode(msgspec.json.encode(Memory()), type=Memory) == Memory()
    anchored.record()
    anchored.memory = msgspec.json.decode(msgspec.json.encode(anchored.publish()), type=Memory)
    anchored.publish()
    assert anchored.sequences() == [1]


def test_before_there_is_a_log(anchored: Anchored) -> None:
    anchored.log.unlink(missing_ok=True)
    assert anchored.publish() == Memory()
    anchored.log.touch()
    assert anchored.publish() == Memory()
    assert (anchored.files(), anchored.listener.warnings) == ([], [])


# ---------------------------------------------------------------- faults


def test_a_record_in_the_making_is_not_the_head_yet(anchored: Anchored) -> None:
    anchored.record(count=3)
    whole = anchored.log.read_bytes()
    last = len(anchored.lines()[-1]) + 1
    for missing in range(1, last + 1):
        anchored.log.write_bytes(whole[:-missing])
        anchored.memory = Memory()
        head = anchored.publish().head
        assert head is not None
        assert (head.sequence, head.log_bytes) == (2, len(whole) - last)


def test_torn_lines_at_the_end(anchored: Anchored) -> None:
    anchored.record(count=2)
    with anchored.log.open("ab") as file:
        file.write(b'{"time":"2026\n' + b"\0" * 5000 + b"\n")
    assert anchored.publish().head is not None
    assert anchored.sequences() == [2]
    anchored.record()
    anchored.publish()
    assert (anchored.sequences(), anchored.memory.alarm) == ([2, 3], "")


def test_the_largest_record(anchored: Anchored) -> None:
    anchored.record(count=2, reason="x" * 4096, **{f"detail{number}": "ä" * 2000 for number in range(14)})
    assert len(anchored.lines()[-1]) > 50_000
    anchored.publish()
    anchored.record()
    anchored.publish()
    assert (anchored.sequences(), anchored.memory.alarm) == ([2, 3], "")


def test_the_end_of_an_overlong_line_is_no_record(anchored: Anchored) -> None:
    """The tail that is read begins in the middle of it, just where something looks like one."""
    forged = b'{"sequence":7,"previous":"' + b"0" * 64 + b'","time":"2026-01-31T00:00:00Z","pad":"'
    padding = b"x" * (4 * audit.RECORD_LIMIT_BYTES - len(forged) - 3)
    anchored.log.write_bytes(b"junk" + forged + padding + b'"}\n')
    assert "does not end in records" in anchored.publish().trouble
    assert anchored.files() == []


def _junk(path: Path) -> None:
    path.write_bytes(b"x" * 2_000_000)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [_junk, _fifo, _link])
def test_what_is_no_log_is_told_once_and_no_anchor(anchored: Anchored, make: Callable[[Path], None]) -> None:
    anchored.log.unlink(missing_ok=True)
    make(anchored.log)
    for _ in range(3):
        assert anchored.publish().trouble
    assert len(anchored.listener.warnings) == 1
    assert anchored.files() == []
    anchored.log.unlink()
    anchored.record()
    assert anchored.publish().trouble == ""
    assert anchored.sequences() == [1]


def test_a_full_destination_is_told_once_and_tried_again(scratch: Path, loop_filesystem: LoopFilesystem) -> None:
    small = loop_filesystem("ext4", clusters.SMALLEST_MIB["ext4"])
    own = Anchored(scratch, external=small / "external")
    own.record()
    with filled(small, leave_bytes=0):
        for _ in range(2):
            assert "bytes free" in own.publish().trouble
        assert len(own.listener.warnings) == 1
        assert own.memory.head is None
    assert own.publish().trouble == ""
    assert own.sequences() == [1]


def test_killed_at_every_step(scratch: Path) -> None:
    """What is there is whole; the next pass brings what is missing."""
    own = Anchored(scratch)
    own.record(count=2)
    steps = int(killed(own, 0).stdout)
    assert steps >= 5
    for number in range(1, steps + 1):
        before = len(own.sequences())
        assert killed(own, number).returncode == -signal.SIGKILL
        own.memory = Memory()
        own.publish()
        assert len(own.sequences()) in (before + 1, before + 2)
    assert set(own.sequences()) == {2}


def killed(own: Anchored, at: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", DIES, str(own.root.parent), str(at)],
        env=os.environ | {"PYTHONPATH": f"{PROJECT}/src:{PROJECT}"},
        capture_output=True,
        text=True,
        timeout=30,
    )


# ---------------------------------------------------------------- the alarm


def _cut_off(own: Anchored) -> None:
    own.rewrite(own.lines()[:3])


def _cut_off_and_grown(own: Anchored) -> None:
    own.rewrite(own.lines()[:3])
    own.record(count=9)


def _rewritten(own: Anchored) -> None:
    own.rewrite(chained_anew([line.replace(b"backup 1", b"backup 7") for line in own.lines()]))


def _emptied(own: Anchored) -> None:
    own.rewrite([])


def _taken_away(own: Anchored) -> None:
    own.log.unlink()


@pytest.mark.parametrize("change", [_cut_off, _cut_off_and_grown, _rewritten, _emptied, _taken_away])
def test_a_log_that_is_another_is_told_at_the_next_pass(anchored: Anchored, change: Callable[[Anchored], None]) -> None:
    anchored.record(count=6)
    assert anchored.publish().alarm == ""
    change(anchored)
    assert "cut off, rewritten or replaced" in anchored.publish().alarm
    assert len(anchored.listener.warnings) == 1
    # It is not forgotten because the log grows again; and what is there now is anchored too.
    anchored.record(count=9)
    assert anchored.publish().alarm
    assert len(anchored.listener.warnings) == 1
    assert anchored.memory.head is not None
    assert anchored.memory.head.sequence == audit.examine(anchored.lines()).sequence


# ---------------------------------------------------------------- what lies among them


def test_strangers_among_the_anchors(anchored: Anchored) -> None:
    anchored.record()
    anchored.publish()
    folder = anchored.external / "anchors"
    (folder / "junk.json").write_text("{}")
    (folder / "large.json").write_bytes(b" " * 100_000)
    (folder / "readme.txt").write_text("no anchor")
    os.mkfifo(folder / "fifo.json")
    other = (anchored.external / anchored.files()[0]).read_text().replace(anchored.vault_id, "f" * 32)
    (folder / "other.json").write_text(other)
    found = anchored.collect()
    assert len(found.anchors) == 1
    assert found.foreign == 1
    assert [text.partition(":")[0] for text in found.unreadable] == ["anchors/junk.json", "anchors/large.json"]


def test_no_anchors_at_all(anchored: Anchored) -> None:
    found = anchored.collect()
    assert (found.anchors, found.foreign, found.unreadable) == ((), 0, ())
