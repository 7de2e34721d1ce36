"""The BlockFFN transformer and its checkpoints."""

from pathlib import Path


def bundled_path() -> Path:
    """Directory of the small trained model that comes with the package."""
    return Path(__file__).parent / "bundled"
