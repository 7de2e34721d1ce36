from __future__ import annotations

import pytest
import torch
import transformers

from blockffn_compile.generation import generate
from blockffn_compile.models import hf
from blockffn_compile.models.checkpoint import load_model, save_model
from blockffn_compile.models.config import BlockFFNConfig, CheckpointError

PROMPT = [5, 17, 3, 250, 17]


@pytest.fixture(params=["tied", "untied"])
def pair(request, tiny_config, make_model, tmp_path):
    """Our model, and the same one as Hugging Face loads it from our checkpoint."""
    fields = tiny_config.to_dict() | {
        "tie_word_embeddings": request.param == "tied",
        "rope_theta": 5000.0,
    }
    model = make_model(BlockFFNConfig.from_dict(fields))
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    return model, theirs


def test_parameter_names_and_values_are_the_same(pair) -> None:
    ours, theirs = pair
    assert isinstance(theirs, hf.HFBlockFFNForCausalLM)
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert ours_state.keys() == theirs_state.keys()
    assert all(torch.equal(ours_state[name], theirs_state[name]) for name in ours_state)
    tokens = torch.tensor([PROMPT])
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens))


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_greedy_generation_is_the_same(pair, options) -> None:
    ours, theirs = pair
    expected = list(generate(ours, PROMPT, 24, backend="eager"))
    tokens = torch.tensor([PROMPT])
    generated = theirs.generate(tokens, max_new_tokens=24, do_sample=False, **options)
    assert generated[0, len(PROMPT) :].tolist() == expected


def test_left_padding_changes_nothing(pair) -> None:
    _, theirs = pair
    alone = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    tokens = torch.tensor([[0, 0, 0, *PROMPT], [9, 8, 7, 6, 5, 4, 3, 2]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    padded = theirs.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert padded[0, 8:].tolist() == alone[0, 5:].tolist()


def test_beam_search_reorders_the_cache(pair) -> None:
    _, theirs = pair
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    tokens = torch.tensor([PROMPT])
    with_cache = theirs.generate(tokens, **options)
    assert torch.equal(with_cache, theirs.generate(tokens, use_cache=False, **options))


def test_loss_is_shifted_cross_entropy(pair) -> None:
    ours, theirs = pair
    tokens = torch.tensor([PROMPT])
    expected = torch.nn.functional.cross_entropy(ours(tokens)[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(theirs(tokens, labels=tokens).loss, expected)


def test_logits_to_keep_and_tuples(pair) -> None:
    _, theirs = pair
    tokens = torch.tensor([PROMPT])
    last = theirs(tokens, logits_to_keep=1, return_dict=False)[0]
    torch.testing.assert_close(last, theirs(tokens).logits[:, -1:])


def test_what_hugging_face_saves_we_load(pair, tmp_path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    loaded = load_model(tmp_path / "saved")
    assert loaded.config == ours.config
    assert torch.equal(loaded(torch.tensor([PROMPT])), ours(torch.tensor([PROMPT])))


def test_rotary_tables_are_computed_not_loaded(pair) -> None:
    ours, theirs = pair
    assert torch.equal(theirs.model.rotary.cos, ours.model.rotary.cos)
    assert torch.equal(theirs.to(torch.bfloat16).model.rotary.sin, ours.model.rotary.sin)


def test_a_fresh_model_is_initialised(tiny_config) -> None:
    model = hf.HFBlockFFNForCausalLM(hf.HFBlockFFNConfig(**tiny_config.to_dict()))
    for name, parameter in model.named_parameters():
        expected = 0.0 if "norm" in name else tiny_config.initializer_range
        assert abs(parameter.std().item() - expected) < 0.1, name


def test_an_unsupported_config_is_named() -> None:
    with pytest.raises(CheckpointError, match="missing field"):
        hf.HFBlockFFNConfig().native()
