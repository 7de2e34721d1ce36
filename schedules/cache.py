"""Files that are made once per machine.

Each is named by a hash of everything that determines it, and is written under a temporary name and
renamed, so that concurrent processes never see a partial one.  It ends with the SHA-256 of what is
before; a file that does not match is made again.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from blockffn_compile.paths import cache_dir

log = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size


def cached(name: str, source: str, make: Callable[[Path], None], suffix: str = ".so") -> Path:
    """The file that ``make(path)`` writes from ``source``, made unless it is on disk."""
    key = hashlib.sha256(source.encode()).hexdigest()[:32]
    path = cache_dir() / f"{name}-{key}{suffix}"
    if path.exists() and not _intact(path):
        log.warning("cache entry %s is damaged; making it again", path)
        path.unlink(missing_ok=True)
    if not path.exists():
        log.info("making %s", path.name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            make(made)
            with made.open("rb+") as file:
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)
            made.replace(path)
    return path


def _intact(path: Path) -> bool:
    data = path.read_bytes()
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]
