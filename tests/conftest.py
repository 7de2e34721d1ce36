"""Fixtures that many tests share: small models, and a checkpoint directory of one of them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from blockffn_compile.models.checkpoint import save_model
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.report import Report

# How fast examples come says something of the machine alone, and the first text makes tables.
hypothesis.settings.register_profile(
    "project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).parent.parent
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    pass\n" * 4


@pytest.fixture(params=["gqa", "mla"])
def tiny_config(request: pytest.FixtureRequest) -> BlockFFNConfig:
    """A decoder of two layers, with each kind of attention in turn."""
    return make_config(request.param)


def make_config(attention: str = "gqa", **changes: object) -> BlockFFNConfig:
    fields: dict[str, object] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_type": attention,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "ffn_type": "block",
        "num_experts": 6,
        "expert_size": 8,
        "norm_after_router": "rms",
        "max_position_embeddings": 128,
        "scale_emb": 3.0,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "initializer_range": 0.3,
    }
    return BlockFFNConfig.from_dict(fields | changes)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., BlockFFNForCausalLM]:
    """Makes a randomly initialised model in eval mode from a config."""

    def make(config: BlockFFNConfig, seed: int = 0) -> BlockFFNForCausalLM:
        model = BlockFFNForCausalLM(config)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.eval().requires_grad_(False)

    return make


#: Small decoders in ONNX: kind of attention, flavour, dtype.
ONNX_DECODERS: dict[str, tuple[str, Literal["portable", "dense"], torch.dtype]] = {
    "gqa": ("gqa", "portable", torch.float32),
    "mla": ("mla", "portable", torch.float32),
    "float16": ("gqa", "portable", torch.float16),
    "dense": ("gqa", "dense", torch.float32),
}


@pytest.fixture(scope="session")
def onnx_decoder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., BlockFFNForCausalLM]
) -> Callable[[str], tuple[BlockFFNForCausalLM, Path, Report]]:
    """Exports one of ``ONNX_DECODERS`` once; the model in its dtype, the file, and the report."""
    from blockffn_compile.onnx import export

    @functools.cache
    def decoder(name: str) -> tuple[BlockFFNForCausalLM, Path, Report]:
        attention, flavour, dtype = ONNX_DECODERS[name]
        model = make_model(make_config(attention, max_position_embeddings=256))
        path = tmp_path_factory.mktemp("onnx") / "model.onnx"
        report = export(model, path, flavour=flavour, dtype=dtype)
        return model.to(dtype), path, report

    return decoder


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., BlockFFNForCausalLM]
) -> Path:
    """A checkpoint directory like the bundled one: random weights, byte-level BPE tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    save_model(make_model(make_config(vocab_size=tokenizer.get_vocab_size())), path)
    return path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, source], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built
