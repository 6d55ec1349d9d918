"""What the fixture ``two`` gives."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.clusters import Database
from tests.integration.keeper import Keeper


@dataclasses.dataclass(frozen=True)
class Two:
    """A vault under a directory whose name needs quoting, with two backups of one database."""

    keeper: Keeper
    database: Database
    first: dict[str, Any]
    second: dict[str, Any]
