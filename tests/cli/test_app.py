from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = [
    "demo",
    "generate",
    "explain",
    "compile",
    "run",
    "sparsity",
    "specbench",
    "train",
    "train-drafter",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(blockffn, command) -> None:
    result = blockffn(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"blockffn {command}" in result.output


def test_help_lists_the_commands(blockffn) -> None:
    result = blockffn("--help")
    assert all(command in result.output for command in COMMANDS)


def test_help_does_not_load_pytorch() -> None:
    code = "import sys, blockffn_compile.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_option_is_a_usage_error(blockffn) -> None:
    assert blockffn("generate", "--nonsense").exit_code == 2
    assert blockffn("generate").exit_code == 2  # no prompt
