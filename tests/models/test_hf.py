from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from blockffn_compile.generation import generate
from blockffn_compile.models import hf
from blockffn_compile.models.checkpoint import load_model, save_model
from blockffn_compile.models.config import BlockFFNConfig, CheckpointError
from blockffn_compile.models.eagle import EagleHead, eagle_config
from tests.buckets import few_buckets
from tests.conftest import make_config

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


# --- Speculative decoding -------------------------------------------------------------------------

PADDED = {
    "inputs": torch.tensor([[0, 0, 0, *PROMPT], [9, 8, 7, 6, 5, 4, 3, 2]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]),
}


@pytest.fixture(scope="module")
def small():
    """Writes texts that repeat themselves, so that drafts are accepted."""
    torch.manual_seed(0)
    config = hf.HFBlockFFNConfig(**make_config().to_dict())
    with few_buckets(1, 8):
        yield hf.HFBlockFFNForCausalLM(config).eval()


def speculative(model, inputs=None, **options) -> Any:
    inputs = torch.tensor([PROMPT]) if inputs is None else inputs
    options = {"max_new_tokens": 24, "do_sample": False} | options
    return model.generate(inputs, custom_generate=hf.speculative_generate, **options)


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, tokens: torch.Tensor) -> None:
        assert not self.ended
        self.pieces.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_speculative_generation_is_the_greedy_one_and_streams(small) -> None:
    streamer = Streamer()
    tokens = speculative(small, streamer=streamer)
    expected = small.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)
    assert torch.equal(tokens, expected)
    assert streamer.pieces[0] == PROMPT
    assert [*itertools.chain(*streamer.pieces)] == tokens[0].tolist()
    assert any(len(piece) > 1 for piece in streamer.pieces[1:])
    assert streamer.ended


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"max_new_tokens": 1},
        {"max_length": 11, "max_new_tokens": None},
        {"eos_token_id": [287, 299], "pad_token_id": 1},
        {"eos_token_id": 17},
    ],
    ids=str,
)
def test_speculative_generation_honours(small, options) -> None:
    tokens = torch.tensor([PROMPT])
    expected = small.generate(tokens, **{"max_new_tokens": 24, "do_sample": False} | options)
    assert torch.equal(speculative(small, **options), expected)


def test_speculative_generation_keeps_its_graphs(small, monkeypatch) -> None:
    speculative(small)

    def refuse(*_, **__):
        raise AssertionError("another generator")

    monkeypatch.setattr(hf, "Generator", refuse)
    speculative(small, do_sample=True, max_new_tokens=3)
    with pytest.raises(AssertionError, match="another"):
        speculative(small, speculate="off")


def test_speculative_sampling_is_seeded(small) -> None:
    def sample(seed: int, **options) -> torch.Tensor:
        torch.manual_seed(seed)
        return speculative(small, do_sample=True, **{"temperature": 1.5, "top_k": 0} | options)

    first = sample(1)
    assert torch.equal(sample(1), first)
    assert not torch.equal(sample(2), first)
    greedy = speculative(small)
    assert not torch.equal(first, greedy)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}):
        assert torch.equal(sample(1, **narrow), greedy), narrow


def test_speculative_rows(make_model) -> None:
    """Padded and not, each as alone; sequences of one prompt differ; a short row is padded."""
    torch.manual_seed(0)
    model = hf.HFBlockFFNForCausalLM(hf.HFBlockFFNConfig(**make_config().to_dict())).eval()
    with few_buckets(1, 8):
        greedy = {"max_new_tokens": 12, "do_sample": False}
        expected = model.generate(**PADDED, **greedy)
        tokens = speculative(model, **PADDED, **greedy)
        assert torch.equal(tokens, expected)
        eos = int(expected[0, 10])
        assert eos not in expected[1, 8:]
        ends = greedy | {"eos_token_id": eos, "pad_token_id": 1}
        tokens = speculative(model, **PADDED, **ends)
        assert torch.equal(tokens, model.generate(**PADDED, **ends))
        assert tokens[0, -1] == 1

        torch.manual_seed(3)
        pair = speculative(model, do_sample=True, num_return_sequences=2)
        torch.manual_seed(3)
        assert torch.equal(speculative(model, do_sample=True)[0], pair[0])
        assert not torch.equal(pair[0], pair[1])


def test_speculative_generation_follows_the_dtype_and_drafts_with_a_head() -> None:
    torch.manual_seed(0)
    config = make_config()
    model = hf.HFBlockFFNForCausalLM(hf.HFBlockFFNConfig(**config.to_dict())).eval()
    head = EagleHead(eagle_config(config, 24)).eval().requires_grad_(False)
    options: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {"speculate": "off"}),
        (torch.bfloat16, {"speculate": "off"}),
        (torch.bfloat16, {"speculate": "eagle", "head": head.to(torch.bfloat16)}),
    ]
    with few_buckets(1, 8):
        for dtype, who in options:
            model = model.to(dtype)
            expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)
            assert torch.equal(speculative(model, max_new_tokens=6, **who), expected)


def test_speculative_generation_ends_with_the_context(small) -> None:
    tokens = torch.arange(125)[None]
    assert speculative(small, tokens).shape == (1, 128)


def test_speculative_output_as_a_dict(small) -> None:
    output = speculative(small, return_dict_in_generate=True)
    assert torch.equal(output.sequences, speculative(small))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "not by beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "not by assisted_generation"),
        ({"no_repeat_ngram_size": 2}, "no NoRepeatNGramLogitsProcessor"),
        ({"do_sample": True, "typical_p": 0.5}, "no TypicalLogitsWarper"),
        ({"max_time": 9.0}, "no MaxTimeCriteria"),
        ({"output_scores": True}, "keeps nothing for output_scores"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "not from inputs_embeds"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "pad on the left"),
        ({"attention_mask": torch.zeros(1, 5)}, "a text of 0 tokens"),
        ({"inputs": torch.ones(2, 5).long(), "streamer": Streamer()}, "a streamer follows one row"),
        ({"inputs": torch.ones(65, 5).long()}, "takes 64 rows, there are 65"),
        ({"speculate": "magic"}, "speculate is 'magic'"),
        ({"speculate": "eagle"}, "needs a draft head"),
    ],
    ids=lambda case: case if isinstance(case, str) else "-".join(case),
)
def test_what_speculative_generation_refuses(small, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        speculative(small, **options)


def test_speculative_generation_does_not_go_on_from_a_cache(small) -> None:
    cache = transformers.DynamicCache()
    small(torch.tensor([PROMPT[:3]]), cache=cache)
    with pytest.raises(ValueError, match="cannot go on from another"):
        speculative(small, cache=cache)
