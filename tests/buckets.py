"""Fewer graphs to compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blockffn_compile.engines import torch_engine
from blockffn_compile.speculative import cost, eagle, generator, loop, small_model


@contextmanager
def few_buckets(*sizes: int) -> Iterator[None]:
    """Engines, the loop and drafters know these token counts only; 1 must be among them.

    Of draft heads, only the graphs of a level and of a long text are left.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch_engine, cost, generator, loop, small_model):
            patch.setattr(module, "BUCKETS", sizes)
        for module in (eagle, generator):
            patch.setattr(module, "COUNTS", (4, 64))
        yield
