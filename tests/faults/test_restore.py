"""A restore that is killed leaves its rebuilt archive in staging: the next backup clears it, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pgkeep.restore import recover

HOLDER = """
import sys, time
from pathlib import Path
from pgkeep.restore import recover
with recover.scratch_directory(Path(sys.argv[1])) as directory:
    (directory / "toc.dat").write_bytes(b"PGDMP")
    print(directory.name, flush=True)
    time.sleep(60)
"""


def hold(staging: Path) -> tuple[subprocess.Popen[str], str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(staging)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


def test_only_what_nobody_holds_is_swept(scratch: Path) -> None:
    killed, left = hold(scratch)
    living, held = hold(scratch)
    try:
        killed.kill()
        killed.communicate(timeout=10)
        (scratch / "restore-link").symlink_to("/")
        assert recover.sweep(scratch) == [left]
        assert sorted(path.name for path in scratch.iterdir()) == sorted([held, "restore-link"])
    finally:
        living.kill()
        living.communicate(timeout=10)
    assert recover.sweep(scratch) == [held]
