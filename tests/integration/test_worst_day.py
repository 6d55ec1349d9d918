"""The page for the worst day, pasted line by line on a machine that has credentials and nothing else."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import pgkeep
from pgkeep.adapters.destinations.s3 import S3Destination
from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests import elsewhere
from tests.elsewhere import Source, copy_out
from tests.integration.keeper import shell
from tests.s3_servers import SeaweedFS, seaweed, secret_of

__all__ = ["seaweed"]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "worst-day.md"
SOURCE = Path(pgkeep.__file__).parents[1]
BUCKET, PREFIX = "my-backups", "db1"
MADE = ("first_aid", "app_db", "app_db_2", "by_stock_tools")


@pytest.fixture(scope="module")
def source(cluster15: ScratchCluster) -> Iterator[Source]:
    with elsewhere.source(cluster15) as made:
        yield made


@pytest.fixture
def targets(source: Source) -> Iterator[None]:
    """The page names its databases: they are dropped again."""
    yield
    with psycopg.connect(source.database.cluster.conninfo(), autocommit=True) as connection:
        for name in MADE:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


def script(page: Path, endpoint: str) -> str:
    """Every block that is marked as bash, as it stands there; only the example's server is ours."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    text = "".join(blocks)
    assert "https://s3.example.com" in text
    return text.replace("https://s3.example.com", endpoint)


@pytest.mark.usefixtures("targets")
def test_the_page_works_as_it_is_pasted(source: Source, seaweed: SeaweedFS, scratch: Path) -> None:
    seaweed.client("admin").create_bucket(Bucket=BUCKET, ObjectLockEnabledForBucket=True)
    copy_out(source, S3Destination(seaweed.options("writer", bucket=BUCKET, prefix=PREFIX), None))
    for name in ("work", "bin"):
        (scratch / name).mkdir()
    starter = scratch / "bin" / "pgkeep"
    starter.write_text(f'#!/bin/sh\nPYTHONPATH="{SOURCE}" exec "{sys.executable}" -m pgkeep "$@"\n')
    starter.chmod(0o755)
    (scratch / "work" / "s3_secret").write_text(secret_of("restorer") + "\n")
    cluster = source.database.cluster
    done = shell(
        "export PATH PGHOST PGUSER HOME TMPDIR PGKEEP_ROOT PGKEEP_CONFIG\n"
        f"cd {scratch}/work\n{script(PAGE, seaweed.endpoint)}",
        PATH=f"{scratch}/bin:{cluster.installation.directory}:{os.environ['PATH']}",
        PGHOST=os.fspath(cluster.socket_directory),
        PGUSER="postgres",
        HOME=os.fspath(scratch),
        TMPDIR=os.fspath(scratch),
        PGKEEP_ROOT=f"{scratch}/there/is/none",
        PGKEEP_CONFIG="/dev/null",
    )
    assert f"<Key>{PREFIX}/{elsewhere.path_of(source.first)}</Key>" in done.stdout.decode()
    for name in MADE:
        with psycopg.connect(cluster.conninfo(name)) as connection:
            row = connection.execute("SELECT count(*) FROM shop.orders").fetchone()
            assert row == (3000,), name
    assert not (scratch / "there").exists()
