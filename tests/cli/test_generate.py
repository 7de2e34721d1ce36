from __future__ import annotations

import shutil

import pytest
from tokenizers import Tokenizer

from blockffn_compile.cli.common import stream
from blockffn_compile.generation import generate
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.quantisation import quantize

PROMPT = "def add"


def test_continues_the_prompt(blockffn, checkpoint) -> None:
    result = blockffn("generate", checkpoint, "--prompt", PROMPT, "-n", 12, "--backend", "eager")
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokens = tokenizer.encode(PROMPT).ids
    new = list(generate(load_model(checkpoint), tokens, 12, backend="eager"))
    text = "".join(stream(tokenizer, new))
    assert result.stdout == PROMPT + text + "\n"
    assert "12 tokens" in result.stderr
    assert "tokens/s" in result.stderr


def test_sampling_options(blockffn, checkpoint) -> None:
    options = ["generate", checkpoint, "-p", PROMPT, "-n", 12, "--backend", "eager"]
    options += ["--temperature", 1.0, "--top-k", 40]
    first, again, other = (blockffn(*options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_runs_in_a_given_dtype(blockffn, checkpoint) -> None:
    options = ["generate", checkpoint, "-p", PROMPT, "-n", 2, "--backend", "eager"]
    assert blockffn(*options, "--dtype", "bfloat16").exit_code == 0


def test_quantised(blockffn, refused, checkpoint) -> None:
    options = ["generate", checkpoint, "-p", PROMPT, "-n", 8, "--backend", "eager"]
    assert "group is 48" in refused(*options, "--quantize", "int8", "--group", 48)
    result = blockffn(*options, "--quantize", "int8")
    assert result.exit_code == 0, result.output
    model = quantize(load_model(checkpoint), "int8")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    new = list(generate(model, tokenizer.encode(PROMPT).ids, 8, backend="eager"))
    assert result.stdout == PROMPT + "".join(stream(tokenizer, new)) + "\n"


def test_streams_whole_characters(checkpoint) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "naïve λ → 🙂!"
    pieces = list(stream(tokenizer, tokenizer.encode(text).ids))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert len(pieces) > 5


def test_missing_checkpoint(refused, tmp_path) -> None:
    assert "absent: no such directory" in refused("generate", tmp_path / "absent", "-p", PROMPT)
    assert "config.json: no such file" in refused("generate", tmp_path, "-p", PROMPT)


def test_bad_checkpoint(refused, checkpoint, tmp_path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    message = refused("generate", tmp_path, "-p", PROMPT)
    assert "model.safetensors: not a readable safetensors file" in message


@pytest.mark.parametrize("content", [None, "{}"])
def test_missing_or_broken_tokenizer(refused, checkpoint, tmp_path, content) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    message = refused("generate", tmp_path, "-p", PROMPT)
    assert "tokenizer.json: no" in message


def test_prompt_must_have_a_fitting_length(refused, checkpoint) -> None:
    assert "the prompt is empty" in refused("generate", checkpoint, "-p", "")
    message = refused("generate", checkpoint, "-p", "x y z " * 200)
    assert "tokens, the model takes at most 127; shorten it" in message
