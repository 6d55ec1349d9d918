"""Upload to S3: pgkeep's adapter, locks included, against what people use, to the same kind of server."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import extracting, programs
from bench.databases import Databases, Say
from bench.extracting import Vault
from bench.figures import PGKEEP, Peak, Race, RatioTarget
from bench.race import Contender, race
from bench.workspace import Workspace
from tests import s3_servers
from tests.s3_servers import SeaweedFS

BOTO = "boto3: upload_file"
RCLONE = "rclone copyto"
PASS = "pgkeep extractor once: all of a pass"
TARGETS = (RatioTarget(BOTO, 1.05), RatioTarget(RCLONE, 1.05))
IDENTITY = "owner"
PREFIX = "bench"
_ADAPTER, _BOTO = (Path(__file__).with_name(name) for name in ("store_file.py", "upload_file.py"))


@contextlib.contextmanager
def server(space: Workspace) -> Iterator[SeaweedFS]:
    """A new and empty one, gone at the end of the block."""
    with space.place("seaweed") as place:
        running = SeaweedFS(place)
        try:
            running.start()
            running.make_buckets()
            yield running
        finally:
            running.stop()


def variables(endpoint: str) -> dict[str, str]:
    """Of the server's bucket with Object Lock as the only destination; copies are locked, as they are by default."""
    return {
        "EXTERNAL_DIRECTORY": "off",
        "S3_BUCKET": s3_servers.LOCKED,
        "S3_PREFIX": PREFIX,
        "S3_ENDPOINT": endpoint,
        "S3_PATH_STYLE": "true",
        "S3_ACCESS_KEY_ID": IDENTITY,
        "S3_SECRET_ACCESS_KEY": s3_servers.secret_of(IDENTITY),
    }


def run(made: Vault, rounds: int, space: Workspace, say: Say) -> Race:
    """Each uploads the same dump to an empty server; a pass also sidecars, roles, marker and anchor."""

    @contextlib.contextmanager
    def arena() -> Iterator[SeaweedFS]:
        with server(space) as running:
            made.settle()
            yield running

    title = f"upload of {made.size_bytes / 1e6:.0f} MB to S3"
    return Race(title, race(title, contenders(made), rounds, arena, say), made.size_bytes)


def contenders(made: Vault) -> list[Contender[SeaweedFS]]:
    key = f"{PREFIX}/{made.dump.name}"
    path = {"PYTHONPATH": made.environment["PYTHONPATH"]}

    def adapter(running: SeaweedFS) -> None:
        programs.run([sys.executable, _ADAPTER, running.endpoint, s3_servers.LOCKED, PREFIX, made.dump], _keys() | path)

    def whole_pass(running: SeaweedFS) -> None:
        made.extract(variables(running.endpoint))

    def boto(running: SeaweedFS) -> None:
        programs.run([sys.executable, _BOTO, running.endpoint, s3_servers.LOCKED, key, made.dump], _keys())

    def rclone(running: SeaweedFS) -> None:
        options = ["--config", os.devnull, "--s3-provider=Other", "--s3-env-auth", "--s3-no-check-bucket"]
        target = f":s3:{s3_servers.LOCKED}/{key}"
        command: programs.Command = [
            *(Path(sys.executable).with_name("rclone"), "copyto", made.dump, target),
            *(*options, f"--s3-endpoint={running.endpoint}"),
        ]
        programs.run(command, _keys())

    return [
        Contender(PGKEEP, adapter),
        Contender(BOTO, boto),
        Contender(RCLONE, rclone),
        Contender(PASS, whole_pass),
    ]


def peaks(databases: Databases, sizes: list[int], space: Workspace, say: Say) -> list[Peak]:
    """Of extraction to a directory and to S3, at each size."""
    found = []
    for size_bytes in sorted(sizes):
        with extracting.vault(databases, size_bytes, space, say) as made:
            with space.place("outside") as place:
                found.append(extracting.peak("extraction to a directory", made, extracting.directory(place)))
            with server(space) as running:
                found.append(extracting.peak("extraction to S3", made, variables(running.endpoint)))
        for each in found[-2:]:
            say(f"peak of {each.what}, {size_bytes / 1e6:.0f} MB: {each.memory_bytes / 1e6:.0f} MB of memory")
    return found


def _keys() -> dict[str, str]:
    """As boto3 and rclone find them."""
    return {
        "AWS_ACCESS_KEY_ID": IDENTITY,
        "AWS_SECRET_ACCESS_KEY": s3_servers.secret_of(IDENTITY),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
