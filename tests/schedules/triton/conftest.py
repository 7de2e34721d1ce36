"""Kernel tests run in Triton's interpreter, each file in a process of its own.

Triton decides when it is imported whether it interprets.  ``TRITON_INTERPRET=1 python -m pytest
FILE`` runs one of these files directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETED = (
    "test_plan.py",
    "test_chunk.py",
    "test_prefill.py",
    "test_attention.py",
    "test_traffic.py",
)

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.schedules.triton import interpreter

    interpreter.be_exact()


class Process(pytest.Item):
    """Runs a file of tests in an interpreting process."""

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        result = subprocess.run(
            command,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            cwd=self.config.rootpath,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            pytest.fail(result.stdout + result.stderr, pytrace=False)


class InterpretedFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield Process.from_parent(self, name="interpreted")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Collector | None:
    if os.environ.get("TRITON_INTERPRET") != "1" and module_path.name in INTERPRETED:
        return InterpretedFile.from_parent(parent, path=module_path)
    return None
