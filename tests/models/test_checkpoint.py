from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockffn_compile
from blockffn_compile.models.checkpoint import INDEX, SINGLE, load_model, save_model
from blockffn_compile.models.config import CheckpointError
from blockffn_compile.models.modeling import BlockFFNForCausalLM

UP = "model.layers.1.mlp.up_proj"
TOKENS = torch.arange(1, 9)[None]


@pytest.fixture
def saved(tiny_config, make_model, tmp_path):
    """A model and the directory that it was saved in."""
    model = make_model(tiny_config)
    save_model(model, tmp_path)
    return model, tmp_path


def shard(path, parts: int = 3) -> None:
    """Splits the single file of a checkpoint into indexed shards."""
    tensors = load_file(path / SINGLE)
    weight_map: dict[str, str] = {}
    for i in range(parts):
        name = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        part = dict(list(tensors.items())[i::parts])
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / SINGLE).unlink()
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit(path, change) -> None:
    """Rewrites the single file of a checkpoint through ``change(tensors)``."""
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


def refused(path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_round_trip(saved) -> None:
    model, path = saved
    loaded = load_model(path)
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_public_name_and_string_paths(saved) -> None:
    model, path = saved
    assert torch.equal(blockffn_compile.load_model(str(path))(TOKENS), model(TOKENS))


def test_untied_head_and_dense_twin(tiny_config, make_model, tmp_path) -> None:
    fields = tiny_config.to_dict() | {"tie_word_embeddings": False}
    fields |= {"ffn_type": "vanilla", "ffn_gated": True, "intermediate_size": 20}
    model = make_model(type(tiny_config).from_dict(fields))
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing tensor lm_head.weight [300, 32]" in refused(tmp_path)


def test_shards(saved) -> None:
    model, path = saved
    shard(path)
    assert torch.equal(load_model(path)(TOKENS), model(TOKENS))


def test_expert_weights_may_carry_a_suffix(saved) -> None:
    model, path = saved

    def rename(tensors) -> None:
        for name in [n for n in tensors if n.endswith(("mlp.up_proj", "mlp.down_proj"))]:
            tensors[name + ".weight"] = tensors.pop(name)

    edit(path, rename)
    assert torch.equal(load_model(path)(TOKENS), model(TOKENS))
    edit(path, lambda tensors: tensors.update({UP: tensors[UP + ".weight"].clone()}))
    assert f"tensor {UP} is stored twice" in refused(path)


def test_a_tied_head_and_rotary_tables_may_be_stored_too(saved) -> None:
    model, path = saved
    extra = {
        "lm_head.weight": model.lm_head.weight.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    edit(path, lambda tensors: tensors.update(extra))
    loaded = load_model(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_dtype_given_stored_or_mixed(saved) -> None:
    model, path = saved
    save_model(model, path, dtype=torch.bfloat16)
    assert load_model(path).lm_head.weight.dtype == torch.bfloat16
    assert load_model(path, dtype=torch.float32).lm_head.weight.dtype == torch.float32

    def widen_norms(tensors) -> None:
        for name in [n for n in tensors if "norm" in n]:
            tensors[name] = tensors[name].float()

    edit(path, widen_norms)
    mixed = load_model(path)
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.bfloat16}
    assert mixed(TOKENS).dtype == torch.bfloat16
    assert mixed.model.rotary.cos.dtype == torch.float32


def test_missing_tensor(saved) -> None:
    _, path = saved
    edit(path, lambda tensors: tensors.pop(UP))
    assert f"missing tensor {UP} [6, 8, 32]" in refused(path)
    edit(path, lambda tensors: tensors.pop("model.norm.weight"))
    assert refused(path).endswith("and 1 more")


def test_unexpected_tensor(saved) -> None:
    _, path = saved
    edit(path, lambda tensors: tensors.update({"model.layers.0.mlp.bias": torch.zeros(3)}))
    message = refused(path)
    assert f"{SINGLE}: unexpected tensor model.layers.0.mlp.bias [3]" in message


def test_wrong_shape(saved) -> None:
    _, path = saved
    edit(path, lambda tensors: tensors.update({UP: torch.zeros(6, 9, 32)}))
    message = refused(path)
    assert f"{SINGLE}: tensor {UP} has shape [6, 9, 32], the config asks for [6, 8, 32]" in message


def test_integer_weights(saved) -> None:
    _, path = saved
    edit(path, lambda tensors: tensors.update({UP: torch.zeros(6, 8, 32, dtype=torch.int8)}))
    assert f"{UP} is torch.int8" in refused(path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_shard(saved, size) -> None:
    _, path = saved
    shard(path, parts=2)
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model-00002-of-00002.safetensors: not a readable safetensors file" in refused(path)


def test_missing_shard_and_missing_tensor_of_a_shard(saved) -> None:
    _, path = saved
    shard(path, parts=2)
    first, second = sorted(path.glob("model-*.safetensors"))
    stored = load_file(second)
    stored.popitem()
    save_file(stored, second)
    assert re.search(f"{second.name}: missing tensor .*, which the index lists", refused(path))
    first.unlink()
    assert f"{first.name}: no such file" in refused(path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a/b", "..", "", 7])
def test_index_names_a_file_outside(saved, file) -> None:
    _, path = saved
    shard(path)
    (path / INDEX).write_text(json.dumps({"weight_map": {UP: file}}))
    assert f"{INDEX}: {UP}: shard {file!r} is outside the checkpoint" in refused(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index(saved, content) -> None:
    _, path = saved
    (path / INDEX).write_text(content)
    assert INDEX in refused(path)


@pytest.mark.parametrize("field", ["ffn_type", "attention_type"])
def test_unknown_kind_of_layer(saved, field) -> None:
    _, path = saved
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {field: "mystery"}))
    assert f"config.json: {field} 'mystery' is not one of" in refused(path)


def test_no_weights_or_only_pickled_ones(saved) -> None:
    _, path = saved
    (path / SINGLE).unlink()
    assert f"neither {SINGLE} nor {INDEX} is there" in refused(path)
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pytorch_model.bin: pickle files can run code" in refused(path)
    shutil.rmtree(path)
    assert "config.json: no such file" in refused(path)


def test_an_interrupted_save_keeps_the_previous_weights(saved, monkeypatch) -> None:
    model, path = saved

    def crash(tensors, file, metadata) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("blockffn_compile.models.checkpoint.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, path)
    assert torch.equal(load_model(path)(TOKENS), model(TOKENS))


def test_model_is_built_without_computing_weights(tiny_config) -> None:
    with torch.device("meta"):
        model = BlockFFNForCausalLM(tiny_config)
    assert all(parameter.is_meta for parameter in model.parameters())
