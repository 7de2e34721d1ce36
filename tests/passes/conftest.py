"""Passes are tested without kernels: the operator runs its reference."""

from __future__ import annotations

import pytest

from blockffn_compile import schedules
from blockffn_compile.schedules import reference


@pytest.fixture(autouse=True)
def _reference_only(monkeypatch):
    monkeypatch.setattr(schedules, "SCHEDULES", (reference.schedule,))
