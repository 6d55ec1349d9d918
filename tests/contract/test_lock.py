"""The lock on real filesystems: it names its holder, and goes with the process however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import lock
from pgkeep.errors import BusyError, StorageError
from tests import clusters
from tests.contract import filesystems
from tests.contract.filesystems import cleared, opened

mount = filesystems.parametrized(filesystems.KINDS)


@pytest.fixture
def place(mount: tuple[str, Path], tmp_path: Path) -> Iterator[Path]:
    made = mount[1] / tmp_path.name
    made.mkdir()
    with cleared(made):
        yield made


HOLDER = """
import time
from pgkeep.adapters import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start_holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(filesystems.SOURCE)}
    command = [sys.executable, "-c", filesystems.PREAMBLE + HOLDER, str(path), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate(timeout=10)


def test_the_lock_says_who_holds_it_and_goes_with_a_killed_holder(place: Path) -> None:
    path = place / "lock"
    holder = start_holder(path, 60)
    told: list[str] = []
    try:
        with pytest.raises(BusyError) as caught, lock.locked(path, 0.3, told.append):
            pytest.fail("two hold the lock")
    finally:
        end(holder)
    assert f"{path} is held by process {holder.pid} on {socket.gethostname()} (-c" in caught.value.message
    assert told == [caught.value.message.partition("held by ")[2]]
    with lock.locked(path):
        assert path.exists()


def test_a_waiter_gets_the_lock_when_it_is_free(scratch: Path) -> None:
    holder = start_holder(scratch / "lock", 0.4)
    told: list[str] = []
    try:
        started = time.monotonic()
        with lock.locked(scratch / "lock", 30, told.append):
            assert time.monotonic() - started < 10
            with pytest.raises(BusyError, match=f"process {os.getpid()} "), lock.locked(scratch / "lock"):
                pytest.fail("two hold the lock")
    finally:
        end(holder)
    assert len(told) == 1


def test_the_lock_is_free_after_an_error(scratch: Path) -> None:
    with pytest.raises(RuntimeError), lock.locked(scratch / "lock"):
        raise RuntimeError
    with lock.locked(scratch / "lock"):
        pass


def test_a_lock_file_with_rubbish_in_it_still_locks(scratch: Path) -> None:
    (scratch / "lock").write_bytes(b'["\xff not a record')
    with opened(scratch / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="held by another process"), lock.locked(scratch / "lock"):
            pytest.fail("two hold the lock")
    with lock.locked(scratch / "lock"):
        pass


def test_a_full_disk_does_not_keep_anybody_from_locking() -> None:
    with clusters.mounted_filesystem("tmpfs", 1) as place:
        with pytest.raises(OSError):
            (place / "filler").write_bytes(b"x" * 2**21)
        with lock.locked(place / "lock"), pytest.raises(BusyError), lock.locked(place / "lock"):
            pytest.fail("two hold the lock")


def test_a_lock_file_that_can_not_be_made_is_explained(scratch: Path) -> None:
    (scratch / "lock").symlink_to("elsewhere")
    with pytest.raises(StorageError, match="symbolic link"), lock.locked(scratch / "lock"):
        pytest.fail("locked through a link")
    assert not (scratch / "elsewhere").exists()
    with pytest.raises(StorageError, match="does not exist"), lock.locked(scratch / "missing" / "lock"):
        pytest.fail("locked nothing")
