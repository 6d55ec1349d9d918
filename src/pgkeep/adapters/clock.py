"""What time it is: the one place that asks, so that a test can put another clock here."""

from __future__ import annotations

import datetime as dt


def now() -> dt.datetime:
    """Aware, in UTC."""
    return dt.datetime.now(dt.UTC)
