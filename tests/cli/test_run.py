"""``blockffn compile`` and ``blockffn run``, the latter where PyTorch is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockffn_compile import generate, load_model
from blockffn_compile.cli.common import load_tokenizer
from blockffn_compile.models import bundled_path
from tests.conftest import ROOT

PROMPT = "def add(a, b):"
#: What the README says a device needs.
PACKAGES = ("apache-tvm", "numpy", "tokenizers", "typer", "rich")


@pytest.fixture(scope="module", autouse=True)
def _stamps(tmp_path_factory):
    """What loading remembers goes where it does not stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executables of an environment with our wheel and what a device needs, as users install it."""
    folder = tmp_path_factory.mktemp("device")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", wheel], check=True)
    subprocess.run([*install, "--constraint", ROOT / "requirements.lock", *PACKAGES], check=True)
    return folder / "bin"


def test_compile_and_run(blockffn, device, tmp_path):
    """Without PyTorch, the same text as PyTorch's, for the bundled model in fp32."""
    out = tmp_path / "bundle"
    result = blockffn("compile", "-o", out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "for native" in result.stderr
    imported = subprocess.run([device / "python", "-c", "import torch"], capture_output=True)
    assert b"No module named 'torch'" in imported.stderr
    command = [device / "blockffn", "run", out, "-p", PROMPT, "-n", "96"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    tokenizer, model = load_tokenizer(None), load_model(bundled_path(), dtype=torch.float32)
    tokens = list(generate(model, tokenizer.encode(PROMPT).ids, 96, backend="eager"))
    assert len(tokens) == 96
    assert ran.stdout == PROMPT + tokenizer.decode(tokens, skip_special_tokens=False) + "\n"
    assert "96 tokens" in ran.stderr


def test_what_cannot_be_run_or_compiled(refused, checkpoint, tmp_path):
    assert "no such directory" in refused("run", tmp_path / "none", "-p", "x")
    assert "manifest.json: no such file" in refused("run", tmp_path, "-p", "x")
    assert "key heads of 8" in refused("compile", checkpoint, "-o", tmp_path / "bundle")
    (tmp_path / "notes.txt").write_text("mine")
    assert "something else than a bundle" in refused("compile", "-o", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
