from __future__ import annotations

import gc
import weakref
from itertools import islice

import pytest
import torch

from blockffn_compile.generation import compile_step, generate, new_cache, sample
from tests.conftest import make_config

PROMPT = [5, 17, 3, 250, 17]


def greedy(model, tokens: list[int], count: int) -> list[int]:
    """The plain way: the whole text through the model for every token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("prompt", [PROMPT, [7]], ids=["prompt", "single token"])
def test_greedy_equals_the_full_forward(tiny_config, make_model, prompt) -> None:
    model = make_model(tiny_config)
    expected = greedy(model, prompt, 20)
    assert list(generate(model, prompt, 20, backend="eager")) == expected
    assert list(generate(model, torch.tensor(prompt), 20, backend="aot_eager")) == expected


@pytest.mark.parametrize("backend", ["inductor", "blockffn"])
def test_compiled_greedy_equals_eager(make_model, backend) -> None:
    model = make_model(make_config())
    assert list(generate(model, PROMPT, 20, backend=backend)) == greedy(model, PROMPT, 20)


def test_no_step_recompiles(make_model) -> None:
    """Two graphs serve all: any prompt length, any position, any new text."""
    model = make_model(make_config())
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    list(generate(model, PROMPT, 10, backend=count))
    assert len(graphs) == 2
    for prompt in (PROMPT[:3], PROMPT * 9, [1]):
        list(generate(model, prompt, 30, backend=count))
    assert len(graphs) == 2


def test_many_models_and_a_released_one(make_model) -> None:
    """Models do not use up each other's recompilations, and are not kept alive."""

    def trace_only(graph, inputs):
        return graph.forward

    models = [make_model(make_config(num_experts=2 + i)) for i in range(10)]
    for model in models:
        list(generate(model, PROMPT, 1, backend=trace_only))
    last = weakref.ref(models.pop())
    del model
    torch._dynamo.reset()
    gc.collect()
    assert last() is None


def test_tokens_come_when_asked_for(make_model) -> None:
    model = make_model(make_config())
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    tokens = generate(model, PROMPT, 100, backend="eager")
    assert not calls
    assert list(islice(tokens, 3)) == greedy(make_model(make_config()), PROMPT, 3)
    assert len(calls) == 3


def test_gradients_are_off_inside_and_untouched_outside(make_model) -> None:
    model = make_model(make_config()).requires_grad_(True)
    for _ in generate(model, PROMPT, 2, backend="eager"):
        assert torch.is_grad_enabled()


def test_stops_before_the_end_of_text(make_model) -> None:
    model = make_model(make_config())
    tokens = greedy(model, PROMPT, 12)
    ending = make_model(make_config(eos_token_id=tokens[6]))
    first = tokens.index(tokens[6])
    assert list(generate(ending, PROMPT, 12, backend="eager")) == tokens[:first]


def test_stops_where_the_context_is_full(make_model) -> None:
    model = make_model(make_config(max_position_embeddings=9))
    assert len(list(generate(model, PROMPT, 100, backend="eager"))) == 4
    assert list(generate(model, PROMPT, 0, backend="eager")) == []


def test_seeded_sampling_repeats_and_varies(make_model) -> None:
    model = make_model(make_config())

    def draw(seed, temperature=1.0, top_k=None):
        options = {"temperature": temperature, "top_k": top_k, "seed": seed}
        return list(generate(model, PROMPT, 20, backend="eager", **options))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, top_k=1) == greedy(model, PROMPT, 20)
    assert draw(1, temperature=1e-4) == greedy(model, PROMPT, 20)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2)):
        draws = [sample(logits, temperature, top_k, generator) for _ in range(4000)]
        kept = logits[: top_k or 4]
        expected = (kept / temperature).softmax(-1)
        share = torch.bincount(torch.tensor(draws), minlength=4) / 4000
        torch.testing.assert_close(share[: len(kept)], expected, rtol=0, atol=0.03)
        assert share[len(kept) :].sum() == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tokens": []}, "1 to 127 tokens"),
        ({"tokens": [1] * 128}, "1 to 127 tokens"),
        ({"tokens": torch.ones(1, 4)}, "1 to 127 tokens"),
        ({"tokens": [1, 300]}, r"outside 0\.\.299"),
        ({"tokens": [-1]}, r"outside 0\.\.299"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(make_model, arguments, reason) -> None:
    model = make_model(make_config())
    with pytest.raises(ValueError, match=reason):
        generate(model, **({"tokens": PROMPT} | arguments))


def test_caches_double_up_to_the_context(make_model) -> None:
    model = make_model(make_config(max_position_embeddings=3000)).bfloat16()
    assert [new_cache(model, n).max_len for n in (1, 256, 257, 1025, 2049)] == [
        256,
        256,
        512,
        2048,
        3000,
    ]
    assert new_cache(model, 1).keys[0].dtype == torch.bfloat16
    assert new_cache(make_model(make_config()), 1).max_len == 128


def test_a_compiled_step_is_kept(make_model) -> None:
    model = make_model(make_config())
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for _ in range(3):
        compile_step(model, count)(torch.tensor([1]), torch.tensor([0]), new_cache(model, 8))
    assert len(graphs) == 1
