"""How hypothesis runs state machines here."""

from __future__ import annotations

from hypothesis import Phase, settings

MACHINE = settings(deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
