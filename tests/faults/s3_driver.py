"""Copies one file to a bucket in a process of its own, which is killed at a step.

Arguments: the options as JSON, the directory for unfinished uploads, the path there, the source, the step and which
occurrence of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from pgkeep.adapters.destinations import Content
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.progress import Silent


class Killed(Silent):
    def __init__(self, wanted: str, nth: int) -> None:
        self._wanted = wanted
        self._left = nth

    def step(self, name: str) -> None:
        self._left -= name == self._wanted
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main(options: str, uploads: str, path: str, source: str, step: str, nth: str) -> None:
    descriptor = os.open(source, os.O_RDONLY)
    data = Path(source).read_bytes()
    content = Content(len(data), hashlib.sha256(data).hexdigest())
    with S3Destination(Options(**json.loads(options)), Path(uploads)).opened() as place:
        place.store(path, descriptor, content, Killed(step, int(nth)))


if __name__ == "__main__":
    main(*sys.argv[1:])
