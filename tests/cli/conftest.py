from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from blockffn_compile.cli import app


@pytest.fixture
def blockffn(monkeypatch) -> Callable[..., Result]:
    """Runs the command in this process, on a terminal wide enough for its tables."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def refused(blockffn) -> Callable[..., str]:
    """Runs a command that must fail for the user's sake; returns its one line."""

    def run(*arguments: object) -> str:
        result = blockffn(*arguments)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
