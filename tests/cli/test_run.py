"""``blockffn compile`` and ``blockffn run``, the latter where PyTorch cannot be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from blockffn_compile import generate, load_model
from blockffn_compile.cli.common import load_tokenizer
from blockffn_compile.models import bundled_path

PROMPT = "def add(a, b):"
#: Refuses PyTorch, as an environment without it does.
WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from blockffn_compile.cli import main
main()
"""


@pytest.fixture(scope="module", autouse=True)
def _stamps(tmp_path_factory):
    """What loading remembers goes where it does not stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def run_without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_compile_and_run(blockffn, tmp_path):
    """The same text as PyTorch's, for the bundled model in fp32."""
    out = tmp_path / "bundle"
    result = blockffn("compile", "-o", out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "for native" in result.stderr
    ran = run_without_torch("run", out, "-p", PROMPT, "-n", 96)
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
