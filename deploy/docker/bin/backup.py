#!/opt/pgkeep/bin/python -P
"""The deployment guide's name for `pgkeep agent backup TIER...` and `pgkeep agent cleanup`."""

from __future__ import annotations

import sys

from pgkeep.cli.main import main

TIERS = ("hourly", "daily", "weekly", "monthly", "yearly", "manual")
USAGE = f"usage: backup.py {'|'.join(TIERS)}|cleanup [OPTION...]\n"


def command(arguments: list[str]) -> list[str]:
    """The arguments of ``pgkeep``. Exits with 2 where there is nothing that the guide knows."""
    asked = [argument for argument in arguments if not argument.startswith("-")]
    if asked == ["cleanup"]:
        return ["agent", *arguments]
    if asked and all(tier in TIERS for tier in asked):
        return ["agent", "backup", *arguments]
    sys.stderr.write(USAGE)
    sys.exit(2)


if __name__ == "__main__":
    sys.argv[1:] = command(sys.argv[1:])
    main()
