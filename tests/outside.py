"""A vault with a few backups and a destination outside, for the tests of the extractor."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgkeep import config
from pgkeep.adapters import clock
from pgkeep.domain import health, names
from pgkeep.extractor.extract import Extractor
from pgkeep.wiring import Services
from tests import clusters
from tests.faults.machine import TABLES, Machine

SUFFIXES = ("", names.CHECKSUM_SUFFIX, names.MANIFEST_SUFFIX)
# About a megabyte that hardly compresses: larger than all else in the template.
LARGE = """
    CREATE TABLE wide AS SELECT n, (SELECT string_agg(md5(n::text || k), '') FROM generate_series(1, 30) AS k) AS t
        FROM generate_series(1, 2000) AS n
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A vault to copy: ``daily/``, ``hourly/`` and ``globals/`` hold a backup each, ``manual/`` a large one."""

    root: Path
    database: clusters.Database


@contextlib.contextmanager
def template(cluster: Any) -> Iterator[Template]:
    """Without protection: the tests play the vault, and the accidents."""
    with clusters.temporary_database(cluster) as database, clusters.scratch_directory() as directory:
        database.execute(TABLES)
        machine = Machine(directory / "root", database, PGKEEP_PROTECTION="none")
        machine.backup("daily")
        machine.backup("hourly", environment={"BACKUP_GLOBALS": "auto"})
        database.execute(LARGE)
        machine.backup("manual")
        yield Template(machine.root, database)


class Outside:
    """One test's own copy of the template, its destination, and the command line over both."""

    def __init__(self, made: Template, directory: Path, external: Path | None = None, *tiers: str) -> None:
        self.external = external or directory / "external"
        self.external.mkdir(exist_ok=True)
        self.root = directory / "root"
        shutil.copytree(made.root, self.root)
        self.active = self.root / "active"
        self.extracted = self.root / "extracted"
        self.log = self.root / "logs" / "extraction_audit.jsonl"
        self.machine = Machine(self.root, made.database, EXTERNAL_DIRECTORY=str(self.external))
        for path in self.sources():
            if tiers and path.partition("/")[0] not in tiers:
                self.expire(path)

    def extractor(self, **environment: str) -> Extractor:
        """As the service builds it, in this process."""
        (made,) = self.services(**environment).extractors()
        return made

    def services(self, **environment: str) -> Services:
        return Services(config.load(None, {**self.machine.environment, **environment}, {}).settings)

    def run(self, *arguments: str, code: int = 0, **more: Any) -> str:
        """``pgkeep extractor``; it must end with ``code``. What it said on stderr."""
        return self.machine.run("extractor", *arguments, **more).must(code).stderr

    def once(self, code: int = 0, **more: Any) -> dict[str, Any]:
        """A pass to the one destination, as ``--json`` shows it."""
        return only(self.machine.run("extractor", "once", "--json", **more).must(code).json)

    @contextlib.contextmanager
    def serving(self, interval_seconds: int = 1) -> Iterator[subprocess.Popen[str]]:
        """The service, until the end of the block."""
        service = self.machine.start("extractor", environment={"CHECK_INTERVAL": str(interval_seconds)})
        try:
            yield service
        finally:
            service.kill()
            service.communicate()

    def word(self) -> health.Health:
        """The service's own word."""
        return health.decode((self.extracted / ".health.json").read_bytes())

    def is_well(self) -> bool:
        return (self.extracted / ".health.json").exists() and not self.word().problems

    def configure(self, text: str) -> None:
        """Let this TOML be the configuration file."""
        file = self.root.with_name("pgkeep.toml")
        file.write_text(text)
        self.machine.environment["PGKEEP_CONFIG"] = str(file)

    def sealed(self, path: str, ago: dt.timedelta) -> None:
        """Let its manifest say that it was made and sealed so long ago."""
        file = self.active / (path + names.MANIFEST_SUFFIX)
        facts = json.loads(file.read_text())
        moment = (clock.now() - ago).isoformat()
        file.unlink()
        file.write_text(json.dumps(facts | {"created_at": moment, "sealed_at": moment}))

    def sources(self) -> list[str]:
        """Every backup's path below ``active/``."""
        found = self.active.glob("*/*" + names.MANIFEST_SUFFIX)
        return sorted(str(path.relative_to(self.active)).removesuffix(names.MANIFEST_SUFFIX) for path in found)

    def source(self, tier: str) -> str:
        return next(path for path in self.sources() if path.startswith(f"{tier}/"))

    def copy(self, path: str) -> Path:
        """Where the copy of a backup must lie."""
        tier, _, name = path.partition("/")
        return self.external / tier / name[:10] / name

    def expire(self, path: str) -> None:
        for suffix in reversed(SUFFIXES):
            (self.active / (path + suffix)).unlink()

    def bring_new(self, path: str, after: dt.timedelta) -> str:
        """The same backup again, as if it had been made later; its path."""
        tier, _, name = path.partition("/")
        moment = names.parse_dump_name(name)[0] + after
        later = f"{tier}/{names.dump_name(moment, None)}"
        text = (self.active / (path + names.MANIFEST_SUFFIX)).read_text()
        changed = json.loads(text) | {"id": names.new_identifier(moment), "filename": later.partition("/")[2]}
        shutil.copy(self.active / path, self.active / later)
        checksum = f"{changed['sha256']}  {changed['filename']}\n"
        (self.active / (later + names.CHECKSUM_SUFFIX)).write_text(checksum)
        (self.active / (later + names.MANIFEST_SUFFIX)).write_text(json.dumps(changed))
        return later

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def events(self, path: str | None = None) -> list[str]:
        """What the log says of a backup (its path below ``active/``), or of everything."""
        return [record["event"] for record in self.audit() if path is None or record.get("path") == path]

    def files(self) -> set[str]:
        """Everything at the destination but the marker and the anchors of the audit log."""
        paths = (path for path in self.external.rglob("*") if not path.is_dir() and path.name != "ballast")
        names_found = {str(path.relative_to(self.external)) for path in paths if not self._is_anchor(path)}
        return {name for name in names_found if ".fuse_hidden" not in name} - {".pgkeep-destination.json"}

    def _is_anchor(self, path: Path) -> bool:
        return path.is_relative_to(self.external / "anchors") and path.suffix == ".json"

    def expected(self, *paths: str) -> set[str]:
        """The files of whole copies of these backups."""
        return {str(self.copy(path).relative_to(self.external)) + suffix for path in paths for suffix in SUFFIXES}

    def assert_whole(self, *paths: str) -> None:
        """These backups, or all there are, are at the destination, and nothing else; stock tools agree."""
        paths = paths or tuple(self.sources())
        assert self.files() == self.expected(*paths)
        self.assert_no_half_file()
        for path in paths:
            folder = self.copy(path).parent
            subprocess.run(["sha256sum", "--quiet", "-c", f"{self.copy(path).name}.sha256"], cwd=folder, check=True)

    def assert_no_half_file(self) -> None:
        """What stands under the name of a copy is equal to its source."""
        for path in self.sources():
            for suffix in SUFFIXES:
                copy = self.copy(path + suffix)
                if copy.exists():
                    assert digest(copy) == digest(self.active / (path + suffix)), copy


def only(document: dict[str, Any]) -> dict[str, Any]:
    """The one destination of a ``--json`` document."""
    (made,) = document["destinations"]
    assert made["ok"] == document["ok"]
    found: dict[str, Any] = made
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spoil(path: Path) -> None:
    """One bit, in the middle; size and time stay."""
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    mode = facts.st_mode & 0o777
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(mode)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
