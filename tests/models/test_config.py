from __future__ import annotations

import json

import pytest

from blockffn_compile.models.config import BlockFFNConfig, CheckpointError

#: What a released checkpoint says of itself (arXiv 2507.08771, the 0.5B model with MLA).
RELEASED = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_type": "mla",
    "block_implementation": "torch",
    "bos_token_id": 1,
    "dim_model_base": 256,
    "eos_token_id": 2,
    "expert_size": 128,
    "ffn_gated": True,
    "ffn_type": "block_linear",
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3200,
    "kv_lora_rank": 256,
    "norm_after_router": "rms",
    "norm_scale": 1.0,
    "num_attention_heads": 10,
    "num_experts": 40,
    "num_hidden_layers": 27,
    "num_key_value_heads": 10,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": None,
    "router_act": "relu",
    "scale_depth": 1.4,
    "scale_emb": 12,
    "tie_word_embeddings": True,
    "v_head_dim": 128,
    "vocab_size": 122753,
}


def test_released_fields_are_understood() -> None:
    config = BlockFFNConfig.from_dict(RELEASED)
    spec = config.ffn_spec
    assert (spec.hidden_size, spec.num_experts, spec.expert_size) == (1280, 40, 128)
    assert (spec.layout, spec.norm, spec.act) == ("block_linear", "rms", "silu")
    assert not spec.gated, "ffn_gated speaks of dense FFNs only"
    assert config.scale_emb == 12
    assert config.rope_dim == 64


def test_round_trip(tmp_path) -> None:
    for changes in ({}, {"ffn_type": "vanilla"}, {"attention_type": "vanilla"}):
        config = BlockFFNConfig.from_dict(RELEASED | changes | {"expert_gated": not changes})
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config.to_dict()))
        assert BlockFFNConfig.from_file(path) == config


def test_defaults_that_depend_on_other_fields() -> None:
    fields = {k: v for k, v in RELEASED.items() if k not in ("v_head_dim", "num_key_value_heads")}
    config = BlockFFNConfig.from_dict(fields)
    assert config.value_dim == config.qk_nope_head_dim
    assert config.kv_heads == config.num_attention_heads
    assert BlockFFNConfig.from_dict(fields | {"attention_type": "gqa"}).attention_type == "vanilla"


def test_rotary_base_of_recent_hugging_face_configs() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert BlockFFNConfig.from_dict(RELEASED | {"rope_parameters": rope}).rope_theta == 5e5
    with pytest.raises(CheckpointError, match="rope_scaling"):
        BlockFFNConfig.from_dict(RELEASED | {"rope_parameters": rope | {"rope_type": "yarn"}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_type", "linear"),
        ("ffn_type", "moe"),
        ("router_act", "softmax"),
        ("hidden_act", "tanh"),
        ("norm_after_router", "layer"),
        ("hidden_size", "1280"),
        ("hidden_size", 0),
        ("num_experts", -4),
        ("num_key_value_heads", 3),
        ("scale_depth", 0),
        ("rms_norm_eps", float("nan")),
        ("qk_rope_head_dim", 63),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", -1),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("attention_bias", True),
    ],
)
def test_unsupported_values_are_named(tmp_path, field, value) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RELEASED | {field: value}))
    with pytest.raises(CheckpointError) as error:
        BlockFFNConfig.from_file(path)
    assert str(path) in str(error.value)
    assert field in str(error.value) or "rotary" in str(error.value)


def test_dense_width_and_head_size_are_checked() -> None:
    dense = RELEASED | {"ffn_type": "vanilla", "attention_type": "vanilla"}
    with pytest.raises(CheckpointError, match="intermediate_size 0"):
        BlockFFNConfig.from_dict(dense | {"intermediate_size": 0})
    with pytest.raises(CheckpointError, match="hidden_size 1281 is not a multiple"):
        BlockFFNConfig.from_dict(dense | {"hidden_size": 1281})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_field_is_named(name) -> None:
    with pytest.raises(CheckpointError, match=f"missing field {name}"):
        BlockFFNConfig.from_dict({k: v for k, v in RELEASED.items() if k != name})


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[1]", "not a JSON object")],
)
def test_an_unreadable_file_is_named(tmp_path, content, reason) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {reason}"):
        BlockFFNConfig.from_file(path)
    with pytest.raises(CheckpointError, match=r"absent\.json: no such file"):
        BlockFFNConfig.from_file(tmp_path / "absent.json")
