from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from blockffn_compile.models.checkpoint import load_model, save_model
from blockffn_compile.training.metrics import mean_cls, measure_sparsity
from tests.conftest import TEXT, make_config


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def test_measures_every_layer(blockffn, checkpoint, text_file) -> None:
    result = blockffn("sparsity", checkpoint, text_file)
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(TEXT).ids)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= len(tokens)]
    layers = measure_sparsity(load_model(checkpoint), tokens, sizes, context=128)
    rows = {line.split()[1]: line for line in result.stdout.splitlines() if len(line.split()) > 3}
    for layer in layers:
        values = [f"{100 * layer.cls[n]:.1f}" for n in sizes] + [f"{100 * layer.reuse:.1f}"]
        assert [cell for cell in rows[layer.name].split() if "." in cell][1:] == values
    assert f"{100 * mean_cls(layers, 1):.1f}" in rows["mean"]
    assert f"{len(tokens)} tokens" in result.stdout


def test_a_short_text_has_no_long_chunks(blockffn, checkpoint, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("if x")
    result = blockffn("sparsity", checkpoint, tmp_path / "short.txt")
    assert result.exit_code == 0, result.output
    assert "CLS_2" in result.stdout
    assert "CLS_64" not in result.stdout


def test_plot(blockffn, checkpoint, text_file, tmp_path) -> None:
    result = blockffn("sparsity", checkpoint, text_file, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_user_errors(refused, checkpoint, text_file, tmp_path, make_model) -> None:
    assert "absent.txt: No such file" in refused("sparsity", checkpoint, tmp_path / "absent.txt")
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: is empty" in refused("sparsity", checkpoint, tmp_path / "empty.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "binary: not UTF-8 text" in refused("sparsity", checkpoint, tmp_path / "binary")
    assert "got 3 paths" in refused("sparsity", checkpoint, text_file, text_file)
    message = refused("sparsity", checkpoint, text_file, "--plot", tmp_path / "no" / "plot.png")
    assert "No such file" in message
    dense = make_model(make_config(ffn_type="vanilla", intermediate_size=16))
    save_model(dense, tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    assert "no BlockFFN layer" in refused("sparsity", tmp_path / "dense", text_file)
