"""The guide's "option 1": a NAS in place of the local directory, and what happens while it is not mounted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import Engine
from tests.e2e.stack import EXTRACTOR_UID, Stack

EXTRACTOR = "ontology-manager-backup-extractor-1"
FORCED = f"docker exec {EXTRACTOR} /usr/local/bin/extractor.py"
ADOPT = f"docker exec {EXTRACTOR} pgkeep extractor adopt"


class Share:
    """What stands for ``/mnt/nas/backups``: a folder elsewhere that is mounted there, or is not."""

    def __init__(self, engine: Engine, files: Path, path: Path) -> None:
        self._engine = engine
        self.files = files
        self.path = path

    def mount(self) -> None:
        self._run("mount", "--bind", self.files, self.path)

    def unmount(self) -> None:
        self._run("umount", self.path)

    def _run(self, *command: str | Path) -> None:
        """Where the daemon sees it: a daemon of our own has mounts of its own."""
        if self._engine.first_process_id is None:
            self._engine.run(command)
        else:
            self._engine.in_namespaces(*command)


@pytest.fixture
def share(engine: Engine, projects: Path) -> Iterator[Share]:
    files, path = projects / "nas-files", projects / "mnt" / "nas" / "backups"
    for folder in (files, path):
        folder.mkdir(parents=True)
        os.chown(folder, EXTRACTOR_UID, EXTRACTOR_UID)
    made = Share(engine, files, path)
    made.mount()
    try:
        yield made
    finally:
        made.unmount()
        shutil.rmtree(projects / "mnt")
        shutil.rmtree(files)


@pytest.fixture
def nas(stack: Stack, share: Share) -> Iterator[Stack]:
    """The shared stack with the share for its destination; as it was at the end."""
    settings = stack.directory / ".env"
    before = settings.read_text()
    settings.write_text(f"{before}PGKEEP_EXTERNAL={share.path}\n")
    try:
        _start_anew(stack)
        yield stack
    finally:
        settings.write_text(before)
        _start_anew(stack)
        stack.said(ADOPT)
        stack.said(FORCED)


def test_a_nas_is_the_destination_when_it_is_said_and_mounted(nas: Stack, share: Share) -> None:
    # Another destination than before may be a mistake.
    refused = nas.shell(FORCED)
    assert refused.return_code != 0
    assert "pgkeep extractor adopt" in refused.stderr
    assert not list(share.files.glob("daily"))

    nas.said(ADOPT)
    sealed = nas.sealed("daily")
    nas.said(FORCED)
    copied = {path.name: path for path in share.files.glob("daily/*/*.sql.gz")}
    assert set(copied) >= set(sealed)
    for path in copied.values():
        assert "OK" in nas.said(f"cd '{path.parent}' && sha256sum -c {path.name}.sha256")

    # Not mounted: nothing is copied underneath.
    nas.said(f"docker stop -t 2 {EXTRACTOR}")
    share.unmount()
    _start_anew(nas)
    missing = nas.shell(FORCED)
    assert missing.return_code != 0
    assert "is it mounted?" in missing.stderr
    assert list(share.path.iterdir()) == []

    share.mount()
    _start_anew(nas)
    assert nas.shell(FORCED).return_code == 0


def _start_anew(stack: Stack) -> None:
    stack.said("docker-compose up -d --no-deps --force-recreate backup-extractor")
