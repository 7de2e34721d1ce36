"""Where files are that belong to the machine rather than to a project."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


def cache_dir() -> Path:
    """``$BLOCKFFN_CACHE_DIR``, else ``blockffn`` under the user's cache folder."""
    if path := os.environ.get("BLOCKFFN_CACHE_DIR"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockffn"


def cuda_file(name: str) -> Path | None:
    """A file of CUDA 13, such as ``lib/libcudart.so.13``, in NVIDIA's packages for Python."""
    spec = find_spec("nvidia")
    places = (spec.submodule_search_locations if spec else None) or ()
    paths = (Path(place) / "cu13" / name for place in places)
    return next((path for path in paths if path.is_file()), None)
