"""The session's engine with the stand-in images in it, pgkeep's own images, and stacks that run them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests import clusters
from tests.e2e import engine as engines
from tests.e2e import images, source, stack
from tests.e2e.engine import ComposeVersion, Engine
from tests.e2e.stack import Stack

# The first test of a machine waits for the images to be made.
FIRST_TEST_SECONDS = 1800


class NewStack(Protocol):
    """``new_stack("name", {"VARIABLE": "value"})``: laid out, not started; gone with the test.

    ``name`` is the project's, the containers' and the volumes', so every test takes one of its own.
    """

    def __call__(
        self,
        name: str,
        settings: Mapping[str, str] | None = None,
        *,
        compose_file: str | None = None,
        compose_version: ComposeVersion = "1.29",
    ) -> Stack: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(FIRST_TEST_SECONDS))


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker engine with every stand-in image; gone at the end, with everything in it."""
    reason = engines.why_not_here()
    if reason is not None:
        clusters.skip(reason)
    with engines.running() as running:
        images.provide(running)
        yield running


@pytest.fixture(scope="session")
def projects(engine: Engine) -> Iterator[Path]:
    """A folder for project directories, on a real filesystem."""
    folder = Path(tempfile.mkdtemp(prefix="projects-", dir=engine.run_folder or "/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def context(engine: Engine, projects: Path) -> Path:
    """The sources with the wheels; the engine has ``pgkeep-agent:local``, ``-vault``, ``-extractor`` made of them."""
    folder = projects / "sources"
    folder.mkdir()
    source.build(engine, source.copy_with_wheels(engine, folder))
    return folder


@pytest.fixture(scope="session")
def project(engine: Engine, context: Path, projects: Path) -> Iterator[Stack]:
    """``ontology-manager/`` as the guide finds it: a database with users in it, nothing of pgkeep's running yet."""
    with stack.removed_afterwards(stack.lay_out(engine, context, projects / "ontology-manager")) as made:
        made.start_application()
        yield made


@pytest.fixture(scope="session", name="stack")
def running_stack(project: Stack) -> Stack:
    """The same with pgkeep's services running and a first daily backup, sealed and copied. All tests share it."""
    project.start()
    return project


@pytest.fixture
def new_stack(engine: Engine, context: Path, projects: Path) -> Iterator[NewStack]:
    """Stacks of one's own, for tests that break them."""
    with contextlib.ExitStack() as stacks:

        def create(
            name: str,
            settings: Mapping[str, str] | None = None,
            *,
            compose_file: str | None = None,
            compose_version: ComposeVersion = "1.29",
        ) -> Stack:
            made = stack.lay_out(
                engine,
                context,
                projects / name,
                settings,
                compose_file=compose_file,
                compose_version=compose_version,
            )
            return stacks.enter_context(stack.removed_afterwards(made))

        yield create
