"""A vault with two backups to look at, for the verbs that only read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests import clusters
from tests.cli.pair import Two
from tests.clusters import Clusters
from tests.integration.keeper import Keeper, reach

FILL = """
    CREATE SCHEMA "odd schema";
    CREATE TABLE "odd schema".large AS SELECT g AS a, md5(g::text) AS b FROM generate_series(1, 5000) AS g;
    CREATE TABLE small (a int); INSERT INTO small VALUES (1), (2);
    CREATE TABLE leaving (a int); INSERT INTO leaving VALUES (3);
    SELECT lo_from_bytea(0, 'x');
"""
CHANGE = """
    DELETE FROM "odd schema".large WHERE a <= 1000;
    UPDATE small SET a = a + 1;
    DROP TABLE leaving; CREATE TABLE arriving (a int);
"""


@pytest.fixture(scope="module")
def two(session_clusters: Clusters) -> Iterator[Two]:
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(clusters.temporary_database(session_clusters.get(15)))
        directory = stack.enter_context(clusters.scratch_directory())
        environment = {**reach(database.cluster, database.name), "BACKUP_RETENTION_DAYS": "9"}
        keeper = Keeper(directory / "it's a root", environment)
        database.execute(FILL)
        database.execute(f"ALTER DATABASE {database.name} SET work_mem = '5MB'")
        first = keeper.json("backup", "daily")
        database.execute(CHANGE)
        yield Two(keeper, database, first, keeper.json("backup", "manual"))
