from __future__ import annotations

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from blockffn_compile.layer import rms_norm
from blockffn_compile.models.cache import StaticCache
from blockffn_compile.models.config import CheckpointError
from blockffn_compile.models.eagle import EagleHead, eagle_config, load_eagle, save_eagle
from tests.conftest import make_config

WEIGHTS = "model.safetensors"
FC = "fc.weight"


@pytest.fixture
def target(make_model):
    return make_model(make_config())


def make_head(target, token_map=None, **parts: bool) -> EagleHead:
    torch.manual_seed(0)
    head = EagleHead(eagle_config(target.config, 24), token_map, **parts)
    for name, parameter in head.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return head.eval().requires_grad_(False)


@pytest.fixture
def saved(target, tmp_path):
    """A head and the directory that it was saved in."""
    head = make_head(target, torch.tensor([7, 0, 299]))
    save_eagle(head, tmp_path)
    return head, tmp_path


def inputs(length: int = 5, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(batch, length, 32, generator=generator)
    features = torch.randn(batch, length, 32, generator=generator)
    return embeddings, features, torch.arange(length)


def same(a: EagleHead, b: EagleHead) -> bool:
    return torch.equal(a(*inputs(), None, None), b(*inputs(), None, None))


def edit(path, change) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def edit_config(path, **fields: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(path, target) -> str:
    with pytest.raises(CheckpointError) as error:
        load_eagle(path, target)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("parts", [{}, {"input_norms": False, "fc_bias": True, "layer_norm": True}])
def test_one_position_is_the_formula(target, parts) -> None:
    """At one position attention is its own value: nothing of a library layer is needed."""
    head = make_head(target, **parts)
    w = head.state_dict()
    embedding, feature, _ = inputs(1, 1)
    e, f = embedding[0, 0], feature[0, 0]
    if not parts:
        e, f = (
            rms_norm(e, w["input_norm1.weight"], 1e-6),
            rms_norm(f, w["input_norm2.weight"], 1e-6),
        )
    x = torch.cat([w[FC][:, :32] @ e + w[FC][:, 32:] @ f])
    layer = {k.removeprefix("layers.0."): v for k, v in w.items() if k.startswith("layers.0.")}
    normed = x
    if parts:
        x = normed = x + w["fc.bias"]
        normed = rms_norm(x, layer["input_layernorm.weight"], 1e-6)
    value = (layer["self_attn.v_proj.weight"] @ normed).view(2, 8).repeat_interleave(2, 0)
    x = x + layer["self_attn.o_proj.weight"] @ value.flatten()
    normed = rms_norm(x, layer["post_attention_layernorm.weight"], 1e-6)
    gate, up = layer["mlp.gate_proj.weight"] @ normed, layer["mlp.up_proj.weight"] @ normed
    x = x + layer["mlp.down_proj.weight"] @ (F.silu(gate) * up)
    predicted = head(embedding, feature, torch.tensor([0]), None, None)
    torch.testing.assert_close(predicted[0, 0], x, atol=1e-5, rtol=1e-5)


def test_through_a_cache_in_parts_as_at_once(target) -> None:
    head = make_head(target)
    embeddings, features, positions = inputs(7)
    whole = head(embeddings, features, positions, None, None)
    cache, parts = StaticCache(head.config, 2, 16), []
    for part in positions.split(3):
        mask = torch.arange(16) <= part[:, None]
        parts.append(head(embeddings[:, part], features[:, part], part, cache, mask))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_predictions_are_causal_and_use_both_inputs(target) -> None:
    head = make_head(target)
    embeddings, features, positions = inputs()
    before = head(embeddings, features, positions, None, None)
    for changed in ((embeddings + torch.eye(5)[3][:, None], features),
                    (embeddings, features + torch.eye(5)[3][:, None])):  # fmt: skip
        after = head(*changed, positions, None, None)
        assert torch.equal(after[:, :3], before[:, :3])
        assert not torch.isclose(after[:, 3:], before[:, 3:]).all(-1).any()


def test_round_trip(saved, target) -> None:
    head, path = saved
    loaded = load_eagle(str(path), target)
    assert loaded.config == head.config
    assert same(loaded, head)
    assert loaded.token_map is not None
    assert loaded.token_map.tolist() == [7, 0, 299]
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("input_norms", [False, True])
@pytest.mark.parametrize("fc_bias", [False, True])
def test_every_form_is_seen_from_its_tensors(target, tmp_path, fc_bias, input_norms, layer_norm):
    head = make_head(target, fc_bias=fc_bias, input_norms=input_norms, layer_norm=layer_norm)
    save_eagle(head, tmp_path)
    loaded = load_eagle(tmp_path, target)
    assert loaded.state_dict().keys() == head.state_dict().keys()
    assert loaded.token_map is None
    assert same(loaded, head)


def test_dtype_follows_the_target_unless_given(saved, make_model) -> None:
    head, path = saved
    save_eagle(head, path, dtype=torch.bfloat16)
    stored = load_file(path / WEIGHTS)
    assert stored[FC].dtype == torch.bfloat16
    assert stored["token_map"].dtype == torch.int64
    target = make_model(make_config()).to(torch.float64)
    loaded = load_eagle(path, target)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert {p.dtype for p in load_eagle(path, target, torch.float16).parameters()} == {
        torch.float16
    }
    assert loaded.rotary.cos.dtype == torch.float32


def test_the_context_is_the_targets(saved, target) -> None:
    _, path = saved
    edit_config(path, max_position_embeddings=4)
    assert load_eagle(path, target).rotary.cos.shape[0] == 128


def test_a_head_for_any_target(tiny_config, make_model, tmp_path) -> None:
    target = make_model(tiny_config)
    head = make_head(target)
    save_eagle(head, tmp_path)
    assert same(load_eagle(tmp_path, target), head)
    assert head(*inputs(), None, None).shape == (2, 5, 32)


def release(head, path) -> dict[str, torch.Tensor]:
    """Writes a head as released ones are: pickled, with the target's embedding, a Llama config."""
    tensors = {k: v for k, v in head.state_dict().items() if k != "token_map"}
    tensors["embed_tokens.weight"] = torch.zeros(300, 32)
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(tensors, path / "pytorch_model.bin")
    fields = {"hidden_size": 32, "vocab_size": 300, "num_attention_heads": 4,
              "num_key_value_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24,
              "model_type": "llama", "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    (path / "config.json").write_text(json.dumps(fields))
    return tensors


@pytest.mark.parametrize("as_list", [True, False])
def test_a_released_head(target, tmp_path, as_list) -> None:
    head = make_head(target, fc_bias=True, input_norms=False)
    tensors = release(head, tmp_path)
    assert same(load_eagle(tmp_path, target), head)
    ids = [5, 3, 250]
    torch.save(ids if as_list else torch.tensor(ids, dtype=torch.int32), tmp_path / "freq_3.pt")
    loaded = load_eagle(tmp_path, target)
    assert loaded.token_map is not None
    assert loaded.token_map.dtype == torch.int64
    assert loaded.token_map.tolist() == ids
    tensors["token_id_remap"] = torch.tensor([1, 0], dtype=torch.int32)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    loaded = load_eagle(tmp_path, target)
    assert loaded.token_map is not None
    assert loaded.token_map.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "freq_3.pt"])
def test_pickles_do_not_run(target, tmp_path, name) -> None:
    release(make_head(target), tmp_path)

    class Attack:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (tmp_path / name).write_bytes(pickle.dumps(Attack(), protocol=2))
    assert f"{name}: not readable as weights only" in refused(tmp_path, target)
    assert not (tmp_path / "ran").exists()


def test_missing_tensor(saved, target) -> None:
    _, path = saved
    edit(path, lambda tensors: tensors.pop(FC))
    assert refused(path, target).endswith("missing tensor fc.weight [32, 64]")
    edit(path, lambda tensors: tensors.pop("input_norm2.weight"))
    assert refused(path, target).endswith("missing tensor fc.weight [32, 64] and 1 more")


def test_unexpected_tensor(saved, target) -> None:
    _, path = saved
    edit(path, lambda tensors: tensors.update({"layers.1.mlp.up_proj.weight": torch.zeros(3)}))
    assert f"{WEIGHTS}: unexpected tensor layers.1.mlp.up_proj.weight [3]" in refused(path, target)


def test_wrong_shape_or_dtype(saved, target) -> None:
    _, path = saved
    edit(path, lambda tensors: tensors.update({FC: torch.zeros(32, 64, dtype=torch.int8)}))
    assert "tensor fc.weight is torch.int8, not a float" in refused(path, target)
    edit(path, lambda tensors: tensors.update({FC: torch.zeros(32, 32)}))
    message = "tensor fc.weight has shape [32, 32], the config asks for [32, 64]"
    assert message in refused(path, target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, a draft head has 1"),
        ({"hidden_size": 64}, "hidden_size is 64, the target has 32"),
        ({"vocab_size": 301}, "vocab_size is 301, the target has 300"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"intermediate_size": 0}, "intermediate_size 0 is not an integer >= 1"),
        ({"hidden_size": None}, "hidden_size is None, the target has 32"),
    ],
)
def test_a_config_that_does_not_fit(saved, target, fields, message) -> None:
    _, path = saved
    edit_config(path, **fields)
    assert f"config.json: {message}" in refused(path, target)


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
@pytest.mark.parametrize("size", [0, 7, -1])
def test_truncated_weights(saved, target, name, size) -> None:
    head, path = saved
    if name == "pytorch_model.bin":
        (path / WEIGHTS).unlink()
        release(head, path)
    (path / name).write_bytes((path / name).read_bytes()[:size])
    assert f"{name}: not " in refused(path, target)


