"""Building the C++ runner and running it, on this machine or emulated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "runners/cpp"
EMULATOR = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")
PROMPT = [719, 603, 546, 199, 504, 1280, 432, 26, 274, 337, 472, 597, 527, 273, 300, 263, 287, 14]

Result = subprocess.CompletedProcess[str]


def make_runner(folder: Path, *options: str) -> Path:
    """The runner and its libraries, installed."""
    work, out = str(folder / "build"), str(folder / "runner")
    for command in (
        ["-S", str(SOURCE), "-B", work, f"-DPython_EXECUTABLE={sys.executable}", *options],
        ["--build", work, "--parallel", "2"],
        ["--install", work, "--strip", "--prefix", out],
    ):
        result = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "runner/blockffn-run"


def run(command: Sequence[str | Path], tokens: Sequence[int], *options: str) -> Result:
    ids = ",".join(map(str, tokens))
    return subprocess.run(
        [*map(str, command), "--tokens", ids, "--threads", "1", *options],
        capture_output=True,
        text=True,
        check=False,
    )


def new_tokens(result: Result) -> list[int]:
    assert result.returncode == 0, result.stderr
    return [int(token) for token in result.stdout.split(",")]


def assert_refused(result: Result, message: str) -> None:
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert "error: " in result.stderr
    assert message in result.stderr
