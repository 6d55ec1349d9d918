"""A process that is killed at every step of a copy to a bucket: nothing half counts, and the next run finishes it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pgkeep.adapters import clock
from pgkeep.adapters.destinations import Content
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.progress import Silent
from tests.s3_servers import SeaweedFS, hands, seaweed, store

__all__ = ["seaweed"]

DRIVER = Path(__file__).with_name("s3_driver.py")
PART_BYTES = 5 << 20
PATH = "daily/2026-11-23/2026-11-23_00-00-00.sql.gz"
IN_PARTS = (
    ("store.begun", 1),
    ("store.created", 1),
    ("store.part-sent", 1),
    ("store.part-sent", 4),
    ("store.sent", 1),
    ("store.completed", 1),
    ("store.compared", 1),
    ("store.published", 1),
)
AT_ONCE = (("store.created", 1), ("store.completed", 1), ("store.compared", 1), ("store.published", 1))
AFTER_IT_APPEARED = ("store.completed", "store.compared", "store.published")


class Steps(Silent):
    def __init__(self) -> None:
        self.reached: list[str] = []

    def step(self, name: str) -> None:
        self.reached.append(name)


@pytest.mark.parametrize(
    ("size_bytes", "step", "nth"),
    [*((3 * PART_BYTES + 1, *each) for each in IN_PARTS), *((1000, *each) for each in AT_ONCE)],
    ids=str,
)
def test_a_kill_at_every_step(seaweed: SeaweedFS, tmp_path: Path, size_bytes: int, step: str, nth: int) -> None:
    options = seaweed.options("writer", part_size_bytes=PART_BYTES)
    uploads, source, data = tmp_path / "uploads", tmp_path / "source", os.urandom(size_bytes)
    source.write_bytes(data)
    content = Content(len(data), hashlib.sha256(data).hexdigest())
    kill(options, uploads, source, step, nth)

    reach = hands(seaweed, options)
    there = reach.versions()
    assert len(there) == (step in AFTER_IT_APPEARED)
    with S3Destination(options, uploads).opened() as place:
        assert place.sizes({PATH: ""}) == ({PATH: size_bytes} if there else {})
        assert place.content(PATH, Silent()) == (content if there else None)

    steps = Steps()
    version = store(S3Destination(options, uploads), data, PATH, steps)
    assert reach.versions() == [version]
    assert there in ([], [version])
    assert reach.get(PATH, version) == data
    with S3Destination(options, uploads).opened() as place:
        assert place.lock(PATH, version) is not None
    assert not uploads.exists() or list(uploads.iterdir()) == []
    # One whose id never reached the disk is left to be swept.
    assert len(reach.uploads()) == (step == "store.begun")
    if step == "store.part-sent":
        assert steps.reached.count("store.part-sent") <= 4 - nth


def kill(options: Options, uploads: Path, source: Path, step: str, nth: int) -> None:
    given = json.dumps({field.name: getattr(options, field.name) for field in dataclasses.fields(options)})
    command: list[str | Path] = [sys.executable, "-W", "error", DRIVER, given, uploads, PATH, source, step, str(nth)]
    environment = os.environ | {"PYTHONPATH": str(DRIVER.parents[2] / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_steps_are_all_that_there_are(seaweed: SeaweedFS, tmp_path: Path) -> None:
    for size_bytes, known in ((3 * PART_BYTES + 1, IN_PARTS), (1000, AT_ONCE)):
        steps = Steps()
        options = seaweed.options("writer", part_size_bytes=PART_BYTES)
        store(S3Destination(options, tmp_path), os.urandom(size_bytes), PATH, steps)
        assert set(steps.reached) == {name for name, _ in known}


def test_a_lost_upload_is_swept_after_a_day(
    seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = seaweed.options("writer", part_size_bytes=PART_BYTES)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 * PART_BYTES))
    kill(options, tmp_path / "uploads", source, "store.begun", 1)
    assert len(hands(seaweed, options).uploads()) == 1
    real = clock.now
    monkeypatch.setattr(clock, "now", lambda: real() + dt.timedelta(days=1, minutes=1))
    with S3Destination(options, tmp_path / "uploads").opened() as place:
        assert place.sweep(["daily"]) == [PATH]
    assert hands(seaweed, options).uploads() == []