def test_weights_that_are_not_there_or_not_tensors(saved, target) -> None:
    _, path = saved
    (path / WEIGHTS).unlink()
    assert "neither model.safetensors nor pytorch_model.bin is there" in refused(path, target)
    for content in ([torch.zeros(2)], {"fc.weight": 3}):
        torch.save(content, path / "pytorch_model.bin")
        assert "pytorch_model.bin: does not hold named tensors" in refused(path, target)
    (path / "config.json").unlink()
    assert "config.json: no such file" in refused(path, target)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "not a list of token ids"),
        ([1.0, 2.0], "not a list of token ids"),
        ([[1], [2]], "not a list of token ids"),
        (["a"], "not a list of token ids"),
        ({"a": 1}, "not a list of token ids"),
        ([True, False], "not a list of token ids"),
        ([0, 300], "ids outside 0..299"),
        ([0, -1], "ids outside 0..299"),
        ([4, 5, 4], "an id twice"),
    ],
)
def test_broken_token_maps(target, tmp_path, ids, message) -> None:
    release(make_head(target), tmp_path)
    torch.save(ids, tmp_path / "freq_2.pt")
    assert message in refused(tmp_path, target)
    assert "freq_2.pt" in refused(tmp_path, target)


def test_several_token_maps(target, tmp_path) -> None:
    release(make_head(target), tmp_path)
    for size in (1, 2):
        torch.save([1, 2][:size], tmp_path / f"freq_{size}.pt")
    assert "has 2 token maps freq_*.pt; leave one" in refused(tmp_path, target)
