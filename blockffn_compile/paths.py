"""Where files are kept that belong to the machine rather than to a project."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$BLOCKFFN_CACHE_DIR``, else ``blockffn`` under the user's cache folder."""
    if path := os.environ.get("BLOCKFFN_CACHE_DIR"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockffn"
