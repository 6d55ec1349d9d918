"""A bucket that s3fs has mounted, as the guide's option 2 has it, is a directory like others: second best, and safe."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clusters
from tests.contract.destination_contract import DestinationContract, Subject
from tests.contract.test_destinations import directory_subject
from tests.s3_servers import PLAIN, SeaweedFS, seaweed, secret_of

__all__ = ["seaweed"]
_MOUNT_SECONDS = 20.0


@pytest.fixture(scope="module")
def mounted(seaweed: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    clusters.need_root("mounting a bucket")
    if shutil.which("s3fs") is None:
        clusters.skip("needs s3fs (Debian's package of that name): a mounted bucket")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        clusters.skip("needs /dev/fuse: a mounted bucket", could_run_here=False)
    base = tmp_path_factory.mktemp("s3fs")
    place, keys = base / "mount", base / "keys"
    place.mkdir()
    keys.touch(0o600)
    keys.write_text(f"owner:{secret_of('owner')}\n")
    options = f"url={seaweed.endpoint},use_path_request_style,passwd_file={keys}"
    # In the foreground: a program of ours, to be ended by us.
    running = subprocess.Popen(["s3fs", PLAIN, place, "-f", "-o", options], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + _MOUNT_SECONDS
        while not os.path.ismount(place):
            assert running.poll() is None, running.communicate()[1].decode()
            assert time.monotonic() < deadline, "s3fs has not mounted the bucket"
            time.sleep(0.02)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        running.communicate(timeout=_MOUNT_SECONDS)


@pytest.fixture
def subject(mounted: Path, tmp_path: Path) -> Subject:
    path = mounted / tmp_path.name
    path.mkdir()
    return directory_subject("s3fs", path, tmp_path)


class TestContract(DestinationContract):
    pass
