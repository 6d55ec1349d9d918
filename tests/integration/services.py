"""Services as processes of their own, started and stopped as a container does it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

STOP_SECONDS = 20.0
# A loaded machine may take fifteen to start one Python; nothing waits for as long as this where all is well.
WAIT_SECONDS = 90.0


class Service:
    """A running ``pgkeep VERB``; what it says goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def rss_bytes(self) -> int:
        """Resident memory of this process alone."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024

    @property
    def cpu_seconds(self) -> float:
        """User and system time so far, of its ended children too."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def wait_for(self, condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
        wait_for(condition, seconds, lambda: self.log, lambda: self.process.poll() is None)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """The exit code, and how long it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS), time.monotonic() - started


@contextlib.contextmanager
def serving(environment: Mapping[str, str], log: Path, *arguments: str) -> Iterator[Service]:
    """``pgkeep ARGUMENTS`` until the end of the block, where it must end well if it is still there."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "pgkeep", *arguments], stdout=output, stderr=output, env=environment
        )
    service = Service(process, log)
    try:
        yield service
        if process.poll() is None:
            code, _ = service.stop()
            assert code == 0, service.log
        assert "Traceback" not in service.log, service.log
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def serving_vault(environment: Mapping[str, str], root: Path) -> Iterator[Service]:
    """``pgkeep vault``, ready to take what is handed over."""
    with serving(environment, root.with_name("vault.log"), "vault") as vault:
        vault.wait_for((root / "state" / "health.json").exists)
        yield vault


def wait_for(
    condition: Callable[[], object],
    seconds: float = WAIT_SECONDS,
    told: Callable[[], str] = lambda: "",
    possible: Callable[[], bool] = lambda: True,
) -> None:
    """Until it holds. Fails when the time is up, or when it can't come to hold any more."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in time: {told()}"
        assert possible() or condition(), f"it ended: {told()}"
        time.sleep(0.02)
