"""Number formats of the report."""

from __future__ import annotations

import json
import math
from typing import Any

from mavis_dist.evaluate.sweep import Estimate, share_text


def number(value: float, digits: int = 2) -> str:
    """Fixed digits with a real minus sign; a dash for undefined numbers."""
    if not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    text = number(value)
    return text if text[0] in "−–" else f"+{text}"


def bounds(estimate: Estimate) -> str:
    return f"[{signed(estimate.low)}, {signed(estimate.high)}]"


def share_words(share: Estimate | None) -> str:
    """A share of the limit with its interval, as far as they are known."""
    return share_text(share).replace("-", "−")


def verdict(estimate: Estimate) -> str:
    """The sign of an estimate whose interval excludes zero, as a CSS class."""
    return "up" if estimate.low > 0 else "down" if estimate.high < 0 else ""


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
