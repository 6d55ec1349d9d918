"""What the tests on real filesystems share; each module says on which kinds (its fixture ``mount``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.contract.destination_contract")

from tests.contract.filesystems import cleared  # noqa: E402 - the line above comes first
from tests.contract.places import Place  # noqa: E402


@pytest.fixture
def place(mount: tuple[str, Path], tmp_path: Path) -> Iterator[Place]:
    made = Place(mount[0], mount[1] / tmp_path.name)
    with cleared(made.active):
        yield made
        made.close()


@pytest.fixture
def directory(scratch: Path) -> Iterator[int]:
    fd = os.open(scratch, os.O_DIRECTORY)
    yield fd
    os.close(fd)
